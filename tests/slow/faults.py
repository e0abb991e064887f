"""What strikes a pretraining job, and what is left of it. This prints the table:

    PYTHONPATH=tests/helpers python tests/slow/faults.py

Each fault is a function that strikes a job of two ranks, goes on with `--resume` where the job
ended, and compares the whole curve with that of a run that nothing happened to. The tests call the
same functions. There they resume on processes that are kept; the table starts new ones.
"""

import contextlib
import itertools
import os
import re
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.distributed import TCPStore

import injected
import launch_jobs
import ranks
from conda_dist.launch.cluster.launcher import shutdown_timeout
from conda_dist.launch.job.checkpoint import complete_checkpoints, step_of
from launch_jobs import Result, metrics, succeed
from processes import (
    DEADLINE,
    TORCHRUN,
    Forked,
    children,
    endless,
    forked,
    has_ended,
    rank_environments,
    rank_of,
    started,
    wait_for_step,
)

ROOT = Path(__file__).parents[2]
PRETRAIN = ("-m", "conda_dist.launch.pretrain")
STRUCK, STEPS, INTERVAL = 6, 12, 4
"""The step at which a job is struck, the one it goes on to, and steps between checkpoints."""
LONG = 20
"""The last step of a job that has to be on its way for some seconds, or whose errors add up."""
STALL_S = 5.0


@dataclass(frozen=True, slots=True)
class Scene:
    """Where faults happen."""

    config: Path
    folder: Path
    fresh: bool
    """Whether jobs are resumed in new processes, so that the time to recover means something."""

    @property
    def reference(self) -> Path:
        """The uninterrupted run."""
        return self.folder / "reference"

    def job(self, name: str) -> tuple[Any, ...]:
        """Arguments of a job that is to be struck."""
        return (*endless(self.config, self.folder / name), "--checkpoint.interval", INTERVAL)


@dataclass(slots=True)
class Outcome:
    """What a fault did."""

    fault: str
    injected: str
    did: str
    """What the job did, in words."""
    said: str
    """What it printed."""
    stop_s: float
    """From the fault to the end of the last process."""
    recover_s: float = 0.0
    """From starting again to having reported the step that had been reached."""
    lost: int = 0
    """Steps that were taken again."""
    difference: float = 0.0
    """The greatest difference of any step's loss from the uninterrupted run's."""


def set_up(folder: Path, *, fresh: bool) -> Scene:
    """Makes the config and the uninterrupted run."""
    scene = Scene(launch_jobs.write_config(folder), folder, fresh)
    succeed(2, *scene.job("reference"), "--training.steps", STEPS)
    return scene


def farthest(run: Path, reference: Path, steps: int = STEPS) -> float:
    """The greatest difference between two runs' losses; both must have all steps, once each."""
    ours, theirs = metrics(run), metrics(reference)[:steps]
    numbers = list(range(1, steps + 1))
    assert [line["step"] for line in ours] == [line["step"] for line in theirs] == numbers
    return max(abs(a["loss"] - b["loss"]) for a, b in zip(ours, theirs, strict=True))


def lengthened(scene: Scene, steps: int) -> int:
    """Has the uninterrupted run go on to a step, and says to which; a slow machine strikes late."""
    if metrics(scene.reference)[-1]["step"] < steps:
        succeed(2, *scene.job("reference"), "--training.steps", steps, "--resume")
    return steps


def recover(scene: Scene, name: str, outcome: Outcome, *extra: Any) -> Outcome:
    """Goes on with a job that has ended, and fills in the rest of what its fault did."""
    run = scene.folder / name
    reached = metrics(run)[-1]["step"]
    complete = complete_checkpoints(run / "checkpoints")
    outcome.lost = reached - (step_of(complete[-1]) if complete else 0)
    steps = lengthened(scene, max(STEPS, reached + 1))
    again = (*scene.job(name), "--training.steps", steps, "--resume", *extra)
    begun, since = time.perf_counter(), time.time()
    if scene.fresh:
        with started(*TORCHRUN, *PRETRAIN, *again) as torchrun:
            wait_for_step(run, reached, torchrun, since)
            outcome.recover_s = time.perf_counter() - begun
            assert torchrun.wait(DEADLINE) == 0
    else:
        succeed(2, *again)
        outcome.recover_s = time.perf_counter() - begun
    outcome.difference = farthest(run, scene.reference, steps)
    return outcome


