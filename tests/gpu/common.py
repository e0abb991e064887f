"""What the sections of the check share: the device, sizes, the clock and the rows they write."""

import contextlib
import os
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

TOY = not torch.cuda.is_available()
"""Without a GPU everything runs at toy sizes on the CPU: a rehearsal, whose numbers say nothing."""
DEVICE = torch.device("cpu" if TOY else "cuda:0")
BUDGET_S = float(os.environ.get("BUDGET_S", 240 if TOY else 470))
BEGAN = time.monotonic()


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
    """A section: its name, the function that fills it and the seconds it needs to be begun.

    The function is named, as in "speed.steps", so that only what is asked for is imported.
    """

    name: str
    run: str
    least_s: float = 5.0


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
    """Raises where the host waits for the device."""
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


@dataclass(frozen=True)
class Times:
    """Medians, in milliseconds."""

    device: float
    host: float
    """Until the call returns."""


def timed(
    function: Callable[[], Any], rounds: int = 15, warm: int = 3, cap_s: float = 5.0
) -> Times:
    """Times a function by events on the device, and on the host."""
    for _ in range(1 if TOY else warm):
        function()
    wait()
    device, host, start = [], [], time.monotonic()
    for _ in range(3 if TOY else rounds):
        began = time.perf_counter()
        if TOY:
            function()
            device.append(1e3 * (time.perf_counter() - began))
            host.append(device[-1])
        else:
            first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            first.record()
            function()
            host.append(1e3 * (time.perf_counter() - began))
            last.record()
            torch.cuda.synchronize()
            device.append(first.elapsed_time(last))
        if time.monotonic() - start > cap_s:
            break
    return Times(statistics.median(device), statistics.median(host))
