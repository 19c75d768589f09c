"""Checks a data set before training: looks at every image and label once, says what is in it and what is wrong."""

import collections
import dataclasses
import json
import pathlib
import sys
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import tyro

from experiments.arguments import quick_arguments
from experiments.datasets import SPLITS, DataOptions, find_absent, find_unchecked, short_name
from experiments.workdir import check_folder

if TYPE_CHECKING:
    import numpy as np

    from jaxseg.data.checks import Look
    from jaxseg.data.labels import Labels

# How many mistakes are printed.
_SHOWN = 50


@dataclasses.dataclass(frozen=True)
@quick_arguments
class Choice(DataOptions):
    """The options of the check."""

    images: int = 24
    """How many images, drawn at random, the contact sheet shows; 0 for none."""
    seed: int = 0
    """Seeds which images these are."""
    output: pathlib.Path | None = None
    """Folder for the contact sheet and check.json; those of an earlier check are replaced. By default
    runs/check-DATASET."""


@dataclasses.dataclass
class Survey:
    """What was seen of a data set, and what is wrong with it.

    Attributes:
      sizes: for each split how many images have a (height, width) in pixels.
      pixels: for each split (256,) int64, the pixels of each value in its labels.
      shown: for each split (256,) int64, the images whose labels show each value.
      among: (256,) int64, the labelled pixels of the training images that show each value.
      images: for each split how many there are.
      drawable: the examples that a contact sheet can show, by split and index.
      mistakes: a line for each.
      notes: what is worth knowing and not wrong, a line for each.
    """

    sizes: dict[str, collections.Counter[tuple[int, int]]]
    pixels: dict[str, "np.ndarray"]
    shown: dict[str, "np.ndarray"]
    among: "np.ndarray"
    images: dict[str, int]
    drawable: list[tuple[str, int]]
    mistakes: list[str]
    notes: list[str]


def main(argv: list[str] | None = None) -> int:
    """Checks with the given arguments, or the command line's; returns 0, 1 if anything is wrong, or 2."""
    choice = tyro.cli(Choice, prog="python -m experiments.check_data", description=__doc__, args=argv)
    try:
        return check(choice)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        return 130


def check(choice: Choice) -> int:
    """Looks at everything, prints, writes and draws what it saw; returns the exit code.

    Raises:
      ValueError: there is no such data set, or it cannot be prepared.
      OSError: a file cannot be read or written.
    """
    from jaxseg.data.checks import look_at_all

    if choice.images < 0:
        raise ValueError(f"--images must be from 0 up, not {choice.images}")
    output = choice.output or pathlib.Path("runs") / f"check-{short_name(choice.dataset)}"
    check_folder(output, "--output")
    mistakes: list[str] = []
    labels, open_splits = find_unchecked(choice, mistakes=mistakes)
    sources = open_splits()
    found = survey(sources, labels, look_at_all(sources, labels.num_classes, digests=True), mistakes)
    print(f"{choice.dataset}: {labels.num_classes} classes\n\n{tabulate(found, labels)}")
    for note in found.notes:
        print(f"note: {note}")
    output.mkdir(parents=True, exist_ok=True)
    write_report(found, labels, output / "check.json")
    sheet = draw(choice, found, sources, labels, output)
    for mistake in found.mistakes[:_SHOWN]:
        print(f"wrong: {mistake}")
    if len(found.mistakes) > _SHOWN:
        print(f"... {output / 'check.json'} has all {len(found.mistakes)}")
    count = len(found.mistakes)
    verdict = f"{count} {'mistake' if count == 1 else 'mistakes'}" if count else "nothing is wrong"
    print(f"{verdict}; look at {sheet or output / 'check.json'}")
    return 1 if found.mistakes else 0


def survey(sources: Mapping[str, Any], labels: "Labels", looks: Iterable["Look"], mistakes: list[str]) -> Survey:
    """Adds up what was seen of each example.

    Args:
      sources: the splits.
      labels: the classes.
      looks: with digests.
      mistakes: those that were found already.
    """
    import numpy as np

    found = Survey(
        {split: collections.Counter() for split in sources},
        {split: np.zeros(256, np.int64) for split in sources},
        {split: np.zeros(256, np.int64) for split in sources},
        np.zeros(256, np.int64),
        {split: len(source) for split, source in sources.items()},
        [],
        [*mistakes],
        [],
    )
    digests: dict[bytes, list[tuple[str, int]]] = {}
    for look in looks:
        found.mistakes += look.mistakes
        if look.size is not None:
            found.sizes[look.split][look.size] += 1
            digests.setdefault(look.digest, []).append((look.split, look.index))
            if not look.mistakes:
                found.drawable.append((look.split, look.index))
        if look.counts is not None:
            found.pixels[look.split] += look.counts
            found.shown[look.split] += look.counts > 0
            if look.split == "train":
                found.among += np.where(look.counts > 0, look.counts[: labels.num_classes].sum(), 0)
    _compare(digests, sources, found)
    _find_absent(found, labels)
    return found


def _compare(digests: Mapping[bytes, list[tuple[str, int]]], sources: Mapping[str, Any], found: Survey) -> None:
    """Notes the same picture in two splits, which is wrong, and within one."""
    within = 0
    for places in digests.values():
        within += len(places) - len({split for split, _ in places})
        firsts = dict(reversed(places))
        if len(firsts) > 1:
            names = [sources[split].where(firsts[split])[0] for split in SPLITS if split in firsts]
            found.mistakes.append(f"{names[0]}: the same picture as {' and '.join(names[1:])}; keep it in one split")
    if within:
        found.notes.append(f"{within} images are the same picture as another of their split")


