"""The check on one GPU; see tests/gpu.sh, which runs it: python check.py OUT [section,...]

Each section runs in a process of its own. So one that fails, hangs or breaks its CUDA context costs
only its own time: after its limit it is killed, and what it has found is kept. All processes start
at once and wait for their turn, so their imports take no time.
"""

import contextlib
import json
import multiprocessing as mp
import os
import shutil
import signal
import subprocess
import sys
import time
import traceback
import warnings
from dataclasses import dataclass
from datetime import UTC, datetime
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import correctness
import shards
import speed
import torch
import training
from common import BUDGET_S, TOY, Check, Row, Section, end_with_parent, left_s

CHECKS = (
    Check("card", correctness.card, 30),
    Check("golden", correctness.golden, 45, 15),
    Check("waits", correctness.waits, 30),
    Check("drift", correctness.drift, 45),
    Check("one rank", shards.one_rank, 90, 20),
    Check("many ranks", shards.many_ranks, 110, 30),
    Check("steps", speed.steps, 70, 20),
    Check("refreshes", speed.refreshes, 60, 20),
    Check("train", training.train, BUDGET_S, 10 if TOY else 90),
)

READY_S = 60
"""Seconds that a section may take, at its turn, until it has imported what it needs."""


def markdown(found: list[Section]) -> str:
    """The table."""
    day = f"{datetime.now(UTC):%Y-%m-%d}"
    where = "CPU, toy sizes: a rehearsal" if TOY else torch.cuda.get_device_name(0)
    lines = [f"# Check of {day} on {where}, torch {torch.__version__}", ""]
    lines += ["| section | what | found | bound | |", "|---|---|---|---|---|"]
    for section in found:
        for row in section.rows:
            said = str(row.found).strip().replace("|", "\\|").replace("\n", "<br>")
            what = row.what.replace("|", "\\|")
            ok = {True: "ok", False: "**wrong**", None: ""}[row.ok]
            lines.append(f"| {section.name} | {what} | {said} | {row.bound} | {ok} |")
    seconds = ", ".join(f"{section.name} {section.seconds:.0f}" for section in found)
    return "\n".join([*lines, "", f"Seconds: {seconds}.", ""])


class _Sent(Section):
    """A section in its process, which sends each row to the parent as soon as it is there."""

    connection: Connection | None = None

    def add(self, what: str, found: Any, bound: str = "", ok: bool | None = None) -> None:
        super().add(what, found, bound, ok)
        self.send(self.rows[-1])

    def send(self, row: Row | None) -> None:
        """Sends a row and the details; no row: the section is over."""
        assert self.connection is not None
        self.connection.send((row, self.details))


@dataclass
class Process:
    """A section's process, and the connection to it."""

    process: BaseProcess
    connection: Connection
    killed: bool = False

    @classmethod
    def start(cls, check: Check, out: Path) -> "Process":
        """Starts it. It says when it is ready, and waits for its turn."""
        # A process that has used CUDA cannot be forked; in a rehearsal forking saves the imports.
        context: Any = mp.get_context("fork" if TOY else "spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=_work, args=(check.name, out, theirs))
        process.start()
        theirs.close()
        return cls(process, ours)

    def kill(self) -> None:
        """Ends it and all that it has started, once: then its id may be another process's."""
        assert self.process.pid is not None
        if self.killed:
            return
        self.killed = True
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.kill()
        self.process.join()


def _work(name: str, out: Path, connection: Connection) -> None:
    os.setsid()
    end_with_parent()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    warnings.filterwarnings("ignore")
    section = _Sent(name)
    section.connection = connection
    try:
        section.send(None)  # it is ready
        connection.recv()  # its turn has come
        next(check for check in CHECKS if check.name == name).run(section, out)
    except EOFError:  # the parent has ended
        return
    except Exception:
        section.add("raised", traceback.format_exc()[-1500:], "", False)
    section.send(None)


def _run(check: Check, child: Process, found: list[Section], out: Path) -> None:
    """Lets a section run, and writes what it says as soon as it says it."""
    section = Section(check.name)
    found.append(section)
    if not child.connection.poll(patience := max(0.0, min(READY_S, left_s()))):
        section.add("killed", f"it was not ready in {patience:.0f} s", "", False)
        child.kill()
        return _write(found, out)
    began = time.monotonic()
    limit = min(check.most_s * (4 if TOY else 1), left_s())  # a busy machine rehearses slowly
    if left_s() < check.least_s:
        section.add("left out", f"{left_s():.0f} s were left", "", False)
        return _write(found, out)
    with contextlib.suppress(OSError, EOFError):  # it died: the loop says so
        child.connection.recv()
        child.connection.send(None)
    while True:
        if not child.connection.poll(max(0.0, began + limit - time.monotonic())):
            section.add("killed", f"it was not done in {limit:.0f} s", "", False)
            break
        try:
            row, section.details = child.connection.recv()
        except (OSError, EOFError):
            child.process.join(5)
            section.add("died", f"exit code {child.process.exitcode}", "", False)
            break
        if row is None:
            break
        section.rows.append(row)
        _write(found, out)
    section.seconds = time.monotonic() - began
    child.kill()
    return _write(found, out)


def _write(found: list[Section], out: Path) -> None:
    said = {"toy": TOY, "budget_s": BUDGET_S, "sections": [s.as_dict() for s in found]}
    (out / "check.json").write_text(json.dumps(said, indent=1, default=str))
    (out / "check.md").write_text(markdown(found))


def main(out: Path, wanted: list[str]) -> int:
    """Runs the sections; returns 1 if something is wrong."""
    out.mkdir(parents=True, exist_ok=True)
    checks = [check for check in CHECKS if not wanted or check.name in wanted]
    if unknown := set(wanted) - {check.name for check in CHECKS}:
        print(f"no such sections: {', '.join(sorted(unknown))}", file=sys.stderr)
        return 2
    if TOY:
        torch.set_num_threads(1)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    making = training.prepare(out) if any(check.name == "train" for check in checks) else None
    found: list[Section] = []
    children = [Process.start(check, out) for check in checks]
    try:
        for check, child in zip(checks, children, strict=True):
            if check.name == "train" and making is not None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    making.wait(left_s())
            _run(check, child, found, out)
            print(markdown(found[-1:]).partition("|---|---|---|---|---|\n")[2], flush=True)
    finally:
        for child in children:
            child.kill()
        if making is not None:
            making.kill()
    shutil.rmtree(out / "work", ignore_errors=True)
    return int(any(row.ok is False for section in found for row in section.rows))


if __name__ == "__main__":
    names = sys.argv[2].split(",") if len(sys.argv) > 2 else []
    raise SystemExit(main(Path(sys.argv[1]), names))
