"""What makes XLA's CPU backend fast: an option of its compiler, and how to lay arrays for it."""

import functools
from collections.abc import Callable, Sequence

import jax
from jax.experimental.xla_metadata import set_xla_metadata


@functools.cache
def compiler_options() -> dict[str, str]:
    """For `jax.jit`: XLA's CPU backend then takes Eigen for products and convolutions, as `jaxseg.convolution` expects.

    By itself it takes YNNPACK for many, which on most of this network's is slower, for one because it shares rows of
    the output among threads and leaves a narrow map to one of them. On other platforms the option means nothing. A JAX
    that does not know it gets none.
    """
    options = {"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_REDUCE"}
    try:
        jax.jit(lambda: 0, compiler_options=options).lower().compile()
    except jax.errors.JaxRuntimeError as error:
        if not any(name in str(error) for name in options):
            raise
        return {}
    return options


def copies(change: Callable[[jax.Array], jax.Array], arrays: Sequence[jax.Array]) -> list[jax.Array]:
    """Lays each array in another order so that XLA's CPU backend computes nothing before it in that order.

    It is fast at copying in another order, but four times as slow at computing in it, which it would do where something
    is computed just before; not so if the copying is a function that it is told not to inline. (What reads the copy may
    still be computed where a plain transposition is made.) An XLA that does not know this attribute of a call is
    slower, no more.

    Args:
      change: of one array; moves, repeats or pads what is there.
      arrays: of any shapes and dtypes.

    Returns:
      change(array) of each.
    """
    changed = jax.jit(lambda arrays: [change(array) for array in arrays])(arrays)
    return set_xla_metadata(changed, inlineable="false")
