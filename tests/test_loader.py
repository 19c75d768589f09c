"""Batches: resizing against PyTorch, every image once, and an order that is a function of the seed alone."""

import itertools
import re

import numpy as np
import pytest

from jaxseg.data import loader
from jaxseg.data.canvases import MEAN_COLOUR

IMAGE_SIZE = (6, 8)


class ArraySource:
    """Images of mixed sizes in memory; image i's pixels all have the value i, its label's the value i % 7."""

    def __init__(self, length: int, seed: int = 0):
        self.sizes = np.random.default_rng(seed).integers(1, 20, (length, 2))

    def __len__(self):
        return len(self.sizes)

    def __getitem__(self, index):
        return {
            "image": np.full((*self.sizes[index], 3), index, np.uint8),
            "label": np.full(self.sizes[index], index % 7, np.uint8),
            "name": f"image {index}",
        }

    def label_sizes(self):
        return self.sizes


def sizes(count: int) -> list:
    """Pairs of (old, new) sizes: random, and some extreme ones."""
    rng = np.random.default_rng(0)
    pairs = [(tuple(pair[:2]), tuple(pair[2:])) for pair in rng.integers(1, 80, (count, 4)).tolist()]
    return [*pairs, ((1, 1), (5, 7)), ((64, 48), (1, 1)), ((360, 480), (192, 256)), ((30, 40), (60, 80))]


def triangle(old: int, new: int) -> np.ndarray:
    """(new, old): the weights of antialiased linear resizing, a triangle around each centre as wide as the step."""
    step = max(old / new, 1)
    centres = (np.arange(new) + 0.5) * old / new
    weights = np.clip(1 - np.abs(np.arange(old) + 0.5 - centres[:, None]) / step, 0, None)
    return weights / weights.sum(axis=1, keepdims=True)


@pytest.mark.parametrize(("old", "new"), sizes(20))
def test_resize_image_is_its_definition(old, new):
    image = np.random.default_rng(1).integers(0, 256, (*old, 3), np.uint8)
    expected = np.einsum("ih,jw,hwc->ijc", *map(triangle, old, new), image, optimize=True)
    resized = loader.resize_image(image, new)
    assert resized.dtype == np.uint8 and resized.shape == (*new, 3)
    np.testing.assert_allclose(resized, expected, atol=1.01)  # each of the two passes rounds by at most 1/2


# PyTorch's own result for an output one pixel wide is wrong (2.13, CPU, floating point): up to 40 grey levels.
@pytest.mark.parametrize(("old", "new"), [pair for pair in sizes(20) if pair[1][1] > 1])
def test_resize_image_is_torch_s_antialiased_bilinear(old, new):
    torch = pytest.importorskip("torch", reason="needs torch==2.13.0 (CPU build)")
    image = np.random.default_rng(1).integers(0, 256, (*old, 3), np.uint8)
    planes = torch.from_numpy(image).permute(2, 0, 1)[None].double()
    expected = torch.nn.functional.interpolate(planes, new, mode="bilinear", antialias=True)[0].permute(1, 2, 0)
    np.testing.assert_allclose(loader.resize_image(image, new), expected.numpy(), atol=1.01)


def has_nearest(old: int, new: int) -> np.ndarray:
    """(new,) bool: whether the centre is not on the edge of two pixels, where PyTorch takes either.

    It multiplies by the scale in float32; where the scale is a whole number, nothing is rounded and all must agree.
    """
    on_edge = (2 * np.arange(new) + 1) * old % (2 * new) == 0
    return ~on_edge | (old % new == 0)


@pytest.mark.parametrize(("old", "new"), sizes(40))
def test_resize_label_is_torch_s_nearest_exact(old, new):
    torch = pytest.importorskip("torch", reason="needs torch==2.13.0 (CPU build)")
    label = np.random.default_rng(1).integers(0, 256, old, np.uint8)
    expected = torch.nn.functional.interpolate(torch.from_numpy(label)[None, None], new, mode="nearest-exact")[0, 0]
    resized = loader.resize_label(label, new)
    assert resized.dtype == np.uint8 and resized.shape == new
    clear = np.ix_(*map(has_nearest, old, new))
    np.testing.assert_array_equal(resized[clear], expected.numpy()[clear])


