"""Trains the improved model end to end, without a frozen stage first, at several learning rates: the report's attempt.

Each learning rate is a run in a folder of its own below the workdir, of about half a gigabyte, and ends as
`experiments.improved` does; what is over is not run again. A run that diverges is a result as well. The epochs of both
stages are trained in one, at stage 2's dropout.
"""

import dataclasses
import math
import pathlib
import sys
from typing import Annotated, Any

import tyro

from experiments.arguments import quick_arguments
from experiments.datasets import short_name
from experiments.memory import keep_freed_memory
from experiments.settings import Options, Settings, complete, describe_schedule, read_options
from experiments.stop import end_on_ctrl_c
from jaxseg.files import replacing

# Where the report has the same.
FIGURES = {15: "figures/15_loss.png", 16: "figures/16_mean_iou.png"}


@dataclasses.dataclass(frozen=True)
@quick_arguments
class Choice:
    """The options of the experiment."""

    run: Annotated[Options, tyro.conf.arg(name="")]
    learning_rates: tuple[float, ...] = (1e-2, 3e-3, 1e-3, 3e-4, 1e-4)
    """The learning rates to try, one after the other; in the place of --learning-rate."""


def main(argv: list[str] | None = None) -> int:
    """Runs the experiment with the given arguments, or the command line's; returns the exit code."""
    try:
        options = read_options(Choice, "end_to_end", __doc__, argv)
        if options.run.learning_rate is not None:
            raise ValueError("--learning-rate is for stages: give --learning-rates, one for each run")
        settings = complete(options.run, "end_to_end")
        check(options.learning_rates)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    keep_freed_memory(may_restart=argv is None)
    end_on_ctrl_c(by_command=argv is None)
    # Imported only now: jax takes seconds, and --help must not wait for it.
    from experiments.prepare import make_improved
    from experiments.series import Series, Variant, run_series

    settings = dataclasses.replace(settings, epochs=(0, sum(settings.epochs)))
    variants = tuple(
        Variant(
            f"learning-rate-{rate}",
            f"learning rate {rate:g}",
            dataclasses.replace(settings, learning_rate=(rate, rate)),
            make_improved,
        )
        for rate in options.learning_rates
    )
    return run_series(Series("end_to_end", settings, ("learning_rate",), variants), report)


def check(rates: tuple[float, ...]) -> None:
    """Raises ValueError unless the learning rates are different and possible ones."""
    if not rates or len(set(rates)) < len(rates):
        raise ValueError(f"--learning-rates {' '.join(map(str, rates))}: give one at least, each once")
    for rate in rates:
        if not 0 < rate < math.inf:
            raise ValueError(f"--learning-rates must be above 0 and finite, not {rate}")


def report(series: Any, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Prints the table, writes it as end_to_end.md and draws the figures; returns what end_to_end.json gets more."""
    from experiments.results import markdown_table
    from jaxseg import plots

    curves = [read_curve(series.workdir, row) for row in rows]
    settings = series.settings
    table = f"{describe(settings)}\n\n{markdown_table(*tabulate(series.workdir, rows))}\n"
    print(f"\n{table}")
    (series.workdir / "figures").mkdir(exist_ok=True)
    with replacing(series.workdir / "end_to_end.md") as new:
        new.write_text(table)
    model = f"Improved model, end to end, {short_name(settings.dataset)}"
    plots.plot_losses(curves, f"{model}: training loss", series.workdir / FIGURES[15])
    plots.plot_mean_ious(curves, f"{model}: validation mIoU", series.workdir / FIGURES[16])
    print(f"everything is in {series.workdir}: end_to_end.md, end_to_end.json, figures/, a folder for each run")
    return {"table": "end_to_end.md", "figures": list(FIGURES.values())}


def tabulate(workdir: pathlib.Path, rows: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """The header and the rows of the table: each run's scores and how it ended."""
    lines = []
    for row in rows:
        curve = read_curve(workdir, row)
        scores = [f"{row[split]['mean_iou']:.4f}" if row[split] else "" for split in ("val", "test")]
        last = f"{curve.stage.losses[-1]:.4f}" if len(curve.stage.losses) else ""
        lines.append([row["title"], *scores, last, curve.note])
    return ["run", "validation mIoU", "test mIoU", "last loss", ""], lines


def read_curve(workdir: pathlib.Path, row: dict[str, Any]) -> Any:
    """The `jaxseg.plots.Curve` of a run that is over, from what it wrote down."""
    from jaxseg import plots
    from jaxseg.log import read_metrics

    steps, epochs = (read_metrics(workdir / row["run"], kind, 2) for kind in ("step", "epoch"))
    history = plots.StageHistory(row["title"], steps["step"], steps["loss"], epochs["epoch"], epochs["mean_iou"])
    if row["diverged"]:
        note = f"diverged at step {row['diverged']['step']}"
    else:
        note = f"best: {row['val']['mean_iou']:.3f} after epoch {row['checkpoint']['epoch']}"
    return plots.Curve(row["title"], note, history, ended=bool(row["diverged"]))


def describe(settings: Settings) -> str:
    """The budget, and what the numbers are."""
    parts = [
        f"{short_name(settings.dataset)} at {settings.image_size[0]}x{settings.image_size[1]}, {settings.encoder}",
        f"batch {settings.batch_size}, {settings.epochs[1]} epochs of everything",
        f"schedule: {describe_schedule(settings)}",
        f"rotation up to {settings.max_degrees:g} degrees, dropout {settings.dropout[1]:g}, seed {settings.seed}",
    ]
    return f"{'; '.join(parts)}.\nMean IoU of the best epoch by validation."


if __name__ == "__main__":
    sys.exit(main())
