"""Bad steps are skipped on all ranks and counted; too many in a row end the job."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_launch_training import assert_identical, weights

import injected
import launch_jobs
import ranks
from conda_dist.bad_steps import BadSteps
from conda_dist.launch.job.metrics import Meter, MetricsWriter
from conda_dist.launch.job.picture import draw_loss
from launch_jobs import curve, metrics, succeed

NAN, JUMP = 3, 5
"""Steps in which the fault "bad steps" strikes if it begins in the first of them."""
SKIPPING = ("--training.skip_factor", 20, "--training.skip_window", 3)
"""Step 5 is compared with steps 1, 2 and 4: the window is full, if the checkpoint of 4 has it."""


def facts(run: Path, step: int) -> dict[str, Any]:
    """What a checkpoint says of bad steps."""
    file = run / "checkpoints" / f"step-{step:08}" / "trainer.json"
    found: dict[str, Any] = json.loads(file.read_text())["facts"]["bad_steps"]
    return found


def struck(*arguments: Any) -> str:
    """Runs a job of which rank 1 has two bad steps; it must complete."""
    words = map(str, arguments)
    results = ranks.run(2, injected.job, "bad steps", 1, NAN, *words)
    assert [result.code for result in results] == [0, 0], results
    return str(results[0].out)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return launch_jobs.write_config(tmp_path_factory.mktemp("skipping"))


@pytest.fixture(scope="module")
def whole(config: Path) -> tuple[Path, str]:
    """A run of 8 steps of which two are bad, and what it printed."""
    output = config.parent / "whole"
    return output, struck(config, "--output", output, *SKIPPING)


def test_bad_steps_are_skipped_and_counted(whole: tuple[Path, str]) -> None:
    run, printed = whole
    lines = metrics(run)
    assert [line["skipped"] for line in lines] == [0, 0, 1, 1, 2, 2, 2, 2]
    assert [line["step"] for line in lines] == list(range(1, 9))
    # JSON has no NaN. The loss is computed before the gradient, so it is finite.
    assert [line["step"] for line in lines if line["grad_norm"] is None] == [NAN]
    assert "NaN" not in (run / "metrics.jsonl").read_text()
    assert lines[JUMP - 1]["grad_norm"] > 100 * lines[JUMP]["grad_norm"]
    assert lines[-1]["loss"] < lines[0]["loss"]
    where = "the gradient of rank 1 is not finite"
    assert (
        f"skipped step {NAN}: the gradient's norm is nan ({where}); 1 in a row; up to 3" in printed
    )
    assert f"skipped step {JUMP}: the gradient's norm is " in printed
    assert "above" in printed
    assert facts(run, 8)["total"] == 2


def test_a_skipped_step_updates_nothing(config: Path, whole: tuple[Path, str]) -> None:
    """The step after it has the loss that its batch has with the weights of the step before."""
    output = config.parent / "lagging"
    struck(config, "--output", output, *SKIPPING, "--training.steps", 3, "--checkpoint.interval", 2)
    assert_identical(weights(output, 2), weights(output, 3))


def test_a_resumed_run_skips_the_same_steps(
    config: Path, whole: tuple[Path, str], tmp_path: Path
) -> None:
    """Bit for bit: step 5 is a jump only for who knows the steps before the checkpoint."""
    run, _ = whole
    parts = tmp_path / "parts"
    shutil.copytree(run, parts)
    shutil.rmtree(parts / "checkpoints" / "step-00000008")
    printed = struck(config, "--output", parts, *SKIPPING, "--resume")
    assert f"skipped step {JUMP}: " in printed
    assert curve(parts) == curve(run)
    assert [line["skipped"] for line in metrics(parts)] == [0, 0, 1, 1, 2, 2, 2, 2]
    assert facts(parts, 8) == facts(run, 8)
    assert_identical(weights(parts, 8), weights(run, 8))


def test_watching_for_jumps_changes_nothing_else(config: Path, tmp_path: Path) -> None:
    succeed(2, config, "--output", tmp_path / "plain", "--training.steps", 4)
    succeed(2, config, "--output", tmp_path / "skipping", "--training.steps", 4, *SKIPPING)
    assert curve(tmp_path / "plain") == curve(tmp_path / "skipping")
    assert len(facts(tmp_path / "skipping", 4)["recent"]["the loss"]) == 3
    assert facts(tmp_path / "plain", 4) == {"in_a_row": 0, "total": 0, "recent": {}}


def test_a_loss_that_is_not_finite_is_a_gap(tmp_path: Path) -> None:
    """It is null in the file, which the picture reads."""
    meter, writer = Meter(8, 0.0), MetricsWriter(tmp_path, step=0, tensorboard=True)
    for step in range(1, 20):
        meter.add(1.0, 0.5)
        loss, skipped = (math.inf, 1) if step == 3 else (1.0 / step, int(step > 3))
        found = {"loss": loss, "lr": 0.1, "grad_norm": loss, "val_loss": None, "skipped": skipped}
        writer.write(meter.record(step, **found))
    writer.close()
    lines = metrics(tmp_path)
    assert [line["step"] for line in lines if line["loss"] is None] == [3]
    assert draw_loss(tmp_path, "gap").stat().st_size > 0
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    assert [event.step for event in board.Scalars("loss")] == [1, 2, *range(4, 20)]
    assert [event.value for event in board.Scalars("skipped")] == [0, 0, *[1] * 17]


def judged(bad: BadSteps, *values: float) -> list[bool]:
    """Whether each value is bad, one after another."""
    return [bool(bad.judge({"x": value})) for value in values]


def test_what_is_not_finite_is_bad() -> None:
    bad = BadSteps(limit=2)
    assert judged(bad, 1.0, math.nan, 1e30, math.inf, -math.inf) == [False, True, False, True, True]
    assert (bad.in_a_row, bad.total, bad.too_many) == (2, 3, False)
    assert bad.judge({"x": 1.0, "y": math.nan}) == "y is nan"
    assert bad.too_many
    assert not bad.judge({"x": 1.0})
    assert not bad.too_many


def test_none_may_be_skipped() -> None:
    bad = BadSteps(limit=0)
    assert judged(bad, math.nan) == [True]
    assert bad.too_many


def test_a_jump_is_measured_by_median_and_spread() -> None:
    """Of 1, 2, 3, 4, 5 the median is 3 and the median deviation 1: with factor 4 the bound is 7."""
    assert judged(BadSteps(3, 4.0, 5), 1, 2, 3, 4, 5, 7) == [False] * 6
    assert judged(BadSteps(3, 4.0, 5), 1, 2, 3, 4, 5, 7.01) == [False] * 5 + [True]
    assert judged(BadSteps(3, 4.0, 5), 5, 4, 3, 2, -100) == [False] * 5  # downwards is welcome
    assert judged(BadSteps(3, 4.0, 5), 1, 2, 3, 4, 1e9) == [False] * 5  # not five before it
    # What is alike has a spread of 1 %; what is skipped is not remembered.
    assert judged(BadSteps(3, 4.0, 2), 1, 1, 1.03, 1.05, 1.05) == [False] * 3 + [False, False]
    assert judged(BadSteps(3, 4.0, 2), 1, 1, 1.05, 1.05, 1.0) == [False, False, True, True, False]
    # Without a spread there is no measure: rewards that are all equal give gradients of 0.
    assert judged(BadSteps(3, 4.0, 3), 0, 0, 0, 0.1, 0, 9.0) == [False] * 6


def test_a_state_goes_on() -> None:
    one, other = BadSteps(3, 4.0, 3), BadSteps(3, 4.0, 3)
    judged(one, 1 / 3, 0.5, math.nan, 0.7, math.nan)
    other.load_state_dict(json.loads(json.dumps(one.state_dict())))
    assert other.state_dict() == one.state_dict()
    assert judged(other, 0.9, 9.0) == judged(one, 0.9, 9.0) == [False, True]
    shorter = BadSteps(3, 4.0, 2)
    shorter.load_state_dict(one.state_dict())
    assert shorter.state_dict()["recent"] == {"x": [0.7, 0.9]}


@pytest.mark.parametrize("arguments", [(-1,), (1, -0.5), (1, math.nan), (1, 2.0, 0)])
def test_arguments(arguments: tuple[Any, ...]) -> None:
    with pytest.raises(ValueError, match="must be at least 0"):
        BadSteps(*arguments)
