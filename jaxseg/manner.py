"""How images of any size are shown to the network: resized, mirrored, padded to one of few shapes. Imports no jax."""

import dataclasses

import numpy as np

from jaxseg.data.loader import resize_image

# What an image is padded with: the mean colour, nearly 0 when normalised (`jaxseg.segmenter.MEAN`).
PADDING = (124, 116, 104)


@dataclasses.dataclass(frozen=True)
class Manner:
    """How images are classified.

    Attributes:
      image_size: height and width in pixels that images are resized to; None: each is classified at its own size.
      flip: each image is shown mirrored, too.
      scales: it is shown at each of these multiples of its size.
      tile: at its own size, an image with a side longer than this many pixels is computed in tiles of this side: a
        multiple of 128 that `shared_length` gives.
      overlap: of tiles, in pixels, a multiple of 32; None for a quarter of the side.
    """

    image_size: tuple[int, int] | None
    flip: bool = False
    scales: tuple[float, ...] = (1.0,)
    tile: int = 1024
    overlap: int | None = None

    @property
    def tile_overlap(self) -> int:
        """The overlap of tiles in pixels."""
        return self.tile // 4 if self.overlap is None else self.overlap

    def __post_init__(self):
        """Refuses what has no meaning."""
        if not self.scales or not all(0.01 <= scale <= 100 for scale in self.scales):
            raise ValueError(f"scales must be from 0.01 to 100, and at least one, not {self.scales}")
        if self.tile < 1 or self.tile % 128 or shared_length(self.tile) != self.tile:
            fitting = shared_length(max(self.tile, 128) + -self.tile % 128)
            raise ValueError(f"the tile's side cannot be {self.tile} pixels: use {fitting}")
        if not 0 <= self.tile_overlap < self.tile or self.tile_overlap % 32:
            raise ValueError(f"tiles of {self.tile} pixels cannot overlap by {self.tile_overlap}: use a multiple of 32")


@dataclasses.dataclass(frozen=True)
class Prepared:
    """An image ready to be classified.

    Attributes:
      shown: what the network is shown: (h, w, 3) uint8, each padded to a shape that many images share.
      sizes: (len(shown), 2) int32, the height and width in each that are not padding.
      own_size: height and width of the image.
      image: (H, W, 3) uint8, the image, and nothing above, where it is to be computed in tiles.
    """

    shown: tuple[np.ndarray, ...]
    sizes: np.ndarray
    own_size: tuple[int, int]
    image: np.ndarray | None = None

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """The shapes shown: images of the same ones may share a batch."""
        return tuple(one.shape for one in self.shown)


def shared_length(length: int) -> int:
    """The next of the lengths to which sides are padded: multiples of 32, a quarter apart at most, so that few occur.

    They are 32, 64, 96, 128, 160, 192, 224, 256, 320, 384, 448, 512, 640, 768, 896, 1024, 1280, ...
    """
    step = 32 * 2 ** max(0, (length - 1).bit_length() - 8)
    return -(-length // step) * step


def prepare(image: np.ndarray, manner: Manner) -> Prepared:
    """Resizes, mirrors and pads an image as it will be shown; on the host, in threads if wanted.

    Args:
      image: (H, W, 3) uint8 RGB, any H and W from 1 to 32767.
      manner: how it will be classified.

    Raises:
      ValueError: the image is of another shape or type.
    """
    image = np.asarray(image)
    right = image.dtype == np.uint8 and image.ndim == 3 and image.shape[-1] == 3
    if not right or not all(0 < length < 2**15 for length in image.shape):
        raise ValueError(f"an image must be (H, W, 3) uint8, H and W from 1 to 32767, not {image.shape} {image.dtype}")
    own_size = image.shape[:2]
    if manner.image_size is None and max(own_size) > manner.tile:
        return Prepared((), np.zeros((0, 2), np.int32), own_size, image)
    shown, sizes = [], []
    for scale in manner.scales:
        size = tuple(max(1, round(side * scale)) for side in manner.image_size or own_size)
        resized = resize_image(image, size)
        # A given size is one shape anyway, and the network pads it itself.
        canvas = size if manner.image_size else tuple(map(shared_length, size))
        for one in (resized, resized[:, ::-1])[: 1 + manner.flip]:
            padded = np.empty((*canvas, 3), np.uint8)
            padded[:] = PADDING
            padded[: size[0], : size[1]] = one
            shown.append(padded)
            sizes.append(size)
    return Prepared(tuple(shown), np.array(sizes, np.int32), own_size)
