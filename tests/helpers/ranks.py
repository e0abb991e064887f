"""Runs functions on real gloo processes, kept between tests because importing torch takes seconds.

    results = ranks.run(3, function, *arguments)      # function(*arguments) on ranks 0, 1, 2

Each call has a fresh default process group over a fresh store. A rank that raises fails the call
with its traceback; one that does not answer in time has all processes killed.
"""

import gc
import inspect
import math
import os
import shutil
import tempfile
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

from preloaded import context, process

TIMEOUT = 120.0
"""Seconds a call may take."""
MORE_THREADS, MOST_THREADS = 16, 200
"""Threads more than before with which a process looks for those it can do without, and those with
which it ends: DeepSpeed keeps what groups it has made."""


class RankError(Exception):
    """A function raised on some rank."""


class _Pool:
    def __init__(self) -> None:
        self._workers: list[tuple[BaseProcess, Connection]] = []

    def run(
        self, world: int, function: Callable[..., Any], args: tuple[Any, ...], timeout: float
    ) -> list[Any]:
        while len(self._workers) < world:
            ours, theirs = context.Pipe()
            worker = process(_work, theirs, daemon=True)
            worker.start()
            theirs.close()
            self._workers.append((worker, ours))
        folder = tempfile.mkdtemp(prefix="ranks-")
        pipes = [pipe for _, pipe in self._workers[:world]]
        try:
            for rank, pipe in enumerate(pipes):
                pipe.send((function, args, rank, world, f"file://{folder}/store", timeout))
            answers = self._collect(pipes, timeout)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        errors = [f"rank {rank}:\n{a[1]}" for rank, a in enumerate(answers) if not a[0]]
        # A rank that raised may have left the others' groups half used.
        if errors or any(threads > MOST_THREADS for _, _, threads in answers):
            self.close()
        if errors:
            raise RankError("\n".join(errors))
        return [said for _, said, _ in answers]

    def _collect(self, pipes: list[Connection], timeout: float) -> list[tuple[bool, Any, int]]:
        answers: dict[int, tuple[bool, Any, int]] = {}
        while len(answers) < len(pipes):
            waiting = [pipe for rank, pipe in enumerate(pipes) if rank not in answers]
            failed = any(not answer[0] for answer in answers.values())
            ready = wait(waiting, 15.0 if failed else timeout)
            if not ready:
                self.close()
                missing = [rank for rank in range(len(pipes)) if rank not in answers]
                said = [f"rank {r}: {a[1]}" for r, a in answers.items() if not a[0]]
                raise RankError("\n".join([f"ranks {missing} did not answer", *said]))
            for pipe in ready:
                rank = pipes.index(pipe)
                try:
                    answers[rank] = pipe.recv()
                except (EOFError, OSError):
                    answers[rank] = (False, "the process died", 0)
        return [answers[rank] for rank in range(len(pipes))]

    def close(self) -> None:
        for worker, pipe in self._workers:
            pipe.close()
            worker.kill()
            worker.join()
        self._workers.clear()


_pool = _Pool()


def run(
    world: int, function: Callable[..., Any], *args: Any, timeout: float = TIMEOUT
) -> list[Any]:
    """Calls a module-level function on ``world`` ranks; returns what each returned."""
    return _pool.run(world, function, args, timeout)


def run_on(
    layout: tuple[str, tuple[int, ...]], function: Callable[..., Any], *args: Any
) -> list[Any]:
    """Calls ``function(layout, *args)`` on all ranks of a layout's mesh, for a minute at most."""
    return run(math.prod(layout[1]), function, layout, *args, timeout=60)


def close() -> None:
    """Ends the processes."""
    _pool.close()


def _work(pipe: Connection) -> None:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    import torch
    import torch.distributed as dist
    from torch.distributed.tensor.debug import _clear_sharding_prop_cache

    torch.set_num_threads(1)
    _share_device()
    warnings.filterwarnings("ignore", message=".*destroy_process_group.*")
    gc.freeze()  # or each collection goes through all that has been imported
    threads = _threads()
    while True:
        try:
            function, args, rank, world, store, timeout = pipe.recv()
        except EOFError:
            return
        try:
            dist.init_process_group(
                "gloo",
                init_method=store,
                rank=rank,
                world_size=world,
                timeout=timedelta(seconds=timeout),
            )
            dist.barrier()  # one that had done its work already would leave others half connected
            torch.manual_seed(0)
            answer = True, function(*args)
        except BaseException:
            answer = False, traceback.format_exc()
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()
            # It keeps meshes, whose groups are no more, and equal ones are taken for them.
            _clear_sharding_prop_cache()  # type: ignore[no-untyped-call]
            threads = _collect_groups(threads)
        pipe.send((*answer, threads))


def _share_device() -> None:
    """Has all of this process's gloo groups share what they wait for messages with.

    Each has a thread of its own for that otherwise, which wakes a hundred times a second.
    """
    from torch.distributed import Backend, ProcessGroup, ProcessGroupGloo

    if "_backend_type" not in inspect.signature(Backend.register_backend).parameters:
        return  # torch 2.11 makes gloo's groups itself: they have more threads
    device = ProcessGroupGloo.create_default_device()

    def create(opts: Any, _: Any) -> ProcessGroupGloo:
        options = ProcessGroupGloo._Options()
        options._devices, options._threads = [device], 2
        options._timeout = opts.timeout
        options.global_ranks_in_group = opts.global_ranks_in_group
        options.group_name = opts.group_id
        return ProcessGroupGloo(opts.store, opts.group_rank, opts.group_size, options)

    kind, devices = ProcessGroup.BackendType.GLOO, Backend.backend_capability[Backend.GLOO]
    Backend.register_backend(
        Backend.GLOO, create, extended_api=True, devices=devices, _backend_type=kind
    )


def _threads() -> int:
    return len(os.listdir("/proc/self/task"))


def _collect_groups(before: int) -> int:
    """Has process groups that only reference cycles keep end their threads, once there are many.

    Each group has two beside the one that all share (`_share_device`).

    Args:
        before: threads that were left the last time.

    Returns:
        Threads that are left.
    """
    if _threads() > before + MORE_THREADS:
        gc.collect()
        return _threads()
    return before