@contextlib.contextmanager
def running(
    scene: Scene, name: str, *extra: Any, program: tuple[Any, ...] = PRETRAIN
) -> Iterator[list[Forked]]:
    """Two ranks that have reported the step at which they are struck; nobody else ends them.

    They meet as torchrun's do, at a store of neither.
    """
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    kept = {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
    kept["MASTER_PORT"] = str(store.port)
    with contextlib.ExitStack() as stack:
        job = (*program, *scene.job(name), *extra)
        told = [{**each, **kept} for each in rank_environments(2)]
        both = [stack.enter_context(forked(*job, **each)) for each in told]
        wait_for_step(scene.folder / name, STRUCK, both[0])
        yield both


def end(both: Sequence[Forked], begun: float) -> tuple[str, float]:
    """What ranks that have been struck printed, and the seconds that they took to end."""
    said = [rank.communicate(timeout=DEADLINE)[0] for rank in both]
    assert all(rank.returncode for rank in both)
    return "\n".join(said), time.perf_counter() - begun


@contextlib.contextmanager
def under_torchrun(
    scene: Scene, name: str, *extra: Any, options: Sequence[str] = ()
) -> Iterator[Forked]:
    """The same under torchrun, which starts its ranks anew."""
    launcher = (*TORCHRUN, "--monitor-interval", 0.1, *options)
    with forked(*launcher, *PRETRAIN, *scene.job(name), *extra) as torchrun:
        wait_for_step(scene.folder / name, STRUCK, torchrun)
        yield torchrun


def rank_killed_twice(scene: Scene) -> Outcome:
    """kill -9 of a rank: torchrun ends the others and starts all again, once, and then ends."""
    run = scene.folder / "rank-killed"
    with under_torchrun(scene, "rank-killed", "--resume", options=["--max-restarts=1"]) as torchrun:
        first, begun = children(torchrun.pid), time.perf_counter()
        os.kill(rank_of(torchrun, 1), signal.SIGKILL)
        while not all(map(has_ended, first)):
            time.sleep(0.01)
        stopped = time.perf_counter() - begun
        reached, since = metrics(run)[-1]["step"], time.time()
        wait_for_step(run, reached, torchrun, since)
        again = time.perf_counter() - begun
        os.kill(rank_of(torchrun, 1), signal.SIGKILL)
        said, _ = end([torchrun], begun)
    resumed = int(re.findall(r"start +step (\d+),", said)[-1])
    assert reached - resumed <= INTERVAL
    how, did = (
        "kill -9 of rank 1, twice, with one restart",
        "torchrun started all ranks again, once",
    )
    outcome = Outcome("a rank dies", how, did, said, stopped)
    outcome = recover(scene, "rank-killed", outcome)
    outcome.recover_s = again
    return outcome


def launcher_killed(scene: Scene, meanwhile: Callable[[], None] = lambda: None) -> Outcome:
    """kill -9 of torchrun; before that, `meanwhile`."""
    with under_torchrun(scene, "launcher-killed") as torchrun:
        # The job stands still meanwhile, or there is no saying how far it would get.
        for pid in children(torchrun.pid):
            os.kill(pid, signal.SIGSTOP)
        meanwhile()
        for pid in children(torchrun.pid):
            os.kill(pid, signal.SIGCONT)
        pids, begun = children(torchrun.pid), time.perf_counter()
        torchrun.kill()
        while not all(map(has_ended, pids)):
            assert time.perf_counter() - begun < DEADLINE
            time.sleep(0.01)
        said, took = end([torchrun], begun)
    did = "the ranks noticed, saved a checkpoint and ended"
    outcome = Outcome("torchrun dies", "kill -9 of it", did, said, took)
    return recover(scene, "launcher-killed", outcome)


def all_killed_while_saving(scene: Scene) -> Outcome:
    """kill -9 of everything at a moment when a checkpoint is being written."""
    folder = scene.folder / "all-killed" / "checkpoints"
    with running(scene, "all-killed", "--checkpoint.interval", 1) as both:
        deadline = time.monotonic() + DEADLINE
        while not list(folder.glob(".writing-*/__0_0.distcp")):
            assert time.monotonic() < deadline
        begun = time.perf_counter()
        for rank in both:
            rank.kill()
        said, took = end(both, begun)
    did = "ended; the checkpoint before loads, the half one is cleared"
    outcome = Outcome("all die in the midst of a save", "kill -9 of all ranks", did, said, took)
    outcome = recover(scene, "all-killed", outcome)
    assert not list(folder.glob(".writing-*"))
    return outcome


def all_killed(scene: Scene) -> Outcome:
    """kill -9 of everything between two checkpoints."""
    with running(scene, "all-at-once") as both:
        begun = time.perf_counter()
        for rank in both:
            rank.kill()
        said, took = end(both, begun)
    outcome = Outcome("all die", "kill -9 of all ranks", "ended", said, took)
    return recover(scene, "all-at-once", outcome)


def preempted(scene: Scene, number: signal.Signals = signal.SIGTERM) -> Outcome:
    """A signal to torchrun, as from a scheduler; SIGUSR1 needs the options of launch/train.sh."""
    name, script = f"preempted-{number.name}", Path(ROOT, "launch", "train.sh").read_text()
    (signals,) = [word for word in script.split() if word.startswith("--signals-to-handle=")]
    options = [signals, *shutdown_timeout(300)]
    if number != signal.SIGUSR1:
        options = []
    with under_torchrun(scene, name, "--checkpoint.interval", 0, options=options) as torchrun:
        begun = time.perf_counter()
        torchrun.send_signal(number)
        said, took = end([torchrun], begun)
    did = "saved a checkpoint after the step at hand and ended"
    outcome = Outcome("preemption", f"{number.name} to torchrun", did, said, took)
    return recover(scene, name, outcome)


def stopped_rank(scene: Scene, rank: int = 0) -> Outcome:
    """A rank that does not run any more."""
    limit = ("--training.stall_timeout_s", STALL_S)
    name = f"stopped-{rank}"
    with running(scene, name, *limit) as both:
        begun = time.perf_counter()
        both[rank].send_signal(signal.SIGSTOP)
        said, took = end(both, begun)
    did = "the others name it with host, pid, step and phase, kill it and end"
    outcome = Outcome(
        f"a rank is frozen ({STALL_S:g} s allowed)", f"SIGSTOP of rank {rank}", did, said, took
    )
    return recover(scene, name, outcome)


def stuck_rank(scene: Scene, fault: str = "asleep") -> Outcome:
    """A rank that waits for its data for ever; "frozen": and keeps its threads from running."""
    limit = ("--training.stall_timeout_s", STALL_S)
    driver = (injected.__file__, fault, 1, STRUCK + 1)
    with running(scene, fault, *limit, program=driver) as both:
        said, took = end(both, time.perf_counter())
    how = "rank 1 never gets its data" + (", in C with the GIL" if fault == "frozen" else "")
    did = "all end; it is named with host, pid, step and phase, and prints its stack"
    outcome = Outcome(f"a rank is stuck ({STALL_S:g} s allowed)", how, did, said, took)
    return recover(scene, fault, outcome)


def with_fault(scene: Scene, name: str, fault: str, *extra: Any, rank: int = 1) -> list[Result]:
    """A job on kept processes, of which a rank goes wrong in the step after STRUCK."""
    words = map(str, (*scene.job(name), "--training.steps", STEPS, *extra))
    results: list[Result] = ranks.run(2, injected.job, fault, rank, STRUCK + 1, *words)
    return results


def _ended(
    scene: Scene, name: str, fault: str, *extra: Any, words: tuple[str, str, str], rank: int = 1
) -> Outcome:
    """The same, of a job that must end in error on all ranks."""
    begun = time.perf_counter()
    results = with_fault(scene, name, fault, *extra, rank=rank)
    took = time.perf_counter() - begun - metrics(scene.folder / name)[-1]["train_s"]
    assert [result.code for result in results] == [1, 1], results
    said = "\n".join(result.err for result in results)
    return recover(scene, name, Outcome(*words, said, took), *extra)


def nan_gradient(scene: Scene, weight: bool = False) -> Outcome:
    """A rank whose gradient is NaN from here on: of a block's output, or of one weight alone.

    The second one may skip no step.
    """
    if weight:
        did = "ended before the update, naming step and weight; nothing saved after"
        words = ("a NaN gradient, skip_limit 0", "in a weight of rank 1", did)
        return _ended(scene, "nan-weight", "nan weight", "--training.skip_limit", 0, words=words)
    did = "skipped three steps on both ranks, then ended, naming step and rank"
    return _ended(scene, "nan", "nan", words=("NaN gradients", "in a block of rank 1", did))


def bad_steps(scene: Scene) -> Outcome:
    """A rank whose gradient is NaN in one step, and huge in another."""
    extra = ("--training.skip_factor", 20, "--training.skip_window", STRUCK - 1)
    results = with_fault(scene, "bad-steps", "bad steps", *extra)
    assert [result.code for result in results] == [0, 0], results
    did = "skipped the two steps on both ranks, named step and rank, and went on"
    injected = "NaN in a step of rank 1, 1e4 times too large in another"
    outcome = Outcome("two bad gradients", injected, did, results[0].out, 0.0)
    outcome.difference = farthest(scene.folder / "bad-steps", scene.reference)
    return outcome


def data_unread(scene: Scene) -> Outcome:
    """A rank that cannot read its data any more."""
    did = "saved a checkpoint and ended on all ranks, naming step, rank and error"
    words = ("data cannot be read", "a file on rank 1 cannot be read any more", did)
    return _ended(scene, "unread", "unread", "--checkpoint.interval", 0, words=words)


def decomposition_raises(scene: Scene, delay: int) -> Outcome:
    """A rank whose decomposition raises what no other attempt would cure."""
    extra = ("--optimizer.refresh_delay", delay)
    own = Scene(scene.config, scene.folder / f"delay{delay}", scene.fresh)
    steps = ("--training.steps", STEPS)
    if delay:  # which is another trajectory
        succeed(2, *own.job("reference"), *steps, *extra)
    elif not own.reference.exists():
        shutil.copytree(scene.reference, own.reference)
    words = (
        f"an SVD raises, refresh_delay {delay}",
        "MemoryError on rank 1",
        "ended on all ranks, naming rank, matrix and error",
    )
    return _ended(own, "svd", "no memory", *extra, words=words)


def decomposition_fails_twice(scene: Scene) -> Outcome:
    """A rank whose decompositions do not converge in two steps."""
    results = with_fault(scene, "no-svd", "no svd")
    assert [result.code for result in results] == [0, 0], results
    did = "went on with the old basis, warned, and refreshed it later"
    outcome = Outcome("an SVD does not converge", "twice on rank 1", did, results[0].err, 0.0, 0.0)
    outcome.difference = farthest(scene.folder / "no-svd", scene.reference)
    return outcome


def elastic(scene: Scene, *sizes: int) -> Outcome:
    """A job that goes on with other numbers of ranks, against one on the first number."""
    whole, moving = scene.folder / "whole", scene.folder / "elastic"
    succeed(sizes[0], *scene.job("whole"), "--training.steps", LONG)
    for part, size in enumerate(sizes, 1):
        steps = ("--training.steps", LONG * part // len(sizes), "--resume")
        said = succeed(size, *scene.job("elastic"), *steps)
    how = f"stopped and resumed on {' -> '.join(map(str, sizes))} ranks"
    did = "took the same data in the same order"
    outcome = Outcome("the number of ranks changes", how, did, said, 0.0)
    outcome.difference = farthest(moving, whole, LONG)
    return outcome


ALL: tuple[Callable[[Scene], Outcome], ...] = (
    rank_killed_twice,
    launcher_killed,
    all_killed,
    all_killed_while_saving,
    preempted,
    lambda scene: preempted(scene, signal.SIGINT),
    lambda scene: preempted(scene, signal.SIGUSR1),
    stopped_rank,
    lambda scene: stopped_rank(scene, 1),
    stuck_rank,
    lambda scene: stuck_rank(scene, "frozen"),
    nan_gradient,
    lambda scene: nan_gradient(scene, weight=True),
    bad_steps,
    data_unread,
    lambda scene: decomposition_raises(scene, 0),
    lambda scene: decomposition_raises(scene, 1),
    decomposition_fails_twice,
    lambda scene: elastic(scene, 4, 2, 3),
)

_HEAD = (
    "fault",
    "injected",
    "what the job did",
    "s to stop",
    "s to recover",
    "steps lost",
    "largest difference of a loss",
)


def main() -> None:
    """Prints the table, row by row; the last ones, of two hosts, need root and iproute2."""
    import fault_files
    import fault_hosts
    import fault_links

    try:
        with tempfile.TemporaryDirectory() as folder:
            scene = set_up(Path(folder), fresh=True)
            print("| " + " | ".join(_HEAD) + " |\n" + "|---" * len(_HEAD) + "|", flush=True)
            alone = (*ALL, *fault_files.ALL, *fault_links.ALL)
            rows = itertools.chain(
                (strike(scene) for strike in alone),
                itertools.chain.from_iterable(strike(scene) for strike in fault_hosts.ALL),
            )
            for row in rows:
                times = [f"{s:.1f}" if s else "-" for s in (row.stop_s, row.recover_s)]
                cells = (
                    row.fault,
                    row.injected,
                    row.did,
                    *times,
                    row.lost,
                    f"{row.difference:.1g}",
                )
                print("| " + " | ".join(map(str, cells)) + " |", flush=True)
    finally:
        ranks.close()


if __name__ == "__main__":
    main()
