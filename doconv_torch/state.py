"""Canonical state of a PyTorch model: its convolutions and linear layers, by module path."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from doconv_core.spec import ConvSpec
from doconv_core.state import (
    LayerForm,
    LinearSpec,
    State,
    check_owned,
    entry,
    fit_state,
    unsupported_layer,
)
from doconv_torch.do_conv import _DOConv

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def export_state(model: nn.Module) -> State:
    """Return a copy of the model's weights as a canonical state, in their dtype.

    bfloat16, which NumPy lacks, becomes float32; no bit is lost. Paths are those of
    `named_modules`. Raises TypeError for a layer of another kind or with other parameters, by its
    path; ValueError for parameters on the meta device, which hold nothing.
    """
    modules = _layers(model)
    layers = {path: _form(path, module) for path, module in modules.items()}
    arrays = {
        entry(path, name): _to_numpy(getattr(modules[path], name)).reshape(shape)
        for path, form in layers.items()
        for name, shape in form.shapes.items()
    }
    return State(layers, arrays)


def load_state(model: nn.Module, state: State) -> None:
    """Copy a canonical state into the model, in the model's dtype and on its device.

    Everything is checked first, so that an error leaves the model as it was. Raises StateError for
    a state that is not this model's; TypeError and ValueError as `export_state` does.
    """
    modules = _layers(model)
    fitted = fit_state(state, {path: _form(path, module) for path, module in modules.items()})
    with torch.no_grad():
        for path, arrays in fitted.items():
            for name, array in arrays.items():
                parameter = getattr(modules[path], name)
                parameter.copy_(torch.from_numpy(array.reshape(parameter.shape).copy()))


def _layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return the modules that own parameters or persistent buffers, by path."""
    return {path: module for path, module in model.named_modules() if _own(module)}


def _own(module: nn.Module) -> dict[str, Tensor]:
    """Return what the module itself has in its state dict, by name."""
    buffers = dict(module.named_buffers(recurse=False))
    for name in module._non_persistent_buffers_set:
        buffers.pop(name, None)
    return {**dict(module.named_parameters(recurse=False)), **buffers}


def _form(path: str, module: nn.Module) -> LayerForm:
    own, bias = _own(module), getattr(module, "bias", None) is not None
    if isinstance(module, _DOConv):
        form = LayerForm(module.spec, module.depthwise_weight is not None, bias)
    elif type(module) in CONVOLUTIONS:
        sizes = (module.in_channels, module.out_channels, module.kernel_size, module.groups)
        form = LayerForm(ConvSpec(*sizes), bias=bias)
    elif type(module) is nn.Linear:
        form = LayerForm(LinearSpec(module.in_features, module.out_features), bias=bias)
    else:
        raise unsupported_layer(path, module, own)
    check_owned(path, module, own, form.shapes)
    for name, parameter in own.items():
        if parameter.is_meta:
            raise ValueError(
                f"{entry(path, name)!r} is on the meta device; use model.to_empty(device=…)."
            )
        if parameter.dtype not in DTYPES:
            raise TypeError(
                f"{entry(path, name)!r} is {parameter.dtype}; expected one of "
                f"{', '.join(map(str, DTYPES))}."
            )
    return form


def _to_numpy(parameter: Tensor) -> Any:
    value = parameter.detach().cpu()
    return (value.float() if value.dtype == torch.bfloat16 else value).numpy().copy()
