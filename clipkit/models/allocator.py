"""How malloc treats large buffers: glibc gives them back to the system when they are freed, and page by page takes
them again."""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
from functools import cache

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD of malloc.h
_SETTINGS = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES", "LD_PRELOAD")


@cache
def keep_freed_memory() -> bool:
    """Let this process keep what it frees, so that the next batch finds its buffers mapped.

    A tower on a CPU allocates and frees the same large activations at every batch. By default glibc maps buffers above
    32 MiB at most anew each time, and the kernel fills them with zeros page by page: with MobileNetV2 at batch 64 that
    was three quarters of the CPU time (48 ms a photo, 11 without; at batch 16 25 and 11). The process holds its largest
    need instead: 4 % more at batch 16, 40 % at batch 64.

    Called where clipkit embeds or trains, once a process. Whoever has set malloc up themselves (`MALLOC_…`,
    `GLIBC_TUNABLES`, another allocator by `LD_PRELOAD`) keeps their settings; and where the address space is limited
    (`ulimit -v`), it is not spent on buffers that nothing uses now.

    Returns:
        Whether anything was set; false where there is no glibc.
    """
    if any(name in os.environ for name in _SETTINGS):
        return False
    if resource.getrlimit(resource.RLIMIT_AS)[0] != resource.RLIM_INFINITY:
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
        ctypes.CDLL(None).gnu_get_libc_version  # musl has a mallopt that does nothing  # noqa: B018
    except (AttributeError, OSError, TypeError):  # TypeError: Windows
        return False
    return bool(mallopt(_MMAP_THRESHOLD, 2**30)) and bool(mallopt(_TRIM_THRESHOLD, 2**31 - 1))


def give_back_freed_memory() -> None:
    """Give freed memory back to the system where glibc can, so that what is free can be told."""
    with contextlib.suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)
