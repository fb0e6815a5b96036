"""Starting a BSConv from a kernel: nearest, and exact where the kernel is one."""

from __future__ import annotations

import numpy as np
import pytest
from equal import assert_close
from hypothesis import given
from hypothesis import strategies as st
from strategies import bsconv_specs, bsconv_weights

from doconv_core import (
    BSConvSpec,
    blueprints,
    compose_bsconv,
    merge_pointwise,
    orthonormality,
)

seeds = st.integers(0, 2**32 - 1)


def kernel_of(pointwise, dw, spec):
    pw = pointwise[0] if len(pointwise) == 1 else merge_pointwise(*pointwise)
    return compose_bsconv(pw, dw, spec)


def assert_found_again(spec, seed, tolerance):
    kernel = kernel_of(*bsconv_weights(spec, np.random.default_rng(seed)), spec)
    found = blueprints(kernel, spec)
    assert_close(kernel_of(found.pointwise, found.depthwise, spec), kernel, tolerance)
    assert found.explained >= 1 - 1e-12


@given(bsconv_specs(variants="u"), bsconv_specs(variants="s"), seeds)
def test_a_kernel_of_blueprints_or_subspace_blueprints_is_found_again(u, s, seed):
    assert_found_again(u, seed, 1e-12)
    assert_found_again(s, seed, 1e-10)


@given(bsconv_specs(), seeds)
def test_the_explained_variance_is_the_share_that_is_not_lost(spec, seed):
    rng = np.random.default_rng(seed)
    kernel = rng.standard_normal(spec.dense.kernel_shape)
    found = blueprints(kernel, spec)
    rest = kernel - kernel_of(found.pointwise, found.depthwise, spec)
    assert np.isclose(found.explained, 1 - (rest**2).sum() / (kernel**2).sum(), atol=1e-12)
    lengths = [np.linalg.norm(array, axis=1) for array in (found.pointwise[-1], found.depthwise)]
    np.testing.assert_allclose(*lengths, rtol=1e-9, atol=1e-9)
    if spec.variant == "s":
        assert orthonormality(found.pointwise[0]) <= 1e-12


@given(bsconv_specs(variants="u"), seeds)
def test_no_other_blueprint_explains_more(spec, seed):
    rng = np.random.default_rng(seed)
    kernel = rng.standard_normal(spec.dense.kernel_shape)
    filters = kernel.reshape(spec.out_channels, spec.in_channels, spec.taps)
    largest = np.linalg.svd(filters, compute_uv=False)[:, 0]
    best = (largest**2).sum() / (kernel**2).sum()
    assert np.isclose(blueprints(kernel, spec).explained, best, atol=1e-12)


@given(bsconv_specs(variants="s"), seeds)
def test_a_subspace_explains_no_less_than_one_found_in_one_step(spec, seed):
    """Of the best blueprints without a subspace, the weights' nearest subspace."""
    rng = np.random.default_rng(seed)
    kernel = rng.standard_normal(spec.dense.kernel_shape)
    filters = kernel.reshape(spec.out_channels, spec.in_channels, spec.taps)
    images = np.linalg.svd(filters, full_matrices=False)[2][:, 0]
    weights = np.einsum("oim,om->oi", filters, images)
    kept = np.linalg.svd(weights, compute_uv=False)[: spec.mid_channels]
    found = blueprints(kernel, spec).explained
    assert found >= (kept**2).sum() / (kernel**2).sum() - 1e-12
    free = BSConvSpec(spec.in_channels, spec.out_channels, spec.kernel_size)
    assert found <= blueprints(kernel, free).explained + 1e-12


@pytest.mark.parametrize("variant", ["u", "s"])
def test_a_filter_of_zeros_keeps_a_blueprint_that_a_gradient_can_reach(variant):
    kernel = np.random.default_rng(0).standard_normal((4, 8, 3, 3))
    kernel[1] = 0
    found = blueprints(kernel, BSConvSpec(8, 4, (3, 3), variant, 1.0))
    assert not np.abs(found.pointwise[-1][1]).max() > 1e-7
    np.testing.assert_allclose(np.linalg.norm(found.depthwise[1]), 1)
    whole = blueprints(np.zeros_like(kernel), BSConvSpec(8, 4, (3, 3), variant))
    assert whole.explained == 1
    assert all(np.isfinite(array).all() for array in (*whole.pointwise, whole.depthwise))


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_the_dtype_is_the_kernels(dtype):
    kernel = np.random.default_rng(0).standard_normal((4, 8, 3)).astype(dtype)
    found = blueprints(kernel, BSConvSpec(8, 4, (3,), "s"))
    assert {array.dtype for array in (*found.pointwise, found.depthwise)} == {np.dtype(dtype)}


def test_what_is_no_such_kernel_is_refused():
    spec = BSConvSpec(8, 4, (3, 3))
    with pytest.raises(ValueError, match=r"kernel must have shape \(4, 8, 3, 3\); received"):
        blueprints(np.ones((8, 4, 3, 3)), spec)
    with pytest.raises(ValueError, match="kernel must be finite"):
        blueprints(np.full((4, 8, 3, 3), np.nan), spec)
    with pytest.raises(TypeError, match="kernel must be an array of floats"):
        blueprints(np.ones((4, 8, 3, 3), int), spec)
    with pytest.raises(TypeError, match=r"spec must be a BSConvSpec; received ndarray\."):
        blueprints(spec, np.ones((4, 8, 3, 3)))
    with pytest.raises(TypeError, match=r"spec must be a BSConvSpec; received tuple\."):
        blueprints("kernel", (8, 4, 3, 3))
