"""The sections of the report, in the order of the 2019 report: what the experiments left, as HTML.

Each function returns a section's content, or None where there is nothing to say.
"""

from collections.abc import Sequence
from typing import Any

from experiments.markup import Html, element, join, picture, table
from experiments.outcomes import Part, TrainedRun

# The 2019 report's own numbers: images at height and width, in its three splits; IoU of its models, which stands beside
# that of the validation split here, the one that its curves are of.
OWN_IMAGES, OWN_SIZE = {"train": 5460, "val": 500, "test": 500}, (352, 448)
OWN_IOU = {
    "baseline": (0.90244, 0.74702, 0.70119, 0.71168, 0.38764, 0.58934, 0.66698, 0.73553, 0.69780),
    "improved": (0.90166, 0.73932, 0.67720, 0.70505, 0.43750, 0.61821, 0.68852, 0.74057, 0.69687),
}
OWN_MEAN_IOU = {"baseline": 0.682180, "improved": 0.689432}
OWN = "2019 report"

_SPLITS = {"train": "training", "val": "validation", "test": "test"}
_STAGES = {1: "1: encoder frozen", 2: "2: everything"}
_DECODERS = {
    "baseline": "five times [transposed convolution 4x4, stride 2, padding 1, no bias, then ReLU], then a 1x1"
    " convolution to the classes",
    "improved": "five times [transposed convolution 4x4, stride 2, padding 1, no bias, then batch norm, then ReLU],"
    " then dropout and a 1x1 convolution to the classes",
}


def show_runs(runs: Sequence[TrainedRun]) -> Html | None:
    """What was run, the scores, and the commands."""
    if not runs:
        return None
    splits = [split for split in ("val", "test") if any(_mean(run, split) for run in runs)]
    header = ["run", "model", "data", "best epoch", *(f"{_SPLITS[split]} mIoU" for split in splits)]
    rows = [
        [run.title, run.experiment or "", _dataset(run), _epoch(run), *(_mean(run, split) for split in splits)]
        for run in runs
    ]
    parts = [
        element("p", "Mean IoU over the classes, of the best epoch by validation."),
        table(header, rows, words=True),
    ]
    for run in runs:
        heading = element("h3", run.title)
        told = [element("p", run.outcome, class_="note")] if run.outcome else []
        parts += [heading, *told, show_command(run.command)]
    return join(*parts)


def show_command(command: str) -> Html:
    """The command line that made what is shown."""
    if not command:
        return element("p", "An older version wrote this, and did not write down the command.", class_="note")
    return element("pre", element("code", command))


def show_preprocessing(runs: Sequence[TrainedRun]) -> Html | None:
    """The images, and what is done to them."""
    if not runs:
        return None
    from jaxseg.segmenter import MEAN, STD, STRIDE

    own = any(_is_reports_data(run) for run in runs)
    facts: list[tuple[str, Any, str]] = [("data", _dataset, "nine classes of PASCAL VOC")]
    for split, name in _SPLITS.items():
        if any(split in run.images for run in runs):
            number = f"{OWN_IMAGES[split]}"
            facts.append((f"{name} images", lambda run, split=split: f"{run.images.get(split, '')}", number))
    facts += [
        ("height and width", lambda run: _size(run.settings["image_size"]), _size(OWN_SIZE)),
        ("evaluated at", _evaluated_at, ""),
        ("training images are", _changes, "rotated by up to 30 degrees in the improved model"),
    ]
    header = ["", *(run.title for run in runs), *([OWN] if own else [])]
    rows = [[name, *(str(value(run)) for run in runs), *([theirs] if own else [])] for name, value, theirs in facts]
    values = (
        f"Red, green and blue are scaled to [0, 1]; then ImageNet's mean {MEAN} is subtracted, and the rest divided by"
        f" its standard deviation {STD}. Images whose sides are no multiples of {STRIDE} are padded with the mean"
        " colour, and the result is cut to the image's size. Pixels with the label 255 count nowhere."
    )
    parts = [element("p", values), table(header, rows, words=True)]
    for names, colours, titles in _label_sets(runs):
        which = f" of {', '.join(titles)}" if len(titles) < len(runs) else ""
        parts += [element("p", f"The {len(names)} classes{which}:"), _legend(names, colours)]
    return join(*parts)


