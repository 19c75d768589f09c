"""Confusion matrix on the device, intersection over union on the host."""

import jax
import jax.numpy as jnp
import numpy as np


def confusion_matrix(
    label: jax.Array | np.ndarray, prediction: jax.Array | np.ndarray, num_classes: int, ignore_label: int = 255
) -> jnp.ndarray:
    """Counts pixels by their label (row) and prediction (column).

    Integers throughout: float32 cannot count past 2^24. One call counts fewer than 2^31 pixels; sum calls in int64.

    Args:
      label: (...) integer in [0, num_classes) or `ignore_label`.
      prediction: (...) integer in [0, num_classes), same shape.
      num_classes: C.
      ignore_label: pixels with this label are not counted.

    Returns:
      (C, C) int32.

    Source: equals sklearn.metrics.confusion_matrix over the pixels that are not ignored.
    """
    cell = label.astype(jnp.int32) * num_classes + prediction.astype(jnp.int32)
    # What is ignored goes to one more cell, which is cut off: no branch, no dynamic shape.
    cell = jnp.where(label == ignore_label, num_classes**2, cell)
    counts = jnp.bincount(cell.ravel(), length=num_classes**2 + 1)
    return counts[:-1].reshape(num_classes, num_classes).astype(jnp.int32)


def confusion_on_host(
    label: np.ndarray, prediction: np.ndarray, num_classes: int, ignore_label: int = 255
) -> np.ndarray:
    """As `confusion_matrix`, in NumPy: for one image after the other, whatever their sizes; (C, C) int64."""
    valid = label != ignore_label
    cell = label[valid].astype(np.int64) * num_classes + prediction[valid]
    return np.bincount(cell, minlength=num_classes**2).reshape(num_classes, num_classes)


def iou_per_class(confusion: np.ndarray) -> np.ndarray:
    """Intersection over union of each class: TP / (TP + FP + FN).

    Args:
      confusion: (C, C) integer, label in rows, prediction in columns, summed over the whole set.

    Returns:
      (C,) float64 in [0, 1]; NaN for a class that is neither in the labels nor in the predictions.
    """
    confusion = np.asarray(confusion, dtype=np.int64)
    intersection = np.diagonal(confusion)
    union = confusion.sum(0) + confusion.sum(1) - intersection
    return np.divide(intersection, union, out=np.full(len(union), np.nan), where=union > 0)


def mean_iou(confusion: np.ndarray) -> float:
    """The mean of `iou_per_class` over the classes that occur in labels or predictions; 0 when none does."""
    return mean_over_classes(iou_per_class(confusion))


def mean_over_classes(iou: np.ndarray) -> float:
    """The mean of (C,) values without those that are NaN; 0 when all are."""
    return float(np.nanmean(iou)) if np.isfinite(iou).any() else 0.0


def iou_table(confusion: np.ndarray, names: tuple[str, ...], boundary_iou: np.ndarray | None = None) -> str:
    """The table in the report's form, a line per class, then the mean.

    Args:
      confusion: (C, C) integer, label in rows.
      names: the C class names, in label order.
      boundary_iou: (C,) in [0, 1], NaN where the class does not occur, for a second column; or None.

    Returns:
      `class #0 : 0.90244  background`, ..., `mean_iou: 0.682180`; classes that do not occur are marked. The second
      column stands between IoU and name, its mean in a line `mean_boundary_iou: ` of its own.
    """
    iou = iou_per_class(confusion)
    columns = [iou] if boundary_iou is None else [iou, boundary_iou]
    lines = [
        f"class #{index} : {'  '.join('absent ' if np.isnan(x) else f'{x:.5f}' for x in values)}  {name}"
        for index, (*values, name) in enumerate(zip(*columns, names, strict=True))
    ]
    absent = int(np.isnan(iou).sum())
    note = f"  (without {absent} absent from labels and predictions)" if absent else ""
    lines.append(f"mean_iou: {mean_iou(confusion):.6f}{note}")
    if boundary_iou is not None:
        lines.append(f"mean_boundary_iou: {mean_over_classes(boundary_iou):.6f}{note}")
    return "\n".join(lines)


def best_and_worst(confusion: np.ndarray, names: tuple[str, ...]) -> str:
    """One line: the best and the worst class, and what the worst one's pixels are most often taken for."""
    iou = iou_per_class(confusion)
    if not np.isfinite(iou).any():
        return "no class occurs in the labels or the predictions"
    best, worst = int(np.nanargmax(iou)), int(np.nanargmin(iou))
    line = f"best: {names[best]} ({iou[best]:.3f}); worst: {names[worst]} ({iou[worst]:.3f})"
    row = np.asarray(confusion, dtype=np.int64)[worst].copy()
    total, row[worst] = int(row.sum()), 0
    if total == 0:
        return f"{line}, which no label shows"
    taken = int(row.argmax())
    if row[taken] == 0:
        return line
    return f"{line}, most often taken for {names[taken]} ({100 * row[taken] / total:.0f} % of its pixels)"
