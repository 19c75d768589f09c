"""torchvision's ResNets in plain PyTorch, without the classifier: the same names, the same geometry."""

import zlib

import numpy as np
import torch
from torch import nn
from torch.nn import functional

# Blocks in each group, and whether they are bottlenecks.
VARIANTS = {
    "resnet18": ((2, 2, 2, 2), False),
    "resnet34": ((3, 4, 6, 3), False),
    "resnet50": ((3, 4, 6, 3), True),
    "resnet101": ((3, 4, 23, 3), True),
    "resnet152": ((3, 8, 36, 3), True),
}


class Block(nn.Module):
    """torchvision's BasicBlock, or its Bottleneck with the stride on the 3x3 convolution."""

    def __init__(self, inputs: int, width: int, stride: int, bottleneck: bool):
        super().__init__()
        outputs = 4 * width if bottleneck else width
        shapes = [(inputs, width, 3, stride), (width, width, 3, 1)]
        if bottleneck:
            shapes = [(inputs, width, 1, 1), (width, width, 3, stride), (width, outputs, 1, 1)]
        self.depth = len(shapes)
        for number, (channels, features, size, step) in enumerate(shapes, start=1):
            self.add_module(f"conv{number}", nn.Conv2d(channels, features, size, step, size // 2, bias=False))
            self.add_module(f"bn{number}", nn.BatchNorm2d(features))
        self.downsample = None
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x):
        shortcut = x if self.downsample is None else self.downsample(x)
        for number in range(1, self.depth + 1):
            x = getattr(self, f"bn{number}")(getattr(self, f"conv{number}")(x))
            if number < self.depth:
                x = functional.relu(x, inplace=True)
        return functional.relu(x + shortcut, inplace=True)


class ResNet(nn.Module):
    """Image (N, 3, H, W) -> {stride: features (N, C, H / stride, W / stride)}; `fc` is an Identity."""

    def __init__(self, variant: str):
        super().__init__()
        sizes, bottleneck = VARIANTS[variant]
        self.conv1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.channels = 64
        for group, size in enumerate(sizes):
            blocks = []
            for index in range(size):
                stride = 2 if group > 0 and index == 0 else 1
                blocks.append(Block(self.channels, 64 * 2**group, stride, bottleneck))
                self.channels = 64 * 2**group * (4 if bottleneck else 1)
            self.add_module(f"layer{group + 1}", nn.Sequential(*blocks))
        self.fc = nn.Identity()

    def forward(self, x):
        features = {2: functional.relu(self.bn1(self.conv1(x)))}
        x = functional.max_pool2d(features[2], 3, 2, 1)
        for group in range(4):
            x = features[4 * 2**group] = getattr(self, f"layer{group + 1}")(x)
        return features


def random_tensors(variant: str) -> dict[str, np.ndarray]:
    """Values for every tensor of a variant, each from a generator seeded by its name; nothing is at its initial value.

    Kernels are normal with the variance of their fan-in's inverse; scales and variances lie in [0.5, 1.5].
    """
    with torch.device("meta"):
        shapes = {name: tuple(tensor.shape) for name, tensor in ResNet(variant).state_dict().items()}
    return {name: _draw(name, shape) for name, shape in shapes.items()}


def _draw(name: str, shape: tuple[int, ...]) -> np.ndarray:
    generator = np.random.default_rng(zlib.crc32(name.encode()))
    if name.endswith("num_batches_tracked"):
        return np.array(generator.integers(1, 1000))
    if len(shape) == 4:
        return generator.standard_normal(shape, np.float32) * np.float32(np.prod(shape[1:]) ** -0.5)
    low, high = (0.5, 1.5) if name.endswith(("weight", "running_var")) else (-0.2, 0.2)
    return generator.uniform(low, high, shape).astype(np.float32)


def load(variant: str, tensors: dict[str, np.ndarray]) -> ResNet:
    """A ResNet with these tensors, loaded strictly."""
    model = ResNet(variant)
    model.load_state_dict({name: torch.tensor(array) for name, array in tensors.items()}, strict=True)
    return model
