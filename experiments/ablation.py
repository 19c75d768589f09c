"""Trains the improved model part by part, to see what each one buys: batch norm, rotation, dropout, the frozen stage.

Every variant has the same images, epochs, batch size and learning rates, those of the improved model: without a frozen
stage all epochs are trained at stage 2's. Each is a run in a folder of its own below the workdir, of about half a
gigabyte, and ends as `experiments.improved` does; what is over is not run again.
"""

import dataclasses
import statistics
import sys
from typing import Annotated, Any

import tyro

from experiments.arguments import quick_arguments
from experiments.datasets import short_name
from experiments.memory import keep_freed_memory
from experiments.settings import Options, Settings, check_seed, complete, describe_schedule, read_options
from experiments.stop import end_on_ctrl_c
from jaxseg.files import replacing


@dataclasses.dataclass(frozen=True)
@quick_arguments
class Choice:
    """The options of the ablation."""

    run: Annotated[Options, tyro.conf.arg(name="")]
    seeds: tuple[int, ...] = ()
    """Train each variant once with each of these; --seed alone if none is given. More can be added later."""


@dataclasses.dataclass(frozen=True)
class Part:
    """A variant of the model, by the parts that it has.

    Attributes:
      name: of its folders.
      title: in the table and the figure.
      against: the name of the variant that it is compared with, from which it differs in one part; or None.
      batch_norm: the improved model's decoder; without it the baseline's.
      rotation: images are rotated by up to --max-degrees.
      dropout: stage 2's rate is used in stage 1, in stage 2.
      frozen_stage: stage 1, with the encoder frozen, comes first; without it stage 2 has its epochs too.
    """

    name: str
    title: str
    against: str | None
    batch_norm: bool = True
    rotation: bool = True
    dropout: tuple[bool, bool] = (False, True)
    frozen_stage: bool = True


NONE = (False, False)
PARTS = (
    Part("baseline", "baseline", None, batch_norm=False, rotation=False, dropout=NONE),
    Part("batch-norm", "+ batch norm", "baseline", rotation=False, dropout=NONE),
    Part("rotation", "+ rotation", "batch-norm", dropout=NONE),
    Part("dropout", "+ dropout in stage 2", "rotation"),
    Part("dropout-from-the-beginning", "dropout in both stages", "dropout", dropout=(True, True)),
    Part("no-frozen-stage", "no frozen stage", "dropout", frozen_stage=False),
)
VARIES = ("max_degrees", "dropout", "epochs")


def main(argv: list[str] | None = None) -> int:
    """Runs the experiment with the given arguments, or the command line's; returns the exit code."""
    try:
        options = read_options(Choice, "ablation", __doc__, argv)
        settings = complete(options.run, "ablation")
        seeds = options.seeds or (settings.seed,)
        check(settings, seeds)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    keep_freed_memory(may_restart=argv is None)
    end_on_ctrl_c(by_command=argv is None)
    # Imported only now: jax takes seconds, and --help must not wait for it.
    from experiments.prepare import make_baseline, make_improved
    from experiments.series import Series, Variant, run_series

    variants = tuple(
        Variant(part.name, part.title, vary(settings, part, seed), make_improved if part.batch_norm else make_baseline)
        for seed in seeds
        for part in PARTS
    )
    return run_series(Series("ablation", settings, VARIES, variants), report)


def check(settings: Settings, seeds: tuple[int, ...]) -> None:
    """Raises ValueError where a variant could not be told from another, or a seed is out of range."""
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"--seeds {' '.join(map(str, seeds))}: each one once")
    for seed in seeds:
        check_seed(seed, "--seeds")
    if not settings.max_degrees:
        raise ValueError("--max-degrees 0: the ablation compares rotated images with others, give an angle above 0")
    if settings.dropout[0] or not settings.dropout[1]:
        raise ValueError(
            "--dropout {} {}: the ablation tries stage 2's rate in stage 1, too: give 0 and a rate above 0".format(
                *settings.dropout
            )
        )
    if not min(settings.epochs):
        raise ValueError("--epochs {} {}: the ablation needs both stages".format(*settings.epochs))


def vary(settings: Settings, part: Part, seed: int) -> Settings:
    """The settings of one run."""
    one, two = (settings.dropout[1] if on else 0.0 for on in part.dropout)
    return dataclasses.replace(
        settings,
        seed=seed,
        max_degrees=settings.max_degrees if part.rotation else 0.0,
        dropout=(one, two),
        epochs=settings.epochs if part.frozen_stage else (0, sum(settings.epochs)),
    )


