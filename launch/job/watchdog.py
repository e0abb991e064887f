"""A rank that stalls is named, and the job ends, instead of waiting in a collective.

A rank that makes no progress holds up all others in their next collective, which nothing can
interrupt. So each rank says every so often, from a thread, how far its training has come. When one
has stood still for `training.stall_timeout_s` it reads what all have said: those that say nothing
any more, or that are behind the rest, are who the others wait for. All of them print that and end.

The words go through the job's rendezvous store, over a connection of their own: no collective, so
that no order of the training's own is touched. While the store does not answer, nobody is judged;
`training.timeout_s` then ends the job.
"""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import socket
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore

from conda_dist.launch.cluster.process_group import World, gather

_STDERR = 2
_VERDICT = "verdict"
_CONFIRMING = 3  # intervals in which a rank must say something more to count as alive
_NAMED = 8  # most ranks that a message lists


@dataclass(frozen=True, slots=True)
class Report:
    """What a rank says of itself."""

    rank: int
    host: str
    pid: int
    birth: str  # tells the process from a later one of this pid, in its host's or container's count
    count: int = 0  # phases begun: equal on ranks that are equally far
    step: int = 0
    phase: str = ""
    idle_s: float = 0.0  # seconds since that phase began
    beat: int = 0  # reports made so far


@dataclass(frozen=True, slots=True)
class _Place:
    count: int
    step: int
    phase: str
    since: float


