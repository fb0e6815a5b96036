"""The group of subcommands, and what becomes of an error: one line on stderr and an exit code."""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from types import FrameType
from typing import Any, NoReturn

import click

from doconv_core.cli.errors import CRASH, INTERRUPTED, PIPE, as_failure, one_line

# Each lives in the module of its name, which is imported when it is asked for.
SUBCOMMANDS = ("inspect", "fold", "convert", "cost", "verify")


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
            click.echo(_message(error), err=True)
            code = error.exit_code
        except click.Abort:
            click.echo("doconv: interrupted.", err=True)
            code = INTERRUPTED
        sys.exit(code if isinstance(code, int) else 0)


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
@click.version_option(package_name="doconv", prog_name="doconv", message="%(prog)s %(version)s")
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


def main() -> None:
    """Run the console script: as `doconv`, with signals and crashes that leave nothing behind.

    A signal to end raises SystemExit, so that temporary files are removed. An error that is this
    package's own shows its traceback, and its code is none of those that mean something.
    """
    for name in ("SIGTERM", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), _stop)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # a layer's name may be in any script
    try:
        doconv()
    except BrokenPipeError:
        raise SystemExit(PIPE) from None
    except Exception:
        traceback.print_exc()
        raise SystemExit(CRASH) from None
