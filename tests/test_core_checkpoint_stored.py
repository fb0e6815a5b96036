"""Values as files store them: bfloat16, which NumPy does not know, is composed in blocks."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from checkpoint_files import numbers, refused
from safetensors.numpy import load_file, save_file

from doconv_core import ConvSpec
from doconv_core.files.checkpoint import fold_checkpoint, open_checkpoint
from doconv_core.files.entries import (
    BITS,
    BLOCK,
    CheckpointError,
    all_finite,
    compose_blocks,
    from_storage,
    to_storage,
)
from doconv_core.files.reference import compose_upstream

SPECS = {
    "plain": ConvSpec(40, 70, (3, 3)),
    "grouped": ConvSpec(6, 8, (3, 3), 2),
    "depthwise": ConvSpec(512, 512, (3, 3), 512),
    "multiplied": ConvSpec(4, 6, (3, 3), 2, 20),
    "many blocks": ConvSpec(96, 400, (3, 3)),
}
TYPES = ("bfloat16", "float16", "float32", "float64")


def stored(shape, dtype, seed):
    return to_storage(numbers(*shape, seed=seed, dtype=np.float64), dtype)


def bits(array):
    return array.view("<u2") if array.dtype == BITS else array


@pytest.mark.parametrize("of_d", TYPES)
@pytest.mark.parametrize("of_w", TYPES)
@pytest.mark.parametrize("case", SPECS)
def test_blocks_give_what_whole_arrays_give_to_the_last_bit(case, of_w, of_d):
    spec = SPECS[case]
    weight, depthwise = stored(spec.weight_shape, of_w, 1), stored(spec.depthwise_shape, of_d, 2)
    assert weight.size > BLOCK or case != "many blocks"
    expected = compose_blocks(from_storage(weight), from_storage(depthwise))
    found = compose_blocks(weight, depthwise)
    assert found.dtype == (np.float32 if of_w == "bfloat16" else of_w)
    np.testing.assert_array_equal(found, expected)
    found = compose_blocks(weight, depthwise, as_stored=True)
    assert found.dtype == weight.dtype
    np.testing.assert_array_equal(bits(found), bits(to_storage(expected, of_w)))


@pytest.mark.parametrize("framework", ["PyTorch", "TensorFlow", "Gluon"])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("factor", [1.0, 0.5])
def test_so_does_the_reference_s_arithmetic(framework, groups, factor):
    weight = stored((8, 4 // groups, 9), "bfloat16", 1)
    depthwise = stored((4, 9, 9) if framework == "PyTorch" else (9, 9, 4), "bfloat16", 2)
    identity = None
    if framework == "PyTorch":
        identity = to_storage(factor * np.tile(np.eye(9), (4, 1, 1)), "bfloat16")
    given = [None if a is None else from_storage(a) for a in (weight, depthwise, identity)]
    expected = compose_upstream(framework, *given)
    np.testing.assert_array_equal(
        compose_upstream(framework, weight, depthwise, identity), expected
    )
    found = compose_upstream(framework, weight, depthwise, identity, as_stored=True)
    np.testing.assert_array_equal(bits(found), bits(to_storage(expected, "bfloat16")))


def test_a_kernel_lies_in_memory_as_its_weight_does():
    weight = np.moveaxis(np.zeros((9, 5, 7), BITS), (-1, -2), (0, 1))  # as Keras keeps it
    kernel = compose_blocks(weight, np.zeros((5, 9, 9), BITS), as_stored=True)
    assert kernel.strides == weight.strides


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
def test_a_number_that_is_not_finite_is_found_anywhere(dtype, value):
    array = stored((3, 2, BLOCK // 4), dtype, 0)
    assert all_finite(array)
    assert all_finite(array[:0])
    assert all_finite(to_storage(np.array([6e4]), dtype))
    for place in ((0, 0, 0), (1, 1, 17), (2, 1, -1)):
        changed = array.copy()
        changed[place] = to_storage(np.array([value]), dtype)[0]
        assert not all_finite(changed)
        assert not all_finite(np.moveaxis(changed, 0, -1))
        assert all_finite(changed[..., 1:-1][:, :1])


def bfloat16_file(path, weight):
    arrays = {"a.weight": weight, "a.depthwise_weight": np.zeros((1, 4, 4))}
    save_file({name: a.astype(ml_dtypes.bfloat16) for name, a in arrays.items()}, path)


@pytest.mark.parametrize("value", [np.inf, np.nan])
def test_bfloat16_that_is_not_finite_is_refused(tmp_path, value):
    bfloat16_file(tmp_path / "a", np.full((1, 1, 2, 2), value))
    refused(tmp_path / "a", "layer 'a': the folded kernel is not finite")


def test_a_kernel_that_only_rounding_makes_infinite_is_refused(tmp_path):
    """The largest bfloat16 and most of a last place: float32 holds that, bfloat16 does not."""
    largest = float(ml_dtypes.finfo(ml_dtypes.bfloat16).max)
    weight, depthwise = np.full((1, 1, 2, 2), largest), np.zeros((1, 4, 4))
    depthwise[0, 0, 0] = 2.0**-8
    arrays = {"a.weight": weight, "a.depthwise_weight": depthwise}
    save_file({n: a.astype(ml_dtypes.bfloat16) for n, a in arrays.items()}, tmp_path / "a")
    with open_checkpoint(tmp_path / "a") as checkpoint:
        assert np.isfinite(checkpoint.kernel(checkpoint.layers[0])).all()
    refused(tmp_path / "a", "layer 'a': the folded kernel is not finite")


def test_nan_elsewhere_is_kept_bit_for_bit(tmp_path):
    bfloat16_file(tmp_path / "a", np.ones((1, 1, 2, 2)))
    odd = np.array([0x7F81, 0xFFC1, 0x7F80, 0x8000], np.uint16).view(ml_dtypes.bfloat16)
    save_file({**load_file(tmp_path / "a"), "b": odd}, tmp_path / "a")
    fold_checkpoint(tmp_path / "a", tmp_path / "out")
    found = load_file(tmp_path / "out")
    np.testing.assert_array_equal(found["b"].view(np.uint16), odd.view(np.uint16))
    assert found["a.weight"].dtype == ml_dtypes.bfloat16


def test_a_format_need_not_know_how_values_are_stored(tmp_path, monkeypatch):
    """`read` is enough; what it gives for bfloat16 is rounded back."""
    from doconv_core.files.checkpoint import Checkpoint
    from doconv_core.files.safetensors import SafetensorsCheckpoint

    bfloat16_file(tmp_path / "a", np.full((1, 1, 2, 2), 1.5))
    with open_checkpoint(tmp_path / "a") as checkpoint:
        own = checkpoint.read_stored("a.weight")
        read = checkpoint.read("a.weight")
        monkeypatch.setattr(SafetensorsCheckpoint, "read", lambda self, name: read)
        found = Checkpoint.read_stored(checkpoint, "a.weight")
    assert own.dtype == found.dtype == BITS
    np.testing.assert_array_equal(bits(own), bits(found))
    assert read.dtype == np.float32


def test_reading_what_was_cut_since_it_was_opened(tmp_path):
    bfloat16_file(tmp_path / "a", np.ones((1, 1, 2, 2)))
    with open_checkpoint(tmp_path / "a") as checkpoint:
        (tmp_path / "a").write_bytes((tmp_path / "a").read_bytes()[:-4])
        with pytest.raises(CheckpointError, match="was truncated while it was read"):
            [checkpoint.read_stored(name) for name in checkpoint.entries]
