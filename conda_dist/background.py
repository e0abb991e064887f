"""Decompositions in a thread of their own, while training goes on.

The thread computes and never communicates: what it is given was gathered before, and what it found
is taken, by the ranks together, at a step that all of them know beforehand.
"""

import threading
from collections.abc import Hashable
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from conda_dist import maths
from conda_dist.maths import Outcome

Found = tuple[Outcome, Tensor | None]


class Background:
    """Decompositions that were started and not taken yet.

    On an accelerator they run on a stream of their own.
    """

    def __init__(self) -> None:
        self._started: dict[Hashable, Future[Found] | None] = {}
        self._executor: ThreadPoolExecutor | None = None
        self._stream: torch.Stream | None = None

    def __contains__(self, key: Hashable) -> bool:
        """Whether that decomposition was started, here or on another rank."""
        return key in self._started

    def start(self, key: Hashable, momentum: Tensor | None, right: bool, method: str) -> None:
        """Starts a decomposition.

        Args:
            key: what it is of.
            momentum: the whole projected momentum (m, n), which must not change before the
                result is taken; None where another rank decomposes it.
            right: whether m >= n.
            method: see :func:`conda_dist.maths.decompose`.
        """
        self._started[key] = None
        if momentum is None:
            return
        if self._executor is None:
            self._executor = ThreadPoolExecutor(1, "conda_dist refresh")
        gathered = None
        if momentum.device.type != "cpu":
            if self._stream is None:
                self._stream = torch.Stream(momentum.device)
            gathered = torch.accelerator.current_stream(momentum.device).record_event()
            momentum.record_stream(self._stream)
        self._started[key] = self._executor.submit(self._run, momentum, right, method, gathered)

    @torch.no_grad()
    def _run(
        self, momentum: Tensor, right: bool, method: str, gathered: torch.Event | None
    ) -> Found:
        if not threading.main_thread().is_alive():  # nobody will ask: let the process end
            return Outcome.UNKNOWN, None
        if self._stream is None or gathered is None:
            return maths.decompose(momentum, right, method)
        with self._stream:
            self._stream.wait_event(gathered)
            found = maths.decompose(momentum, right, method)
            self._stream.synchronize()  # this thread has the time
        return found

    def take(self, key: Hashable) -> Found:
        """What was found, once; waits for it. UNKNOWN where another rank decomposed it.

        Raises:
            Exception: what the decomposition raised.
        """
        future = self._started.pop(key)
        if future is None:
            return Outcome.UNKNOWN, None
        outcome, rotation = future.result()
        if rotation is not None and rotation.device.type != "cpu":
            rotation.record_stream(torch.accelerator.current_stream(rotation.device))
        return outcome, rotation
