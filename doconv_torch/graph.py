"""Where modules stand in a model's forward pass, by symbolic tracing.

A model that cannot be traced as a whole is traced in parts: the largest of its modules that can be,
in which those that cannot are opaque calls.
"""

from __future__ import annotations

import copy
import inspect
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn

from doconv_torch.ordinary import HOOKS, is_convolution, is_plain


@dataclass
class Flow:
    """What was seen of the modules in forward passes.

    sources: the modules with whose outputs a module is called; users: the modules that are called
    with a module's output. None stands among them for everything else: an operation, an argument,
    the model's output. touched: modules whose parameters are used other than by calling them.
    untraced: modules whose own forward could not be traced, and why.
    """

    sources: dict[nn.Module, set[nn.Module | None]] = field(default_factory=dict)
    users: dict[nn.Module, set[nn.Module | None]] = field(default_factory=dict)
    touched: set[nn.Module] = field(default_factory=set)
    untraced: dict[nn.Module, str] = field(default_factory=dict)

    def add(self, other: Flow) -> None:
        """Add what was seen in another pass."""
        for mine, theirs in ((self.sources, other.sources), (self.users, other.users)):
            for module, ends in theirs.items():
                mine.setdefault(module, set()).update(ends)
        self.touched |= other.touched


def flow(model: nn.Module) -> Flow:
    """Return where the model's modules stand when it is called.

    Each part is traced with all of its arguments given, and with those only that have no default.
    What is traced is a copy without hooks, whose parameters take no memory, since a forward pass
    may change its modules.
    """
    parts = _Parts()
    found = Flow()
    # Where a model draws random numbers or warns, it does so when it is traced.
    with torch.random.fork_rng([]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for seen in parts.of(model).values():
            found.add(seen)
    found.untraced = parts.untraced
    return found


class _Parts:
    """The parts of a model that can be traced, each with what was seen in it."""

    def __init__(self) -> None:
        self.untraced: dict[nn.Module, str] = {}
        self._known: dict[nn.Module, dict[nn.Module, Flow]] = {}

    def of(self, module: nn.Module) -> dict[nn.Module, Flow]:
        """Return the parts in `module`, itself perhaps."""
        if module not in self._known:
            self._known[module] = {}  # for modules that contain themselves
            self._known[module] = self._of(module)
        return self._known[module]

    def _of(self, module: nn.Module) -> dict[nn.Module, Flow]:
        inner: dict[nn.Module, Flow] = {}
        if (
            getattr(module.forward, "__func__", None) is nn.Module.forward
        ):  # a list or dict of modules
            for child in module.children():
                inner.update(self.of(child))
            return inner
        seen, leaves, reason = self._trace(module)
        if seen is None:
            before = len(self.untraced)
            for child in module.children():
                if not _is_atom(child):
                    inner.update(self.of(child))
            if len(self.untraced) > before:
                seen, leaves, reason = self._trace(module)
        if seen is None:
            self.untraced[module] = reason
            return inner
        parts = {module: seen}
        for leaf in leaves:
            if not _is_atom(leaf):
                parts.update(self.of(leaf))
        return parts

    def _trace(self, part: nn.Module) -> tuple[Flow | None, list[nn.Module], str]:
        """Return what was seen in a part and the modules called there, or why it fails."""
        total, leaves, reason = None, [], ""
        for arguments in _ways_to_call(part):
            try:
                ghost = _ghost(part)
                originals = _originals(ghost, part)
                tracer = _Tracer({m for m, o in originals.items() if self._is_opaque(o)})
                graph = tracer.trace(ghost, arguments)
            except _AskedForTensor as error:
                return None, [], str(error)
            except Exception as error:  # whatever the model's code raises when it meets a proxy
                reason = reason or f"{type(error).__name__}: {str(error).strip().split(chr(10))[0]}"
                continue
            seen, called = _read(graph, ghost, originals)
            total = total or Flow()
            total.add(seen)
            leaves += called
        return total, leaves, reason

    def _is_opaque(self, module: nn.Module) -> bool:
        # A hook may change what goes in or out, and is not to be called with proxies.
        return module in self.untraced or any(getattr(module, name) for name in HOOKS)


def _is_atom(module: nn.Module) -> bool:
    return next(module.children(), None) is None and type(module).__module__.startswith("torch.nn")


def _ways_to_call(part: nn.Module) -> Iterator[dict[str, Any] | None]:
    yield None
    try:
        parameters = inspect.signature(part.forward).parameters
    except (TypeError, ValueError):  # a forward that is not Python's
        return
    empty = inspect.Parameter.empty
    defaults = {name: p.default for name, p in parameters.items() if p.default is not empty}
    if defaults:
        yield defaults


def _ghost(part: nn.Module) -> nn.Module:
    """Return a copy whose parameters take no memory, without hooks."""
    memo: dict[int, Any] = {id(p): _weightless(p) for p in part.parameters()}
    # What modules keep of an earlier call, such as a weight that a hook computed, is not copied.
    for module in part.modules():
        memo |= {id(v): v.detach() for v in vars(module).values() if isinstance(v, torch.Tensor)}
    ghost = copy.deepcopy(part, memo)
    for module in ghost.modules():
        for name in HOOKS:
            getattr(module, name).clear()
    return ghost


def _weightless(parameter: nn.Parameter) -> nn.Parameter:
    if not is_plain(parameter):
        return parameter
    return nn.Parameter(torch.empty_like(parameter, device="meta"), parameter.requires_grad)


def _originals(ghost: nn.Module, part: nn.Module) -> dict[nn.Module, nn.Module]:
    modules = dict(part.named_modules())
    return {module: modules[path] for path, module in ghost.named_modules()}


class _Tracer(fx.Tracer):
    def __init__(self, opaque: set[nn.Module]) -> None:
        super().__init__()
        self._opaque = opaque

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        # Of a convolution of one's own it is told what it is, not what it is made of.
        known = m in self._opaque or is_convolution(m)
        return known or super().is_leaf_module(m, module_qualified_name)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Value(node, self)


class _AskedForTensor(Exception):
    """A model asked what a proxy cannot answer."""


class _Value(fx.Proxy):
    """A proxy that does not let the model ask whether it is a tensor: it would hear no."""

    @property
    def __class__(self) -> type:
        # `isinstance` asks for this, in the frame of the code that calls it.
        frame = sys._getframe(1)
        names, caller = frame.f_code.co_names, frame
        asks = "isinstance" in names and "Tensor" in names
        if frame.f_code is torch.is_tensor.__code__ and frame.f_back is not None:
            asks, caller = True, frame.f_back
        if asks and caller.f_globals.get("__name__", "").partition(".")[0] != "torch":
            raise _AskedForTensor("its code asks whether a value is a tensor")
        return _Value


def _read(
    graph: fx.Graph, ghost: nn.Module, originals: dict[nn.Module, nn.Module]
) -> tuple[Flow, list[nn.Module]]:
    """Return what a graph says of the modules, and those that it calls."""
    seen = Flow()
    kept = set(_proxies([vars(module) for module in ghost.modules()]))

    def called(node: Any) -> nn.Module | None:
        if not isinstance(node, fx.Node) or node.op != "call_module":
            return None
        return originals[ghost.get_submodule(node.target)]

    for node in graph.nodes:
        if node.op == "get_attr":
            owner = ghost.get_submodule(node.target.rpartition(".")[0])
            seen.touched.add(originals[owner])
        module = called(node)
        if module is not None:
            seen.sources.setdefault(module, set()).add(called(_only_argument(node)))
            users = seen.users.setdefault(module, set())
            users |= {called(user) if _only_argument(user) else None for user in node.users}
            if node in kept:
                users.add(None)
    return seen, list(seen.users)


def _only_argument(node: fx.Node) -> Any:
    arguments = [*node.args, *node.kwargs.values()]
    return arguments[0] if len(arguments) == 1 else None


def _proxies(value: Any) -> Iterator[fx.Node]:
    """Yield the nodes of what a forward pass keeps in its modules."""
    if isinstance(value, fx.Proxy):
        yield value.node
    elif isinstance(value, dict):
        for inner in value.values():
            yield from _proxies(inner)
    elif type(value) in (list, tuple, set):
        for inner in value:
            yield from _proxies(inner)