class Watchdog:
    """Watches the ranks of a job while they train."""

    def __init__(self, world: World, limit_s: float, exit_code: int) -> None:
        """Watches nothing yet.

        Args:
            world: The job.
            limit_s: Seconds that a phase of a step may take; 0 for any. The job ends at most a
                quarter of that, and a few seconds, later.
            exit_code: How the processes of a stalled job end.
        """
        self._world, self._limit, self._exit_code = world, limit_s, exit_code
        self._interval = min(max(limit_s / 20, 0.05), 10.0)
        self._place = _Place(0, 0, "starting", time.monotonic())
        self._held_until = 0.0  # when this process last came back from being held up
        self._over = threading.Event()

    def mark(self, step: int, phase: str) -> None:
        """Says that this rank begins a phase; every rank says the same ones in the same order."""
        self._place = _Place(self._place.count + 1, step, phase, time.monotonic())

    def go_on(self) -> None:
        """Says that the phase goes on, so that its time limit begins anew."""
        self._place = replace(self._place, since=time.monotonic())

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watches while the block runs; every rank enters it."""
        if not self._limit:
            yield
            return
        self._own = Report(self._world.rank, socket.gethostname(), os.getpid(), _birth("self"))
        # A store may have served another job of these processes, or their previous start.
        name = gather(self._world, uuid.uuid4().hex)[0]
        self._prefix = f"conda_dist/watchdog/{name}"
        self._connect()
        self._say()
        gather(self._world, None)  # from here on everybody has said something
        self.mark(self._place.step, self._place.phase)
        self._arm()  # a rank may freeze before its first interval is over
        thread = threading.Thread(target=self._watch, daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._over.set()
            thread.join(5.0)  # the store may not answer
            faulthandler.cancel_dump_traceback_later()

    def _connect(self) -> None:
        default = dist.distributed_c10d._get_default_store()
        self._store = PrefixStore(self._prefix, default.clone())
        self._store.set_timeout(timedelta(seconds=min(self._limit, 30.0)))

    def _arm(self) -> None:
        """Has the stack printed unless this comes again in time."""
        # From C, so that it is printed even where nothing lets our threads run.
        faulthandler.dump_traceback_later(self._limit, file=_STDERR)

    def _idle(self) -> float:
        """Seconds since the phase began, or since this whole process was held up, as by ^Z."""
        return time.monotonic() - max(self._place.since, self._held_until)

    def _watch(self) -> None:
        """Reports, accuses where nothing goes on, and ends this process once a verdict is there."""
        ticked = time.monotonic()
        while not self._over.wait(self._interval):
            now = time.monotonic()
            if now - ticked > max(5 * self._interval, 2.0):  # by a scheduler, ^Z or the store
                self._held_until = now
            ticked = now
            self._arm()
            try:
                self._say()
                if self._idle() > self._limit:
                    self._accuse()
                verdict = self._store.check([_VERDICT]) and self._store.get(_VERDICT).decode()
            except Exception:
                # A connection that was cut does not come back by itself, and without one this
                # rank would be taken for the one that is silent.
                with suppress(Exception):
                    self._connect()
                continue
            if verdict:
                self._end(verdict)

    def _say(self) -> None:
        place = self._place
        self._own = replace(
            self._own,
            count=place.count,
            step=place.step,
            phase=place.phase,
            idle_s=round(self._idle(), 3),
            beat=self._own.beat + 1,
        )
        self._store.set(str(self._own.rank), json.dumps(asdict(self._own)))

    def _accuse(self) -> None:
        """Finds out who is waited for, and gives the verdict unless that rank is on its way."""
        before = self._reports()
        for _ in range(_CONFIRMING):
            time.sleep(self._interval)
            self._say()
        silent, stuck = find_stalled(before, self._reports(), self._limit)
        if (silent or stuck) and not self._store.check([_VERDICT]):
            said = describe(silent, stuck, self._world.size, self._limit)
            dead, ranks = [asdict(report) for report in silent], [report.rank for report in stuck]
            content = json.dumps({"said": said, "silent": dead, "stuck": ranks})
            self._store.compare_set(_VERDICT, "", content)

    def _reports(self) -> list[Report]:
        ranks = range(self._world.size)
        return [Report(**json.loads(self._store.get(str(rank)))) for rank in ranks]

    def _end(self, verdict: str) -> None:
        content = json.loads(verdict)
        text = f"[rank {self._world.rank}] error: {content['said']}. Continue with --resume\n"
        # Not by sys.stderr, whose lock the stalled thread may hold.
        with suppress(OSError):  # its reader may be gone
            os.write(_STDERR, text.encode())
            if self._world.rank in content["stuck"]:
                os.write(_STDERR, f"[rank {self._world.rank}] what it is doing:\n".encode())
                faulthandler.dump_traceback(_STDERR)
        for silent in content["silent"]:
            self._kill(Report(**silent))
        time.sleep(2 * self._interval)  # the store may be this process's, and the others need it
        os._exit(self._exit_code)

    def _kill(self, silent: Report) -> None:
        """Kills a rank of this host that does not answer: a stopped process takes no SIGTERM."""
        same = (silent.host, silent.birth) == (self._own.host, _birth(str(silent.pid)))
        if silent.birth and same and silent.pid != os.getpid():
            with suppress(ProcessLookupError):
                os.kill(silent.pid, signal.SIGKILL)


def find_stalled(
    before: Sequence[Report], after: Sequence[Report], limit_s: float
) -> tuple[list[Report], list[Report]]:
    """The ranks that the others wait for, by every rank's reports at two times.

    Returns:
        Ranks that say nothing any more; if there are none, those that are behind the rest (all,
        where they are equally far), unless one of them has not stood still for `limit_s`.
    """
    silent = [new for old, new in zip(before, after, strict=True) if old.beat == new.beat]
    last = min(report.count for report in after)
    behind = [report for report in after if report.count == last]
    moving = any(report.idle_s < limit_s for report in behind)
    return silent, [] if silent or moving else behind


def describe(silent: Sequence[Report], stuck: Sequence[Report], ranks: int, limit_s: float) -> str:
    """What `find_stalled` found, in words."""
    found = silent or stuck
    first = found[0]
    named = [f"rank {r.rank} on {r.host} (pid {r.pid})" for r in found[:_NAMED]]
    if len(found) > _NAMED:
        named.append(f"{len(found) - _NAMED} more")
    said = f"no progress for {limit_s:g} s (training.stall_timeout_s): {', '.join(named)}"
    doing = f"step {first.step}, {first.phase}"
    if silent:
        return (
            f"{said} last said to be in {doing}, and says nothing any more: stopped, or its host "
            "is gone"
        )
    what = "is stuck" if len(found) == 1 else "are stuck"
    rest = "the others wait for it" if len(found) < ranks else "no rank is behind the others"
    return f"{said} {what} in {doing}; {rest}"


def _birth(pid: str) -> str:
    """Name space and start time of a process; "" where the system does not say."""
    try:
        process = Path("/proc") / pid
        started = (process / "stat").read_text().rpartition(")")[2].split()[19]
        return f"{os.readlink(process / 'ns' / 'pid')} {started}"
    except OSError:
        return ""
