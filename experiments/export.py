"""Writes a trained model as one file that runs elsewhere: a program for any JAX, or tensors for PyTorch."""

import dataclasses
import json
import pathlib
import sys
from typing import Annotated, Any, Literal

import tyro

from experiments.arguments import quick_arguments


@dataclasses.dataclass(frozen=True)
@quick_arguments
class Settings:
    """Settings of an export."""

    run: Annotated[tyro.conf.Positional[pathlib.Path], tyro.conf.arg(metavar="RUN")]
    """The workdir of a run, which may still be training, or one checkpoint in it, such as RUN/checkpoints/7."""
    output: pathlib.Path
    """The file to write; replaced if it is there. Beside it comes OUTPUT.json: the classes' names and colours, the size
    of the training images, which checkpoint it is."""
    checkpoint: str = "best"
    """Which checkpoint: `best` by validation mean IoU, `last`, or its number."""
    format: Literal["stablehlo", "safetensors"] = "stablehlo"
    """`stablehlo`: a program from images (N, H, W, 3) uint8 RGB to class maps (N, H, W), H and W multiples of 32, for
    CPU and CUDA; it needs jax, and neither jaxseg nor flax. `safetensors`: the weights in PyTorch's layout, the
    encoder's with torchvision's names."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """The numbers that a program computes with; by default those it was trained with."""


def main(argv: list[str] | None = None) -> int:
    """Exports with the given arguments, or the command line's; returns the exit code."""
    settings = tyro.cli(Settings, prog="python -m experiments.export", description=__doc__, args=argv)
    try:
        check(settings)
        run(settings)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def check(settings: Settings) -> None:
    """Raises ValueError where the options do not fit, before anything is loaded."""
    output = settings.output
    if output.is_dir():
        raise ValueError(f"--output {output} is a folder: name a file")
    if not output.parent.is_dir():
        raise ValueError(f"--output {output}: there is no folder {output.parent}: make it first")
    if settings.format == "safetensors":
        if output.suffix != ".safetensors":
            raise ValueError(f"--output {output}: the name must end in .safetensors")
        if settings.dtype is not None:
            raise ValueError("--dtype is for programs: tensors are written as float32")


def run(settings: Settings) -> None:
    """Loads the run and writes its model.

    Raises:
      ValueError: there is no such run, or its model cannot be written in that format; the message is one line.
      OSError: something cannot be read or written.
    """
    # Imported only now: jax takes seconds, and --help must not wait for it.
    from experiments.run import find_devices
    from experiments.trained import read_checkpoint
    from jaxseg.export import export_program
    from jaxseg.files import replacing
    from jaxseg.inference import load_run
    from jaxseg.pretrained import save_torch

    which, output = read_checkpoint(settings.checkpoint), settings.output
    find_devices()
    trained = load_run(settings.run, which, settings.dtype)
    if settings.format == "stablehlo":
        program = export_program(trained.model, trained.variables)
        with replacing(output) as new:
            new.write_bytes(program)
        what = "a program from images (N, H, W, 3) uint8 to class maps (N, H, W), H and W multiples of 32"
    else:
        save_torch(trained.variables, output)
        what = "tensors in PyTorch's layout"
    about = output.with_name(f"{output.name}.json")
    with replacing(about) as new:
        new.write_text(json.dumps(describe(trained), indent=2) + "\n")
    print(f"{output}: {what}, {output.stat().st_size / 1e6:.1f} MB")
    print(f"{about}: the names and colours of its {trained.labels.num_classes} classes")


def describe(trained: Any) -> dict[str, Any]:
    """What the file beside a model says of it; trained: a `jaxseg.inference.Trained`."""
    from jaxseg.segmenter import MEAN, STD

    return {
        "names": trained.labels.names,
        "colours": trained.labels.colours,
        "image_size": trained.image_size,
        "mean": MEAN,
        "std": STD,
        "encoder": trained.settings["encoder"],
        "decoder": type(trained.model.decoder).__name__,
        "checkpoint": trained.checkpoint,
    }


if __name__ == "__main__":
    sys.exit(main())
