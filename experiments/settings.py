"""The options of the training experiments. Imports no jax, so that --help comes at once."""

import dataclasses
import datetime
import math
import pathlib
from typing import Any, Literal, TypeVar

import tyro

from experiments.arguments import quick_arguments
from experiments.datasets import KINDS, DataOptions, check_options, short_name, split_dataset

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What a data set is trained with unless an option says otherwise; see `Options` for each."""

    image_size: tuple[int, int]
    batch_size: int
    epochs: tuple[int, int]
    learning_rate: tuple[float, float]
    schedule: Literal["constant", "cosine"]
    adam_b2: float
    decoder_init: Literal["he", "prior"]
    max_degrees: float = 0.0
    dropout: tuple[float, float] = (0.0, 0.0)
    encoder_rate: float = 1.0
    class_weights: Literal["none", "sqrt", "median"] = "none"


# The report's image size; the rest as the search on CamVid (experiments/CAMVID.md) found it at smaller ones.
_PRETRAINED = Recipe((352, 448), 8, (5, 20), (1e-3, 1e-3), "cosine", 0.999, "he")
_BASELINE = {
    # The encoder starts from random numbers, and it has to fit into ten minutes on two CPU cores. Its features are of
    # little use to stage 1, which is therefore short and gentle.
    "shapes": Recipe((96, 128), 8, (1, 9), (1e-4, 1e-3), "cosine", 0.98, "prior"),
    "folder": _PRETRAINED,
    "voc9": dataclasses.replace(_PRETRAINED, batch_size=32),
    "camvid": dataclasses.replace(_PRETRAINED, image_size=(192, 256), learning_rate=(1e-3, 2e-3), class_weights="sqrt"),
    "tfds": _PRETRAINED,
}
# The report gives the baseline's and the improved model's parts, the rotation by up to 30 degrees, the image size, and
# that stage 2 has a smaller learning rate, which in the improved model here a pretrained encoder alone has; epochs,
# rates, batch size and dropout are ours.
_IMPROVED = {
    kind: dataclasses.replace(
        recipe, learning_rate=(1e-2, 1e-2), encoder_rate=0.1, max_degrees=30.0, dropout=(0.0, 0.2)
    )
    for kind, recipe in _BASELINE.items()
}
# By experiment and kind of data set.
RECIPES = {("baseline", kind): recipe for kind, recipe in _BASELINE.items()}
RECIPES |= {("improved", kind): recipe for kind, recipe in _IMPROVED.items()}
RECIPES["improved", "shapes"] = dataclasses.replace(_IMPROVED["shapes"], learning_rate=(1e-3, 1e-3), encoder_rate=1.0)
# Of what was tried on CamVid the best was without rotation, whose price the ablation is there to find.
RECIPES["improved", "camvid"] = dataclasses.replace(_IMPROVED["camvid"], max_degrees=0.0, dropout=(0.0, 0.1))
RECIPES["ablation", "camvid"] = dataclasses.replace(RECIPES["improved", "camvid"], max_degrees=10.0)


# What --quick takes instead. Stage 2 has two epochs, so that a curve of them is one.
_QUICK: dict[str, Any] = {"image_size": (64, 96), "batch_size": 8, "epochs": (1, 2)}


# Pixels along a side; far beyond what any machine trains at.
_LARGEST = 16384
_LARGEST_SCALE = 16.0
# The options that change no number: a run may go on with others.
_PROCESSES = ("coordinator", "num_processes", "process_id")
_FREE = {"boundary_iou", "data_dir", "manual_dir", "workdir", "save_minutes", "summary", "debug_nans", "distributed"}
_FREE |= set(_PROCESSES)


@dataclasses.dataclass(frozen=True)
@quick_arguments
class Options(DataOptions):
    """Settings of a run as they are given. An option left at None takes the value of the data set's recipe."""

    quick: bool = False
    """A trial from end to end, in a minute or a few, whose numbers mean nothing: small images, few epochs, and
    `shapes:small` for `shapes`. Options that are given count all the same."""
    encoder: Literal["resnet18", "resnet34", "resnet50", "resnet101", "resnet152"] = "resnet18"
    """The encoder, with torchvision's geometry."""
    weights: str | None = None
    """The encoder's weights: `imagenet` (downloaded from torchvision once, then cached), a file of the same ResNet
    (.pth or .pt as PyTorch saves it, or .safetensors, torchvision's or timm's), the workdir of a run of ours or its
    folder checkpoints/ (the best checkpoint), one checkpoint in it such as RUN/checkpoints/7, or `none` for a random
    encoder. Must be given for every data set but `shapes`."""
    weights_scope: Literal["encoder", "all"] = "encoder"
    """What is taken from a run given as --weights: its encoder, or the decoder too (`all`)."""
    image_size: tuple[int, int] | None = None
    """Height and width in pixels to which images are resized for training and evaluation."""
    eval_size: Literal["fixed", "native"] = "fixed"
    """The size at which images are evaluated: `fixed`, resized to --image-size; or `native`, each at its own. Labels
    always keep theirs."""
    batch_size: int | None = None
    """Images in a batch, over all devices."""
    epochs: tuple[int, int] | None = None
    """Epochs of stage 1 (encoder frozen) and of stage 2 (everything trains); 0 leaves a stage out."""
    learning_rate: tuple[float, float] | None = None
    """Adam's learning rate in stage 1 and in stage 2: the decoder's, of which the encoder has the share that the next
    option gives."""
    encoder_rate: float | None = None
    """The encoder's learning rate in stage 2 as a share of --learning-rate's: 0.1 lets a decoder with batch norm learn
    ten times as fast as the weights that the encoder brought along."""
    class_weights: Literal["none", "sqrt", "median"] | None = None
    """How much a pixel counts in the loss: `none`, all the same; `median`, by its class, the rarer the more (the median
    of the classes' frequencies in the training labels divided by the class's own, Eigen and Fergus 2015); or `sqrt`,
    by the square root of that."""
    schedule: Literal["constant", "cosine"] | None = None
    """The learning rate over a stage: constant, or up in its first twentieth and along a cosine down to 0."""
    adam_b2: float | None = None
    """How slowly Adam forgets squared gradients, from 0 to below 1. From a random encoder the first gradients are by
    far the largest: with the usual 0.999 they would hold later steps short for a thousand updates."""
    decoder_init: Literal["he", "prior"] | None = None
    """Where the decoder starts: `he`, random with a variance that survives its layers; or `prior`, which also centres
    its kernels and makes every pixel's first guess the classes' frequencies: a random encoder needs it."""
    max_degrees: float | None = None
    """Each training image is rotated, together with its label, by an angle drawn up to this one; 0 rotates none."""
    augment: Literal["resize", "scale-crop"] = "resize"
    """How training images come to --image-size: `resize`; or `scale-crop`, each resized from its own size by a random
    factor and a window cut out, with ignored padding where it is smaller (goes well with --eval-size native)."""
    scale_range: tuple[float, float] = (0.5, 2.0)
    """The smallest and the largest factor of --augment scale-crop."""
    flip: bool = False
    """Mirror half of the training images, left for right."""
    jitter: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)
    """How far each training image's brightness, contrast, saturation (shares) and hue (turns) are changed at most, as
    torchvision's ColorJitter does; such as 0.4 0.4 0.4 0.1."""
    dropout: tuple[float, float] | None = None
    """The share of the improved decoder's last features that is dropped in stage 1 and in stage 2."""
    cache_features: bool = True
    """Where the encoder is frozen, images are the same in every epoch and there is more than one, compute the encoder's
    features of the training images once, not in every epoch; up to 1 GiB is kept in memory, more in a temporary file
    in the workdir. Only with one process."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """The numbers of the computation. With bfloat16 parameters, batch statistics, the last convolution and the loss
    stay float32; it takes half the memory, and less time where the hardware has it."""
    seed: int = 0
    """Seeds the initial parameters, the order of the images, how they are changed, and the dropout."""
    workdir: pathlib.Path | None = None
    """Folder for everything that the run writes; a fresh one under runs/ if it is not given. A run that was stopped
    goes on when it is given the same folder and options again."""
    save_minutes: float = 10.0
    """Minutes between checkpoints within an epoch; there is one after each epoch, and on Ctrl-C and SIGTERM."""
    boundary_iou: bool = False
    """Add boundary IoU (Cheng et al. 2021; 2 % of each image's diagonal wide) to results.json and to the tables of the
    best checkpoint, which are then printed for the validation split too; not to the validation of each epoch."""
    summary: bool = False
    """Print the model's layers, their output shapes and parameters, and stop."""
    debug_nans: bool = False
    """Stop with a traceback at the operation that first gives a NaN; slower, on one device."""
    distributed: bool = False
    """Train together with the other processes of the job: of SLURM (started by srun), Open MPI (mpirun) or GKE, which
    JAX finds. The batch is split over the devices of all of them, and process 0 writes."""
    coordinator: str | None = None
    """The same where JAX cannot find the processes: HOST:PORT of process 0, a free port that the others can reach."""
    num_processes: int | None = None
    """How many processes there are; with --coordinator."""
    process_id: int | None = None
    """Which one of them this is, from 0; with --coordinator."""


@dataclasses.dataclass(frozen=True)
class Settings(Options):
    """Settings of a run, complete: as `Options`, and none of these is None any more."""

    _: dataclasses.KW_ONLY
    weights: str
    image_size: tuple[int, int]
    batch_size: int
    epochs: tuple[int, int]
    learning_rate: tuple[float, float]
    schedule: Literal["constant", "cosine"]
    adam_b2: float
    decoder_init: Literal["he", "prior"]
    max_degrees: float
    dropout: tuple[float, float]
    # What a run had before there were these two options.
    encoder_rate: float = 1.0
    class_weights: Literal["none", "sqrt", "median"] = "none"
    workdir: pathlib.Path


def parse(name: str, description: str, argv: list[str] | None = None) -> Settings:
    """Reads the command line of an experiment that has these options alone.

    Args:
      name: the experiment's, such as 'baseline'.
      description: what it does, for --help.
      argv: the arguments, `sys.argv[1:]` if None.

    Returns:
      The settings, with every None replaced that has a default.

    Raises:
      ValueError: a value is out of range, or the data set or the weights are not named as they must be.
    """
    return complete(read_options(Options, name, description, argv), name)


def read_options(options: type[T], name: str, description: str, argv: list[str] | None = None) -> T:
    """Reads the command line; prints the help and exits (0), or a mistake in it (2), as argparse does.

    Args:
      options: a dataclass: `Options`, or one that has it as a field among others.
      name: the experiment's.
      description: what it does, for --help.
      argv: the arguments, `sys.argv[1:]` if None.
    """
    return tyro.cli(
        options,
        prog=f"python -m experiments.{name}",
        description=f"{description}\n\n{_list_recipes(name)}",
        args=argv,
        config=(tyro.conf.OmitSubcommandPrefixes,),
    )


def _list_recipes(name: str) -> str:
    """An experiment's recipes as its --help gives them."""
    recipes = {kind: dataclasses.asdict(_find_recipe(name, kind)) for kind in KINDS}
    lines = ["What an option with the default None is, for each kind of data set, and with --quick:"]
    for kind, values in {**recipes, "quick": _QUICK}.items():
        texts = {option: " ".join(map(str, x)) if isinstance(x, tuple) else str(x) for option, x in values.items()}
        options = " ".join(f"--{option.replace('_', '-')} {text}" for option, text in texts.items())
        lines.append(f"{kind}: {options}")
    return "\n\n".join(lines)


def _find_recipe(name: str, kind: str, quick: bool = False) -> Recipe:
    """An experiment's recipe for a kind of data set: the improved model's where it has none of its own."""
    recipe = RECIPES.get((name, kind), RECIPES["improved", kind])
    if name == "end_to_end":  # everything at one rate
        recipe = dataclasses.replace(recipe, encoder_rate=1.0)
    return dataclasses.replace(recipe, **_QUICK) if quick else recipe


def complete(options: Options, name: str) -> Settings:
    """Fills in the recipe and the workdir, and checks every value; raises ValueError as `parse` says."""
    if options.quick and options.dataset == "shapes":
        options = dataclasses.replace(options, dataset="shapes:small")
    kind, _ = split_dataset(options.dataset)
    if not options.weights and (kind != "shapes" or options.weights is not None):
        raise ValueError(
            "--weights is missing: give imagenet, a .pth, .pt or .safetensors file, the workdir of a run or one of its"
            " checkpoints, or none for a random encoder"
        )
    recipe = dataclasses.asdict(_find_recipe(name, kind, options.quick))
    values = {option: value for option, value in recipe.items() if getattr(options, option) is None}
    if options.weights is None:
        values["weights"] = "none"
    if options.workdir is None:
        now = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
        values["workdir"] = pathlib.Path("runs") / f"{name}-{short_name(options.dataset)}-{now}"
    settings = Settings(**{**vars(options), **values})
    _check(settings)
    if name == "baseline" and any(settings.dropout):
        raise ValueError("--dropout is for the improved model: the baseline has none")
    return settings


def describe_schedule(settings: Settings) -> str:
    """The schedule of the learning rate, and where it is not the usual, what the encoder has of it and the loss."""
    own = f", the encoder's in stage 2 {settings.encoder_rate:g} of it" if settings.encoder_rate != 1 else ""
    loss = f", class weights {settings.class_weights} in the loss" if settings.class_weights != "none" else ""
    return f"{settings.schedule}{own}{loss}"


def to_json(settings: Settings) -> dict[str, Any]:
    """The settings as JSON gives them back: paths as str, tuples as lists."""
    return {name: _as_json(value) for name, value in dataclasses.asdict(settings).items()}


def _as_json(value: Any) -> Any:
    if isinstance(value, tuple):
        return list(value)
    return str(value) if isinstance(value, pathlib.Path) else value


def older_defaults() -> dict[str, Any]:
    """What an option was, as JSON has it, in a run of a version that did not have it: its default in `Settings`."""
    return {field.name: _as_json(field.default) for field in dataclasses.fields(Settings)}


def differences(there: dict[str, Any], here: dict[str, Any]) -> list[str]:
    """The options in which two `to_json` differ and by which their runs would: "--seed 1 there, 0 here"."""
    there, here = older_defaults() | there, older_defaults() | here
    return [
        f"--{name.replace('_', '-')} {there.get(name)} there, {here.get(name)} here"
        for name in sorted((there.keys() | here.keys()) - _FREE)
        if there.get(name) != here.get(name)
    ]


def _check(settings: Settings) -> None:
    if not all(0 < length <= _LARGEST for length in settings.image_size):
        raise ValueError(
            f"--image-size must be from 1 to {_LARGEST} pixels, not {settings.image_size[0]} {settings.image_size[1]}"
        )
    positive: list[tuple[str, float]] = [("--learning-rate", value) for value in settings.learning_rate]
    positive += [("--encoder-rate", settings.encoder_rate), ("--save-minutes", settings.save_minutes)]
    for option, value in [*positive, ("--batch-size", settings.batch_size)]:
        if not 0 < value < math.inf:
            raise ValueError(f"{option} must be above 0 and finite, not {value}")
    if not 0 <= settings.adam_b2 < 1:
        raise ValueError(f"--adam-b2 must be from 0 to below 1, not {settings.adam_b2}")
    if not 0 <= settings.max_degrees <= 180:
        raise ValueError(f"--max-degrees must be from 0 to 180, not {settings.max_degrees}")
    low, high = settings.scale_range
    if not 0 < low <= high <= _LARGEST_SCALE:
        raise ValueError(f"--scale-range must rise, from above 0 to at most {_LARGEST_SCALE}, not {low} {high}")
    if not all(0 <= strength < math.inf for strength in settings.jitter) or settings.jitter[3] > 0.5:
        jitter = " ".join(map(str, settings.jitter))
        raise ValueError(f"--jitter must be four numbers from 0 up, the last (hue) at most 0.5, not {jitter}")
    if not all(0 <= rate < 1 for rate in settings.dropout):
        raise ValueError(f"--dropout must be from 0 to below 1, not {settings.dropout[0]} {settings.dropout[1]}")
    check_seed(settings.seed, "--seed")
    if min(settings.epochs) < 0 or max(settings.epochs) == 0:
        raise ValueError(f"--epochs {settings.epochs[0]} {settings.epochs[1]}: both from 0 up, and one of them above 0")
    if settings.weights_scope == "all" and settings.weights in ("none", "imagenet"):
        raise ValueError(f"--weights-scope all: --weights {settings.weights} has no decoder, name the workdir of a run")
    _check_processes(settings)
    check_options(settings)


def check_seed(seed: int, option: str) -> None:
    """Raises ValueError, and names the option, if a seed is out of range."""
    # The loader's seeds are twice this one, and 32 bits long.
    if not 0 <= seed < 2**31 - 1:
        raise ValueError(f"{option} must be from 0 to {2**31 - 2}, not {seed}")


def _check_processes(settings: Settings) -> None:
    coordinator, number, index = settings.coordinator, settings.num_processes, settings.process_id
    missing = [f"--{name.replace('_', '-')}" for name in _PROCESSES if getattr(settings, name) is None]
    if len(missing) not in (0, len(_PROCESSES)):
        raise ValueError(f"--coordinator, --num-processes and --process-id go together: {', '.join(missing)} missing")
    if (settings.distributed or not missing) and settings.debug_nans:
        raise ValueError("--debug-nans works in one process: JAX cannot tell the operation of several")
    if coordinator is None or number is None or index is None:
        return
    if settings.distributed:
        raise ValueError("--distributed lets JAX find the processes, --coordinator names them: give one of the two")
    if not 0 <= index < number:
        raise ValueError(f"--process-id {index}: must be from 0 to below --num-processes {number}")
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise ValueError(f"--coordinator {coordinator!r}: must be HOST:PORT, such as 10.0.0.1:12345")
