"""Fusing the batch norms of a model, in inference, into the convolutions that they follow."""

from __future__ import annotations

from typing import Any

from doconv_core.models.report import (
    NOT_DIRECT,
    OUTPUT,
    SEVERAL,
    Change,
    Left,
    fused_into,
)
from doconv_core.models.view import Flow, ModelView


def fuse_batchnorms(view: ModelView) -> tuple[list[Change], list[Left]]:
    """Fuse, in place, what can be fused into ordinary convolutions; return that, and what is left.

    What takes a fused batch norm's place passes its input on.
    """
    norms = [site for site in view.sites() if view.is_batch_norm(site.layer)]
    own = {id(site.layer): view.norm_obstacle(site.layer) for site in norms}
    flow = view.flow() if None in own.values() else Flow()
    changed, left = [], []
    for path, _, norm, _ in norms:
        kind, reason, conv = view.name_of(norm), own[id(norm)], None
        if reason is None:
            conv, reason = _source(view, flow, norm)
        if reason is None:
            reason = view.pair_obstacle(conv, norm) or view.fuse(conv, norm)
        if reason is None:
            changed.append(Change(path, kind, fused_into(view.name_of(conv))))
        else:
            left.append(Left(path, kind, reason))
    return changed, left


def _source(view: ModelView, flow: Flow, norm: Any) -> tuple[Any, str | None]:
    """Return the convolution whose output alone a batch norm takes, or why there is none."""
    before = flow.before.get(id(norm), [])
    for layer in (norm, *before):
        if layer is not None and id(layer) in flow.unseen:
            return None, flow.unseen[id(layer)]
    if not before or not all(each is not None and view.is_convolution(each) for each in before):
        return None, NOT_DIRECT
    conv = before[0]
    if any(each is not conv for each in before):
        return None, SEVERAL
    if any(after is not norm for after in flow.after.get(id(conv), [])):
        return None, OUTPUT
    return conv, None
