"""The command as such: its subcommands, files to open and to write, what it prints, and errors."""

from __future__ import annotations

import errno
import json
import math
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from importlib import import_module
from io import StringIO
from math import isqrt
from pathlib import Path
from types import FrameType
from typing import Any, Final, NoReturn

import click

from doconv_core.atomic import SuffixError, check_suffix, followed
from doconv_core.cli.options import KernelSizes, literal
from doconv_core.files.blocks import EpsilonError
from doconv_core.files.checkpoint import (
    Checkpoint,
    Format,
    open_checkpoint,
)
from doconv_core.files.entries import AllowError, CheckpointError
from doconv_core.files.layers import KernelSizeError, Layer
from doconv_core.maths.batchnorm import NotFoldable
from doconv_core.models.report import Report, place
from doconv_core.state.agreement import Mismatch
from doconv_core.state.file import StateError

DIFFERENT: Final = 1
USAGE: Final = 2
BAD_FILE: Final = 3
IMPOSSIBLE: Final = 4
TARGET: Final = 5
MISSING: Final = 6
DIVERGED: Final = 7
CRASH: Final = 70  # as sysexits.h has it: an error of the software itself
INTERRUPTED: Final = 128 + 2
PIPE: Final = 128 + 13
FULL = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)  # a disk that takes no more


class Failure(click.ClickException):
    """An error that is not this package's own. code: one of those above."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.exit_code = code  # type: ignore[misc]  # declared per class, read per instance


def as_failure(error: Exception) -> Failure | None:
    """Return what to tell the user of an error; None for one that is a fault of this package."""
    if isinstance(error, (NotFoldable, Mismatch)):
        return Failure(str(error), IMPOSSIBLE)
    if isinstance(error, CheckpointError) and isinstance(error.__cause__, ImportError):
        return Failure(str(error), MISSING)
    if isinstance(error, (CheckpointError, StateError)):
        return Failure(str(error), BAD_FILE)
    if isinstance(error, ImportError):
        return Failure(str(error), MISSING)
    if isinstance(error, FileExistsError):
        return Failure(_of_system(error), TARGET)
    if isinstance(error, OSError):
        return Failure(_of_system(error), TARGET if error.errno in FULL else USAGE)
    return None


def _of_system(error: OSError) -> str:
    if error.strerror is None:  # one of ours, whose text is a sentence already
        return str(error)
    where = f"{error.filename}: " if error.filename is not None else ""
    return f"{where}{error.strerror}."


def one_line(text: str) -> str:
    """Return text on one line, with what could steer a terminal written out.

    Names come from files, and a file may have been made to deceive whoever prints them.
    """
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in " ".join(text.split(None)))


def check_target(target: Path, force: bool) -> None:
    """Raise Failure where `target` cannot be written, or exists and is not to be replaced."""
    try:
        folder = followed(target).parent
        exists = os.path.lexists(target)
    except OSError as error:
        raise Failure(_of_system(error), TARGET) from None
    if exists and not force:
        raise target_exists(target)
    if target.exists() and not os.access(target, os.R_OK):
        raise Failure(f"{target} may not be read by you, and is not replaced.", TARGET)
    if not folder.is_dir():
        raise Failure(f"the folder {folder} of {target} does not exist.", TARGET)
    if not os.access(folder, os.W_OK | os.X_OK):
        raise Failure(f"the folder {folder} of {target} is not writable.", TARGET)


@contextmanager
def writing_to(target: Path) -> Iterator[None]:
    """Tell of what goes wrong in the block, which writes `target`, as a Failure."""
    try:
        yield
    except FileExistsError as error:  # it came into being meanwhile, or is a file beside it
        raise target_exists(getattr(error, "path", target)) from None
    except OSError as error:
        problem = error.strerror or str(error)
        raise Failure(f"{target} could not be written: {problem}.", TARGET) from error


def target_exists(target: str | Path) -> Failure:
    """Return the error for a target that must not be replaced."""
    return Failure(f"{target} exists; use --force to replace it.", TARGET)


def opened(
    file: Path,
    kernel_sizes: KernelSizes,
    allow: Sequence[str] = (),
    epsilon: float | None = None,
) -> Checkpoint:
    """Return the open checkpoint. A kernel size that does not fit is wrong usage, and no class."""
    try:
        return open_checkpoint(file, kernel_sizes=dict(kernel_sizes), allow=allow, epsilon=epsilon)
    except EpsilonError as error:
        raise click.UsageError(str(error)) from None
    except AllowError as error:
        raise click.UsageError(f"--allow: {error}") from None
    except KernelSizeError as error:
        raise click.UsageError(f"{file}: {error}") from None


def check_form(target: Path, form: Format) -> None:
    """Raise UsageError where the suffix of `target` says another format than is written."""
    try:
        check_suffix(target, form.NAME, form.SUFFIXES)
    except SuffixError as error:
        raise click.UsageError(str(error)) from None


def require_kernel_sizes(checkpoint: Checkpoint, layers: Iterable[Layer]) -> None:
    """Raise Failure, with the option that settles it, for a layer of unknown kernel size."""
    for layer in layers:
        if layer.needs_size:
            text = f"{checkpoint.path}: {place(layer.name)}: {note_of(layer)}."
            raise Failure(text, IMPOSSIBLE)


def note_of(layer: Layer) -> str:
    """Return a layer's note, in the words of the command line."""
    if layer.needs_size and layer.d_shape and "kernel_sizes=" in layer.note:
        taps = layer.d_shape[1]
        side = isqrt(taps)
        example = f"{side}x{side}" if side * side == taps else f"{taps}"
        return (
            f"its kernel size is not in the file, which tells {taps} taps; give it, such as "
            f"--kernel-size '{literal(layer.name)}={example}'"
        )
    return layer.note


