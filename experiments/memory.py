"""How the process keeps its memory."""

import ctypes

# From glibc's malloc.h.
_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8


def keep_freed_memory() -> None:
    """Lets malloc keep what is freed, for the next allocation; to be called before threads allocate.

    A training step on the CPU allocates and frees gigabytes in large pieces. By default glibc gives each piece back,
    and the kernel clears all its pages again when the next step asks for them: an eighth of the step's time. Where the
    C library is another one nothing changes.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # no glibc, or no such library on this system
        return
    for option, value in ((_ARENA_MAX, 1), (_MMAP_MAX, 0), (_TRIM_THRESHOLD, 2**31 - 1)):
        mallopt(option, value)
