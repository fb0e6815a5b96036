"""The packages stand on their floors: no import runs up, in a circle, or hides one."""

from __future__ import annotations

import re

import pytest
from cases import one_test
from floors import PACKAGES, Arrow, arrows, circles, modules, runs_up, violations


def test_what_is_imported_lies_below():
    assert violations() == set()


def test_every_file_is_read():
    found, read = arrows(), modules()
    for package in PACKAGES:
        assert sum(name.startswith(package) for name in read) > 10
        assert sum(arrow.source.startswith(package) for arrow in found) > 10


def test_a_package_imports_no_other_framework():
    frameworks = {"gluoncv", "jax", "keras", "mxnet", "tensorflow", "torch"}
    found = {package: set() for package in PACKAGES}
    for name, path in modules().items():
        names = re.findall(r"^ *(?:import|from) (\w+)", path.read_text(), re.MULTILINE)
        found[name.partition(".")[0]] |= frameworks.intersection(names)
    assert found == {
        "doconv_core": set(), "doconv_torch": {"torch"}, "doconv_tf": {"keras", "tensorflow"},
        "doconv_mx": {"mxnet"},
    }  # fmt: skip


@one_test
@pytest.mark.parametrize(
    ("source", "target", "expected"),
    [
        ("doconv_core.maths.spec", "doconv_core.kinds.do_conv", True),
        ("doconv_core.kinds.do_conv", "doconv_core.maths.spec", False),
        ("doconv_core.networks.names", "doconv_core.kinds.do_conv", False),
        ("doconv_core.state.file", "doconv_core.networks.names", True),
        ("doconv_core.files.keras", "doconv_core.state.file", False),
        ("doconv_core.files.keras", "doconv_core.networks.names", True),
        ("doconv_core.cli.fold", "doconv_core.files.keras", False),
        ("doconv_core.files.keras", "doconv_core.cli.fold", True),
        ("doconv_core.atomic", "doconv_core.maths.spec", True),
        ("doconv_core.backends", "doconv_core.atomic", True),
        ("doconv_core.maths.spec", "doconv_core.atomic", False),
        ("doconv_core", "doconv_core.networks.names", False),
        ("doconv_core.cli.fold", "doconv_torch.model", True),
        ("doconv_torch.model", "doconv_tf.model", True),
        ("doconv_torch.model", "doconv_core", False),
        ("doconv_torch.model", "doconv_core.networks.names", False),
    ],
)
def test_which_arrows_run_up(source, target, expected):
    assert runs_up(Arrow(source, target, False)) == expected


def test_arrows_and_circles_are_found_in_sources(tmp_path):
    sources = {
        "p": "from p.a import x\n",
        "p.a": "from __future__ import annotations\nimport numpy, p.b\nfrom .b import x\n",
        "p.b": "if TYPE_CHECKING:\n    from p.d import y\ndef f():\n    from . import c\n",
        "p.c": "try:\n    from p import a\nexcept ImportError:\n    from p import x\n",
        "p.d": "class A:\n    from p import compiled\n",
    }
    files = {}
    for name, source in sources.items():
        folder = "__init__" if name == "p" else name[2:]
        files[name] = tmp_path / f"{folder}.py"
        files[name].write_text(source)
    (tmp_path / "compiled.c").touch()
    found = arrows(files)
    assert [str(arrow) for arrow in found] == [
        "p -> p.a", "p.a -> p.b", "p.b -> p.c (in a function)", "p.c -> p.a", "p.c -> p",
    ]  # fmt: skip
    assert circles(found) == [["p", "p.a", "p.b", "p.c"]]
    assert circles([arrow for arrow in found if not arrow.inside]) == []
