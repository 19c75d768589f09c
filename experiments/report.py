"""Writes a report, one HTML file with everything inside, of runs and of what other experiments have left."""

import dataclasses
import pathlib
import sys
from typing import Annotated

import tyro

from experiments.arguments import quick_arguments


@dataclasses.dataclass(frozen=True)
@quick_arguments
class Settings:
    """Settings of the report."""

    folders: Annotated[tyro.conf.Positional[tuple[pathlib.Path, ...]], tyro.conf.arg(metavar="RUN [RUN ...]")]
    """Workdirs of runs, of an ablation and of end-to-end experiments, and the folders that experiments.compare and
    experiments.filtering wrote, in any order."""
    output: pathlib.Path = pathlib.Path("runs/report.html")
    """The file to write; replaced if it is there."""
    title: str = "Semantic segmentation with a fine-tuned ResNet"
    """What stands above it."""


def main(argv: list[str] | None = None) -> int:
    """Writes the report with the given arguments, or the command line's; returns the exit code."""
    settings = tyro.cli(Settings, prog="python -m experiments.report", description=__doc__, args=argv)
    try:
        write(settings)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def write(settings: Settings) -> None:
    """Reads the folders and writes the file.

    Raises:
      ValueError: a folder is none of an experiment's, or something in it is damaged; in one line.
      OSError: a file cannot be read or written.
    """
    # Imported only now, because --help must not wait for it.
    from experiments import markup
    from experiments.outcomes import read_folders
    from jaxseg.files import replacing

    if not settings.folders:
        raise ValueError("name at least one RUN: the workdir of a run, or what another experiment wrote")
    if settings.output.is_dir():
        raise ValueError(f"--output {settings.output} is a folder: name a file")
    runs, parts = read_folders(settings.folders)
    # The report's order: first its baseline.
    runs.sort(key=lambda run: ("baseline", "improved", None).index(run.experiment))
    sections = list_sections(runs, parts)
    links = [markup.element("li", markup.element("a", title, href=f"#{anchor}")) for anchor, title, _ in sections]
    body = [markup.element("h1", settings.title), markup.element("nav", markup.element("ol", *links))]
    for number, (anchor, title, content) in enumerate(sections, 1):
        heading = markup.element("h2", f"{number} {title}", id=anchor)
        body.append(markup.element("section", heading, content))
    text = markup.page(settings.title, *body)
    settings.output.parent.mkdir(parents=True, exist_ok=True)
    with replacing(settings.output) as new:
        new.write_text(text, encoding="utf-8")
    print(f"{settings.output}: {', '.join(title for _, title, _ in sections)}; {len(text) / 1e6:.1f} MB")
    for run in runs:
        if run.outcome:
            print(f"{run.folder}: {run.outcome[0].lower()}{run.outcome[1:]}")


def list_sections(runs: list, parts: list) -> list[tuple[str, str, str]]:
    """The sections for which there is something: what a link calls them, title and content."""
    from experiments import sections

    by_kind = {
        kind: [part for part in parts if part.kind == kind] for kind in dict.fromkeys(part.kind for part in parts)
    }
    found = [
        ("runs", "Runs", sections.show_runs(runs)),
        ("preprocessing", "Preprocessing", sections.show_preprocessing(runs)),
        ("architecture", "Model architecture", sections.show_architectures(runs)),
        ("training", "Training", sections.show_training(runs, by_kind.get("end_to_end", []))),
        ("results", "Results", sections.show_results(runs)),
        ("iou", "IoU of each class", sections.show_iou(runs)),
        ("comparison", "Improved against baseline", sections.show_comparison(runs, by_kind.get("comparison", []))),
        ("ablation", "What each part buys", sections.show_parts(by_kind.get("ablation", []))),
        ("filtering", "Image filtering", sections.show_parts(by_kind.get("filtering", []))),
    ]
    return [(anchor, title, content) for anchor, title, content in found if content is not None]


if __name__ == "__main__":
    sys.exit(main())
