"""Layers that take an ordinary layer's arguments, in its order, and some of their own."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from inspect import Parameter, Signature
from typing import Any

from doconv_core.maths.spec import as_integer, as_tuple

_SIZES = ("kernel_size", "strides", "dilation_rate")
_NUMBERS = ("filters", "groups", "depth_multiplier")


class StandIn:
    """What stands in for an ordinary layer. Each rank names that: ordinary, rank.

    `own_arguments` gives its own arguments, with their defaults; its constructor calls `_taken`.
    """

    ordinary: type[Any]
    rank: int

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "ordinary" in vars(cls) and "__init__" not in vars(cls):
            cls.__init__ = _constructor(cls)  # type: ignore[method-assign]

    def _require_built(self: Any) -> None:
        if not self.built:
            raise ValueError(f"layer {self.name!r} is not built; call it, or its build(), first.")

    @classmethod
    def own_arguments(cls) -> dict[str, Any]:
        """Return the arguments that the ordinary layer lacks, with their defaults."""
        return {}

    @classmethod
    def _taken(
        cls, args: tuple[Any, ...], options: dict[str, Any]
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return the ordinary layer's arguments and the own ones, by name; sizes are validated.

        Raises TypeError and ValueError for sizes that are none, TypeError for arguments that the
        ordinary layer does not take either.
        """
        own = {name: options.pop(name, each) for name, each in cls.own_arguments().items()}
        usual = inspect.signature(cls.ordinary.__init__)
        try:
            given = dict(usual.bind(None, *args, **options).arguments)
        except TypeError as error:
            raise TypeError(f"{cls.__name__}: {error}.") from None
        del given["self"]
        given |= given.pop("kwargs", {})
        for name in given.keys() & set(_SIZES):
            given[name] = as_tuple(name, given[name], cls.rank)
        for name in given.keys() & set(_NUMBERS):
            given[name] = as_integer(name, given[name])
        return given, own


def _constructor(cls: Any) -> Callable[..., None]:
    """Return the constructor of a class, with a signature that tells of its arguments."""

    def __init__(self: Any, *args: Any, **options: Any) -> None:
        super(cls, self).__init__(*args, **options)

    *usual, rest = inspect.signature(cls.ordinary.__init__).parameters.values()
    own = [
        Parameter(name, Parameter.KEYWORD_ONLY, default=default)
        for name, default in cls.own_arguments().items()
    ]
    __init__.__signature__ = Signature([*usual, *own, rest])  # type: ignore[attr-defined]
    return __init__
