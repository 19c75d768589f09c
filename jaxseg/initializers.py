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
# Blocks have the keys of 0, 1, ...
_NO_BLOCK = 2**32 - 1
# Of the program that draws them: fully optimised it compiles for half as long again, and not at all it runs nine times
# as long.
_OPTIMISED_LITTLE = {"xla_backend_optimization_level": 1}


class _Asked(NamedTuple):
    """What an initializer was asked for: the array that it gave, later its shape, and how its numbers lie."""

    array: jax.Array | jax.ShapeDtypeStruct
    mean: float
    deviation: float


_ASKED: contextvars.ContextVar[list[_Asked] | None] = contextvars.ContextVar("asked", default=None)


def normal(deviation: Callable[[Shape], float]) -> nn.initializers.Initializer:
    """An initializer that draws from a normal distribution of mean 0.

    Args:
      deviation: the array's shape -> its standard deviation.
    """

    def draw(key: jax.Array, shape: Shape, dtype: Any = jnp.float32) -> jax.Array:
        return _note((deviation(shape) * jax.random.normal(key, shape)).astype(dtype), 0.0, deviation(shape))

    return draw


def constant(value: float) -> nn.initializers.Initializer:
    """An initializer that fills an array with one value; it needs no key.

    Args:
      value: the value.
    """

    def fill(key: jax.Array | None, shape: Shape, dtype: Any = jnp.float32) -> jax.Array:
        return _note(jnp.full(shape, value, dtype), value, 0.0)

    return fill


def lecun_normal() -> nn.initializers.Initializer:
    """`normal` such that the variance survives a linear layer of a kernel (..., inputs, outputs); Flax's is truncated.

    Source: LeCun et al. 1998, "Efficient BackProp", 4.6.
    """
    return normal(lambda shape: math.sqrt(1 / math.prod(shape[:-1])))


def init(model: nn.Module, key: jax.Array, *inputs: Any) -> Any:
    """What `model.init` gives, but made on the host: all arrays of `normal` are parts of one long one, cut up there.

    A generator for each array takes long to compile: of a ResNet-18 and its decoder `jax.jit(model.init)` takes 16 to
    19 s on two cores of an EPYC, and this some 1.5. The distributions are the same, the numbers others. Arrays of other
    initializers than those of this module are those of `model.init`, jitted, with a key of its own. Not for use within
    `jax.jit` or another transformation.

    Args:
      model: a module.
      key: one key.
      inputs: the model's, on the host.

    Returns:
      The variables, as NumPy arrays.
    """
    asked: list[_Asked] = []
    places: list[int | None] = []

    def trace(key: jax.Array) -> Any:
        with _noting(asked):
            variables = model.init(key, *inputs)
        # What a model changes, as `nn.scan` does, is no longer what was noted.
        known = {id(one.array): place for place, one in enumerate(asked)}
        places.extend(known.get(id(leaf)) for leaf in jax.tree.leaves(variables))
        asked[:] = [one._replace(array=jax.ShapeDtypeStruct(one.array.shape, one.array.dtype)) for one in asked]
        return variables

    def others(key: jax.Array) -> list[jax.Array]:
        leaves = jax.tree.leaves(model.init(jax.random.fold_in(key, _NO_BLOCK), *inputs))
        return [leaf for leaf, place in zip(leaves, places, strict=True) if place is None]

    structure = jax.tree.structure(jax.eval_shape(trace, key))
    arrays, rest = _make(key, asked), iter(jax.jit(others)(key) if None in places else ())
    leaves = [np.array(next(rest)) if place is None else arrays[place] for place in places]
    return jax.tree.unflatten(structure, leaves)


def _make(key: jax.Array, asked: list[_Asked]) -> list[np.ndarray]:
    numbers, arrays = _draw(key, sum(one.array.size for one in asked if one.deviation)), []
    for array, mean, deviation in asked:
        if deviation:
            part, numbers = numbers[: array.size], numbers[array.size :]
            arrays.append((np.float32(deviation) * part).reshape(array.shape).astype(array.dtype, copy=False))
        else:
            arrays.append(np.full(array.shape, mean, array.dtype))
    return arrays


def _draw(key: jax.Array, count: int) -> np.ndarray:
    """At least so many normal numbers, in blocks: all at once the generator would take four times their memory."""
    if not count:
        return np.zeros(0, np.float32)

    def draw(key: jax.Array) -> jax.Array:
        keys = jax.random.split(key, -(-count // _BLOCK))
        return jax.lax.map(lambda key: jax.random.normal(key, (_BLOCK,)), keys)

    return np.asarray(jax.jit(draw, compiler_options=_OPTIMISED_LITTLE)(key)).ravel()


def _note(array: jax.Array, mean: float, deviation: float) -> jax.Array:
    """The array; noted as it is, and no mere place for it, since JAX may keep the trace that it is in."""
    if (asked := _ASKED.get()) is not None:
        asked.append(_Asked(array, mean, deviation))
    return array


@contextlib.contextmanager
def _noting(asked: list[_Asked]) -> Iterator[None]:
    token = _ASKED.set(asked)
    try:
        yield
    finally:
        _ASKED.reset(token)
