"""The ResNet encoder: image -> feature maps at strides 2, 4, 8, 16 and 32."""

import functools
import math
from typing import Any, ClassVar

import jax.numpy as jnp
from flax import linen as nn

from jaxseg.initializers import normal
from jaxseg.layers import BatchNorm, Conv, max_pool

# He et al. 2015b, fan-out: the variance of the gradient survives a ReLU; torchvision's choice for ResNets.
_he_fan_out = normal(lambda shape: math.sqrt(2 / (math.prod(shape[:2]) * shape[3])))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut: (N, H, W, C) -> (N, H / strides, W / strides, width)."""

    width: int
    strides: int
    conv: Any
    norm: Any
    # The block's output has this many times `width` channels.
    expansion: ClassVar[int] = 1

    @nn.compact
    def __call__(self, x: jnp.ndarray) -> jnp.ndarray:
        """Applies the block to x: (N, H, W, C) float."""
        shortcut = x
        # Symmetric padding as in PyTorch; 'SAME' would pad a stride-2 convolution on one side only.
        x = self.conv(self.width, (3, 3), strides=self.strides, padding=1, name="conv1")(x)
        x = nn.relu(self.norm(name="bn1")(x))
        x = self.conv(self.width, (3, 3), padding=1, name="conv2")(x)
        x = self.norm(name="bn2")(x)
        return _add_shortcut(self, shortcut, x)


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions and a shortcut: (N, H, W, C) -> (N, H / strides, W / strides, 4 width).

    The stride is on the 3x3 convolution, as in torchvision; He et al. have it on the first 1x1.
    """

    width: int
    strides: int
    conv: Any
    norm: Any
    expansion: ClassVar[int] = 4

    @nn.compact
    def __call__(self, x: jnp.ndarray) -> jnp.ndarray:
        """Applies the block to x: (N, H, W, C) float."""
        shortcut = x
        x = self.conv(self.width, (1, 1), name="conv1")(x)
        x = nn.relu(self.norm(name="bn1")(x))
        x = self.conv(self.width, (3, 3), strides=self.strides, padding=1, name="conv2")(x)
        x = nn.relu(self.norm(name="bn2")(x))
        x = self.conv(self.width * self.expansion, (1, 1), name="conv3")(x)
        x = self.norm(name="bn3")(x)
        return _add_shortcut(self, shortcut, x)


def _add_shortcut(block: BasicBlock | Bottleneck, shortcut: jnp.ndarray, x: jnp.ndarray) -> jnp.ndarray:
    """Adds a block's input, projected if the shapes differ, to what its convolutions made of it."""
    if shortcut.shape != x.shape:
        conv = block.conv(x.shape[-1], (1, 1), strides=block.strides, name="downsample_conv")
        shortcut = block.norm(name="downsample_bn")(conv(shortcut))
    return nn.relu(x + shortcut)


# The blocks, and how many in each of the four groups.
VARIANTS: dict[str, tuple[type[BasicBlock] | type[Bottleneck], tuple[int, ...]]] = {
    "resnet18": (BasicBlock, (2, 2, 2, 2)),
    "resnet34": (BasicBlock, (3, 4, 6, 3)),
    "resnet50": (Bottleneck, (3, 4, 6, 3)),
    "resnet101": (Bottleneck, (3, 4, 23, 3)),
    "resnet152": (Bottleneck, (3, 8, 36, 3)),
}


class ResNet(nn.Module):
    """A residual network without its classifier.

    Source: He et al. 2015, "Deep residual learning for image recognition"; the geometry is torchvision's, to the pixel.

    Attributes:
      variant: a key of `VARIANTS`.
      axis_name: the pmap axis over which batch statistics are averaged, or None.
      dtype: of the computation; parameters and statistics stay float32.
    """

    variant: str = "resnet18"
    axis_name: str | None = None
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jnp.ndarray, train: bool = False) -> dict[int, jnp.ndarray]:
        """Computes the feature maps.

        Args:
          x: (N, H, W, 3) float, normalised; any H and W.
          train: batch norm uses, and updates, the batch's statistics; otherwise the running ones, unchanged.

        Returns:
          {2: (N, H/2, W/2, 64), 4: (N, H/4, W/4, 64 e), 8: (..., 128 e), 16: (..., 256 e), 32: (..., 512 e)}, sizes
          rounded up; e is the expansion of the variant's blocks, 1 for basic blocks and 4 for bottlenecks.
        """
        conv = functools.partial(Conv, kernel_init=_he_fan_out, dtype=self.dtype)
        norm = functools.partial(
            BatchNorm,
            use_running_average=not train,
            axis_name=self.axis_name,
            dtype=self.dtype,
        )
        x = conv(64, (7, 7), strides=2, padding=3, name="conv1")(x)
        x = nn.relu(norm(name="bn1")(x))
        features = {2: x}
        x = max_pool(x)
        block_class, stage_sizes = VARIANTS[self.variant]
        for group, blocks in enumerate(stage_sizes):
            for block in range(blocks):
                strides = 2 if group > 0 and block == 0 else 1
                name = f"layer{group + 1}_{block}"
                x = block_class(64 * 2**group, strides, conv, norm, name=name)(x)
            features[4 * 2**group] = x
        return features
