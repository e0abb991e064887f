"""Jobs over two hosts (network namespaces): the same curve, pulled cables, a host that dies."""

import contextlib
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeAlias

import pytest

import launch_jobs
from conda_dist.launch.checkpoint import complete_checkpoints, step_of
from faults import farthest
from launch_jobs import curve, metrics, succeed
from nodes import Node, Relay, nodes
from processes import DEADLINE, ENVIRONMENT, endless, wait_for_step

Process: TypeAlias = subprocess.Popen[str]
PORT = 29_517
TIMEOUT_S = 15


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return launch_jobs.write_config(tmp_path_factory.mktemp("hosts"))


def agent(host: Node, hosts: list[Node], endpoint: str, options: Any, said: Path) -> Process:
    """A torchrun on a host, one of those that meet at the first, with 2 ranks; it prints there."""
    run = ("-m", "torch.distributed.run", "--nproc-per-node=2", "--monitor-interval=0.1")
    first = host is hosts[0]
    where = (
        "--rdzv-backend=c10d",
        f"--rdzv-endpoint={f'{host.address}:{PORT}' if first else endpoint}",
        f"--rdzv-conf=is_host={int(first)},last_call_timeout=5",
        f"--local-addr={host.address}",
    )
    said.mkdir(exist_ok=True)
    return subprocess.Popen(
        host.command(sys.executable, *run, *where, *options),
        stdout=(said / host.name).open("a"),
        stderr=subprocess.STDOUT,
        text=True,
        env={**ENVIRONMENT, **host.environment, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"},
        start_new_session=True,
    )


@contextlib.contextmanager
def job(
    hosts: list[Node], endpoint: str, said: Path, *arguments: Any, nodes: str = "2"
) -> Iterator[list[Process]]:
    """The job under one torchrun on each host, 2 ranks each; all are gone at the end."""
    options = (f"--nnodes={nodes}", *arguments)
    running = [agent(host, hosts, endpoint, options, said) for host in hosts]
    try:
        yield running
    finally:
        for host in hosts:
            kill(host)
        for process in running:
            process.wait(DEADLINE)


def kill(host: Node) -> None:
    """All of a host's processes at once, as when a machine dies."""
    subprocess.run(["kill", "-9", *host.processes()], capture_output=True, check=False)


def printed(said: Path) -> str:
    """What the torchruns of all hosts have printed."""
    return "\n".join(file.read_text() for file in sorted(said.iterdir()))


def test_two_hosts_have_the_curve_of_one(config: Path, tmp_path: Path) -> None:
    """Bit for bit, with a slow rendezvous and a cable that is out for ten seconds on the way.

    When it stays out the job ends, on both hosts, with an error, in the time that was set; nothing
    before is lost.
    """
    output, said = tmp_path / "run", tmp_path / "said"
    limits = ("--training.timeout_s", TIMEOUT_S, "--checkpoint.interval", 5)
    arguments = ("-m", "conda_dist.launch.pretrain", *endless(config, output), *limits)
    with nodes(2) as hosts:
        relay = Relay((hosts[0].address, PORT), delay_s=0.02)
        through = f"{hosts[0].gateway}:{relay.port}"
        with job(hosts, through, said, *arguments) as running:
            wait_for_step(output, 8, running[0])
            hosts[1].plug(False)
            time.sleep(10)
            reached = metrics(output)[-1]["step"]
            hosts[1].plug(True)
            wait_for_step(output, reached + 8, running[0])
            hosts[1].plug(False)
            start = time.monotonic()
            code = running[0].wait(TIMEOUT_S + 60)
            # The other host's torchrun waits for the rendezvous some minutes more, without ranks.
            while len(hosts[1].processes()) > 1:
                assert time.monotonic() - start < TIMEOUT_S + 60
                time.sleep(0.1)
            took = time.monotonic() - start
        told = printed(said)
    assert code, told
    assert relay.passed > 20
    assert "), cpu, gloo" in told
    for host in hosts:
        assert f"2 on {host.name}" in told
    saved = step_of(complete_checkpoints(output / "checkpoints")[-1])
    reached = metrics(output)[-1]["step"]
    assert 15 <= saved <= reached < saved + 10
    print(f"cable out: {took:.0f} s to stop, {reached - saved} steps to take again")
    steps = ("--training.steps", reached + 3)
    succeed(4, *endless(config, tmp_path / "whole"), *steps)
    assert curve(output) == curve(tmp_path / "whole")[:reached]
    succeed(4, *endless(config, output), "--resume", *steps)
    assert curve(output) == curve(tmp_path / "whole")


def test_a_host_dies_and_another_comes(config: Path, tmp_path: Path) -> None:
    """--nnodes=1:2: the rest goes on with fewer ranks, and then with more, to the same losses."""
    output, said = tmp_path / "run", tmp_path / "said"
    arguments = (
        *("--max-restarts=3", "-m", "conda_dist.launch.pretrain"),
        *(*endless(config, output), "--checkpoint.interval", 5, "--resume"),
    )
    with nodes(2) as hosts:
        endpoint = f"{hosts[0].address}:{PORT}"
        with job(hosts, endpoint, said, *arguments, nodes="1:2") as running:
            wait_for_step(output, 8, running[0])
            kill(hosts[1])
            began, reached = time.monotonic(), metrics(output)[-1]["step"]
            running[1].wait(DEADLINE)
            wait_for_step(output, reached + 8, running[0], time.time())
            fewer = time.monotonic() - began
            began = time.monotonic()
            running[1] = agent(hosts[1], hosts, endpoint, ("--nnodes=1:2", *arguments), said)
            while "4 (2 on" not in (told := printed(said)).rpartition("2 (2 on")[2]:
                assert time.monotonic() - began < DEADLINE, told
                time.sleep(0.1)
            more = time.monotonic() - began
            reached = metrics(output)[-1]["step"]
            wait_for_step(output, reached + 8, running[0], time.time())
            running[0].send_signal(signal.SIGTERM)
            running[0].wait(DEADLINE)
    starts = re.findall(r"^ranks +(\d) .*|^start +step (\d+)", printed(said), re.MULTILINE)
    print(f"a host died: {fewer:.0f} s, came again: {more:.0f} s; {starts}")
    steps = metrics(output)[-1]["step"]
    succeed(4, *endless(config, tmp_path / "whole"), "--training.steps", steps)
    assert farthest(output, tmp_path / "whole", steps) < 1e-3
