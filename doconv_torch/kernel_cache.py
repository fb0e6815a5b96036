"""Composing a kernel once for several calls of its layer: the block in which that happens."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from doconv_core.maths.spec import ConvSpec
from doconv_core.models.received import no_model
from doconv_torch.compose import compose, gradients
from doconv_torch.matrix_products import is_tracing

torch.fx.wrap("compose")  # symbolic tracing has the composition as one call, without its rules


@contextmanager
def composed_once(model: nn.Module) -> Iterator[None]:
    """Let every DO layer of `model` compose its kernel once in this block, and reuse it.

    For a model that is called several times between two optimizer steps: several micro-batches, a
    head that is shared by several scales, recurrent use. Values and gradients are those without the
    block; every `backward()` adds to W's and D's, without `retain_graph`. A kernel is composed anew
    where W or D were changed, moved or replaced, and after each step of a `torch.optim` optimizer;
    a change through `.data`, which PyTorch does not count, is the exception. No kernel outlives the
    block, and folding in it uses none.

    It holds for the current thread or asynchronous task. Layers compose as usual where a kernel
    that is reused could not be right: in compiled, traced, exported and CUDA-graphed calls, under
    the transforms of `torch.func`, in the replicas of `DataParallel`, and where W or D is not a
    plain parameter (parametrized layers, `functional_call`). Where `torch.utils.checkpoint` is
    used, `backward()` belongs in the block too.
    Raises TypeError for what is not a module.

    >>> model = over_parameterize(torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3)))[0]
    >>> with composed_once(model):
    ...     model[0].composed_kernel() is model[0].composed_kernel()
    True
    """
    if not isinstance(model, nn.Module):
        raise no_model("torch.nn.Module", model)
    block = _Block(model)
    # A fused step changes parameters without raising the version that PyTorch counts.
    handle = register_optimizer_step_post_hook(lambda *_: block.forget())
    _blocks.set((*_blocks.get(), block))
    try:
        yield
    finally:
        # Blocks in generators may end in another order, or another context, than they began in.
        handle.remove()
        block.close()
        _blocks.set(tuple(other for other in _blocks.get() if other is not block))


@contextmanager
def composed_anew() -> Iterator[None]:
    """Let layers compose as usual, whatever blocks are open."""
    token = _blocks.set(())
    try:
        yield
    finally:
        _blocks.reset(token)


def may_reuse(layer: Any) -> bool:
    """Return whether a block is open in which the layer's kernel may be reused."""
    # Asked first, so that no compiler follows what comes after.
    if torch.compiler.is_compiling():
        return False
    return any(layer in block.layers for block in _blocks.get())


def composed(layer: Any) -> Tensor:
    """Return the kernel of a DO layer that has a D: composed now, or earlier in an open block."""
    weight, depthwise, spec = layer.weight, layer.depthwise_weight, layer.spec
    # Asked first, so that no compiler follows what comes after.
    if not torch.compiler.is_compiling():
        for block in _blocks.get():
            if layer in block.layers and _reusable(weight) and _reusable(depthwise):
                return block.kernel(layer, weight, depthwise, spec)
    return compose(weight, depthwise, spec)


class _Kernel(NamedTuple):
    """A composed kernel, and what tells whether it still is the kernel of its W and D."""

    kernel: Tensor
    version: int
    sources: tuple[Tensor, Tensor]
    states: tuple[Any, ...]
    # Aliases of W's and D's memory: while they are held, no other tensor can have its address.
    memory: tuple[Tensor, Tensor]

    def is_of(self, weight: Tensor, depthwise: Tensor) -> bool:
        return (
            self.sources[0] is weight
            and self.sources[1] is depthwise
            and self.states == _states(weight, depthwise)
            and self.version == self.kernel._version
        )


class _Block:
    """The kernels of one `composed_once`, by layer and by whether they carry a graph."""

    def __init__(self, model: nn.Module) -> None:
        self.layers = frozenset(model.modules())
        self._kernels: dict[tuple[nn.Module, bool], _Kernel] = {}

    def close(self) -> None:
        self.layers = frozenset()
        self.forget()

    def forget(self) -> None:
        self._kernels.clear()

    def kernel(self, layer: nn.Module, weight: Tensor, depthwise: Tensor, spec: ConvSpec) -> Tensor:
        with_graph = torch.is_grad_enabled() and (weight.requires_grad or depthwise.requires_grad)
        for graph in (with_graph, True):
            known = self._kernels.get((layer, graph))
            if known is not None and known.is_of(weight, depthwise):
                return known.kernel if with_graph else known.kernel.detach()
        # A kernel made in inference mode would be of no use after it.
        with torch.inference_mode(False), torch.set_grad_enabled(with_graph):
            arguments = weight, depthwise, spec
            kernel: Tensor = _Composition.apply(*arguments)  # type: ignore[no-untyped-call]
            memory = (weight.detach(), depthwise.detach())
        if type(kernel) is Tensor:
            self._kernels[layer, with_graph] = _Kernel(
                kernel, kernel._version, (weight, depthwise), _states(weight, depthwise), memory
            )
        return kernel


_blocks: ContextVar[tuple[_Block, ...]] = ContextVar("composed_once", default=())


def _reusable(parameter: Tensor) -> bool:
    """Return whether a kernel of this parameter may be kept: whether changes to it would show."""
    return (
        issubclass(type(parameter), nn.Parameter)
        and not parameter.is_inference()  # it has no version
        and not is_tracing()
        # There is no public way to ask this; autograd.Function itself asks so.
        and not torch._C._are_functorch_transforms_active()
        and not (parameter.is_cuda and torch.cuda.is_current_stream_capturing())
    )


def _states(*parameters: Tensor) -> tuple[Any, ...]:
    """Return all of the parameters that a kernel depends on, and the stream it is computed on."""
    return tuple(
        (
            p._version, p.data_ptr(), p.dtype, p.device, p.shape, p.stride(), p.requires_grad,
            torch.cuda.current_stream(p.device) if p.is_cuda else None,
        )
        for p in parameters
    )  # fmt: skip


class _Composition(torch.autograd.Function):
    """`compose`, whose backward can run any number of times.

    W and D are kept as attributes, not as saved tensors: those are freed by the first backward, and
    the second micro-batch would fail. What PyTorch checks of saved tensors is checked here.
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor, depthwise: Tensor, spec: ConvSpec) -> Tensor:
        ctx.weight, ctx.depthwise, ctx.spec = weight, depthwise, spec
        ctx.versions = weight._version, depthwise._version
        return compose(weight, depthwise, spec)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        if ctx.versions != (ctx.weight._version, ctx.depthwise._version):
            raise RuntimeError(
                "W or D of a DO layer was modified in place (by an optimizer step?) between the "
                "forward pass and this backward pass, whose gradient needs the former values; call "
                "backward() first."
            )
        found = gradients(ctx.weight, ctx.depthwise, ctx.spec, gradient, ctx.needs_input_grad[:2])
        return *found, None
