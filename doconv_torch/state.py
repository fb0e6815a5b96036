"""Canonical state of a PyTorch model, by module path."""

from __future__ import annotations

from collections.abc import Hashable, Iterable

import torch
from torch import Tensor, nn

from doconv_core.models.received import no_model
from doconv_core.networks.names import known_name
from doconv_core.state.exchange import Holder, Kept, export_from, load_into
from doconv_core.state.file import Array, State
from doconv_core.state.match import Assignment, Match
from doconv_torch.dgc import DynamicHeads2d
from doconv_torch.layers import attribute, form_of, owned, paddings


def export_state(model: nn.Module) -> State:
    """Return a copy of the model's weights as a canonical state, in their dtype.

    bfloat16, which NumPy lacks, becomes float32; no bit is lost. Paths and order are those of
    `named_modules`. A batch norm's `num_batches_tracked` is left out. Raises TypeError for a layer
    without a counterpart in a state or with other parameters, by its path, and for what is no
    module; ValueError for parameters on the meta device, which hold nothing.

    >>> state = export_state(torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU()))
    >>> {name: array.shape for name, array in state.arrays.items()}
    {'0.weight': (8, 3, 9), '0.bias': (8,)}
    """
    return export_from(_Modules(model))


def load_state(
    model: nn.Module, state: State, *, match: Match = "path", ignore: str | Iterable[str] = ()
) -> None:
    """Copy a canonical state into the model, in the model's dtype and on its device.

    match: "path", "order", or a mapping from the state's paths to the model's. ignore: "geometry"
    or "flattening", or both, for what need not agree; see `doconv_core.fit_state`.
    Everything is checked first, so that an error leaves the model as it was. Raises StateError for
    a state that is not this model's; TypeError and ValueError as `export_state` does. Warns where
    a batch norm's momentum differs.

    >>> trained, model = torch.nn.Linear(3, 2), torch.nn.Sequential(torch.nn.Linear(3, 2))
    >>> load_state(model, export_state(trained), match={"": "0"})
    >>> bool((model[0].weight == trained.weight).all())
    True
    """
    load_into(_Modules(model), state, match=match, ignore=ignore)
    for module in model.modules():
        if isinstance(module, DynamicHeads2d):
            module.note_dropped()


class _Modules(Holder):
    """The modules of a model that own parameters or persistent buffers.

    Raises TypeError for what is no module, and as `form_of` does.
    """

    framework, version = "torch", torch.__version__

    def __init__(self, model: nn.Module) -> None:
        if not isinstance(model, nn.Module):
            raise no_model("torch.nn.Module", model)
        self.network = known_name(getattr(model, "network_name", None))
        self._modules = {path: module for path, module in model.named_modules() if owned(module)}
        uses = paddings(model)
        self.layers = {
            path: form_of(path, module, uses[id(module)]) for path, module in self._modules.items()
        }

    def kept(self, path: str, name: str) -> Kept:
        """Return the tensor that is an entry."""
        tensor: Tensor = getattr(self._modules[path], attribute(name))
        return Kept(tensor, str(tensor.dtype).removeprefix("torch."), memory=_memory(tensor))

    def get(self, parameter: Tensor) -> Array:
        """Return a tensor's values as an array; bfloat16 as float32."""
        value = parameter.detach().cpu()
        unknown = value.dtype in (torch.bfloat16, torch.int64)  # to NumPy, and to states
        array: Array = (value.float() if unknown else value).numpy()
        return array

    def put(self, assignment: Assignment) -> None:
        """Copy an array to where its entry is."""
        with torch.no_grad():
            assignment.parameter.copy_(torch.from_numpy(assignment.array.copy()))


def _memory(tensor: Tensor) -> Hashable:
    """Return where a tensor's values lie; two parameters may be one by that alone."""
    if not tensor.numel() or not tensor.data_ptr():  # which share nothing, or cannot tell
        return None
    return tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride()
