"""One layer from ordinary to over-parameterized and back, staying the same object."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from doconv_core.maths.spec import ConvSpec
from doconv_torch.compose import as_weight
from doconv_torch.do_conv import _DOConv
from doconv_torch.view import REPLACEMENTS, Owners, is_plain, memory

# What every module has, and what the layers that `become` is for have beyond it.
_BASE = frozenset(vars(nn.Module()))
_MADE = frozenset(vars(nn.Conv1d(1, 1, 1, device="meta"))) - _BASE | {"spec", "explained"}


def over_parameterize_layer(
    layer: nn.Module, spec: ConvSpec, parameters: dict[int, tuple[Tensor, ...]]
) -> None:
    """Make an ordinary layer a DO layer. parameters: those of tied layers, by the weight's id."""
    kernel = layer.weight
    if id(kernel) not in parameters:
        weight, trainable = kernel, kernel.requires_grad
        if spec.depth_multiplier != spec.taps:
            weight = nn.Parameter(as_weight(kernel.detach(), spec), trainable)
            vars(weight).update(vars(kernel))
        depthwise = nn.Parameter(kernel.new_zeros(spec.depthwise_shape), trainable)
        # The kernel is kept too, so that no other parameter can get its identity.
        parameters[id(kernel)] = weight, depthwise, kernel
    weight, depthwise, _ = parameters[id(kernel)]
    layer.__class__ = REPLACEMENTS[type(layer)]
    layer.spec = spec
    layer.weight = weight
    layer.register_parameter("depthwise_weight", depthwise)


def fold_layer(layer: Any, held: Owners, weights: dict[Any, tuple[Any, ...]]) -> None:
    """Make a DO layer an ordinary one.

    held: what `owners` says of the model. weights: of W and D, the weight that they became, which
    tied layers share.
    """
    folded = layer.fold()
    weight, bias = folded.weight, layer._parameters.get("bias", folded.bias)
    if parametrize.is_parametrized(layer):
        _remove_parametrizations(layer)
    else:
        own = layer.weight, layer.depthwise_weight
        key = (id(own[0]), id(own[1]), layer.spec)
        if key not in weights:
            weights[key] = _into_w(layer, weight, held), own
        weight = weights[key][0]
    layer.__class__ = layer.ordinary
    del layer.spec
    for name in ("weight", "bias", "depthwise_weight"):
        layer._parameters.pop(name, None)
        layer._buffers.pop(name, None)
    layer.register_parameter("weight", weight)
    layer.register_parameter("bias", bias)


def _remove_parametrizations(layer: Any) -> None:
    """Remove them, with the hooks by which PyTorch's own read their older checkpoints."""
    del layer._modules["parametrizations"]
    for key, hook in list(layer._load_state_dict_pre_hooks.items()):
        if getattr(hook.hook, "__module__", "") == parametrizations.__name__:
            del layer._load_state_dict_pre_hooks[key]


def _into_w(layer: Any, folded: nn.Parameter, held: Owners) -> nn.Parameter:
    """Return W with the folded kernel in it, so that it stays the same object, where it can be."""
    weight, depthwise = layer.weight, layer.depthwise_weight
    if not is_plain(weight):
        return folded
    if depthwise is None:
        return weight
    vars(folded).update(vars(weight))
    if weight.shape != folded.shape:
        return folded
    if weight.is_inference() or not all(
        name == "weight"
        and tied is weight
        and isinstance(other, _DOConv)
        and other.depthwise_weight is depthwise
        and other.spec == layer.spec
        for other, name, tied in held[memory(weight)]
    ):
        return folded
    weight.copy_(folded)
    weight.grad = None  # it was W's
    return weight.requires_grad_(folded.requires_grad)


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