def show_architectures(runs: Sequence[TrainedRun]) -> Html | None:
    """Each model once."""
    parts, seen = [], set()
    for run in runs:
        model = (run.settings.get("encoder"), run.experiment, len(run.names), str(run.settings.get("image_size")))
        if model in seen:
            continue
        seen.add(model)
        encoder = f"{run.settings.get('encoder')}, weights: {run.settings.get('weights')}"
        parts.append(element("h3", run.title))
        parts.append(element("p", f"Encoder: {encoder}. Decoder: {_DECODERS.get(run.experiment or '', 'not known')}."))
        parts += [
            picture(
                path,
                f"{run.title}: feature maps from the image to the logits, heights and channels by their roots",
                chart=True,
            )
            for path in run.figures("architecture.png")
        ]
    return join(*parts) if parts else None


def show_training(runs: Sequence[TrainedRun], attempts: Sequence[Part]) -> Html | None:
    """The stages and the curves of each run; and what came of training end to end."""
    parts = []
    for run in runs:
        if not run.stages:
            continue
        header = ["stage", "epochs", "learning rate", "batch", "dropout", "best validation mIoU", "after epoch"]
        rows = [_stage_row(run, stage) for stage in run.stages]
        curves = [
            picture(
                path,
                f"{run.title}, stage {path.stem[-1]}: loss of each update, validation mIoU after each epoch",
                chart=True,
            )
            for path in run.figures("training_stage_*.png")
        ]
        schedule = f"Adam, b2 {run.settings.get('adam_b2')}; {run.settings.get('schedule')} learning rate"
        share = run.settings.get("encoder_rate", 1.0)
        schedule += "." if share == 1 else f", the encoder's in stage 2 {share:g} of it."
        if (rule := run.settings.get("class_weights", "none")) != "none":
            schedule += f" Rare classes weigh more in the loss (--class-weights {rule})."
        parts += [element("h3", run.title), element("p", schedule), table(header, rows)]
        parts.append(element("div", *curves, class_="pair"))
    for attempt in attempts:
        parts += [element("h3", "End to end, without a frozen stage"), show_part(attempt)]
    return join(*parts) if parts else None


def show_results(runs: Sequence[TrainedRun]) -> Html | None:
    """The result pictures, the baseline's beside the improved model's where both are there."""
    parts, shown = [], set()
    for pair in [*find_pairs(runs), *((run,) for run in runs)]:
        pages = [run.figures("results_*.png") for run in pair if run.title not in shown]
        if len(pages) < len(pair) or not any(pages):
            continue
        shown |= {run.title for run in pair}
        parts.append(element("h3", " and ".join(run.title for run in pair)))
        for number in range(max(map(len, pages))):
            there = [(run, own[number]) for run, own in zip(pair, pages, strict=True) if number < len(own)]
            figures = [picture(path, f"{run.title}, page {number + 1}") for run, path in there]
            parts.append(element("div", *figures, class_="pair") if len(pair) > 1 else figures[0])
    if not parts:
        return None
    text = "Photographs of the validation split, chosen such that every class occurs that its labels have."
    return join(element("p", text), *parts)


def show_iou(runs: Sequence[TrainedRun]) -> Html | None:
    """IoU of each class, the best and the worst, and the confusion matrices."""
    import numpy as np

    from jaxseg import metrics

    parts = []
    for names, _, titles in _label_sets(runs):
        tables = []
        for split in ("val", "test"):
            group = [run for run in runs if run.title in titles and run.results and split in run.results]
            own = [(run, run.results[split]) for run in group if run.results]
            if not own:
                continue
            lines = [
                element(
                    "p", element("strong", f"{run.title}: "), metrics.best_and_worst(np.array(x["confusion"]), names)
                )
                for run, x in own
            ]
            heading = element("h3", f"{_SPLITS[split].capitalize()} split")
            tables.append(element("div", heading, _iou_table(own, split, names), *lines))
        parts.append(element("div", *tables, class_="pair"))
    figures = [
        picture(path, f"{run.title}: confusion matrix of the validation split", chart=True)
        for run in runs
        for path in run.figures("confusion.png")
    ]
    if not any(run.results for run in runs):
        return None
    note = element("p", "Of each column the best class is blue and the worst one orange.", class_="note")
    return join(note, *parts, element("div", *figures, class_="pair"))


