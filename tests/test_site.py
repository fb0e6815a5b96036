"""The site: it builds without a warning, and its reference has every public name."""

from __future__ import annotations

import importlib
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest
from frameworks import BACKENDS, need

ROOT = Path(__file__).parents[1]
PACKAGES = ("core", *BACKENDS)


@pytest.mark.exhaustive
def test_the_site_builds_and_its_reference_is_whole(tmp_path):
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "-d", str(tmp_path)]
    done = subprocess.run(build, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    missing = []
    for package in PACKAGES:
        if package != "core":
            need(package)
        module = importlib.import_module(f"doconv_{package}")
        page = (tmp_path / "api" / package / "index.html").read_text(encoding="utf-8")
        assert "&gt;&gt;&gt; " in page
        assert "<blockquote>" not in page  # what an example is without its fence
        there = set(re.findall(rf'id="doconv_{package}\.(?:\w+\.)*(\w+)"', page))
        for name in module.__all__:
            public = getattr(module, name)
            # A second name for the same thing is not told twice.
            own = inspect.isfunction(public) or inspect.isclass(public)
            if own and public.__name__ == name and name not in there:
                missing.append(f"doconv_{package}.{name}")
    assert not missing
