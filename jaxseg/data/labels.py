"""What the classes of a data set are called and how they are drawn."""

import dataclasses
import os
import pathlib
import re

import numpy as np

# A pixel with this label is "don't know": no loss, no metric.
IGNORE_LABEL = 255

Colour = tuple[int, int, int]


@dataclasses.dataclass(frozen=True)
class Labels:
    """The classes of a data set, in label order.

    Attributes:
      names: one name for each class; class `k` is the pixels whose label is `k`.
      colours: one (red, green, blue) for each class, each 0..255.
    """

    names: tuple[str, ...]
    colours: tuple[Colour, ...]

    def __post_init__(self):
        """Refuses lists of different lengths."""
        if len(self.names) != len(self.colours):
            raise ValueError(f"{len(self.names)} class names but {len(self.colours)} colours: give one colour each")

    @property
    def num_classes(self) -> int:
        """The number of classes, ignored pixels not counted."""
        return len(self.names)


# The nine classes of the report in its data set's order; the colours are those of the PASCAL VOC palette.
VOC9 = Labels(
    names=("background", "person", "aeroplane", "bus", "tv/monitor", "horse", "dog", "cat", "car"),
    colours=(
        (0, 0, 0),
        (192, 128, 128),
        (128, 0, 0),
        (0, 128, 128),
        (0, 64, 128),
        (192, 0, 128),
        (64, 0, 128),
        (64, 0, 0),
        (128, 128, 128),
    ),
)


# The eleven classes of the SegNet protocol on CamVid, with SegNet's colours.
CAMVID = Labels(
    names=(
        "sky",
        "building",
        "pole",
        "road",
        "pavement",
        "tree",
        "sign",
        "fence",
        "car",
        "pedestrian",
        "bicyclist",
    ),
    colours=(
        (128, 128, 128),
        (128, 0, 0),
        (192, 192, 128),
        (128, 64, 128),
        (60, 40, 222),
        (128, 128, 0),
        (192, 128, 128),
        (64, 64, 128),
        (64, 0, 128),
        (64, 64, 0),
        (0, 128, 192),
    ),
)


def default_colours(num_classes: int) -> tuple[Colour, ...]:
    """Colours that are easy to tell apart, each chosen as far as possible from all before it.

    Near-black and near-white are left out: the first is kept for the background, the second for ignored pixels.

    Args:
      num_classes: 1 to 255.

    Returns:
      `num_classes` different (red, green, blue), each 0..255; the first k do not depend on `num_classes`.

    Raises:
      ValueError: `num_classes` is outside 1..255.
    """
    if not 1 <= num_classes <= IGNORE_LABEL:
        raise ValueError(f"num_classes={num_classes} is outside 1..{IGNORE_LABEL} (labels are 8-bit, 255 is ignored)")
    return _spread_colours(num_classes, taken=())


def read_classes(path: str | os.PathLike) -> Labels:
    """Reads a `classes.txt`: a class per line, in label order, each a name and optionally a colour.

    A colour is `#rrggbb` or three integers `r g b` after the name; names may contain spaces. Blank lines and lines that
    start with `#` are skipped. A class without a colour gets one that differs from the others: black if it is the first
    and named background.

    Args:
      path: the file, UTF-8.

    Returns:
      The classes.

    Raises:
      ValueError: a line that cannot be a class, a repeated name, fewer than one or more than 255 classes.
    """
    try:
        lines = pathlib.Path(path).read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not a UTF-8 text file ({error.reason}): save it as UTF-8") from error
    line_of: dict[str, int] = {}
    colours: list[Colour | None] = []
    for number, line in enumerate(lines, start=1):
        where = f"{path}, line {number}"
        entry = _parse_line(line.strip(), where)
        if entry is None:
            continue
        name, colour = entry
        if name in line_of:
            raise ValueError(f"{where}: class {name!r} was already named in line {line_of[name]}: names must differ")
        line_of[name] = number
        colours.append(colour)
    if not 1 <= len(colours) <= IGNORE_LABEL:
        raise ValueError(
            f"{path}: {len(colours)} classes, but there must be 1 to {IGNORE_LABEL}: write a name per line"
        )
    return Labels(tuple(line_of), _complete_colours(tuple(line_of), colours))


