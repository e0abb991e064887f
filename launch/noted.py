"""torchrun that leaves a note when a signal has ended it: python launch/noted.py [torchrun's own]

As a file, not a module: importing the package takes seconds, in which a signal would go unnoted.
The ranks leave the same note once they train (pretrain.STOP_NOTE); before that only their torchrun
knows. The note is a file that the variable CONDA_DIST_STOP_NOTE names.
"""

import os
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import NoReturn


def _end(number: int, frame: FrameType | None = None) -> NoReturn:
    if name := os.environ.get("CONDA_DIST_STOP_NOTE"):
        Path(name).touch()
    sys.exit(128 + number)


def main() -> None:
    """Runs torchrun, whose own handlers take over as soon as it starts ranks."""
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, _end)
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.api import SignalException

    try:
        run.main()
    except SignalException as stopped:
        _end(stopped.sigval)


if __name__ == "__main__":
    main()
