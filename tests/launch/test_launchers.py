"""The job under mpirun, and without what it and DeepSpeed's launcher need.

Both start it on two hosts in test_launch_hosts.py.
"""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from torch.distributed.run import get_args_parser

import launch_jobs
from conda_dist.launch.cluster import mpi
from conda_dist.launch.cluster.launcher import shutdown_timeout
from conda_dist.launch.job.checkpoint import complete_checkpoints, step_of
from launch_jobs import metrics
from launchers import JOB, MODULE, deepspeed_runner, mpich, openmpi
from processes import DEADLINE, endless, free_port, running, started, wait_for_step


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return launch_jobs.write_config(tmp_path_factory.mktemp("launchers"))


def start(*command: Any, cwd: Any = None, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs a command to its end, without what this process's own launcher may have set."""
    mine = {k: v for k, v in os.environ.items() if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    mine |= {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", **environment}
    words = list(map(str, command))
    return subprocess.run(
        words, capture_output=True, text=True, env=mine, timeout=200, check=False, cwd=cwd
    )


@pytest.mark.thorough
def test_mpirun_is_told_to_stop(config: Path, tmp_path: Path) -> None:
    """It passes SIGUSR1 on, and kills no rank for it.

    The engine is DeepSpeed's, which looks for its ranks itself.
    """
    mpi, run, said = openmpi(), tmp_path / "run", tmp_path / "said"
    zero = ("--engine", "deepspeed", "--deepspeed.stage", 3, "--checkpoint.interval", 0)
    command = mpi.command(2, *JOB, *endless(config, run), *zero)
    with running(command, said, DS_ACCELERATOR="cpu", **mpi.environment) as mpirun:
        wait_for_step(run, 3, mpirun)
        mpirun.send_signal(signal.SIGUSR1)
        mpirun.wait(DEADLINE)
    assert "stopped after step" in said.read_text()
    losses = [line["loss"] for line in metrics(run)]
    (saved,) = complete_checkpoints(run / "checkpoints")
    assert step_of(saved) == len(losses) >= 3
    whole = (*endless(config, tmp_path / "fsdp2"), "--training.steps", len(losses))
    launch_jobs.succeed(2, *whole, "--checkpoint.interval", 0)
    alone = [line["loss"] for line in metrics(tmp_path / "fsdp2")]
    assert losses == pytest.approx(alone, abs=1e-5)


@pytest.mark.thorough
def test_the_deepspeed_command_in_new_pythons(config: Path, tmp_path: Path) -> None:
    _, *words = deepspeed_runner("--num_gpus=1", "--master_port", free_port())
    brief = ("--training.steps", 2, "--schedule.warmup_steps", 1, "--engine", "deepspeed")
    job = (*words, config, "--output", tmp_path, *brief)
    with started(*job, DS_ACCELERATOR="cpu") as process:
        said, _ = process.communicate(timeout=DEADLINE)
    assert process.returncode == 0, said
    assert len(metrics(tmp_path)) == 2


def test_an_mpi_that_is_not_the_launcher_s(config: Path, tmp_path: Path) -> None:
    """It would be two jobs of one process each, writing into the same folder."""
    variables = {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1"}
    ended = start(*JOB, config, "--output", tmp_path, **variables, **mpich().environment)
    assert ended.returncode == 1
    words = "[rank 1] error: the launcher has started 2 processes, of which mpi4py sees 1"
    assert words in ended.stderr
    assert "another MPI, MPICH Version: 5." in ended.stderr
    assert "set MPI4PY_LIBMPI to the libmpi.so of this mpirun's" in ended.stderr


@pytest.mark.parametrize("interface", ["", "lo", "none0"])
def test_the_address_that_other_hosts_are_told(
    monkeypatch: pytest.MonkeyPatch, interface: str
) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", interface)
    assert mpi._own_address() == ("127.0.0.1" if interface == "lo" else socket.gethostname())


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of links to all that is installed except DeepSpeed and mpi4py."""
    folder = tmp_path_factory.mktemp("bare")
    for place in map(Path, sys.path):
        for entry in place.iterdir() if place.name == "site-packages" else ():
            name = entry.name.lower()
            if not name.startswith(("deepspeed", "mpi4py", "conda_dist")):
                (folder / entry.name).exists() or (folder / entry.name).symlink_to(entry)
    root = Path(__file__).parents[2]
    (folder / "conda_dist").mkdir()
    for entry in (root / "conda_dist").iterdir():
        (folder / "conda_dist" / entry.name).symlink_to(entry)
    for name in ("integrations", "launch"):
        (folder / "conda_dist" / name).symlink_to(root / name)
    return folder


@pytest.mark.parametrize(
    ("variables", "arguments", "code", "words"),
    [
        ({}, ("--engine", "deepspeed"), 2, "pip install deepspeed"),
        ({"PMI_SIZE": "2", "PMI_RANK": "1"}, (), 1, "pip install mpi4py"),
    ],
)
def test_what_is_not_installed_is_named(
    config: Path,
    tmp_path: Path,
    bare: Path,
    variables: dict[str, str],
    arguments: tuple[str, ...],
    code: int,
    words: str,
) -> None:
    job = (sys.executable, "-S", "-m", MODULE, config, "--output", tmp_path, *arguments)
    ended = start(*job, cwd=tmp_path, PYTHONPATH=str(bare), **variables)
    assert ended.returncode == code, ended.stderr
    assert words in ended.stderr


def test_torchrun_is_given_only_what_it_knows() -> None:
    known = "--shutdown-timeout" in get_args_parser()._option_string_actions
    assert shutdown_timeout(7) == ["--shutdown-timeout=7"] * known
