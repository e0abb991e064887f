"""Layer: launch. Requests to stop: noted when they arrive, obeyed between two steps."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
"""Ctrl-C; what schedulers and torchrun send; what Slurm sends ahead of a time limit."""

_SAME_PRESS_S = 1.0
"""One Ctrl-C can reach a process twice, from the terminal and through its launcher."""


class StopRequest:
    """Whether, and by which signal, the job was asked to stop."""

    def __init__(self, forward: Callable[[int], object] | None = None) -> None:
        """No request yet; each signal will be handed to `forward`, if given."""
        self.signal: signal.Signals | None = None
        self._forward, self._since = forward, 0.0

    def __bool__(self) -> bool:
        """Whether this process has been asked to stop."""
        return self.signal is not None

    def receive(self, number: int, frame: FrameType | None = None) -> None:
        """The signal handler: a first signal asks, a second Ctrl-C aborts at once."""
        if self._forward is not None:
            self._forward(number)
        if self.signal is None:
            self.signal, self._since = signal.Signals(number), time.monotonic()
        elif number == signal.SIGINT and time.monotonic() - self._since > _SAME_PRESS_S:
            raise KeyboardInterrupt


@contextmanager
def stop_requests(forward: Callable[[int], object] | None = None) -> Iterator[StopRequest]:
    """Catches the stop signals while the block runs; see StopRequest."""
    request = StopRequest(forward)
    before = {number: signal.signal(number, request.receive) for number in STOP_SIGNALS}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
