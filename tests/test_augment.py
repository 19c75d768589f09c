"""augment.py against SciPy's rotation, and what must hold for every image, angle and key."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage, stats

from jaxseg import segmenter
from jaxseg.augment import MEAN_COLOUR, draw_angle, random_rotate, rotate

ANGLES = (7.3, -30.0, 30.0, 123.4, -170.0)
# Run plainly, under jit, and as the second of a batch.
WAYS = {
    "plain": rotate,
    "jit": jax.jit(rotate),
    "vmap": lambda *example: tuple(x[1] for x in jax.vmap(rotate)(*(jnp.stack([x, x]) for x in example))),
    "jit of vmap": lambda *example: tuple(
        x[1] for x in jax.jit(jax.vmap(rotate))(*(jnp.stack([0 * x, x]) for x in example))
    ),
}


def make_example(height=24, width=31, seed=0):
    """A random image, and a label of classes 0, 100 and 200 in blocks: a blend of two would be neither."""
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    blocks = rng.integers(0, 3, (-(-height // 4), -(-width // 4)), dtype=np.uint8) * 100
    return jnp.asarray(image), jnp.asarray(blocks.repeat(4, 0).repeat(4, 1)[:height, :width])


def near_a_tie(height, width, angle):
    """Pixels that come from so near a half-way point that float32 may round to its other side."""
    axes = np.mgrid[:height, :width].astype(np.float64)
    options = {"angle": angle, "reshape": False, "order": 1, "mode": "nearest"}
    # Rotating coordinates tells where each pixel comes from; float64 keeps what lies far outside of the image, too.
    pad = max(height, width)
    wide = [np.pad(axis, pad, "reflect", reflect_type="odd") for axis in axes]
    inner = np.s_[pad : pad + height, pad : pad + width]
    return np.any([np.abs(ndimage.rotate(axis, **options)[inner] % 1 - 0.5) < 1e-3 for axis in wide], axis=0)


@functools.cache
def expected(height, width, angle):
    """SciPy's image (float64), its label, and where the label is certain."""
    image, label = (np.asarray(x) for x in make_example(height, width))
    smooth = ndimage.rotate(image.astype(np.float64), angle, reshape=False, order=1, mode="nearest")
    moved = ndimage.rotate(label, angle, reshape=False, order=0, mode="grid-constant", cval=255)
    return smooth, moved, ~near_a_tie(height, width, angle)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("size", [(24, 31), (17, 16)], ids=str)
def test_rotation_equals_scipys(size, way):
    for angle in ANGLES:
        image, label = (np.asarray(x) for x in WAYS[way](*make_example(*size), jnp.float32(angle)))
        smooth, moved, certain = expected(*size, angle)
        assert image.dtype == label.dtype == np.uint8
        assert certain.mean() > 0.97
        np.testing.assert_array_equal(label[certain], moved[certain])
        revealed = certain & (moved == 255)
        assert (image[revealed] == MEAN_COLOUR).all()
        shown = certain & (moved != 255)
        # Half a level by rounding, and what float32 adds.
        assert np.abs(image[shown] - smooth[shown]).max() < 0.51


@pytest.mark.parametrize(
    ("size", "way"), [((24, 31), way) for way in WAYS] + [(size, "jit") for size in ((1, 1), (1, 6), (192, 256))]
)
def test_0_degrees_change_nothing_at_all(size, way):
    image, label = make_example(*size)
    rotated, moved = WAYS[way](image, label, jnp.float32(0))
    np.testing.assert_array_equal(rotated, image)
    np.testing.assert_array_equal(moved, label)


def test_a_quarter_turn_is_numpys_for_image_and_label():
    for size in (16, 17):
        image, label = make_example(size, size)
        for turns, angle in ((1, 90.0), (-1, -90.0), (2, 180.0)):
            rotated, moved = WAYS["jit"](image, label, angle)
            np.testing.assert_array_equal(rotated, np.rot90(image, turns))
            np.testing.assert_array_equal(moved, np.rot90(label, turns))


def test_labels_are_never_blended_and_their_type_stays():
    image, label = make_example()
    for dtype, offset in ((jnp.uint8, 0), (jnp.int32, 1000)):
        for seed in range(5):
            moved = random_rotate(jax.random.key(seed), image, label.astype(dtype) + offset, 180.0)[1]
            assert moved.dtype == dtype
            assert set(np.unique(moved)) <= {offset, 100 + offset, 200 + offset, 255}
    assert set(np.unique(rotate(image, label, 45.0, ignore_label=77)[1])) == {0, 77, 100, 200}


def test_image_and_label_are_revealed_together():
    image, label = jnp.full((24, 31, 3), 7, jnp.uint8), jnp.zeros((24, 31), jnp.uint8)
    for seed in range(5):
        rotated, moved = random_rotate(jax.random.key(seed), image, label, 30.0)
        revealed = np.asarray(moved) == 255
        assert 0 < revealed.mean() < 0.5
        np.testing.assert_array_equal(rotated, np.where(revealed[..., None], MEAN_COLOUR, 7))


def test_the_revealed_colour_is_the_mean():
    np.testing.assert_array_equal(MEAN_COLOUR, np.rint(255 * np.array(segmenter.MEAN)))
    assert np.abs(segmenter.normalise(jnp.array(MEAN_COLOUR, jnp.uint8))).max() < 0.5 / 255 / min(segmenter.STD)


def test_angles_are_uniform_in_both_directions():
    draw = jax.jit(jax.vmap(lambda key: draw_angle(key, 30.0)))
    angles = np.asarray(draw(jax.random.split(jax.random.key(0), 4000)))
    assert np.abs(angles).max() <= 30
    assert stats.kstest(angles, stats.uniform(-30, 60).cdf).pvalue > 0.01


def test_each_image_turns_as_its_own_key_says():
    keys = jax.random.split(jax.random.key(3), 4)
    image, label = make_example()
    images, labels = jnp.stack([image] * 4), jnp.stack([label] * 4)
    batch = jax.jit(jax.vmap(functools.partial(random_rotate, max_degrees=30.0)))
    rotated, moved = batch(keys, images, labels)
    for index, key in enumerate(keys):
        alone = rotate(image, label, draw_angle(key, 30.0))
        # The compiled cosine may differ in its last bit: by a level, in a few pixels.
        assert np.abs(np.asarray(rotated[index], int) - np.asarray(alone[0], int)).max() <= 1
        assert (np.asarray(moved[index]) != alone[1]).mean() < 0.01
        others = [other for other in range(4) if other != index]
        assert all((rotated[other] != rotated[index]).any() for other in others)
    order = jnp.array([2, 0, 3, 1])
    again, moved_again = batch(keys[order], images, labels)
    np.testing.assert_array_equal(again, rotated[order])
    np.testing.assert_array_equal(moved_again, moved[order])


def test_0_degrees_at_most_change_nothing_at_all():
    image, label = make_example()
    for seed in range(3):
        rotated, moved = random_rotate(jax.random.key(seed), image, label, 0.0)
        np.testing.assert_array_equal(rotated, image)
        np.testing.assert_array_equal(moved, label)


@pytest.mark.parametrize("max_degrees", [-1.0, 181.0, float("nan")])
def test_impossible_angles_are_refused(max_degrees):
    with pytest.raises(ValueError, match="from 0 to 180, not"):
        random_rotate(jax.random.key(0), *make_example(), max_degrees)
