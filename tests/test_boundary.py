"""Boundary IoU against erosion class by class, as the paper's public code does it."""

import jax
import numpy as np
import pytest
from scipy import ndimage

from jaxseg import boundary, metrics, train
from tests.peers.given_logits import GivenLogits

NUM_CLASSES = 4


def region(mask, width):
    """The public code's boundary region: what erosion by a 3x3 square, `width` times, with zeros around, takes away."""
    eroded = ndimage.binary_erosion(mask, np.ones((3, 3)), iterations=int(width), border_value=0)
    return mask & ~eroded


def region_by_loops(mask, width):
    """The paper's definition: pixels of the mask whose distance to what is not in it is at most `width`."""
    found = np.zeros_like(mask)
    height, length = mask.shape
    for y, x in np.argwhere(mask):
        window = [(y + down, x + along) for down in range(-width, width + 1) for along in range(-width, width + 1)]
        found[y, x] = any(not (0 <= v < height and 0 <= u < length and mask[v, u]) for v, u in window)
    return found


def expected_counts(label, prediction, size, width, num_classes=NUM_CLASSES):
    """Intersection and union (2, C) of one image's boundary regions, and of the classes whole."""
    label, prediction = (x[: size[0], : size[1]] for x in (label, prediction))
    valid = label != 255
    counts = np.zeros((2, 2, num_classes), np.int64)
    for index in range(num_classes):
        masks = [(x == index) & valid for x in (label, prediction)]
        for kind, pair in enumerate((masks, [region(mask, width) for mask in masks])):
            counts[kind, :, index] = (pair[0] & pair[1]).sum(), (pair[0] | pair[1]).sum()
    return counts


def blobs(rng, shape, num_classes=NUM_CLASSES, grain=4):
    """A map of a few connected areas of any form, some of which touch the edge."""
    noise = rng.normal(size=(num_classes, *shape))
    return np.argmax([ndimage.gaussian_filter(x, grain, mode="wrap") for x in noise], 0).astype(np.uint8)


def random_case(seed, number=5, canvas=(23, 31)):
    """Labels and predictions like them, of many sizes, with ignored areas and single ignored pixels; widths 1 to 40."""
    rng = np.random.default_rng(seed)
    label = np.stack([blobs(rng, canvas, grain=rng.choice([0.5, 2, 4])) for _ in range(number)])
    prediction = np.roll(label, rng.integers(-2, 3, 2), (1, 2)).astype(np.int32)
    noise = rng.random(label.shape) < rng.choice([0, 0.01, 0.1])
    prediction[noise] = rng.integers(0, NUM_CLASSES, noise.sum())
    label[blobs(rng, canvas, 6, 2)[None].repeat(number, 0) == 0] = 255
    label[rng.random(label.shape) < rng.choice([0, 0.01])] = 255
    size = np.stack([rng.integers(1, side + 1, number) for side in canvas], 1)
    size[0] = canvas
    for index, (height, width) in enumerate(size):
        label[index, height:], label[index, :, width:] = 255, 255
    return label, prediction, size, rng.choice([1, 2, 3, 5, 9, 40], number).astype(np.int32)


confusion, at_boundary = jax.jit(boundary.boundary_confusion, static_argnums=3), jax.jit(boundary.at_boundary)


@pytest.mark.parametrize("seed", range(12))
def test_counts_equal_erosion_class_by_class(seed):
    label, prediction, size, width = random_case(seed)
    counts = np.asarray(confusion(label, prediction, width, NUM_CLASSES))
    assert counts.dtype == np.int32
    expected = sum(expected_counts(*image) for image in zip(label, prediction, size, width, strict=True))
    both = np.diagonal(counts)
    either = counts.sum(0) + counts.sum(1) - both
    np.testing.assert_array_equal(both[NUM_CLASSES:], expected[1, 0])
    np.testing.assert_array_equal(either[NUM_CLASSES:], expected[1, 1])
    plain = boundary.without_boundary(counts)
    np.testing.assert_array_equal(plain, metrics.confusion_matrix(label, prediction, NUM_CLASSES))
    np.testing.assert_array_equal(np.diagonal(plain), expected[0, 0])
    wanted = [both / either if either else np.nan for both, either in expected[1].T]
    np.testing.assert_array_equal(boundary.boundary_iou_per_class(counts), wanted)


@pytest.mark.parametrize("width", [1, 2, 3, 6, 17])
def test_a_region_is_what_lies_within_the_distance(width):
    for seed in range(3):
        classes = blobs(np.random.default_rng(seed), (14, 17), 3, 1.5)
        found = np.asarray(at_boundary(classes.astype(np.int32), width))
        for index in range(3):
            mask = classes == index
            np.testing.assert_array_equal(found & mask, region_by_loops(mask, width))
            np.testing.assert_array_equal(found & mask, region(mask, width))


def test_the_edge_of_the_image_is_a_boundary():
    whole = np.zeros((9, 12), np.int32)
    inside = np.zeros((9, 12), bool)
    inside[2:-2, 2:-2] = True
    np.testing.assert_array_equal(at_boundary(whole, 2), ~inside)
    # The same in the corner of a canvas, whose rest is nothing.
    canvas = np.pad(whole, ((0, 5), (0, 3)), constant_values=-1)
    np.testing.assert_array_equal(at_boundary(canvas, 2)[:9, :12], ~inside)
    assert np.all(at_boundary(np.zeros((1, 1), np.int32), 1))


