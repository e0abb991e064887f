"""Cables that are pulled and hosts that die, two namespaces: more rows of faults.py's table."""

import contextlib
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from conda_dist.launch.job.checkpoint import complete_checkpoints, step_of
from faults import Outcome, Scene, farthest
from launch_jobs import curve, metrics, succeed
from nodes import Node, Relay, nodes
from processes import DEADLINE, ENVIRONMENT, Forked, endless, wait_for_step

PORT = 29_517
TIMEOUT_S = 25
OUT_S = 10
INTERVAL = 5


def agent(host: Node, hosts: list[Node], endpoint: str, options: Any, said: Path) -> Forked:
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
    variables = {**host.environment, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    command = (sys.executable, *run, *where, *options)
    return Forked(command, {**ENVIRONMENT, **variables}, said / host.name, host)


@contextlib.contextmanager
def job(hosts: list[Node], endpoint: str, said: Path, *arguments: Any) -> Iterator[list[Forked]]:
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


def cables(scene: Scene) -> tuple[Outcome, Outcome]:
    """A cable that is out for ten seconds, and then for good; with a slow rendezvous.

    Two ranks on each of two hosts, against four on one.
    """
    output, said = scene.folder / "cables", scene.folder / "cables-said"
    whole = scene.folder / "one-host"
    limits = ("--training.timeout_s", TIMEOUT_S, "--checkpoint.interval", INTERVAL)
    arguments = (
        *("--nnodes=2", "--nproc-per-node=2", "-m", "conda_dist.launch.pretrain"),
        *(*endless(scene.config, output), *limits),
    )
    with nodes(2) as hosts:
        relay = Relay((hosts[0].address, PORT), delay_s=0.02)
        through = f"{hosts[0].gateway}:{relay.port}"
        with job(hosts, through, said, *arguments) as running:
            wait_for_step(output, 8, running[0])
            hosts[1].plug(False)
            time.sleep(OUT_S)
            first = metrics(output)[-1]["step"]
            hosts[1].plug(True)
            start = time.monotonic()
            wait_for_step(output, first + 1, running[0])
            again = time.monotonic() - start
            wait_for_step(output, first + 8, running[0])
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
    reached, struck = metrics(output)[-1]["step"], curve(output)
    how = f"the link to one of two hosts down for {OUT_S} s"
    out = Outcome("a cable is out", how, "waited, and went on", told, 0.0, again)
    did = "ended on both hosts with an error"
    lost = Outcome(f"a cable stays out ({TIMEOUT_S} s allowed)", "the link down", did, told, took)
    lost.lost = reached - step_of(complete_checkpoints(output / "checkpoints")[-1])
    steps = ("--training.steps", reached + 3)
    succeed(4, *endless(scene.config, whole), *steps)
    start = time.monotonic()
    succeed(4, *endless(scene.config, output), "--resume", *steps)
    lost.recover_s = time.monotonic() - start
    lost.difference = farthest(output, whole, reached + 3)
    out.difference = max(abs(a[1] - b[1]) for a, b in zip(struck, curve(whole), strict=False))
    if out.difference == lost.difference == 0.0:  # then in all else as well
        assert struck == curve(whole)[:reached]
        assert curve(output) == curve(whole)
    return out, lost


def hosts_that_come_and_go(scene: Scene) -> tuple[Outcome, Outcome]:
    """--nnodes=1:2: all of a host's processes are killed at once; later it is there again."""
    output, said = scene.folder / "elastic-hosts", scene.folder / "elastic-said"
    arguments = (
        *("--nnodes=1:2", "--nproc-per-node=1", "--max-restarts=3"),
        *("-m", "conda_dist.launch.pretrain"),
        *(*endless(scene.config, output), "--checkpoint.interval", INTERVAL, "--resume"),
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
            second = first
            while "2 (1 on" not in (told := printed(said)).rpartition("1 (1 on")[2]:
                assert time.monotonic() - began < DEADLINE, told
                second = max(second, metrics(output)[-1]["step"])  # it falls when they start
                time.sleep(0.1)
            more = time.monotonic() - began
            fallen = metrics(output)[-1]["step"]
            wait_for_step(output, fallen + 8, running[0], time.time())
            running[0].send_signal(signal.SIGTERM)
            running[0].wait(DEADLINE)
    told = printed(said)
    starts = re.findall(r"^ranks +(\d) .*|^start +step (\d+)", told, re.MULTILINE)
    worlds, begun = ([int(pair[i]) for pair in starts if pair[i]] for i in (0, 1))
    assert worlds == [2, 1, 2]
    steps = metrics(output)[-1]["step"]
    # What the death took is lost, and what was trained on while the other host came.
    assert begun[0] == 0 < begun[1] <= begun[2] <= steps
    dies = Outcome(
        "a host dies (--nnodes=1:2)",
        "kill -9 of torchrun and ranks on one of two",
        "torchrun started the other's again, which resumed by themselves",
        *(told, 0.0, fewer),
        lost=first - begun[1],
    )
    did = "torchrun started all again, which resumed by themselves"
    comes = Outcome("a host comes again", "a new torchrun on it", did, told, 0.0, more)
    comes.lost = second - begun[2]
    whole = scene.folder / "two-hosts"
    succeed(2, *endless(scene.config, whole), "--training.steps", steps)
    dies.difference = comes.difference = farthest(output, whole, steps)
    return dies, comes


ALL: tuple[Callable[[Scene], tuple[Outcome, ...]], ...] = (cables, hosts_that_come_and_go)
