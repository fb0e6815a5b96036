"""MXNet's private parts that this package cannot do without, each with the reason.

Gluon says of a layer what it is only in attributes whose names begin with an underscore, and has no
way to change a layer after it was made. MXNet 1.9.1 is its last release, so none of them will move.
"""

from __future__ import annotations

import functools
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

from mxnet import autograd
from mxnet.gluon import Block, HybridBlock, Parameter, ParameterDict, nn
from mxnet.gluon.block import _BlockScope
from mxnet.gluon.nn.basic_layers import _BatchNorm as BatchNorm
from mxnet.gluon.nn.conv_layers import _Conv as Conv
from mxnet.ndarray import NDArray, waitall
from mxnet.util import is_np_array

# The bases of all batch norms, and of all convolutions, transposed ones too, have no other names.
__all__ = ["BatchNorm", "Conv"]

# What Gluon's convolutions and BSConvs make, and layers of another type may lack.
MADE = (
    "_channels", "_in_channels", "_op_name", "_kwargs", "act", "weight", "bias", "_outline",
    "_layout", "_deferred", "explained", "spec",
)  # fmt: skip
# What a block is besides a layer of its type.
KEPT = (
    "_empty_prefix", "_prefix", "_name", "_scope", "_forward_hooks", "_forward_pre_hooks",
    "_active", "_flags", "_callback", "_monitor_all", "_backend", "_backend_opts",
)  # fmt: skip

AnyBlock = TypeVar("AnyBlock", bound=HybridBlock)

# What the running load has loaded so far; None where none is running.
_loaded: ContextVar[list[Parameter] | None] = ContextVar("loaded", default=None)


def children(block: Block) -> dict[str, Any]:
    """Return the blocks in a block by name; to iterate over a block is for sequences alone."""
    found: dict[str, Any] = block._children
    return found


def registered(block: Block) -> dict[str, Parameter]:
    """Return the parameters that a block's forward gets, by attribute; those it has, to change."""
    found: dict[str, Parameter] = block._reg_params
    return found


def by_name(block: Block) -> dict[str, Parameter]:
    """Return a block's parameters by their own names, to change: `params` only ever adds."""
    found: dict[str, Parameter] = block.params._params
    return found


def shared(block: Block, name: str) -> Parameter | None:
    """Return the parameter that a block's `params` shares with it, None where it would be new."""
    return block.params._get_impl(f"{block.params.prefix}{name}")


def settings(layer: Any) -> dict[str, Any]:
    """Return the arguments of a convolution's or a batch norm's operator; empty for others."""
    return getattr(layer, "_kwargs", {})


def setting(layer: Any, name: str) -> Any:
    """Return an argument of another layer, such as the epsilon of a layer norm."""
    return getattr(layer, f"_{name}")


def activation(conv: Any) -> str | None:
    """Return the name of the activation behind a convolution, None without one."""
    return None if conv.act is None else str(conv.act._act_type)


def is_transposed(conv: Any) -> bool:
    """Return whether a convolution is a transposed one, which derives from the ordinary."""
    return str(conv._op_name).lower() == "deconvolution"


def is_hooked(block: Block) -> bool:
    """Return whether a block has hooks."""
    return bool(block._forward_hooks or block._forward_pre_hooks)


def remove_hooks(block: Block) -> None:
    """Remove a block's hooks, of which only who registered them has handles."""
    block._forward_hooks.clear()
    block._forward_pre_hooks.clear()


@contextmanager
def without_hooks(blocks: Iterable[Block]) -> Iterator[None]:
    """Keep hooks, which were made for arrays, out of symbolic calls."""
    kept = [(b, b._forward_hooks, b._forward_pre_hooks) for b in blocks]
    for block, _, _ in kept:
        block._forward_hooks, block._forward_pre_hooks = OrderedDict(), OrderedDict()
    try:
        yield
    finally:
        for block, hooks, pre_hooks in kept:
            block._forward_hooks, block._forward_pre_hooks = hooks, pre_hooks


def make_convolution(
    layer: Any, scope: dict[str, Any], in_channels: int, operator: dict[str, Any]
) -> None:
    """Do what the constructor of a convolution does, save for its activation and parameters.

    It would ask `params` for a weight of the ordinary shape, which one that is shared by a layer
    that composes its kernel need not have. scope: prefix and params. operator: its arguments.
    """
    HybridBlock.__init__(layer, **scope)
    layer._channels, layer._in_channels = operator["num_filter"], in_channels
    layer._op_name = "convolution" if is_np_array() else "Convolution"
    layer._kwargs = operator
    layer.act = layer.bias = None


def pass_on(norm: Any) -> None:
    """Make a batch norm, whose parameters are gone, an `nn.Dropout` of rate 0."""
    for name in ("_kwargs", "fuse_relu", "in_channels"):
        vars(norm).pop(name, None)
    vars(norm).update(_rate=0, _axes=())
    norm.__class__ = nn.Dropout


def hybridize_like(new: AnyBlock, like: HybridBlock) -> AnyBlock:
    """Hybridize a block with the options of another, where that is; return it."""
    if like._active:
        new.hybridize(backend=like._backend, **dict(like._flags))
    return new


def graph_of(block: Any) -> Any:
    """Return the inputs and the output of a `SymbolBlock`, which it takes and does not give."""
    return block._cached_graph


def set_graph(block: Any, graph: Any) -> None:
    """Give a `SymbolBlock` other inputs and another output."""
    block._cached_graph = graph
    block._clear_cached_op()


