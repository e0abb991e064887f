"""Jobs in processes of their own, for tests that signal or kill them."""

import contextlib
import gc
import itertools
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch

import preloaded
from nodes import Node

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
        _kill(children(process.pid))
        process.kill()
        with contextlib.suppress(ValueError):  # somebody has read it to the end already
            process.communicate()


class Forked:
    """What Popen is, as far as tests use it, forked from a process that has imported the job.

    If the command is a Python's, it imports nothing again; nor do the Pythons that it starts, as
    torchrun and `deepspeed` start ranks. Each takes five seconds of a core less. What a test says
    of starting and of importing needs `started`.

    Args:
        command: A command line.
        environment: All of its variables.
        file: What it prints is added to this file.
        host: Where it runs, if not on this one.
    """

    def __init__(
        self,
        command: Sequence[Any],
        environment: dict[str, str],
        file: Path,
        host: Node | None = None,
    ) -> None:
        words = list(map(str, command))
        self._process = preloaded.process(_begin, words, environment, file, host)
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
def running(
    command: Sequence[Any], said: Path, host: Node | None = None, **environment: str
) -> Iterator[Forked]:
    """A command whose output goes to a file; it and all below it are gone at the end."""
    process = Forked(command, {**ENVIRONMENT, **environment}, said, host)
    try:
        yield process
    finally:
        _kill(below(process.pid))
        process.kill()
        process.wait()


@contextlib.contextmanager
def forked(*command: Any, **environment: str) -> Iterator[Forked]:
    """The same as `started`, without importing torch and the job again; see Forked."""
    with (
        tempfile.TemporaryDirectory() as folder,
        running((sys.executable, *command), Path(folder) / "said", **environment) as process,
    ):
        yield process


def _begin(
    command: Sequence[str], environment: dict[str, str], file: Path, host: Node | None
) -> None:
    """Does what the command does, in a process that has just been forked."""
    os.setsid()
    with file.open("ab", buffering=0) as said:
        os.dup2(said.fileno(), 1)
        os.dup2(said.fileno(), 2)
    if host is not None:
        host.enter()
    if command[0] != sys.executable:
        os.execvpe(command[0], command, environment)
    subprocess.Popen.__init__ = _start  # type: ignore[method-assign]
    _run(command[1:], environment)


def _run(command: Sequence[str], environment: dict[str, str]) -> None:
    """Does what `python COMMAND...` does."""
    os.environ.clear()
    os.environ.update(environment)
    # Where `rank_of` looks: /proc has the environment that a process was started with.
    Path("/proc/self/comm").write_text(f"rank {environment.get('RANK')}")
    sys.path[:0] = filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))
    torch.set_num_threads(1)
    if command[0] == "-m":
        sys.argv = list(command[1:])
        runpy.run_module(command[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = list(command)
        runpy.run_path(command[0], run_name="__main__")


_popen = subprocess.Popen.__init__


def _start(
    self: "subprocess.Popen[Any]",
    args: Any,
    *others: Any,
    env: Any = None,
    preexec_fn: Callable[[], object] | None = None,
    **options: Any,
) -> None:
    """Popen's constructor: of a Python it forks this one, which does not go on to exec."""
    alone = isinstance(args, str | bytes | os.PathLike)
    words = [] if alone else [str(word) for word in args]
    if words[:1] == [sys.executable] and "-c" not in words[1:3]:
        sys.stdout.flush()
        command = [word for word in words[1:3] if word != "-u"] + words[3:]
        environment, given = {**(os.environ if env is None else env)}, preexec_fn

        def become() -> NoReturn:
            """Never returns, so that Popen's child does not come to exec."""
            if given is not None:
                given()
            os.closerange(3, os.sysconf("SC_OPEN_MAX"))  # among them what Popen waits for
            _become(command, environment)

        preexec_fn = become
    _popen(self, args, *others, env=env, preexec_fn=preexec_fn, **options)


def _become(command: Sequence[str], environment: dict[str, str]) -> NoReturn:
    """Is `python COMMAND...` to its end, in a process of which nothing else is to be left."""
    for number in signal.valid_signals():
        if callable(signal.getsignal(number)):
            signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    gc.enable()  # Popen had it wait
    code: Any = 0
    try:
        _run(command, environment)
    except SystemExit as ended:
        code = ended.code
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    os._exit(code if isinstance(code, int) else code is not None)


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


def _kill(pids: Iterable[int]) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):  # it has ended meanwhile
            os.kill(pid, signal.SIGKILL)


def children(parent: int) -> list[int]:
    """Processes started by a process, which torchrun puts into sessions of their own."""
    listed = subprocess.run(
        ["ps", "-o", "pid=", "--ppid", str(parent)], capture_output=True, text=True, check=False
    )
    return [int(pid) for pid in listed.stdout.split()]


def below(parent: int) -> list[int]:
    """All processes that a process has started, and those that they have."""
    return [pid for child in children(parent) for pid in (child, *below(child))]


def rank_of(torchrun: Forked, rank: int) -> int:
    """The process that is a rank of torchrun's."""
    for pid in children(torchrun.pid):
        if Path(f"/proc/{pid}/comm").read_text() == f"rank {rank}\n":
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