GAP = 2  # spaces between columns
NARROWEST = 16  # to which a column of text is folded
WIDEST = 160  # characters of a cell: one long name would pad every row


def say(text: str) -> None:
    """Print a line in which names of files or layers may stand."""
    click.echo(one_line(text))


def cut(text: str) -> str:
    """Return text as a cell of a table has it: the middle of a long one is left out."""
    half = WIDEST // 2
    return text if len(text) <= WIDEST else f"{text[:half]}…{text[-half + 1 :]}"


def print_json(value: dict[str, Any]) -> None:
    """Print one JSON object. A number that is not finite, which JSON lacks, becomes null."""
    click.echo(json.dumps(_finite(value), indent=2))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def print_table(
    headings: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    text_columns: int = 1,
    err: bool = False,
) -> None:
    """Print rows of text under headings.

    text_columns: how many columns, from the left, hold text and may be folded where a terminal is
    narrow; the others hold numbers, at the right edge, and are never cut. Into a file or a pipe
    nothing is folded, and nothing but text is written. Of a text of more than 160 characters the
    middle is left out. err: whether to print on stderr.
    """
    stream = sys.stderr if err else sys.stdout
    cells = [[cut(one_line(cell)) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(headings, *cells, strict=True)]
    if stream is not None and stream.isatty():
        lines = _on_a_terminal(headings, cells, widths, text_columns)
    else:
        sides = ["<" if index < text_columns else ">" for index in range(len(headings))]
        parts = [f"{{:{side}{width}}}" for side, width in zip(sides, widths, strict=True)]
        line = (" " * GAP).join(parts)
        lines = [line.format(*row) for row in (headings, *cells)]
    for line in lines:
        click.echo(line.rstrip(), err=err)


def _on_a_terminal(
    headings: Sequence[str],
    rows: Iterable[Sequence[str]],
    widths: Sequence[int],
    text_columns: int,
) -> list[str]:
    """Return a table's lines, folded to the terminal's width."""
    from rich.console import Console  # here, as half of a subcommand's start would be spent on it
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, padding=(0, GAP, 0, 0))
    least = 0
    for index, (heading, longest) in enumerate(zip(headings, widths, strict=True)):
        text = index < text_columns
        narrowest = min(longest, NARROWEST) if text else longest
        least += narrowest + GAP
        table.add_column(
            heading,
            justify="left" if text else "right",
            overflow="fold",
            no_wrap=not text,
            min_width=narrowest,
        )
    for row in rows:
        table.add_row(*map(Text, row))
    written = StringIO()
    console = Console(file=written, force_terminal=True)
    console.width = max(console.width, least)  # a terminal wraps a line that is longer than it
    console.print(table)
    return written.getvalue().splitlines()


def print_report(report: Report) -> None:
    """Print what was done, as its `str` has it."""
    for line in str(report).splitlines():
        indented = len(line) - len(line.lstrip())
        click.echo(" " * indented + one_line(line))