def forget_graph(block: Block) -> None:
    """Let a hybridized block build its graph anew when it is called next."""
    if isinstance(block, HybridBlock):
        block._clear_cached_op()


def apart(blocks: Iterable[Block], parameters: Iterable[Parameter]) -> dict[int, Any]:
    """Return what `copy.deepcopy` is to take for the copies of some objects, by their ids.

    None for the compiled graph of a hybridized block that has run, for the trainer of a parameter,
    and for the name scopes around the blocks, which know the block around and all in it. Arrays
    have copies of their own; their gradients would else be lost.
    """
    found: dict[int, Any] = {}
    blocks = list(blocks)
    for block in blocks:
        found[id(getattr(block, "_cached_op", None))] = None
        found[id(block._scope._old_scope)] = None
    for parameter in parameters:
        found[id(parameter._trainer)] = None
        for array in (*(parameter._data or ()), *(parameter._grad or ())):
            found[id(array)] = array.copy()
    for block in blocks:
        found.pop(id(block._scope), None)
    return found


def attach_gradients(parameters: Iterable[Parameter]) -> None:
    """Let autograd know the gradients of parameters that have been copied."""
    for parameter in parameters:
        if parameter._grad is not None:
            autograd.mark_variables(parameter._data, parameter._grad, parameter.grad_req)


def has_values(parameter: Parameter) -> bool:
    """Return whether a parameter has been initialized, and no longer waits for its shape."""
    return parameter._data is not None


def shape_of(parameter: Parameter) -> tuple[int, ...]:
    """Return a parameter's shape, () where all of it is unknown; unknown sizes are 0 or -1.

    A parameter of an imported symbol has values, and is not told their shape before it has run.
    """
    if has_values(parameter):
        return tuple(arrays(parameter)[0].shape)
    return tuple(parameter.shape or ())


def arrays(parameter: Parameter) -> list[NDArray]:
    """Return a parameter's values in each context, none where it has none yet."""
    return parameter._data or []


def waiting(parameter: Parameter) -> tuple[Any, ...]:
    """Return how a parameter that waits for its shape is to be initialized; empty where it has not.

    That is the initializer, the contexts, the default one, and the data that it was given, or None.
    """
    found: tuple[Any, ...] = parameter._deferred_init
    return found


def wait_as(parameter: Parameter, how: tuple[Any, ...]) -> None:
    """Let a new parameter wait for its shape as another one does."""
    parameter._deferred_init = how


def trainer_of(parameter: Parameter) -> weakref.ref[Any] | None:
    """Return a reference to the trainer that has a parameter, None where none has."""
    return None if parameter._trainer is None else weakref.ref(parameter._trainer)


def is_dense(parameter: Parameter) -> bool:
    """Return whether a parameter's arrays are ordinary ones."""
    return bool(parameter._stype == "default")


def as_updated(array: NDArray) -> None:
    """Let a trainer take the gradient of an array for new, as one that was set to zero is."""
    array._fresh_grad = True


def begin_store(trainer: Any, store: Any) -> None:
    """Give all processes the first one's weights, and wait until each of them has them.

    A trainer does it on its first step, and waits for nothing: where one process is ahead, its
    first gradient comes before another's weights.
    """
    trainer._init_kvstore()
    trainer._init_params()
    waitall()
    store._barrier()


def saved_names(block: Block) -> dict[str, Parameter]:
    """Return the parameters as `save_parameters` writes them, by its names."""
    found: dict[str, Parameter] = block._collect_params_with_prefix()
    return found


def options_of(parameter: Parameter) -> dict[str, Any]:
    """Return the arguments with which another parameter like this one is made, save its shape."""
    return {
        "grad_req": parameter.grad_req,
        "dtype": parameter.dtype,
        "lr_mult": parameter.lr_mult,
        "wd_mult": parameter.wd_mult,
        "init": parameter.init,
        "allow_deferred_init": parameter._allow_deferred_init,
        "differentiable": parameter._differentiable,
    }


def tie(F: Any, x: Any, like: Any) -> Any:
    """Return `x`, its shape tied to that of `like`: the only operator that does no more."""
    return F._internal._identity_with_attr_like_rhs(x, like)


@contextmanager
def no_name_scope() -> Iterator[None]:
    """Let a block's prefix be the one it is given, in whichever block's `name_scope()` this is.

    Gluon prepends the scope's prefix to every name, given or not, and has no way around that.
    """
    scope = getattr(_BlockScope._current, "value", None)
    _BlockScope._current.value = None
    try:
        yield
    finally:
        _BlockScope._current.value = scope


def loading() -> list[Parameter] | None:
    """Return what the running load has loaded, to be added to; None where none is running."""
    return _loaded.get()


def tell_of_loads() -> None:
    """Let parameters know, once a file has been loaded, what else was in it.

    Gluon loads a file one parameter after the other, by the `_load_init` of each, and tells it
    nothing of the rest. So its two functions that load are wrapped, once: a parameter adds itself
    to `loading()`, and has its `settle` called with all that did so, when the load ends.
    """
    for cls, name in ((Block, "load_parameters"), (ParameterDict, "load_dict")):
        if not hasattr(getattr(cls, name), "__wrapped__"):
            setattr(cls, name, _telling(getattr(cls, name)))


def _telling(load: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(load)
    def told(*args: Any, **kwargs: Any) -> Any:
        if loading() is not None:  # of one function by the other
            return load(*args, **kwargs)
        loaded: list[Any] = []
        token = _loaded.set(loaded)
        try:
            return load(*args, **kwargs)
        finally:
            _loaded.reset(token)
            for parameter in loaded:
                parameter.settle(loaded)

    return told
