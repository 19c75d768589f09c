"""Canvases: what must hold for all sizes, and that a segmenter does not see what is beyond an image."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxseg import resnet, segmenter
from jaxseg.data import canvases
from jaxseg.decoders import ImprovedDecoder


def distinct(sizes) -> set:
    return {tuple(size) for size in np.asarray(sizes).tolist()}


@pytest.mark.parametrize("seed", range(8))
def test_every_canvas_holds_its_image_and_there_are_no_more_than_allowed(seed):
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, 2 ** rng.integers(5, 10), (rng.integers(1, 60), 2))
    rounded = np.ceil(sizes / canvases.STRIDE).astype(int) * canvases.STRIDE
    for most in (1, 2, 5, 16, 1000):
        chosen = canvases.choose_canvases(sizes, most)
        assert (chosen % canvases.STRIDE == 0).all() and (chosen >= rounded).all()
        assert len(distinct(chosen)) <= most
        if len(distinct(rounded)) <= most:
            np.testing.assert_array_equal(chosen, rounded)
        # Of equal sizes are equal canvases, in whatever order the images come.
        order = rng.permutation(len(sizes))
        np.testing.assert_array_equal(canvases.choose_canvases(sizes[order], most), chosen[order])
    assert distinct(canvases.choose_canvases(sizes, 1)) == {tuple(rounded.max(0))}


def test_one_canvas_too_many_is_joined_where_it_costs_least():
    rng = np.random.default_rng(0)
    for _ in range(20):
        kinds = np.unique(rng.integers(1, 8, (6, 2)) * 32, axis=0)
        sizes = np.repeat(kinds, rng.integers(1, 9, len(kinds)), axis=0)
        costs = []
        for one, other in itertools.combinations(kinds, 2):
            either = (sizes == one).all(1) | (sizes == other).all(1)
            costs.append(np.where(either[:, None], np.maximum(one, other), sizes).prod(1).sum())
        assert canvases.choose_canvases(sizes, len(kinds) - 1).prod(1).sum() == min(costs)


def test_a_single_large_photograph_enlarges_no_canvas_of_many():
    sizes = [(32 * k, 32) for k in range(1, 18) for _ in range(5)] + [(3000, 4000)]
    chosen = canvases.choose_canvases(np.array(sizes))
    assert chosen[-1].tolist() == [3008, 4000] and chosen[:-1].max() == 17 * 32


def test_thousands_of_different_sizes_take_a_moment():
    sizes = np.random.default_rng(0).integers(1, 3000, (3000, 2))
    chosen = canvases.choose_canvases(sizes)
    assert len(distinct(chosen)) == canvases.MOST
    assert (chosen % canvases.STRIDE == 0).all() and (chosen >= sizes).all()


@pytest.mark.parametrize("seed", range(8))
def test_a_plan_has_every_image_once_and_one_canvas_in_a_batch(seed):
    rng = np.random.default_rng(seed)
    batch_size = int(rng.integers(1, 9))
    chosen = rng.integers(1, 4, (rng.integers(1, 40), 2)) * 32
    index, valid = canvases.plan_batches(chosen, batch_size)
    assert sorted(index[valid]) == list(range(len(chosen)))
    batches, valid = index.reshape(-1, batch_size), valid.reshape(-1, batch_size)
    shapes = [distinct(chosen[batch]) for batch in batches]
    assert all(len(shape) == 1 for shape in shapes)
    areas = [np.prod(*shape) for shape in shapes]
    assert areas == sorted(areas, reverse=True)
    for shape in distinct(chosen):
        of_shape = [k for k, one in enumerate(shapes) if one == {shape}]
        assert of_shape == list(range(of_shape[0], of_shape[-1] + 1))
        # Copies only at the end, of the last image.
        places, real = batches[of_shape].ravel(), valid[of_shape].ravel()
        images = np.flatnonzero((chosen == shape).all(1))
        assert places[real].tolist() == images.tolist() and set(places[~real]) <= {images[-1]}
        assert real.tolist() == sorted(real.tolist(), reverse=True) and (~real).sum() < batch_size


def test_a_segmenter_sees_nothing_beyond_an_images_size(monkeypatch):
    """Of a ResNet with a block in each group, and batch norm that makes all padding other than zero."""
    assert canvases.STRIDE == segmenter.STRIDE
    monkeypatch.setitem(resnet.VARIANTS, "short", (resnet.BasicBlock, (1, 1, 1, 1)))
    model = segmenter.Segmenter(resnet.ResNet("short"), ImprovedDecoder(3, widths=(8,) * 5))
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3), jnp.uint8))
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        spread = {"kernel": 0.1, "bias": 0.5, "mean": 0.5}.get(path[-1].key)
        return np.float32(rng.normal(0, spread, leaf.shape) if spread else np.ones(leaf.shape))

    variables, apply = jax.tree_util.tree_map_with_path(draw, shapes), jax.jit(model.apply)
    image = rng.integers(0, 256, (33, 70, 3), np.uint8)
    canvas = rng.integers(0, 256, (2, 96, 128, 3), np.uint8)
    canvas[0, :33, :70] = image
    alone = apply(variables, image[None])[0]
    logits = apply(variables, canvas, size=np.array([[33, 70], [96, 128]], np.int32))[0, :33, :70]
    np.testing.assert_allclose(logits, alone, atol=1e-5 * np.abs(alone).max())
