"""Enlarged logits are PyTorch's, and a value is the same in whatever block it is computed."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxseg.enlarge import enlarge


@functools.partial(jax.jit, static_argnames=("block", "mirrored"))
def run(logits, size, own_size, first, block, mirrored=False):
    return enlarge(logits, jnp.array(size), jnp.array(own_size), jnp.array(first), block, mirrored)


def random(*shape):
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("own_size", [(1, 1), (7, 12), (14, 24), (50, 31), (6, 70)])
def test_it_equals_pytorchs_interpolation(own_size):
    torch = pytest.importorskip("torch", reason="needs torch==2.13.0 (CPU build)")
    logits = random(7, 12, 3)
    expected = torch.nn.functional.interpolate(
        torch.tensor(logits).permute(2, 0, 1)[None], own_size, mode="bilinear", align_corners=False
    )[0].permute(1, 2, 0)
    # PyTorch computes the places in float32. In the corner of more, and of a block larger than the result.
    logits = np.pad(logits, ((0, 3), (0, 2), (0, 0)), constant_values=np.nan)
    enlarged = np.asarray(run(logits, (7, 12), own_size, (0, 0), (80, 80)))
    np.testing.assert_allclose(enlarged[: own_size[0], : own_size[1]], expected, atol=1e-5)
    mirrored = np.asarray(run(logits[:, 11::-1], (7, 12), own_size, (0, 0), (80, 80), True))
    np.testing.assert_allclose(mirrored[: own_size[0], : own_size[1]], expected, atol=1e-5)


def test_the_same_size_changes_no_bit():
    logits = random(9, 13, 4)
    assert np.array_equal(run(logits, (9, 13), (9, 13), (0, 0), (9, 13)), logits)


def test_blocks_of_any_shape_hold_the_same_bits():
    logits, own_size = random(11, 15, 5), (203, 171)
    whole = np.asarray(run(logits, (11, 15), own_size, (0, 0), own_size))
    for height, width in [(64, 64), (17, 171), (203, 1)]:
        for top, left in [(0, 0), (100, 33), (190, 170)]:
            block = np.asarray(run(logits, (11, 15), own_size, (top, left), (height, width)))
            there = whole[top : top + height, left : left + width]
            assert np.array_equal(block[: there.shape[0], : there.shape[1]], there)


def test_places_are_exact_where_float32_would_round():
    # Row 20001 of 30000, enlarged from 10000: (20001.5 / 3) - 0.5 lies at 6666.666..., to float32's last bit but one.
    logits = np.zeros((10000, 1, 1), np.float32)
    logits[6667] = 1
    value = run(logits, (10000, 1), (30000, 1), (20001, 0), (1, 1))
    assert float(value[0, 0, 0]) == np.float32(40000 / 60000)
