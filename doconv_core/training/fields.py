"""The fields of a recipe: how each is read from a text, and what it may be."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from doconv_core.maths.orthonormal import as_weight
from doconv_core.maths.spec import as_integer, as_number, check_choice, is_sequence
from doconv_core.training.data.operations import parsed

SGD, NESTEROV, ADAMW = "sgd", "nesterov", "adamw"
CONSTANT, STEPS, COSINE = "constant", "steps", "cosine"
ITERATION, EPOCH = "iteration", "epoch"
NORMS, BIASES, DEPTHWISE = "norms", "biases", "depthwise"
WEIGHTS, KERNELS = "weights", "kernels"
MOST = 2**31 - 1  # of counts
SMALLEST, LARGEST = float(np.finfo("f4").tiny), float(np.finfo("f4").max)  # of what is computed in


class Field(NamedTuple):
    """read: what a text says, or the text itself, which `check` then refuses. check: the value."""

    read: Callable[[str], Any]
    check: Callable[[str, Any], Any]


def _integer(least: int) -> Field:
    return Field(_integer_text, lambda name, value: as_integer(name, value, least=least, most=MOST))


def _integer_text(text: str) -> Any:
    try:
        return int(text)
    except ValueError:
        return text


def _number(least: float = 0, below: float | None = None, *, open_: bool = False) -> Field:
    """Return a number of at least `least`, or above it where that is open, and below another."""
    told = f"{'above' if open_ else 'at least'} {least}"
    told += "" if below is None else f" and below {below}, as a float32 too"

    def check(name: str, value: Any) -> float:
        number = as_number(name, value)
        small = number < least or (open_ and number == least)
        if small or (below is not None and (number >= below or np.float32(number) >= below)):
            raise ValueError(f"{name} must be {told}; received {name}={value!r}.")
        if number and not SMALLEST <= number <= LARGEST:
            raise ValueError(
                f"{name} must be a float32, from {SMALLEST:.1e} to {LARGEST:.1e}; received "
                f"{name}={value!r}."
            )
        return number

    return Field(_number_text, check)


def _number_text(text: str) -> Any:
    try:
        return float(text)
    except ValueError:
        return text


def _or_none(field: Field) -> Field:
    return Field(
        lambda text: None if text.strip().lower() == "none" else field.read(text),
        lambda name, value: None if value is None else field.check(name, value),
    )


def _choice(*choices: str) -> Field:
    def check(name: str, value: Any) -> str:
        check_choice(name, value, choices)
        return str(value)

    return Field(str.strip, check)


def _flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be true or false; received {name}={value!r}.")
    return value


def _flag_text(text: str) -> Any:
    return {"true": True, "false": False}.get(text.strip().lower(), text)


def _name(name: str, value: Any) -> str:
    if not isinstance(value, str) or not value.strip() or not value.isprintable():
        raise ValueError(f"{name} must be text of one line; received {name}={value!r}.")
    return value


def _several(entry: Callable[[str, Any], Any], read: Callable[[str], Any], what: str) -> Field:
    """Return a field of several entries. what: they are, with an example."""

    def check(name: str, value: Any) -> tuple[Any, ...]:
        if not is_sequence(value):
            raise TypeError(f"{name} must be a tuple of {what}; received {name}={value!r}.")
        return tuple(entry(f"{name}[{n}]", each) for n, each in enumerate(value))

    return Field(lambda text: tuple(read(part) for part in _parts(text)), check)


def _parts(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _milestones(name: str, value: Any) -> tuple[int, ...]:
    epochs: tuple[int, ...] = _EPOCHS.check(name, value)
    if list(epochs) != sorted(set(epochs)):
        raise ValueError(f"{name} must rise, such as (100, 150); received {name}={epochs}.")
    return epochs


def _operation(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{name} must be an operation such as 'flip'; received {value!r}.")
    try:
        parsed(value)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    return " ".join(value.split())


def _same_each_time(name: str, value: Any) -> str:
    text = _operation(name, value)
    if parsed(text).random:
        raise ValueError(
            f"{name} must not be random, as an evaluation is the same each time; received {text!r}."
        )
    return text


_EPOCHS = _several(as_integer, _integer_text, "epochs, such as (100, 150)")
_ROLES = _choice(NORMS, BIASES, DEPTHWISE)
_OPERATIONS = "operations on images, such as ('resize 32 32',)"
_SHARE = _number(0, 1)
_WEIGHT = Field(_number_text, as_weight)

FIELDS: Mapping[str, Field] = {
    "name": Field(str, _name),
    "epochs": _integer(1),
    "batch_size": _integer(1),
    "optimizer": _choice(SGD, NESTEROV, ADAMW),
    "learning_rate": _number(open_=True),
    "accumulate": _integer(1),
    "momentum": _SHARE,
    "beta2": _SHARE,
    "epsilon": _number(open_=True),
    "weight_decay": _number(),
    "decay_exempt": _several(_ROLES.check, _ROLES.read, "roles, such as ('norms', 'biases')"),
    "schedule": _choice(CONSTANT, STEPS, COSINE),
    "milestones": _EPOCHS._replace(check=_milestones),
    "factor": _number(open_=True),
    "warmup_epochs": _number(),
    "per": _choice(ITERATION, EPOCH),
    "clip_norm": _or_none(_number(open_=True)),
    "label_smoothing": _SHARE,
    "mixup": _number(),
    "mixup_off_epochs": _integer(0),
    "average": _or_none(_number(0, 1, open_=True)),
    "average_of": _choice(WEIGHTS, KERNELS),
    "orthonormality": _WEIGHT,
    "lasso": _WEIGHT,
    "zero_last_gamma": Field(_flag_text, _flag),
    "drop_last": Field(_flag_text, _flag),
    "train_images": _several(_operation, str, _OPERATIONS),
    "eval_images": _several(_same_each_time, str, _OPERATIONS),
}
