"""A job killed and resumed again and again, at other world sizes, against one that never stopped.

    PYTHONPATH=tests/helpers python tests/slow/soak.py --steps 3000 --ranks 4 --output /tmp/soak

Kills are drawn: of one rank, of all at once, or a request to stop (SIGTERM); so are the moments
and the number of processes that go on. Each life allows the ranks other bytes of bases, so that a
matrix is computed by all ranks, or by a group of them. Prints a markdown table of what came of it.
"""

import argparse
import contextlib
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import launch_jobs
from conda_dist.launch.job.checkpoint import complete_checkpoints
from conda_dist.launch.job.files import EXIT_STOPPED
from processes import ENVIRONMENT, Forked, rank_environments

PATIENCE = 120.0
"""Seconds in which ranks have to notice that another is gone, and a job has to take a step."""
KINDS = {"one": signal.SIGKILL, "all": signal.SIGKILL, "stop": signal.SIGTERM}
"""Ways to end a job: one rank is killed, all are, or all are asked to stop."""
BUDGETS = (2**32, 0, 2**17)
"""Bytes of bases that a rank may have: all ranks compute a matrix, one does, or some do."""


@dataclass
class Report:
    """What came of a soak.

    Attributes:
        kills: for each its kind, the world size, the step reached, and that gone on from.
        budgets: bytes of bases that the ranks were allowed, life after life.
        damaged: checkpoints that are not what was written.
        hung: ranks that did not end when they should have.
        memory: MiB of the largest rank of the uninterrupted job, early on and at the end.
        difference: largest difference between the losses of the two runs at equal steps.
        final: difference between their last validation losses.
        control: largest difference of an uninterrupted run on one process, if there was one.
        steps: steps compared.
    """

    kills: list[tuple[str, int, int, int]] = field(default_factory=list)
    budgets: list[int] = field(default_factory=list)
    damaged: int = 0
    hung: int = 0
    memory: tuple[float, float] = (0.0, 0.0)
    difference: float = float("nan")
    final: float = float("nan")
    control: float | None = None
    steps: int = 0

    def lost(self, kind: str) -> list[int]:
        """Steps taken in vain before each kill of a kind."""
        return [reached - resumed for k, _, reached, resumed in self.kills if k == kind]

    def table(self) -> str:
        """The report as markdown."""
        rows = {"steps compared": f"{self.steps}"}
        for kind, what in {
            "one": "one rank killed",
            "all": "all ranks killed",
            "stop": "asked to stop",
        }.items():
            lost = self.lost(kind)
            mean = sum(lost) / len(lost) if lost else 0.0
            rows[what] = f"{len(lost)} times; steps lost: {mean:.1f} on average, {max(lost or [0])}"
            rows[what] += " at most"
        worlds = sorted({world for _, world, _, _ in self.kills})
        rows["world sizes killed"] = ", ".join(map(str, worlds))
        rows["bytes of bases allowed"] = ", ".join(map(str, sorted({*self.budgets})))
        rows["checkpoints damaged"] = f"{self.damaged}"
        rows["ranks that hung"] = f"{self.hung}"
        rows["largest loss difference at equal steps"] = f"{self.difference:.2g}"
        if self.control is not None:
            rows["the same, one process never stopped"] = f"{self.control:.2g}"
        rows["difference of the last validation loss"] = f"{self.final:.2g}"
        start, end = self.memory
        rows["resident memory of a rank, early and at the end"] = f"{start:.0f}, {end:.0f} MiB"
        lines = [f"| {name} | {value} |" for name, value in rows.items()]
        return "\n".join(["| soak | |", "|---|---|", *lines])


@contextlib.contextmanager
def started(world: int, arguments: Sequence[object], log: Path) -> Iterator[list[Forked]]:
    """A job of so many processes, all of which are gone at the end."""
    command = (sys.executable, "-m", "conda_dist.launch.pretrain", *arguments)
    processes: list[Forked] = []
    try:
        for told in rank_environments(world):
            processes.append(Forked(command, {**ENVIRONMENT, **told}, log))
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.wait()


