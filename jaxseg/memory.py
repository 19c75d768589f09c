"""Giving freed memory back to the system, and what was compiled for a CPU in less of it; jax only where it compiles."""

import contextlib
import ctypes
import gc
import pickle
from collections.abc import Callable, Sequence
from typing import Any

# JAX's own name for it, in 0.10 and 0.12; tests/test_memory.py notices if another version has another one.
_TAKEN_FROM_THE_CACHE = "/jax/compilation_cache/cache_hits"
# What JAX raises for a program that it cannot serialize, such as one that calls back into Python.
_NOT_SERIALIZABLE = (AttributeError, NotImplementedError, TypeError, ValueError, pickle.PicklingError)


def reloaded(step: Any, devices: Sequence[Any]) -> Callable:
    """A jitted function for a CPU, compiled at its first call and then loaded anew, which takes less memory.

    What was just compiled lies scattered over the pages that compiling took: of a training step of ResNet-18 some 100
    MiB, in small pieces, on 230 MiB of pages. Serialized and loaded it lies side by side, as what comes from JAX's
    compilation cache does anyway. What JAX cannot serialize stays as it was compiled.

    Args:
      step: from `jax.jit`. What it was compiled to stays as long as anybody holds it or the function it was made of.
      devices: those of this process that it is for, CPUs.

    Returns:
      A function that gives what `step` does. It is called by one thread, always with arguments of the same shapes,
      dtypes and shardings (others are a TypeError or ValueError), and can be neither lowered nor traced.
    """
    steps, programs = [step], list[Any]()

    def call(*arguments: Any) -> Any:
        if not programs:
            programs.append(_compile(steps, arguments, devices))
            steps.clear()
        return programs[0](*arguments)

    return call


def give_back_freed_memory() -> None:
    """Gives the system back what glibc keeps of freed memory; where the C library is another one nothing changes."""
    # No glibc, or no such library on this system.
    with contextlib.suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def _compile(steps: list[Any], arguments: Sequence[Any], devices: Sequence[Any]) -> Any:
    """The program of the one step in the list, from which it is taken before the program is loaded."""
    import jax.monitoring
    from jax.experimental import serialize_executable

    was_kept = False

    def listen(event: str, **_: Any) -> None:
        nonlocal was_kept
        was_kept = was_kept or event == _TAKEN_FROM_THE_CACHE

    lowered = steps[0].lower(*arguments)
    jax.monitoring.register_event_listener(listen)
    try:
        compiled = lowered.compile()
    finally:
        jax.monitoring.unregister_event_listener(listen)
    if was_kept:  # serialized once more it could not be loaded: XLA would leave its machine code out
        return compiled
    try:
        serialized, in_tree, out_tree = serialize_executable.serialize(compiled)
    except _NOT_SERIALIZABLE:
        return compiled
    steps.clear()
    del compiled, lowered
    gc.collect()
    give_back_freed_memory()
    program = serialize_executable.deserialize_and_load(
        serialized, in_tree, out_tree, backend=devices[0].client, execution_devices=devices
    )
    del serialized
    give_back_freed_memory()
    return program