def summarise(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What each variant scores over the seeds, and how much more than the one that it is compared with.

    Args:
      rows: as `experiments.series` describes them.

    Returns:
      For each part {"name", "title", "against", "seeds", "diverged": those seeds that did, "val", "test"}; a split has
      {"mean", "deviation", "gain", "gain_deviation"}, over the seeds and, for the gain, the seeds that both have: null
      where there is none, and deviations, which are those of a sample, where there is one. It is null altogether where
      no seed has a score.
    """
    summary = []
    for part in PARTS:
        own = [row for row in rows if row["name"] == part.name]
        entry: dict[str, Any] = {"name": part.name, "title": part.title, "against": part.against}
        entry |= {"seeds": [row["seed"] for row in own], "diverged": [row["seed"] for row in own if row["diverged"]]}
        for split in ("val", "test"):
            scores, others = (_scores(rows, name, split) for name in (part.name, part.against))
            gains = [score - others[seed] for seed, score in scores.items() if seed in others]
            entry[split] = None
            if scores:
                mean, deviation = _mean_and_deviation(list(scores.values()))
                gain, gain_deviation = _mean_and_deviation(gains)
                entry[split] = {"mean": mean, "deviation": deviation, "gain": gain, "gain_deviation": gain_deviation}
        summary.append(entry)
    return summary


def _scores(rows: list[dict[str, Any]], name: str | None, split: str) -> dict[int, float]:
    return {row["seed"]: row[split]["mean_iou"] for row in rows if row["name"] == name and row[split]}


def _mean_and_deviation(values: list[float]) -> tuple[float | None, float | None]:
    return statistics.fmean(values) if values else None, statistics.stdev(values) if len(values) > 1 else None


def report(series: Any, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Prints the table, writes it as ablation.md and draws the figure; returns what ablation.json gets more."""
    import numpy as np

    from experiments.results import markdown_table
    from jaxseg import plots

    summary = summarise(rows)
    splits = find_splits(summary)
    table = f"{describe(series.settings, summary)}\n\n{markdown_table(*tabulate(summary))}\n"
    print(f"\n{table}")
    (series.workdir / "figures").mkdir(exist_ok=True)
    with replacing(series.workdir / "ablation.md") as new:
        new.write_text(table)
    variants = []
    for entry in summary:
        by_seed = {title: _scores(rows, entry["name"], split) for split, title in splits.items()}
        scores = {title: np.array(list(values.values())) for title, values in by_seed.items() if values}
        variants.append(plots.Variant(entry["title"], scores, "diverged"))
    title = f"What each part buys: {short_name(series.settings.dataset)}, {series.settings.encoder}"
    plots.plot_variants(variants, title, series.workdir / "figures" / "ablation.png")
    print(f"everything is in {series.workdir}: ablation.md, ablation.json, figures/, a folder for each run")
    return {"summary": summary, "table": "ablation.md", "figures": ["figures/ablation.png"]}


def find_splits(summary: list[dict[str, Any]]) -> dict[str, str]:
    """The splits for which there are scores, and what they are called."""
    splits = {"val": "validation", "test": "test"}
    return {split: title for split, title in splits.items() if any(entry[split] for entry in summary)}


def tabulate(summary: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """The header and the rows of the table: each variant's score and gain."""
    splits, titles = find_splits(summary), {part.name: part.title for part in PARTS}
    rows = [
        [entry["title"], titles.get(entry["against"], ""), *(cell for split in splits for cell in _cells(entry, split))]
        for entry in summary
    ]
    header = ["variant", "gain over", *(cell for title in splits.values() for cell in (f"{title} mIoU", "gain"))]
    return header, rows


def _cells(entry: dict[str, Any], split: str) -> list[str]:
    """A variant's score and gain, as the table shows them."""
    values = entry[split]
    if values is None:
        return ["diverged" if entry["diverged"] else "", ""]
    spread, gain_spread = (
        "" if value is None else f" ± {value:.4f}" for value in (values["deviation"], values["gain_deviation"])
    )
    some = f" ({len(entry['diverged'])} of {len(entry['seeds'])} diverged)" if entry["diverged"] else ""
    gain = "" if values["gain"] is None else f"{values['gain']:+z.4f}{gain_spread}"
    return [f"{values['mean']:.4f}{spread}{some}", gain]


def describe(settings: Settings, summary: list[dict[str, Any]]) -> str:
    """The budget, and what the numbers are."""
    seeds = sorted({seed for entry in summary for seed in entry["seeds"]})
    one, two = settings.epochs
    parts = [
        f"{short_name(settings.dataset)} at {settings.image_size[0]}x{settings.image_size[1]}, {settings.encoder}",
        f"batch {settings.batch_size}; epochs: {one} with the encoder frozen, then {two}, or {one + two} of everything",
        "learning rates {:g} and {:g}".format(*settings.learning_rate) + f" ({describe_schedule(settings)})",
        f"rotation up to {settings.max_degrees:g} degrees, dropout {settings.dropout[1]:g}",
        f"seeds {', '.join(map(str, seeds))}" if len(seeds) > 1 else f"seed {seeds[0]}",
    ]
    spread = "; ± is the deviation over the seeds" if len(seeds) > 1 else ""
    improved = next(part.title for part in PARTS if part.name == "dropout")
    return (
        f"{'; '.join(parts)}.\nMean IoU of the best epoch by validation{spread}. With '{improved}' it is the improved"
        " model; the variants after it differ from it."
    )


if __name__ == "__main__":
    sys.exit(main())
