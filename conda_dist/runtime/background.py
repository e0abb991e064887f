"""Decompositions in a background thread, while training goes on.

The thread computes and never communicates. Momenta are gathered on their owners before they are
handed to the thread. All ranks take the results in the same later step, which they know in advance.
"""

import threading
from collections import deque
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from typing import NamedTuple

import torch
from torch import Tensor

from conda_dist.numerics.decomposition import Found, Outcome
from conda_dist.numerics.precision import leaving_flags


class _Job(NamedTuple):
    """A decomposition to run: where to put the result, the momentum, and how to decompose it.

    On an accelerator, it runs on ``stream``, after the event ``gathered``.
    """

    found: Future[Found]
    momentum: Tensor
    find: Callable[[Tensor], Found]
    gathered: torch.Event | None
    stream: torch.Stream | None


class Background:
    """Decompositions that were started and whose results were not taken yet.

    On an accelerator they run on a stream of their own, whose memory stays in torch's cache for the
    next refresh. The thread ends when there is nothing left to decompose. When the process ends, it
    waits for the matrix that is being decomposed, but not for those in the queue.
    """

    def __init__(self) -> None:
        self._started: dict[Hashable, Future[Found] | None] = {}
        self._lock = threading.Lock()
        self._jobs: deque[_Job] = deque()
        self._working = False
        self._streams: dict[torch.device, torch.Stream] = {}
        self._starter: threading.Thread | None = None

    def __contains__(self, key: Hashable) -> bool:
        """Whether the decomposition of ``key`` was started, on this rank or on another one."""
        return key in self._started

    def start(
        self, key: Hashable, momentum: Tensor | None, find: Callable[[Tensor], Found]
    ) -> None:
        """Starts a decomposition.

        Args:
            key: names the decomposition: a weight and the index of a matrix.
            momentum: the whole projected momentum (m, n), which must not change before the result
                is taken; None if another rank decomposes it.
            find: the function that decomposes it.
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

    def _is_wanted(self) -> bool:
        """Whether training may still take a result: its thread, or the main one, is alive."""
        starter = self._starter
        return threading.main_thread().is_alive() or (starter is not None and starter.is_alive())

    def _work(self) -> None:
        """The thread: runs jobs until there are none."""
        # Not an executor's thread: the interpreter would wait for all of its queue before it ends.
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
        """Runs one job, and waits for its stream."""
        if job.stream is None or job.gathered is None:
            return job.find(job.momentum)
        # A new thread begins on the first GPU. To go back there, the stream's context would use
        # memory of that GPU for each process of the host.
        torch.accelerator.set_device_index(job.momentum.device)
        with job.stream:
            job.stream.wait_event(job.gathered)
            found = job.find(job.momentum)
            job.stream.synchronize()  # waits in this thread only
        return found

    def take(self, key: Hashable) -> Found:
        """Waits for the result of a decomposition, and removes it.

        Returns:
            The result; its outcome is UNKNOWN if another rank decomposed the momentum.

        Raises:
            Exception: what the decomposition raised.
        """
        future = self._started.pop(key)
        if future is None:
            return Found(Outcome.UNKNOWN)
        found = future.result()
        rotation = found.rotation
        if rotation is not None and rotation.device.type != "cpu":
            rotation.record_stream(torch.accelerator.current_stream(rotation.device))
        return found

    def drop(self) -> None:
        """Drops all decompositions; only the one that is running is finished."""
        with self._lock:
            self._jobs.clear()
        self._started.clear()
