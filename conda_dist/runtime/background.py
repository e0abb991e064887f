"""Decompositions in a thread of their own, while training goes on.

The thread computes and never communicates: what it is given was gathered before, and what it found
is taken, by the ranks together, at a step that all of them know beforehand.
"""

import threading
from collections import deque
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from typing import NamedTuple

import torch
from torch import Tensor

from conda_dist.numerics.decomposition import Outcome
from conda_dist.numerics.precision import leaving_flags

Found = tuple[Outcome, Tensor | None]


class _Job(NamedTuple):
    found: Future[Found]
    momentum: Tensor
    find: Callable[[Tensor], Found]
    gathered: torch.Event | None
    stream: torch.Stream | None


class Background:
    """Decompositions that were started and not taken yet.

    On an accelerator they run on a stream beside training's. The thread ends with its work, and
    with the process: that waits for the matrix at hand, not for those after it.
    """

    def __init__(self) -> None:
        self._started: dict[Hashable, Future[Found] | None] = {}
        self._lock = threading.Lock()
        self._jobs: deque[_Job] = deque()
        self._working = False
        self._streams: dict[torch.device, torch.Stream] = {}
        self._starter: threading.Thread | None = None

    def __contains__(self, key: Hashable) -> bool:
        """Whether that decomposition was started, here or on another rank."""
        return key in self._started

    def start(
        self, key: Hashable, momentum: Tensor | None, find: Callable[[Tensor], Found]
    ) -> None:
        """Starts a decomposition.

        Args:
            key: what it is of.
            momentum: the whole projected momentum, which must not change before the result is
                taken; None where another rank decomposes it.
            find: decomposes it.
        """
        self._started[key] = None
        if momentum is None:
            return
        gathered = stream = None
        device = momentum.device
        if device.type != "cpu":
            stream = self._streams.setdefault(device, torch.Stream(device))
            gathered = torch.accelerator.current_stream(device).record_event()
            momentum.record_stream(stream)
        found: Future[Found] = Future()
        self._started[key] = found
        with self._lock:
            self._starter = threading.current_thread()
            self._jobs.append(_Job(found, momentum, find, gathered, stream))
            if not self._working:
                threading.Thread(target=self._work, name="conda_dist refresh").start()
                self._working = True

    def fail(self, key: Hashable, error: Exception) -> None:
        """Has a decomposition that was not started raise an error when it is taken."""
        found = self._started[key] = Future[Found]()
        found.set_exception(error)

    def _is_wanted(self) -> bool:
        """Whether anybody may still ask: training may be in another thread than the main one."""
        starter = self._starter
        return threading.main_thread().is_alive() or (starter is not None and starter.is_alive())

    def _work(self) -> None:
        # No thread of an executor: those finish all their work before the interpreter may end.
        while self._is_wanted():
            with self._lock:
                if not self._jobs:
                    self._working = False
                    return
                job = self._jobs.popleft()
            try:
                job.found.set_result(self._decompose(job))
            except BaseException as error:
                job.found.set_exception(error)
            del job

    @torch.no_grad()
    @leaving_flags()
    def _decompose(self, job: _Job) -> Found:
        if job.stream is None or job.gathered is None:
            return job.find(job.momentum)
        with job.stream:
            job.stream.wait_event(job.gathered)
            found = job.find(job.momentum)
            job.stream.synchronize()  # this thread has the time
        return found

    def take(self, key: Hashable) -> Found:
        """What was found, once; waits for it. UNKNOWN where another rank decomposed it.

        Raises:
            Exception: what the decomposition raised, or what it was failed with.
        """
        future = self._started.pop(key)
        if future is None:
            return Outcome.UNKNOWN, None
        outcome, rotation = future.result()
        if rotation is not None and rotation.device.type != "cpu":
            rotation.record_stream(torch.accelerator.current_stream(rotation.device))
        return outcome, rotation

    def drop(self) -> None:
        """Forgets all; the matrix at hand is the last one that is decomposed."""
        with self._lock:
            self._jobs.clear()
        self._started.clear()
