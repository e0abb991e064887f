"""Processes of the job: signals, ranks that disagree, readers that are gone, and locks."""

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import launch_jobs
import ranks
from conda_dist.launch.cluster.lock import LOCK, locked
from conda_dist.launch.cluster.process_group import World
from conda_dist.launch.job.checkpoint import complete_checkpoints, step_of
from conda_dist.launch.job.console import Display
from conda_dist.launch.job.files import EXIT_STOPPED, STOP_NOTE
from launch_jobs import metrics
from processes import (
    DEADLINE,
    endless,
    forked,
    rank_environments,
    wait_for_step,
)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return launch_jobs.write_config(tmp_path_factory.mktemp("processes"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGUSR1])
def test_one_process_stops_on_a_signal(config: Path, tmp_path: Path, number: int) -> None:
    note, job = tmp_path / "note", ("-m", "conda_dist.launch.pretrain", *endless(config, tmp_path))
    with forked(*job, **{STOP_NOTE: str(note)}) as process:
        wait_for_step(tmp_path, 3, process)
        assert not note.exists()
        process.send_signal(number)
        said, _ = process.communicate(timeout=DEADLINE)
    assert process.returncode == EXIT_STOPPED
    assert "continue with --resume" in said
    assert "Traceback" not in said
    assert note.exists()
    reached = metrics(tmp_path)[-1]["step"]
    assert step_of(complete_checkpoints(tmp_path / "checkpoints")[-1]) == reached


@pytest.mark.thorough
def test_a_comparison_passes_the_stop_on(config: Path, tmp_path: Path) -> None:
    job = ("-m", "conda_dist.launch.compare", *endless(config, tmp_path))
    run = tmp_path / "runs" / "adamw-matrices0.01-rest0.01-seed0-steps100000"
    with forked(*job, "--optimizers", "adamw,muon", "--jobs", 1) as comparison:
        wait_for_step(run, 3, comparison)
        comparison.send_signal(signal.SIGTERM)
        said, _ = comparison.communicate(timeout=DEADLINE)
    assert comparison.returncode == EXIT_STOPPED
    assert "stopped; the same command continues" in said
    assert step_of(complete_checkpoints(run / "checkpoints")[-1]) == metrics(run)[-1]["step"]
    assert not [*tmp_path.glob("runs/muon*")]


def ranks_of_their_own(
    config: Path,
    output: Path,
    *extra: tuple[Any, ...],
    environments: Sequence[dict[str, str]] = ({}, {}),
) -> list[str]:
    """Starts one process per tuple of extra arguments, as a cluster's launcher would."""
    with contextlib.ExitStack() as stack:
        processes = [
            stack.enter_context(
                forked(
                    *("-m", "conda_dist.launch.pretrain", config, "--output", output, *arguments),
                    **told,
                    **environment,
                )
            )
            for told, arguments, environment in zip(
                rank_environments(len(extra)), extra, environments, strict=True
            )
        ]
        said = [process.communicate(timeout=DEADLINE)[0] for process in processes]
        assert all(process.returncode == 1 for process in processes), said
    return said


def test_ranks_with_different_settings_are_refused(config: Path, tmp_path: Path) -> None:
    said = ranks_of_their_own(
        config,
        tmp_path,
        ("--training.steps", 5),
        ("--training.steps", 6, "--optimizer.scale", 0.5),
    )
    for text in said:
        assert "training.steps: 5 on rank [0]; 6 on rank [1]" in text
        assert "optimizer.conda.scale: 0.25 on rank [0]; 0.5 on rank [1]" in text
        assert "model.hidden_size" not in text


def test_ranks_with_different_versions_are_refused(config: Path, tmp_path: Path) -> None:
    """A host whose environment was not brought up to date."""
    other = tmp_path / "transformers-0.1.dist-info"
    other.mkdir()
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: transformers\nVersion: 0.1\n")
    stale = {"PYTHONPATH": str(tmp_path)}
    for text in ranks_of_their_own(config, tmp_path / "run", (), (), environments=({}, stale)):
        assert "transformers: " in text
        assert "'0.1' on rank [1]" in text


@pytest.mark.parametrize("terminal", [False, True])
def test_a_reader_that_is_gone_stops_nothing(
    monkeypatch: pytest.MonkeyPatch, terminal: bool
) -> None:
    """A closed pipe, as of a killed launcher, or the closed terminal that Open MPI gives rank 0."""
    reader, writer = os.openpty() if terminal else os.pipe()
    with os.fdopen(writer, "w") as out:
        monkeypatch.setattr(sys, "stdout", out)
        monkeypatch.setenv("TERM", "dumb")
        display = Display(10, 0, 1)
        display.note("heard")
        os.close(reader)
        display.note("not heard")
        display.note("nor this")
        out.write("nor what others print")


HOLDER = """
import fcntl, sys, time
file = open(sys.argv[1], "w")
fcntl.flock(file, fcntl.LOCK_EX)
print("held", flush=True)
time.sleep(float(sys.argv[2]))
"""


@pytest.mark.parametrize("held_s", [1, 100])
def test_a_lock_is_waited_for_a_little(held_s: int, tmp_path: Path) -> None:
    """A killed job may hold it for a moment more; another job's is refused."""
    words = [sys.executable, "-c", HOLDER, str(tmp_path / LOCK), str(held_s)]
    ranks.run(1, _lock, tmp_path)  # so that there is a process
    with subprocess.Popen(words, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        try:
            if held_s == 1:
                ranks.run(1, _lock, tmp_path)
            else:
                with pytest.raises(ranks.RankError, match="another job writes"):
                    ranks.run(1, _lock, tmp_path)
        finally:
            holder.kill()


def _lock(folder: Path) -> None:
    group = dist.group.WORLD
    assert group is not None
    with locked(folder, World(0, 1, 0, torch.device("cpu"), group, group)):
        pass


ORPHAN = """
("$@" & echo $! > "$0")
rank=$(cat "$0")
while [ -e /proc/$rank ] && ! grep -q "^State:.*Z" /proc/$rank/status; do sleep 0.1; done
"""
"""A rank whose launcher is gone at once, below what is nobody's launcher."""


def test_a_rank_whose_torchrun_died_while_it_imported_ends(tmp_path: Path) -> None:
    """It would wait for the others for half an hour, or train with those of other hosts."""
    (environment, _) = rank_environments(2)
    config = launch_jobs.write_config(tmp_path)
    job = [sys.executable, "-m", "conda_dist.launch.pretrain", str(config)]
    apart = ["unshare", "--pid", "--fork", "--mount-proc", "sh", "-c", ORPHAN]
    ended = subprocess.run(
        [*apart, str(tmp_path / "pid"), *job, "--output", str(tmp_path / "run")],
        env={**os.environ, **environment, "TORCHELASTIC_RUN_ID": "gone"},
        capture_output=True,
        text=True,
        timeout=DEADLINE,
    )
    assert ended.returncode == 0
    assert "rror" not in ended.stderr, ended.stderr  # it was ended, it did not fail
    assert not (tmp_path / "run").exists()
