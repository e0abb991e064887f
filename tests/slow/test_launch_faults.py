"""What strikes a job costs it what the README says, and never more; see faults.py."""

import re
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import timedelta

import pytest
from torch._C._distributed_c10d import HashStore
from torch.distributed import DistStoreError

import fault_files
import fault_links
import faults
import launch_jobs
import ranks
from conda_dist.launch.cluster.rendezvous import agree
from conda_dist.launch.job import watchdog
from conda_dist.launch.job.watchdog import Report, find_stalled
from faults import INTERVAL, STALL_S, STRUCK, Outcome, Scene
from launch_jobs import metrics

CLOSE = 1e-3
SKIPPED = 0.35
"""Of a loss that falls from 6.0 to 5.0 in these steps: what two updates make of it."""
SLACK_S = 10.0
"""For torchrun to notice and to end, on a machine that does other things as well."""


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Scene:
    return faults.set_up(tmp_path_factory.mktemp("faults"), fresh=False)


def assert_lost(outcome: Outcome, most: int) -> None:
    """The whole curve is that of the uninterrupted run, to the last bit."""
    assert outcome.difference == 0.0
    assert 0 <= outcome.lost <= most


def test_a_rank_killed_twice_under_torchrun(scene: Scene) -> None:
    outcome = faults.rank_killed_twice(scene)
    assert_lost(outcome, INTERVAL)
    assert "exitcode  : -9" in outcome.said
    assert outcome.stop_s < 20


def test_no_rank_outlives_its_launcher_unseen(scene: Scene) -> None:
    def start_another() -> None:
        for result in launch_jobs.train(2, *scene.job("launcher-killed"), "--resume"):
            assert result.code == 1
            assert "another job writes" in result.err
            assert "give another --output" in result.err

    outcome = faults.launcher_killed(scene, start_another)
    assert_lost(outcome, 0)
    assert "stopped after step" in outcome.said


def test_no_rank_outlives_the_deepspeed_command_unseen(scene: Scene) -> None:
    """Which is not what has started the ranks; mpirun is in test_launch_hosts."""
    outcome = fault_links.launcher_killed(scene, "deepspeed")
    assert_lost(outcome, 0)
    assert outcome.stop_s < 20
    assert "stopped after step" in outcome.said


def test_a_rank_cut_off_from_the_store_trains_on(scene: Scene) -> None:
    assert_lost(fault_links.store_cut_off(scene), 0)


def test_connections_between_ranks_cut(scene: Scene) -> None:
    outcome = fault_links.data_cut(scene)
    assert_lost(outcome, INTERVAL)
    assert outcome.stop_s < 20
    assert "gloo" in outcome.said


def test_all_killed(scene: Scene) -> None:
    assert_lost(faults.all_killed(scene), INTERVAL)


def test_all_killed_while_saving(scene: Scene) -> None:
    assert_lost(faults.all_killed_while_saving(scene), 2)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_preempted(scene: Scene, number: signal.Signals) -> None:
    """Slurm sends SIGUSR1, of which torchrun by itself would die alone. mpirun: test_launchers."""
    outcome = faults.preempted(scene, number)
    assert_lost(outcome, 0)
    assert "stopped after step" in outcome.said


def test_a_stopped_rank_is_named_and_killed(scene: Scene) -> None:
    outcome = faults.stopped_rank(scene)
    assert_lost(outcome, INTERVAL)
    assert outcome.stop_s < STALL_S * 1.25 + SLACK_S
    assert "[rank 1] error: no progress for 5 s" in outcome.said
    assert "rank 0 on " in outcome.said
    assert "says nothing any more" in outcome.said


def test_a_stuck_rank_is_named_and_shows_its_stack(scene: Scene) -> None:
    outcome = faults.stuck_rank(scene)
    assert_lost(outcome, INTERVAL)
    assert outcome.stop_s < STALL_S * 1.25 + SLACK_S
    for rank in (0, 1):
        assert f"[rank {rank}] error: no progress for 5 s" in outcome.said
    assert f"is stuck in step {STRUCK + 1}, reading data; the others wait for it" in outcome.said
    stack = outcome.said.partition("[rank 1] what it is doing:")[2]
    assert "injected.py" in stack
    assert "in read" in stack
    assert "[rank 0] what it is doing" not in outcome.said


def test_a_rank_that_lets_no_thread_run_shows_its_stack(scene: Scene) -> None:
    outcome = faults.stuck_rank(scene, "frozen")
    assert_lost(outcome, INTERVAL)
    assert outcome.stop_s < STALL_S * 1.25 + SLACK_S
    assert "[rank 0] error: no progress for 5 s" in outcome.said
    assert "says nothing any more" in outcome.said
    assert "injected.py" in outcome.said.partition("Timeout (0:00:05)!")[2]


def test_a_slow_rank_is_left_alone(scene: Scene) -> None:
    words = map(str, (*scene.job("slow"), "--training.steps", 10, "--training.stall_timeout_s", 2))
    words = (*words, "--checkpoint.interval", "0")  # a disk may be slow, too
    results = ranks.run(2, _slow, *words)
    assert all(threads for _, threads in results)
    assert [result.code for result, _ in results] == [0, 0]
    assert sum(line["step_s"] for line in metrics(scene.folder / "slow")) > 2


def _slow(*arguments: str) -> tuple[launch_jobs.Result, list[float]]:
    """A job whose rank 1 takes its time; when it made reports."""
    import injected

    said: list[float] = []
    say = watchdog.Watchdog._say

    def noted(self: watchdog.Watchdog) -> None:
        said.append(time.monotonic())
        say(self)

    watchdog.Watchdog._say = noted  # type: ignore[method-assign]
    try:
        return injected.job("slow", 1, 2, *arguments), said
    finally:
        watchdog.Watchdog._say = say  # type: ignore[method-assign]


