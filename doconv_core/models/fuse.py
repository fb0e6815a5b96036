"""Fusing the batch norms of a model, in inference, into the convolutions beside them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from doconv_core.models.report import (
    NOT_DIRECT,
    OUTPUT,
    SEVERAL,
    Change,
    Left,
    fused_into,
)
from doconv_core.models.view import Flow, ModelView, Site


def fuse_batchnorms(view: ModelView) -> tuple[list[Change], list[Left]]:
    """Fuse, in place, what can be fused into ordinary convolutions; return that, and what is left.

    What takes a fused batch norm's place passes its input on. A batch norm becomes a part of the
    convolution that it follows; else, where that is exact, of the one that follows it.
    """
    norms = [site for site in view.sites() if view.is_batch_norm(site.layer)]
    own = {id(site.layer): view.norm_obstacle(site.layer) for site in norms}
    flow = view.flow() if None in own.values() else Flow()
    changed, left = [], []
    for path, _, norm, _ in norms:
        kind, reason, conv = view.name_of(norm), own[id(norm)], None
        if reason is None:
            conv, reason = _behind(view, flow, norm)
            ahead = _ahead(view, flow, norm) if reason is not None else None
            if ahead is not None and view.fuse_ahead(norm, ahead) is None:
                conv, reason = ahead, None
        if reason is None:
            changed.append(Change(path, kind, fused_into(view.name_of(conv))))
        else:
            left.append(Left(path, kind, reason))
    return changed, left


def norms_behind(view: ModelView, sites: Sequence[Site]) -> tuple[dict[int, tuple[Any, int]], Flow]:
    """Return what alone follows convolutions directly: by their ids, batch norms; and the flow.

    Each with its index among the sites. Whether such a pair can be one layer is not asked.
    """
    flow, found = view.flow(), {}
    for index, (_, _, norm, owner) in enumerate(sites):
        if owner is None and view.is_batch_norm(norm):
            conv, _ = _source(view, flow, norm)
            if conv is not None:
                found[id(conv)] = (norm, index)
    return found, flow


def _behind(view: ModelView, flow: Flow, norm: Any) -> tuple[Any, str | None]:
    """Fuse a batch norm into the convolution before it; return that, and why it was not."""
    conv, reason = _source(view, flow, norm)
    return conv, reason or view.pair_obstacle(conv, norm) or view.fuse(conv, norm)


def _source(view: ModelView, flow: Flow, norm: Any) -> tuple[Any, str | None]:
    """Return the convolution whose output alone a batch norm takes, or why there is none."""
    before = _ends(view, flow.before, norm)
    for layer in (norm, *before):
        if layer is not None and id(layer) in flow.unseen:
            return None, flow.unseen[id(layer)]
    if not before or not all(each is not None and view.takes_norm(each) for each in before):
        return None, NOT_DIRECT
    conv = before[0]
    if any(each is not conv for each in before):
        return None, SEVERAL
    if any(after is not norm for after in _ends(view, flow.after, conv)):
        return None, OUTPUT
    return conv, None


def _ahead(view: ModelView, flow: Flow, norm: Any) -> Any:
    """Return the convolution that alone takes a batch norm's output, and nothing else; or None."""
    after = _ends(view, flow.after, norm)
    conv = after[0] if after else None
    alone = conv is not None and all(each is conv for each in after)
    if not alone or not view.is_convolution(conv) or id(norm) in flow.unseen:
        return None
    return conv if all(each is norm for each in _ends(view, flow.before, conv)) else None


def _ends(view: ModelView, flow: Mapping[int, list[Any]], layer: Any) -> list[Any]:
    """Return what stands before or after a layer; before or after what only passes values on."""
    found: list[Any] = []
    waiting, met = [layer], {id(layer)}
    while waiting:
        for end in flow.get(id(waiting.pop()), []):
            if end is None or not view.passes_on(end):
                found.append(end)
            elif id(end) not in met:
                met.add(id(end))
                waiting.append(end)
    return found
