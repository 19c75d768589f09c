"""The figure of a model's architecture: its feature maps as boxes, from the image to the logits."""

import itertools
import pathlib
import re
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import matplotlib.axes
import matplotlib.colors
import numpy as np
from matplotlib.patches import Polygon

from jaxseg.plots.page import (
    BLUE,
    INK,
    MUTED,
    PAGE_WIDTH,
    SMALL_SIZE,
    TEXT_SIZE,
    TITLE_SIZE,
    VERMILION,
    new_page,
    save,
    text_width,
    write,
)

# Inches for the root of a pixel and of a channel: 352 pixels are drawn 1.5 high, 512 channels 0.33 wide.
_PIXEL, _CHANNEL = 0.08, 0.0145
_DEPTH = 0.3  # how far a box's width in pixels goes to the back: right and up, as a share of its length
_MARGIN = 0.15
_COLOURS = {"image": "#999999", "encoder": BLUE, "decoder": VERMILION}


class LayerRow(Protocol):
    """What is needed of a layer: `jaxseg.summary.Layer` has it."""

    @property
    def name(self) -> str:
        """Its path in the model."""

    @property
    def kind(self) -> str:
        """Its class."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(H, W, C) of its output."""

    @property
    def parameters(self) -> int:
        """How many numbers it learns."""


class Block(NamedTuple):
    """Layers that follow each other without changing the size.

    Attributes:
      part: 'image', 'encoder' or 'decoder'.
      name: of the first of them, below the part and without a number of its own, such as 'layer1'.
      shape: (H, W, C) of the last one's output.
    """

    part: str
    name: str
    shape: tuple[int, ...]


class _Box(NamedTuple):
    """A box in inches: its front's height and width, and how far its depth goes to the right and up."""

    height: float
    depth: float
    width: float


class _Placed(NamedTuple):
    """A block on the page: its size as text, its name's words, and in inches its box, its place, its front's left."""

    block: Block
    size: str
    words: list[str]
    box: _Box
    left: float
    right: float
    front: float


def plot_architecture(layers: Sequence[LayerRow], image_size: tuple[int, int], title: str, path: pathlib.Path) -> None:
    """Draws the feature maps of a model from the image to the logits, a box for each size.

    Heights, widths and channels are drawn by their square roots, so that the smallest can still be seen.

    Args:
      layers: in the order in which an image passes them, named 'encoder/...' or 'decoder/...'; the last one makes the
        logits.
      image_size: (H, W) in pixels.
      title: above the figure.
      path: the PNG file to write.
    """
    placed = _lay_out([Block("image", "image", (*image_size, 3)), *group_layers(layers)])
    middle = 0.75 + max(item.box.height / 2 + item.box.depth for item in placed)
    names_top = middle + max(item.box.height for item in placed) / 2 + 0.17
    parts_top = names_top + 0.12 * max(len(item.words) for item in placed) + 0.05
    page = new_page(placed[-1].right + _MARGIN, parts_top + 0.5)
    write(page, _MARGIN, 0.14, title, TITLE_SIZE, weight="bold", va="top")
    for item in placed:
        _draw_box(page, item.front, middle, item.box, _COLOURS[item.block.part])
        centre, above = (item.left + item.right) / 2, middle - item.box.height / 2 - item.box.depth
        write(page, centre, above - 0.2, item.size, SMALL_SIZE, ha="center")
        write(page, centre, above - 0.07, f"x{item.block.shape[2]}", SMALL_SIZE, color=MUTED, ha="center")
        for line, word in enumerate(item.words):
            write(page, centre, names_top + 0.12 * line, word, SMALL_SIZE, ha="center")
    for item, following in itertools.pairwise(placed):
        _draw_arrow(page, item.front + item.box.width + item.box.depth, following.front, middle)
    _draw_parts(page, layers, placed, parts_top)
    save(page.figure, path)