def name_classes(num_classes: int) -> Labels:
    """Labels for classes of which only the number is known: `class 0`, `class 1`, ...

    Raises:
      ValueError: `num_classes` is outside 1..255.
    """
    colours = default_colours(num_classes)
    return Labels(tuple(f"class {k}" for k in range(num_classes)), colours)


def _parse_line(line: str, where: str) -> tuple[str, Colour | None] | None:
    """Splits a stripped line into name and colour; None for a line to skip."""
    # "#ff0000" alone is a colour whose name was forgotten: skipping it as a comment would shift all later classes.
    if not line or (line.startswith("#") and not re.fullmatch(r"#[0-9a-fA-F]{6}", line)):
        return None
    colour: Colour | None
    if match := re.fullmatch(r"(.*?)\s*#([0-9a-fA-F]{6})", line):
        red, green, blue = bytes.fromhex(match[2])
        name, colour = match[1], (red, green, blue)
    elif match := re.fullmatch(r"(.*?)\s*(?<!\S)(-?\d+)\s+(-?\d+)\s+(-?\d+)", line):
        name, colour = match[1], (int(match[2]), int(match[3]), int(match[4]))
    else:
        name, colour = line, None
    if not name:
        raise ValueError(f"{where}: the colour {line!r} has no name before it: write 'name {line}'")
    if colour is not None and not all(0 <= value <= 255 for value in colour):
        raise ValueError(f"{where}: colour {colour} is outside 0..255: write 'name r g b' or 'name #rrggbb'")
    if re.search(r"\s#", name):
        raise ValueError(
            f"{where}: {line!r} has a '#' that begins no colour:"
            " write 'name #rrggbb', and comments on lines of their own"
        )
    return name, colour


def _complete_colours(names: tuple[str, ...], colours: list[Colour | None]) -> tuple[Colour, ...]:
    """Gives every class without a colour one that no other class has."""
    if colours[0] is None and names[0].lower() == "background":
        colours = [(0, 0, 0), *colours[1:]]
    given = tuple(colour for colour in colours if colour is not None)
    spread = iter(_spread_colours(len(colours) - len(given), taken=given) if len(given) < len(colours) else ())
    return tuple(next(spread) if colour is None else colour for colour in colours)


def _spread_colours(count: int, taken: tuple[Colour, ...]) -> tuple[Colour, ...]:
    """Chooses `count` colours, each the candidate farthest from `taken` and from those already chosen."""
    levels = np.linspace(0, 255, 10).round().astype(int)
    candidates = np.stack(np.meshgrid(levels, levels, levels, indexing="ij"), axis=-1).reshape(-1, 3)
    space = _oklab(candidates)
    usable = (space[:, 0] > 0.4) & (space[:, 0] < 0.92)
    candidates, space = candidates[usable], space[usable]
    distance = np.full(len(candidates), np.inf)
    for colour in taken:
        distance = np.minimum(distance, np.linalg.norm(space - _oklab(np.array(colour)), axis=-1))
    chosen: list[Colour] = []
    # With nothing to keep away from, any start will do: the blue nearest to that of many charts.
    best = int(distance.argmax()) if taken else int(np.abs(candidates - (28, 113, 198)).sum(axis=-1).argmin())
    for _ in range(count):
        red, green, blue = candidates[best].tolist()
        chosen.append((red, green, blue))
        distance = np.minimum(distance, np.linalg.norm(space - space[best], axis=-1))
        best = int(distance.argmax())
    return tuple(chosen)


def _oklab(colours: np.ndarray) -> np.ndarray:
    """Maps sRGB, (..., 3) in 0..255, to OKLab (lightness 0..1, a, b), where distance is about what the eye sees.

    Source: B. Ottosson, "A perceptual color space for image processing", 2020.
    """
    srgb = np.asarray(colours) / 255.0
    linear = np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)
    cones = np.array(
        [
            [0.4122214708, 0.5363325363, 0.0514459929],
            [0.2119034982, 0.6806995451, 0.1073969566],
            [0.0883024619, 0.2817188376, 0.6299787005],
        ]
    )
    opponents = np.array(
        [
            [0.2104542553, 0.7936177850, -0.0040720468],
            [1.9779984951, -2.4285922050, 0.4505937099],
            [0.0259040371, 0.7827717662, -0.8086757660],
        ]
    )
    return np.cbrt(linear @ cones.T) @ opponents.T
