"""What modules' own code is, traced one module at a time, with what it calls as single steps.

So a part that cannot be traced hides nothing of those inside it.
"""

from __future__ import annotations

import operator
import warnings
from collections import Counter
from typing import Any, NamedTuple

import torch
from torch import fx, nn

from doconv_torch.graph import (
    Parameter,
    Tracer,
    Uses,
    Value,
    ghost_of,
    proxies,
    pythons_random,
    touched_by,
)
from doconv_torch.ordinary import is_batch_norm, is_convolution, is_replaced, owners


class _Result(Value):
    """A result of which code can be told that it is changed in place, as by `x += y`."""

    def __iadd__(self, other: Any) -> Any:
        return self._changed(operator.iadd, other)

    def __isub__(self, other: Any) -> Any:
        return self._changed(operator.isub, other)

    def __imul__(self, other: Any) -> Any:
        return self._changed(operator.imul, other)

    def __itruediv__(self, other: Any) -> Any:
        return self._changed(operator.itruediv, other)

    def _changed(self, function: Any, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", function, (self, other), {})


class _OwnCode(Tracer):
    """Traces one module's own code: whatever it calls is one step, and buffers are values."""

    proxy_buffer_attributes = True

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Result(node, self)

    def __init__(self) -> None:
        super().__init__(set(), [])

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


class Traced(NamedTuple):
    """A module, with the graph of its own code. kept: results that the code keeps somewhere."""

    path: str
    module: nn.Module
    graph: fx.Graph
    kept: set[fx.Node]


class Seen:
    """What is seen of a model.

    traced: modules that are called and could be traced, those inside others before them. touched:
    parameters that code reads. calls: how often each module is called. bypassed: modules of which a
    part is called by other code than their own. owners: of the parameters.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model, self.owners = model, owners(model)
        self.traced: list[Traced] = []
        self.touched: set[Parameter] = set()
        self.calls: Counter[nn.Module] = Counter()
        self.bypassed: set[nn.Module] = set()

    def count_calls(self) -> None:
        """Count the calls of a forward pass, and keep of the traced modules those that it calls."""
        graphs = {traced.module: traced.graph for traced in self.traced}
        waiting, met = [self.model], {self.model}
        while waiting:
            module = waiting.pop()
            called = [*module.children()]  # of code that is not known
            if module in graphs:
                nodes = graphs[module].nodes
                targets = [str(node.target) for node in nodes if node.op == "call_module"]
                called = [module.get_submodule(target) for target in targets]
                self.calls.update(called)
                for names in (target.split(".") for target in targets):
                    for n in range(1, len(names)):
                        self.bypassed.add(module.get_submodule(".".join(names[:n])))
            waiting += {*called} - met
            met |= {*called}
        self.traced = [traced for traced in self.traced if traced.module in met]


def seen(model: nn.Module) -> Seen:
    """Return what is seen of a model's modules. What is traced is a copy, as in `graph.flow`."""
    found, uses, ghost = Seen(model), Uses(), ghost_of(model)
    modules = dict(model.named_modules())
    originals = {shadow: modules[path] for path, shadow in ghost.named_modules()}
    with torch.random.fork_rng([]), pythons_random(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for path, shadow in reversed([*ghost.named_modules()]):
            module = originals[shadow]
            if not _has_code(module):
                continue
            inside = {m: originals[m] for m in shadow.modules()}
            tracer = _OwnCode()
            try:
                with uses.noted(shadow, inside, tracer):
                    graph = tracer.trace(shadow)
            except Exception:  # whatever the model's code raises when it meets a proxy
                continue
            found.touched |= touched_by(graph, shadow, inside)
            if not tracer.given:
                kept = {*proxies([vars(each) for each in inside])} & {*graph.nodes}
                found.traced.append(Traced(path, module, graph, kept))
    found.touched |= uses.touched
    found.count_calls()
    return found


def _has_code(module: nn.Module) -> bool:
    """Return whether a module's own code is to be looked at, as no more is known of it."""
    own = type(module).forward
    known = type(module).__module__.startswith("torch.") and own is not nn.Sequential.forward
    if (known and not isinstance(module, fx.GraphModule)) or own is nn.Module.forward:
        return False
    if isinstance(module, torch.jit.ScriptModule) or is_replaced(module):
        return False
    return not is_convolution(module) and not is_batch_norm(module)
