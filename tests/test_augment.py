"""augment.py against SciPy's rotation and torchvision's jitter, and what must hold for every image, angle and key."""

import functools
import itertools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage, stats

from jaxseg import augment, segmenter
from jaxseg.augment import MEAN_COLOUR, draw_angle, jitter, random_flip, random_jitter, random_rotate, rotate

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
    for rotated in (rotate(image, label, 45.0, 77), random_rotate(jax.random.key(0), image, label, 180.0, 77)):
        assert set(np.unique(rotated[1])) == {0, 77, 100, 200}


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


def test_a_flip_is_numpys_for_image_and_label_in_half_of_the_draws():
    image, label = make_example()
    keys = jax.random.split(jax.random.key(5), 200)
    images, labels = jnp.stack([image] * 200), jnp.stack([label] * 200)
    flipped, moved = jax.jit(jax.vmap(random_flip))(keys, images, labels)
    turned = np.array([(one != label).any() for one in moved])
    assert 70 < turned.sum() < 130
    for turn, one, its_label in zip(turned, flipped, moved, strict=True):
        np.testing.assert_array_equal(one, np.fliplr(image) if turn else image)
        np.testing.assert_array_equal(its_label, np.fliplr(label) if turn else label)
    for index in (0, int(turned.argmax())):
        alone = random_flip(keys[index], image, label)
        np.testing.assert_array_equal(alone[0], flipped[index])
        np.testing.assert_array_equal(alone[1], moved[index])


@pytest.mark.parametrize("way", ["plain", "jit", "vmap"])
def test_jitter_equals_torchvisions(way):
    """Its numbers: tests/peers/torchvision_jitter.py."""
    there = np.load(pathlib.Path(__file__).parent / "fixtures" / "jitter_torchvision.npz")
    image, cases = jnp.asarray(there["image"]), [jnp.asarray(there[name]) for name in ("factors", "orders")]
    if way == "vmap":
        found = jax.jit(jax.vmap(jitter, (None, 0, 0)))(image, *cases)
    else:
        run = jax.jit(jitter) if way == "jit" else jitter
        found = [run(image, *case) for case in zip(*cases, strict=True)][: 2 if way == "plain" else None]
    for changed, expected in zip(found, there["results"], strict=way != "plain"):
        assert changed.dtype == jnp.uint8
        # Half a level by rounding, and what float32 adds.
        assert np.abs(changed - expected).max() < 0.51


def test_the_jitter_is_drawn_evenly_up_to_its_strength_and_so_is_its_order(monkeypatch):
    monkeypatch.setattr(augment, "jitter", lambda image, factors, order: (factors, order))
    keys = jax.random.split(jax.random.key(1), 2000)
    strength = (0.4, 2.0, 0.0, 0.25)
    factors, orders = jax.jit(jax.vmap(lambda key: random_jitter(key, None, strength)))(keys)
    for drawn, low, high in zip(factors.T, (0.6, 0, 1, -0.25), (1.4, 3, 1, 0.25), strict=True):
        assert (low <= drawn).all() and (drawn <= high).all()
        assert low == high or stats.kstest(drawn, stats.uniform(low, high - low).cdf).pvalue > 0.01
    # What is drawn for one is not drawn for another.
    assert np.abs(np.corrcoef(factors[:, jnp.array([0, 1, 3])].T) - np.eye(3)).max() < 0.1
    kinds, counts = np.unique(orders, axis=0, return_counts=True)
    assert sorted(map(tuple, kinds.tolist())) == list(itertools.permutations(range(4)))
    assert stats.chisquare(counts).pvalue > 0.01


def test_no_jitter_changes_nothing_at_all():
    image, _ = make_example()
    changed = jax.jit(functools.partial(random_jitter, strength=(0, 0, 0, 0)))(jax.random.key(0), image)
    np.testing.assert_array_equal(changed, image)


@pytest.mark.parametrize(
    "strength", [(-0.1, 0, 0, 0), (0, 0, 0, 0.6), (0, 0, float("nan"), 0), (float("inf"), 0, 0, 0), (1, 1, 1)]
)
def test_an_impossible_jitter_is_refused(strength):
    with pytest.raises(ValueError, match="four numbers from 0 up"):
        random_jitter(jax.random.key(0), make_example()[0], strength)


def test_the_hue_may_turn_half_way_round():
    image, _ = make_example()
    assert random_jitter(jax.random.key(0), image, (0, 0, 0, 0.5)).shape == image.shape
