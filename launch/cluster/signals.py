"""Requests to stop: noted when they arrive, obeyed between two steps."""

from __future__ import annotations

import ctypes
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
"""Ctrl-C; what schedulers and torchrun send; what Slurm sends ahead of a time limit."""

_LAUNCHED = ("TORCHELASTIC_RUN_ID", "CROSS_RANK", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")
"""Variables that launchers which stay set: torchrun, DeepSpeed's, Open MPI's, MPICH's."""

_PR_SET_PDEATHSIG = 1  # of Linux's sys/prctl.h

_SAME_PRESS_S = 1.0
"""One Ctrl-C can reach a process twice, from the terminal and through its launcher."""


class StopRequest:
    """Whether the job was asked to stop."""

    def __init__(self) -> None:
        """No request yet."""
        self._since: float | None = None

    def __bool__(self) -> bool:
        """Whether this process has been asked to stop."""
        return self._since is not None

    def receive(self, number: int, frame: FrameType | None) -> None:
        """The signal handler: a first signal asks, a second Ctrl-C aborts at once."""
        if self._since is None:
            self._since = time.monotonic()
        elif number == signal.SIGINT and time.monotonic() - self._since > _SAME_PRESS_S:
            raise KeyboardInterrupt


@contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Catches the stop signals while the block runs; see StopRequest."""
    request = StopRequest()
    before = {number: signal.signal(number, request.receive) for number in STOP_SIGNALS}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def end_with_parent() -> None:
    """Has the system send SIGTERM here when the parent dies. Only on Linux."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def end_with_launcher() -> None:
    """Has the system send SIGTERM here when the launcher dies, so that no rank trains on unseen.

    Nothing else would tell it, and the job that is started in its place would find the output in
    use. A process that no launcher watches over, as under nohup, may outlive its parent. Only on
    Linux; elsewhere the job goes on.
    """
    if sys.platform != "linux" or not any(name in os.environ for name in _LAUNCHED):
        return
    end_with_parent()
    if "TORCHELASTIC_RUN_ID" in os.environ and os.getppid() == 1 and not _is_python(1):
        os.kill(os.getpid(), signal.SIGTERM)  # it died before, while this process was importing
    if "CROSS_RANK" in os.environ:
        # The `deepspeed` command starts a second process, which starts the ranks, and which does
        # not notice when the first one dies.
        with suppress(OSError):
            _end_with(_parent_of(os.getppid()))


def _end_with(launcher: int) -> None:
    """Sends SIGTERM here when that process ends, if it is a Python like this one.

    Any other, such as the shell of a remote login, is not the launcher.
    """
    if not _is_python(launcher):
        return
    alive = os.pidfd_open(launcher)

    def wait() -> None:
        select.select([alive], [], [])
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait, daemon=True).start()


def _is_python(pid: int) -> bool:
    """Whether a process, if it is ours to look at, runs the Python that this one does."""
    try:
        return os.path.samefile(f"/proc/{pid}/exe", "/proc/self/exe")
    except PermissionError:
        return False


def _parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
