"""Images of mixed sizes on canvases of a few shapes: a program is compiled for each shape, not for each size.

An image lies in the top left corner of its canvas. `Segmenter` is told its size, and hides the rest: what it gives for
an image does not depend on the canvas, which costs time where it is larger than the image.
"""

import numpy as np

# The mean of ImageNet's pixels as uint8 RGB: after normalising, the input's zero but for rounding. What is beyond an
# image has it.
MEAN_COLOUR = (124, 116, 104)
# Of the encoder: canvases are multiples of it.
STRIDE = 32
# Shapes at most: one takes seconds to compile.
MOST = 8
# More different sizes than these are rounded up more coarsely before any are joined, which takes their square's time.
_COMPARED = 512


def choose_canvases(sizes: np.ndarray, most: int = MOST, stride: int = STRIDE) -> np.ndarray:
    """Chooses a canvas for each image: its size rounded up to the stride, where that makes few enough different ones.

    Otherwise those two become one, which holds both, to which that adds the fewest pixels over all images, and so on:
    common sizes keep their own. It is a function of all the sizes alone: not of the batches, nor of the devices.

    Args:
      sizes: (N, 2) integer, heights and widths in pixels, from 1 up.
      most: the number of different canvases at most, from 1 up.
      stride: pixels; the canvases' sides are multiples of it.

    Returns:
      (N, 2) int64, the height and width of each image's canvas.
    """
    while True:
        rounded = -(-np.asarray(sizes, np.int64) // stride) * stride
        canvases, kind, counts = np.unique(rounded, axis=0, return_inverse=True, return_counts=True)
        if len(canvases) <= max(most, _COMPARED):
            break
        stride *= 2
    kind, gone = kind.reshape(-1), np.zeros(len(canvases), bool)

    def pixels_added(one: int) -> np.ndarray:
        """By joining one canvas with each other, float64, infinite where there is nothing to join."""
        joined = np.maximum(canvases, canvases[one]).prod(1) * (counts + counts[one])
        added = joined - canvases.prod(1) * counts - canvases[one].prod() * counts[one]
        return np.where(gone | (np.arange(len(canvases)) == one), np.inf, added)

    too_many = len(canvases) - most
    if too_many > 0:
        added = np.stack([pixels_added(one) for one in range(len(canvases))])
    for _ in range(too_many):
        one, other = divmod(int(added.argmin()), len(canvases))
        canvases[one], gone[other] = np.maximum(canvases[one], canvases[other]), True
        counts[one] += counts[other]
        kind[kind == other] = one
        added[other] = added[:, other] = np.inf
        added[one] = added[:, one] = pixels_added(one)
    return canvases[kind]


def plan_batches(canvases: np.ndarray, batch_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Puts images of the same canvas into batches, the largest canvas first: a lack of memory shows at once.

    Args:
      canvases: (N, 2) integer, the height and width of each image's canvas.
      batch_size: images per batch.

    Returns:
      index: (batches * batch_size,) int64, which image is at each place: each once, within a canvas in their order;
      the last batch of each canvas is filled up with copies of its last image.
      valid: (batches * batch_size,) bool, False for a copy.
    """
    shapes, kind = np.unique(np.asarray(canvases), axis=0, return_inverse=True)
    index, valid = [np.zeros(0, np.int64)], [np.zeros(0, bool)]
    for shape in np.argsort(-shapes.prod(1), kind="stable"):
        images = np.flatnonzero(kind.reshape(-1) == shape)
        copies = -len(images) % batch_size
        index.append(np.pad(images, (0, copies), "edge"))
        valid.append(np.arange(len(images) + copies) < len(images))
    return np.concatenate(index), np.concatenate(valid)
