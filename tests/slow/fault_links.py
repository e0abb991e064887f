"""Launchers that are killed and connections that are cut: more rows of faults.py's table."""

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

import faults
import injected
import launchers
from faults import LONG, STRUCK, Outcome, Scene, farthest, lengthened, recover
from launch_jobs import metrics
from nodes import Relay
from processes import (
    DEADLINE,
    Forked,
    below,
    forked,
    has_ended,
    rank_environments,
    running,
    wait_for_step,
)

WATCH_S = 2.0
"""Limit of a phase of a step, while the store is cut off."""


@contextlib.contextmanager
def _under(
    scene: Scene, name: str, command: tuple[Any, ...], variables: dict[str, str]
) -> Iterator[Forked]:
    """A job under that launcher that has reached the step; what is printed goes to NAME.txt."""
    said, variables = scene.folder / f"{name}.txt", {"DS_ACCELERATOR": "cpu", **variables}
    with running((*command, *scene.job(name)), said, **variables) as launcher:
        wait_for_step(scene.folder / name, STRUCK, launcher)
        yield launcher


def launcher_killed(scene: Scene, name: str) -> Outcome:
    """kill -9 of "deepspeed", which has started another that starts the ranks; or of an mpirun."""
    variables: dict[str, str] = {}
    if name in launchers.MPIS:
        mpi = launchers.MPIS[name]()
        command, variables = mpi.command(2, *launchers.JOB), mpi.environment
    else:
        command = launchers.deepspeed()
    run = f"{name}-killed"
    with _under(scene, run, command, variables) as launcher:
        pids, begun = below(launcher.pid), time.perf_counter()
        try:
            launcher.kill()
            while not all(map(has_ended, pids)):
                assert time.perf_counter() - begun < DEADLINE
                time.sleep(0.01)
            took = time.perf_counter() - begun
        finally:  # they are nobody's children any more
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
    killed = name == "mpich"
    did = "its proxy killed the ranks" if killed else "the ranks noticed, saved and ended"
    whose = "deepspeed" if name == "deepspeed" else f"{name}'s mpirun"
    said = (scene.folder / f"{run}.txt").read_text()
    return recover(scene, run, Outcome(f"{whose} dies", "kill -9 of it", did, said, took))


def mpirun_told(scene: Scene) -> Outcome:
    """SIGUSR1 to Open MPI's mpirun, which passes it on, and kills no rank for it."""
    mpi = launchers.openmpi()
    command = mpi.command(2, *launchers.JOB)
    with _under(scene, "mpirun-told", command, mpi.environment) as mpirun:
        begun = time.perf_counter()
        mpirun.send_signal(signal.SIGUSR1)
        mpirun.wait(DEADLINE)
        took = time.perf_counter() - begun
    said = (scene.folder / "mpirun-told.txt").read_text()
    did = "saved a checkpoint after the step at hand and ended"
    words = ("a stop is asked for", "SIGUSR1 to openmpi's mpirun", did)
    return recover(scene, "mpirun-told", Outcome(*words, said, took))


def store_cut_off(scene: Scene) -> Outcome:
    """A rank whose connections to the rendezvous store are closed, and later pass nothing on."""
    run, environments = scene.folder / "store-cut", rank_environments(2)
    relay = Relay(("127.0.0.1", int(environments[0]["MASTER_PORT"])), 0.0)
    environments[1]["MASTER_PORT"] = str(relay.port)
    limits = ("--training.stall_timeout_s", WATCH_S, "--training.steps", LONG)
    # Slow from then on, so that the watchdog has the time to be wrong.
    driver = (injected.__file__, "slow", 1, STRUCK + 1)
    with contextlib.ExitStack() as stack:
        ranks = [
            stack.enter_context(forked(*driver, *scene.job("store-cut"), *limits, **variables))
            for variables in environments
        ]
        wait_for_step(run, STRUCK, ranks[0])
        relay.cut()
        passed = relay.passed
        wait_for_step(run, STRUCK + 5, ranks[0])
        assert relay.passed > passed + 5  # it has connected again, and is heard
        relay.fall_silent()
        ended = [rank.communicate(timeout=DEADLINE)[0] for rank in ranks]
        assert [rank.returncode for rank in ranks] == [0, 0], ended
    assert sum(line["step_s"] for line in metrics(run)[STRUCK + 5 :]) > 2 * WATCH_S
    how = "its connections are closed by a relay, which later passes nothing on"
    did = "went on; the rank connected again after the first"
    said = "\n".join(ended)
    outcome = Outcome("a rank is cut off from the store", how, did, said, 0.0)
    outcome.difference = farthest(run, scene.reference, lengthened(scene, LONG))
    return outcome


def data_cut(scene: Scene) -> Outcome:
    """A rank whose connections to the others are closed under it."""
    driver = (injected.__file__, "cut", 1, STRUCK + 1)
    with faults.running(scene, "data-cut", program=driver) as both:
        said, took = faults.end(both, time.perf_counter())
    did = "ended on all ranks with gloo's error"
    how = "the sockets between the ranks shut down"
    outcome = Outcome("connections of a rank are cut", how, did, said, took)
    return recover(scene, "data-cut", outcome)


ALL: tuple[Callable[[Scene], Outcome], ...] = (
    lambda scene: launcher_killed(scene, "deepspeed"),
    lambda scene: launcher_killed(scene, "openmpi"),
    lambda scene: launcher_killed(scene, "mpich"),
    mpirun_told,
    store_cut_off,
    data_cut,
)
