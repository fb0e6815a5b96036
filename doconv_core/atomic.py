"""Files that are either whole or not there, and are what their names say."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import metadata
from pathlib import Path
from typing import Any

GROUP = "doconv.formats"
# Of files that others write of models, and of packed ones.
FOREIGN = frozenset((
    ".onnx", ".tflite", ".gguf", ".pt2", ".pb", ".mlmodel", ".npz", ".npy", ".msgpack", ".pdparams",
    ".zip", ".tar", ".tgz", ".gz", ".bz2", ".xz", ".zst", ".7z",
))  # fmt: skip

BEGINNING = 32  # characters of a file's name in that of its temporary folder


@contextmanager
def replacing(path: str | os.PathLike[str], *, overwrite: bool = True) -> Iterator[Path]:
    """Yield a temporary path beside `path`, and rename it to `path` if the block succeeds.

    An error or an interruption leaves whatever stood at `path` as it was, and removes the
    temporary file. A link at `path` stays: the file that it leads to is written. The new file has
    the permissions of the one that it replaces, and its owner and group as far as the system lets
    us. What else the block writes beside the temporary file, such as parts that it names, goes
    along, and before it.

    overwrite: whether a file at `path` may be replaced; if not, one that comes into being while
    the block runs is left as well. Raises, before the block runs, IsADirectoryError where `path` is
    a folder, OSError where it is a pipe, a device or the like, FileNotFoundError where its folder
    is not there; FileExistsError.
    """
    check_absent(path, overwrite)
    target = followed(path)
    if not target.parent.is_dir():
        raise FileNotFoundError(f"the folder {target.parent} of {target} does not exist.")
    # A folder, not a file: whatever writes in it creates its file with the usual permissions, and
    # nobody else can look into it. It has its name before it exists, so that it is removed however
    # soon after that a signal comes.
    # The names are short, as that of `target` may be as long as names can be.
    folder = target.with_name(f".{target.name[:BEGINNING]}.{secrets.token_hex(8)}")
    try:
        try:
            folder.mkdir(mode=0o700)
            temporary = folder / target.name
            yield temporary
            _take_places(folder, temporary, target, overwrite)
        finally:
            if folder.exists():
                shutil.rmtree(folder)
    except BaseException:  # a signal's too, which may come while the folder is removed
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _take_places(folder: Path, temporary: Path, target: Path, overwrite: bool) -> None:
    """Rename what is in `folder` to where it belongs: `temporary` last, the rest beside it."""
    beside = sorted(path for path in folder.iterdir() if path != temporary)
    pairs = [(path, target.with_name(path.name)) for path in (*beside, temporary)]
    for _, final in pairs:
        check_absent(final, overwrite)
    pairs = [(path, followed(final)) for path, final in pairs]
    for path, final in pairs:
        if overwrite:
            _keep_access(path, final)
            os.replace(path, final)
        else:
            _rename_to_new(path, final)


def followed(path: str | os.PathLike[str]) -> Path:
    """Return the file that is to be written for `path`: the one that a link leads to.

    Raises IsADirectoryError for a folder, OSError for a pipe, a device or a stream of a process,
    in whose place a file would be of no use, and for links that lead nowhere at all.
    """
    target = Path(path)
    try:
        mode = target.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        mode = stat.S_IFREG
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(f"{target} is a folder; name a file to write.")
    if not stat.S_ISREG(mode) or _is_stream(target):
        raise OSError(f"{target} is no ordinary file; name one to write.")
    return Path(os.path.realpath(target)) if target.is_symlink() else target


def _is_stream(path: Path) -> bool:
    """Return whether this is an open file of a process by another name, such as /dev/stdout."""
    while path.is_symlink():
        folder = Path(os.path.realpath(path.parent))
        if folder.parts[:2] == ("/", "proc"):
            return True
        path = folder / path.readlink()
    return False


def check_absent(target: str | os.PathLike[str], overwrite: bool) -> None:
    """Raise FileExistsError where `target` exists and must not be replaced."""
    if not overwrite and os.path.lexists(target):
        raise TargetExistsError(target)


class TargetExistsError(FileExistsError):
    """A file that must not be replaced. path: its name."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        super().__init__(f"{os.fspath(path)} exists; pass overwrite=True to replace it.")
        self.path = os.fspath(path)


def _keep_access(new: Path, target: Path) -> None:
    """Let nobody read or write `new` who could not do so with what is at `target`, if it exists."""
    if not target.exists():
        return
    old, own = target.stat(), new.stat()
    mode = stat.S_IMODE(old.st_mode)
    if old.st_uid != own.st_uid:
        with suppress(PermissionError):  # who is not root makes the file his
            os.chown(new, old.st_uid, -1)
    if old.st_gid != own.st_gid:
        try:
            os.chown(new, -1, old.st_gid)
        except PermissionError:
            mode &= ~stat.S_IRWXG  # what the old group might do, the new one might not
    new.chmod(mode)


def _rename_to_new(temporary: Path, target: Path) -> None:
    """Rename a file to a name that is free; FileExistsError where it is not, at that very moment.

    `os.rename` would replace a file that has come into being since it was looked for.
    """
    try:
        os.link(temporary, target)
    except FileExistsError:
        raise TargetExistsError(target) from None
    except OSError:  # the filesystem has no hard links: an empty file takes the name first
        try:
            target.open("xb").close()
        except FileExistsError:
            raise TargetExistsError(target) from None
        os.replace(temporary, target)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write `text` to `path` in UTF-8, atomically; folders that are missing are made."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write `value` to `path` as indented JSON, atomically; missing folders are made."""
    write_text(path, json.dumps(value, indent=2) + "\n")


class SuffixError(ValueError):
    """A file is to be written under a suffix that says another format."""


def registered() -> dict[str, Any]:
    """Return the modules of all registered formats, by name. Raises ImportError where one fails."""
    entries = sorted(metadata.entry_points(group=GROUP), key=lambda entry: entry.name)
    return {entry.name: entry.load() for entry in entries}


def format_by_suffix(name: str) -> Any:
    """Return the format that a file's suffix tells; None where it tells none."""
    # The longest suffix: that of a sharded file ends in others'.
    by_suffix = {suffix: each for each in registered().values() for suffix in each.SUFFIXES}
    fitting = [suffix for suffix in by_suffix if name.lower().endswith(suffix)]
    return by_suffix[max(fitting, key=len)] if fitting else None


def check_suffix(
    target: str | os.PathLike[str], name: str, suffixes: tuple[str, ...], advice: str = ""
) -> None:
    """Raise SuffixError where the suffix of `target` says another format than that of a name.

    suffixes: of the format's files. advice: what would be right.
    """
    file = os.path.basename(os.fspath(target))
    if os.path.splitext(file)[1].lower() in FOREIGN:
        raise SuffixError(
            f"{os.fspath(target)} would be a {name} file ({', '.join(suffixes)}), and its suffix "
            f"says a file that is not written here; name it otherwise{advice}."
        )
    told = format_by_suffix(file)
    if told is not None and suffixes != told.SUFFIXES:
        raise SuffixError(
            f"{os.fspath(target)} would be a {name} file ({', '.join(suffixes)}), and its suffix "
            f"says a {told.NAME} file ({', '.join(told.SUFFIXES)}); name it otherwise{advice}."
        )
