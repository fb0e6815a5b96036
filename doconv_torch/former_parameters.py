"""Optimizers that were made before a model was converted in place, and know nothing of it.

They go on with the parameters that they were given. That shows when they take steps: a new
parameter then has its value still, or one that the model no longer has is updated.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook

from doconv_core.models.report import Converted

Model = TypeVar("Model", bound=nn.Module)
STEPS = 2  # of an optimizer after which its first one shows
MISSED = (
    "an optimizer takes steps that was made before {call}(inplace=True), and does not have "
    "{path!r}: give it to the optimizer by add_param_group, or make the optimizer afterwards. "
    "The same holds for what else was made of the model's parameters, such as an AveragedModel."
)


class _Replaced:
    """What became of a layer: which optimizers are asked about, and what they should have."""

    def __init__(self, call: str, path: str, known: Sequence[Tensor], new: Tensor) -> None:
        self.call, self.path = call, path
        self.known = [weakref.ref(each) for each in known]
        self.new, self.version = weakref.ref(new), new._version
        self.steps: weakref.WeakKeyDictionary[Optimizer, int] = weakref.WeakKeyDictionary()

    def noticed(self, optimizer: Optimizer, held: set[int]) -> bool | None:
        """Return whether a new parameter was missed; None where that is not known yet."""
        new = self.new()
        if new is None or id(new) in held or new._version != self.version:
            return False  # gone, or trained, by this optimizer or another
        if not any(id(each) in held for each in (ref() for ref in self.known) if each is not None):
            return None  # an optimizer of something else
        self.steps[optimizer] = self.steps.get(optimizer, 0) + 1
        if self.steps[optimizer] < STEPS:
            return None
        return new.requires_grad and new.grad is not None


_watched: list[_Replaced] = []
_handle: Any = None


def of(model: nn.Module, inplace: bool) -> dict[str, Tensor] | None:
    """Return the parameters of a model that is to be converted in place, by name."""
    return dict(model.named_parameters(remove_duplicate=False)) if inplace else None


def watched(
    converted: Converted[Model], known: Mapping[str, Tensor] | None, call: str
) -> Converted[Model]:
    """Return what was converted; warn where an optimizer has what a layer had before.

    That is, once it takes steps and nobody trains what is new. known: as `of` has told. call: what
    converted the model.
    """
    if known is not None:
        _watch(converted, known, call)
    return converted


def _watch(converted: Converted[Model], known: Mapping[str, Tensor], call: str) -> None:
    global _handle
    _watched[:] = [each for each in _watched if each.new() is not None]
    before = set(map(id, known.values()))
    for path in (change.path for change in converted.report.changed):
        own = dict(converted.model.get_submodule(path).named_parameters(path))
        new = [name for name, parameter in own.items() if id(parameter) not in before]
        if new and own[new[-1]].requires_grad:
            old = [known[name] for name in (f"{path}.weight".lstrip("."),) if name in known]
            _watched.append(_Replaced(call, new[-1], old, own[new[-1]]))
    if _watched and _handle is None:
        _handle = register_optimizer_step_pre_hook(_before_step)


def _before_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    """Look at one layer after another; after the first answer there is no more to be known."""
    global _handle
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    answers = [(each, each.noticed(optimizer, held)) for each in _watched]
    missed = [each for each, answer in answers if answer]
    _watched[:] = [each for each, answer in answers if answer is None]
    if not _watched and _handle is not None:
        _handle.remove()
        _handle = None
    if missed:
        warnings.warn(
            MISSED.format(call=missed[0].call, path=missed[0].path), UserWarning, stacklevel=4
        )
