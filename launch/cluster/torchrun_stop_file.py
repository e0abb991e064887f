"""torchrun that leaves a note when a signal ends it.

Usage: python -P launch/cluster/torchrun_stop_file.py [torchrun's arguments]

As a file, not a module: importing the package takes seconds, in which a signal would go unnoted.
The ranks leave the same note once they train (pretrain.STOP_NOTE); before that only their torchrun
knows. The note is a file that the variable CONDA_DIST_STOP_NOTE names.
"""

import os
import signal
import sys
import threading
from contextlib import suppress
from pathlib import Path
from types import FrameType


def _end(number: int, frame: FrameType | None = None) -> None:
    if name := os.environ.get("CONDA_DIST_STOP_NOTE"):
        with suppress(OSError):
            Path(name).touch()
    os._exit(128 + number)


def _watch(signals: int) -> None:
    """Ends the process at a signal that is not torchrun's yet.

    While the main thread waits for another host's store, in C++, it does not run its handlers.
    """
    while number := os.read(signals, 1)[0]:
        if signal.getsignal(number) == _end:
            _end(number, None)


def main() -> None:
    """Runs torchrun, whose own handlers take over as soon as it starts ranks."""
    signals, wakeup = os.pipe()
    os.set_blocking(wakeup, False)
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, _end)
    signal.set_wakeup_fd(wakeup)
    threading.Thread(target=_watch, args=(signals,), daemon=True).start()
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.api import SignalException

    known = run.get_args_parser()._option_string_actions
    name = "--shutdown-timeout"  # torch 2.11's torchrun has no such option
    given = [word for word in sys.argv[1:] if not word.startswith(name) or name in known]
    try:
        run.main(given)
    except SignalException as stopped:
        _end(stopped.sigval)


if __name__ == "__main__":
    main()
