"""Confusion matrix and IoU against scikit-learn and by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxseg import metrics, train
from tests.peers.given_logits import GivenLogits


@pytest.mark.parametrize("seed", range(6))
def test_confusion_and_iou_equal_scikit_learn(seed):
    sklearn_metrics = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(seed)
    num_classes = int(rng.integers(2, 12))
    # The last class is absent from the labels in every other case.
    label = rng.integers(0, num_classes - seed % 2, (3, 17, 13)).astype(np.uint8)
    label[rng.random(label.shape) < 0.2] = 255
    prediction = rng.integers(0, num_classes, label.shape).astype(np.int32)
    counted = jax.jit(metrics.confusion_matrix, static_argnums=2)(label, prediction, num_classes)
    assert counted.dtype == np.int32
    truth, guess = label[label != 255], prediction[label != 255]
    classes = np.arange(num_classes)
    np.testing.assert_array_equal(counted, sklearn_metrics.confusion_matrix(truth, guess, labels=classes))
    expected = sklearn_metrics.jaccard_score(truth, guess, labels=classes, average=None)
    np.testing.assert_allclose(metrics.iou_per_class(counted), expected, rtol=1e-12)
    np.testing.assert_allclose(metrics.mean_iou(counted), expected.mean(), rtol=1e-12)


def test_the_host_counts_what_the_device_does():
    rng = np.random.default_rng(0)
    label = rng.choice([0, 1, 2, 3, 255], (37, 23)).astype(np.uint8)
    prediction = rng.integers(0, 4, (37, 23)).astype(np.uint8)
    counts = metrics.confusion_on_host(label, prediction, 4)
    assert counts.dtype == np.int64
    np.testing.assert_array_equal(counts, metrics.confusion_matrix(label, prediction, 4))


def test_on_the_host_too_classes_that_are_absent_have_their_rows():
    label, prediction = np.array([[0, 1, 255]]), np.array([[0, 0, 2]])
    np.testing.assert_array_equal(metrics.confusion_on_host(label, prediction, 3), [[1, 0, 0], [1, 0, 0], [0, 0, 0]])


@pytest.mark.parametrize("seed", range(6))
def test_iou_is_intersection_over_union_of_the_pixels(seed):
    """As an evaluation script has it: for each class, the pixels that both have over those that either has."""
    rng = np.random.default_rng(seed)
    num_classes = int(rng.integers(2, 9))
    label = rng.choice([*range(num_classes - 1), 255], (4, 11, 7)).astype(np.uint8)
    prediction = rng.integers(0, rng.integers(1, num_classes + 1), label.shape)
    counted = label != 255
    expected = []
    for index in range(num_classes):
        both = ((label == index) & (prediction == index) & counted).sum()
        either = (((label == index) | (prediction == index)) & counted).sum()
        expected.append(both / either if either else np.nan)
    confusion = metrics.confusion_matrix(label, prediction, num_classes)
    np.testing.assert_array_equal(metrics.iou_per_class(confusion), expected)
    assert metrics.mean_iou(confusion) == np.nanmean(expected)


@pytest.mark.parametrize("seed", range(3))
def test_splitting_the_images_does_not_change_the_sum(seed):
    rng = np.random.default_rng(seed)
    label = rng.choice([0, 1, 2, 255], (8, 9, 9)).astype(np.uint8)
    prediction = rng.integers(0, 3, label.shape)
    whole = metrics.confusion_matrix(label, prediction, 3)
    order, cuts = rng.permutation(8), np.sort(rng.integers(0, 9, 3))
    parts = [metrics.confusion_matrix(label[part], prediction[part], 3) for part in np.split(order, cuts)]
    np.testing.assert_array_equal(whole, sum(np.asarray(part) for part in parts))
    # What is padded with ignored pixels counts the same.
    padded = [np.pad(x, ((0, 2), (0, 3), (0, 5)), constant_values=255) for x in (label, prediction)]
    np.testing.assert_array_equal(whole, metrics.confusion_matrix(*padded, 3))


def test_given_logits_count_the_same_on_any_number_of_devices():
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (24, 8, 8, 3), dtype=np.uint8)
    label = rng.choice([0, 1, 2, 255], (24, 12, 15)).astype(np.uint8)
    size = np.stack([rng.integers(3, 13, 24), rng.integers(3, 16, 24)], 1).astype(np.int32)
    for index, (height, width) in enumerate(size):
        label[index, height:], label[index, :, width:] = 255, 255
    label[20:] = 255  # as the copies that fill up the last batch
    batches = [
        {"image": image[part], "label": label[part], "label_size": size[part]} for part in np.split(np.arange(24), 2)
    ]
    counts = []
    for number in (1, 2, 3, 4):
        devices = jax.local_devices()[:number]
        counts.append(train.make_evaluate(GivenLogits(), 3, devices)(train.replicate({}, devices), batches))
    assert counts[0].sum() == (label != 255).sum()
    for other in counts[1:]:
        np.testing.assert_array_equal(other, counts[0])


def test_an_evaluation_counts_past_two_to_the_31(monkeypatch):
    full = jnp.full((2, 2), 2**30, jnp.int32)
    monkeypatch.setattr(train, "pmap_step", lambda *_: lambda *_: full)
    batches = [{"image": np.zeros((1, 2, 2, 3), np.uint8)}] * 9
    total = train.make_evaluate(GivenLogits(), 2, jax.local_devices()[:1])({}, batches)
    np.testing.assert_array_equal(total, np.full((2, 2), 9 * 2**30))


@np.errstate(all="raise")
def test_absent_classes_are_left_out_of_the_mean():
    # Class 2 is nowhere; class 1 is only predicted, so its IoU is 0 and counts.
    confusion = np.array([[6, 2, 0], [0, 0, 0], [0, 0, 0]])
    np.testing.assert_array_equal(metrics.iou_per_class(confusion), [0.75, 0.0, np.nan])
    assert metrics.mean_iou(confusion) == 0.375
    assert metrics.mean_iou(np.zeros((3, 3))) == 0
    assert metrics.best_and_worst(np.zeros((3, 3)), "abc") == "no class occurs in the labels or the predictions"


def test_counts_past_two_to_the_31_stay_exact():
    big = 2**31 + 1
    iou = metrics.iou_per_class(np.array([[big, 1], [0, big]], dtype=np.int64))
    assert iou[0] == big / (big + 1)
    # So do those of one batch, which are int32 each.
    iou = metrics.iou_per_class(jnp.full((3, 3), 2**30, jnp.int32))
    np.testing.assert_array_equal(iou, np.full(3, 1 / 5))


def test_table_in_the_reports_form():
    table = metrics.iou_table(np.array([[6, 2, 0], [0, 0, 0], [0, 0, 0]]), ("sky", "road", "car"))
    assert table.splitlines() == [
        "class #0 : 0.75000  sky",
        "class #1 : 0.00000  road",
        "class #2 : absent   car",
        "mean_iou: 0.375000  (without 1 absent from labels and predictions)",
    ]
    assert metrics.iou_table(np.eye(2), ("sky", "road")).splitlines()[-1] == "mean_iou: 1.000000"


def test_table_with_a_second_column():
    confusion, boundary_iou = np.array([[6, 2, 0], [0, 0, 0], [0, 0, 0]]), np.array([0.5, 0.25, np.nan])
    table = metrics.iou_table(confusion, ("sky", "road", "car"), boundary_iou)
    assert table.splitlines() == [
        "class #0 : 0.75000  0.50000  sky",
        "class #1 : 0.00000  0.25000  road",
        "class #2 : absent   absent   car",
        "mean_iou: 0.375000  (without 1 absent from labels and predictions)",
        "mean_boundary_iou: 0.375000  (without 1 absent from labels and predictions)",
    ]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ([0, 0, 0], "which no label shows"),
        ([0, 1, 0], "most often taken for road (100 % of its pixels)"),
        ([0, 2, 1], "most often taken for road (67 % of its pixels)"),
        ([1, 0, 0], "worst: sky (0.500)"),
    ],
)
def test_the_worst_class_with_a_handful_of_pixels(row, said):
    """Its column has one more, so that it is always the worst."""
    confusion = np.array([row, [0, 9, 0], [1, 0, 9]])
    assert metrics.best_and_worst(confusion, ("sky", "road", "car")).endswith(said)


def test_one_pixel_is_enough_for_an_iou():
    np.testing.assert_array_equal(metrics.iou_per_class(np.array([[1, 0], [0, 0]])), [1.0, np.nan])


def test_255_is_ignored_by_default():
    counts = metrics.confusion_matrix(np.array([255, 1, 0], np.uint8), np.array([0, 1, 0]), 2)
    np.testing.assert_array_equal(counts, [[1, 0], [0, 1]])
    # With as many classes as a byte has room for, too.
    counts = metrics.confusion_matrix(np.array([255, 254, 255], np.uint8), np.array([254, 254, 0]), 255)
    assert counts[254, 254] == counts.sum() == 1


@pytest.mark.parametrize("ignored", [-1, 0, 2, 3, 254])
def test_any_label_may_be_the_ignored_one(ignored):
    rng = np.random.default_rng(ignored % 5)
    label, prediction = rng.choice([0, 1, 2, ignored], (9, 9)), rng.integers(0, 3, (9, 9))
    expected = np.zeros((3, 3), int)
    np.add.at(expected, (label[label != ignored], prediction[label != ignored]), 1)
    np.testing.assert_array_equal(metrics.confusion_matrix(label, prediction, 3, ignored), expected)


def test_a_table_needs_a_name_for_each_class():
    with pytest.raises(ValueError, match="zip"):
        metrics.iou_table(np.eye(3, dtype=int), ("sky", "road"))


def test_best_and_worst_names_what_the_worst_is_taken_for():
    confusion = np.array([[9, 1, 0], [0, 5, 5], [0, 7, 3]])
    line = metrics.best_and_worst(confusion, ("sky", "road", "car"))
    assert line == "best: sky (0.900); worst: car (0.200), most often taken for road (70 % of its pixels)"
