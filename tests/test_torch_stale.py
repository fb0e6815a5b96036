"""PyTorch: no kernel that was composed once is used when it is no longer the layer's."""

from __future__ import annotations

import asyncio
import threading

import pytest
from frameworks import need

need("torch")

import torch  # noqa: E402
from torch import nn  # noqa: E402
from torch_models import batch, compositions, layer  # noqa: E402

import doconv_torch.kernel_cache as blocks  # noqa: E402
from doconv_torch import composed_once, fold  # noqa: E402
from doconv_torch.compose import compose  # noqa: E402


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.SGD(p, 0.1),
        lambda p: torch.optim.SGD(p, 0.1, foreach=True),
        lambda p: torch.optim.SGD(p, 0.1, fused=True),
        lambda p: torch.optim.Adam(p, 0.1, foreach=True),
        lambda p: torch.optim.AdamW(p, 0.1, fused=True),
    ],
)
def test_a_step_in_the_block_is_noticed(make):
    model = layer()
    optimizer = make(model.parameters())
    with composed_once(model):
        for _ in range(3):
            optimizer.zero_grad()
            y = model(batch())
            assert torch.equal(model.composed_kernel(), now(model))
            y.square().sum().backward()
            optimizer.step()
        with composed_once(model):
            optimizer.step()
        assert torch.equal(model.composed_kernel(), now(model))
        assert torch.equal(model(batch()), model.fold()(batch()))


def now(model):
    return compose(model.weight, model.depthwise_weight, model.spec)


@pytest.mark.parametrize("inplace", [False, True])
def test_folding_in_the_block_uses_no_kernel_of_it(inplace):
    model = layer()
    with composed_once(model):
        model(batch())
        model.weight.data.mul_(2)  # which PyTorch does not count
        expected = now(model)
        assert not torch.equal(model.composed_kernel(), expected)
        assert torch.equal(model.fold().weight, expected)
        assert torch.equal(fold(model, inplace=inplace)[0].weight, expected)


def change_weight(model):
    with torch.no_grad():
        model.weight.mul_(2)


def change_depthwise(model):
    with torch.no_grad():
        model.depthwise_weight.add_(1)


def replace_weight(model):
    model.weight = nn.Parameter(model.weight.detach() + 1)


def assign_data(model):
    model.depthwise_weight.data = model.depthwise_weight.data + 1


def load(model):
    model.load_state_dict({name: 2 * value for name, value in model.state_dict().items()})


def load_by_assignment(model):
    state = {name: 2 * value for name, value in model.state_dict().items()}
    model.load_state_dict(state, assign=True)


def spoil(model):
    model.composed_kernel().detach().mul_(3)


def to_half_precision_and_back(model):
    model.bfloat16().double()


def to_channels_last(model):
    model.to(memory_format=torch.channels_last)


def freeze(model):
    model.requires_grad_(False)


def thaw(model):
    model.requires_grad_(False)
    model(batch())
    model.requires_grad_(True)


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize(
    "change",
    [
        change_weight, change_depthwise, replace_weight, assign_data, load, load_by_assignment,
        spoil, to_half_precision_and_back, to_channels_last, freeze, thaw,
    ],
)  # fmt: skip
def test_no_kernel_is_stale(change, train):
    model, x = layer(), batch().requires_grad_(train)
    with composed_once(model), torch.set_grad_enabled(train):
        model(x)
        change(model)
        found = model(x)
        assert model(x).stride() == found.stride()
    expected = model(x)
    assert torch.equal(found, expected)
    assert found.requires_grad == train
    if train:
        results = [
            torch.autograd.grad(y.sum(), [x, model.weight], allow_unused=True)
            if model.weight.requires_grad
            else torch.autograd.grad(y.sum(), [x])
            for y in (found, expected)
        ]
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b)


def test_nothing_is_kept_after_the_block():
    model = layer()
    with composed_once(model):
        model(batch())
    with compositions() as calls:
        model(batch())
        model(batch())
    assert len(calls) == 2
    assert not blocks._blocks.get()
    with pytest.raises(RuntimeError, match="expected input"), composed_once(model):
        model(batch()[:, :3])
    assert not blocks._blocks.get()


def test_a_backward_after_a_step_is_refused_as_pytorch_does():
    model = layer()
    with composed_once(model):
        y = model(batch())
        change_weight(model)
    with pytest.raises(RuntimeError, match=r"W or D of a DO layer was modified in place .* call"):
        y.sum().backward()


def test_modes_do_not_mix():
    model, x = layer(), batch()
    with composed_once(model):
        with torch.inference_mode():
            expected = model(x).clone()
        with torch.no_grad():
            assert not model(x).requires_grad
            assert not model.composed_kernel().requires_grad
        y = model(x)
        assert y.requires_grad
        y.sum().backward()
        with compositions() as calls, torch.no_grad():
            assert not model.composed_kernel().requires_grad
            assert torch.equal(model(x), expected)
        assert not calls
        with torch.inference_mode():
            assert torch.equal(model(x), expected)
        model(x).sum().backward()
    assert torch.equal(y, expected)


def test_nested_and_overlapping_blocks():
    model = nn.Sequential(layer(), layer())

    def generator(part):
        with composed_once(part):
            while True:
                yield part(batch())

    with compositions() as calls, composed_once(model):
        model(batch())
        with composed_once(model[0]):
            model(batch())
        model(batch())
    assert len(calls) == 2
    first, second = generator(model), generator(model[1])
    expected = [next(first), next(second)]
    first.close()  # not the last that was opened
    with compositions() as calls:
        assert torch.equal(next(second), expected[1])
        assert torch.equal(next(second), expected[1])
        assert len(calls) == 1
        model[0](batch())
        model[0](batch())
        assert len(calls) == 3
    second.close()
    assert not blocks._blocks.get()


def test_other_threads_and_tasks_have_no_part_in_it():
    model, found = layer(), []

    def work():
        for _ in range(2):
            found.append(model(batch()))

    with composed_once(model), compositions() as calls:
        expected = model(batch())
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    assert len(calls) == 3
    assert all(torch.equal(y, expected) for y in found)

    async def main():
        with composed_once(model):
            task = asyncio.create_task(late())
        await task

    async def late():
        assert not any(model in block.layers for block in blocks._blocks.get())

    asyncio.run(main())


def test_layers_that_come_later_and_foreign_layers_compose_as_usual():
    model, foreign = nn.Sequential(layer()), layer()
    with compositions() as calls, composed_once(model):
        model.append(layer())
        for _ in range(2):
            model(batch())
            foreign(batch())
    assert len(calls) == 1 + 2 + 2


def test_a_model_folded_in_the_block():
    model = nn.Sequential(layer()).eval()
    with composed_once(model):
        expected = model(batch())
        fold(model, inplace=True)
        assert torch.equal(model(batch()), expected)
