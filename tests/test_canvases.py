"""Canvases: what must hold for all sizes, and that a segmenter does not see what is beyond an image."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from jaxseg import segmenter
from jaxseg.data import canvases


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


class Encoder(nn.Module):
    """Two convolutions with biases, of which the second one sees beyond its own pixel."""

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.relu(nn.Conv(4, (32, 32), 32, bias_init=nn.initializers.normal(0.5))(x))
        return {segmenter.STRIDE: nn.Conv(3, (3, 3), padding=1)(x)}


class Decoder(nn.Module):
    """Enlarges."""

    def __call__(self, x, train=False, keys=None):
        return x.repeat(32, 1).repeat(32, 2)


def test_a_segmenter_sees_nothing_beyond_an_images_size():
    assert canvases.STRIDE == segmenter.STRIDE
    model = segmenter.Segmenter(Encoder(), Decoder())
    rng, sizes = np.random.default_rng(0), ((33, 70), (64, 96))
    images = [rng.integers(0, 256, (*size, 3), np.uint8) for size in sizes]
    variables = model.init(jax.random.key(0), jnp.zeros((1, 32, 32, 3), jnp.uint8))
    apply = jax.jit(model.apply)

    def on_canvas(shape):
        canvas = rng.integers(0, 256, (len(sizes), *shape, 3), np.uint8)
        for place, image in zip(canvas, images, strict=True):
            place[: image.shape[0], : image.shape[1]] = image
        logits = apply(variables, canvas, size=np.array(sizes, np.int32))
        return [one[:height, :width] for one, (height, width) in zip(logits, sizes, strict=True)]

    for image, own, larger in zip(images, on_canvas((64, 96)), on_canvas((96, 128)), strict=True):
        alone = apply(variables, image[None])[0]
        np.testing.assert_allclose(own, alone, atol=1e-5)
        # On a larger canvas only what is near its edges differs.
        assert np.abs(larger - alone)[32:].max() > 1e-3
        np.testing.assert_allclose(larger[:32, :32], alone[:32, :32], atol=1e-5)
