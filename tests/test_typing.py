"""A user's script that uses the packages type-checks, under mypy --strict as its user has it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from frameworks import need

SCRIPT = Path(__file__).parent / "typing" / "user_script.py"
WRONG = """
import torch
from doconv_torch import export_state, over_parameterize, verify

difference = verify(torch.nn.ReLU(), torch.nn.ReLU(), torch.ones(1))
export_state("a model")
over_parameterize(torch.nn.ReLU(), where=3)
print(difference.largest)
"""


def checked(script, folder):
    """Return what mypy says of a script beside which the packages are installed, typed."""
    # PyTorch leaves some of its own functions without types, `Tensor.backward` among them.
    options = ["--strict", "--config-file=", "--untyped-calls-exclude=torch"]
    command = [sys.executable, "-m", "mypy", *options, f"--cache-dir={folder / 'cache'}", script]
    return subprocess.run(
        command, cwd=folder, capture_output=True, text=True,
        env={"PATH": "", "MYPYPATH": str(SCRIPT.parents[2])},
    )  # fmt: skip


@pytest.mark.exhaustive
def test_a_users_script_type_checks(tmp_path):
    need("torch")
    done = checked(SCRIPT, tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    wrong = tmp_path / "wrong.py"
    wrong.write_text(WRONG)
    told = checked(wrong, tmp_path).stdout
    assert [line.split(":")[1] for line in told.splitlines() if "wrong.py" in line] == [
        "6", "7", "8",
    ], told  # fmt: skip


def test_the_script_names_every_public_function_of_the_backend():
    need("torch")
    import doconv_torch

    text = SCRIPT.read_text()
    classes = {name for name in doconv_torch.__all__ if name[0].isupper()}
    assert [name for name in doconv_torch.__all__ if name not in text and name not in classes] == []
