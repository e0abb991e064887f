"""Jobs over two hosts (network namespaces): the same curve, and what pulled cables do to them."""

import contextlib
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import launch_jobs
from conda_dist.launch.checkpoint import complete_checkpoints, step_of
from launch_jobs import curve, metrics, succeed
from nodes import Node, Relay, nodes
from processes import DEADLINE, ENVIRONMENT, endless, wait_for_step

PORT = 29_517
TIMEOUT_S = 15


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return launch_jobs.write_config(tmp_path_factory.mktemp("hosts"))


@contextlib.contextmanager
def job(
    hosts: list[Node], endpoint: str, said: Path, *arguments: Any
) -> Iterator[list[subprocess.Popen[str]]]:
    """The job under one torchrun on each host, 2 ranks each; their output goes to files."""
    said.mkdir()
    running = []
    try:
        for host in hosts:
            run = ("-m", "torch.distributed.run", f"--nnodes={len(hosts)}", "--nproc-per-node=2")
            first = host is hosts[0]
            where = (
                "--rdzv-backend=c10d",
                f"--rdzv-endpoint={f'{host.address}:{PORT}' if first else endpoint}",
                f"--rdzv-conf=is_host={int(first)}",
                f"--local-addr={host.address}",
            )
            module = ("-m", "conda_dist.launch.pretrain")
            running.append(
                subprocess.Popen(
                    host.command(sys.executable, *run, *where, *module, *arguments),
                    stdout=(said / host.name).open("w"),
                    stderr=subprocess.STDOUT,
                    text=True,
                    env={**ENVIRONMENT, **host.environment},
                    start_new_session=True,
                )
            )
        yield running
    finally:
        for host, process in zip(hosts, running, strict=False):
            subprocess.run(["kill", "-9", *host.processes()], capture_output=True, check=False)
            process.wait(DEADLINE)


def printed(said: Path) -> str:
    """What the torchruns of all hosts have printed."""
    return "\n".join(file.read_text() for file in sorted(said.iterdir()))


def test_two_hosts_have_the_curve_of_one(config: Path, tmp_path: Path) -> None:
    """Bit for bit, with a slow rendezvous and a cable that is out for ten seconds on the way."""
    words = ("--training.steps", 60, "--training.timeout_s", 60, "--checkpoint.interval", 0)
    arguments = (config, "--output", tmp_path / "hosts", *words)
    with nodes(2) as hosts:
        relay = Relay((hosts[0].address, PORT), delay_s=0.02)
        through = f"{hosts[0].gateway}:{relay.port}"
        with job(hosts, through, tmp_path / "said", *arguments) as running:
            wait_for_step(tmp_path / "hosts", 5, running[0])
            hosts[1].plug(False)
            time.sleep(10)
            reached = metrics(tmp_path / "hosts")[-1]["step"]
            hosts[1].plug(True)
            codes = [process.wait(DEADLINE) for process in running]
    told = printed(tmp_path / "said")
    assert codes == [0, 0], told
    assert 5 <= reached < 60
    assert relay.passed > 20
    for host in hosts:
        assert f"2 on {host.name}" in told
    assert "), cpu, gloo" in told
    succeed(4, config, "--output", tmp_path / "one", *words)
    assert curve(tmp_path / "hosts") == curve(tmp_path / "one")


def test_a_cable_that_stays_out_ends_the_job(config: Path, tmp_path: Path) -> None:
    """On both hosts, with an error, in the time that was set; nothing before it is lost."""
    output = tmp_path / "run"
    arguments = (*endless(config, output), "--training.timeout_s", TIMEOUT_S)
    with (
        nodes(2) as hosts,
        job(
            hosts,
            f"{hosts[0].address}:{PORT}",
            tmp_path / "said",
            *(*arguments, "--checkpoint.interval", 5),
        ) as running,
    ):
        wait_for_step(output, 8, running[0])
        hosts[1].plug(False)
        start = time.monotonic()
        code = running[0].wait(TIMEOUT_S + 60)
        # The other host's torchrun waits for the rendezvous some minutes more, without its ranks.
        while len(hosts[1].processes()) > 1:
            assert time.monotonic() - start < TIMEOUT_S + 60
            time.sleep(0.1)
        took = time.monotonic() - start
    assert code, printed(tmp_path / "said")
    saved = step_of(complete_checkpoints(output / "checkpoints")[-1])
    reached = metrics(output)[-1]["step"]
    assert 5 <= saved <= reached < saved + 10
    print(f"cable out: {took:.0f} s to stop, {reached - saved} steps to take again")
    steps = ("--training.steps", reached + 3)
    succeed(4, *endless(config, output), "--resume", *steps)
    succeed(4, *endless(config, tmp_path / "whole"), *steps)
    assert curve(output) == curve(tmp_path / "whole")
