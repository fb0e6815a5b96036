"""Branches with batch norms in PyTorch alone: modes, hooks, parameters, compilation, devices."""

from __future__ import annotations

import copy
import pickle

import pytest
from equal import assert_close, assert_same
from frameworks import need

need("torch")

import torch  # noqa: E402
from torch import nn  # noqa: E402

import doconv_torch as package  # noqa: E402
from doconv_core import NotFoldable  # noqa: E402
from doconv_core.models.normed import NO_NORM  # noqa: E402


def pair(norm=nn.BatchNorm2d, conv=nn.Conv2d, **options):
    torch.manual_seed(0)
    model = nn.Sequential(conv(4, 4, 3, padding=1, **options), norm(4), nn.ReLU())
    with torch.no_grad():
        model[1].running_mean.normal_()
        model[1].running_var.uniform_(0.5, 2)
    return model.eval()


X = torch.randn(2, 4, 6, 5, generator=torch.Generator().manual_seed(1))


def reason(model, kind="repvgg"):
    with pytest.warns(UserWarning, match="no convolution that could be replaced"):
        report = package.over_parameterize(model, kind=kind).report
    return {path: told for path, _, told in report.left}["0"]


def test_parameters_and_statistics_that_were_trained_stay_the_same_objects():
    model = pair()
    conv, norm = dict(model[0].named_parameters()), {**model[1]._parameters, **model[1]._buffers}
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    made = package.over_parameterize(model, kind="repvgg", inplace=True).model
    assert made is model
    assert dict(made[0].dense_conv.named_parameters()) == conv
    taken = {**made[0].dense_norm._parameters, **made[0].dense_norm._buffers}
    assert all(taken[name] is value for name, value in norm.items())
    assert type(made[1]) is nn.Identity
    assert repr(made[1]) == "Identity()"

    def step():
        optimizer.zero_grad()
        made.train()(X).sum().backward()
        optimizer.step()

    step()
    with pytest.warns(UserWarning, match="does not have '0.identity_norm.bias'"):
        step()


@pytest.mark.parametrize("kind", ["repvgg", "dbb", "qarepvgg"])
def test_a_model_in_training_is_taken_over_but_not_folded(kind):
    model = pair().train()
    made = package.over_parameterize(model, kind=kind).model
    assert all(module.training for module in made.modules())
    assert_close(made.eval()(X), model.eval()(X))
    message = "layer '0': its dense_norm cannot be folded: in training mode; call model.eval"
    with pytest.raises(NotFoldable, match=message):
        package.fold(made.train())
    frozen = pair()
    made = package.over_parameterize(frozen.requires_grad_(False), kind=kind).model
    assert not any(parameter.requires_grad for parameter in made.parameters())
    assert not package.fold(made).model[0].bias.requires_grad


def test_norms_of_other_classes_are_taken_over_or_left():
    for norm in (nn.SyncBatchNorm, lambda n: nn.BatchNorm2d(n, 1e-3, 0.3, affine=False)):
        model = pair(norm)
        made = package.over_parameterize(model, kind="repvgg").model
        norms = {type(part) for name, part in made[0].named_children() if "norm" in name}
        assert norms == {type(model[1])}
        assert made[0].identity_norm.eps == model[1].eps
        assert made[0].pointwise_norm.momentum == model[1].momentum
        assert made[0].dense_norm.affine == model[1].affine
        assert_close(made(X), model(X))
        assert_close(package.fold(made).model(X), model(X))

    class Own(nn.BatchNorm2d):
        pass

    model = pair()
    model[1].__class__ = Own
    assert reason(model).endswith(
        "cannot be taken over: a subclass, which may compute something else"
    )
    assert "it has no running statistics" in reason(
        nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4, track_running_stats=False))
    )
    assert reason(nn.Sequential(nn.Conv2d(4, 4, 3), nn.ReLU(), nn.BatchNorm2d(4))) == NO_NORM
    hooked = pair()
    hooked[1].register_forward_hook(lambda *_: None)
    assert "has hooks, which would see other values" in reason(hooked)
    shared = nn.Sequential(nn.Conv2d(4, 4, 3), norm := nn.BatchNorm2d(4), norm)
    assert reason(shared) == NO_NORM
    bound = pair()
    bound[0].weight.register_hook(lambda gradient: gradient)
    assert "its weight has hooks" in reason(bound)


