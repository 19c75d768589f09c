"""One training run, from settings to pictures: what every training experiment has in common."""

import dataclasses
import functools
import json
import pathlib
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging as absl_logging
from flax import linen as nn
from tqdm import tqdm

from experiments.settings import Settings
from jaxseg import checkpoint, metrics, optimizer, plots, pretrained, train
from jaxseg.data import folder, loader, shapes
from jaxseg.data.labels import Labels, default_colours
from jaxseg.decoders import start_at_prior
from jaxseg.log import MetricsLog, read_metrics
from jaxseg.resnet import ResNet
from jaxseg.segmenter import Segmenter

NUM_PICTURES = 12

# (variables on the devices, split) -> (C, C) int64 confusion matrix.
Evaluate = Callable[[Any, str], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Run:
    """What a run is made of once everything is opened and checked.

    Attributes:
      settings: complete settings.
      labels: the class names and colours.
      splits: 'train', 'val' and perhaps 'test': random-access sources.
      model: the segmenter.
      variables: {'params', 'batch_stats'} at the start.
      stages: the stages that have epochs.
      devices: the local devices.
    """

    settings: Settings
    labels: Labels
    splits: dict[str, Any]
    model: nn.Module
    variables: Any
    stages: tuple[train.Stage, ...]
    devices: tuple[jax.Device, ...]


@dataclasses.dataclass(frozen=True)
class _Subset:
    """Some items of a source, in the given order."""

    source: Any
    indices: list[int]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.source[self.indices[index]]

    def label_sizes(self) -> np.ndarray:
        return self.source.label_sizes()[self.indices]


def run(settings: Settings, make_decoder: Callable[[int], nn.Module]) -> int:
    """Trains, evaluates, draws; returns the exit code.

    Args:
      settings: complete settings.
      make_decoder: num_classes -> decoder.
    """
    absl_logging.set_verbosity(absl_logging.ERROR)
    try:
        check_workdir(settings.workdir)
        prepared = prepare(settings, make_decoder)
        # Another run may have taken the folder meanwhile: making it is what claims it.
        check_workdir(settings.workdir)
        settings.workdir.mkdir(parents=True, exist_ok=settings.workdir.is_dir())
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    try:
        execute(prepared)
    except FloatingPointError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def check_workdir(workdir: pathlib.Path) -> None:
    """Raises ValueError unless the workdir is missing or an empty folder."""
    if workdir.exists() and not workdir.is_dir():
        raise ValueError(f"--workdir {workdir} is a file: name a folder")
    if workdir.is_dir() and any(workdir.iterdir()):
        raise ValueError(f"--workdir {workdir} is not empty: name another, or remove what is in it")


def prepare(settings: Settings, make_decoder: Callable[[int], nn.Module]) -> Run:
    """Opens the data and the weights and checks that all fits, before any training.

    Raises:
      ValueError: something does not fit; the message is one line for the user.
      OSError: a file or folder cannot be read.
    """
    devices = tuple(jax.local_devices())
    if settings.batch_size % len(devices):
        fitting = -(-settings.batch_size // len(devices)) * len(devices)
        raise ValueError(
            f"--batch-size {settings.batch_size} cannot be split over {len(devices)} devices: use {fitting}"
        )
    labels, splits = open_data(settings)
    loader.steps_per_epoch(splits["train"], settings.batch_size)
    model = Segmenter(ResNet(axis_name=train.AXIS), make_decoder(labels.num_classes))
    variables = initialise(model, settings)
    if settings.decoder_init == "prior":
        counts = count_classes(splits["train"], labels.num_classes)
        decoder = start_at_prior(variables["params"]["decoder"], counts.sum(0))
        variables = {**variables, "params": {**variables["params"], "decoder": decoder}}
        print("decoder: its first guess is the classes' frequencies (--decoder-init prior)")
    names = ("stage 1: encoder frozen", "stage 2: everything")
    stages = tuple(
        train.Stage(name, epochs, rate, freeze, settings.schedule)
        for name, epochs, rate, freeze in zip(
            names, settings.epochs, settings.learning_rate, (True, False), strict=True
        )
        if epochs
    )
    return Run(settings, labels, splits, model, variables, stages, devices)


def open_data(settings: Settings) -> tuple[Labels, dict[str, Any]]:
    """Opens, prepares or checks the data set that the settings name; raises as `prepare` says."""
    kind, _, directory = settings.dataset.partition(":")
    if kind == "shapes":
        colours = ((0, 0, 0), *default_colours(len(shapes.NAMES) - 1))
        return Labels(shapes.NAMES, colours), shapes.open_shapes(settings.data_dir)
    labels, splits = folder.open_folder(pathlib.Path(directory), settings.num_classes)
    folder.check_folder(splits, labels.num_classes)
    return labels, splits


def initialise(model: nn.Module, settings: Settings) -> Any:
    """The model's variables: random from the seed, the encoder's replaced by the weights file if there is one."""
    image = jnp.zeros((1, 64, 64, 3), jnp.uint8)
    variables = jax.jit(model.init)(jax.random.key(settings.seed), image)
    if settings.weights == "none":
        print("encoder: random numbers (--weights none)")
        return variables
    encoder = {name: tree["encoder"] for name, tree in variables.items()}
    encoder = pretrained.load_encoder(pathlib.Path(settings.weights), encoder)
    print(f"encoder: {settings.weights}")
    return {name: {**tree, "encoder": encoder[name]} if name in encoder else tree for name, tree in variables.items()}


def describe(stage: train.Stage, params: Any) -> str:
    """One line: what is frozen in a stage and what trains, with parameter counts."""
    fates = optimizer.parameter_labels(params, stage.freeze_encoder)
    counts: dict[str, int] = {}
    parts: dict[str, set[str]] = {}
    for part, tree in params.items():
        for fate, leaf in zip(jax.tree.leaves(fates[part]), jax.tree.leaves(tree), strict=True):
            counts[fate] = counts.get(fate, 0) + leaf.size
            parts.setdefault(fate, set()).add(part)
    what = [
        f"{verb} {' and '.join(sorted(parts[fate]))} ({counts[fate]:,} parameters)"
        for fate, verb in (("train", "trains"), ("frozen", "keeps"))
        if fate in counts
    ]
    return f"{stage.name}: {', '.join(what)}; {stage.epochs} epochs, learning rate {stage.learning_rate:g}"


def execute(run: Run) -> None:
    """Trains all stages, then evaluates the best checkpoint and draws; everything goes below the workdir."""
    settings, workdir = run.settings, run.settings.workdir
    meta = {"settings": _jsonable(settings), "names": run.labels.names, "colours": run.labels.colours}
    (workdir / "config.json").write_text(json.dumps(meta, indent=2) + "\n")
    sizes = ", ".join(f"{len(source)} {name}" for name, source in run.splits.items())
    print(f"images: {sizes}; devices: {len(run.devices)}")
    for number, epochs in enumerate(settings.epochs, start=1):
        if not epochs:
            print(f"stage {number}: left out (0 epochs)")
    for stage in run.stages:
        print(describe(stage, run.variables["params"]))
    with (
        checkpoint.open_checkpoints(workdir / "checkpoints") as manager,
        MetricsLog(workdir, run.labels.num_classes) as log,
    ):
        # One function for all splits and stages: it compiles once where the labels' sizes agree.
        evaluate = make_evaluate(run)
        best = train_stages(run, evaluate, manager, log, meta)
        variables, saved = checkpoint.restore_model(manager, checkpoint.BEST, run.variables)
    best_epoch = f"{saved['stage_name']}, epoch {saved['epoch']}"
    print(f"\nbest on the validation split: {best_epoch}, mean_iou {metrics.mean_iou(best):.6f}")
    results = {"val": best}
    if "test" in run.splits:
        results["test"] = evaluate(train.replicate(variables, run.devices), "test")
        print(f"test split, at that epoch ({best_epoch}):")
        print_table(results["test"], run.labels)
    write_results(workdir, results, run.labels)
    draw(run, variables, best)
    print(f"\neverything is in {workdir}: config.json, metrics.csv, results.json, events/, checkpoints/, figures/")


def train_stages(run: Run, evaluate: Evaluate, manager: Any, log: MetricsLog, meta: dict[str, Any]) -> np.ndarray:
    """Trains stage after stage, each from where the last one ended; returns the best epoch's confusion matrix."""
    variables, step = run.variables, 0
    best = previous = None
    for stage in run.stages:
        variables, step, confusions = train_one_stage(run, stage, variables, step, evaluate, manager, log, meta)
        print(f"\nvalidation split after {stage.name}:")
        print_table(confusions[-1], run.labels)
        if previous is not None:
            print(stage_difference(previous, confusions[-1], run.labels.names))
        previous = confusions[-1]
        for confusion in confusions:
            # Of equals the last is the best, as in the checkpoints.
            if best is None or metrics.mean_iou(confusion) >= metrics.mean_iou(best):
                best = confusion
    return best


def train_one_stage(
    run: Run,
    stage: train.Stage,
    variables: Any,
    step: int,
    evaluate: Evaluate,
    manager: Any,
    log: MetricsLog,
    meta: dict[str, Any],
) -> tuple[Any, int, list[np.ndarray]]:
    """Trains one stage, with a progress bar, a log row for each update and a checkpoint for each epoch.

    Returns:
      The variables and the global step at its end, and the confusion matrix of each epoch.
    """
    settings, number = run.settings, 1 if stage.freeze_encoder else 2
    steps = loader.steps_per_epoch(run.splits["train"], settings.batch_size)
    rate, first_step = optimizer.make_schedule(stage.schedule, stage.learning_rate, stage.epochs * steps), step
    # For the log, all at once: a schedule asked in the loop would be computed on the device, behind its queue.
    rates = np.broadcast_to(np.asarray(rate(np.arange(stage.epochs * steps))), stage.epochs * steps)
    tx = optimizer.make_optimizer(rate, stage.freeze_encoder, settings.adam_b2)
    state = train.start_stage(variables, tx, run.devices, step)
    # Each stage draws its own order, so that a seed's stages do not repeat each other.
    batches = loader.train_batches(
        run.splits["train"],
        image_size=settings.image_size,
        batch_size=settings.batch_size,
        seed=2 * settings.seed + number,
    )
    validate = functools.partial(evaluate, split="val")
    events = train.run_stage(run.model, tx, state, stage, batches, steps, validate, run.devices)
    confusions, losses, start = [], [], time.perf_counter()
    total = stage.epochs * steps * settings.batch_size
    with tqdm(total=total, desc=stage.name, unit="img", disable=None, smoothing=0.1) as bar:
        for event in events:
            if isinstance(event, train.StepDone):
                losses.append(event.loss)
                log.step(number, event.epoch, event.step, event.loss, float(rates[event.step - 1 - first_step]))
                bar.update(settings.batch_size)
                bar.set_postfix(loss=f"{event.loss:.3f}", refresh=False)
                continue
            seconds, loss = time.perf_counter() - start, float(np.mean(losses))
            iou = metrics.iou_per_class(event.confusion)
            log.epoch(number, event.epoch, event.step, loss, event.mean_iou, iou, seconds)
            epoch = {"stage": number, "stage_name": stage.name, "epoch": event.epoch}
            checkpoint.save(manager, event.state, event.mean_iou, {**meta, **epoch})
            result = f"loss {loss:.4f}  val mean_iou {event.mean_iou:.4f}  {seconds:.1f} s"
            tqdm.write(f"epoch {event.epoch}/{stage.epochs}  {result}")
            confusions.append(event.confusion)
            # The next step donates the state's buffers: only the last epoch's outlive the loop.
            variables, step = {"params": event.state.params, "batch_stats": event.state.batch_stats}, event.step
            losses, start = [], time.perf_counter()
    return variables, step, confusions


def make_evaluate(run: Run) -> Evaluate:
    """Builds the evaluation of variables on a split of the run's data."""
    evaluate = train.make_evaluate(run.model, run.labels.num_classes, run.devices)
    sizes = {"image_size": run.settings.image_size, "batch_size": run.settings.batch_size}

    def evaluate_split(variables: Any, split: str) -> np.ndarray:
        return evaluate(variables, loader.eval_batches(run.splits[split], **sizes))

    return evaluate_split


def print_table(confusion: np.ndarray, labels: Labels) -> None:
    """Prints the IoU table in the report's form, and the best and the worst class."""
    print(metrics.iou_table(confusion, labels.names))
    print(metrics.best_and_worst(confusion, labels.names))


def stage_difference(before: np.ndarray, after: np.ndarray, names: tuple[str, ...]) -> str:
    """One line: what the second stage added to the first, and the classes that gained most and least."""
    first, second = metrics.mean_iou(before), metrics.mean_iou(after)
    line = f"stage 2 added {second - first:+.4f} to stage 1's mean_iou ({first:.4f} -> {second:.4f})"
    gain = metrics.iou_per_class(after) - metrics.iou_per_class(before)
    if not np.isfinite(gain).any():
        return line
    most, least = int(np.nanargmax(gain)), int(np.nanargmin(gain))
    return f"{line}; most for {names[most]} ({gain[most]:+.3f}), least for {names[least]} ({gain[least]:+.3f})"


def write_results(workdir: pathlib.Path, confusions: dict[str, np.ndarray], labels: Labels) -> None:
    """Writes results.json: for each split mean IoU, IoU per class (null where absent) and the confusion matrix."""
    results = {
        split: {
            "mean_iou": metrics.mean_iou(confusion),
            "iou": {
                name: None if np.isnan(value) else value
                for name, value in zip(labels.names, metrics.iou_per_class(confusion).tolist(), strict=True)
            },
            "confusion": confusion.tolist(),
        }
        for split, confusion in confusions.items()
    }
    (workdir / "results.json").write_text(json.dumps(results, indent=2) + "\n")


def draw(run: Run, variables: Any, confusion: np.ndarray) -> None:
    """Draws the figures of a run below `workdir/figures`."""
    directory = run.settings.workdir / "figures"
    directory.mkdir(exist_ok=True)
    history = []
    for stage in run.stages:
        number = 1 if stage.freeze_encoder else 2
        steps, epochs = (read_metrics(run.settings.workdir, kind, number) for kind in ("step", "epoch"))
        row = (steps["step"], steps["loss"], epochs["epoch"], epochs["mean_iou"])
        history.append(plots.StageHistory(stage.name, *row))
    plots.plot_training(history, directory, first=1 if run.stages[0].freeze_encoder else 2)
    plots.plot_confusion(confusion, run.labels.names, directory / "confusion.png")
    source = run.splits["val"]
    counts = count_classes(source, run.labels.num_classes)
    chosen = plots.choose_examples(counts, min(NUM_PICTURES, len(source)))
    predictions = predict(run, variables, _Subset(source, chosen))
    examples = []
    for index, prediction in zip(chosen, predictions, strict=True):
        item = source[index]
        confusion = metrics.confusion_matrix(item["label"], prediction, run.labels.num_classes)
        examples.append(
            plots.Example(item["image"], item["label"], prediction, item["name"], metrics.mean_iou(confusion))
        )
    plots.plot_results(examples, run.labels.names, run.labels.colours, directory / "results.png")


def predict(run: Run, variables: Any, source: Any) -> list[np.ndarray]:
    """The class map of each image of a source, (h, w) int32 at its label's size."""
    step_fn = functools.partial(train.predict_step, model=run.model)
    step_fn = train.pmap_step(step_fn, run.devices, per_image=True)
    variables = train.replicate(variables, run.devices)
    settings, maps = run.settings, []
    batches = loader.eval_batches(source, image_size=settings.image_size, batch_size=settings.batch_size)
    for batch in train.batches_on_devices(batches, run.devices):
        prediction = np.asarray(step_fn(variables, batch))
        maps.extend(prediction.reshape(-1, *prediction.shape[2:]))
    sizes = source.label_sizes()
    return [classes[:height, :width] for classes, (height, width) in zip(maps, sizes, strict=False)]


def count_classes(source: Any, num_classes: int) -> np.ndarray:
    """The pixels of each class in each image of a source: (images, num_classes) int64."""
    labels = (source[index]["label"] for index in range(len(source)))
    return np.stack([np.bincount(label.ravel(), minlength=256)[:num_classes] for label in labels])


def _jsonable(settings: Settings) -> dict[str, Any]:
    values = dataclasses.asdict(settings)
    return {name: str(value) if isinstance(value, pathlib.Path) else value for name, value in values.items()}
