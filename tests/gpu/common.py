"""What the sections of the check share: the device, sizes, the clock and the rows they write."""

import contextlib
import ctypes
import os
import signal
import statistics
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from conda_dist.launch.tools.benchmark_process import Times, time_once

TOY = not torch.cuda.is_available()
"""Without a GPU everything runs at toy sizes on the CPU: a rehearsal, whose numbers say nothing."""
DEVICE = torch.device("cpu" if TOY else "cuda:0")
BUDGET_S = float(os.environ.get("BUDGET_S", 240 if TOY else 470))
BEGAN = float(os.environ.setdefault("CHECK_BEGAN", str(time.monotonic())))
"""When the check began, also in its processes."""


def left_s() -> float:
    """Seconds that the whole check may still take."""
    return BUDGET_S - (time.monotonic() - BEGAN)


@dataclass
class Row:
    """One line of the table."""

    what: str
    found: Any
    bound: str = ""
    ok: bool | None = None
    """None where nothing is demanded, or it is a rehearsal in which it says nothing."""


@dataclass
class Section:
    """What one section found."""

    name: str
    rows: list[Row] = field(default_factory=list)
    details: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0

    def add(self, what: str, found: Any, bound: str = "", ok: bool | None = None) -> None:
        """Adds a row."""
        self.rows.append(Row(what, found, bound, ok))

    def most(self, what: str, found: float, most: float, *, on_gpu: bool = False) -> None:
        """Adds a number with an upper bound, which if ``on_gpu`` a rehearsal does not hold."""
        demanded = not (on_gpu and TOY)
        self.add(what, f"{found:.3g}", f"<= {most:g}", found <= most if demanded else None)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Check:
    """A section: its name, what it does, and the seconds that it may and must have."""

    name: str
    run: Callable[[Section, Path], None]
    most_s: float
    """After so many seconds on a GPU it is killed."""
    least_s: float = 5.0
    """If fewer are left, it is left out."""


def end_with_parent() -> None:
    """Has the kernel kill this process when its parent ends, however that ends."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def wait() -> None:
    """Waits for the device."""
    if not TOY:
        torch.cuda.synchronize()


@contextlib.contextmanager
def flags(precision: str) -> Iterator[None]:
    """Has the process's flags allow TF32 ("high") or not ("highest"), as a user would."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextlib.contextmanager
def without_waits() -> Iterator[None]:
    """Raises where the host waits for the device.

    torch's setting is for all threads, so this first waits for a refresh in the background, which
    waits for its own stream. It does not see a wait for an event, such as `Event.synchronize`.
    """
    for thread in threading.enumerate():
        if thread.name == "conda_dist refresh":
            thread.join()
    if TOY:
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@contextlib.contextmanager
def listed_waits() -> Iterator[list[str]]:
    """Gives a list that afterwards names each place where the host waited for the device."""
    places: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if not TOY:
            torch.cuda.set_sync_debug_mode("warn")
        try:
            yield places
        finally:
            if not TOY:
                torch.cuda.set_sync_debug_mode("default")
            waits = [each for each in caught if "synchronizing" in str(each.message)]
            places += [f"{Path(each.filename).name}:{each.lineno}" for each in waits]


def timed(
    function: Callable[[], Any], rounds: int = 15, warm: int = 3, cap_s: float = 5.0
) -> Times:
    """Times a function on the device and on the host; medians, in milliseconds."""
    for _ in range(1 if TOY else warm):
        function()
    taken, start = [], time.monotonic()
    for _ in range(3 if TOY else rounds):
        taken.append(time_once(function, DEVICE))
        if time.monotonic() - start > cap_s:
            break
    device, host = zip(*((t.device, t.host) for t in taken), strict=True)
    return Times(1e3 * statistics.median(device), 1e3 * statistics.median(host))


def copy_rate() -> float:
    """Bytes that a copy on the device reads and writes in a second."""
    x = torch.empty(2**20 if TOY else 2**30, dtype=torch.uint8, device=DEVICE)
    y = torch.empty_like(x)
    return 2e3 * x.numel() / timed(lambda: y.copy_(x), 8).device
