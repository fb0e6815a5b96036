"""Putting layers of a kind in the places of a model's ordinary convolutions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from doconv_core.kinds.base import variant_named
from doconv_core.models.report import (
    NOT_SELECTED,
    BSConvReport,
    Change,
    Converted,
    Explained,
    Left,
    Report,
    place,
)
from doconv_core.models.select import Selection, Where
from doconv_core.models.view import LayerKind, Leave, ModelView, Site


class Chosen(NamedTuple):
    """A layer to be replaced. at: the index of its site. prepared: what its kind needs for it."""

    at: int
    site: Site
    prepared: Any


def over_parameterize(
    view: ModelView,
    layer_kinds: Mapping[str, LayerKind],
    kind: str,
    options: Mapping[str, Any],
    *,
    where: Where,
    inplace: bool,
) -> Converted[Any]:
    """Return the model with layers of a kind for its convolutions; it computes the same.

    As every backend's `over_parameterize` says. kind: its name, or one of its `variants`, whose
    options those that are given come before. options: the kind's own. Raises ValueError for a kind
    that is not known or changes what a model computes, TypeError for options of another.
    """
    known, meant = variant_named(kind)
    options = {**meant, **options}
    if not known.exact:
        raise ValueError(
            f"a layer of kind {kind!r} computes something else than the convolution in whose place "
            f"it is, so that nothing would be over-parameterized; {known.instead}."
        )
    known.check_taken(options)
    layers = of_kind(layer_kinds, known.name)
    target, chosen, parts, uncounted = convert(
        view, layer_kinds, layers, options, where=where, inplace=inplace, stacklevel=5
    )
    fusing = tuple(view.fusing([each.site.layer for each in chosen]))
    report = Report("over-parameterized", *parts, uncounted=uncounted, fusing=fusing)
    return Converted(target, report)


def replace(
    view: ModelView,
    layer_kinds: Mapping[str, LayerKind],
    kind: str,
    options: Mapping[str, Any],
    *,
    where: Where,
    inplace: bool,
) -> Converted[Any]:
    """Return the model with layers of a kind that computes something else, to be trained on."""
    layers = of_kind(layer_kinds, kind)
    target, chosen, parts, uncounted = convert(
        view, layer_kinds, layers, options, where=where, inplace=inplace, stacklevel=5
    )
    shares = ((each.site.path, layers.share(each.prepared)) for each in chosen)
    explained = tuple(Explained(path, share) for path, share in shares if share is not None)
    report = BSConvReport("replaced", *parts, explained, uncounted=uncounted)
    return Converted(target, report)


def of_kind(layer_kinds: Mapping[str, LayerKind], kind: str) -> LayerKind:
    """Return a kind's layers; ValueError where the framework has none."""
    if kind not in layer_kinds:
        raise ValueError(
            f"this framework has layers of the kinds {', '.join(map(repr, layer_kinds))}; received "
            f"kind={kind!r}."
        )
    return layer_kinds[kind]


Parts = tuple[tuple[Change, ...], tuple[Left, ...], int, int]


def convert(
    view: ModelView,
    layer_kinds: Mapping[str, LayerKind],
    layers: LayerKind,
    options: Mapping[str, Any],
    *,
    where: Where,
    inplace: bool,
    stacklevel: int,
) -> tuple[Any, list[Chosen], Parts, int]:
    """Return the model, the layers that were replaced as they were, and the parts of a report.

    The last is how many parameters are not counted.

    Everything is checked before anything is changed.
    """
    sites = view.sites()
    _check_where(where, sites)
    selection = Selection(where)
    reasons = _reasons(view, sites, layer_kinds, layers, selection, options)
    chosen = []
    for index, site in enumerate(sites):
        if index in reasons and reasons[index] is None:
            view.check_ready(site)
            try:
                chosen.append(Chosen(index, site, _prepared(view, layers, site, options)))
            except Leave as reason:
                reasons[index] = str(reason)
    left = tuple(
        Left(sites[index].path, view.name_of(sites[index].layer), reason)
        for index, reason in reasons.items()
        if reason is not None
    )
    changed = tuple(
        Change(site.path, view.name_of(site.layer), layers.replacement(site.layer, options))
        for _, site, _ in chosen
    )
    selection.warn(stacklevel=stacklevel)
    before = view.count()
    if inplace:
        view.check_inplace()
    target = view if inplace else view.copied()
    twins = sites if inplace else target.sites()
    layers.convert(target, [(twins[each.at], each.prepared) for each in chosen])
    target.finish(changed=bool(chosen))
    parts = (changed, left, before, target.count())
    return target.model, chosen, parts, target.uncounted()


def _check_where(where: Where, sites: Sequence[Site]) -> None:
    """Raise TypeError for layers, most of which can be called and would be taken for predicates."""
    given = where if isinstance(where, (list, tuple, set)) else (where,)
    paths = {id(site.layer): site.path for site in sites}
    for each in given:
        if id(each) in paths:
            raise TypeError(
                f"where takes no layers; for this {type(each).__name__} give its path, "
                f"where={paths[id(each)]!r}, or a predicate, such as where=lambda path, layer: "
                "layer is conv."
            )


def _reasons(
    view: ModelView,
    sites: Sequence[Site],
    layer_kinds: Mapping[str, LayerKind],
    layers: LayerKind,
    selection: Selection,
    options: Mapping[str, Any],
) -> dict[int, str | None]:
    """Return why each convolution is left, None of those to replace, by the site's index."""
    inside = {
        id(part) for site in sites if layers.owns(site.layer) for part in view.below(site.layer)
    }
    reasons: dict[int, str | None] = {}
    for index, (_, paths, layer, _) in enumerate(sites):
        if not view.is_convolution(layer):
            continue
        if layers.part and id(layer) in inside:
            reason: str | None = layers.part
        elif any(each.owns(layer) for each in layer_kinds.values()):
            reason = layers.already
        else:
            reason = view.obstacle(layer) or layers.obstacle(view, layer, options)
        if reason is None and not any([selection(path, layer) for path in paths]):
            reason = NOT_SELECTED
        reasons[index] = reason
    for index, reason in reasons.items():
        if reason is None:
            reasons[index] = view.other_use(sites[index].layer)
    chosen = {id(sites[index].layer): index for index, reason in reasons.items() if reason is None}
    for index in chosen.values():
        layer = sites[index].layer
        others = [other for other in view.holders(layer) if other is not layer]
        if others and not (layers.shareable and _alike(view, layer, others, chosen)):
            reasons[index] = layers.shared
    return reasons


def _alike(view: ModelView, layer: Any, others: Sequence[Any], chosen: Mapping[int, int]) -> bool:
    """Return whether all that share a weight are to be replaced, and of one type and size."""
    return all(
        other is not None
        and id(other) in chosen
        and type(other) is type(layer)
        and view.outline(other) == view.outline(layer)
        for other in others
    )


def _prepared(view: ModelView, layers: LayerKind, site: Site, options: Mapping[str, Any]) -> Any:
    try:
        return layers.prepare(view, site.layer, options)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{place(site.path)}: {error}") from None
