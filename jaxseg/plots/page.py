"""The page that every figure is drawn on: style, and matplotlib's object-oriented API without pyplot.

No window, no global state: a figure is a function of its arguments and nothing stays open. Figures are laid out in
inches on one page coordinate system (origin at the top left, y downwards), because text that has to fit is measured in
inches.
"""

import pathlib
from typing import Any

import matplotlib.axes
import matplotlib.font_manager
from matplotlib.backends.backend_agg import FigureCanvasAgg, RendererAgg
from matplotlib.figure import Figure, SubFigure

from jaxseg.files import replacing

# The style of every figure. Lines are blue and vermilion of Okabe and Ito, which differ for colour-blind readers and in
# print; everything that is not data is a shade of grey.
DPI = 200
PAGE_WIDTH = 7.2  # inches: the width of a printed A4 page's text, a little more
TITLE_SIZE, TEXT_SIZE, SMALL_SIZE = 10.0, 8.0, 7.0  # points
BLUE, VERMILION = "#0072B2", "#D55E00"
INK, MUTED, FAINT = "#222222", "#666666", "#DDDDDD"
LUMA = (0.299, 0.587, 0.114)  # the brightness of R, G and B (ITU-R BT.601)
MAX_ROW_HEIGHT = 2.6  # inches; a portrait photograph is made narrower than its column rather than higher than this


def new_figure(width: float, height: float) -> Figure:
    """A white figure of that many inches that draws itself with Agg."""
    figure = Figure(figsize=(width, height), dpi=DPI, facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def new_page(width: float, height: float) -> matplotlib.axes.Axes:
    """Axes that fill a new figure and whose data coordinates are inches from its top left corner."""
    page = new_figure(width, height).add_axes((0, 0, 1, 1))
    page.set(xlim=(0, width), ylim=(height, 0))
    page.set_axis_off()
    # Nothing that is drawn later may move the page's limits.
    page.set_autoscale_on(False)
    return page


def save(figure: Figure | SubFigure, path: pathlib.Path) -> None:
    """Writes a figure; raises OSError, and keeps what was there, if it cannot."""
    with replacing(path) as new:
        figure.canvas.print_figure(new, dpi=DPI)


def write(parent: matplotlib.axes.Axes | Figure, x: float, y: float, text: str, size: float, **style: Any) -> None:
    """Writes a text as it is: a dollar sign in a class name starts no formula."""
    options: dict[str, Any] = {"fontsize": size, "color": INK, "parse_math": False} | style
    parent.text(x, y, text, **options)


def text_width(text: str, size: float, weight: str = "normal") -> float:
    """The width in inches of a line of text of that many points."""
    font = matplotlib.font_manager.FontProperties(size=size, weight=weight)
    return RendererAgg(1, 1, DPI).get_text_width_height_descent(text, font, False)[0] / DPI


def shorten(name: str, length: int = 28) -> str:
    """The name, or its start and an ellipsis."""
    return name if len(name) <= length else f"{name[: length - 1].rstrip()}…"


def fit(text: str, width: float, size: float, weight: str = "normal") -> str:
    """The text, or so much of its start, and an ellipsis, as that many inches hold."""
    length = len(text)
    while length > 1 and text_width(shorten(text, length), size, weight) > width:
        length -= 1
    return shorten(text, length)


def wrap(text: str, width: float, size: float) -> list[str]:
    """Breaks a text at spaces into lines of at most that many inches (a longer word stays whole)."""
    lines: list[str] = []
    for word in text.split(" "):
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and text_width(longer, size) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines
