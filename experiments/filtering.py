"""Filters a photograph and draws the report's figures 24 to 26: Gaussian blur, derivatives, gradient magnitude."""

import dataclasses
import json
import math
import pathlib
import sys
from typing import Annotated, Any

import tyro

from experiments.arguments import quick_arguments
from jaxseg.files import replacing

# The file of each of the report's figures.
FIGURES = {24: "24_blur.png", 25: "25_derivatives.png", 26: "26_magnitude.png"}
# What they were made of, and what there is to say of them: {"settings": {option: value, ...}, "image": ..., "texts":
# {number: ...}}.
RECORD = "filtering.json"
# Taps of a kernel: beyond, it would be larger than most photographs.
MAX_SIZE = 1001


@dataclasses.dataclass(frozen=True)
@quick_arguments
class Settings:
    """Settings of the filtering."""

    image: Annotated[tyro.conf.Positional[pathlib.Path | None], tyro.conf.arg(metavar="[IMAGE]")] = None
    """A JPEG or PNG photograph; the portrait that matplotlib ships if it is not given."""
    size: int = 3
    """Rows and columns of the report's Gaussian kernel, odd."""
    sigma: float = 1 / (2 * math.log(2))
    """Its standard deviation in pixels; by default the report's, 1 / (2 ln 2)."""
    more_sigmas: tuple[float, ...] = (2.0, 4.0)
    """Standard deviations of further blurs, in pixels, three at most; their kernels reach three times that far."""
    border: str = "symmetric"
    """How the image goes on beyond its edge: symmetric (b a | a b), reflect (c b | a b), edge (a a | a b), wrap or
    constant (0 0 | a b); named as in NumPy."""
    output: pathlib.Path = pathlib.Path("runs/filtering")
    """Folder for the figures; those of an earlier call are replaced."""


@dataclasses.dataclass(frozen=True)
class Filtered:
    """What the figures show, on a scale of 0 to 255.

    Attributes:
      image: (H, W, 3) uint8 RGB.
      names: of the blurs, such as '3x3, σ = 0.72'.
      blurred: (H, W, 3) float32 for each name.
      i_x: (H, W) float32, of the brightness.
      i_y: the same down the columns.
      magnitude: (H, W) float32, without blur.
      blurred_magnitudes: the same after each blur.
    """

    image: Any
    names: list[str]
    blurred: list[Any]
    i_x: Any
    i_y: Any
    magnitude: Any
    blurred_magnitudes: list[Any]


def main(argv: list[str] | None = None) -> int:
    """Runs the experiment with the given arguments, or the command line's; returns the exit code."""
    settings = tyro.cli(Settings, prog="python -m experiments.filtering", description=__doc__, args=argv)
    try:
        run(settings)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def run(settings: Settings) -> None:
    """Reads, filters, draws and explains.

    Raises:
      ValueError: the image cannot be read, or a value is out of range.
      OSError: the figures cannot be written.
    """
    # Imported only now: jax takes seconds, and --help must not wait for it.
    from jaxseg import plots
    from jaxseg.data.images import read_image

    if len(settings.more_sigmas) > 3:
        raise ValueError(f"--more-sigmas takes at most 3 values, not {len(settings.more_sigmas)}")
    for size, sigma in _gaussians(settings):
        if size > MAX_SIZE:
            raise ValueError(f"the kernel of sigma {sigma:g} would have {size} taps: {MAX_SIZE} are the most")
    if settings.output.exists() and not settings.output.is_dir():
        raise ValueError(f"--output {settings.output} is a file: name a folder")
    path = plots.sample_photograph() if settings.image is None else settings.image
    filtered = apply_filters(read_image(path), settings)
    settings.output.mkdir(parents=True, exist_ok=True)
    draw(filtered, settings.output)
    height, width = filtered.image.shape[:2]
    what = f"{path}: {width}x{height} pixels (width x height), 0 to 255; border: {settings.border}"
    texts = explain(filtered)
    options = {**dataclasses.asdict(settings), "output": str(settings.output)}
    options["image"] = None if settings.image is None else str(settings.image)
    with replacing(settings.output / RECORD) as new:
        new.write_text(json.dumps({"settings": options, "image": what, "texts": texts}, indent=2) + "\n")
    told = [f"Figure {number}, {settings.output / FIGURES[number]}\n{text}" for number, text in texts.items()]
    print("\n\n".join([what, *told]))


