"""The embedded data set: still lifes of eight kinds of object, rendered from a seed with NumPy and Pillow.

A scene has two to five large objects that hide parts of each other, lit from one side, over cluttered textured
backgrounds. A kind leans towards a hue but may have any, and the backgrounds' palettes are drawn from those of all
kinds, so that a pixel's colour says little about its class: a classifier has to see texture and outline. `target` and
`lollipop` differ in that rings close and a spiral doesn't.

Lengths in this module are in units of the image's height unless they say pixels; x points right, y down.
"""

import dataclasses
import io
import math
import pathlib
import typing
from collections.abc import Callable, Iterator

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image, ImageDraw, ImageFilter
from tqdm import tqdm

from jaxseg.data.images import encode_png
from jaxseg.data.labels import IGNORE_LABEL
from jaxseg.data.records import LocalInfo, RecordSource, prepare

NAMES = (
    "background",
    "beach ball",
    "target",
    "lollipop",
    "toadstool",
    "cushion",
    "sunflower",
    "fish",
    "starfish",
)
# How often an object is of each kind; the rarest is met half as often as the most frequent.
FREQUENCIES = np.array([0.18, 0.14, 0.10, 0.14, 0.11, 0.12, 0.12, 0.09])
# The hue each kind leans to, in turns from red through green and blue, and how often it follows it.
_HUES = (0.62, 0.0, 0.88, 0.06, 0.36, 0.14, 0.5, 0.75)
_HUE_TENDENCY = 0.9
SPLITS = ("train", "val", "test")
# A scene is painted this many times larger in each direction, then averaged.
_OVERSAMPLING = 2


def _draw_palette(rng: np.random.Generator, kind: int | None = None) -> np.ndarray:
    """Draws a light, a dark and an accent colour: (3, 3) float32 in [0, 1].

    A kind leans towards a hue but may have any. Without a kind (for what belongs to the background) one is drawn by
    its frequency: palettes have the same distribution on objects and behind them.
    """
    if kind is None:
        kind = rng.choice(len(_HUES), p=FREQUENCIES)
    hue = rng.normal(_HUES[kind], 0.06) if rng.uniform() < _HUE_TENDENCY else rng.uniform()
    hues = hue + rng.choice([0.0, 0.5, 0.35]) * np.array([0, 1, 0.5]) + rng.normal(0, 0.03, 3)
    saturation = rng.uniform(0.35, 0.8, 3)
    value = np.array([rng.uniform(0.8, 1.0), rng.uniform(0.15, 0.4), rng.uniform(0.4, 0.8)])
    # HSV to RGB: each channel is a clipped triangle wave of the hue.
    wave = np.clip(np.abs((hues[:, None] + np.array([0, 2 / 3, 1 / 3])) % 1 * 6 - 3) - 1, 0, 1)
    return (value[:, None] * (1 - saturation[:, None] * (1 - wave))).astype(np.float32)


def _draw_noise(rng: np.random.Generator, shape: tuple[int, int], cells: float) -> np.ndarray:
    """Smooth noise (H, W) float32 in about [0, 1], with `cells` bumps along the height."""
    height, width = shape
    grid = rng.uniform(size=(max(2, round(cells)), max(2, round(cells * width / height)))).astype(np.float32)
    return np.asarray(Image.fromarray(grid).resize((width, height), Image.Resampling.BICUBIC))


