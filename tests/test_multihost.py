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
TIMEOUT_S = 25


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return launch_jobs.write_config(tmp_path_factory.mktemp("hosts"))


def agent(host: Node, hosts: list[Node], endpoint: str, options: Any, said: Path) -> Process:
    """A torchrun on a host, one of those that meet at the first; it prints there."""
    run = ("-m", "torch.distributed.run", "--monitor-interval=0.1")
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
def job(hosts: list[Node], endpoint: str, said: Path, *arguments: Any) -> Iterator[list[Process]]:
    """The job under one torchrun on each host; all are gone at the end."""
    running = [agent(host, hosts, endpoint, arguments, said) for host in hosts]
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
    arguments = (
        *("--nnodes=2", "--nproc-per-node=2", "-m", "conda_dist.launch.pretrain"),
        *(*endless(config, output), *limits),
    )
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
        *("--nnodes=1:2", "--nproc-per-node=1", "--max-restarts=3"),
        *("-m", "conda_dist.launch.pretrain"),
        *(*endless(config, output), "--checkpoint.interval", 5, "--resume"),
    )
    with nodes(2) as hosts:
        endpoint = f"{hosts[0].address}:{PORT}"
        with job(hosts, endpoint, said, *arguments) as running:
            wait_for_step(output, 8, running[0])
            kill(hosts[1])
            began, first = time.monotonic(), metrics(output)[-1]["step"]
            running[1].wait(DEADLINE)
            wait_for_step(output, first + 8, running[0], time.time())
            fewer = time.monotonic() - began
            began = time.monotonic()
            running[1] = agent(hosts[1], hosts, endpoint, arguments, said)
            while "2 (1 on" not in (told := printed(said)).rpartition("1 (1 on")[2]:
                assert time.monotonic() - began < DEADLINE, told
                time.sleep(0.1)
            more, second = time.monotonic() - began, metrics(output)[-1]["step"]
            wait_for_step(output, second + 8, running[0], time.time())
            running[0].send_signal(signal.SIGTERM)
            running[0].wait(DEADLINE)
    starts = re.findall(r"^ranks +(\d) .*|^start +step (\d+)", printed(said), re.MULTILINE)
    print(f"a host died: {fewer:.0f} s, came again: {more:.0f} s; {starts}")
    worlds, begun = ([int(pair[i]) for pair in starts if pair[i]] for i in (0, 1))
    assert worlds == [2, 1, 2]
    # What the death took is lost, and what was trained on while the other host came.
    assert begun[0] == 0
    assert first - 10 <= begun[1] <= begun[2] <= metrics(output)[-1]["step"]
    assert second - 10 <= begun[2]
    steps = metrics(output)[-1]["step"]
    succeed(2, *endless(config, tmp_path / "whole"), "--training.steps", steps)
    assert farthest(output, tmp_path / "whole", steps) < 1e-3
