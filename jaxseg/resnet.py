"""The ResNet encoder: image -> feature maps at strides 2, 4, 8, 16 and 32."""

import functools
from typing import Any

import jax.numpy as jnp
from flax import linen as nn

from jaxseg.layers import Conv, max_pool

# Blocks in each of the four groups.
STAGE_SIZES = {"resnet18": (2, 2, 2, 2)}

# He et al. 2015b, fan-out: the variance of the gradient survives a ReLU; torchvision's choice for ResNets.
_he_fan_out = nn.initializers.variance_scaling(2.0, "fan_out", "normal")


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut: (N, H, W, C) -> (N, H / strides, W / strides, features)."""

    features: int
    strides: int
    conv: Any
    norm: Any

    @nn.compact
    def __call__(self, x: jnp.ndarray) -> jnp.ndarray:
        """Applies the block to x: (N, H, W, C) float."""
        shortcut = x
        # Symmetric padding as in PyTorch; 'SAME' would pad a stride-2 convolution on one side only.
        x = self.conv(self.features, (3, 3), strides=self.strides, padding=1, name="conv1")(x)
        x = nn.relu(self.norm(name="bn1")(x))
        x = self.conv(self.features, (3, 3), padding=1, name="conv2")(x)
        x = self.norm(name="bn2")(x)
        if shortcut.shape != x.shape:
            shortcut = self.conv(self.features, (1, 1), strides=self.strides, padding=0, name="downsample_conv")(
                shortcut
            )
            shortcut = self.norm(name="downsample_bn")(shortcut)
        return nn.relu(x + shortcut)


class ResNet(nn.Module):
    """A residual network without its classifier.

    Source: He et al. 2015, "Deep residual learning for image recognition"; the geometry is torchvision's, to the pixel.

    Attributes:
      stage_sizes: the number of blocks in each of the four groups.
      axis_name: the pmap axis over which batch statistics are averaged, or None.
      dtype: of the computation; parameters and statistics stay float32.
    """

    stage_sizes: tuple[int, int, int, int] = STAGE_SIZES["resnet18"]
    axis_name: str | None = None
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jnp.ndarray, train: bool = False) -> dict[int, jnp.ndarray]:
        """Computes the feature maps.

        Args:
          x: (N, H, W, 3) float, normalised; any H and W.
          train: batch norm uses, and updates, the batch's statistics; otherwise the running ones, unchanged.

        Returns:
          {2: (N, H/2, W/2, 64), 4: (N, H/4, W/4, 64), 8: (..., 128), 16: (..., 256), 32: (..., 512)}, sizes rounded up.
        """
        conv = functools.partial(Conv, kernel_init=_he_fan_out, dtype=self.dtype)
        # Flax's momentum 0.9 is PyTorch's 0.1. Flax keeps the biased running variance, PyTorch the unbiased one.
        norm = functools.partial(
            nn.BatchNorm,
            use_running_average=not train,
            momentum=0.9,
            epsilon=1e-5,
            axis_name=self.axis_name,
            dtype=self.dtype,
        )
        x = conv(64, (7, 7), strides=2, padding=3, name="conv1")(x)
        x = nn.relu(norm(name="bn1")(x))
        features = {2: x}
        x = max_pool(x)
        for group, blocks in enumerate(self.stage_sizes):
            for block in range(blocks):
                strides = 2 if group > 0 and block == 0 else 1
                name = f"layer{group + 1}_{block}"
                x = BasicBlock(64 * 2**group, strides, conv, norm, name=name)(x)
            features[4 * 2**group] = x
        return features
