"""Disks that are full and files that are damaged: more rows of faults.py's table."""

import re
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import launch_jobs
from conda_dist.launch.job.checkpoint import complete_checkpoints, step_of
from damage import Damage, delete, flip, truncate
from faults import STEPS, STRUCK, Outcome, Scene, recover, with_fault
from launch_jobs import metrics, succeed


def full_disk(scene: Scene) -> Outcome:
    """A disk with room for one checkpoint."""
    folder = scene.folder / "full" / "checkpoints"
    folder.mkdir(parents=True)
    (one,) = complete_checkpoints(scene.reference / "checkpoints")[-1:]
    size = sum(file.stat().st_size for file in one.iterdir())
    small = ("mount", "-t", "tmpfs", "-o", f"size={size * 3 // 2}", "tmpfs", folder)
    mounted = subprocess.run(small, capture_output=True, check=False).returncode == 0
    did = "ended on all ranks, naming the file system's error; the checkpoint before loads"
    try:
        # Who may not mount gets a limit on the size of files, whose error is another.
        how = "a tmpfs of 1.5 checkpoints" if mounted else "a limit on file sizes on both ranks"
        begun = time.perf_counter()
        results = with_fault(scene, "full", "none" if mounted else "full")
        took = time.perf_counter() - begun - metrics(scene.folder / "full")[-1]["train_s"]
        assert [result.code for result in results] == [1, 1], results
        outcome = Outcome(
            "the disk is full", how, did, "".join(result.err for result in results), took
        )
        if mounted:
            subprocess.run(["mount", "-o", "remount,size=64m", folder], check=True)
        return recover(scene, "full", outcome)
    finally:
        if mounted:
            subprocess.run(["umount", folder], check=True)


def full_metrics(scene: Scene) -> Outcome:
    """A disk that is full when a step's metrics are written, and has room for a checkpoint."""
    name, run = "full-metrics", scene.folder / "full-metrics"
    begun = time.perf_counter()
    results = with_fault(scene, name, "full metrics", rank=0)
    took = time.perf_counter() - begun - metrics(run)[-1]["train_s"]
    assert [result.code for result in results] == [1, 1], results
    said = "".join(result.err for result in results)
    did = "saved, and ended on all ranks; that step's line is missing, no step is"
    outcome = Outcome("the disk of the metrics is full", "/dev/full", did, said, took)
    succeed(2, *scene.job(name), "--training.steps", STEPS, "--resume")
    ours, theirs = metrics(run), metrics(scene.reference)[:STEPS]
    del theirs[STRUCK]
    assert [line["step"] for line in ours] == [line["step"] for line in theirs]
    outcome.difference = max(abs(a["loss"] - b["loss"]) for a, b in zip(ours, theirs, strict=True))
    return outcome


def damaged(scene: Scene, damage: Damage) -> Outcome:
    """A file of the newest checkpoint that is not what was written."""
    name = f"damaged-{damage.__name__}"
    run = scene.folder / name
    shutil.copytree(scene.reference, run)
    *_, before, newest = complete_checkpoints(run / "checkpoints")
    damage(newest / "__1_0.distcp")
    again = (*scene.job(name), "--training.steps", max(STEPS, step_of(newest)), "--resume")
    begun = time.perf_counter()
    results = launch_jobs.train(2, *again)
    took = time.perf_counter() - begun
    assert [result.code for result in results] == [1, 1], results
    did = "refused on all ranks, naming the file and the checkpoint to resume from instead"
    how = f"{damage.__name__}: a rank's file of the newest"
    outcome = Outcome("a damaged checkpoint", how, did, results[1].err, took)
    # What the message says to do is done.
    (advised,) = set(re.findall(r"--resume (\S+)", outcome.said))
    assert Path(advised) == before
    outcome = recover(scene, name, outcome, advised)
    outcome.lost = step_of(newest) - step_of(before)
    return outcome


ALL: tuple[Callable[[Scene], Outcome], ...] = (
    full_disk,
    full_metrics,
    lambda scene: damaged(scene, delete),
    lambda scene: damaged(scene, truncate),
    lambda scene: damaged(scene, flip),
)
