"""PyTorch: models that are wrapped, compiled, traced, without gradients or without values."""

from __future__ import annotations

import copy

import pytest
from frameworks import need

need("torch")

import torch  # noqa: E402
from torch import nn  # noqa: E402
from torch.distributed.checkpoint.state_dict import (  # noqa: E402
    StateDictOptions,
    get_model_state_dict,
)
from torch.distributed.fsdp import fully_shard  # noqa: E402
from torch_models import REPLACED, Network, images, network, output, trained  # noqa: E402

from doconv_core import NotFoldable  # noqa: E402
from doconv_torch import deploy, export_state, fold, over_parameterize, verify  # noqa: E402


@pytest.fixture
def alone(tmp_path):
    """A process group of this process."""
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("steps", [0, 1])
def test_what_fully_shard_was_given_is_refused_and_folded_as_the_error_says(alone, steps):
    model = over_parameterize(network().eval())[0]
    whole = copy.deepcopy(model)
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    fully_shard(model.stem, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for _ in range(steps):
        output(model).square().mean().backward()
        optimizer.step()
    for call in (over_parameterize, fold, lambda m, **options: fold(m.stem, **options)):
        for inplace in (False, True):
            with pytest.raises(TypeError, match=r"is one that fully_shard .*get_model_state_dict"):
                call(model, inplace=inplace)
    with pytest.raises(TypeError, match=r"has one at '0' that fully_shard"):
        fold(nn.Sequential(model))
    with pytest.raises(NotFoldable, match="its parameters are sharded"):
        model.head["mix"].fold()
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    whole.load_state_dict(get_model_state_dict(model, options=options))
    torch.testing.assert_close(output(fold(whole)[0]), output(model))


def test_distributed_wrappers_are_refused(alone):
    model = nn.parallel.DistributedDataParallel(network())
    for call in (over_parameterize, fold):
        with pytest.raises(TypeError, match="the model is a DistributedDataParallel, which"):
            call(model, inplace=True)
        with pytest.raises(TypeError, match="has a DistributedDataParallel at '0', which"):
            call(nn.Sequential(model))
    inner = over_parameterize(model.module)[0]
    wrapped = nn.parallel.DistributedDataParallel(inner)
    wrapped(images()).sum().backward()
    assert inner.stem[0].depthwise_weight.grad is not None


def test_data_parallel_and_its_replicas():
    original = nn.DataParallel(network().eval())
    model, report = over_parameterize(original)
    assert report.changed[0].path == "module.stem.0"
    assert torch.equal(output(model), output(original))
    layer = trained(model).module.stem[0]
    replica = layer._replicate_for_data_parallel()
    for name, parameter in layer.named_parameters():
        setattr(replica, name, parameter.detach().clone().requires_grad_())
    assert torch.equal(replica(images()), layer(images()))


def test_compiled_models_notice():
    torch._dynamo.reset()
    model = network().eval()
    compiled = torch.compile(model, backend="aot_eager")
    expected = compiled(images())
    _, report = over_parameterize(compiled, inplace=True)
    assert report.changed[0].path == "_orig_mod.stem.0"
    torch.testing.assert_close(compiled(images()), expected)
    trained(model)
    changed = model(images())
    assert not torch.allclose(changed, expected)
    torch.testing.assert_close(compiled(images()), changed)
    fold(compiled, inplace=True)
    assert type(model.stem[0]) is nn.Conv2d
    torch.testing.assert_close(compiled(images()), changed)


def test_graph_modules_are_models_too():
    original = torch.fx.symbolic_trace(network().eval())
    model, report = over_parameterize(original)
    assert [change.path for change in report.changed] == REPLACED
    assert torch.equal(output(model), output(original))
    expected = output(trained(model))
    assert torch.equal(output(fold(model)[0]), expected)


@pytest.mark.parametrize("multiplier", [None, 10])
def test_traced_layers_are_those_that_were_trained_and_not_folded(multiplier):
    model = trained(over_parameterize(network(), depth_multiplier=multiplier)[0]).eval()
    graph = torch.fx.symbolic_trace(model)
    found, expected = output(graph), output(model)
    assert torch.equal(found, expected)
    for result in (found, expected):
        result.square().mean().backward()
    gradients = {name: p.grad for name, p in graph.named_parameters()}
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad)
    exported = torch.export.export(model, (images(),)).module()
    for made in (graph, exported, nn.Sequential(graph)):
        with pytest.raises(NotFoldable, match="became a part of a traced or exported graph"):
            fold(made)


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_frozen_and_other_scripts():
    script = torch.jit.trace(network().eval(), images())
    frozen = torch.jit.freeze(torch.jit.trace(network().eval(), images()))
    for model in (script, frozen):
        for call in (fold, deploy):
            assert not call(model)[1].changed
        assert verify(model, frozen, images()).relative < 1e-5
    assert not export_state(frozen).arrays
    with pytest.raises(TypeError, match="is a TracedModule with"):
        export_state(script)


@pytest.mark.parametrize("wrap", [torch.inference_mode, torch.no_grad])
def test_what_was_converted_without_gradients_can_be_trained(wrap):
    with wrap():
        model, _ = over_parameterize(network())
    output(model).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_on_the_meta_device():
    with torch.device("meta"):
        original = Network()
    model, _ = over_parameterize(original)
    assert all(p.is_meta for p in model.parameters())
    model.to_empty(device="cpu").load_state_dict(network().state_dict())
    assert torch.equal(output(model.eval()), output(network().eval()))


def test_among_parameters_that_are_no_arrays():
    model = network().eval()
    model.mask = nn.Parameter(torch.eye(3).to_sparse(), requires_grad=False)
    model.later = nn.LazyLinear(3)
    _, report = over_parameterize(model, inplace=True)
    assert len(report.changed) == 6
    expected = output(trained(model))
    _, report = fold(model, fuse_batchnorm=True, inplace=True)
    assert len(report.changed) == 11
    torch.testing.assert_close(output(model), expected)
