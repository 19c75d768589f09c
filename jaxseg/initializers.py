"""Initializers, and a model's first variables, made on the host of random numbers that are drawn all at once."""

import contextlib
import contextvars
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

Shape = tuple[int, ...]
# How many numbers are drawn at once.
_BLOCK = 2**18
# Of the program that draws them: fully optimised it compiles for half as long again, and not at all it runs nine times
# as long.
_OPTIMISED_LITTLE = {"xla_backend_optimization_level": 1}


class _Asked(NamedTuple):
    """What an initializer was asked for: an array that stands for it, and the distribution of its numbers."""

    array: jax.Array
    mean: float
    deviation: float


_ASKED: contextvars.ContextVar[list[_Asked] | None] = contextvars.ContextVar("asked", default=None)


def normal(deviation: Callable[[Shape], float]) -> nn.initializers.Initializer:
    """An initializer that draws from a normal distribution of mean 0.

    Args:
      deviation: the array's shape -> its standard deviation.
    """

    def draw(key: jax.Array, shape: Shape, dtype: Any = jnp.float32) -> jax.Array:
        if (asked := _ASKED.get()) is not None:
            return _note(asked, shape, dtype, 0.0, deviation(shape))
        return (deviation(shape) * jax.random.normal(key, shape)).astype(dtype)

    return draw


def constant(value: float) -> nn.initializers.Initializer:
    """An initializer that needs no key."""

    def fill(key: jax.Array | None, shape: Shape, dtype: Any = jnp.float32) -> jax.Array:
        if (asked := _ASKED.get()) is not None:
            return _note(asked, shape, dtype, value, 0.0)
        return jnp.full(shape, value, dtype)

    return fill


def lecun_normal() -> nn.initializers.Initializer:
    """`normal` such that the variance survives a linear layer of a kernel (..., inputs, outputs).

    Source: LeCun et al. 1998, "Efficient BackProp", 4.6.
    """
    return normal(lambda shape: math.sqrt(1 / math.prod(shape[:-1])))


def init(model: nn.Module, key: jax.Array, *inputs: Any) -> Any:
    """What `model.init` gives, but that all random arrays are parts of one long one, which is cut up on the host.

    A generator for each array takes long to compile: of a ResNet-18 and its decoder `jax.jit(model.init)` takes 16 to
    19 s on two cores of an EPYC, and this 1.0 to 1.2. The distributions are the same, the numbers others.

    Args:
      model: a module all of whose initializers are of this module.
      key: one key.
      inputs: the model's.

    Returns:
      The variables, as NumPy arrays.

    Raises:
      ValueError: there are other initializers, or the model changes what they give, as `nn.scan` and `nn.vmap` do.
    """
    asked: list[_Asked] = []
    order: list[int] = []

    def trace(key: jax.Array) -> Any:
        with _noting(asked):
            variables = model.init(key, *inputs)
        places = {id(one.array): place for place, one in enumerate(asked)}
        for path, leaf in jax.tree_util.tree_leaves_with_path(variables):
            if id(leaf) not in places:
                raise ValueError(
                    f"{jax.tree_util.keystr(path)} is not of jaxseg.initializers: use the model's own init"
                )
            order.append(places[id(leaf)])
        return variables

    variables = jax.eval_shape(trace, key)
    numbers, arrays = _draw(key, sum(one.array.size for one in asked if one.deviation)), []
    for array, mean, deviation in asked:
        if deviation:
            part, numbers = numbers[: array.size], numbers[array.size :]
            arrays.append((np.float32(deviation) * part).reshape(array.shape).astype(array.dtype))
        else:
            arrays.append(np.full(array.shape, mean, array.dtype))
    return jax.tree.unflatten(jax.tree.structure(variables), [arrays[place] for place in order])


def _draw(key: jax.Array, count: int) -> np.ndarray:
    """At least so many normal numbers, in blocks: all at once the generator would take four times their memory."""

    def draw(key: jax.Array) -> jax.Array:
        keys = jax.random.split(key, -(-count // _BLOCK))
        return jax.lax.map(lambda key: jax.random.normal(key, (_BLOCK,)), keys)

    return np.asarray(jax.jit(draw, compiler_options=_OPTIMISED_LITTLE)(key)).ravel()


def _note(asked: list[_Asked], shape: Shape, dtype: Any, mean: float, deviation: float) -> jax.Array:
    asked.append(_Asked(jnp.zeros(shape, dtype), mean, deviation))
    return asked[-1].array


@contextlib.contextmanager
def _noting(asked: list[_Asked]) -> Iterator[None]:
    token = _ASKED.set(asked)
    try:
        yield
    finally:
        _ASKED.reset(token)