def show_comparison(runs: Sequence[TrainedRun], comparisons: Sequence[Part]) -> Html | None:
    """The improved model against the baseline on the same data, class by class."""
    parts = []
    for baseline, improved in find_pairs(runs):
        tables = []
        for split in ("val", "test"):
            if _mean(baseline, split) and _mean(improved, split):
                title = f"{_SPLITS[split].capitalize()} split: {improved.title} against {baseline.title}"
                tables.append(element("div", element("h3", title), _gains(baseline, improved, split)))
        parts.append(element("div", *tables, class_="pair"))
    parts += [join(element("h3", "Image by image"), show_part(comparison)) for comparison in comparisons]
    return join(*parts) if parts else None


def show_parts(parts: Sequence[Part]) -> Html | None:
    """Experiments of one kind, one after the other."""
    return join(*map(show_part, parts)) if parts else None


def show_part(part: Part) -> Html:
    """The command of another experiment, what it says, its numbers and its figures."""
    texts = [element("p", text) for text in part.texts]
    numbers = [table(part.table.header, part.table.rows)] if part.table else []
    return join(show_command(part.command), *texts, *numbers, *(picture(*figure) for figure in part.figures))


def find_pairs(runs: Sequence[TrainedRun]) -> list[tuple[TrainedRun, TrainedRun]]:
    """Each improved model that has results with the first baseline on the same data."""
    pairs = []
    for improved in runs:
        if improved.experiment == "improved" and improved.results:
            others = (run for run in runs if run.experiment == "baseline" and run.results)
            same = (run for run in others if run.data == improved.data and run.names == improved.names)
            pairs += [(baseline, improved) for baseline in list(same)[:1]]
    return pairs


def _dataset(run: TrainedRun) -> str:
    return str(run.settings["dataset"])


def _is_reports_data(run: TrainedRun) -> bool:
    return _dataset(run) == "voc9"


def _size(size: Sequence[int]) -> str:
    return f"{size[0]}x{size[1]}"


def _epoch(run: TrainedRun) -> str:
    """The best one, in words."""
    return "{stage}, epoch {epoch}".format(**run.results["checkpoint"]) if run.results else ""


def _mean(run: TrainedRun, split: str) -> str:
    return f"{run.results[split]['mean_iou']:.6f}" if run.results and split in run.results else ""


def _evaluated_at(run: TrainedRun) -> str:
    native = run.settings.get("eval_size") == "native"
    return "their own size" if native else f"{_size(run.settings['image_size'])}; labels keep their own size"


def _changes(run: TrainedRun) -> str:
    """What is done to training images alone."""
    settings, changes = run.settings, []
    if settings.get("augment") == "scale-crop":
        changes.append("scaled by {:g} to {:g} and cut".format(*settings["scale_range"]))
    if settings.get("max_degrees"):
        changes.append(f"rotated by up to {settings['max_degrees']:g} degrees")
    if settings.get("flip"):
        changes.append("mirrored, half of them")
    if any(settings.get("jitter", ())):
        changes.append(f"changed in colour (jitter {' '.join(map(str, settings['jitter']))})")
    return ", ".join(changes) or "not changed"


def _label_sets(
    runs: Sequence[TrainedRun],
) -> list[tuple[tuple[str, ...], tuple[tuple[int, int, int], ...], list[str]]]:
    """The classes, their colours, and the titles of the runs that have them."""
    sets: dict[tuple[str, ...], tuple[tuple[tuple[int, int, int], ...], list[str]]] = {}
    for run in runs:
        sets.setdefault(run.names, (run.colours, []))[1].append(run.title)
    return [(names, colours, titles) for names, (colours, titles) in sets.items()]