def reached(run: Path) -> int:
    """The last step that a run has reported."""
    file = run / "metrics.jsonl"
    steps = file.read_bytes().rpartition(b'"step": ')[2] if file.exists() else b""
    number = steps.partition(b",")[0]
    return int(number) if number.isdigit() else 0


def wait_for(run: Path, step: int, processes: Sequence[Forked], log: Path) -> bool:
    """Waits until a run has reported a step; returns whether it has, rather than ended."""
    last, since = reached(run), time.monotonic()
    while reached(run) < step:
        codes = [process.poll() for process in processes]
        if all(code == 0 for code in codes):
            return False
        if any(codes):
            raise RuntimeError(f"the job ended by itself: {codes}\n{log.read_text()[-3000:]}")
        if reached(run) != last:
            last, since = reached(run), time.monotonic()
        if time.monotonic() > since + PATIENCE:
            raise RuntimeError(f"no step for {PATIENCE} s\n{log.read_text()[-3000:]}")
        time.sleep(0.02)
    return True


def damaged(run: Path) -> int:
    """How many of a run's checkpoints are not what their own hashes say was written."""
    count = 0
    for folder in complete_checkpoints(run / "checkpoints"):
        files = json.loads((folder / "trainer.json").read_text())["files"]
        whole = all(
            (folder / name).is_file()
            and hashlib.sha256((folder / name).read_bytes()).hexdigest() == written
            for name, written in files.items()
        )
        count += not whole
    return count


