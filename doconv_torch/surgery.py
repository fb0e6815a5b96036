"""Making a module another one where it stands, and copying a model."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from doconv_torch.ordinary import is_plain

# What every module has, and what the layers that `become` is for have beyond it.
_BASE = frozenset(vars(nn.Module()))
_MADE = frozenset(vars(nn.Conv1d(1, 1, 1, device="meta"))) - _BASE | {"spec", "explained"}


def become(layer: nn.Module, other: nn.Module) -> None:
    """Make a module what another one is, parts and all, and keep its hooks, mode and identity.

    Attributes that are not of its type's making stay.
    """
    own, theirs = vars(layer), vars(other)
    for name in _MADE & own.keys():
        del own[name]
    for name in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"):
        own[name] = theirs[name]
    own.update({name: value for name, value in theirs.items() if name not in _BASE})
    layer.__class__ = type(other)


def copied(model: nn.Module, uncopied: Iterable[Tensor] = ()) -> nn.Module:
    """Return a deep copy of the model. uncopied: parameters that it is to have in common with it.

    Raises TypeError where it cannot be copied.
    """
    # A weight that a hook computed in the last call belongs to its graph; PyTorch copies no such
    # tensor, and of parameters only the values.
    memo: dict[int, Any] = {
        id(value): value.detach().clone()
        for module in model.modules()
        for value in vars(module).values()
        if isinstance(value, Tensor) and not value.is_leaf
    }
    memo.update((id(parameter), parameter) for parameter in uncopied)
    try:
        made = copy.deepcopy(model, memo)
        parameters = dict(made.named_parameters(remove_duplicate=False))
        for name, parameter in model.named_parameters(remove_duplicate=False):
            if parameters.get(name, parameter) is not parameter and is_plain(parameter):
                vars(parameters[name]).update(copy.deepcopy(vars(parameter), memo))
        return made
    except Exception as error:  # whatever the model's own parts raise
        raise TypeError(
            f"the model cannot be copied ({error}); with inplace=True it is converted itself."
        ) from error


@contextmanager
def ordinary_tensors() -> Iterator[None]:
    """Make tensors that can be trained, whatever mode the caller is in, and no graph."""
    with torch.inference_mode(False), torch.no_grad():
        yield
