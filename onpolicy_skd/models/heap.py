"""The C library's heap, which holds tensors of less than 32 MiB on CPU."""

import ctypes
import platform

LIBC = ctypes.CDLL(None) if platform.libc_ver()[0] == "glibc" else None


def trim_heap() -> None:
    """Return free pages of the heap to the system; glibc keeps those between used blocks.  Does nothing elsewhere."""
    if LIBC is not None:
        LIBC.malloc_trim(0)
