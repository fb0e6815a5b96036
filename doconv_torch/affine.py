"""What a batch norm of whatever class computes, told by running its own code.

The code is given a value that knows itself as a scale and an offset of the input's channels. What
is done with it is followed as long as that remains true; anything else ends the reading. Behind it
may stand layers of the batch norm's own, such as an activation.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

BATCHNORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


class Reading(NamedTuple):
    """A batch norm as `input * scale + offset`, `(C,)` each, and what stands behind it.

    In float64, where the device has it. after: names of its own layers, in the order of their use.
    """

    scale: Tensor
    offset: Tensor
    after: tuple[str, ...]


def read(norm: Any, axes: int) -> Reading | None:
    """Return what a batch norm computes of a value with this many axes; None for what is no more.

    Of the one that is read, nothing is changed.
    """
    if type(norm) in BATCHNORMS:
        mean, variance = _wide(norm.running_mean), _wide(norm.running_var)
        return Reading(*_affine(mean, variance, norm.weight, norm.bias, norm.eps), ())
    try:
        with torch.no_grad():
            found = _copied(norm)(_Value.of(norm.running_mean, axes))
    except Exception:  # whatever the code raises that cannot be followed
        return None
    if type(found) is not _Value:
        return None
    kept = [name for name in found.after if type(norm._modules[name]) is not nn.Identity]
    if len(set(found.after)) < len(found.after):
        return None
    return Reading(found.scale, found.offset, found.after if kept else ())


def _wide(tensor: Tensor) -> Tensor:
    return tensor.detach().to(torch.float32 if tensor.device.type == "mps" else torch.float64)


def _affine(
    mean: Tensor, variance: Tensor, scale: Tensor | None, offset: Tensor | None, epsilon: float
) -> tuple[Tensor, Tensor]:
    """Return a batch norm's scale and offset."""
    factor = torch.rsqrt(variance + epsilon)
    factor = factor if scale is None else factor * _wide(scale)
    shift = -mean * factor
    return factor, shift if offset is None else shift + _wide(offset)


def _copied(norm: nn.Module) -> nn.Module:
    """Return a copy without hooks, with wide values, whose layers are only noted."""
    made = copy.copy(norm)
    vars(made).update({name: copy.copy(value) for name, value in vars(norm).items()})
    for name, value in norm._parameters.items():
        made._parameters[name] = None if value is None else nn.Parameter(_wide(value))
    for name, buffer in norm._buffers.items():
        floats = buffer is not None and buffer.is_floating_point()
        made._buffers[name] = _wide(buffer) if floats and buffer is not None else buffer
    made._modules = {name: _Noted(name) for name in norm._modules}
    return made


class _Noted(nn.Module):
    """In the place of a layer inside a batch norm: notes that it was called."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def forward(self, value: Tensor) -> Tensor:
        if type(value) is not _Value:
            raise _CannotBeFollowed
        return value.then(value.scale, value.offset, (*value.after, self.name))


class _CannotBeFollowed(Exception):
    """A batch norm's code does something else than what one does."""


class _Value(Tensor):
    """A value that is `input * scale + offset`, and then what the layers `after` make of it."""

    scale: Tensor
    offset: Tensor
    after: tuple[str, ...]

    @staticmethod
    def of(like: Tensor, axes: int) -> _Value:
        """Return the input of a batch norm with statistics of this kind."""
        like = _wide(like)
        shape = (2, like.numel(), *(3,) * (axes - 2))
        value = torch.empty(shape, dtype=like.dtype, device="meta").as_subclass(_Value)
        return value._with(torch.ones_like(like), torch.zeros_like(like), ())

    def _with(self, scale: Tensor, offset: Tensor, after: tuple[str, ...]) -> _Value:
        self.scale, self.offset, self.after = scale, offset, after
        return self

    def then(self, scale: Tensor, offset: Tensor, after: tuple[str, ...] = ()) -> _Value:
        """Return another value of the same shape; only layers follow layers."""
        if self.after and not after:
            raise _CannotBeFollowed
        with torch._C.DisableTorchFunctionSubclass():
            made = torch.empty_like(self, device="meta").as_subclass(_Value)
        return made._with(scale, offset, after)

    def channels(self, value: Any) -> Any:
        """Return a number, or an array that has one entry for each channel, as `(C,)`."""
        if not isinstance(value, Tensor):
            return value
        if type(value) is _Value:
            raise _CannotBeFollowed
        shape = (1, self.scale.numel(), *(1,) * (self.dim() - 2))
        return value.expand(shape).flatten()

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func in _TOLD or (func is Tensor.size and args[1:] == (1,)):
            return super().__torch_function__(  # type: ignore[no-untyped-call]
                func, types, args, kwargs
            )
        if func not in _FOLLOWED:
            raise _CannotBeFollowed
        return _FOLLOWED[func](*args, **(kwargs or {}))


def _batch_norm(*args: Any, **kwargs: Any) -> _Value:
    given = _SIGNATURE.bind(*args, **kwargs)
    given.apply_defaults()
    x, mean, variance, scale, offset, training, _, epsilon = given.arguments.values()
    if training or type(x) is not _Value or any(p is not None and p.dim() != 1 for p in args[1:5]):
        raise _CannotBeFollowed
    factor, shift = _affine(mean, variance, scale, offset, epsilon)
    return x.then(x.scale * factor, x.offset * factor + shift)


def _times(a: Any, b: Any) -> _Value:
    x, by = (a, b) if type(a) is _Value else (b, a)
    by = x.channels(by)
    return x.then(x.scale * by, x.offset * by)


def _plus(a: Any, b: Any) -> _Value:
    x, by = (a, b) if type(a) is _Value else (b, a)
    return x.then(x.scale, x.offset + x.channels(by))


def _minus(a: Any, b: Any) -> _Value:
    return _plus(a, -b) if type(a) is _Value else _plus(_times(b, -1), a)


def _over(a: Any, b: Any) -> _Value:
    if type(a) is not _Value:
        raise _CannotBeFollowed
    by = a.channels(b)
    return a.then(a.scale / by, a.offset / by)


_SIGNATURE = inspect.signature(functional.batch_norm)
_TOLD = frozenset(
    [*(getattr(Tensor, name).__get__ for name in ("ndim", "dtype", "device", "requires_grad")),
     *(getattr(Tensor, name).__get__ for name in ("is_cuda", "is_mps", "is_meta")), Tensor.dim]
)  # fmt: skip
_FOLLOWED: dict[Any, Callable[..., _Value]] = {
    functional.batch_norm: _batch_norm,
    **dict.fromkeys((torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__), _times),
    **dict.fromkeys((torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__), _plus),
    **dict.fromkeys((torch.sub, Tensor.sub, Tensor.__sub__), _minus),
    **dict.fromkeys((torch.div, Tensor.div, Tensor.__truediv__), _over),
}
