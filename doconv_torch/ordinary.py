"""Which layers of a PyTorch model are convolutions, and why one of them is left as it is."""

from __future__ import annotations

from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.utils import parametrize

from doconv_core.maths.spec import ConvSpec
from doconv_core.models.received import no_model
from doconv_core.models.report import (
    COMPUTED,
    NOT_PLAIN,
    QUANTIZED,
    REPLACED,
    SUBCLASS,
    TRANSPOSED,
)

ORDINARY = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED_TYPES = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
# By a parameter's memory: the modules that have it, its name in each, and the parameter.
Owners: TypeAlias = "dict[Any, list[tuple[nn.Module, str, nn.Parameter]]]"

GATHER = (
    "gather the weights by torch.distributed.checkpoint.state_dict.get_model_state_dict(model, "
    "options=StateDictOptions(full_state_dict=True, cpu_offload=True)), load them into a model "
    "that was over-parameterized alike and never sharded, and fold that."
)
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def check_model(model: nn.Module) -> None:
    """Raise TypeError for what is not a module, or holds its parameters in another's place."""
    if not isinstance(model, nn.Module):
        raise no_model("torch.nn.Module", model)
    for path, module in model.named_modules():
        kind = type(module).__name__
        if any(cls.__name__ == "FSDPModule" for cls in type(module).__mro__):
            where = f"the model has one at {path!r}" if path else "the model is one"
            raise TypeError(
                f"{where} that fully_shard (FSDP2) was given, whose parameters are parts of what "
                f"they were. Over-parameterize before fully_shard. To fold: {GATHER}"
            )
        if kind in ("DistributedDataParallel", "FullyShardedDataParallel"):
            where = f"the model has a {kind} at {path!r}" if path else f"the model is a {kind}"
            raise TypeError(
                f"{where}, which would not know of parameters that come or go; convert the model "
                "first, and wrap it afterwards."
            )


def kind_of(layer: nn.Module) -> str:
    """Return the name of the layer's type; of a scripted layer, that of its Python type."""
    if isinstance(layer, torch.jit.ScriptModule):
        return str(layer.original_name)
    return type(layer).__name__


def is_convolution(layer: nn.Module) -> bool:
    """Return whether the layer is a convolution of any kind, in PyTorch's own sense."""
    if isinstance(layer, torch.jit.ScriptModule):
        return "Conv" in kind_of(layer) and "weight" in dict(layer.named_parameters(recurse=False))
    return isinstance(layer, _ConvNd) or _is_quantized(layer)


def is_batch_norm(layer: nn.Module) -> bool:
    """Return whether the layer is a batch norm of any kind, a frozen one of other packages too.

    Those are modules of their own, with the statistics as buffers beside the scale and the offset.
    """
    if isinstance(layer, _BatchNorm):
        return True
    if isinstance(layer, (torch.jit.ScriptModule, _NormBase)):  # the rest are instance norms
        return False
    return {"running_mean", "running_var"} <= layer._buffers.keys() | layer._parameters.keys()


def _is_quantized(layer: nn.Module) -> bool:
    module = type(layer).__module__
    quantized = module.startswith(("torch.ao.nn.", "torch.nn.quantized", "torch.nn.intrinsic"))
    return quantized and "Conv" in type(layer).__name__


def obstacle(layer: nn.Module) -> str | None:
    """Return why a convolution cannot be replaced; None where it can. Not of a kind's layers."""
    if isinstance(layer, _ConvNd) and type(layer) in ORDINARY:
        return _own_obstacle(layer, spec_of(layer).kernel_shape)
    if isinstance(layer, torch.jit.ScriptModule):
        return "compiled to TorchScript"
    if isinstance(layer, LazyModuleMixin):
        return "lazy: call the model once, so that it takes its shape"
    if parametrize.is_parametrized(layer):
        return "parametrized: its weight is computed from other parameters"
    if _is_quantized(layer):
        return QUANTIZED
    return TRANSPOSED if isinstance(layer, _ConvTransposeNd) else SUBCLASS


def norm_source_obstacle(layer: Any) -> str | None:
    """Return why a batch norm cannot become a part of the layer that it follows; None if it can.

    That may be a convolution, a transposed one, or a linear layer.
    """
    if type(layer) in TRANSPOSED_TYPES:
        i, o, groups = layer.in_channels, layer.out_channels, layer.groups
        return _own_obstacle(layer, (i, o // groups, *layer.kernel_size))
    if type(layer) is nn.Linear:
        return _own_obstacle(layer, (layer.out_features, layer.in_features))
    return SUBCLASS if isinstance(layer, nn.Linear) else obstacle(layer)


def _own_obstacle(layer: Any, shape: tuple[int, ...]) -> str | None:
    """Return what is special about an ordinary layer, whose weight is to have this shape."""
    if is_replaced(layer):
        return REPLACED
    weight = layer._parameters.get("weight")
    if weight is None:
        return COMPUTED  # by weight norm or pruning, before each call
    if not is_plain(weight):
        return NOT_PLAIN
    if tuple(weight.shape) != shape:
        return f"its weight has shape {tuple(weight.shape)}; expected {shape}"
    if weight.dtype not in DTYPES:
        return f"its weight is {weight.dtype}"
    return None


def is_hooked(layer: nn.Module) -> bool:
    """Return whether something watches or changes what goes into a layer or comes out."""
    return any(getattr(layer, name) for name in HOOKS)


def is_replaced(layer: nn.Module) -> bool:
    """Return whether this one layer has a method of its own in the place of its class's forward."""
    return not vars(layer).keys().isdisjoint(("forward", "_conv_forward"))


def spec_of(layer: _ConvNd) -> ConvSpec:
    """Return the sizes of an ordinary convolution."""
    return ConvSpec(layer.in_channels, layer.out_channels, layer.kernel_size, layer.groups)


def owners(model: nn.Module) -> Owners:
    """Return, by each parameter's memory, the modules that have it, its name there, and itself.

    Parameters that begin at the same address are tied, though they be different objects.
    """
    found: Owners = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                found.setdefault(memory(parameter), []).append((module, name, parameter))
    return found


def memory(parameter: Tensor) -> Any:
    """Return what is the same for parameters of the same memory."""
    address = parameter.data_ptr() if is_plain(parameter) else 0
    return (parameter.device, address) if address else id(parameter)


def is_plain(parameter: Tensor) -> bool:
    """Return whether a parameter is no more than an array: not lazy, sharded, sparse or fake."""
    return (
        issubclass(type(parameter), nn.Parameter)
        and not nn.parameter.is_lazy(parameter)
        and parameter.layout == torch.strided
    )


def count_parameters(model: nn.Module) -> int:
    """Return how many numbers the model's parameters have, each once; lazy ones have none yet."""
    return sum(
        parameter.numel() for parameter in model.parameters() if not nn.parameter.is_lazy(parameter)
    )


def is_sharded(parameter: Any) -> bool:
    """Return whether a parameter is a `DTensor`, of which a process may have a part."""
    return any(cls.__name__ == "DTensor" for cls in type(parameter).__mro__)


def is_bound(weight: Tensor) -> bool:
    """Return whether something about a parameter is lost if another takes its place."""
    return bool(
        type(weight) is not nn.Parameter
        or weight._backward_hooks
        or weight._post_accumulate_grad_hooks
    )
