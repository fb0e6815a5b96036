"""Training in PyTorch: several processes, precisions, compiled models, roles of parameters."""

from __future__ import annotations

import functools

import numpy as np
import pytest
from contract_train import NETWORK, NETWORKS, bits, model_of, recipe, smooth, trained
from equal import assert_close, assert_same
from frameworks import fresh, need

need("torch")

import torch  # noqa: E402
from torch import nn  # noqa: E402
from torch_processes import CASES, stepped  # noqa: E402

import doconv_torch  # noqa: E402
from doconv_core import read_state  # noqa: E402
from doconv_core.training.run import open_run  # noqa: E402
from doconv_torch import DGConv2d, DOConv2d, export_state  # noqa: E402
from doconv_torch.train import TorchEngine, device_of, roles  # noqa: E402


def torchrun(*arguments, status=0):
    """Run the program in two processes that torchrun begins, at a port that is free."""
    fresh(
        "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2,
        "tests/torch_processes.py", *arguments, environment={"OMP_NUM_THREADS": "1"}, status=status,
    )  # fmt: skip


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    """The folder of what two processes have come to, which are killed in their last run."""
    folder = tmp_path_factory.mktemp("processes")
    torchrun(folder, status=1)
    return folder


@pytest.mark.parametrize("sharded", [False, True], ids=["DDP", "FSDP2"])
@pytest.mark.parametrize("name", CASES)
def test_two_processes_take_the_steps_of_one(together, name, sharded):
    """With the losses of kinds, gradients that are clipped, parts of batches, and uneven ones."""
    arrays, sums = stepped(name)
    losses = {f"loss{n}": np.array([*each]) for n, each in enumerate(sums)}
    with np.load(together / f"{name}-{sharded}.npz") as found:
        assert_close(dict(found), {**arrays, **losses})


@pytest.mark.parametrize("sharded", [False, True])
def test_a_run_of_two_processes(together, sharded):
    """Its files are those of one process, and one process can go on with it."""
    run = open_run(together / f"run-{sharded}")
    assert run.described["processes"] == 2
    assert len(run.metrics()) == 2
    assert run.last.name == "epoch-0002"
    folded = read_state(run.folder / "folded.safetensors")
    given = read_state(together / f"folded-{sharded}.safetensors")
    assert_same(dict(given.arrays), dict(folded.arrays))
    engine = TorchEngine(model_of(doconv_torch, NETWORKS["lasso"]), recipe(average=0.5))
    engine.load(run.last)
    assert_same(
        dict(engine.export_state().arrays),
        dict(read_state(run.last / "state.safetensors").arrays),
    )


@pytest.mark.exhaustive
def test_a_run_of_two_processes_that_were_killed_goes_on_to_the_same_bits(together):
    """Each of which has a part of each weight, and of the optimizer."""
    folder = together / "killed"
    assert open_run(folder).last.name == "epoch-0001"  # of four steps; the fifth is lost
    torchrun(together, "resume")
    assert bits(folder) == bits(together / "run-True")


def test_sharded_without_processes_is_refused(tmp_path):
    with pytest.raises(ValueError, match="and there are none; begin with torchrun --nproc-per-no"):
        trained(doconv_torch, tmp_path / "run", sharded=True)
    assert not (tmp_path / "run").exists()


def test_bfloat16_trains_weights_of_float32(tmp_path):
    made = trained(doconv_torch, None, precision="bfloat16", recipe=recipe(epochs=6))
    assert {p.dtype for p in made.model.parameters()} == {torch.float32}
    assert made.metrics[-1]["train_loss"] < made.metrics[0]["train_loss"]
    assert made.verified.relative < 1e-5  # in float32


def test_float16_is_refused_on_the_cpu():
    with pytest.raises(ValueError, match="on the CPU nothing is trained in float16; use bfloat16"):
        trained(doconv_torch, None, precision="float16")


@pytest.mark.parametrize("options", [{"compile": True}, {"channels_last": True}], ids=str)
def test_other_ways_to_compute_come_to_the_same(options, monkeypatch):
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    network, made = smooth(NETWORK), recipe(average=None)
    found, expected = (
        doconv_torch.train(model_of(doconv_torch, network), made, quiet=True, **given)
        for given in (options, {})
    )
    for a, b in zip(found.model.parameters(), expected.model.parameters(), strict=True):
        assert_close(a, b, tolerance=1e-4)  # eight steps of float32


def test_an_average_of_a_kernel_that_cannot_be_set_is_refused():
    model = model_of(doconv_torch)
    nn.utils.parametrizations.weight_norm(model.get_submodule("conv1"))
    with pytest.raises(ValueError, match=r"that of 'conv1' is parametrized; remove the param"):
        doconv_torch.train(model, recipe(average=0.5, average_of="kernels"), quiet=True)


def test_roles_of_parameters():
    shared = nn.Linear(2, 2)
    shared.weight.requires_grad_(False)
    model = nn.Sequential(
        DOConv2d(1, 8, 3), nn.BatchNorm2d(8), DGConv2d(8, 8, 1, heads=2, squeeze_rate=4),
        nn.GroupNorm(2, 8), nn.LayerNorm(3), shared, shared,
    )  # fmt: skip
    names = {parameter: name for name, parameter in model.named_parameters()}
    found = {names[parameter]: role for parameter, role in roles(model)}
    assert found == {
        "0.weight": None, "0.bias": "biases", "0.depthwise_weight": "depthwise",
        "1.weight": "norms", "1.bias": "norms", "2.norm.weight": "norms", "2.norm.bias": "norms",
        "2.heads.weight": None, "2.heads.squeeze_weight": None, "2.heads.saliency_weight": None,
        "2.heads.saliency_bias": "biases", "3.weight": "norms", "3.bias": "norms",
        "4.weight": "norms", "4.bias": "norms", "5.bias": "biases",
    }  # fmt: skip


def test_devices():
    assert device_of("cpu") == device_of(1 if not torch.cuda.is_available() else "cpu")
    with pytest.raises(ValueError, match=r"begin with torchrun --nproc-per-node 3 -m doconv_core"):
        device_of("3")


def test_models_that_are_wrapped_are_refused():
    wrapped = nn.Module.__new__(nn.parallel.DistributedDataParallel)
    nn.Module.__init__(wrapped)
    with pytest.raises(TypeError, match="would not know of parameters"):
        doconv_torch.train(wrapped, recipe())


def test_a_run_has_the_network_s_name_and_cost(tmp_path):
    made = recipe(epochs=1, train_images=("resize 28 28",), eval_images=("resize 28 28",))
    model = doconv_torch.get_model("tutorial_pt_doconv")
    doconv_torch.train(model, made, run=tmp_path / "run", quiet=True)
    run = open_run(tmp_path / "run")
    assert run.described["network"] == "tutorial_pt_doconv"
    assert run.result["cost"]["training_parameters"] == 6603
    assert run.result["cost"]["input"] == [1, 28, 28]
    state = read_state(run.folder / "folded.safetensors")
    assert export_state(model).origin == state.origin
