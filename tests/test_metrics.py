"""Confusion matrix and IoU against scikit-learn and by hand."""

import jax
import numpy as np
import pytest

from jaxseg import metrics


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


def test_splitting_the_pixels_does_not_change_the_sum():
    rng = np.random.default_rng(0)
    label = rng.choice([0, 1, 2, 255], (8, 9, 9)).astype(np.uint8)
    prediction = rng.integers(0, 3, label.shape)
    whole = metrics.confusion_matrix(label, prediction, 3)
    parts = [metrics.confusion_matrix(label[i::3], prediction[i::3], 3) for i in range(3)]
    np.testing.assert_array_equal(whole, sum(np.asarray(part) for part in parts))


def test_absent_classes_are_left_out_of_the_mean():
    # Class 2 is nowhere; class 1 is only predicted, so its IoU is 0 and counts.
    confusion = np.array([[6, 2, 0], [0, 0, 0], [0, 0, 0]])
    np.testing.assert_array_equal(metrics.iou_per_class(confusion), [0.75, 0.0, np.nan])
    assert metrics.mean_iou(confusion) == 0.375
    assert metrics.mean_iou(np.zeros((3, 3))) == 0


def test_counts_past_two_to_the_31_stay_exact():
    big = 2**31 + 1
    iou = metrics.iou_per_class(np.array([[big, 1], [0, big]], dtype=np.int64))
    assert iou[0] == big / (big + 1)


def test_table_in_the_reports_form():
    table = metrics.iou_table(np.array([[6, 2, 0], [0, 0, 0], [0, 0, 0]]), ("sky", "road", "car"))
    assert table.splitlines() == [
        "class #0 : 0.75000  sky",
        "class #1 : 0.00000  road",
        "class #2 : absent   car",
        "mean_iou: 0.375000  (without 1 absent from labels and predictions)",
    ]


def test_best_and_worst_names_what_the_worst_is_taken_for():
    confusion = np.array([[9, 1, 0], [0, 5, 5], [0, 7, 3]])
    line = metrics.best_and_worst(confusion, ("sky", "road", "car"))
    assert line == "best: sky (0.900); worst: car (0.200), most often taken for road (70 % of its pixels)"
