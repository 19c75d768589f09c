"""How the process keeps its memory, and what it gives back."""

import contextlib
import ctypes
import functools
import gc
import os
import pathlib
import sys
from collections.abc import Iterator
from typing import Any

from jaxseg.memory import give_back_freed_memory

# From glibc's malloc.h.
_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8
_TUNABLE = "glibc.malloc.hugetlb"
# Seconds; of what compiles sooner little is left.
_LONG = 0.5


def keep_freed_memory(may_restart: bool = False) -> None:
    """Spares the kernel the pages that a step frees and the next one asks for again; to be called before threads start.

    A training step on the CPU allocates and frees gigabytes in large pieces. By default glibc gives each piece back,
    and the kernel clears its 4 KiB pages, one by one, when the next step asks for them: an eighth of the step's time.
    In huge pages that costs next to nothing, but glibc asks for them only if told so when the program starts. Otherwise
    it is told to keep what is freed, which is as fast, but the large pieces leave holes: the process grows to nearly
    twice the size. Where the C library is another one nothing changes.

    Args:
      may_restart: the program may be started again, with the same command line, to have huge pages: what it did until
        now is done twice.
    """
    if _TUNABLE in os.environ.get("GLIBC_TUNABLES", ""):
        return
    if may_restart and _has_huge_pages():
        others = os.environ.get("GLIBC_TUNABLES")
        os.environ["GLIBC_TUNABLES"] = f"{others}:{_TUNABLE}=1" if others else f"{_TUNABLE}=1"
        sys.stdout.flush()
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # no glibc, or no such library on this system
        return
    for option, value in ((_ARENA_MAX, 1), (_MMAP_MAX, 0), (_TRIM_THRESHOLD, 2**31 - 1)):
        mallopt(option, value)


@contextlib.contextmanager
def collecting_nothing_imported() -> Iterator[None]:
    """Keeps Python's collector of garbage from looking at what is imported within: it stays as long as the process.

    Modules are most of what there is to look through: without this the collector takes some 0.8 of a start's 15 s.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if enabled:
            gc.enable()


@functools.cache
def give_back_what_compiling_took() -> None:
    """Gives the system back, after each long compilation, what the compiler has freed; asked twice it does no more.

    That is in small pieces, which glibc keeps: of a training step hundreds of MiB (`experiments/SPEED.md`), as much as
    the step itself needs at 192x224, batch 4. Imports jax. Where the C library is another one nothing changes.
    """
    import jax.monitoring

    def listen(event: str, duration_secs: float, **_: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration" and duration_secs >= _LONG:
            give_back_freed_memory()

    jax.monitoring.register_event_duration_secs_listener(listen)


def _has_huge_pages() -> bool:
    """Whether this glibc (2.35 and later) can ask for transparent huge pages, and the kernel gives them."""
    try:
        name, version = (os.confstr("CS_GNU_LIBC_VERSION") or "").split()
        enabled = pathlib.Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text()
    except (AttributeError, OSError, ValueError):
        return False
    return name == "glibc" and tuple(map(int, version.split(".")[:2])) >= (2, 35) and "[never]" not in enabled
