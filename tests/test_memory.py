"""What is freed is not asked of the kernel again."""

import platform
import subprocess
import sys

import pytest

CODE = """
import resource, threading
import numpy as np
from experiments.memory import keep_freed_memory

def allocate():
    for _ in range(5):
        np.ones(50_000_000, np.uint8)

def faults():
    # In a thread, as XLA's are: they have arenas of their own.
    thread = threading.Thread(target=allocate)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    thread.start(), thread.join()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

if {keep}:
    keep_freed_memory()
faults()
print(faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_freed_memory_is_kept():
    def faults(keep):
        command = [sys.executable, "-c", CODE.format(keep=keep)]
        return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    # Of 61,000 pages of 4 KiB; fewer where the kernel gives huge ones.
    assert faults(keep=True) < 50
    assert faults(keep=False) > 100
