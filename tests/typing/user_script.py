"""A user's script, which is type-checked and not run: the public functions as they are used."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from typing_extensions import assert_type

from doconv_core import (
    Converted,
    ConvSpec,
    Difference,
    FoldReport,
    Network,
    NetworkCost,
    Report,
    State,
    count,
    describe,
    read_state,
    write_state,
)
from doconv_torch import (
    BSConvS2d,
    BSConvU2d,
    DGConv2d,
    DOConv1d,
    DOConv2d,
    DOConv3d,
    build,
    composed_once,
    deploy,
    evaluate,
    export_state,
    fold,
    get_model,
    list_models,
    load_state,
    mark_orthonormal,
    orthonormality_loss,
    over_parameterize,
    saliency_lasso,
    set_progress,
    to_bsconv,
    train,
    verify,
)


class Classifier(nn.Module):
    """A network of one's own, with an over-parameterized layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = DOConv2d(3, 16, 3, padding=1, depth_multiplier=12)
        self.separable = BSConvU2d(16, 16, 3, padding=1)
        self.subspace = BSConvS2d(16, 16, 3, padding=1, p=0.25)
        self.dynamic = DGConv2d(16, 16, 3, padding=1, heads=4)
        self.linear = nn.Linear(16, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the logits."""
        features = self.dynamic(self.subspace(self.separable(self.conv(x))))
        return torch.as_tensor(self.linear(features.mean((2, 3))))


def one_step(model: Classifier, images: torch.Tensor, labels: torch.Tensor) -> float:
    """Take one step."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with composed_once(model):
        set_progress(model, 0.5)
        loss = nn.functional.cross_entropy(model(images), labels) + orthonormality_loss(model)
        (loss + saliency_lasso(model)).backward()
    optimizer.step()
    return loss.item()


def finish(model: Classifier, images: torch.Tensor) -> tuple[Difference, str]:
    """Fold the model, and say how far its outputs then lie from what they were."""
    folded, report = fold(model.eval(), form={"bsconv": "dense"}, fuse_batchnorm=True)
    assert_type(folded, Classifier)
    assert_type(deploy(model, torch.zeros(1, 3, 8, 8)).model, Classifier)
    difference: Difference = verify(model, folded, images)
    assert isinstance(report, FoldReport)
    return difference, f"{report.forms}\n{folded.conv}\n{difference.relative:g}"


def convert(images: torch.Tensor) -> State:
    """Convert networks that are there, and exchange their weights."""
    name: str = list_models()[0]
    description: Network = describe(name)
    cost: NetworkCost = count(description, (3, 32, 32))
    assert cost.macs > 0
    model, report = over_parameterize(get_model(name, num_classes=10, seed=1))
    changed: list[str] = [change.path for change in report.changed]
    assert changed
    other, _ = to_bsconv(build(description), "u", where=lambda path, module: "stem" not in path)
    network = nn.Sequential(nn.Conv2d(3, 8, 3))
    result: Converted[nn.Sequential] = over_parameterize(network, inplace=True)
    assert_type(result.model, nn.Sequential)
    assert_type(to_bsconv(network).model, nn.Sequential)
    told: Report = result.report
    assert told.changed
    assert other(images).shape == model(images).shape
    state: State = export_state(model)
    write_state(state, "model.safetensors")
    load_state(model, read_state("model.safetensors"), match="order", ignore="geometry")
    lines: list[dict[str, Any]] = train(model, "digits", quiet=True).metrics
    found: dict[str, float] = evaluate(model, "digits")
    assert lines
    assert found
    return state


layer = DOConv2d.from_conv(nn.Conv2d(3, 8, 3), depth_multiplier=9)
assert_type(layer, DOConv2d)
assert_type(layer.fold(), nn.Conv2d)
assert_type(DOConv1d(3, 8, 3).fold(), nn.Conv1d)
assert_type(DOConv3d(3, 8, 3).fold(), nn.Conv3d)
assert_type(fold(layer).model, nn.Conv2d)
assert_type(deploy(layer).model, nn.Conv2d)
assert_type(BSConvU2d(3, 8, 3).fold(), nn.Sequential)
assert_type(BSConvS2d(3, 8, 3).fold(form="dense"), nn.Conv2d)
assert_type(over_parameterize(nn.Conv2d(3, 8, 3)).model, nn.Conv2d)
kernel: torch.Tensor = layer.composed_kernel()
spec: ConvSpec = layer.spec
pointwise: nn.Conv2d = mark_orthonormal(nn.Conv2d(8, 8, 1))