def resident(process: Forked) -> float:
    """MiB of memory that a process has."""
    pages = int(Path(f"/proc/{process.pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def uninterrupted(
    world: int, arguments: Sequence[object], run: Path, steps: int
) -> tuple[float, float]:
    """Runs a job to its end; returns the largest rank's memory after a tenth and near the end."""
    log = run.with_suffix(".log")
    with started(world, [*arguments, "--output", run], log) as processes:
        memory = []
        for step in (max(steps // 10, 1), max(steps - 2, 1)):
            wait_for(run, step, processes, log)
            memory.append(max(resident(process) for process in processes if process.poll() is None))
        codes = [process.wait(PATIENCE) for process in processes]
    if any(codes):
        raise RuntimeError(f"the uninterrupted job failed: {codes}\n{log.read_text()[-3000:]}")
    return memory[0], memory[1]


def end(kind: str, processes: Sequence[Forked], draw: random.Random) -> int:
    """Ends a job; returns how many of its ranks had to be killed though they should have ended."""
    victims = [draw.choice(processes)] if kind == "one" else processes
    for process in victims:
        process.send_signal(KINDS[kind])
    deadline, hung = time.monotonic() + PATIENCE, 0
    for process in processes:
        try:
            code = process.wait(max(deadline - time.monotonic(), 0.1))
            # A rank that was left alone fails; one that was asked to stop may have been done.
            expected = {"stop": (EXIT_STOPPED, 0)}.get(kind)
            if expected and code not in expected:
                raise RuntimeError(f"asked to stop, a rank ended with status {code}")
        except subprocess.TimeoutExpired:
            hung += 1
            process.kill()
    return hung


def interrupted(
    arguments: Sequence[object],
    run: Path,
    steps: int,
    worlds: Sequence[int],
    life: tuple[int, int],
    kinds: Sequence[str],
    draw: random.Random,
) -> Report:
    """Runs a job to its end, killed after each time it has taken a drawn number of steps.

    Args:
        arguments: of the job.
        run: its folder.
        steps: how many there are.
        worlds: numbers of processes to draw from.
        life: fewest and most steps between two kills.
        kinds: of kills, drawn in turns.
        draw: where random numbers come from.
    """
    report, log = Report(), run.with_suffix(".log")
    killed: tuple[str, int, int] | None = None
    while True:
        told = starts(log)
        world = draw.choice([w for w in worlds if killed is None or w != killed[1]] or worlds)
        report.budgets.append(BUDGETS[len(report.budgets) % len(BUDGETS)])
        budget = ("--optimizer.conda.basis_budget", report.budgets[-1])
        job = [*arguments, *budget, "--output", run, "--resume"]
        with started(world, job, log) as processes:
            if killed is not None:
                report.kills.append((*killed, resumed_at(len(told), processes, log)))
            target = reached(run) + draw.randint(*life)
            going = wait_for(run, min(target, steps), processes, log)
            if not going or target >= steps:
                codes = [process.wait(PATIENCE) for process in processes]
                if any(codes):
                    raise RuntimeError(f"the job failed: {codes}\n{log.read_text()[-3000:]}")
                report.damaged += damaged(run)
                return report
            time.sleep(draw.random() * 0.2)  # in the middle of a step or of a checkpoint
            kind = kinds[len(report.kills) % len(kinds)]
            report.hung += end(kind, processes, draw)
            killed = kind, world, reached(run)
        report.damaged += damaged(run)


def starts(log: Path) -> list[int]:
    """The steps that the jobs of a log have said they start from."""
    lines = log.read_text().splitlines() if log.exists() else []
    facts = (line.partition("step ")[2] for line in lines if line.startswith("start  "))
    return [int(fact.partition(",")[0]) for fact in facts]


def resumed_at(before: int, processes: Sequence[Forked], log: Path) -> int:
    """The step that a job says it goes on from, once more has been said than before."""
    since = time.monotonic()
    while len(told := starts(log)) <= before:
        if any(process.poll() for process in processes) or time.monotonic() > since + PATIENCE:
            raise RuntimeError(f"the job does not go on\n{log.read_text()[-3000:]}")
        time.sleep(0.02)
    return told[-1]


def soak(
    folder: Path,
    *,
    steps: int,
    ranks: int,
    life: tuple[int, int],
    interval: int,
    kinds: Sequence[str] = ("one", "stop", "all"),
    control: bool = False,
    seed: int = 0,
) -> Report:
    """Runs both jobs and compares them.

    Args:
        folder: of everything they write.
        steps: of each.
        ranks: of the uninterrupted one, and at most of the other.
        life: fewest and most steps between two kills.
        interval: steps between two checkpoints.
        kinds: of kills, in turns.
        control: whether to run it on one process as well, for what rounding alone does.
        seed: of what is drawn.
    """
    config = launch_jobs.write_config(folder)
    arguments = (config, "--training.steps", steps, "--checkpoint.interval", interval)
    memory = uninterrupted(ranks, arguments, folder / "whole", steps)
    worlds = range(1, ranks + 1)
    draw = random.Random(seed)
    report = interrupted(arguments, folder / "parts", steps, worlds, life, kinds, draw)
    report.memory = memory
    whole, parts = (launch_jobs.metrics(folder / name) for name in ("whole", "parts"))
    if [line["step"] for line in parts] != list(range(1, steps + 1)):
        raise RuntimeError("the interrupted run has not reported every step once")
    pairs = list(zip(whole, parts, strict=True))
    report.steps = len(pairs)
    report.difference = max(abs(a["loss"] - b["loss"]) for a, b in pairs)
    report.final = abs(whole[-1]["val_loss"] - parts[-1]["val_loss"])
    if control:
        uninterrupted(1, arguments, folder / "one", steps)
        one = launch_jobs.metrics(folder / "one")
        report.control = max(abs(a["loss"] - b["loss"]) for a, b in zip(whole, one, strict=True))
    return report


def main() -> None:
    """Soaks as the command line says, and prints the report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--life", type=int, nargs=2, default=(50, 200), help="steps between kills")
    parser.add_argument("--interval", type=int, default=25, help="steps between checkpoints")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, required=True, help="an empty folder")
    given = parser.parse_args()
    given.output.mkdir(parents=True, exist_ok=True)
    report = soak(
        given.output,
        steps=given.steps,
        ranks=given.ranks,
        life=tuple(given.life),
        interval=given.interval,
        control=True,
        seed=given.seed,
    )
    print(report.table())


if __name__ == "__main__":
    main()
