"""Canonical state of a PyTorch model, by module path."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from doconv_core.networks.names import known_name
from doconv_core.state.file import State, entry, origin_of
from doconv_core.state.match import Assignment, Match, check_assignments, fit_state
from doconv_torch.layers import attribute, form_of, owned, paddings

FRAMEWORK = "torch"


def export_state(model: nn.Module) -> State:
    """Return a copy of the model's weights as a canonical state, in their dtype.

    bfloat16, which NumPy lacks, becomes float32; no bit is lost. Paths and order are those of
    `named_modules`. A batch norm's `num_batches_tracked` is left out. Raises TypeError for a layer
    without a counterpart in a state or with other parameters, by its path, and for what is no
    module; ValueError for parameters on the meta device, which hold nothing.
    """
    modules = _layers(model)
    layers = _forms(model, modules)
    arrays = {
        entry(path, name): _to_numpy(_tensor(modules[path], name)).reshape(shape)
        for path, form in layers.items()
        for name, shape in form.shapes.items()
    }
    network = known_name(getattr(model, "network_name", None))
    return State(layers, arrays, origin_of(FRAMEWORK, torch.__version__, network))


def load_state(
    model: nn.Module, state: State, *, match: Match = "path", ignore: str | Iterable[str] = ()
) -> None:
    """Copy a canonical state into the model, in the model's dtype and on its device.

    match: "path", "order", or a mapping from the state's paths to the model's. ignore: "geometry"
    or "flattening", or both, for what need not agree; see `doconv_core.fit_state`.
    Everything is checked first, so that an error leaves the model as it was. Raises StateError for
    a state that is not this model's; TypeError and ValueError as `export_state` does. Warns where
    a batch norm's momentum differs.
    """
    modules = _layers(model)
    network = known_name(getattr(model, "network_name", None))
    options = {"match": match, "ignore": ignore, "framework": FRAMEWORK, "network": network}
    fitted = fit_state(state, _forms(model, modules), **options)
    assignments = []
    for path, arrays in fitted.items():
        for name, array in arrays.items():
            tensor = _tensor(modules[path], name)
            dtype = str(tensor.dtype).removeprefix("torch.")
            array = array.reshape(tensor.shape)
            assignments.append(Assignment(entry(path, name), tensor, dtype, array, _memory(tensor)))
    check_assignments(assignments)
    with torch.no_grad():
        for assignment in assignments:
            assignment.parameter.copy_(torch.from_numpy(assignment.array.copy()))


def _layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return the modules that own parameters or persistent buffers, by path."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module; received {type(model).__qualname__}.")
    return {path: module for path, module in model.named_modules() if owned(module)}


def _forms(model: nn.Module, modules: dict[str, nn.Module]) -> Any:
    uses = paddings(model)
    return {path: form_of(path, module, uses[id(module)]) for path, module in modules.items()}


def _tensor(module: nn.Module, name: str) -> Tensor:
    return getattr(module, attribute(name))


def _memory(tensor: Tensor) -> Any:
    """Return where a tensor's values lie; two parameters may be one by that alone."""
    if not tensor.numel() or not tensor.data_ptr():  # which share nothing, or cannot tell
        return None
    return tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride()


def _to_numpy(parameter: Tensor) -> Any:
    value = parameter.detach().cpu()
    return (value.float() if value.dtype == torch.bfloat16 else value).numpy().copy()
