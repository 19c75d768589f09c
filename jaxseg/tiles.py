"""An image classified in overlapping tiles, blended so that no seam shows; numpy.

At its edge inside the image a tile lacks context: there it has no say. From the margin on its weight grows, while its
neighbour's falls, so that the weights of a pixel always sum to 1. Tiles begin at multiples of the network's stride: all
see the grid of features that the whole image would have.
"""

from collections.abc import Callable, Iterable

import numpy as np

_STRIDE = 32
# The middle part of the overlap in which the weight passes from one tile to the next.
_RAMP = 0.25

Place = tuple[slice, slice]


def starts(length: int, tile: int, overlap: int) -> list[int]:
    """Where along an axis tiles begin: multiples of 32, so that the last ends at, or less than 32 beyond, the end.

    Args:
      length: of the axis, in pixels.
      tile: side of a tile.
      overlap: of neighbours, less than the tile; both multiples of 32. The last one may overlap more.
    """
    last = -(-max(length - tile, 0) // _STRIDE) * _STRIDE
    return [*range(0, last, tile - overlap), last]


def weights(length: int, tile: int, overlap: int) -> np.ndarray:
    """How much each tile counts at each place along an axis.

    Args:
      length: of the axis.
      tile: as in `starts`.
      overlap: as in `starts`.

    Returns:
      (tiles, length) float32; the sum over the tiles is 1, and 0 is where a tile is not.
    """
    margin, ramp = overlap * (1 - _RAMP) / 2, max(overlap * _RAMP, 1)
    place = np.arange(length) + 0.5
    rows = []
    for start in starts(length, tile, overlap):
        end = start + tile
        # Where the image ends, there is no context to lack.
        rising = np.ones(length) if start == 0 else np.clip((place - start - margin) / ramp, 0, 1)
        falling = np.ones(length) if end >= length else np.clip((end - margin - place) / ramp, 0, 1)
        rows.append(np.minimum(rising, falling))
    return (np.array(rows) / np.sum(rows, axis=0)).astype(np.float32)


def classify_in_tiles(
    size: tuple[int, int], tile: int, overlap: int, score: Callable[[list[Place]], Iterable[tuple[int, np.ndarray]]]
) -> np.ndarray:
    """Classifies an image row of tiles by row of tiles: no more than one row's scores are in memory.

    Args:
      size: height and width of the image.
      tile: as in `starts`.
      overlap: as in `starts`.
      score: places of tiles in the image -> for each, in any order, its number in the list and its scores (h, w, C)
        float32; of their weighted means the largest decides.

    Returns:
      (H, W) uint8 class indices.
    """
    tops, lefts = (starts(length, tile, overlap) for length in size)
    down, across = (weights(length, tile, overlap) for length in size)
    classes, band = np.empty(size, np.uint8), np.zeros((0, 0, 0), np.float32)
    for row, top in enumerate(tops):
        rows = slice(top, min(top + tile, size[0]))
        places = [(rows, slice(left, min(left + tile, size[1]))) for left in lefts]
        for column, scores in score(places):
            place = places[column]
            if not band.size:
                band = np.zeros((tile, size[1], scores.shape[-1]), np.float32)
            weight = down[row, place[0], None] * across[column, place[1]]
            band[: len(scores), place[1]] += scores * weight[..., None]
        # Above the next row of tiles nothing is added any more.
        end = tops[row + 1] if row + 1 < len(tops) else size[0]
        classes[top:end] = band[: end - top].argmax(-1)
        band[: top + tile - end] = band[end - top :]
        band[top + tile - end :] = 0
    return classes
