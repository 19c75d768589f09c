"""Boundary IoU: intersection over union of what lies near the classes' outlines, counted on the device.

The boundary region of a mask is its pixels at a chessboard distance of at most d from what is not in it; beyond the
image nothing is. Boundary IoU is the IoU of the boundary regions of a class's label and its prediction.

Ignored pixels are taken out of label and prediction alike, as if the image ended there. So what an ignored pixel
predicts does not matter, a prediction that is right wherever there is a label scores 1, and the pixels next to an
ignored area are in the boundary region as those at the image's edge are.

Source: Cheng et al. 2021, "Boundary IoU: Improving Object-Centric Image Segmentation Evaluation", and its public code
(bowenc0221/boundary-iou-api, boundary_utils.py): erosion by a 3x3 square d times, with zeros around the image.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from jaxseg.metrics import confusion_matrix, iou_per_class

# What is beyond the image, or ignored.
_NOTHING = -1


def boundary_width(size: np.ndarray, share: float = 0.02) -> np.ndarray:
    """The width d of the boundary region: a share of the image's diagonal, to the nearest pixel (halves to even).

    On the host, because in float32 a half may fall to its other side.

    Args:
      size: (..., 2) integer, height and width in pixels.
      share: of the diagonal; 0.02 is the paper's.

    Returns:
      (...) int32, 1 or more.
    """
    diagonal = np.sqrt(np.square(np.asarray(size, np.float64)).sum(-1))
    return np.maximum(np.rint(share * diagonal), 1).astype(np.int32)


def at_boundary(classes: jax.Array, width: jax.Array | int) -> jax.Array:
    """Whether each pixel is in the boundary region of its own class, for all classes at once.

    Args:
      classes: (H, W) integer; -1 is no class, and so is all beyond the map.
      width: () integer in pixels, 1 or more; not static, so that images of all sizes share a compilation.

    Returns:
      (H, W) bool; where the class is -1 it means nothing.
    """
    # Width 1: the 3x3 pixels around it are not all the same.
    around = jnp.pad(classes, 1, constant_values=_NOTHING)
    low, high = (
        functools.reduce(pick, (rows[:, :-2], rows[:, 1:-1], rows[:, 2:]))
        for pick in (jnp.minimum, jnp.maximum)
        for rows in [functools.reduce(pick, (around[:-2], around[1:-1], around[2:]))]
    )
    found = low != high
    # More: on the straight way to a pixel of another class, the last one of its own class is such a pixel.
    for axis in (0, 1):
        found = _any_within(found, width - 1, axis)
    return found


def boundary_confusion(
    label: jax.Array, prediction: jax.Array, width: jax.Array, num_classes: int, ignore_label: int = 255
) -> jax.Array:
    """The confusion matrix with each class in two: first those inside, then those at the boundary of their own class.

    Args:
      label: (N, H, W) integer in [0, num_classes) or `ignore_label`, as which all beyond an image's own size is given.
      prediction: (N, H, W) integer in [0, num_classes), same shape.
      width: (N,) integer, see `boundary_width`.
      num_classes: C.
      ignore_label: pixels with this label are not counted, and taken for the image's outside.

    Returns:
      (2C, 2C) int32, label in rows: C + c is class c at its boundary. The union of a boundary region counts pixels
      where label and prediction differ in this only, so that no smaller matrix holds both IoUs.
    """

    def split(classes_and_width: tuple[jax.Array, jax.Array]) -> jax.Array:
        classes, width = classes_and_width
        return classes + num_classes * at_boundary(classes, width)

    outside = label == ignore_label
    label, prediction = (jnp.where(outside, _NOTHING, x.astype(jnp.int32)) for x in (label, prediction))
    # One image at a time: photographs are large.
    label, prediction = (jax.lax.map(split, (x, width)) for x in (label, prediction))
    # 2C may exceed `ignore_label`, and what is nothing was moved by C where it is near a class.
    label = jnp.where(outside, _NOTHING, label)
    return confusion_matrix(label, prediction, 2 * num_classes, ignore_label=_NOTHING)


def without_boundary(counts: np.ndarray) -> np.ndarray:
    """The plain confusion matrix (C, C) in a `boundary_confusion` (2C, 2C)."""
    num_classes = len(counts) // 2
    return counts.reshape(2, num_classes, 2, num_classes).sum((0, 2))


def boundary_iou_per_class(counts: np.ndarray) -> np.ndarray:
    """Boundary IoU of each class.

    Args:
      counts: (2C, 2C) integer, `boundary_confusion` summed over the whole set.

    Returns:
      (C,) float64 in [0, 1]; NaN for a class that is neither in the labels nor in the predictions.
    """
    return iou_per_class(counts)[len(counts) // 2 :]


def _any_within(mask: jax.Array, radius: jax.Array | int, axis: int) -> jax.Array:
    """Whether any pixel is set up to `radius` away along an axis: two sums up to a place, whatever the radius."""
    length = mask.shape[axis]
    before = jnp.cumsum(mask, axis, dtype=jnp.int32)
    before = jnp.pad(before, [(1, 0) if axis == other else (0, 0) for other in (0, 1)])
    place = jnp.arange(length)
    first, end = jnp.maximum(place - radius, 0), jnp.minimum(place + radius + 1, length)
    return jnp.take(before, end, axis) > jnp.take(before, first, axis)
