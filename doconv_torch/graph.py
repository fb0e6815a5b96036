"""Where modules stand in a model's forward pass, by symbolic tracing.

A model that cannot be traced as a whole is traced in parts: the largest of its modules that can be,
in which those that cannot are opaque calls.
"""

from __future__ import annotations

import copy
import inspect
import random
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode

from doconv_core.kinds.base import ComposedKind
from doconv_core.models import view
from doconv_core.models.report import place
from doconv_torch.ordinary import HOOKS, is_batch_norm, is_convolution, is_plain

UNCALLED = "the model's forward pass does not call it"
Parameter: TypeAlias = "tuple[nn.Module, str]"
ASKS = "its code asks whether a value is a tensor"
# So many values may be asked about in a pass, for which every combination of answers is tried.
QUESTIONS = 4


@dataclass
class Flow(view.Flow):
    """Who follows whom.

    touched: parameters, as a module and a name, that are used other than by calling it. read: what
    is read of batch norms other than by calling them, and would be missed in an identity. deep:
    linear layers whose input may have more than two axes.
    """

    touched: set[Parameter] = field(default_factory=set)
    read: dict[nn.Module, set[str]] = field(default_factory=dict)
    deep: set[nn.Module] = field(default_factory=set)


def flow(model: nn.Module) -> Flow:
    """Return where the model's modules stand when it is called.

    Each part is traced with all of its arguments given, and with those only that have no default.
    What is traced is a copy without hooks, whose parameters take no memory, since a forward pass
    may change its modules.
    """
    parts, seen = _Parts(), _Seen()
    # Where a model draws random numbers or warns, it does so when it is traced.
    with torch.random.fork_rng([]), pythons_random(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for part in parts.of(model).values():
            seen.add(part)
    paths = {module: path for path, module in model.named_modules()}
    untraced = {paths[module]: reason for module, reason in parts.untraced.items()}
    return Flow(
        {id(module): list(ends) for module, ends in seen.sources.items()},
        {id(module): list(ends) for module, ends in seen.users.items()},
        {id(m): _why(untraced, path) for m, path in paths.items() if m not in seen.sources},
        seen.touched | parts.uses.touched,
        parts.uses.read,
        seen.deep,
    )


@contextmanager
def pythons_random() -> Iterator[None]:
    """Leave Python's random numbers as they are."""
    state = random.getstate()
    try:
        yield
    finally:
        random.setstate(state)


def _why(untraced: dict[str, str], path: str) -> str:
    """Return why the module at `path` was not seen. untraced: why parts could not be traced."""
    above = [part for part in untraced if not part or path.startswith(f"{part}.")]
    if not above:
        return UNCALLED
    nearest = max(above, key=len)
    return f"{place(nearest)} cannot be traced ({untraced[nearest]})"


@dataclass
class _Seen:
    """What was seen of the modules in forward passes, with None for what is no module."""

    sources: dict[nn.Module, set[nn.Module | None]] = field(default_factory=dict)
    users: dict[nn.Module, set[nn.Module | None]] = field(default_factory=dict)
    touched: set[Parameter] = field(default_factory=set)
    deep: set[nn.Module] = field(default_factory=set)

    def add(self, other: _Seen) -> None:
        """Add what was seen in another pass."""
        for mine, theirs in ((self.sources, other.sources), (self.users, other.users)):
            for module, ends in theirs.items():
                mine.setdefault(module, set()).update(ends)
        self.touched |= other.touched
        self.deep |= other.deep


class _Parts:
    """The parts of a model that can be traced, each with what was seen in it."""

    def __init__(self) -> None:
        self.untraced: dict[nn.Module, str] = {}
        self.uses = Uses()
        self._asking: set[nn.Module] = set()
        self._known: dict[nn.Module, dict[nn.Module, _Seen]] = {}

    def of(self, module: nn.Module) -> dict[nn.Module, _Seen]:
        """Return the parts in `module`, itself perhaps."""
        if module not in self._known:
            self._known[module] = {}  # for modules that contain themselves
            self._known[module] = self._of(module)
        return self._known[module]

    def _of(self, module: nn.Module) -> dict[nn.Module, _Seen]:
        inner: dict[nn.Module, _Seen] = {}
        if (
            getattr(module.forward, "__func__", None) is nn.Module.forward
        ):  # a list or dict of modules
            for child in module.children():
                inner.update(self.of(child))
            return inner
        seen, reason = self._trace(module)
        if seen is None:
            before = len(self.untraced)
            for child in module.children():
                if not _is_atom(child):
                    inner.update(self.of(child))
            if len(self.untraced) > before:
                seen, reason = self._trace(module)
        if seen is None:
            self.untraced[module] = reason
            return inner
        parts = {module: seen}
        for leaf in seen.users:
            if any(is_convolution(m) or is_batch_norm(m) for m in [*leaf.modules()][1:]):
                parts.update(self.of(leaf))
        return parts

    def _trace(self, part: nn.Module) -> tuple[_Seen | None, str]:
        """Return what was seen in a part, or why it cannot be traced."""
        total, reason = None, ""
        for arguments in _ways_to_call(part):
            try:
                seen = self._whatever_is_told(part, arguments)
            except _Asks as error:
                inner = error.asking - {part} - self._asking
                if not inner:
                    return None, ASKS
                self._asking |= inner
                return self._trace(part)
            except Exception as error:  # whatever the model's code raises when it meets a proxy
                reason = reason or f"{type(error).__name__}: {str(error).strip().split(chr(10))[0]}"
                continue
            total = total or _Seen()
            total.add(seen)
        return total, reason

    def _whatever_is_told(self, part: nn.Module, arguments: dict[str, Any] | None) -> _Seen:
        """Return what is seen in a part, where that does not depend on which values are tensors.

        Raises _Asks where it does, or may, as too many are asked about; what tracing raises.
        """
        found: _Seen | None = None
        answers: list[bool] | None = []
        while answers is not None:
            ghost = ghost_of(part)
            originals = _originals(ghost, part)
            opaque = {m for m, original in originals.items() if self._is_opaque(original, part)}
            tracer = Tracer(opaque, answers)
            try:
                with self.uses.noted(ghost, originals, tracer):
                    graph = tracer.trace(ghost, arguments)
                seen = _read(graph, ghost, originals)
            except _TooMany:
                raise _Asks({originals[m] for m in tracer.asking}) from None
            except Exception:
                if found is None:
                    raise
                raise _Asks(set()) from None
            if found is not None and seen != found:
                raise _Asks(set())
            found, answers = seen, _next(tracer.given)
        assert found is not None  # as the first pass raises, or is seen
        return found

    def _is_opaque(self, module: nn.Module, part: nn.Module) -> bool:
        # A hook may change what goes in or out, and is not to be called with proxies.
        told = module in self.untraced or (module in self._asking and module is not part)
        return told or any(getattr(module, name) for name in HOOKS)


def _next(given: list[bool]) -> list[bool] | None:
    """Return the answers to begin the next pass with; None after every combination."""
    while given and not given[-1]:
        given = given[:-1]
    return [*given[:-1], False] if given else None


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


def ghost_of(part: nn.Module) -> nn.Module:
    """Return a copy whose parameters take no memory, without hooks."""
    memo: dict[int, Any] = {id(p): _weightless(p) for p in part.parameters()}
    # What modules keep of an earlier call, such as a weight that a hook computed, is not copied.
    for module in part.modules():
        memo |= {id(v): v.detach() for v in vars(module).values() if isinstance(v, torch.Tensor)}
    ghost = copy.deepcopy(part, memo)
    for module in ghost.modules():
        for name in HOOKS:
            getattr(module, name).clear()
        kind: Any = getattr(module, "kind", None)
        if is_convolution(module) and isinstance(kind, ComposedKind):
            layer: Any = module
            kernel = layer.weight.new_empty(kind.conv(layer.spec).kernel_shape)
            layer.composed_kernel = lambda kernel=kernel: kernel  # whose use is none of W
    return ghost


def _weightless(parameter: nn.Parameter) -> nn.Parameter:
    if not is_plain(parameter):
        return parameter
    return nn.Parameter(torch.empty_like(parameter, device="meta"), parameter.requires_grad)


def _originals(ghost: nn.Module, part: nn.Module) -> dict[nn.Module, nn.Module]:
    modules = dict(part.named_modules())
    return {module: modules[path] for path, module in ghost.named_modules()}


# What is asked of a weight without its values: code may choose a dtype or a device by it.
_ATTRIBUTES = (
    "dtype", "device", "shape", "ndim", "layout", "requires_grad", "is_cuda", "is_mps", "is_meta",
    "is_sparse", "is_quantized", "is_leaf", "itemsize",
)  # fmt: skip
_METHODS = (
    "size", "dim", "numel", "nelement", "ndimension", "stride", "is_contiguous", "element_size",
    "is_floating_point", "is_complex", "get_device", "__len__",
)  # fmt: skip
_TOLD_NAMES = frozenset([*_ATTRIBUTES, *_METHODS])
_TOLD = frozenset(
    [*(getattr(Tensor, name).__get__ for name in _ATTRIBUTES),
     *(getattr(Tensor, name) for name in _METHODS),
     torch.is_floating_point, torch.is_complex, torch.numel]
)  # fmt: skip
_IDENTITY = nn.Identity()
# What an identity has too, and by which more is read.
_LISTING = frozenset(["parameters", "named_parameters", "buffers", "named_buffers", "state_dict"])


class Uses:
    """What code does with a model's layers other than calling them; as `Flow` has it."""

    def __init__(self) -> None:
        self.touched: set[Parameter] = set()
        self.read: dict[nn.Module, set[str]] = {}

    @contextmanager
    def noted(
        self, ghost: nn.Module, originals: dict[nn.Module, nn.Module], tracer: fx.Tracer
    ) -> Iterator[None]:
        """Note what is done with the layers inside a ghost, as far as its code can be run."""
        layers = [
            m for m in originals if m is not ghost and (is_convolution(m) or is_batch_norm(m))
        ]
        held: dict[int, set[Parameter]] = {}
        for module in layers:
            for name, parameter in module._parameters.items():
                held.setdefault(id(parameter), set()).add((originals[module], name))
        held.pop(id(None), None)
        norms = {m: originals[m] for m in layers if is_batch_norm(m)}
        try:
            with _Watch(held, self.touched), _watched(norms, self.read):
                yield
        except Exception:
            if hasattr(tracer, "graph"):
                self.touched |= touched_by(tracer.graph, ghost, originals)
            raise


class _Watch(TorchFunctionMode):
    """Notes which parameters are given to operations. held: which they are, by their `id`."""

    def __init__(self, held: Mapping[int, set[Parameter]], touched: set[Parameter]) -> None:
        super().__init__()
        self._held, self._touched = held, touched

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        given = [*args, *(kwargs or {}).values()]
        if func not in _TOLD:
            for each in given:
                for value in each if type(each) in (list, tuple) else (each,):
                    self._touched |= self._held.get(id(value), set())
        return func(*args, **(kwargs or {}))


@contextmanager
def _watched(
    norms: Mapping[nn.Module, nn.Module], read: dict[nn.Module, set[str]]
) -> Iterator[None]:
    """Note what is read of batch norms that an identity lacks. norms: by the ghost, the original.

    Their classes are watched: what a module has as a plain attribute is not asked of `__getattr__`.
    """
    watched: list[Any] = []
    try:
        for cls in {type(norm) for norm in norms}:
            if "__getattribute__" not in vars(cls):
                cls.__getattribute__ = _noting(cls.__getattribute__, norms, read)  # type: ignore[method-assign]
                watched.append(cls)
        yield
    finally:
        for cls in watched:
            del cls.__getattribute__


def _noting(
    original: Callable[..., Any],
    norms: Mapping[nn.Module, nn.Module],
    read: dict[nn.Module, set[str]],
) -> Callable[..., Any]:
    def getattribute(module: Any, name: str) -> Any:
        if module in norms and (name in _LISTING or not hasattr(_IDENTITY, name)):
            read.setdefault(norms[module], set()).add(name)
        return original(module, name)

    return getattribute


class _Asks(Exception):
    """What is seen of a part may depend on whether values are tensors. asking: whose code asks."""

    def __init__(self, asking: set[nn.Module]) -> None:
        super().__init__(ASKS)
        self.asking = asking


class _TooMany(Exception):
    """A pass asks about more values than `QUESTIONS`."""


class Tracer(fx.Tracer):
    """Traces a module, and answers its questions whether values are tensors.

    opaque: modules that are not looked into. answers: those to the first questions; every further
    answer is yes. given: all answers of the pass. asking: the modules whose code asked.
    """

    def __init__(self, opaque: set[nn.Module], answers: list[bool]) -> None:
        super().__init__()
        self._opaque, self._answers = opaque, answers
        self._running: list[nn.Module] = []
        self.given: list[bool] = []
        self.asking: set[nn.Module] = set()

    def answer(self) -> bool:
        """Return whether a value is to be a tensor that is asked about for the first time."""
        self.asking.add(self._running[-1] if self._running else self.root)
        if len(self.given) == QUESTIONS:
            raise _TooMany
        known = len(self.given) < len(self._answers)
        self.given.append(self._answers[len(self.given)] if known else True)
        return self.given[-1]

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Return whether a module is not looked into."""
        # Of a convolution or norm of one's own it is told what it is, not what it is made of.
        known = m in self._opaque or is_convolution(m) or is_batch_norm(m)
        return known or super().is_leaf_module(m, module_qualified_name)

    def call_module(
        self,
        m: nn.Module,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Trace a module's call, and know meanwhile whose code runs."""
        self._running.append(m)
        try:
            return super().call_module(m, forward, args, kwargs)
        finally:
            self._running.pop()

    def proxy(self, node: fx.Node) -> fx.Proxy:
        """Return a value that answers questions."""
        return Value(node, self)

    def create_arg(self, a: Any) -> Any:
        """Return what stands for a value in the graph."""
        # First, as the tracer's own questions to a value are not the model's.
        return a.node if issubclass(type(a), fx.Proxy) else super().create_arg(a)


class Value(fx.Proxy):
    """A proxy that answers `isinstance`, by which a model asks whether a value is a tensor.

    Which that is, a proxy cannot know. `isinstance` asks an object's `__class__` where its type is
    no answer, as it does of the objects of `unittest.mock`.
    """

    tracer: Tracer
    _is_param = _is_buffer = False  # which `isinstance` asks of a tensor for PyTorch's subclasses

    @property  # type: ignore[misc]  # an object's own can be assigned
    def __class__(self) -> type:
        if "_is_tensor" not in vars(self):
            self._is_tensor = self.tracer.answer()
        return Tensor if self._is_tensor else type(self)

    def __getattr__(self, k: str) -> fx.proxy.Attribute:
        return _Attribute(self, k)

    @classmethod
    def __torch_function__(cls, *args: Any, **kwargs: Any) -> fx.Proxy:
        # Of proxies in general, as it asks whether arguments are of the class it is called of.
        return fx.Proxy.__torch_function__(*args, **kwargs)


class _Attribute(fx.proxy.Attribute, Value):
    """An attribute of a value, which is asked as a value is."""


def _read(graph: fx.Graph, ghost: nn.Module, originals: dict[nn.Module, nn.Module]) -> _Seen:
    """Return what a graph says of the modules."""
    seen = _Seen(touched=touched_by(graph, ghost, originals))
    kept = set(proxies([vars(module) for module in ghost.modules()]))

    def called(node: Any) -> nn.Module | None:
        if not isinstance(node, fx.Node) or node.op != "call_module":
            return None
        return originals[ghost.get_submodule(str(node.target))]

    for node in graph.nodes:
        module = called(node)
        if module is not None:
            seen.sources.setdefault(module, set()).add(called(_only_argument(node)))
            users = seen.users.setdefault(module, set())
            users |= {called(user) if _only_argument(user) else None for user in node.users}
            if node in kept:
                users.add(None)
            if isinstance(module, nn.Linear) and not _is_flat(_only_argument(node), ghost):
                seen.deep.add(module)
    return seen


# What keeps the number of a value's axes; and what reduces that of an image's features to two.
_KEEPING = (
    nn.Linear, nn.BatchNorm1d, nn.Identity, nn.Dropout, nn.AlphaDropout, nn.ReLU, nn.ReLU6,
    nn.LeakyReLU, nn.PReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish, nn.Hardswish,
    nn.Hardsigmoid, nn.Tanh, nn.Sigmoid, nn.Softplus, nn.Softmax,
)  # fmt: skip
_KEEPING_CALLS = frozenset(
    ["relu", "relu_", "gelu", "silu", "elu", "selu", "celu", "leaky_relu", "hardswish", "mish",
     "tanh", "sigmoid", "dropout", "alpha_dropout", "add", "mul", "sub", "truediv", "add_", "mul_",
     "contiguous", "clone", "float", "half", "double", "to"]
)  # fmt: skip
_REDUCING = frozenset(["mean", "amax", "sum", "getitem", "squeeze"])


def _is_flat(node: Any, ghost: nn.Module) -> bool:
    """Return whether a value may be taken to have two axes: a model's argument, or flattened."""
    if not isinstance(node, fx.Node) or node.op == "get_attr":
        return False
    if node.op == "placeholder":
        return True
    inner = [each for each in node.args if isinstance(each, fx.Node)]
    if node.op == "call_module":
        module = ghost.get_submodule(str(node.target))
        if isinstance(module, nn.Flatten):
            return (module.start_dim, module.end_dim) == (1, -1)
        return isinstance(module, _KEEPING) and all(_is_flat(each, ghost) for each in inner)
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    sizes = node.args[1:]
    if name == "flatten":
        return sizes == (1,) or dict(node.kwargs) == {"start_dim": 1}
    if name in ("view", "reshape"):
        return (
            len(sizes[0] if len(sizes) == 1 and isinstance(sizes[0], (tuple, list)) else sizes) == 2
        )
    if name in _REDUCING:
        return "keepdim" not in node.kwargs and True not in sizes
    return name in _KEEPING_CALLS and all(_is_flat(each, ghost) for each in inner)


def touched_by(
    graph: fx.Graph, ghost: nn.Module, originals: dict[nn.Module, nn.Module]
) -> set[Parameter]:
    """Return the parameters that a graph uses itself, but those of the part whose graph it is."""
    kept, found = set(proxies([vars(module) for module in ghost.modules()])), set()
    for node in graph.nodes:
        if node.op == "get_attr":
            path, _, name = str(node.target).rpartition(".")
            # Of a weight more may be asked than its values.
            if path and (node in kept or not all(map(_asks_for_type, node.users))):
                found.add((originals[ghost.get_submodule(path)], name))
    return found


def _asks_for_type(node: fx.Node) -> bool:
    """Return whether an operation tells of a weight's type or size alone."""
    name = node.args[1] if node.target is getattr and len(node.args) == 2 else node.target
    return isinstance(name, str) and name in _TOLD_NAMES


def _only_argument(node: fx.Node) -> Any:
    arguments = [*node.args, *node.kwargs.values()]
    return arguments[0] if len(arguments) == 1 else None


def proxies(value: Any) -> Iterator[fx.Node]:
    """Yield the nodes of what a forward pass keeps in its modules."""
    if isinstance(value, fx.Proxy):
        yield value.node
    elif isinstance(value, dict):
        for inner in value.values():
            yield from proxies(inner)
    elif type(value) in (list, tuple, set):
        for inner in value:
            yield from proxies(inner)
