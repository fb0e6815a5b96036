"""Canonical state of a PyTorch model: its convolutions and linear layers, by module path."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from doconv_core.spec import ConvSpec
from doconv_core.state import LayerForm, LinearSpec, State, entry, fit_state
from doconv_torch.do_conv import _DOConv

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def export_state(model: nn.Module) -> State:
    """Return a copy of the model's weights as a canonical state, in their dtype.

    bfloat16, which NumPy lacks, becomes float32; no bit is lost. Paths are those of
    `named_modules`. Raises TypeError for a layer with parameters of another kind, by its path.
    """
    layers = {path: _form(path, module) for path, module in _layers(model).items()}
    arrays = {
        entry(path, name): _to_numpy(parameter).reshape(layers[path].shapes[name])
        for path, module in _layers(model).items()
        for name, parameter in module.named_parameters(recurse=False)
    }
    return State(layers, arrays)


def load_state(model: nn.Module, state: State) -> None:
    """Copy a canonical state into the model, in the model's dtype and on its device.

    Everything is checked first, so that an error leaves the model as it was. Raises StateError for
    a state that is not this model's, TypeError for a layer of another kind, ValueError for
    parameters on the meta device, which hold nothing.
    """
    layers = _layers(model)
    arrays = fit_state(state, {path: _form(path, module) for path, module in layers.items()})
    for path, module in layers.items():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.is_meta:
                raise ValueError(
                    f"{entry(path, name)!r} is on the meta device; use model.to_empty(device=…)."
                )
    with torch.no_grad():
        for path, module in layers.items():
            for name, parameter in module.named_parameters(recurse=False):
                array = arrays[path][name].reshape(parameter.shape)
                parameter.copy_(torch.from_numpy(array.copy()))


def _layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return the modules that own parameters or persistent buffers, by path."""
    return {
        path: module
        for path, module in model.named_modules()
        if any(True for _ in module.named_parameters(recurse=False))
        or any(True for _ in module.named_buffers(recurse=False))
    }


def _form(path: str, module: nn.Module) -> LayerForm:
    has_bias = getattr(module, "bias", None) is not None
    if isinstance(module, _DOConv):
        return LayerForm(module.spec, module.depthwise_weight is not None, has_bias)
    if type(module) in CONVOLUTIONS:
        sizes = (module.in_channels, module.out_channels, module.kernel_size, module.groups)
        return LayerForm(ConvSpec(*sizes), False, has_bias)
    if type(module) is nn.Linear:
        return LayerForm(LinearSpec(module.in_features, module.out_features), False, has_bias)
    raise TypeError(
        f"layer {path!r} is a {type(module).__name__}; a canonical state holds convolutions, "
        "DO-Conv layers and linear layers."
    )


def _to_numpy(parameter: Tensor):
    value = parameter.detach().cpu()
    return (value.float() if value.dtype == torch.bfloat16 else value).numpy().copy()