def _gaussians(settings: Settings) -> list[tuple[int, float]]:
    """The size and sigma of each blur."""
    # An impossible sigma is refused where it is used; until then it must not become an impossible size.
    reaches = [math.ceil(3 * min(sigma, MAX_SIZE)) if sigma > 0 else 0 for sigma in settings.more_sigmas]
    more = [(2 * reach + 1, sigma) for reach, sigma in zip(reaches, settings.more_sigmas, strict=True)]
    return [(settings.size, settings.sigma), *more]


def apply_filters(image: Any, settings: Settings) -> Filtered:
    """Blurs and differentiates image: (H, W, 3) uint8; raises ValueError for an impossible Gaussian or border mode."""
    import numpy as np

    from jaxseg import filters, plots

    luma, border = np.array(plots.LUMA, np.float32), settings.border
    blurred = [np.asarray(filters.blur(image, *gaussian, border)) for gaussian in _gaussians(settings)]
    grey = image @ luma
    i_x, i_y = map(np.asarray, filters.derivatives(grey, border))
    magnitudes = [np.asarray(filters.gradient_magnitude(one @ luma, border)) for one in (image, *blurred)]
    names = [f"{size}x{size}, σ = {sigma:.3g}" for size, sigma in _gaussians(settings)]
    return Filtered(image, names, blurred, i_x, i_y, magnitudes[0], magnitudes[1:])


def draw(filtered: Filtered, output: pathlib.Path) -> None:
    """Draws figures 24 to 26 into an existing folder."""
    import numpy as np

    from jaxseg import plots

    detail = plots.choose_detail(filtered.magnitude)
    # A few edges are much stronger than the rest: they may saturate.
    limit = max(float(np.percentile(filtered.magnitude, 99)), 1.0)
    blurs = [
        plots.Panel(name, "Gaussian blur", np.rint(picture).astype(np.uint8))
        for name, picture in zip(filtered.names, filtered.blurred, strict=True)
    ]
    plots.plot_filtered(
        [plots.Panel("original", "below: the boxed detail", filtered.image), *blurs], detail, output / FIGURES[24]
    )
    scale = f"{limit:.0f} levels per pixel"
    ink = f"white: 0, black: {scale} and more"
    magnitude = plots.magnitude_picture(filtered.magnitude, limit)
    derivatives = [
        plots.Panel("I_x", f"black: falls to the right by {scale}", plots.signed_picture(filtered.i_x, limit)),
        plots.Panel("I_y", f"black: falls downwards by {scale}", plots.signed_picture(filtered.i_y, limit)),
        plots.Panel("gradient magnitude", ink, magnitude),
    ]
    plots.plot_filtered(derivatives, detail, output / FIGURES[25])
    magnitudes = [
        plots.Panel(f"after {name}", "the same scale", plots.magnitude_picture(values, limit))
        for name, values in zip(filtered.names[:2], filtered.blurred_magnitudes, strict=False)
    ]
    plots.plot_filtered([plots.Panel("without blur", ink, magnitude), *magnitudes], detail, output / FIGURES[26])


def explain(filtered: Filtered) -> dict[int, str]:
    """Two sentences about each figure, by its number, with what was measured on this image."""
    import numpy as np

    changes = [float(np.abs(one - filtered.image).mean()) for one in filtered.blurred]
    told = ", ".join(f"{change:.1f} ({name})" for change, name in zip(changes, filtered.names, strict=True))
    strongest = np.sort(filtered.magnitude, axis=None)[::-1].cumsum(dtype=np.float64)
    half = 100 * (np.searchsorted(strongest, strongest[-1] / 2) + 1) / strongest.size
    means = [float(values.mean()) for values in (filtered.magnitude, *filtered.blurred_magnitudes)]
    after = ", ".join(f"{mean:.1f} ({name})" for mean, name in zip(means[1:], filtered.names, strict=True))
    return {
        24: "A Gaussian blur replaces each pixel by the mean of its surroundings, weighted by nearness: detail finer"
        " than about σ pixels goes, larger shapes stay."
        f" On average a value moves by {told} of 255 levels.",
        25: "I_x = (I(x+1, y) - I(x-1, y)) / 2 answers to upright edges and I_y to level ones, with a sign: brightness"
        " that rises to the right or downwards is white, that falls is black, that stays is grey."
        f" The magnitude, the root of I_x² + I_y², answers to edges of any direction: {half:.0f} % of the pixels hold"
        " half of it.",
        26: "Differences of neighbours see noise and texture as well as edges; a blur before them takes the fine part"
        " away, and what remains are the outlines, wider and weaker."
        f" The mean magnitude is {means[0]:.1f} levels per pixel without blur, and then {after}.",
    }


if __name__ == "__main__":
    sys.exit(main())
