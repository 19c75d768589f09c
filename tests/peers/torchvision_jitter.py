"""What torchvision's colour jitter makes of some pixels, for tests/test_augment.py, which needs no torchvision.

    python -m tests.peers.torchvision_jitter

writes tests/fixtures/jitter_torchvision.npz: an image, and for each case the factors, the order and the result as float
in 0..255. Last made with torchvision 0.28.0, which needs torch 2.13.0.
"""

import pathlib

import numpy as np
import torch
from torchvision.transforms.v2 import functional

CHANGES = (
    functional.adjust_brightness,
    functional.adjust_contrast,
    functional.adjust_saturation,
    functional.adjust_hue,
)


def main() -> None:
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)
    # Greys, and pixels of which two channels are equal: there a hue's formula has its cases.
    image[0] = [[0] * 3, [255] * 3, [77] * 3, [9, 9, 8], [9, 8, 9], [8, 9, 9], [255, 0, 0], [0, 0, 255]]
    factors = rng.uniform([0, 0, 0, -0.5], [2, 2, 2, 0.5], (12, 4)).astype(np.float32)
    factors[:2] = [[0, 1, 1, 0.5], [1, 0, 0, -0.5]]
    orders = np.stack([rng.permutation(4) for _ in factors])
    results = []
    for values, order in zip(factors, orders, strict=True):
        x = torch.from_numpy(image).permute(2, 0, 1).float() / 255
        for change in order:
            x = CHANGES[change](x, float(values[change]))
        results.append(255 * x.permute(1, 2, 0).numpy())
    path = pathlib.Path(__file__).parent.parent / "fixtures" / "jitter_torchvision.npz"
    np.savez_compressed(path, image=image, factors=factors, orders=orders, results=np.stack(results))


if __name__ == "__main__":
    main()
