"""Jobs in processes of their own, for tests that signal or kill them."""

import contextlib
import itertools
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import preloaded

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
DEADLINE = 120.0


@contextlib.contextmanager
def started(*command: Any, **environment: str) -> Iterator[subprocess.Popen[str]]:
    """A Python process in a session of its own, all of which is gone at the end."""
    process = subprocess.Popen(
        [sys.executable, *map(str, command)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**ENVIRONMENT, **environment},
        start_new_session=True,
    )
    try:
        yield process
    finally:
        for child in children(process.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        with contextlib.suppress(ValueError):  # somebody has read it to the end already
            process.communicate()


class Forked:
    """What Popen is, as far as tests use it, for a process that has imported torch and the job.

    Args:
        command: What `python` would be given: "-m", a module and arguments, or a script and its.
        environment: All of its variables.
        file: What it prints is added to this file.
    """

    def __init__(self, command: tuple[str, ...], environment: dict[str, str], file: Path) -> None:
        self._process = preloaded.process(_run, command, environment, file)
        self._file = file
        self._process.start()
        assert self._process.pid is not None
        self.pid: int = self._process.pid

    @property
    def returncode(self) -> int | None:
        """Its exit code, or the negative number of the signal that ended it; None if it runs."""
        return self._process.exitcode

    def poll(self) -> int | None:
        """The same, as Popen has it."""
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Waits for its end and returns how it ended; raises as Popen does."""
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(str(self.pid), timeout or 0.0)
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, None]:
        """Waits for its end and returns what it has printed."""
        self.wait(timeout)
        return self._file.read_text(), None

    def send_signal(self, number: int) -> None:
        """Sends it a signal, if it still runs."""
        if self.returncode is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """Ends it at once."""
        self.send_signal(signal.SIGKILL)


@contextlib.contextmanager
def forked(*command: Any, **environment: str) -> Iterator[Forked]:
    """The same as `started`, forked from a process that has imported torch and the job.

    A process of the job takes five seconds of a core less. What a test says of starting and of
    importing needs `started`.
    """
    with tempfile.TemporaryDirectory() as folder:
        words = tuple(map(str, command))
        process = Forked(words, {**ENVIRONMENT, **environment}, Path(folder) / "said")
        try:
            yield process
        finally:
            for child in children(process.pid):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(child, signal.SIGKILL)
            process.kill()
            process.wait()


def _run(command: tuple[str, ...], environment: dict[str, str], file: Path) -> None:
    """Does what `python COMMAND...` does, in a process that has just been forked."""
    os.setsid()
    with file.open("ab", buffering=0) as said:
        os.dup2(said.fileno(), 1)
        os.dup2(said.fileno(), 2)
    os.environ.clear()
    os.environ.update(environment)
    sys.path[:0] = filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))
    torch.set_num_threads(1)
    if command[0] == "-m":
        sys.argv = list(command[1:])
        runpy.run_module(command[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = list(command)
        runpy.run_path(command[0], run_name="__main__")


def rank_environments(world: int) -> list[dict[str, str]]:
    """What a cluster's launcher would tell each rank of a job on this host."""
    port = str(free_port())
    shared = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(world)]


_PORTS = itertools.count(10_000 + os.getpid() * 37 % 20_000)


def free_port() -> int:
    """A port of none of those that systems give out, so that nobody takes it in the meantime."""
    while True:
        port = 10_000 + next(_PORTS) % 20_000
        with socket.socket() as tried, contextlib.suppress(OSError):
            tried.bind(("127.0.0.1", port))
            return port


def children(parent: int) -> list[int]:
    """Processes started by a process, which torchrun puts into sessions of their own."""
    listed = subprocess.run(
        ["ps", "-o", "pid=", "--ppid", str(parent)], capture_output=True, text=True, check=False
    )
    return [int(pid) for pid in listed.stdout.split()]


def rank_of(torchrun: subprocess.Popen[str], rank: int) -> int:
    """The process that is a rank of torchrun's."""
    for pid in children(torchrun.pid):
        if f"\0RANK={rank}\0" in Path(f"/proc/{pid}/environ").read_text():
            return pid
    raise AssertionError(f"no rank {rank}")


def has_ended(pid: int) -> bool:
    """Whether a process is gone, or only waits for somebody to ask how it ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def wait_for_step(run: Path, step: int, process: subprocess.Popen[str], since: float = 0.0) -> None:
    """Waits until a run has reported a step, in a file that was begun after `since`."""
    deadline = time.monotonic() + DEADLINE
    file = run / "metrics.jsonl"
    while not _is_there(file, f'"step": {step},', since):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.01)


def _is_there(file: Path, text: str, since: float) -> bool:
    return file.exists() and file.stat().st_mtime >= since and text in file.read_text()


def endless(config: Path, output: Path) -> tuple[Any, ...]:
    """A job that no test waits for the end of; its learning rate does not depend on that end."""
    steady = ("--schedule.name", "constant", "--schedule.warmup_steps", 2)
    return (config, "--output", output, "--training.steps", 100_000, *steady)