def test_what_is_right_wherever_there_is_a_label_scores_1():
    label, _, _, width = random_case(1)
    rng = np.random.default_rng(0)
    prediction = np.where(label == 255, rng.integers(0, NUM_CLASSES, label.shape), label)
    iou = boundary.boundary_iou_per_class(np.asarray(confusion(label, prediction, width, NUM_CLASSES)))
    present = np.isin(np.arange(NUM_CLASSES), label)
    assert present.sum() >= 3
    np.testing.assert_array_equal(iou, np.where(present, 1, np.nan))


@pytest.mark.parametrize("width", [1, 2, 3])
def test_what_an_ignored_pixel_predicts_does_not_matter(width):
    label, prediction, *_ = random_case(2)
    width = np.full(len(label), width, np.int32)
    changed = np.where(label == 255, (prediction + 1) % NUM_CLASSES, prediction)
    assert (changed != prediction).any()
    np.testing.assert_array_equal(*(confusion(label, x, width, NUM_CLASSES) for x in (prediction, changed)))


def test_a_shift_costs_the_boundary_more_than_the_whole():
    """A square of 20 pixels, moved by one; regions of width 2. By hand: 19 x 20 of 21 x 20, and 108 of 180."""
    label, prediction = np.zeros((2, 1, 40, 40), np.uint8)
    label[0, 10:30, 10:30] = prediction[0, 10:30, 11:31] = 1
    counts = np.asarray(confusion(label, prediction, np.array([2]), 2))
    assert metrics.iou_per_class(boundary.without_boundary(counts))[1] == 380 / 420
    # Each region has 20 x 20 - 16 x 16 = 144 pixels. Rows at the top and bottom: 4 x 19 of them are in both. In the 16
    # rows between them, columns 10, 11, 28, 29 against 11, 12, 29, 30: 2 x 16.
    assert boundary.boundary_iou_per_class(counts)[1] == (76 + 32) / (2 * 144 - 108)


def test_a_class_without_a_pixel_is_absent_and_255_classes_fit():
    label = np.array([[[0, 254, 255]]], np.uint8)
    counts = np.asarray(confusion(label, np.array([[[0, 254, 1]]]), np.array([1]), 255))
    assert counts.sum() == 2 and counts[255, 255] == counts[509, 509] == 1
    iou = boundary.boundary_iou_per_class(counts)
    assert iou[0] == iou[254] == 1 and np.isnan(iou[1:254]).all()


def test_the_width_is_the_public_codes():
    # Right-angled triangles whose 2 % are halves: Python rounds them to the even number, and so must we.
    sizes = [(1, 1), (15, 20), (45, 60), (75, 100), (105, 140), (360, 480), (375, 500), (3024, 4032)]
    for height, width in sizes:
        expected = max(round(0.02 * float(np.sqrt(height**2 + width**2))), 1)
        assert boundary.boundary_width(np.array([height, width])) == expected
    np.testing.assert_array_equal(boundary.boundary_width(np.array(sizes)), [1, 1, 2, 2, 4, 12, 12, 101])
    assert boundary.boundary_width(np.array([300, 400]), share=0.005) == 2


def test_an_evaluation_sums_each_image_with_its_own_width_on_any_number_of_devices():
    rng = np.random.default_rng(0)
    number, canvas = 24, (150, 160)
    image = rng.integers(0, 256, (number, 4, 4, 3), dtype=np.uint8)
    label = np.stack([blobs(rng, canvas, 3) for _ in range(number)])
    size = np.stack([rng.integers(20, side + 1, number) for side in canvas], 1).astype(np.int32)
    for index, (height, width) in enumerate(size):
        label[index, height:], label[index, :, width:] = 255, 255
    label[22:] = 255  # as the copies that fill up the last batch
    batches = [
        {"image": image[part], "label": label[part], "label_size": size[part]}
        for part in np.split(np.arange(number), 2)
    ]
    widths = [max(round(0.02 * float(np.hypot(*side))), 1) for side in size]
    assert set(widths) == {1, 2, 3, 4}
    expected = np.zeros((2, 2, 3), np.int64)
    for batch, width in zip(batches, np.split(np.array(widths), 2), strict=True):
        prediction = np.asarray(jax.jit(lambda batch: train.predict_step({}, batch, model=GivenLogits()))(batch))
        for one in zip(batch["label"], prediction, batch["label_size"], width, strict=True):
            expected += expected_counts(*one, num_classes=3)
    for devices in (jax.local_devices()[:number] for number in (1, 2, 3, 4)):
        counts = train.make_evaluate(GivenLogits(), 3, devices, boundary=True)({}, batches)
        assert counts.dtype == np.int64 and counts.sum() == (label != 255).sum()
        iou = np.concatenate(
            [metrics.iou_per_class(boundary.without_boundary(counts)), boundary.boundary_iou_per_class(counts)]
        )
        np.testing.assert_array_equal(iou, (expected[:, 0] / expected[:, 1]).ravel())