@contextmanager
def progress(description: str) -> Iterator[Callable[[int, int], None]]:
    """Yield a function of the steps done and to do; a terminal shows them as a bar."""
    if sys.stderr is None or not sys.stderr.isatty():
        yield lambda done, total: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(description, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def counted(count: int, noun: str) -> str:
    """Return "1 layer", "2 layers"."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def size(numbers: Iterable[int]) -> str:
    """Return sizes as the command writes them: "3x3"."""
    return "x".join(map(str, numbers))


def number(value: int | None) -> str:
    """Return a number with its thousands apart; "?" for one that is not known."""
    return "?" if value is None else f"{value:,}"


# Each lives in the module of its name, which is imported when it is asked for.
SUBCOMMANDS = (
    "inspect", "fold", "convert", "cost", "verify", "recipes", "train", "evaluate", "study",
)  # fmt: skip


class Doconv(click.Group):
    """A group whose subcommands are imported as needed, and whose errors are one line each."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the subcommands in the order of a user's work, not of the alphabet."""
        return list(SUBCOMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Return the subcommand, imported now; None for an unknown one."""
        if cmd_name not in SUBCOMMANDS:
            return None
        command: click.Command = getattr(import_module(f"doconv_core.cli.{cmd_name}"), cmd_name)
        return command

    def invoke(self, ctx: click.Context) -> Any:
        """Run the subcommand; what is the file's or the user's fault becomes a `Failure`."""
        try:
            return super().invoke(ctx)
        except BrokenPipeError:  # whoever read our output has seen enough
            _close_quietly()
            ctx.exit(PIPE)
        except Exception as error:
            failure = as_failure(error)
            if failure is None:
                raise
            raise failure from error

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        **extra: Any,
    ) -> Any:
        """Run the command and exit; with `standalone_mode=False`, return or raise instead."""
        run: Callable[[], Any] = partial(
            super().main, args, prog_name or "doconv", complete_var, standalone_mode=False, **extra
        )
        if not standalone_mode:
            return run()
        try:
            code = run()
        except click.exceptions.NoArgsIsHelpError as error:
            error.show()
            code = error.exit_code
        except click.ClickException as error:
            _tell(_message(error))
            code = error.exit_code
        except click.Abort:
            _tell("doconv: interrupted.")
            code = INTERRUPTED
        except BrokenPipeError:
            raise
        except OSError as error:  # of a stream to which help is printed
            _tell(f"doconv: {_of_system(error)}")
            code = TARGET
        sys.exit(code if isinstance(code, int) else 0)


def _tell(line: str) -> None:
    """Print a line on stderr, if that takes it: else the exit code tells alone."""
    with suppress(OSError):
        click.echo(line, err=True)


def _message(error: click.ClickException) -> str:
    """Return the error as one line that begins with the command, as it was called."""
    ctx = getattr(error, "ctx", None) or click.get_current_context(silent=True)
    path = ctx.command_path if ctx else "doconv"
    message = one_line(error.format_message())
    if isinstance(error, click.UsageError):
        message += f" See {path} --help."
    return f"{path}: {message}"


def _close_quietly() -> None:
    """Point stdout at nothing, or the interpreter's last flush meets the broken pipe again."""
    with open(os.devnull, "w") as nothing:
        os.dup2(nothing.fileno(), sys.stdout.fileno())


@click.group(cls=Doconv, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="overconv", prog_name="doconv", message="%(prog)s %(version)s")
def doconv() -> None:
    """Look into, fold, convert and compare the checkpoints of over-parameterized networks.

    Files may be PyTorch's (.pt, .pth, .bin), safetensors, Keras' (.keras, .weights.h5) or Gluon's
    (.params); what a file is, is told by its content. No code of the model is needed, and no code
    in a file is run.

    \b
    Examples:
      doconv inspect model.pt
      doconv fold model.pt folded.pt
      doconv verify model.pt folded.pt
      doconv convert folded.pt folded.params
      doconv cost 64,64,3x3 --input 56x56 --batch 32

    \b
    Exit codes:
      0  done                    4  cannot be folded or converted exactly
      1  verify: they differ     5  OUT exists already, or cannot be written
      2  wrong usage             6  what reads this format is not installed
      3  a file that is damaged, or of no format that is known
    """  # noqa: D301


def _stop(number: int, frame: FrameType | None) -> NoReturn:
    raise SystemExit(128 + number)


def _open_closed_streams() -> None:
    """Put nothing in place of streams that the shell has closed, in their order.

    Else the first file that is opened would be taken for one of them.
    """
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:
            mode = "r" if name == "stdin" else "w"
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115


def main() -> None:
    """Run the console script: as `doconv`, with signals and crashes that leave nothing behind.

    A signal to end raises SystemExit, so that temporary files are removed. An error that is this
    package's own shows its traceback, and its code is none of those that mean something.
    """
    for name in ("SIGTERM", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), _stop)
    _open_closed_streams()
    interrupted: list[int] = []

    def interrupt(number: int, frame: FrameType | None) -> NoReturn:
        interrupted.append(number)
        raise KeyboardInterrupt

    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, interrupt)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # a layer's name may be in any script
    try:
        doconv()
    except BrokenPipeError:
        raise SystemExit(PIPE) from None
    except Exception:
        if interrupted:  # a library, called back, has made another error of it
            click.echo("doconv: interrupted.", err=True)
            raise SystemExit(INTERRUPTED) from None
        traceback.print_exc()
        raise SystemExit(CRASH) from None