def _legend(names: Sequence[str], colours: Sequence[tuple[int, int, int]]) -> Html:
    items = []
    for index, (name, colour) in enumerate(zip(names, colours, strict=True)):
        swatch = element("span", class_="swatch", style="background: rgb({} {} {})".format(*colour))
        items.append(element("li", swatch, f"{index} {name}"))
    return element("ul", *items, class_="classes")


def _stage_row(run: TrainedRun, stage: Any) -> list[str]:
    index, settings = stage.number - 1, run.settings
    best = max(range(len(stage.epochs)), key=lambda place: (stage.mean_ious[place], place), default=None)
    scores = ["", ""] if best is None else [f"{stage.mean_ious[best]:.6f}", f"{stage.epochs[best]}"]
    dropout = f"{settings.get('dropout', [0, 0])[index]:g}"
    rate = f"{settings['learning_rate'][index]:g}"
    return [_STAGES[stage.number], f"{settings['epochs'][index]}", rate, f"{settings['batch_size']}", dropout, *scores]


def _iou_table(runs: Sequence[tuple[TrainedRun, dict[str, Any]]], split: str, names: Sequence[str]) -> Html:
    """A row for each class, a column for each run, and one for the report's own numbers where its data is the same."""
    columns: list[tuple[str, list[float | None], float]] = []
    for run, results in runs:
        columns.append((run.title, [results["iou"][name] for name in names], results["mean_iou"]))
        if "boundary_iou" in results:
            own = [results["boundary_iou"][name] for name in names]
            columns.append((f"{run.title}, boundary IoU", own, results["mean_boundary_iou"]))
        if split == "val" and _is_reports_data(run) and run.experiment in OWN_IOU:
            title = f"{OWN}'s {run.experiment}"
            columns.append((title, list(OWN_IOU[run.experiment]), OWN_MEAN_IOU[run.experiment]))
    cells = [_mark(values) for _, values, _ in columns]
    rows = [[f"{index} {name}", *(column[index] for column in cells)] for index, name in enumerate(names)]
    rows.append(["mean", *(f"{mean:.6f}" for _, _, mean in columns)])
    return table(["class", *(title for title, _, _ in columns)], rows, total=True)


def _mark(values: Sequence[float | None]) -> list[str]:
    """A column's numbers, the best and the worst of them marked."""
    there = [value for value in values if value is not None]
    marks = {values.index(max(there)): "best", values.index(min(there)): "worst"} if len(set(there)) > 1 else {}
    texts = ["absent" if value is None else f"{value:.5f}" for value in values]
    return [element("span", text, class_=marks[i]) if i in marks else text for i, text in enumerate(texts)]


def _difference(before: float | None, after: float | None, digits: int = 5) -> str:
    """With a sign, and a minus as wide as the plus; nothing where there is nothing to subtract."""
    return "" if before is None or after is None else f"{after - before:+z.{digits}f}".replace("-", "\u2212")


def _gains(baseline: TrainedRun, improved: TrainedRun, split: str) -> Html:
    """A table of both models' IoU and the difference, beside the report's own difference on its data."""
    first, second = (run.results[split] if run.results else {} for run in (baseline, improved))
    own = split == "val" and _is_reports_data(baseline)
    rows = []
    for index, name in enumerate(improved.names):
        pair = first["iou"][name], second["iou"][name]
        theirs = [_difference(OWN_IOU["baseline"][index], OWN_IOU["improved"][index])] if own else []
        texts = ["absent" if value is None else f"{value:.5f}" for value in pair]
        rows.append([f"{index} {name}", *texts, _difference(*pair), *theirs])
    pair = first["mean_iou"], second["mean_iou"]
    theirs = [_difference(OWN_MEAN_IOU["baseline"], OWN_MEAN_IOU["improved"], 6)] if own else []
    rows.append(["mean", *(f"{value:.6f}" for value in pair), _difference(*pair, 6), *theirs])
    header = ["class", baseline.title, improved.title, "difference", *([f"{OWN}'s difference"] if own else [])]
    return table(header, rows, total=True)