def test_resize_label_by_hand():
    label = np.array([[0, 1, 2, 3, 4, 5]], np.uint8)
    assert loader.resize_label(label, (1, 3)).tolist() == [[1, 3, 5]]
    assert loader.resize_label(label, (2, 4)).tolist() == [[0, 2, 3, 5]] * 2
    assert loader.resize_label(label[:, :2], (1, 6)).tolist() == [[0, 0, 0, 1, 1, 1]]


def test_resizing_to_the_same_size_changes_nothing():
    item = ArraySource(1)[0]
    size = item["label"].shape
    assert loader.resize_image(item["image"], size) is item["image"]
    assert loader.resize_label(item["label"], list(size)) is item["label"]


@pytest.mark.parametrize("seed", range(8))
def test_eval_batches_show_every_image_exactly_once(seed):
    rng = np.random.default_rng(seed)
    source = ArraySource(int(rng.integers(1, 40)), seed)
    batch_size = int(rng.integers(1, 13))
    canvas = tuple(source.sizes.max(axis=0))
    batches = loader.eval_batches(source, image_size=IMAGE_SIZE, batch_size=batch_size)
    seen = []
    for batch in batches:
        assert {key: (value.shape, value.dtype) for key, value in batch.items()} == {
            "image": ((batch_size, *IMAGE_SIZE, 3), np.uint8),
            "label": ((batch_size, *canvas), np.uint8),
            "label_size": ((batch_size, 2), np.int32),
            "valid": ((batch_size,), np.bool_),
            "index": ((batch_size,), np.int32),
        }
        for k in range(batch_size):
            index, (height, width) = batch["index"][k], batch["label_size"][k]
            expected = np.full(canvas, 255)
            if batch["valid"][k]:
                seen.append(index)
                expected[:height, :width] = index % 7
            else:
                assert index == len(source) - 1
            assert (height, width) == tuple(source.sizes[index])
            assert (batch["image"][k] == index).all()
            np.testing.assert_array_equal(batch["label"][k], expected)
    assert seen == list(range(len(source)))
    assert np.concatenate([batch["index"][batch["valid"]] for batch in batches]).tolist() == seen


def epochs(source, batch_size: int, seed: int, count: int, **options) -> list[list[int]]:
    """The order in which the first `count` epochs show the images."""
    steps = loader.steps_per_epoch(source, batch_size)
    batches = iter(loader.train_batches(source, image_size=IMAGE_SIZE, batch_size=batch_size, seed=seed, **options))
    return [np.concatenate([next(batches)["index"] for _ in range(steps)]).tolist() for _ in range(count)]


@pytest.mark.parametrize("seed", range(6))
def test_every_epoch_is_a_new_permutation(seed):
    rng = np.random.default_rng(seed)
    length = int(rng.integers(12, 40))
    batch_size = int(rng.integers(1, 12))
    orders = epochs(ArraySource(length), batch_size, seed, 4)
    for order in orders:
        assert len(order) == length // batch_size * batch_size
        assert len(set(order)) == len(order) and set(order) <= set(range(length))
    assert len({tuple(order) for order in orders}) == 4
    if length % batch_size == 0:
        assert set(orders[0]) == set(range(length))


def test_the_images_left_over_change_from_epoch_to_epoch():
    orders = epochs(ArraySource(11), 4, 0, 12)
    assert set().union(*orders) == set(range(11))
    assert len({frozenset(range(11)) - set(order) for order in orders}) > 3


def test_the_order_is_a_function_of_the_seed():
    source = ArraySource(20)
    first = epochs(source, 5, 1, 3)
    assert epochs(source, 5, 1, 3) == first
    assert epochs(source, 5, 1, 3, num_threads=1) == first
    # Nor is one run's second epoch the next run's first.
    orders = [tuple(order) for seed in range(4) for order in epochs(source, 5, seed, 4)]
    assert len(set(orders)) == len(orders)


def test_train_batches_resize_and_carry_their_labels():
    batch = next(iter(loader.train_batches(ArraySource(9), image_size=IMAGE_SIZE, batch_size=4, seed=0)))
    assert {key: (value.shape, value.dtype) for key, value in batch.items()} == {
        "image": ((4, *IMAGE_SIZE, 3), np.uint8),
        "label": ((4, *IMAGE_SIZE), np.uint8),
        "index": ((4,), np.int32),
    }
    np.testing.assert_array_equal(batch["image"][:, 0, 0, 0], batch["index"])
    np.testing.assert_array_equal(batch["label"][:, -1, -1], batch["index"] % 7)


