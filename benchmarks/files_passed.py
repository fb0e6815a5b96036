"""Print which of the packages' files a command of doconv passes: those that run more than imports.

A file counts when the body of a function in it runs while the command does. What runs as a module
is imported does not count: class bodies, decorators, and what they call. An `__init__.py` doesn't
either. Processes that the command starts are not looked into.

    python benchmarks/files_passed.py fold model.pt folded.pt
    python benchmarks/files_passed.py --most 12 fold model.pt folded.pt
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# Runs in a process of its own, so that the profile sees the command alone. An import in progress is
# known by importlib's frame that executes the module, which is open all the time.
TRACED = """
import importlib, sys
from pathlib import Path

root, found, *arguments = sys.argv[1:]
sys.path.insert(0, root)
importlib.import_module("doconv_core.cli")
packages = tuple(str(Path(root, name)) + "/" for name in
                 ("doconv_core", "doconv_torch", "doconv_tf", "doconv_mx"))
passed, importing = set(), 0

def profile(frame, event, argument):
    global importing
    code = frame.f_code
    if code.co_name == "_load_unlocked" and "importlib" in code.co_filename:
        importing += (event == "call") - (event == "return")
    elif event == "call" and not importing and code.co_filename.startswith(packages):
        passed.add(code.co_filename)

sys.argv = ["doconv", *arguments]
sys.setprofile(profile)
try:
    sys.exit(importlib.import_module("doconv_core.cli").main())
finally:
    sys.setprofile(None)
    names = (Path(file).relative_to(root) for file in passed)
    kept = sorted(str(name) for name in names if name.name != "__init__.py")
    Path(found).write_text("\\n".join(kept), encoding="utf-8")
"""


def files_passed(arguments: list[str]) -> tuple[int, list[str]]:
    """Return the exit code of `doconv` with these arguments, and the files that it passes."""
    with tempfile.TemporaryDirectory() as folder:
        found = Path(folder, "found")
        command = [sys.executable, "-c", TRACED, str(ROOT), str(found), *arguments]
        code = subprocess.run(command, stdout=sys.stderr, check=False).returncode
        return code, found.read_text(encoding="utf-8").split()


def main() -> int:
    """Run the command and print the files and their number; 1 for more than --most."""
    parser = argparse.ArgumentParser(description="Which files a command of doconv passes.")
    parser.add_argument("--most", type=int, help="fail where more files are passed")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="what follows `doconv`")
    told = parser.parse_args()
    code, files = files_passed(told.command)
    print(*files, sep="\n")
    print(f"{len(files)} files")
    if code:
        print(f"doconv ended with exit code {code}", file=sys.stderr)
        return code
    return int(told.most is not None and len(files) > told.most)


if __name__ == "__main__":
    sys.exit(main())
