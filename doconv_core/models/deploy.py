"""Making a trained model what is to be deployed: everything in the one order that is right."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

from doconv_core.maths.numeric import Difference
from doconv_core.models.fold import fold
from doconv_core.models.fuse import fuse_batchnorms
from doconv_core.models.report import Converted, DeployReport
from doconv_core.models.view import LayerKind, ModelView

# Above what rounding in half precision comes to in a deep network.
SUSPECT = 0.02


def deploy(
    view: ModelView,
    layer_kinds: Mapping[str, LayerKind],
    verify: Callable[[Any, Any, Any], Difference],
    inputs: Any,
    *,
    form: Any,
) -> Converted[Any]:
    """Return the model to be deployed, a copy, as `deploy` of a backend says.

    Layers of kinds are folded first, as a model's own methods read weights; these methods next, as
    they expect the batch norms that they know; then what is left of batch norms is fused.
    """
    folded = fold(
        view, layer_kinds, form=form, fuse_batchnorm=False, merge_branches=False, inplace=False
    )
    made = type(view)(folded.model)  # type: ignore[call-arg]  # a view is made of a model
    called = made.call_fusing()
    fused, left = fuse_batchnorms(made)
    made.finish(changed=bool(called or fused or folded.report.changed))
    difference = None if inputs is None else verify(view.model, made.model, inputs)
    if difference is not None and not difference.relative <= SUSPECT:
        warnings.warn(
            f"the deployed model differs by {difference.relative:.2g} of the largest output; the "
            "report says what was done.",
            UserWarning,
            stacklevel=3,
        )
    report = DeployReport(
        "deployed",
        (*folded.report.changed, *called, *fused),
        (*folded.report.left, *left),
        folded.report.parameters_before,
        made.count(),
        difference=difference,
    )
    return Converted(made.model, report)
