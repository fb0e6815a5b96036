"""How far two PyTorch models differ on the same inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from doconv_core.maths.numeric import Difference
from doconv_core.models.received import check_callable
from doconv_core.models.verify import flat, largest_difference, nested


def verify(a: Callable[..., Any], b: Callable[..., Any], inputs: Any) -> Difference:
    """Return the largest absolute and relative difference of b's outputs from a's.

    a, b: modules, or other callables, such as a session that runs an exported model. inputs: a
    tuple of positional arguments, a dict of arguments by name, or one argument, which may be nested
    in itself; tensors on the models' device. Each model gets a copy of its own, and the same random
    numbers.
    Outputs may be nested in dicts, lists, tuples and dataclasses; numbers, NumPy arrays and None
    may stand in the place of tensors. Relative is to the largest entry of a's output.
    Runs both in evaluation mode, without gradients, and restores each module's mode afterwards.
    Raises ValueError where the outputs differ in structure or shape, TypeError for an output of
    another kind.

    >>> conv = torch.nn.Conv2d(3, 8, 3)
    >>> verify(conv, conv, torch.ones(1, 3, 5, 5))
    Difference(absolute=0.0, relative=0.0)
    """
    check_callable("torch.nn.Module", a=a, b=b)
    devices = {t.device.index for t in _tensors(inputs) if t.is_cuda}
    with torch.no_grad(), _evaluating(a, b), torch.random.fork_rng(sorted(devices)):
        start = torch.get_rng_state(), [torch.cuda.get_rng_state(n) for n in sorted(devices)]
        expected = flat(_called(a, inputs), _array, "tensors")
        torch.set_rng_state(start[0])
        for device, state in zip(sorted(devices), start[1], strict=True):
            torch.cuda.set_rng_state(state, device)
        found = flat(_called(b, inputs), _array, "tensors")
    return largest_difference(found, expected)


@contextmanager
def _evaluating(*models: Any) -> Iterator[None]:
    """Put the models' modules into evaluation mode, one by one.

    `eval()` and `train()` do more in some models than setting the mode, and exported ones refuse.
    """
    modules = [m for model in models if isinstance(model, nn.Module) for m in model.modules()]
    modules = [module for module in modules if hasattr(module, "training")]  # not a frozen script
    modes = [module.training for module in modules]
    try:
        for module in modules:
            module.training = False
        yield
    finally:
        # In the order of the first visit, as a module of both models is visited twice.
        for module, training in zip(modules, modes, strict=True):
            module.training = training


def _called(model: Callable[..., Any], inputs: Any) -> Any:
    inputs = nested(inputs, _cloned)
    if isinstance(inputs, Mapping):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple) else model(inputs)


def _cloned(inputs: Any) -> Any:
    """Return an input of its own, where it is a tensor: a model may change it in place."""
    return inputs.detach().clone() if isinstance(inputs, Tensor) else inputs


def _tensors(inputs: Any) -> Iterator[Tensor]:
    if isinstance(inputs, Tensor):
        yield inputs
    elif isinstance(inputs, (dict, list, tuple)):
        for value in inputs.values() if isinstance(inputs, dict) else inputs:
            yield from _tensors(value)


def _array(tensor: Any) -> Any:
    """Return a tensor as an array, and None of anything else."""
    if not isinstance(tensor, Tensor):
        return None
    if tensor.is_quantized:
        tensor = tensor.dequantize()
    tensor = tensor.detach().to_dense() if tensor.layout != torch.strided else tensor.detach()
    halves = tensor.is_floating_point() and tensor.dtype.itemsize < 4
    return (tensor.float() if halves else tensor).cpu().numpy()
