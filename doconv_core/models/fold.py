"""Folding the layers of every kind in a model to ordinary ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from doconv_core.kinds.base import Kind
from doconv_core.maths.batchnorm import NotFoldable
from doconv_core.models.fuse import fuse_batchnorms
from doconv_core.models.merge import merge_branches as merge
from doconv_core.models.report import Change, Choice, Converted, FoldReport, Left, Report, place
from doconv_core.models.view import Folding, LayerKind, Leave, ModelView, Site


def forms_of(form: Any, kinds: Mapping[str, Kind]) -> dict[str, str]:
    """Return the form that each kind is to be folded to.

    form: None for each kind's default; a name, for the kinds that have a form of it; or a mapping
    from kinds to names. Raises ValueError for other names, TypeError for anything else.
    """
    chosen = {name: kind.forms[0] for name, kind in kinds.items()}
    if form is None:
        return chosen
    if isinstance(form, str):
        having = {name for name, kind in kinds.items() if form in kind.forms}
        if not having:
            most_first = sorted(kinds.values(), key=lambda kind: -len(kind.forms))
            names = dict.fromkeys(each for kind in most_first for each in kind.forms)
            raise ValueError(
                f"form must be one of {', '.join(map(repr, names))}; received form={form!r}."
            )
        return {name: form if name in having else default for name, default in chosen.items()}
    if not isinstance(form, Mapping):
        raise TypeError(
            "form must be a name, or a mapping from kinds to names, such as {'bsconv': 'dense'}; "
            f"received form={form!r}."
        )
    for name, each in form.items():
        if name not in kinds:
            raise ValueError(
                f"form must be of the kinds {', '.join(map(repr, kinds))}; received form={form!r}."
            )
        if each not in kinds[name].forms:
            raise ValueError(
                f"form of {name!r} must be one of {', '.join(map(repr, kinds[name].forms))}; "
                f"received {each!r}."
            )
    return chosen | dict(form)


def fold(
    view: ModelView,
    layer_kinds: Mapping[str, LayerKind],
    *,
    form: Any,
    fuse_batchnorm: bool,
    merge_branches: bool,
    inplace: bool,
) -> Converted[Any]:
    """Return the model with ordinary layers for those of every kind, as `fold` of a backend says.

    Everything is checked before anything is changed.
    """
    if merge_branches:
        view.check_parts()
    forms = forms_of(form, {name: layers.kind for name, layers in layer_kinds.items()})
    sites = view.sites()
    planned, left, choices = _planned(view, sites, layer_kinds, forms)
    view.warn_of_training(stacklevel=4)
    before = view.count()
    changed = {
        sites[i].path: Change(sites[i].path, view.name_of(sites[i].layer), folding.after)
        for each in planned.values()
        for i, folding in each.items()
    }
    if inplace:
        view.check_inplace()
        target, twins = view, sites
    else:
        target = view.copied([p for each in layer_kinds.values() for p in each.given_up(view)])
        twins = target.sites()
    for name, layers in layer_kinds.items():  # an inner kind first: parts of its layers are others'
        layers.fold(target, [(twins[index], folding) for index, folding in planned[name].items()])
    settled = target.settle()
    for asked, tool in (
        (merge_branches, lambda view: merge(view.parts())),
        (fuse_batchnorm, fuse_batchnorms),
    ):
        made, kept = tool(target) if asked else ([], [])
        changed |= {each.path: each for each in made}
        left += kept
    target.finish(changed=bool(changed) or settled)
    there = {site.path: n for n, site in enumerate(target.sites())}  # parts of one layer are not
    told = sorted((c for c in changed.values() if c.path in there), key=lambda c: there[c.path])
    parts = tuple(told), tuple(left), before, target.count()
    uncounted = target.uncounted()
    if not choices:
        return Converted(target.model, Report("folded", *parts, uncounted=uncounted))
    several = {name: forms[name] for name in forms if len(layer_kinds[name].kind.forms) > 1}
    report = FoldReport("folded", *parts, several, tuple(choices), uncounted=uncounted)
    return Converted(target.model, report)


Planned = dict[str, dict[int, Folding]]


def _planned(
    view: ModelView,
    sites: list[Site],
    layer_kinds: Mapping[str, LayerKind],
    forms: Mapping[str, str],
) -> tuple[Planned, list[Left], list[Choice]]:
    """Return what each layer folds to, by kind and the site's index; what is left; and the choices.

    Raises NotFoldable or ValueError, with the layer's path, where one cannot be folded.
    """
    planned: Planned = {name: {} for name in layer_kinds}
    left, choices = [], []
    for index, site in enumerate(sites):
        owner = next((n for n, layers in layer_kinds.items() if layers.owns(site.layer)), None)
        if owner is None:
            view.check_known(site, forms)
            continue
        view.check_ready(site)
        layers = layer_kinds[owner]
        try:
            planned[owner][index] = layers.plan(view, site, forms[owner])
        except Leave as reason:
            left.append(Left(site.path, view.name_of(site.layer), str(reason)))
            continue
        except (NotFoldable, ValueError) as error:
            raise type(error)(f"{place(site.path)}: {error}") from None
        choice = layers.choice(view, site)
        if choice is not None:
            choices.append(choice)
    return planned, left, choices
