"""The job under its real launchers: torchrun, signals, kills, and ranks that disagree."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import launch_jobs
from conda_dist.launch.checkpoint import complete_checkpoints, step_of
from conda_dist.launch.pretrain import EXIT_STOPPED
from launch_jobs import curve, metrics, succeed

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
DEADLINE = 120.0


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return launch_jobs.write_config(tmp_path_factory.mktemp("processes"))


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
        process.communicate()


def children(parent: int) -> list[int]:
    """Processes started by a process, which torchrun puts into sessions of their own."""
    listed = subprocess.run(
        ["ps", "-o", "pid=", "--ppid", str(parent)], capture_output=True, text=True, check=False
    )
    return [int(pid) for pid in listed.stdout.split()]


def wait_for_step(run: Path, step: int, process: subprocess.Popen[str]) -> None:
    """Waits until a run has reported a step."""
    deadline = time.monotonic() + DEADLINE
    file = run / "metrics.jsonl"
    while not file.exists() or f'"step": {step},' not in file.read_text():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.01)


def endless(config: Path, output: Path) -> tuple[Any, ...]:
    """A job that no test waits for the end of; its learning rate does not depend on that end."""
    steady = ("--schedule.name", "constant", "--schedule.warmup_steps", 2)
    return (config, "--output", output, "--training.steps", 100_000, *steady)


def test_torchrun_stopped_and_continued_is_bit_identical(config: Path, tmp_path: Path) -> None:
    job = ("-m", "conda_dist.launch.pretrain", *endless(config, tmp_path / "parts"))
    interval = ("--checkpoint.interval", 0)
    with started(*TORCHRUN, *job, *interval) as torchrun:
        wait_for_step(tmp_path / "parts", 5, torchrun)
        torchrun.send_signal(signal.SIGTERM)
        said, _ = torchrun.communicate(timeout=DEADLINE)
    assert torchrun.returncode != 0
    assert "stopped after step" in said
    (saved,) = complete_checkpoints(tmp_path / "parts" / "checkpoints")
    stop = step_of(saved)
    assert stop >= 5
    assert metrics(tmp_path / "parts")[-1]["step"] == stop
    steps = ("--training.steps", stop + 5)
    succeed(2, *endless(config, tmp_path / "parts"), "--resume", *steps)
    succeed(2, *endless(config, tmp_path / "whole"), *steps)
    assert curve(tmp_path / "parts") == curve(tmp_path / "whole")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGUSR1])
def test_one_process_stops_on_a_signal(config: Path, tmp_path: Path, number: int) -> None:
    with started("-m", "conda_dist.launch.pretrain", *endless(config, tmp_path)) as process:
        wait_for_step(tmp_path, 3, process)
        process.send_signal(number)
        said, _ = process.communicate(timeout=DEADLINE)
    assert process.returncode == EXIT_STOPPED
    assert "continue with --resume" in said
    assert "Traceback" not in said
    reached = metrics(tmp_path)[-1]["step"]
    assert step_of(complete_checkpoints(tmp_path / "checkpoints")[-1]) == reached


def test_torchrun_passes_on_what_slurm_sends(config: Path, tmp_path: Path) -> None:
    """With the options that launch/train.sh gives it: by itself it would die of SIGUSR1 alone."""
    script = (Path(__file__).parents[1] / "launch" / "train.sh").read_text()
    options = [word for word in script.split() if word.startswith(("--signals", "--shutdown"))]
    assert len(options) == 2
    job = ("-m", "conda_dist.launch.pretrain", *endless(config, tmp_path))
    with started(*TORCHRUN, *options, *job, "--checkpoint.interval", 0) as torchrun:
        wait_for_step(tmp_path, 3, torchrun)
        torchrun.send_signal(signal.SIGUSR1)
        said, _ = torchrun.communicate(timeout=DEADLINE)
    assert "continue with --resume" in said
    assert len(complete_checkpoints(tmp_path / "checkpoints")) == 1


def test_killed_while_saving(config: Path, tmp_path: Path) -> None:
    """A job that saves at every step is killed at a moment when it is writing."""
    job = ("-m", "conda_dist.launch.pretrain", *endless(config, tmp_path))
    with started(*TORCHRUN, *job, "--checkpoint.interval", 1) as torchrun:
        wait_for_step(tmp_path, 3, torchrun)
        deadline = time.monotonic() + DEADLINE
        folder = tmp_path / "checkpoints"
        while not list(folder.glob(".writing-*/__0_0.distcp")):
            assert time.monotonic() < deadline
        for pid in (torchrun.pid, *children(torchrun.pid)):
            os.kill(pid, signal.SIGKILL)
        torchrun.wait(DEADLINE)
    survivors = [step_of(path) for path in complete_checkpoints(folder)]
    assert survivors
    last = survivors[-1]
    succeed(2, *endless(config, tmp_path), "--resume", "--training.steps", last + 2)
    assert not list(folder.glob(".writing-*"))
    assert [line["step"] for line in metrics(tmp_path)] == list(range(1, last + 3))


def test_a_comparison_passes_the_stop_on(config: Path, tmp_path: Path) -> None:
    job = ("-m", "conda_dist.launch.compare", *endless(config, tmp_path))
    run = tmp_path / "adamw-lr0.01"
    with started(*job, "--optimizers", "adamw,muon", "--nproc", 1) as comparison:
        wait_for_step(run, 3, comparison)
        comparison.send_signal(signal.SIGTERM)
        said, _ = comparison.communicate(timeout=DEADLINE)
    assert comparison.returncode == EXIT_STOPPED
    assert "stopped; the same command continues" in said
    assert step_of(complete_checkpoints(run / "checkpoints")[-1]) == metrics(run)[-1]["step"]
    assert not (tmp_path / "muon-lr0.01").exists()


def ranks_of_their_own(config: Path, output: Path, *extra: tuple[Any, ...]) -> list[str]:
    """Starts one process per tuple of extra arguments, as a cluster's launcher would."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    group = {"WORLD_SIZE": str(len(extra)), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    with contextlib.ExitStack() as stack:
        processes = [
            stack.enter_context(
                started(
                    *("-m", "conda_dist.launch.pretrain", config, "--output", output, *arguments),
                    RANK=str(rank),
                    LOCAL_RANK=str(rank),
                    **group,
                )
            )
            for rank, arguments in enumerate(extra)
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
