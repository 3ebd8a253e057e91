"""Large tensors on a CPU: keep freed memory while a run lasts, give it back at its end.

glibc maps every allocation above 32 MB anew and unmaps it when it is freed, so that each layer of a network on a large
image faults all its pages in again: a fifth of the time of a 550 × 800 section. While a run lasts, freed memory stays
with the process instead.
"""

from __future__ import annotations

import contextlib
import ctypes
import sys
from collections.abc import Iterator

__all__ = ["keep_freed_memory"]

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # names of malloc.h


@contextlib.contextmanager
def keep_freed_memory(active: bool = True) -> Iterator[None]:
    """Within the block, freed memory is reused rather than returned; a no-op where the C library is not glibc."""
    libc = _glibc() if active else None
    if libc is None:
        yield
        return
    libc.mallopt(_MMAP_MAX, 0)
    libc.mallopt(_TRIM_THRESHOLD, 2**31 - 1)
    try:
        yield
    finally:  # glibc's defaults
        libc.mallopt(_MMAP_MAX, 65536)
        libc.mallopt(_TRIM_THRESHOLD, 128 * 1024)
        libc.malloc_trim(0)


def _glibc() -> ctypes.CDLL | None:
    if not sys.platform.startswith("linux"):
        return None
    try:
        libc = ctypes.CDLL(None)
        return libc if all(hasattr(libc, name) for name in ("mallopt", "malloc_trim", "gnu_get_libc_version")) else None
    except OSError:
        return None
