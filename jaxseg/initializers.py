"""Normal initializers, and a model's first variables, whose random numbers are drawn all at once."""

import contextlib
import contextvars
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

Shape = tuple[int, ...]
# How many numbers are drawn at once.
_BLOCK = 2**18


class _Numbers:
    """Numbers that are handed out one after the other; without any, zeros, to count how many are asked for."""

    def __init__(self, numbers: jax.Array | None = None):
        self.numbers, self.taken = numbers, 0

    def take(self, shape: Shape) -> jax.Array:
        first, self.taken = self.taken, self.taken + math.prod(shape)
        if self.numbers is None:
            return jnp.zeros(shape)
        return self.numbers[first : self.taken].reshape(shape)


_HANDED_OUT: contextvars.ContextVar[_Numbers | None] = contextvars.ContextVar("handed_out", default=None)


def normal(deviation: Callable[[Shape], float]) -> nn.initializers.Initializer:
    """An initializer that draws from a normal distribution of mean 0.

    Args:
      deviation: the array's shape -> its standard deviation.
    """

    def draw(key: jax.Array, shape: Shape, dtype: Any = jnp.float32) -> jax.Array:
        handed_out = _HANDED_OUT.get()
        numbers = handed_out.take(shape) if handed_out else jax.random.normal(key, shape)
        return (deviation(shape) * numbers).astype(dtype)

    return draw


def init(model: nn.Module, key: jax.Array, *inputs: Any) -> Any:
    """What `model.init` gives, but that all arrays of `normal` are parts of one long one; best within `jax.jit`.

    A generator for each array, as `model.init` has them, takes two to three times as long to compile: of a ResNet-18
    and its decoder 4.3 instead of 1.7 s on two cores of an EPYC. The distributions are the same, the numbers others.
    The model is traced twice.

    Args:
      model: a module; of initializers other than `normal` each draws for itself. Within `nn.jit`, `nn.scan` or
        `nn.vmap` several arrays would be the same part: a model that has them is for `model.init`.
      key: one key.
      inputs: the model's.

    Returns:
      The variables.
    """
    # Not model.init itself: what was traced before would not be traced again, and nothing be counted.
    with _handing_out(_Numbers()) as counted:
        jax.eval_shape(lambda key: model.init(key, *inputs), key)
    rest, own = jax.random.split(key)
    # In blocks: the generator would take four times the memory of all that it draws at once.
    blocks = jax.random.split(own, max(1, -(-counted.taken // _BLOCK)))
    numbers = jax.lax.map(lambda key: jax.random.normal(key, (_BLOCK,)), blocks).ravel()
    with _handing_out(_Numbers(numbers)):
        return model.init(rest, *inputs)


@contextlib.contextmanager
def _handing_out(numbers: _Numbers) -> Iterator[_Numbers]:
    token = _HANDED_OUT.set(numbers)
    try:
        yield numbers
    finally:
        _HANDED_OUT.reset(token)
