"""How images of any size are shown to the network: resized, mirrored, padded to one of few shapes. Imports no jax."""

import dataclasses
from collections.abc import Mapping

import numpy as np

from jaxseg.data.canvases import STRIDE, choose_canvases
from jaxseg.data.loader import resize_image

# Height and width in pixels.
Size = tuple[int, int]


@dataclasses.dataclass(frozen=True)
class Manner:
    """How images are classified.

    Attributes:
      image_size: height and width in pixels that images are resized to; None: each is classified at its own size.
      flip: each image is shown mirrored, too.
      scales: it is shown at each of these multiples of its size.
      tile: at its own size, an image with a side longer than this many pixels, a multiple of 32, is computed in tiles
        of this side.
      overlap: of tiles, in pixels, a multiple of 32; None for 512, but at most half of the side. Of 512 a tile leaves
        192 to its neighbour, most of what a ResNet-18 sees around a pixel.
    """

    image_size: Size | None
    flip: bool = False
    scales: tuple[float, ...] = (1.0,)
    tile: int = 2048
    overlap: int | None = None

    @property
    def tile_overlap(self) -> int:
        """The overlap of tiles in pixels."""
        return min(512, self.tile // 2 // STRIDE * STRIDE) if self.overlap is None else self.overlap

    def in_tiles(self, size: Size) -> bool:
        """Whether an image of this size is computed in tiles."""
        return self.image_size is None and max(size) > self.tile

    def seen_size(self, size: Size) -> Size:
        """How much of an image of this size is seen at once: a tile, or all."""
        return (min(size[0], self.tile), min(size[1], self.tile)) if self.in_tiles(size) else size

    def shown_sizes(self, size: Size) -> list[Size]:
        """The sizes at which an image of this size is shown."""
        height, width = self.image_size or size
        return [(max(1, round(height * scale)), max(1, round(width * scale))) for scale in self.scales]

    def __post_init__(self):
        """Refuses what has no meaning."""
        if not self.scales or not all(0.1 <= scale <= 4 for scale in self.scales):
            raise ValueError(f"scales must be from 0.1 to 4, and at least one, not {self.scales}")
        if self.tile < 128 or self.tile % STRIDE:
            raise ValueError(f"the tile's side must be a multiple of {STRIDE} from 128 up, not {self.tile}")
        if not 0 <= self.tile_overlap < self.tile or self.tile_overlap % STRIDE:
            raise ValueError(
                f"tiles of {self.tile} pixels cannot overlap by {self.tile_overlap}: use a multiple of {STRIDE}"
            )


@dataclasses.dataclass(frozen=True)
class Prepared:
    """An image ready to be classified, or to be cut into tiles.

    Attributes:
      shown: what the network is shown: (h, w, 3) uint8, each padded to a shape that many images share.
      sizes: (len(shown), 2) int32, the height and width in each that are not padding.
      own_size: height and width of the image.
      image: (H, W, 3) uint8, the image, and nothing above, where it is to be computed in tiles.
      canvas: the height and width to which its tiles are padded; None where there are none.
    """

    shown: tuple[np.ndarray, ...]
    sizes: np.ndarray
    own_size: tuple[int, int]
    image: np.ndarray | None = None
    canvas: Size | None = None

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """The shapes shown: images of the same ones may share a batch."""
        return tuple(one.shape for one in self.shown)


def plan_canvases(sizes: np.ndarray, manner: Manner) -> dict[Size, Size]:
    """Chooses the shapes to which many images are padded, so that few programs are compiled.

    Args:
      sizes: (N, 2) integer, the height and width of each image.
      manner: how they will be classified.

    Returns:
      The canvas of each size, of its tiles where it is computed in tiles; see `jaxseg.data.canvases.choose_canvases`.
      Empty where images are resized: then they all have one shape.
    """
    own = [(int(height), int(width)) for height, width in sizes]
    if manner.image_size or not own:
        return {}
    canvases = choose_canvases(np.array([manner.seen_size(size) for size in own]))
    return {size: (int(height), int(width)) for size, (height, width) in zip(own, canvases, strict=True)}


def prepare(image: np.ndarray, manner: Manner, canvases: Mapping[Size, Size] | None = None) -> Prepared:
    """Resizes, mirrors and pads an image as it will be shown; on the host, in threads if wanted.

    Args:
      image: (H, W, 3) uint8 RGB, any H and W from 1 to 32767.
      manner: how it will be classified.
      canvases: from `plan_canvases`; for a size that is not in it, the next multiples of 32. They are scaled as the
        images are.

    Raises:
      ValueError: the image is of another shape or type.
    """
    image = np.asarray(image)
    right = image.dtype == np.uint8 and image.ndim == 3 and image.shape[-1] == 3
    if not right or not all(0 < length < 2**15 for length in image.shape):
        raise ValueError(f"an image must be (H, W, 3) uint8, H and W from 1 to 32767, not {image.shape} {image.dtype}")
    own_size = image.shape[:2]
    canvas = (canvases or {}).get(own_size) or _next_multiples(manner.seen_size(own_size))
    if manner.in_tiles(own_size):
        return Prepared((), np.zeros((0, 2), np.int32), own_size, image, canvas)
    shown, sizes = [], []
    for size, larger in zip(manner.shown_sizes(own_size), manner.shown_sizes(canvas), strict=True):
        resized = resize_image(image, size)
        for one in (resized, resized[:, ::-1])[: 1 + manner.flip]:
            if manner.image_size is None:
                # Beyond the image it counts as padding, whatever it is.
                padded = np.zeros((*_next_multiples(larger), 3), np.uint8)
                padded[: size[0], : size[1]] = one
                one = padded
            shown.append(one)
            sizes.append(size)
    return Prepared(tuple(shown), np.array(sizes, np.int32), own_size)


def _next_multiples(size: Size) -> Size:
    """The size rounded up to multiples of the network's stride."""
    return -(-size[0] // STRIDE) * STRIDE, -(-size[1] // STRIDE) * STRIDE
