"""What a call cannot take, told alike by every backend: what was received, and what would do."""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType
from typing import Any

from doconv_core.models.report import Converted


def no_model(expected: str, model: Any, name: str = "model") -> TypeError:
    """Return the error for what is no model. expected: what one is, by the framework's name."""
    kind = type(model)
    told = kind.__qualname__ if isinstance(model, Converted) else _full_name(kind)
    hint = ""
    if isinstance(model, Converted):
        hint = ", a model with the report of what was done; give its `.model`"
    elif isinstance(model, type):
        hint = f", the class {model.__qualname__} itself; give one of its instances"
    return TypeError(f"{name} must be a {expected}; received {told}{hint}.")


def check_callable(expected: str, **models: Any) -> None:
    """Raise TypeError for what is neither a model nor another callable, by the argument's name."""
    for name, model in models.items():
        if not callable(model):
            raise no_model(f"{expected} or another callable", model, name)


def named_constructor(cls: Any) -> Callable[..., None]:
    """Return a copy of the constructor that a class inherits, which errors name as the class's."""
    inherited = cls.__init__
    made = FunctionType(
        inherited.__code__,
        inherited.__globals__,
        inherited.__name__,
        inherited.__defaults__,
        inherited.__closure__,
    )
    made.__kwdefaults__, made.__doc__ = inherited.__kwdefaults__, inherited.__doc__
    made.__annotations__ = inherited.__annotations__
    made.__module__, made.__qualname__ = cls.__module__, f"{cls.__qualname__}.__init__"
    return made


def _full_name(kind: type) -> str:
    module = kind.__module__
    return kind.__qualname__ if module == "builtins" else f"{module}.{kind.__qualname__}"
