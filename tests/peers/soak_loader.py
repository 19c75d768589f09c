"""Whether the memory that loading takes stays the same, however long it goes on.

    python -m tests.peers.soak_loader

reads 2,000 training batches of 8 images, JPEG and PNG in turns, and evaluates on all images every 100 batches, as a run
does; prints the resident memory as it goes. Exit code 1 if it grows by more than 5 % after the first 400 batches.
"""

import argparse
import pathlib
import sys
import tempfile
import time

import numpy as np
from PIL import Image
from tqdm import tqdm

from jaxseg.data import folder, loader

# Linux only: the second number is that of resident pages, of 4 KiB.
MEMORY = pathlib.Path("/proc/self/statm")


def resident() -> float:
    """MiB."""
    return int(MEMORY.read_text().split()[1]) * 4096 / 2**20


def write_images(root: pathlib.Path, number: int, size: tuple[int, int]) -> None:
    """Photograph-like noise up to a fifth smaller than `size`, and labels of 9 classes."""
    rng = np.random.default_rng(0)
    for part in ("img", "seg"):
        (root / "train" / part).mkdir(parents=True)
    for index in range(number):
        height, width = (int(length * rng.uniform(0.8, 1)) for length in size)
        noise = Image.fromarray(rng.integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8))
        name = f"{index}.{('jpg', 'png')[index % 2]}"
        noise.resize((width, height)).save(root / "train" / "img" / name, quality=90)
        label = Image.fromarray(rng.integers(0, 9, (height // 8, width // 8), dtype=np.uint8))
        label.resize((width, height), 0).save(root / "train" / "seg" / f"{index}.png")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, default=2000)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--image-size", type=int, nargs=2, default=(176, 224))
    parser.add_argument("--images", type=int, default=120)
    parser.add_argument("--scale-crop", action="store_true")
    options = parser.parse_args(argv)
    sizes = {"image_size": tuple(options.image_size), "batch_size": options.batch_size}
    with tempfile.TemporaryDirectory() as root:
        write_images(pathlib.Path(root), options.images, options.image_size)
        source = folder.open_folder(root, 9, ("train",))[1]["train"]
        scale_range = (0.5, 2.0) if options.scale_crop else None
        batches = iter(loader.train_batches(source, seed=0, scale_range=scale_range, **sizes))
        seen, began = [], time.perf_counter()
        for number in tqdm(range(1, options.batches + 1), disable=None):
            next(batches)
            if number % 100 == 0:
                for _ in loader.eval_batches(source, **sizes | {"image_size": None}):
                    pass
                seen.append(resident())
                tqdm.write(f"{number:5} batches  {time.perf_counter() - began:6.0f} s  {seen[-1]:7.1f} MiB")
    settled = max(seen[:4])
    grown = max(seen[4:], default=settled) / settled - 1
    print(f"at most {settled:.1f} MiB in the first 400 batches, {grown:+.1%} after them")
    return int(grown > 0.05)


if __name__ == "__main__":
    sys.exit(main())