def group_layers(layers: Sequence[LayerRow]) -> list[Block]:
    """Groups layers of one stage, then stages of one part and size that follow each other; the last layer stays alone.

    By stage first: a bottleneck's first convolution, for one, still has the size of the stage before.
    """

    def stage(layer: LayerRow) -> tuple[str, str]:
        part, name = layer.name.split("/")[:2]
        return part, re.sub(r"_\d+$", "", name)

    stages = [Block(*key, list(group)[-1].shape) for key, group in itertools.groupby(layers[:-1], stage)]
    blocks = []
    for _, group in itertools.groupby(stages, lambda block: (block.part, block.shape[:2])):
        first, *rest = group
        blocks.append(first._replace(shape=rest[-1].shape if rest else first.shape))
    return [*blocks, Block(*stage(layers[-1]), layers[-1].shape)]


def _lay_out(blocks: Sequence[Block]) -> list[_Placed]:
    """Places the blocks side by side, over the page's width or as wide as they need."""
    boxes = [_Box(*(np.sqrt(block.shape) * (_PIXEL, _DEPTH * _PIXEL, _CHANNEL))) for block in blocks]
    sizes = ["{}x{}".format(*block.shape[:2]) for block in blocks]
    # A name is broken where it has an underscore, so that it fits below its box.
    words = [block.name.split("_") for block in blocks]
    slots = [
        max(box.width + box.depth, *(text_width(text, SMALL_SIZE) for text in (size, *name)))
        for box, size, name in zip(boxes, sizes, words, strict=True)
    ]
    gap = max(0.08, (PAGE_WIDTH - 2 * _MARGIN - sum(slots)) / (len(blocks) - 1))
    placed, left = [], _MARGIN
    for block, size, name, box, slot in zip(blocks, sizes, words, boxes, slots, strict=True):
        front = left + (slot - box.width - box.depth) / 2
        placed.append(_Placed(block, size, name, box, left, left + slot, front))
        left += slot + gap
    return placed


def _draw_box(page: matplotlib.axes.Axes, left: float, middle: float, box: _Box, colour: str) -> None:
    """Draws the front, the top and the right side of a box, its front centred at the height `middle`."""
    height, depth, width = box
    up, down, right = middle - height / 2, middle + height / 2, left + width
    base = np.array(matplotlib.colors.to_rgb(colour))
    faces = {
        0.75: [(left, up), (right, up), (right, down), (left, down)],
        0.5: [(left, up), (left + depth, up - depth), (right + depth, up - depth), (right, up)],
        0.3: [(right, up), (right + depth, up - depth), (right + depth, down - depth), (right, down)],
    }
    for share, corners in faces.items():
        style = {"facecolor": 1 - share * (1 - base), "edgecolor": base * 0.6, "linewidth": 0.5, "joinstyle": "round"}
        page.add_patch(Polygon(corners, closed=True, **style))


def _draw_arrow(page: matplotlib.axes.Axes, left: float, right: float, y: float) -> None:
    """A short arrow in the middle of the space between two boxes."""
    start = (left + right) / 2 - 0.04
    style = {"arrowstyle": "-|>,head_width=0.15,head_length=0.25", "color": INK, "linewidth": 0.7}
    style |= {"shrinkA": 0, "shrinkB": 0}
    page.annotate("", xy=(start + 0.09, y), xytext=(start, y), arrowprops=style)


def _draw_parts(page: matplotlib.axes.Axes, layers: Sequence[LayerRow], placed: Sequence[_Placed], top: float) -> None:
    """Draws a line below the blocks of each part, and below it what the part is made of and its parameters."""
    for part in ("encoder", "decoder"):
        own = [item for item in placed if item.block.part == part]
        left, right = own[0].left, own[-1].right
        page.plot([left, right], [top, top], color=_COLOURS[part], linewidth=1.5, solid_capstyle="butt")
        rows = [layer for layer in layers if layer.name.startswith(f"{part}/")]
        kinds = ", ".join(dict.fromkeys(layer.kind for layer in rows))
        write(page, left, top + 0.19, f"{part}: {sum(row.parameters for row in rows):,} parameters", TEXT_SIZE)
        write(page, left, top + 0.35, kinds, SMALL_SIZE, color=MUTED)
