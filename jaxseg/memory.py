"""What compiling leaves in a process' memory, and how to be rid of it; imports jax only where it compiles."""

import contextlib
import ctypes
import gc
from collections.abc import Callable, Sequence
from typing import Any

_TAKEN_FROM_THE_KEPT = "/jax/compilation_cache/cache_hits"


def reloaded(step: Any, devices: Sequence[Any]) -> Callable:
    """A jitted function that is compiled at its first call, for arguments like those alone, and then loaded anew.

    What was just compiled for a CPU lies scattered over the pages that compiling took: of a training step of ResNet-18
    some 100 MiB in small pieces on 230 MiB of pages. Written down and loaded it lies side by side, as what was kept
    (in JAX's compilation cache) does anyway. A program for another kind of device stays as it was compiled.

    Args:
      step: from `jax.jit`; nobody else may hold it, or what it was compiled to stays, too.
      devices: those of this process that it is for.
    """
    steps, programs = [step], list[Any]()
    del step

    def call(*arguments: Any) -> Any:
        if not programs:
            programs.append(_compile(steps, arguments, devices))
        return programs[0](*arguments)

    return call


def give_back_freed_memory() -> None:
    """Gives the system back what glibc keeps of freed memory; where the C library is another one nothing changes."""
    # No glibc, or no such library on this system.
    with contextlib.suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def _compile(steps: list[Any], arguments: Sequence[Any], devices: Sequence[Any]) -> Any:
    """The program of the one step, which is taken out of the list: JAX keeps what a function was compiled to."""
    import jax.monitoring
    from jax.experimental import serialize_executable

    lowered, was_kept = steps.pop().lower(*arguments), False

    def listen(event: str, **_: Any) -> None:
        nonlocal was_kept
        was_kept = was_kept or event == _TAKEN_FROM_THE_KEPT

    jax.monitoring.register_event_listener(listen)
    try:
        compiled = lowered.compile()
    finally:
        jax.monitoring.unregister_event_listener(listen)
    # Written down again, what was loaded would lack its functions.
    if was_kept or devices[0].platform != "cpu":
        return compiled
    written, in_tree, out_tree = serialize_executable.serialize(compiled)
    del compiled, lowered
    gc.collect()
    give_back_freed_memory()
    program = serialize_executable.deserialize_and_load(written, in_tree, out_tree, execution_devices=devices)
    del written
    give_back_freed_memory()
    return program