WELL = Report(0, "here", 1, "", count=7, step=3, phase="optimizer step", idle_s=60.0, beat=5)


@pytest.mark.parametrize(
    ("counts", "idle", "beats", "silent", "stuck"),
    [
        ((7, 6, 7), (60, 60, 60), (9, 9, 9), [], [1]),
        ((7, 6, 7), (60, 5, 60), (9, 9, 9), [], []),  # on its way: slow, not stalled
        ((7, 7, 7), (60, 60, 60), (9, 9, 9), [], [0, 1, 2]),
        ((7, 7, 7), (60, 60, 60), (9, 9, 5), [2], []),
        ((6, 7, 7), (60, 60, 60), (9, 5, 5), [1, 2], []),
        ((6, 6, 7), (60, 60, 60), (9, 9, 9), [], [0, 1]),
    ],
)
def test_who_is_waited_for(
    counts: tuple[int, ...],
    idle: tuple[float, ...],
    beats: tuple[int, ...],
    silent: list[int],
    stuck: list[int],
) -> None:
    before = [replace(WELL, rank=rank) for rank in range(3)]
    after = [
        replace(WELL, rank=rank, count=counts[rank], idle_s=idle[rank], beat=beats[rank])
        for rank in range(3)
    ]
    found = find_stalled(before, after, 30.0)
    assert [[report.rank for report in part] for part in found] == [silent, stuck]


def test_nan_gradients_are_skipped_and_end_the_job(scene: Scene) -> None:
    outcome = faults.nan_gradient(scene)
    assert outcome.lost <= INTERVAL
    assert 0 < outcome.difference < SKIPPED  # the checkpoint is of a step after two skipped ones
    where = "the gradient's norm is nan (the gradient of rank 1 is not finite)"
    assert outcome.said.count(f"step {STRUCK + 4}: {where}") == 2
    words = (
        "; 4 in a row; up to 3 are skipped (training.skip_limit). Nothing was updated; the newest"
    )
    assert words in outcome.said
    assert [line["skipped"] for line in metrics(scene.folder / "nan")][-1] == 2


def test_a_nan_gradient_of_one_weight_is_traced_to_it(scene: Scene) -> None:
    """Which rank it comes from is lost where gradients are reduced."""
    outcome = faults.nan_gradient(scene, weight=True)
    assert_lost(outcome, INTERVAL)
    words = "are finite, not the gradient of model.layers.1.mlp.up_proj.weight); 1 in a row; "
    assert outcome.said.count(words) == 2
    assert f"step {STRUCK + 1}: " in outcome.said


def test_bad_steps_are_skipped(scene: Scene) -> None:
    outcome = faults.bad_steps(scene)
    assert 0 < outcome.difference < SKIPPED
    assert f"skipped step {STRUCK + 1}: the gradient's norm is nan" in outcome.said
    assert f"skipped step {STRUCK + 3}: the gradient's norm is " in outcome.said


def test_data_that_cannot_be_read(scene: Scene) -> None:
    outcome = faults.data_unread(scene)
    assert_lost(outcome, 0)
    said = f"reading the data of step {STRUCK + 1} failed on rank 1: OSError: the disk has gone"
    assert outcome.said.count(said) == 2


@pytest.mark.parametrize("delay", [0, 1])
def test_a_decomposition_that_raises(scene: Scene, delay: int) -> None:
    outcome = faults.decomposition_raises(scene, delay)
    assert_lost(outcome, INTERVAL)
    assert len(re.findall(r"RuntimeError: .*rank 1.*MemoryError: no room", outcome.said)) == 2


def test_a_decomposition_that_does_not_converge(scene: Scene) -> None:
    outcome = faults.decomposition_fails_twice(scene)
    assert 0 < outcome.difference < 0.05
    assert "The old basis is kept. Failure 2 in a row" in outcome.said


def test_a_full_disk(scene: Scene) -> None:
    outcome = fault_files.full_disk(scene)
    assert_lost(outcome, INTERVAL)
    assert outcome.said.count("error: saving to") == 2
    assert outcome.said.count("No space left on device") == 2 or "limit" in outcome.injected


def test_a_full_disk_of_the_metrics(scene: Scene) -> None:
    outcome = fault_files.full_metrics(scene)
    assert (outcome.lost, outcome.difference) == (0, 0.0)
    words = "error: writing the metrics in .* failed on rank 0: OSError: .*No space left on device"
    assert len(re.findall(words, outcome.said)) == 2


def test_a_damaged_checkpoint(scene: Scene) -> None:
    """Other damages: test_launch_checkpoint.py."""
    assert fault_files.damaged(scene, fault_files.flip).difference == 0.0


def _starts(store: HashStore, early: int) -> list[str]:
    """The names that three ranks agree on, of which one comes first."""
    limit = timedelta(seconds=10)
    with ThreadPoolExecutor(3) as pool:
        first = pool.submit(agree, store, early, 3, limit)
        time.sleep(0.05)
        others = [pool.submit(agree, store, rank, 3, limit) for rank in range(3) if rank != early]
        return [future.result() for future in (first, *others)]


def test_a_start_takes_nothing_from_the_one_before() -> None:
    store = HashStore()
    names = [_starts(store, early) for early in (0, 1, 2, 0)]
    assert all(len(set(agreed)) == 1 for agreed in names)
    assert len({agreed[0] for agreed in names}) == 4
    with pytest.raises(DistStoreError, match="not all 2 ranks came"):
        agree(store, 0, 2, timedelta(seconds=0.1))


def test_other_numbers_of_ranks(scene: Scene) -> None:
    outcome = faults.elastic(scene, 3, 1, 2)
    print("largest difference", outcome.difference)
    assert outcome.difference < CLOSE
