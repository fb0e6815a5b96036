"""Layers that take an ordinary layer's arguments, in its order, and some of their own."""

from __future__ import annotations

from typing import Any

from doconv_core.models.received import named_constructor


class StandIn:
    """What stands in for an ordinary layer, which each rank names; errors name that rank's class.

    Not the base in which the constructor is written, and which nobody has called.
    """

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "ordinary" in vars(cls) and "__init__" not in vars(cls):
            cls.__init__ = named_constructor(cls)  # type: ignore[method-assign]