def test_what_was_exchanged_is_not_folded():
    rows = (
        ("pointwise_conv", nn.Conv2d(4, 4, 3), "its pointwise_conv is not as its rule makes it"),
        ("pointwise_conv", nn.Conv1d(4, 4, 1), "it is a Conv1d; expected a torch.nn.Conv2d"),
        ("dense_norm", nn.Identity(), "it is a Identity; expected a batch norm"),
        ("more", nn.ReLU(), "its parts are .*, more; expected dense_conv, dense_norm, "),
    )
    for name, part, message in rows:
        made = package.over_parameterize(pair(), kind="repvgg").model
        setattr(made[0], name, part)
        with pytest.raises(NotFoldable, match=f"layer '0': .*{message}"):
            package.fold(made)
    made = package.over_parameterize(pair(), kind="repvgg").model
    made[0].identity_norm.register_forward_pre_hook(lambda *_: None)
    with pytest.raises(NotFoldable, match="its identity_norm has hooks"):
        package.fold(made)
    with torch.no_grad():
        made[0].identity_norm.weight.fill_(1e38)
        made[0].identity_norm.running_var.fill_(0)
        made[0].identity_norm._forward_pre_hooks.clear()
        made[0].dense_norm.weight.fill_(float("inf"))
    with pytest.raises(NotFoldable, match="the folded kernel is not finite"):
        package.fold(made)


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
def test_padding_of_other_values_is_that_of_every_kernel(mode):
    model = pair(padding_mode=mode)
    for kind in ("repvgg", "acnet", "mobileone", "qarepvgg"):
        made = package.over_parameterize(model, kind=kind).model
        for module in made.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.weight)
        folded = package.fold(made).model
        assert folded[0].padding_mode == mode
        assert_close(folded(X), made(X))
    assert "it pads with other values than zeros" in reason(model, "dbb")


def test_layers_are_copied_pickled_traced_compiled_and_in_other_formats():
    made = package.over_parameterize(pair(), kind="dbb").model.to(memory_format=torch.channels_last)
    output = made(X)
    assert_same(copy.deepcopy(made)(X), output)
    assert_same(pickle.loads(pickle.dumps(made))(X), output)
    assert_close(torch.jit.trace(made, X)(X), output)
    assert_close(torch.compile(made, backend="eager", fullgraph=True)(X), output)
    again = package.over_parameterize(made[0].fold(), where="").model  # an ordinary one
    assert type(again) is package.DOConv2d
    last = nn.Sequential(*pair()).to(memory_format=torch.channels_last)
    taken = package.over_parameterize(last, kind="dbb").model
    for part in (taken[0].dense_conv, taken[0].sequence_conv2, taken[0].fold()):
        assert part.weight.is_contiguous(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16):
        assert_close(made.train()(X), copy.deepcopy(made).train()(X))
    half = copy.deepcopy(made).eval().to(torch.bfloat16)
    assert package.fold(half).model[0].weight.dtype == torch.bfloat16


def test_a_layer_of_its_own_begins_as_published():
    layer = package.NormedConv2d(4, 4, 3, padding=1, bn_options={"eps": 1e-3, "momentum": 0.2})
    assert layer.dense_conv.bias is None
    assert repr(layer).splitlines()[1].strip() == "rule='repvgg'"
    assert (layer.identity_norm.eps, layer.pointwise_norm.momentum) == (1e-3, 0.2)
    assert float(layer.pointwise_norm.weight.detach().min()) == 1
    y = layer(X).detach()
    assert abs(float(y.mean())) < 0.1
    assert float(y.std()) > 1  # three branches of variance 1


def test_a_convolution_that_cannot_be_taken_over_is_refused():
    conv, norm = nn.ConvTranspose2d(4, 4, 3), nn.BatchNorm2d(4)
    with pytest.raises(TypeError, match=r"NormedConv2d.from_conv takes over a torch.nn.Conv2d"):
        package.NormedConv2d.from_conv(conv, norm, rule="repvgg")


def test_deploy_folds_and_verifies():
    made = package.over_parameterize(pair(), kind="mobileone", branches=2).model
    deployed, report = package.deploy(made, X)
    assert report.difference.relative < 1e-5
    assert [type(module) for module in deployed] == [nn.Conv2d, nn.Identity, nn.ReLU]
