"""What is to become of each layer of a model, decided and checked before anything is changed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from mxnet.gluon import Block, Parameter, SymbolBlock

from doconv_core.maths.batchnorm import NotFoldable
from doconv_core.maths.spec import ConvSpec
from doconv_core.models.report import (
    NOT_SELECTED,
    TIED,
    Change,
    Left,
    Selection,
    place,
)
from doconv_mx.convolutions import is_convolution, obstacle
from doconv_mx.do_conv import _DOConv
from doconv_mx.ordinary import channels_per_group, contexts, has_values, is_pending
from doconv_mx.surgery import DO_CONV, outline
from doconv_mx.symbols import DOSymbolBlock, nodes, refuse_composition
from doconv_mx.view import all_paths, owners, walk, within


class Plan(NamedTuple):
    """What to over-parameterize, by path.

    groups: layers that share one weight, and their sizes. nodes: of each `SymbolBlock` the names of
    convolutions, and their sizes. changed, left: for the report.
    """

    groups: list[tuple[list[str], ConvSpec]]
    nodes: dict[str, list[tuple[str, ConvSpec]]]
    changed: list[Change]
    left: list[Left]


class FoldPlan(NamedTuple):
    """What to fold, by path.

    groups: layers that share one weight. symbols: over-parameterized `SymbolBlock`s. changed: for
    the report.
    """

    groups: list[list[str]]
    symbols: list[str]
    changed: list[Change]


class _Candidate(NamedTuple):
    """A convolution, in the model's order.

    path, paths: the first, and all of them. block: the path of the block that has it. name: that of
    a node of the block's graph.
    """

    path: str
    paths: list[str]
    layer: Any
    reason: str | None
    parameter: Parameter | None
    block: str
    name: str | None


def plan_over_parameterization(
    model: Block, selection: Selection, depth_multiplier: int | None
) -> Plan:
    """Ask `selection` about every layer that could be over-parameterized, and return the plan.

    It is asked about each of a layer's paths; one that is selected is enough.
    Raises ValueError, by path, for a depth multiplier that does not suit a selected layer.
    """
    plan = Plan([], {}, [], [])
    reasons: dict[str, str] = {}
    found = {c.path: c for c in _candidates(model)}
    groups: dict[int, list[_Candidate]] = {}
    for path, candidate in found.items():
        if candidate.reason is not None:
            reasons[path] = candidate.reason
        elif not any([selection(at, candidate.layer) for at in candidate.paths]):
            reasons[path] = NOT_SELECTED
        else:
            groups.setdefault(id(candidate.parameter), []).append(candidate)
    owned = owners(model)
    for parameter, group in groups.items():
        kinds = {(type(c.layer), outline(c.layer), c.layer._kwargs["layout"]) for c in group}
        in_graphs = [c for c in group if c.name is not None]
        if len(kinds) > 1 or len(owned[parameter]) > len(group) or len(in_graphs) > 1:
            reasons.update((c.path, TIED) for c in group)
            continue
        spec = _sizes(group[0], depth_multiplier)
        if in_graphs and len(group) == 1:
            plan.nodes.setdefault(group[0].block, []).append((group[0].name, spec))
        elif in_graphs:
            reasons.update((c.path, TIED) for c in group)
        else:
            plan.groups.append(([c.path for c in group], spec))
    for path, candidate in found.items():
        kind = type(candidate.layer)
        if path in reasons:
            plan.left.append(Left(path, kind.__name__, reasons[path]))
        else:
            plan.changed.append(Change(path, kind.__name__, DO_CONV[kind].__name__))
    return plan


def places(model: Block) -> dict[str, int]:
    """Return the place of each path in the model's order, convolutions of graphs included."""
    paths = []
    for path, block in walk(model):
        paths.append(path)
        if isinstance(block, SymbolBlock):
            paths += [within(path, node.name) for node in nodes(block)]
    return {path: place for place, path in enumerate(paths)}


def _candidates(model: Block) -> Iterator[_Candidate]:
    places = all_paths(model)
    for path, block in walk(model):
        paths = places[id(block)]
        if isinstance(block, SymbolBlock):
            for node in nodes(block):
                at = [within(each, node.name) for each in paths]
                yield _Candidate(
                    at[0], at, node.layer, node.reason, node.weight, path, node.name
                )  # fmt: skip
        elif is_convolution(block):
            weight = getattr(block, "weight", None)
            yield _Candidate(path, paths, block, obstacle(block), weight, path, None)


def _sizes(candidate: _Candidate, depth_multiplier: int | None) -> ConvSpec:
    try:
        spec = outline(candidate.layer, depth_multiplier)
        unknown = candidate.name is not None and not channels_per_group(candidate.layer)
        if unknown and spec.depth_multiplier > spec.taps:
            raise ValueError(
                "in a symbol whose shapes are not known yet, depth_multiplier must be the number "
                f"of kernel taps, {spec.taps}; received depth_multiplier={depth_multiplier}. "
                "Initialize the model and run it once."
            )
    except ValueError as error:
        raise ValueError(f"{place(candidate.path)}: {error}") from None
    return spec


def plan_folding(model: Block) -> FoldPlan:
    """Return which DO-Conv layers the model has.

    Raises NotFoldable, by path, for a layer that no ordinary one computes; ValueError, by path, for
    one of which some parameters have values and others have none.
    """
    blocks, owned, plan = dict(walk(model)), owners(model), FoldPlan([], [], [])
    groups: dict[int, list[str]] = {}
    for path, block in blocks.items():
        layers = {}
        if isinstance(block, DOSymbolBlock):
            plan.symbols.append(path)
            layers = {within(path, name): x for name, x in block._composed.layers.items()}
        elif isinstance(block, SymbolBlock):
            refuse_composition(path, block)
        elif isinstance(block, _DOConv):
            groups.setdefault(id(block.weight), []).append(path)
            layers = {path: block}
        for at, layer in layers.items():
            _require_foldable(at, layer)
            plan.changed.append(Change(at, type(layer).__name__, layer.ordinary.__name__))
    for paths in groups.values():
        first = blocks[paths[0]]
        shared = {id(blocks[path].depthwise_weight) for path in paths}
        others = len(owned[id(first.weight)]) > len(paths)
        if len(shared) > 1 or (first.depthwise_weight is not None and others):
            raise NotFoldable(
                f"{place(paths[0])} shares W, {first.weight.name!r}, with a layer that does not "
                "share D: folded, they would have different kernels of one name."
            )
        plan.groups.append(paths)
    return plan


def _require_foldable(path: str, layer: _DOConv) -> None:
    try:
        layer.require_foldable()
    except NotFoldable as error:
        raise NotFoldable(f"{place(path)}: {error}") from None
    own = [p for p in (layer.weight, layer.depthwise_weight) if p is not None]
    # A layer that has never had values is folded as it is: D will be zero.
    if any(has_values(p) or is_pending(p) for p in own):
        contexts(layer, f"folding {place(path)}")
