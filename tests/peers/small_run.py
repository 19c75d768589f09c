"""`experiments.improved` with a small encoder and decoder in the place of the ResNet: seconds instead of minutes."""

import sys

from flax import linen as nn

from experiments import prepare
from experiments.run import run
from experiments.settings import parse
from jaxseg.decoders import ImprovedDecoder
from jaxseg.train import AXIS


class SmallEncoder(nn.Module):
    """One strided convolution with batch norm, under a ResNet's name."""

    kind: str
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Conv(8, (32, 32), strides=32, use_bias=False)(x)
        return {32: nn.relu(nn.BatchNorm(not train, momentum=0.9, axis_name=self.axis_name)(x))}


def make_decoder(num_classes, rate):
    return ImprovedDecoder(num_classes, widths=(8, 8, 8, 8, 8), dropout_rate=rate, axis_name=AXIS)


def main(argv=None):
    """Runs it; returns the exit code."""
    prepare.ResNet = SmallEncoder
    return run(parse("improved", __doc__, argv), make_decoder)


if __name__ == "__main__":
    sys.exit(main())