@pytest.mark.parametrize("consumed", [1, 3, 7])
def test_batches_left_out_at_the_start_change_nothing_else(consumed):
    source = ArraySource(14)  # three batches of 4 an epoch
    options = {"image_size": IMAGE_SIZE, "batch_size": 4, "seed": 3}
    expected = list(itertools.islice(loader.train_batches(source, **options), consumed + 6))[consumed:]
    resumed = itertools.islice(loader.train_batches(source, **options, start=consumed), 6)
    for batch, other in zip(expected, resumed, strict=True):
        for key, value in batch.items():
            np.testing.assert_array_equal(value, other[key])


class ReadSource(ArraySource):
    """Remembers which images were read."""

    def __init__(self, length):
        super().__init__(length)
        self.read = []

    def __getitem__(self, index):
        self.read.append(index)
        return super().__getitem__(index)


@pytest.mark.parametrize("parts", [1, 2, 3])
def test_the_parts_of_a_batch_make_the_batch_and_read_no_more(parts):
    source = ReadSource(15)
    options = {"image_size": IMAGE_SIZE, "batch_size": 6}
    for make in (
        lambda **part: list(loader.eval_batches(source, **options, **part)),
        lambda **part: list(itertools.islice(loader.train_batches(source, **options, seed=3, start=1, **part), 5)),
    ):
        whole, together = make(), [make(part=(which, parts)) for which in range(parts)]
        for batch, *pieces in zip(whole, *together, strict=True):
            for name, value in batch.items():
                assert all(len(piece[name]) == 6 // parts for piece in pieces)
                np.testing.assert_array_equal(np.concatenate([piece[name] for piece in pieces]), value)
    source = ReadSource(15)  # the first one may still be read ahead
    indices = [batch["index"] for batch in loader.eval_batches(source, **options, part=(0, parts))]
    assert sorted(source.read) == sorted(np.concatenate(indices).tolist())


@pytest.mark.parametrize("seed", range(12))
def test_scale_and_crop_is_resizing_and_cutting_out(seed):
    rng = np.random.default_rng(seed)
    old, size = rng.integers(1, 50, 2), rng.integers(1, 40, 2)
    scale, place = rng.uniform(0.2, 3), rng.choice([0, 1, rng.random()], 2)
    image, label = rng.integers(0, 256, (*old, 3), np.uint8), rng.integers(0, 9, old, np.uint8)
    scaled = np.maximum(np.rint(scale * old).astype(int), 1)
    # Beyond the resized image as far as a window can reach.
    far = [(length, length) for length in size]
    wide = np.pad(loader.resize_image(image, tuple(scaled)).astype(int), [*far, (0, 0)], constant_values=-1)
    top, left = size + np.rint(place * (scaled - size)).astype(int)
    window = np.s_[top : top + size[0], left : left + size[1]]
    expected, beyond = wide[window], wide[window][..., 0] < 0
    cut, moved = loader.scale_and_crop(image, label, tuple(size), scale, place)
    assert cut.dtype == moved.dtype == np.uint8
    np.testing.assert_allclose(cut[~beyond], expected[~beyond], atol=1)
    assert (cut[beyond] == MEAN_COLOUR).all()
    wide_label = np.pad(
        loader.resize_label(label, tuple(scaled)), ((size[0],) * 2, (size[1],) * 2), constant_values=255
    )
    np.testing.assert_array_equal(moved, wide_label[window])


def test_a_window_over_the_whole_image_at_its_own_size_changes_nothing():
    rng = np.random.default_rng(0)
    image, label = rng.integers(0, 256, (7, 9, 3), np.uint8), rng.integers(0, 9, (7, 9), np.uint8)
    cut, moved = loader.scale_and_crop(image, label, (7, 9), 1.0, (0.3, 0.6))
    np.testing.assert_array_equal(cut, image)
    np.testing.assert_array_equal(moved, label)
    cut, moved = loader.scale_and_crop(image, label, (3, 4), 1.0, (0.5, 1.0))
    np.testing.assert_array_equal(cut, image[2:5, 5:])
    np.testing.assert_array_equal(moved, label[2:5, 5:])


def test_an_image_of_other_sides_than_its_label_is_cut_as_the_label_is():
    image = np.random.default_rng(0).integers(0, 256, (8, 10, 3), np.uint8)
    small = loader.resize_image(image, (16, 20))
    cut, moved = loader.scale_and_crop(image, np.arange(320, dtype=np.uint16).reshape(16, 20), (9, 9), 1.0, (0.5, 1.0))
    np.testing.assert_allclose(cut.astype(int), small[4:13, 11:], atol=1)
    assert moved[0, 0] == 4 * 20 + 11


def test_windows_are_drawn_anew_for_each_image_and_epoch_whoever_reads_them():
    source = ArraySource(9)
    options = {"image_size": (12, 16), "batch_size": 4, "seed": 3, "scale_range": (0.5, 2.0)}

    def first(number, **more):
        return list(itertools.islice(loader.train_batches(source, **options, **more), number))

    plain = list(itertools.islice(loader.train_batches(source, image_size=(12, 16), batch_size=4, seed=3), 12))
    batches, halves = first(12), [first(12, part=(which, 2)) for which in range(2)]
    for batch, *pieces, other in zip(batches, *halves, first(12, num_threads=1), strict=True):
        for name, value in batch.items():
            np.testing.assert_array_equal(np.concatenate([piece[name] for piece in pieces]), value)
            np.testing.assert_array_equal(other[name], value)
    for batch, resumed in zip(batches[5:], first(7, start=5), strict=True):
        for name, value in batch.items():
            np.testing.assert_array_equal(resumed[name], value)
    shown, windows = 0, set()
    for batch, other in zip(batches, plain, strict=True):
        np.testing.assert_array_equal(batch["index"], other["index"])
        for index, image, label in zip(batch["index"], batch["image"], batch["label"], strict=True):
            there = label != 255
            assert (image[there] == index).all() and (label[there] == index % 7).all()
            assert (image[~there] == MEAN_COLOUR).all() and there.any()
            shown += there.mean() / 48
            windows.add((int(index), there.tobytes()))
    assert 0.2 < shown < 0.95 and len(windows) > 30


def test_mistakes_are_one_line():
    source, empty = ArraySource(5), ArraySource(0)
    for call, message in (
        (lambda: loader.steps_per_epoch(source, 8), "has 5 images, less than one batch of 8: give --batch-size 5"),
        (lambda: loader.steps_per_epoch(source, 0), "--batch-size 0: must be at least 1"),
        (lambda: epochs(source, 8, 0, 1), "less than one batch of 8"),
        (lambda: epochs(source, 2, -1, 1), "--seed -1: must be between 0 and 4294967295"),
        (lambda: epochs(source, 2, 2**32, 1), "--seed 4294967296: must be"),
        (lambda: loader.eval_batches(source, image_size=IMAGE_SIZE, batch_size=0), "--batch-size 0"),
        (
            lambda: loader.eval_batches(source, image_size=IMAGE_SIZE, batch_size=3, part=(0, 2)),
            "--batch-size 3 cannot be split over 2 processes",
        ),
        (lambda: loader.eval_batches(empty, image_size=IMAGE_SIZE, batch_size=2), "empty"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)) as error:
            call()
        assert "\n" not in str(error.value)
    assert loader.steps_per_epoch(source, 2) == 2


def test_an_image_that_breaks_later_is_the_source_s_own_error():
    class Broken(ArraySource):
        def __getitem__(self, index):
            raise ValueError(f"image {index} is broken")

    with pytest.raises(ValueError, match="broken") as error:
        next(iter(loader.eval_batches(Broken(3), image_size=IMAGE_SIZE, batch_size=2)))
    assert str(error.value) == "image 0 is broken"


def test_features_take_the_images_place_in_the_same_order():
    class Labels(ArraySource):
        def __getitem__(self, index):
            pytest.fail("an image is read")

        def label(self, index):
            return super().__getitem__(index)["label"]

    options = {"image_size": IMAGE_SIZE, "batch_size": 4, "seed": 3}
    features = np.arange(11 * 6, dtype=np.float32).reshape(11, 1, 2, 3)
    plain = loader.train_batches(ArraySource(11), **options)
    stored = loader.train_batches(Labels(11), features=features, **options)
    for one, other in itertools.islice(zip(plain, stored, strict=True), 5):
        np.testing.assert_array_equal(one["index"], other["index"])
        np.testing.assert_array_equal(one["label"], other["label"])
        np.testing.assert_array_equal(other["features"], features[one["index"]])
        assert "image" not in other
