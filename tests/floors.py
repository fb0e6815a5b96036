"""Which modules of the four packages import which, and which arrows between them run up the floors.

The core's floors, from the ground: maths, kinds, models, state, networks, training. The files stand
on the state, the command line on all of the core; `atomic` and `backends` import nothing of the
core. A backend stands on the core alone. `python tests/floors.py` prints what does not hold.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
PACKAGES = ("doconv_core", "doconv_torch", "doconv_tf", "doconv_mx")
LEAVES = ("atomic", "backends")
FLOORS = ("maths", "kinds", "models", "state", "networks", "training")
UNDER = {
    **{floor: {*LEAVES, *FLOORS[:i]} for i, floor in enumerate(FLOORS)},
    **{leaf: set() for leaf in LEAVES},
    "files": {*LEAVES, "maths", "kinds", "models", "state"},
    "cli": {*LEAVES, *FLOORS, "files"},
}


class Arrow(NamedTuple):
    """One module imports another of the four packages; inside: within a function."""

    source: str
    target: str
    inside: bool

    def __str__(self) -> str:
        return f"{self.source} -> {self.target}{' (in a function)' if self.inside else ''}"


def modules() -> dict[str, Path]:
    """Return the packages' Python files by their modules' names."""
    found = {}
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def arrows(files: dict[str, Path] | None = None) -> list[Arrow]:
    """Return every import of one of the modules by another, in the order of the files."""
    files = modules() if files is None else files
    found = []
    for name, path in files.items():
        is_package = path.name == "__init__.py"
        for node, inside in _imports(ast.parse(path.read_text(encoding="utf-8"))):
            for target in _targets(node, name if is_package else name.rpartition(".")[0], files):
                if target != name:
                    found.append(Arrow(name, target, inside))
    return list(dict.fromkeys(found))


def _imports(tree: ast.AST, inside: bool = False) -> Iterator[tuple[ast.AST, bool]]:
    """Yield the imports that run; those for type checkers alone do not."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node, inside
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        else:
            function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            yield from _imports(node, inside or function)


def _targets(node: ast.AST, package: str, files: dict[str, Path]) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names if alias.name in files)
        return
    assert isinstance(node, ast.ImportFrom)
    base = node.module or ""
    if node.level:
        parts = package.split(".")
        base = ".".join(filter(None, [*parts[: len(parts) - node.level + 1], base]))
    for alias in node.names:
        submodule = f"{base}.{alias.name}"
        if submodule in files:
            yield submodule
        elif base in files and not files[base].with_name(f"{alias.name}.c").exists():
            yield base  # and not a compiled module, which imports nothing


def floor_of(module: str) -> tuple[str, str]:
    """Return a module's package, and its floor of the core; "" for the core itself."""
    package, _, rest = module.partition(".")
    return package, rest.split(".")[0] if package == "doconv_core" else ""


def runs_up(arrow: Arrow) -> bool:
    """Whether an import is of a higher floor, of another backend, or of a backend by the core."""
    (package, here), (other, there) = floor_of(arrow.source), floor_of(arrow.target)
    if package != other:
        return other != "doconv_core"
    if package != "doconv_core" or here == there or not here:
        return False  # the core's own __init__ gathers the public names of all floors
    return there not in UNDER[here]


def circles(found: list[Arrow]) -> list[list[str]]:
    """Return the groups of modules that import each other, where functions' imports count too."""
    following: dict[str, list[str]] = {}
    for arrow in found:
        following.setdefault(arrow.source, []).append(arrow.target)

    def reached(start: str) -> set[str]:
        seen: set[str] = set()
        left = [start]
        while left:
            for name in following.get(left.pop(), ()):
                if name not in seen:
                    seen.add(name)
                    left.append(name)
        return seen

    everything = {name: reached(name) for name in following}
    groups = {
        tuple(sorted(m for m in seen if name in everything.get(m, ())))
        for name, seen in everything.items()
        if name in seen
    }
    return [list(group) for group in sorted(groups)]


def violations() -> set[str]:
    """Return what does not hold, a line each."""
    found = arrows()
    told = {f"{arrow} runs up" for arrow in found if runs_up(arrow)}
    open_ = [arrow for arrow in found if not arrow.inside]
    for circle in circles(open_):
        told.add(f"{', '.join(circle)} import each other")
    hidden = [tuple(circle) for circle in circles(found) if circle not in circles(open_)]
    for arrow in found:
        if arrow.inside and any({arrow.source, arrow.target} <= {*circle} for circle in hidden):
            told.add(f"{arrow} hides a circle")
    return told


if __name__ == "__main__":
    print(*sorted(violations()), sep="\n")
