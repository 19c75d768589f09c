"""Initializers, and a model's first variables, made on the host."""

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


class _Asked(NamedTuple):
    """What an initializer was asked for: the array that it gave, later its shape, and how its numbers lie."""

    array: jax.Array | jax.ShapeDtypeStruct
    mean: float
    deviation: float


_ASKED: contextvars.ContextVar[list[_Asked] | None] = contextvars.ContextVar("asked", default=None)
# JAX keeps what it traces within apart from all else: arrays that are only noted are never another's numbers.
_noted_only = jax.make_user_context(False)


def normal(deviation: Callable[[Shape], float]) -> nn.initializers.Initializer:
    """An initializer that draws from a normal distribution of mean 0.

    Args:
      deviation: the array's shape -> its standard deviation.
    """

    def draw(key: jax.Array, shape: Shape, dtype: Any = jnp.float32) -> jax.Array:
        if _ASKED.get() is not None:
            return _note(jnp.zeros(shape, dtype), 0.0, deviation(shape))
        return (deviation(shape) * jax.random.normal(key, shape)).astype(dtype)

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
    """What `model.init` gives, but drawn on the host, by NumPy, and nothing is compiled.

    A generator for each array takes long to compile: of a ResNet-18 and its decoder `jax.jit(model.init)` takes 16 to
    19 s on two cores of an EPYC, and this some 0.7. The distributions are the same, the numbers others: a function of
    the key and of NumPy's version. Arrays of other initializers than those of this module are those of `model.init`,
    jitted, with the same key. Not for use within `jax.jit` or another transformation.

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
        leaves = jax.tree.leaves(model.init(key, *inputs))
        return [leaf for leaf, place in zip(leaves, places, strict=True) if place is None]

    structure = jax.tree.structure(jax.eval_shape(trace, key))
    # Not what was noted within a function that JAX keeps traced: another time it may not be noted.
    arrays = _draw(key, {place: one for place, one in enumerate(asked) if place in places})
    rest = iter(jax.jit(others)(key) if None in places else ())
    leaves = [np.array(next(rest)) if place is None else arrays[place] for place in places]
    return jax.tree.unflatten(structure, leaves)


def _draw(key: jax.Array, asked: dict[int, _Asked]) -> dict[int, np.ndarray]:
    generator = np.random.default_rng(np.asarray(jax.random.key_data(key)).ravel())

    def draw(array: jax.Array | jax.ShapeDtypeStruct, mean: float, deviation: float) -> np.ndarray:
        if not deviation:
            return np.full(array.shape, mean, array.dtype)
        numbers = np.float32(deviation) * generator.standard_normal(array.shape, np.float32)
        return numbers.astype(array.dtype, copy=False)

    return {place: draw(*one) for place, one in asked.items()}


def _note(array: jax.Array, mean: float, deviation: float) -> jax.Array:
    """The array; noted, if that is asked for."""
    if (asked := _ASKED.get()) is not None:
        asked.append(_Asked(array, mean, deviation))
    return array


@contextlib.contextmanager
def _noting(asked: list[_Asked]) -> Iterator[None]:
    token = _ASKED.set(asked)
    try:
        with _noted_only(True):
            yield
    finally:
        _ASKED.reset(token)
