"""Where compiled programs are kept, so that a run whose like was run before starts at once."""

import hashlib
import os
import pathlib
import platform

import jax

from jaxseg.download import cache_folder

# Of all programs together; the least recently used go first. One program takes about half a megabyte on a CPU.
_BYTES = 2**30


def keep_compiled_programs() -> None:
    """Keeps compiled programs below the cache folder; `JAX_COMPILATION_CACHE_DIR` names another one.

    Without it a run compiles for about a minute, a quarter of it before the first step. Programs for another processor
    do not run on this one, so each kind of processor has its own folder, where a home is shared. A folder that cannot
    be written costs a warning, nothing else. `JAX_ENABLE_COMPILATION_CACHE=false` turns it off.
    """
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    folder = cache_folder() / "compiled" / hashlib.sha256(_processor().encode()).hexdigest()[:16]
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_compilation_cache_max_size", _BYTES)
    # The small ones too: there are five before the first step.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)


def _processor() -> str:
    """The processor's architecture and, where the system tells, the instructions that it knows."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    known = sorted({line for line in lines if line.startswith(("flags", "Features"))})
    return "\n".join([platform.machine(), platform.processor(), *known])
