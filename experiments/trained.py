"""What the commands that use a trained run have in common: their options, and from a run to what classifies images.

Imports nothing that takes long, so that --help comes at once.
"""

import dataclasses
import pathlib
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, Literal

from experiments.arguments import quick_arguments

if TYPE_CHECKING:
    from jaxseg.inference import Trained
    from jaxseg.manner import Manner


@dataclasses.dataclass(frozen=True)
@quick_arguments
class ModelOptions:
    """Which model of a run, and how it classifies images."""

    checkpoint: str = "best"
    """Which checkpoint: `best` by validation mean IoU, `last`, or its number."""
    size: Literal["run", "native"] = "run"
    """At which size images are classified: `run`, as the run's own evaluation does, which gives its numbers exactly
    (resized to its --image-size, unless it was trained with --eval-size native); or `native`, each at its own size."""
    flip: bool = False
    """Classify each image's mirror image, too, and average the probabilities."""
    scales: tuple[float, ...] = (1.0,)
    """Classify each image at its size times each of these, from 0.1 to 4, and average the probabilities."""
    tile: int = 2048
    """At its own size, an image with a longer side than these pixels, a multiple of 32, is computed in tiles of this
    side that overlap and are blended: less takes less memory and more time."""
    batch_size: int | None = None
    """Images in a batch, fewer where they are large; that of the run's training if it is not given."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """The numbers of the computation; those that the run was trained with if it is not given."""


def read_checkpoint(option: str) -> str | int:
    """What --checkpoint says: 'best', 'last' or a number; raises ValueError for anything else."""
    if option in ("best", "last"):
        return option
    if not option.isdecimal():
        raise ValueError(f"--checkpoint {option}: use best, last or the number of a checkpoint")
    return int(option)


def open_run(run: pathlib.Path, options: ModelOptions) -> tuple["Trained", "Manner"]:
    """Loads a run, and says how it is to classify.

    Raises:
      ValueError: there is no such run or checkpoint, an option has no meaning, or JAX finds no device; in one line.
      OSError: it cannot be read.
    """
    from experiments.compiled import keep_compiled_programs
    from experiments.memory import give_back_what_compiling_took
    from experiments.run import find_devices
    from jaxseg.inference import load_run

    which = read_checkpoint(options.checkpoint)
    if options.batch_size is not None and options.batch_size < 1:
        raise ValueError(f"--batch-size must be 1 or more, not {options.batch_size}")
    keep_compiled_programs()
    give_back_what_compiling_took()
    find_devices()
    trained = load_run(run, which, options.dtype)
    image_size = None if options.size == "native" else trained.manner.image_size
    manner = dataclasses.replace(
        trained.manner, image_size=image_size, flip=options.flip, scales=options.scales, tile=options.tile
    )
    return trained, manner


def make_classify(trained: "Trained", manner: "Manner", options: ModelOptions) -> Callable[..., Iterator[Any]]:
    """`jaxseg.classify.make_classify` on all devices of this process."""
    import jax

    from jaxseg import classify

    batch_size = options.batch_size or trained.settings["batch_size"]
    return classify.make_classify(trained.model, trained.variables, manner, jax.local_devices(), batch_size)


def describe(trained: "Trained", manner: "Manner") -> str:
    """One line: which model it is, and how it classifies."""
    size = (
        "at its own size" if manner.image_size is None else f"resized to {manner.image_size[0]}x{manner.image_size[1]}"
    )
    more = [f"scales {' '.join(f'{scale:g}' for scale in manner.scales)}"] if manner.scales != (1.0,) else []
    more += ["mirrored too"] if manner.flip else []
    decoder = type(trained.model.decoder).__name__
    about = f"{trained.settings['encoder']} and {decoder}, {trained.checkpoint['stage_name']}, epoch"
    return f"{about} {trained.checkpoint['epoch']}; each image {', '.join([size, *more])}"


def classify_source(
    classify: Callable[..., Iterator[Any]], manner: "Manner", source: Any, indices: Iterable[int]
) -> Iterator[tuple[int, dict[str, Any], Any]]:
    """Classifies images of a data set; gives, in some order, the index, the example and its class map (H, W) uint8.

    Args:
      classify: from `make_classify`.
      manner: how it classifies.
      source: a split, as `jaxseg.data.loader.Source` says.
      indices: of the images.
    """
    from jaxseg.data.threads import map_ahead
    from jaxseg.manner import plan_canvases, prepare

    canvases = plan_canvases(source.label_sizes(), manner)

    def read(index: int) -> Any:
        item = source[index]
        return (index, item), prepare(item["image"], manner, canvases)

    for (index, item), classes in classify(map_ahead(read, indices)):
        yield index, item, classes


def work_until_stopped(work: Callable[[], int]) -> int:
    """Does the work of a command once all is opened and checked; tells in one line what a person can put right.

    Returns:
      What `work` does, the exit code; 1 where a file cannot be written or the memory does not suffice, 130 on Ctrl-C,
      143 on SIGTERM.
    """
    import jax

    from experiments.stop import Terminated, interrupted_by_signals

    try:
        with interrupted_by_signals():
            return work()
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as signal:
        print("\nstopped; what is written already stays", file=sys.stderr)
        return 143 if isinstance(signal, Terminated) else 130
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        print(f"error: not enough memory: give a smaller --batch-size or --tile ({error})", file=sys.stderr)
        return 1
