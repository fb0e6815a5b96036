"""A user's script that uses the packages type-checks, under mypy --strict and under pyright."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from frameworks import need

ROOT = str(Path(__file__).parents[1])
SCRIPT = Path(__file__).parent / "typing" / "user_script.py"
WRONG = """
import torch
from doconv_torch import export_state, over_parameterize, verify

difference = verify(torch.nn.ReLU(), torch.nn.ReLU(), torch.ones(1))
export_state("a model")
over_parameterize(torch.nn.ReLU(), where=3)
print(difference.largest)
"""
SCRIPTS = [SCRIPT.name, "wrong.py"]


def by_mypy(folder):
    """Return what mypy says of scripts beside which the packages are installed, typed."""
    # PyTorch leaves some of its own functions without types, `Tensor.backward` among them.
    options = ["--strict", "--config-file=", "--untyped-calls-exclude=torch"]
    command = [sys.executable, "-m", "mypy", *options, "--cache-dir=cache", *SCRIPTS]
    environment = {"PATH": "", "MYPYPATH": ROOT}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def by_pyright(folder):
    """Return what pyright says, by its rules; the wheel of this fork brings its own Node."""
    settings = {"typeCheckingMode": "standard", "extraPaths": [ROOT], "include": SCRIPTS}
    (folder / "pyrightconfig.json").write_text(json.dumps(settings))
    command = [sys.executable, "-m", "basedpyright", "--pythonpath", sys.executable, "-p", "."]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)


@pytest.mark.exhaustive
@pytest.mark.parametrize("checked", [by_mypy, by_pyright])
def test_a_users_script_type_checks(tmp_path, checked):
    need("torch")
    shutil.copy(SCRIPT, tmp_path)
    (tmp_path / "wrong.py").write_text(WRONG)
    done = checked(tmp_path)
    told = done.stdout + done.stderr
    assert done.returncode == 1, told
    errors = re.findall(r"(\w+\.pyi?):(\d+):.*error", told)
    assert errors == [("wrong.py", line) for line in "678"], told
    assert "3 errors" in told


def test_the_script_names_every_public_function_of_the_backend():
    need("torch")
    import doconv_torch

    text = SCRIPT.read_text()
    classes = {name for name in doconv_torch.__all__ if name[0].isupper()}
    assert [name for name in doconv_torch.__all__ if name not in text and name not in classes] == []
