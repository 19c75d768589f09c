"""How long loading an encoder takes, and how much memory.

    python -m tests.peers.loading ../shared/weights/resnet18-9f26ff83.pth

prints the median and the slowest of some loads of the file, which the system has in its cache by then, and the most
memory allocated at once, in times of the file's size.
"""

import argparse
import pathlib
import statistics
import time
import tracemalloc

from jaxseg.pretrained import load_encoder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=pathlib.Path)
    parser.add_argument("--encoder", default="resnet18")
    parser.add_argument("--loads", type=int, default=11)
    options = parser.parse_args()
    seconds = []
    for _ in range(options.loads):
        start = time.perf_counter()
        load_encoder(options.encoder, options.file)
        seconds.append(time.perf_counter() - start)
    tracemalloc.start()
    load_encoder(options.encoder, options.file)
    peak = tracemalloc.get_traced_memory()[1]
    size = options.file.stat().st_size
    print(f"{options.file}: {size / 1e6:.1f} MB as {options.encoder}")
    print(f"{statistics.median(seconds):.3f} s, the slowest of {options.loads} {max(seconds):.3f} s")
    print(f"peak memory {peak / size:.2f} times the file")


if __name__ == "__main__":
    main()
