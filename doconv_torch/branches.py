"""A PyTorch model's parts, told step by step, and made simpler where branches are one convolution.

What is replaced is the innermost module that holds the branches.
"""

from __future__ import annotations

import copy
import operator
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, fx, nn

from doconv_core.maths.linear import Taps
from doconv_core.maths.numeric import difference
from doconv_core.models.merge import Merge, Node, Part, Step
from doconv_core.models.report import HOOKED, NOT_FINITE, READ, SEVERAL, SHARED, Change
from doconv_torch import own_code, pieces
from doconv_torch.ordinary import ORDINARY, is_hooked, kind_of, memory
from doconv_torch.surgery import become

TRAINING = "in training mode"
UNLIKE = "its parameters are of several types or devices, or have no values"
CHANGED = "what its branches take is changed in place"
LOPSIDED = "it would have to be padded differently at both ends"
BYPASSED = "a part of it is called by another module's code"
UNSAVED = "its code takes a tensor that is not saved, which its traced form would save"
EXACT = 1e-9  # of the largest output, in float64


def parts(model: nn.Module) -> list[ModulePart]:
    """Return the modules whose own code can be traced, those inside others before them."""
    seen = own_code.seen(model)
    return [ModulePart(traced, seen) for traced in seen.traced]


class ModulePart(Part):
    """A module of which the own code was traced."""

    def __init__(self, traced: own_code.Traced, seen: own_code.Seen) -> None:
        self.path, self.layer, self._graph, self._kept = traced
        self.kind, self._seen = kind_of(self.layer), seen
        self._told: dict[fx.Node, Step] = {}

    def steps(self, known: Mapping[int, Node]) -> tuple[list[Step], Any]:
        """Return the steps of the module's own code, and the result that it returns."""
        reader = pieces.Reader(self.layer, known)
        self._told = {}
        end: Any = None
        for node in self._graph.nodes:
            if node.op == "output":
                end = node
            elif node.op != "placeholder" and (step := reader.step(node)) is not None:
                self._told[node] = step
        steps = [*self._told.values()]
        returned = end.args[0]
        if not isinstance(returned, fx.Node) or returned in reader.constants:
            returned = None
            steps.append(Step(end, tuple(end.all_input_nodes)))
        return [*steps, *(Step((node, "kept"), (node,)) for node in self._kept)], returned

    def obstacle(self, merge: Merge) -> str | None:
        """Return why steps cannot become one convolution in this model; None where they can."""
        for node in merge.nodes:
            reason = self._obstacle(node) or self._unequal(node)
            if reason is not None:
                return reason
        if self._is_chain(merge) and not self._is_whole(merge):
            return None
        if self.layer in self._seen.bypassed:
            return BYPASSED
        return None if self._is_whole(merge) or self._is_saved() else UNSAVED

    def _is_saved(self) -> bool:
        """Return whether a state dict has all tensors of the code, as that of a graph would."""
        for each in self._graph.nodes:
            if each.op == "get_attr":
                owner, _, name = str(each.target).rpartition(".")
                module = self.layer.get_submodule(owner)
                buffers = module._buffers.keys() - module._non_persistent_buffers_set
                if name not in module._parameters and name not in buffers:
                    return False
        return True

    def _obstacle(self, node: Node) -> str | None:
        modules = [m for called in self._called(node).values() for m in called.modules()]
        parameters = [p for m in modules for p in m._parameters.values() if p is not None]
        if self.layer.training or any(module.training for module in modules):
            return TRAINING
        if any(map(is_hooked, modules)):
            return HOOKED
        if any(self._seen.calls[m] > 1 and (m._parameters or m._buffers) for m in modules):
            return SEVERAL
        if any(len(self._seen.owners.get(memory(p), ())) > 1 for p in parameters):
            return SHARED
        if any((m, name) in self._seen.touched for m in modules for name in m._parameters):
            return READ
        if any((self.layer, name) in self._seen.touched for name in self._own_names(node)):
            return READ
        floats = self._floats(node)
        if len({(t.dtype, t.device) for t in floats}) != 1 or floats[0].is_meta:
            return UNLIKE
        source: Any = node.source
        if any(_in_place(user, self.layer) for user in source.users if user not in node.steps):
            return CHANGED
        taps = _taps(node)
        if any(pad[0] != pad[1] for pad in taps.geometry.padding):
            return LOPSIDED
        conv = self._conv(node)
        finite = conv.weight.isfinite().all() and (conv.bias is None or conv.bias.isfinite().all())
        return None if finite else NOT_FINITE

    def _unequal(self, node: Node) -> str | None:
        """Return how far the convolution is from the steps on random values; None where equal."""
        try:
            before = copy.deepcopy(fx.GraphModule(self.layer, self._alone(node))).double().cpu()
            after, taps = self._conv(node).cpu(), _taps(node)
            _fill(after.double(), taps)
            generator = torch.Generator().manual_seed(0)
            for more in (2, 3):
                sizes = [
                    e + more * s for e, s in zip(taps.extent, taps.geometry.stride, strict=True)
                ]
                x = torch.randn(1, taps.channels[0], *sizes, generator=generator).double()
                expected = before(x)
                apart = difference(after(x).numpy(force=True), expected.numpy(force=True)).relative
                if not apart <= EXACT:
                    return f"tried on random values, it differs by {apart:.1g}"
        except Exception as error:  # whatever the model's own code raises
            return f"tried on random values, it raised {type(error).__name__}: {error}"
        return None

    def _alone(self, node: Node) -> fx.Graph:
        """Return the graph of a node's steps alone."""
        graph, needed = fx.Graph(), {key for _, key in node.ends}
        copies = {node.source: graph.placeholder("x")}
        for each in reversed(self._graph.nodes):
            if each in needed and each is not node.source:
                needed |= {*each.all_input_nodes}
        for each in self._graph.nodes:
            if each in needed and each is not node.source:
                copies[each] = graph.node_copy(each, copies.__getitem__)
        total: Any = 0
        for sign, key in node.ends:
            signed = graph.call_function(operator.mul, (copies[key], sign))
            total = graph.call_function(operator.add, (total, signed))
        graph.output(total)
        return graph

    def _called(self, node: Node) -> dict[str, nn.Module]:
        """Return the modules that steps call, by their names here."""
        targets = [str(n.target) for n in self._graph.nodes if n in node.steps and _calls(n)]
        return {target: self.layer.get_submodule(target) for target in targets}

    def _floats(self, node: Node) -> list[Tensor]:
        """Return the parameters and buffers that steps compute with."""
        found: list[Tensor] = []
        for each in self._own_names(node):
            owner, _, name = each.rpartition(".")
            found.append(getattr(self.layer.get_submodule(owner), name))
        for module in self._called(node).values():
            found += [*module.parameters(), *module.buffers()]
        return [tensor for tensor in found if tensor.is_floating_point()]

    def _own_names(self, node: Node) -> list[str]:
        """Return the names of the tensors that steps of the module's own code compute with."""
        return [str(each.target) for each in self._alone(node).nodes if each.op == "get_attr"]

    def _main(self, node: Node) -> str:
        """Return the name of the module whose place the convolution takes; "" for a new one."""
        named = {n: self._told[n].node for n in self._graph.nodes if n in node.steps and _calls(n)}
        sizes = {str(n.target): each.piece.macs for n, each in named.items() if each is not None}
        return max(sizes, key=lambda target: sizes[target]) if any(sizes.values()) else ""

    def _conv(self, node: Node) -> Any:
        """Return the convolution that steps are."""
        floats, taps = self._floats(node), _taps(node)
        geometry, cls = taps.geometry, ORDINARY[len(taps.size) - 1]
        conv: Any = nn.utils.skip_init(
            cls, *taps.channels, taps.size, stride=geometry.stride,
            padding=tuple(pad[0] for pad in geometry.padding), dilation=geometry.dilation,
            groups=taps.groups, bias=taps.bias is not None, padding_mode=geometry.padding_mode,
            device=floats[0].device, dtype=floats[0].dtype,
        )  # fmt: skip
        _fill(conv, taps)
        trained = any(tensor.requires_grad for tensor in floats)
        return conv.requires_grad_(trained).train(self.layer.training)

    def replace(self, merges: Sequence[Merge]) -> list[Change]:
        """Let the module compute these convolutions in place of their steps."""
        convs = {node: self._conv(node) for merge in merges for node in merge.nodes}
        names = {node: self._main(node) or self._new(n) for n, node in enumerate(convs)}
        told = {node: self._told_of(node) for node in convs}
        if len(merges) == 1 and self._is_whole(merges[0]):
            (conv,) = convs.values()
            become(self.layer, conv)
            return [Change(self.path, self.kind, told[node]) for node in convs]
        if all(map(self._is_chain, merges)):
            for node, conv in convs.items():
                for name, module in self._called(node).items():
                    become(module, conv if name == names[node] else nn.Identity().eval())
        elif merges:
            self._rewrite(merges, convs, names)
        dot = "." if self.path else ""
        final = {node: self._renamed.get(name, name) for node, name in names.items()}
        return [Change(f"{self.path}{dot}{final[n]}", self.kind, told[n]) for n in convs]

    _renamed: Mapping[str, str] = {}

    def _new(self, number: int) -> str:
        name = f"merged{number or ''}"
        while hasattr(self.layer, name):
            name += "_"
        return name

    def _told_of(self, node: Node) -> str:
        taps = _taps(node)
        of = ", ".join(self._called(node)) or "its own parameters"
        return f"Conv{len(taps.size)}d of {of}"

    def _is_whole(self, merge: Merge) -> bool:
        """Return whether the module computes nothing else, of the first value that it is given."""
        (end,) = (node for node in self._graph.nodes if node.op == "output")
        sources = [node.source for node in merge.nodes]
        given = [node for node in self._graph.nodes if node.op == "placeholder"]
        return end.args[0] is merge.key and len(merge.terms) == 1 and sources == given

    def _is_chain(self, merge: Merge) -> bool:
        """Return whether steps are calls of modules in a row, each of which can be an identity."""
        (node, *others) = merge.nodes
        once = all(self._seen.calls[module] == 1 for module in self._called(node).values())
        steps: Any = node.steps
        alone = not (node.sums or others or merge.terms[1:])
        return alone and once and all(map(_calls, steps)) and bool(self._main(node))

    def _rewrite(
        self, merges: Sequence[Merge], convs: Mapping[Node, nn.Module], names: Mapping[Node, str]
    ) -> None:
        """Make the module what its code is with convolutions in place of steps."""
        graph = self._rewritten(merges, names)
        kept = {str(node.target) for node in graph.nodes if _calls(node)} - {*names.values()}
        for target in {name for node in convs for name in self._called(node)} - kept:
            owner, _, last = target.rpartition(".")
            del self.layer.get_submodule(owner)._modules[last]
        for merged, conv in convs.items():
            owner, _, last = names[merged].rpartition(".")
            self.layer.get_submodule(owner)._modules[last] = conv
        row = _row(graph)
        if row is None:
            become(self.layer, fx.GraphModule(self.layer, graph, kind_of(self.layer)))
            self.layer.graph = graph  # whose owner the module is now
            return
        self._renamed = {name: name.replace(".", "_") for name in row}
        made = OrderedDict((self._renamed[n], self.layer.get_submodule(n)) for n in row)
        become(self.layer, nn.Sequential(made).eval())

    def _rewritten(self, merges: Sequence[Merge], names: Mapping[Node, str]) -> fx.Graph:
        """Return the graph that calls modules of these names in place of steps."""
        graph, copies = fx.Graph(), dict[fx.Node, fx.Node]()
        graph.output(graph.graph_copy(self._graph, copies))
        values, order = dict(copies), [*self._graph.nodes]
        for merge in sorted(merges, key=lambda merge: order.index(merge.key)):
            old, total = values[merge.key], None
            with graph.inserting_before(old):
                for term in sorted(merge.terms, key=lambda term: -term.sign):  # a new one is first
                    if term.node is None:
                        value = values[term.key]
                    else:
                        value = graph.call_module(names[term.node], (values[term.node.source],))
                    function = operator.add if term.sign > 0 else operator.sub
                    both = (total, value)
                    total = value if total is None else graph.call_function(function, both)
            assert total is not None  # as no merge is without terms
            old.replace_all_uses_with(total)
            values[merge.key] = total
        for each, node in reversed([*copies.items()]):
            if each.op != "placeholder" and each.users and not node.users:
                graph.erase_node(node)
        return graph


def _taps(node: Node) -> Taps:
    assert isinstance(node.piece, Taps)  # as that is what steps are merged to
    return node.piece


def _calls(node: fx.Node) -> bool:
    return node.op == "call_module"


def _fill(conv: Any, taps: Taps) -> None:
    conv.weight.copy_(torch.from_numpy(taps.kernel))
    if taps.bias is not None:
        conv.bias.copy_(torch.from_numpy(taps.bias.copy()))


def _row(graph: fx.Graph) -> list[str] | None:
    """Return the names of the modules that a graph calls one after the other, if it is no more."""
    nodes = [*graph.nodes]
    if nodes[0].op != "placeholder" or nodes[-1].args[0] is not nodes[-2]:
        return None
    for before, node in pairwise(nodes[:-1]):
        if not _calls(node) or node.args != (before,) or node.kwargs:
            return None
    names = [str(node.target) for node in nodes[1:-1]]
    return names if len({*names}) == len(names) else None


def _in_place(node: fx.Node, module: nn.Module) -> bool:
    """Return whether a step changes what it takes."""
    if _calls(node):
        return bool(getattr(module.get_submodule(str(node.target)), "inplace", False))
    return pieces.changes(node)
