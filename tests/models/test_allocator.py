import os
import platform
import subprocess
import sys

import pytest


def faults(keep: bool, **environment: str) -> int:
    """Page faults of filling and freeing 64 MiB twenty times, after the first."""
    program = f"""
import ctypes, resource
from clipkit.models.allocator import keep_freed_memory
if {keep}:
    print(keep_freed_memory())
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]
libc.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
def fill():
    buffer = libc.malloc(2**26)
    libc.memset(buffer, 1, 2**26)
    libc.free(buffer)
fill()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    fill()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], env=os.environ | environment, capture_output=True, text=True, check=True
    )
    *_, count = done.stdout.split()
    return int(count)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_freed_buffers_are_used_again():
    pages = 20 * 2**26 // os.sysconf("SC_PAGE_SIZE")
    assert faults(keep=False) > pages / 600  # with huge pages a fault maps 512 of them
    assert faults(keep=True) < 20
    assert faults(keep=True, MALLOC_TRIM_THRESHOLD_="131072") > pages / 600  # the user's own settings win
