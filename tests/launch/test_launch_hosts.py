"""Two hosts (network namespaces) under mpirun and under DeepSpeed's launcher with a hostfile."""

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import launch_jobs
from conda_dist.launch.job.checkpoint import complete_checkpoints, step_of
from launch_jobs import curve, metrics, succeed
from launchers import JOB, MPIS, deepspeed_over, openmpi
from nodes import Node, agent, nodes
from processes import DEADLINE, endless, running, wait_for_step

STRUCK, STEPS, INTERVAL = 6, 12, 4
"""The step at which mpirun is killed, the last one, and steps between checkpoints."""
BRIEF = 4
"""Steps of a job that ends by itself."""
ZERO = ("--engine", "deepspeed", "--deepspeed.stage", 3, "--checkpoint.interval", 0)
"""DeepSpeed's engine looks for the other ranks itself."""


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return launch_jobs.write_config(tmp_path_factory.mktemp("launched"))


def whole(config: Path, ranks: int, steps: int = STEPS) -> list[tuple[Any, ...]]:
    """The curve of the job on one host."""
    output = config.parent / f"whole-{ranks}"
    if not output.exists() or metrics(output)[-1]["step"] < steps:
        succeed(ranks, *endless(config, output), "--training.steps", steps, "--resume")
    return [line for line in curve(output) if line[0] <= steps]


@pytest.fixture(scope="module")
def two() -> Iterator[list[Node]]:
    with nodes(2) as made:
        yield made


@pytest.fixture
def hosts(two: list[Node]) -> Iterator[list[Node]]:
    """Two hosts on which nothing runs, nor afterwards."""
    yield two
    for host in two:
        subprocess.run(["kill", "-9", *host.processes()], capture_output=True, check=False)


@pytest.mark.parametrize("name", MPIS)
@pytest.mark.thorough
def test_mpirun_starts_ranks_on_two_hosts_and_dies(
    name: str, config: Path, hosts: list[Node], tmp_path: Path
) -> None:
    """With kill -9: none of its ranks is left; the rest of the curve is that of one host."""
    mpi, output, said = MPIS[name](), tmp_path / "run", tmp_path / "said"
    job = (*JOB, *endless(config, output), "--checkpoint.interval", INTERVAL)
    command = mpi.over(hosts, 1, agent(hosts, tmp_path), *job)
    there = {**hosts[0].environment, **mpi.environment}
    with running(hosts[0].command(*command), said, **there) as mpirun:
        wait_for_step(output, STRUCK, mpirun)
        begun = time.monotonic()
        os.kill(mpirun.pid, signal.SIGKILL)
        while any(host.processes() for host in hosts):
            assert time.monotonic() - begun < DEADLINE
            time.sleep(0.05)
        took = time.monotonic() - begun
    assert took < 20
    for host in hosts:
        assert f"1 on {host.name}" in said.read_text()
    reached, saved = metrics(output)[-1]["step"], complete_checkpoints(output / "checkpoints")
    lost = reached - step_of(saved[-1])
    print(f"{name}: {took:.1f} s to end, {lost} steps to take again")
    # Open MPI leaves its ranks alive, which save and end; MPICH kills them.
    assert lost <= (0 if name == "openmpi" else INTERVAL)
    ranks, steps = len(hosts), max(STEPS, reached + 1)  # a busy machine strikes late
    succeed(ranks, *endless(config, output), "--training.steps", steps, "--resume")
    assert curve(output) == whole(config, ranks, steps)


@pytest.mark.parametrize(("how", "engine"), [("no_ssh", ZERO), ("openmpi", ())])
@pytest.mark.thorough
def test_deepspeed_starts_the_ranks_of_a_hostfile(
    how: str, engine: tuple[Any, ...], config: Path, hosts: list[Node], tmp_path: Path
) -> None:
    job = (*endless(config, tmp_path / "run"), "--training.steps", BRIEF, *engine)
    mpi = openmpi()
    variables = {
        **hosts[0].environment,
        **mpi.environment,
        "PATH": f"{mpi.mpirun.parent}{os.pathsep}{os.environ['PATH']}",
    }
    commands = deepspeed_over(how, hosts, agent(hosts, tmp_path), tmp_path, *job)
    with contextlib.ExitStack() as stack:
        started = [
            stack.enter_context(running(command, tmp_path / host.name, host, **variables))
            for host, command in zip(hosts, commands, strict=False)
        ]
        codes = [process.wait(DEADLINE) for process in started]
    told = "\n".join((tmp_path / host.name).read_text() for host in hosts[: len(commands)])
    assert codes == [0] * len(commands), told
    for host in hosts:
        assert f"1 on {host.name}" in told
    alone = whole(config, len(hosts), BRIEF)
    assert len(alone) == BRIEF
    if engine:
        losses = [line["loss"] for line in metrics(tmp_path / "run")]
        assert losses == pytest.approx([loss for _, loss, *_ in alone], abs=1e-5)
    else:
        assert curve(tmp_path / "run") == alone
