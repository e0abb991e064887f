"""Layer: launch. What an optimizer holds: its state, and what a step needs for a moment."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

_M_MMAP_THRESHOLD = -3  # of glibc's malloc.h
_BLOCK, _MOST = 64 * 1024, 32 * 2**20  # the latter is the most that glibc goes to by itself
_STATUS, _CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")  # Linux's proc(5)


def state_bytes(optimizer: Optimizer) -> int:
    """Bytes of the tensors in an optimizer's state, on this rank."""
    return sum(tensor.nbytes for tensor in _tensors(list(optimizer.state.values())))


def _tensors(tree: Any) -> Iterator[Tensor]:
    if isinstance(tree, DTensor):
        yield tree.to_local()
    elif isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, dict | list | tuple):
        for item in tree.values() if isinstance(tree, dict) else tree:
            yield from _tensors(item)


def peak_bytes(step: Callable[[], object], steps: int = 2) -> int | None:
    """Bytes by which this process grows in a step, at most.

    As the system counts them, on the CPU: what threads of process groups hold is in it, which
    torch's profiler does not see. Meanwhile blocks of 64 KiB and more go back to the system when
    they are freed, which takes time.

    Args:
        step: What is measured; it must have been called before, so that it has its state.
        steps: How often.

    Returns:
        None where the system does not say (it is Linux with glibc that does).
    """
    if sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "malloc_trim"):
        return None
    libc, peaks = ctypes.CDLL(None), []
    libc.mallopt(_M_MMAP_THRESHOLD, _BLOCK)
    try:
        step()
        for _ in range(steps):
            libc.malloc_trim(0)  # what was freed before is not there to be taken again unseen
            _CLEAR_REFS.write_text("5")  # the high-water mark begins anew
            before = _kib("VmRSS")
            step()
            peaks.append(_kib("VmHWM") - before)
    except (FileNotFoundError, PermissionError):  # a sandbox without these files
        return None
    finally:
        libc.mallopt(_M_MMAP_THRESHOLD, _MOST)
    return max(peaks) * 1024


def _kib(name: str) -> int:
    for line in _STATUS.read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1])
    raise RuntimeError(f"{_STATUS} has no {name}")
