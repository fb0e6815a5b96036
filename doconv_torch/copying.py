"""Copying a model, and the mode in which its layers are made."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from doconv_torch.view import is_plain


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