def _mix(first: np.ndarray, second: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Colours (H, W, 3) that go from `first` to `second` as `weight` (H, W) goes from 0 to 1."""
    weight = np.clip(weight, 0, 1).astype(np.float32)[..., None]
    return first + (second - first) * weight


def _ramp(distance: np.ndarray, width: float = 0.06) -> np.ndarray:
    """A soft step: 0 below -width/2, 1 above width/2, a straight line between."""
    return np.clip(distance / width + 0.5, 0, 1)


# --- The eight kinds --------------------------------------------------------------------------------------------------
# Each takes coordinates x, y (H, W) in which the object fills about the unit disc, a palette (3, 3), and a generator,
# and gives its outline (H, W) bool, its colours (H, W, 3) in [0, 1] and its height towards the viewer (H, W).

Surface = tuple[np.ndarray, np.ndarray, np.ndarray]


def _dome(squared_radius: np.ndarray, flatness: float = 2.0) -> np.ndarray:
    """The height of a sphere's cap (a larger flatness makes a flatter top)."""
    return np.clip(1 - squared_radius ** (flatness / 2), 0, 1) ** 0.5


def _paint_beach_ball(x: np.ndarray, y: np.ndarray, ink: np.ndarray, rng: np.random.Generator) -> Surface:
    """Six panels that meet at a pole turned towards the viewer, with a round cap on it."""
    height = _dome(x * x + y * y)
    tilt = rng.uniform(0.35, 0.75)
    sine, cosine = math.sin(tilt), math.cos(tilt)
    pole_y, pole_z = y * cosine - height * sine, y * sine + height * cosine
    panel = np.sin(3 * np.arctan2(x, pole_y))
    colours = _mix(ink[0], ink[1], _ramp(panel, 0.25))
    return x * x + y * y < 1, _mix(colours, ink[2], _ramp(pole_z - 0.95, 0.02)), height


def _paint_target(x: np.ndarray, y: np.ndarray, ink: np.ndarray, rng: np.random.Generator) -> Surface:
    """Closed concentric rings on a flat disc with a raised rim."""
    radius = np.hypot(x, y)
    rings = np.sin(2 * np.pi * radius * rng.uniform(1.9, 2.2) + np.pi / 2)
    height = 0.25 * _dome(radius**2, 16) + 0.06 * _ramp(radius - 0.86, 0.1)
    return radius < 1, _mix(ink[0], ink[1], _ramp(rings, 0.5)), height


def _paint_lollipop(x: np.ndarray, y: np.ndarray, ink: np.ndarray, rng: np.random.Generator) -> Surface:
    """A two-armed spiral on a sugar disc, with a stick."""
    disc_y = (y + 0.2) / 0.8
    disc_x = x / 0.8
    radius = np.hypot(disc_x, disc_y)
    turn = np.arctan2(disc_y, disc_x)
    spiral = np.sin(2 * turn + 2 * np.pi * radius * rng.uniform(1.1, 1.3))
    disc = radius < 1
    stick = (np.abs(x) < 0.1) & (y > 0) & (y < 1.1)
    colours = np.where(disc[..., None], _mix(ink[0], ink[1], _ramp(spiral, 0.5)), ink[0])
    height = np.where(disc, 0.5 * _dome(radius**2, 4) + 0.03 * np.cos(2 * spiral), _dome((x / 0.1) ** 2) * 0.1)
    return disc | stick, colours, height


def _paint_toadstool(x: np.ndarray, y: np.ndarray, ink: np.ndarray, rng: np.random.Generator) -> Surface:
    """A spotted cap on a thick stem."""
    cap_y = (y - 0.2) / 1.1
    cap_radius = x * x + cap_y * cap_y
    cap = (cap_radius < 1) & (cap_y < 0.16 * (1 - x * x))
    half_width = 0.3 + 0.16 * np.clip(y, 0, 1) ** 2
    stem = (np.abs(x) < half_width) & (y > 0) & (y < 0.95 - 0.2 * (x / 0.45) ** 2)
    spots = np.array([(-0.66, -0.1), (-0.34, -0.52), (-0.12, -0.05), (0.2, -0.6), (0.4, -0.15), (0.76, 0.02)])
    spots = (spots + rng.normal(0, 0.04, spots.shape)).tolist()
    sizes = rng.uniform(0.12, 0.2, len(spots)).tolist()
    nearest = np.min([np.hypot(x - sx, y - sy) - size for (sx, sy), size in zip(spots, sizes, strict=True)], axis=0)
    skin = _mix(ink[0], ink[1], _ramp(nearest))
    flesh = _mix(ink[0], ink[1], 0.35 * _ramp(np.sin(28 * x / half_width * 0.3), 1.5) + 0.5 * _ramp(0.3 - y, 0.2))
    height = np.where(cap, 0.3 + 0.7 * _dome(np.clip(cap_radius, 0, 1)), 0.3 * _dome((x / half_width) ** 2))
    return cap | stem, np.where(cap[..., None], skin, flesh), height - 0.05 * _ramp(nearest) * cap


def _paint_cushion(x: np.ndarray, y: np.ndarray, ink: np.ndarray, rng: np.random.Generator) -> Surface:
    """A chequered square, its corners drawn out and its middle puffed up."""
    pinch = 0.13
    side_x, side_y = x * (1 + pinch * (1 - y * y)) / 0.86, y * (1 + pinch * (1 - x * x)) / 0.86
    inside = np.maximum(np.abs(side_x), np.abs(side_y)) < 1
    squares = int(rng.integers(3, 5)) / 2
    chequers = np.sin(np.pi * side_x * squares) * np.sin(np.pi * side_y * squares)
    height = 0.6 * np.sqrt(np.clip((1 - side_x**2) * (1 - side_y**2), 0, 1))
    return inside, _mix(ink[0], ink[1], _ramp(chequers, 0.2)), height + 0.05 * np.abs(chequers)


def _paint_sunflower(x: np.ndarray, y: np.ndarray, ink: np.ndarray, rng: np.random.Generator) -> Surface:
    """Long petals around a dotted centre."""
    radius, turn = np.hypot(x, y), np.arctan2(y, x)
    petals = int(rng.integers(9, 13))
    ridge = np.abs(np.cos(petals * turn / 2))
    centre = radius < 0.42
    dots = np.sin(34 * x * 0.6) * np.sin(34 * y * 0.6)
    petal = _mix(ink[2] * 0.5, ink[0], _ramp(ridge - 0.35, 0.4))
    seeds = _mix(ink[1] * 0.6, ink[2], _ramp(np.abs(dots) - 0.45, 0.3))
    height = np.where(centre, 0.3 + 0.2 * _dome((radius / 0.42) ** 2), 0.25 * ridge + 0.15 * radius)
    return radius < 0.74 + 0.26 * ridge**0.7, np.where(centre[..., None], seeds, petal), height


def _paint_fish(x: np.ndarray, y: np.ndarray, ink: np.ndarray, rng: np.random.Generator) -> Surface:
    """A round body with broad bars, a plain head with an eye, a striped tail."""
    body_x = (x - 0.2) / 0.8
    body_radius = body_x**2 + (y / 0.62) ** 2
    body = body_radius < 1
    tail = (x < -0.3) & (x > -1 + 0.25 * np.cos(3 * y)) & (np.abs(y) < 0.12 + 0.85 * np.clip(-0.4 - x, 0, 1))
    fin = (y < 0) & (np.abs(x - 0.05) < 0.42) & (y > -0.62 - 0.24 * np.cos((x - 0.05) * 3.4))
    colours = _mix(ink[0], ink[1], _ramp(np.sin(11 * (x + 0.12 * y * y)), 0.5))
    stripes = _mix(ink[1], ink[2], _ramp(np.sin(16 * (np.abs(y) - 0.5 * x)), 0.8))
    colours = np.where(body[..., None], colours, stripes)
    head = _mix(ink[2], ink[1], _ramp(0.045 - np.abs(np.hypot(x - 1.1, y) - 0.66), 0.05))
    colours = np.where((body & (np.hypot(x - 1.1, y) < 0.7))[..., None], head, colours)
    eye = np.hypot(x - 0.68, y + 0.12)
    colours = np.where((eye < 0.15)[..., None], np.where(eye[..., None] < 0.08, 0.05, 0.97), colours)
    return body | tail | fin, colours, np.where(body, 0.6 * _dome(np.clip(body_radius, 0, 1)), 0.05)


def _paint_starfish(x: np.ndarray, y: np.ndarray, ink: np.ndarray, rng: np.random.Generator) -> Surface:
    """Five thick arms studded with bumps."""
    radius, turn = np.hypot(x, y), np.arctan2(x, -y)
    arm = 0.5 + 0.5 * np.cos(5 * turn)
    edge = 0.56 + 0.46 * arm**1.3
    # A row of studs runs along each arm.
    away = (turn + np.pi / 5) % (2 * np.pi / 5) - np.pi / 5
    stud = np.hypot((radius * np.cos(away) * 4.2) % 1 - 0.5, radius * np.sin(away) * 4.2)
    bumps = _ramp(0.34 - stud, 0.2)
    colours = _mix(_mix(ink[1], ink[2], _ramp(edge - radius - 0.1, 0.2)), ink[0], bumps)
    height = 0.5 * np.sqrt(np.clip(1 - radius / edge, 0, 1)) + 0.08 * bumps
    return radius < edge, colours, height


@dataclasses.dataclass(frozen=True)
class _Kind:
    """One kind of object: how to paint it, how far it may turn (radians), and how strongly it shines."""

    paint: Callable[[np.ndarray, np.ndarray, np.ndarray, np.random.Generator], Surface]
    turn: float
    gloss: float


# In the order of NAMES[1:].
_KINDS = (
    _Kind(_paint_beach_ball, 0.5, 0.5),
    _Kind(_paint_target, 0.3, 0.1),
    _Kind(_paint_lollipop, 0.3, 0.4),
    _Kind(_paint_toadstool, 0.3, 0.25),
    _Kind(_paint_cushion, 0.35, 0.05),
    _Kind(_paint_sunflower, 0.4, 0.0),
    _Kind(_paint_fish, 0.3, 0.35),
    _Kind(_paint_starfish, 0.4, 0.1),
)


# --- Backgrounds ------------------------------------------------------------------------------------------------------


def _rotate(x: np.ndarray, y: np.ndarray, angle: float) -> tuple[np.ndarray, np.ndarray]:
    """The coordinates (x, y) along axes turned by `angle` radians."""
    # Python's floats, unlike NumPy's, leave float32 arrays float32.
    sine, cosine = math.sin(angle), math.cos(angle)
    return x * cosine + y * sine, y * cosine - x * sine


def _nearest_point(x: np.ndarray, y: np.ndarray, cells: float, rng: np.random.Generator) -> np.ndarray:
    """The distance in cells to the nearest of many points, one at random in each of `cells` cells along the height."""
    column, row = (x * cells).astype(np.int32), (y * cells).astype(np.int32)
    points = rng.uniform(0, 1, (row.max() + 3, column.max() + 3, 2)).astype(np.float32)
    distance = np.full(x.shape, 9, np.float32)
    for below in range(3):
        for right in range(3):  # the pixel's own cell is the middle one of nine
            point = points[row + below, column + right]
            away_x, away_y = x * cells - (column + right - 1), y * cells - (row + below - 1)
            np.minimum(distance, (away_x - point[..., 0]) ** 2 + (away_y - point[..., 1]) ** 2, out=distance)
    return np.sqrt(distance)


def _draw_texture(x: np.ndarray, y: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """One of five materials, (H, W) in about [0, 1]: wood, cloth, pebbles, marble, sand."""
    noise = _draw_noise(rng, x.shape, 6)
    turn = rng.uniform(-0.6, 0.6)
    along, across = _rotate(x, y, turn)
    material = rng.integers(5)
    if material == 0:  # wood: planks with a grain along them
        plank = np.floor(across * 5)
        grain = 0.5 + 0.5 * np.sin(across * 70 + 8 * noise + 2 * np.sin(along * 3 + plank * 2.1))
        return 0.25 + 0.25 * grain + 0.3 * (np.sin(plank * 12.9) % 1) - 0.5 * (across * 5 - plank < 0.07)
    if material == 1:  # cloth: two sets of threads, one over the other
        threads = np.sin(along * 95) * (np.sin(across * 12) > 0) + np.sin(across * 95) * (np.sin(along * 12) > 0)
        return 0.5 + 0.17 * threads + 0.3 * (noise - 0.5)
    if material == 2:  # pebbles: the distance to the nearest of many points
        # It is smooth, so half the resolution does, in a quarter of the time.
        points = Image.fromarray(_nearest_point(x[::2, ::2], y[::2, ::2], rng.uniform(6, 10), rng))
        distance = np.asarray(points.resize(x.shape[::-1], Image.Resampling.BICUBIC))
        return 0.85 - 0.7 * distance + 0.3 * (noise - 0.5)
    if material == 3:  # marble: veins bent by noise
        return 0.3 + 0.5 * np.abs(np.sin(along * 9 + 9 * noise + 4 * _draw_noise(rng, x.shape, 14)))
    return 0.5 + 0.25 * np.sin(across * 45 + 14 * noise) + 0.25 * (_draw_noise(rng, x.shape, 40) - 0.5)


def _draw_litter(canvas: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Scatters brush strokes and paper scraps, which belong to the background, over `canvas` (H, W, 3) in [0, 1]."""
    height, width, _ = canvas.shape
    picture = Image.fromarray((np.clip(canvas, 0, 1) * 255).astype(np.uint8))
    pen = ImageDraw.Draw(picture)
    for _ in range(rng.integers(4, 10)):
        colour = tuple(int(c * 255) for c in _draw_palette(rng)[2])
        middle = rng.uniform(0, 1, 2) * (width, height)
        if rng.uniform() < 0.6:  # a stroke: a wandering line
            steps = rng.normal(0, 0.09 * height, 2) + rng.normal(0, 0.035 * height, (6, 2))
            points = [tuple(point) for point in (middle + np.cumsum(steps, axis=0)).tolist()]
            pen.line(points, fill=colour, width=max(1, round(rng.uniform(0.01, 0.035) * height)), joint="curve")
        else:  # a scrap: a triangle or a quadrangle
            angles = np.sort(rng.uniform(0, 2 * np.pi, rng.integers(3, 5)))
            corners = middle + np.stack([np.cos(angles), np.sin(angles)], 1) * rng.uniform(0.05, 0.13) * height
            pen.polygon([tuple(corner) for corner in corners.tolist()], fill=colour)
    return np.asarray(picture, np.float32) / 255


def _draw_background(x: np.ndarray, y: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A wall and a floor of different materials, littered: (H, W, 3) in [0, 1]."""
    surfaces = []
    for _ in range(2):
        ink = _draw_palette(rng)
        # Softer than the objects' patterns, so that these stand out.
        surfaces.append(_mix(ink[0], ink[1], 0.3 + 0.4 * _draw_texture(x, y, rng)))
    horizon = rng.uniform(0.2, 0.8) + rng.uniform(-0.3, 0.3) * (x - 0.6) + 0.03 * np.sin(x * rng.uniform(3, 12))
    return _draw_litter(_mix(surfaces[0], surfaces[1], _ramp(y - horizon, 0.02)), rng)


# --- The scene --------------------------------------------------------------------------------------------------------


def _place_objects(rng: np.random.Generator, aspect: float) -> list[tuple[int, float, float, float]]:
    """Draws the objects of a scene, the farthest first: (kind, x, y, radius), spread out but overlapping."""
    count = rng.choice([2, 3, 4, 5], p=[0.3, 0.4, 0.2, 0.1])
    largest = {2: 0.4, 3: 0.38, 4: 0.34, 5: 0.31}[int(count)]
    placed: list[tuple[int, float, float, float]] = []
    for _ in range(count):
        kind, radius = int(rng.choice(len(_KINDS), p=FREQUENCIES)), rng.uniform(largest - 0.1, largest)
        # Of several places, the one farthest from the others: they overlap, but few are hidden.
        places = rng.uniform(0.15, 0.85, (5, 2)) * (aspect, 1)
        gaps = [
            min([np.hypot(px - ox, py - oy) / (radius + r) for _, ox, oy, r in placed], default=0) for px, py in places
        ]
        place_x, place_y = places[int(np.argmax(gaps))]
        placed.append((kind, float(place_x), float(place_y), radius))
    return sorted(placed, key=lambda item: item[2] + item[3])


def _blur(mask: np.ndarray, radius: float) -> np.ndarray:
    """Blurs a mask (H, W) in [0, 1]; the radius is in pixels."""
    picture = Image.fromarray((mask * 255).astype(np.uint8)).filter(ImageFilter.GaussianBlur(radius))
    return np.asarray(picture, np.float32) / 255


def _light(colours: np.ndarray, height: np.ndarray, pitch: float, light: np.ndarray, gloss: float) -> np.ndarray:
    """Shades colours (H, W, 3) by the slope of `height` (H, W), whose samples are `pitch` apart.

    `light` is a unit vector (3,) towards the lamp; `gloss` is the brightness of its reflection.
    """
    slope_y, slope_x = np.gradient(height, pitch)
    normal = np.stack([-slope_x, -slope_y, np.ones_like(height)], -1)
    normal /= np.linalg.norm(normal, axis=-1, keepdims=True)
    half = light + np.array([0, 0, 1], np.float32)
    shine = np.clip(normal @ (half / np.linalg.norm(half)), 0, 1) ** 24
    return colours * (0.42 + 0.75 * np.clip(normal @ light, 0, 1))[..., None] + gloss * shine[..., None]


def _add_object(
    canvas: np.ndarray,
    owner: np.ndarray,
    number: int,
    item: tuple[int, float, float, float],
    light: np.ndarray,
    rng: np.random.Generator,
) -> None:
    """Paints one object and its shadow onto `canvas` (H, W, 3) and its number onto `owner` (H, W), both in place."""
    kind, centre_x, centre_y, radius = item
    height, width = owner.shape
    look = _KINDS[kind]
    # Only the window around the object is painted; the shadow needs some room.
    reach = 1.5 * radius
    top, bottom = max(0, int((centre_y - reach) * height)), min(height, int((centre_y + reach) * height) + 1)
    left, right = max(0, int((centre_x - reach) * height)), min(width, int((centre_x + reach) * height) + 1)
    rows, columns = np.mgrid[top:bottom, left:right].astype(np.float32)
    away_x, away_y = ((columns + 0.5) / height - centre_x) / radius, ((rows + 0.5) / height - centre_y) / radius
    x, y = _rotate(away_x, away_y, rng.uniform(-look.turn, look.turn))
    # Some are mirrored, all are a little narrower than high.
    x = x / (rng.uniform(0.88, 1.0) * (1 if rng.uniform() < 0.5 else -1))
    inside, colours, relief = look.paint(x, y, _draw_palette(rng, kind), rng)

    window, owners = canvas[top:bottom, left:right], owner[top:bottom, left:right]
    # The shadow falls away from the lamp; the margin keeps it from wrapping round the window.
    margin = int(radius * height)
    shift_x, shift_y = np.rint(-0.16 * margin * light[:2] / light[2]).astype(int).tolist()
    shadow = _blur(np.pad(inside, margin), 0.09 * margin)
    shadow = shadow[margin - shift_y :, margin - shift_x :][: inside.shape[0], : inside.shape[1]]
    window *= 1 - 0.55 * shadow[..., None]
    lit = _light(colours, relief, 1 / (radius * height), light, look.gloss)
    window[inside] = lit[inside]
    owners[inside] = number


def _draw_light(rng: np.random.Generator) -> np.ndarray:
    """A unit vector (3,) towards a lamp above the scene and in front of it."""
    angle, elevation = rng.uniform(-0.85, -0.15) * np.pi, rng.uniform(0.75, 1.05)
    return np.array(
        [np.cos(angle) * np.cos(elevation), np.sin(angle) * np.cos(elevation), np.sin(elevation)], np.float32
    )


def _label_pixels(owner: np.ndarray, kinds: np.ndarray) -> np.ndarray:
    """Turns object numbers (H, W) into labels (H, W) uint8, void where a neighbour belongs to another object."""
    label = kinds[owner].astype(np.uint8)
    down, right = owner[1:] != owner[:-1], owner[:, 1:] != owner[:, :-1]
    label[1:][down] = label[:-1][down] = IGNORE_LABEL
    label[:, 1:][right] = label[:, :-1][right] = IGNORE_LABEL
    return label


def render_scene(
    seed: int | list[int] | np.random.Generator, height: int = 96, width: int = 128
) -> tuple[np.ndarray, np.ndarray]:
    """Renders one scene; equal seeds give equal bytes.

    Args:
      seed: what `np.random.default_rng` takes, or a generator, which is then advanced.
      height: pixels, at least 32.
      width: pixels, at least 32.

    Returns:
      The image (height, width, 3) uint8 and its label (height, width) uint8: indices into NAMES, or 255 along the
      objects' outlines.

    Raises:
      ValueError: a side is below 32 pixels.
    """
    if min(height, width) < 32:
        raise ValueError(f"a scene of {height}x{width} pixels is too small: give at least 32x32")
    rng = np.random.default_rng(seed)
    fine_height, fine_width = height * _OVERSAMPLING, width * _OVERSAMPLING
    y, x = (np.mgrid[:fine_height, :fine_width].astype(np.float32) + 0.5) / fine_height
    light = _draw_light(rng)
    canvas = _draw_background(x, y, rng)
    owner = np.zeros((fine_height, fine_width), np.uint8)
    items = _place_objects(rng, width / height)
    for number, item in enumerate(items, start=1):
        _add_object(canvas, owner, number, item, light, rng)
    # The lamp's side is brighter, and the sensor adds some noise.
    canvas *= (0.95 + 0.25 * (light[0] * (x - x.mean()) + light[1] * (y - 0.5)))[..., None]
    image = canvas.reshape(height, _OVERSAMPLING, width, _OVERSAMPLING, 3).mean((1, 3))
    image += rng.normal(0, 0.012, image.shape)
    kinds = np.array([0] + [item[0] + 1 for item in items])
    label = _label_pixels(owner[_OVERSAMPLING // 2 :: _OVERSAMPLING, _OVERSAMPLING // 2 :: _OVERSAMPLING], kinds)
    return np.rint(np.clip(image, 0, 1) * 255).astype(np.uint8), label


# --- The data set -----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(kw_only=True)
class ShapesConfig(tfds.core.BuilderConfig):
    """How many scenes of what size. Everything that changes the data is in `name`, which is a folder on disk.

    Attributes:
      counts: scenes in train, val and test.
      height: pixels.
      width: pixels.
    """

    counts: tuple[int, int, int] = (800, 100, 100)
    height: int = 96
    width: int = 128
    name: str = ""

    def __post_init__(self):
        """Names the configuration after what it holds, so that no other data is taken for it."""
        self.name = f"{self.height}x{self.width}_{'_'.join(map(str, self.counts))}"


# For a trial: rendered in a moment, too few to learn much from.
SMALL = ShapesConfig(counts=(64, 16, 16), height=64, width=96)


class Shapes(tfds.core.GeneratorBasedBuilder):
    """The scenes as a TFDS data set named `shapes`, in array_record files; needs no TensorFlow."""

    VERSION = tfds.core.Version("2.1.0")
    RELEASE_NOTES: typing.ClassVar = {
        "1.0.0": "First scenes: eight kinds of object.",
        "2.0.0": "Larger objects with bolder patterns, softer backgrounds, kinds that lean towards a hue.",
        "2.1.0": "Stronger colours; kinds follow their hue more often.",
    }
    BUILDER_CONFIGS: typing.ClassVar = [ShapesConfig()]

    def __init__(self, *, progress: bool = False, **kwargs: object):
        self._progress = progress
        # TFDS would otherwise choose tfrecord, which only TensorFlow can write.
        super().__init__(file_format="array_record", **kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        """The features: encoded images, whose label has values as `render_scene` gives them."""
        shape = (self.builder_config.height, self.builder_config.width)
        features = {
            "image": tfds.features.Image(shape=(*shape, 3), encoding_format="png"),
            "label": tfds.features.Image(shape=(*shape, 1), encoding_format="png"),
            "name": tfds.features.Text(),
        }
        return LocalInfo(
            builder=self, description=__doc__, features=tfds.features.FeaturesDict(features), disable_shuffling=True
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator]:
        """One generator per split; nothing is downloaded."""
        counts = zip(SPLITS, self.builder_config.counts, strict=True)
        return {split: self._generate_examples(split, count) for split, count in counts}

    def _generate_examples(self, split: str, count: int) -> Iterator[tuple[int, dict]]:
        """Renders scene after scene; each is a function of its split and its index alone."""
        config = self.builder_config

        def png(pixels: np.ndarray) -> io.BytesIO:
            return io.BytesIO(encode_png(pixels))

        for index in tqdm(range(count), f"rendering {split}", unit="img", disable=not self._progress or None):
            image, label = render_scene([SPLITS.index(split), index], config.height, config.width)
            example = {"image": png(image), "label": png(label), "name": f"{split}_{index:04d}"}
            yield index, example


def open_shapes(
    data_dir: str | pathlib.Path, config: ShapesConfig | None = None, progress: bool = True
) -> dict[str, RecordSource]:
    """Opens the data set, rendering it first if it is not in `data_dir`.

    The files appear under their final name only once all are complete: a rerun after an interruption renders anew.

    Args:
      data_dir: a folder, created if need be; everything is written below it.
      config: how many scenes of what size; None for `ShapesConfig()`.
      progress: show a bar while rendering, if the standard error is a terminal.

    Returns:
      The sources of "train", "val" and "test".

    Raises:
      NotADirectoryError: `data_dir` is a file.
    """
    config = config or ShapesConfig()
    # TFDS insists on its own object for a configuration it knows.
    config = Shapes.builder_configs.get(config.name, config)
    builder, _ = prepare(lambda: Shapes(data_dir=data_dir, config=config, progress=progress), pathlib.Path(data_dir))
    return {split: RecordSource(builder, split) for split in SPLITS}
