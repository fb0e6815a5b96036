"""What a pickle of PyTorch's calls, looked at before it is read: nothing is made of it here.

PyTorch reads few names, and calls what they name with whatever the file has. Some of these calls
make gigabytes of a few bytes: `bytearray(2**31)`, `torch.Tensor(2**31)`, and text that is encoded
in hexadecimal again and again. `torch.save` writes none such.
"""

from __future__ import annotations

import pickletools
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any, cast

from doconv_core.files.entries import SMALL, CheckpointError

# What has to be among a pickle's bytes for any of these calls.
SUSPECT = re.compile(
    rb"c(?:_codecs|__builtin__|builtins|torch\.storage)\n|ctorch(?:\.\w+)*\n\w*Tensor\n"
)
ENCODE, BYTEARRAY = "_codecs.encode", "builtins.bytearray"
LATIN = ("latin1", "latin-1")
PLAIN = tuple(f"builtins.{name}" for name in ("list", "dict", "tuple", "int", "float", "bool"))
SIZED = re.compile(r"torch(?:\.\w+)*\.\w*(?:Tensor|Storage)")
MOST = 4  # times as many bytes as the pickle has may be encoded in it


class _Global(str):
    """A name in a pickle."""


_OTHER, _BYTES, _MARK = object(), object(), object()


def check_calls(path: Path, file: IO[bytes], size: int) -> None:
    """Raise CheckpointError where a pickle of `size` bytes calls what makes much of little.

    file: from which it is read, up to its end. What is no pickle that PyTorch reads, it refuses.
    """
    encoded = 0
    try:
        for name, arguments in _calls(file):
            problem = _problem(name, arguments)
            if name == ENCODE and arguments and not problem:
                encoded += len(arguments[0])
            if problem or encoded > SMALL + MOST * size:
                raise CheckpointError(
                    f"{path} is no PyTorch file that torch.save has written: it calls {name} "
                    f"{problem or 'for more bytes than it has'}; it is not read."
                )
    except (IndexError, KeyError, ValueError, TypeError) as error:
        if isinstance(error, CheckpointError):
            raise


def _problem(name: str, arguments: Sequence[Any] | None) -> str:
    """Return what is wrong with a call, "" for nothing. arguments: None where they are not told."""
    if name == ENCODE:
        text, *code = arguments or (None,)
        fits = type(text) is str and len(code) == 1 and code[0] in LATIN
        return "" if fits else "with other than text in Latin-1"
    if name == BYTEARRAY:
        fits = arguments is not None and all(x is _BYTES or type(x) is str for x in arguments)
        return "" if fits else "with other than bytes"
    if name in PLAIN or SIZED.fullmatch(name):
        return "with arguments" if arguments is None or len(arguments) else ""
    return ""


def _calls(file: IO[bytes]) -> Iterator[tuple[str, Any]]:
    """Yield the names that a pickle calls, with the arguments as far as they are constants."""
    stack: list[Any] = []
    memo: dict[int, Any] = {}

    def since_mark() -> list[Any]:
        place = len(stack) - 1 - stack[::-1].index(_MARK)
        items = stack[place + 1 :]
        del stack[place:]
        return items

    for opcode, told, _ in pickletools.genops(file):
        name, argument = opcode.name, cast(Any, told)
        if name == "GLOBAL":
            module, _, attribute = argument.partition(" ")
            module = "builtins" if module == "__builtin__" else module
            attribute = {"long": "int"}.get(attribute, attribute)
            stack.append(_Global(f"{module}.{attribute}"))
        elif name in ("BINUNICODE", "BININT", "BININT1", "BININT2", "LONG1"):
            stack.append(argument)
        elif name == "MARK":
            stack.append(_MARK)
        elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            count = int(name[-1])
            stack[-count:] = [tuple(stack[-count:])]
        elif name == "TUPLE":
            stack.append(tuple(since_mark()))
        elif name == "EMPTY_TUPLE":
            stack.append(())
        elif name in ("REDUCE", "NEWOBJ"):
            arguments, called = stack.pop(), stack.pop()
            if isinstance(called, _Global):
                yield str(called), arguments if isinstance(arguments, tuple) else None
            stack.append(_BYTES if called == ENCODE else _OTHER)
        elif name in ("BUILD", "APPEND"):
            stack.pop()
        elif name == "SETITEM":
            del stack[-2:]
        elif name in ("APPENDS", "SETITEMS"):
            since_mark()
        elif name == "BINPERSID":
            stack[-1] = _OTHER
        elif name in ("BINPUT", "LONG_BINPUT"):
            memo[argument] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif name not in ("PROTO", "STOP"):
            stack.append(_OTHER)
