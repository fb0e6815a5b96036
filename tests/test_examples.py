"""Every public name shows how it is used, and what it shows is what happens."""

from __future__ import annotations

import doctest
import importlib
import inspect
import pkgutil

import numpy as np
import pytest
from frameworks import BACKENDS, need

import doconv_core

# Examples are written as after `import numpy as np`, `import torch` (or the framework of the
# package) and `from doconv_core import *`, and then of the package.
FRAMEWORKS = {"torch": "torch", "tf": "keras", "mx": "mxnet"}
ALIASES = {"mxnet": "mx"}
PACKAGES = ["doconv_core", *(f"doconv_{backend}" for backend in BACKENDS)]
# Of these every public function and class must have an example.
COMPLETE = ("doconv_core", "doconv_torch", "doconv_tf", "doconv_mx")


def public(package):
    return {name: getattr(package, name) for name in package.__all__}


def names_for(name):
    """Return what the examples of a package may use without importing it."""
    package = importlib.import_module(name)
    names = {**public(doconv_core), **public(package), "np": np}
    framework = FRAMEWORKS.get(name.removeprefix("doconv_"))
    if framework is not None:
        names[ALIASES.get(framework, framework)] = importlib.import_module(framework)
    return names


def modules_of(name):
    package = importlib.import_module(name)
    yield package
    for found in pkgutil.walk_packages(package.__path__, f"{name}."):
        yield importlib.import_module(found.name)


def imported(name):
    backend = name.removeprefix("doconv_")
    if backend in BACKENDS:
        need(backend)
    return importlib.import_module(name)


@pytest.mark.parametrize("name", PACKAGES)
def test_examples_give_what_they_show(name, tmp_path, monkeypatch):
    imported(name)
    monkeypatch.chdir(tmp_path)  # where some write their files
    names, flags = names_for(name), doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    finder, told = doctest.DocTestFinder(exclude_empty=True), []
    runner = doctest.DocTestRunner(verbose=False, optionflags=flags)
    for module in modules_of(name):
        for test in finder.find(module, extraglobs=names):
            runner.run(test, out=told.append)
    assert not told, "".join(told)
    assert runner.tries > 0


@pytest.mark.parametrize("name", COMPLETE)
def test_every_public_name_has_an_example(name):
    shown = {n: value for n, value in public(imported(name)).items() if callable(value)}
    own = {n: vars(v).get("__doc__") if inspect.isclass(v) else v.__doc__ for n, v in shown.items()}
    lacking = [n for n, text in own.items() if ">>>" not in (text or "")]
    assert lacking == []