def _find_absent(found: Survey, labels: "Labels") -> None:
    """Notes what training would warn of, or refuse."""
    # Of labels that are bad altogether nothing more needs to be said.
    good = {k: pixels for k, pixels in found.pixels.items() if pixels[: labels.num_classes].any() or pixels[255]}
    try:
        if absent := find_absent({split: pixels > 0 for split, pixels in good.items()}, labels):
            found.notes.append(absent)
    except ValueError as error:
        found.mistakes.append(str(error))


def class_weights(found: Survey, labels: "Labels") -> "np.ndarray":
    """(C,) float64: median frequency balancing over the training images, NaN for a class that none shows."""
    import numpy as np

    from jaxseg.data.balance import median_frequency_weights

    pixels = found.pixels.get("train", np.zeros(256, np.int64))
    return median_frequency_weights(pixels[: labels.num_classes], found.among[: labels.num_classes])


def tabulate(found: Survey, labels: "Labels") -> str:
    """The images of each split and their sizes, and each class's pixels and images, as text."""
    import numpy as np

    rows = [["", "images", "size (height x width)"]]
    rows += [[split, str(number), _sizes(found.sizes[split])] for split, number in found.images.items()]
    lines = [*_align(rows, "lrl"), ""]
    header = ["", "", *(f"{split} {what}" for split in found.images for what in ("pixels", "images")), "weight"]
    weights = class_weights(found, labels)
    rows = [header]
    for value, name in [*enumerate(labels.names), (255, "(ignored)")]:
        row = [f"class #{value}" if value < 255 else "", name]
        for split in found.images:
            share = 100 * found.pixels[split][value] / max(found.pixels[split].sum(), 1)
            row += [f"{share:.2f} %", str(found.shown[split][value])]
        weight = weights[value] if value < 255 else np.nan
        rows.append([*row, "" if np.isnan(weight) else f"{weight:.3g}"])
    lines += _align(rows, "ll" + "r" * (len(header) - 2))
    lines += [
        "",
        "weight: median frequency balancing over the training images, as --class-weights median has it in the loss",
    ]
    return "\n".join(lines) + "\n"


def _sizes(counts: collections.Counter[tuple[int, int]]) -> str:
    """All images' size, or the range of theirs and the most frequent one."""
    if not counts:
        return "-"
    (height, width), number = counts.most_common(1)[0]
    if len(counts) == 1:
        return f"{height}x{width}"
    heights, widths = zip(*counts, strict=True)
    return (
        f"{len(counts)} sizes, {min(heights)} to {max(heights)} x {min(widths)} to {max(widths)}; {number} are"
        f" {height}x{width}"
    )


def _align(rows: list[list[str]], sides: str) -> list[str]:
    """Lines of columns two spaces apart, to the left or to the right."""
    widths = [max(len(row[k]) for row in rows) for k in range(len(sides))]
    place = {"l": str.ljust, "r": str.rjust}
    return [
        "  ".join(place[side](text, width) for text, side, width in zip(row, sides, widths, strict=True)).rstrip()
        for row in rows
    ]


def write_report(found: Survey, labels: "Labels", path: pathlib.Path) -> None:
    """Writes what was found as JSON; raises OSError if it cannot."""
    from jaxseg.files import replacing

    weights = class_weights(found, labels).tolist()
    report = {
        "images": found.images,
        "sizes": {
            split: [[*size, number] for size, number in counts.most_common()] for split, counts in found.sizes.items()
        },
        "classes": {
            name: {
                "pixels": {split: int(found.pixels[split][k]) for split in found.images},
                "images": {split: int(found.shown[split][k]) for split in found.images},
                "weight": weights[k] if weights[k] == weights[k] else None,
            }
            for k, name in enumerate(labels.names)
        },
        "ignored_pixels": {split: int(found.pixels[split][255]) for split in found.images},
        "mistakes": found.mistakes,
        "notes": found.notes,
    }
    with replacing(path) as new:
        new.write_text(json.dumps(report, indent=2) + "\n")


def draw(
    choice: Choice, found: Survey, sources: Mapping[str, Any], labels: "Labels", output: pathlib.Path
) -> pathlib.Path | None:
    """Draws the contact sheet of random images, if there are any; raises OSError if it cannot be written."""
    import numpy as np

    from jaxseg import plots

    path, number = output / "contact.png", min(choice.images, len(found.drawable))
    path.unlink(missing_ok=True)  # an earlier check's
    if not number:
        return None
    drawn = np.random.default_rng(choice.seed).choice(len(found.drawable), number, replace=False)
    rows = []
    for split, index in (found.drawable[k] for k in sorted(drawn.tolist())):
        item = sources[split][index]
        rows.append(plots.Row(item["image"], (item["label"],), f"{split}: {item['name']}"))
    title = f"{short_name(choice.dataset)}: {number} of {sum(found.images.values())} images"
    plots.plot_contact_sheet(rows, labels.names, labels.colours, title, path)
    return path


if __name__ == "__main__":
    sys.exit(main())
