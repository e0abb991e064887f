"""What a step holds for a moment: by how much the process grows."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path

_M_MMAP_THRESHOLD = -3  # of glibc's malloc.h
_BLOCK = 64 * 1024
_STATUS, _CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")  # Linux's proc(5)


def count_exactly() -> None:
    """Has blocks of 64 KiB and more, from here on, go back to the system when they are freed.

    To be called before anything is allocated that `peak_bytes` is to count: room that earlier
    blocks have left would be taken again unseen, or counted twice. It takes time: measure times in
    another process.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):  # glibc
        libc.mallopt(_M_MMAP_THRESHOLD, _BLOCK)


def peak_bytes(step: Callable[[], object], steps: int = 2) -> int | None:
    """Bytes by which this process, which has called `count_exactly`, grows in a step, at most.

    As the system counts them, on the CPU: what threads of process groups hold is in it, which
    torch's profiler does not see.

    Args:
        step: What is measured; it is called once before, so that it has its state.
        steps: How often.

    Returns:
        None where the system does not say (Linux does).
    """
    peaks = []
    step()
    for _ in range(steps):
        try:
            _CLEAR_REFS.write_text("5")  # the high-water mark begins anew
            before = _kib("VmRSS")
        except OSError:
            return None
        step()
        peaks.append(_kib("VmHWM") - before)
    return max(peaks) * 1024


def _kib(name: str) -> int:
    for line in _STATUS.read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1])
    raise RuntimeError(f"{_STATUS} has no {name}")
