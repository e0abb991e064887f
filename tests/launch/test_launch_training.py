"""The pretraining job from start to end, stopped and continued, on one rank and on several."""

import json
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

import launch_jobs
import ranks
from conda_dist.launch.job import report
from conda_dist.launch.job.optimizer_config import SECTIONS
from conda_dist.launch.job.watchdog import Watchdog
from launch_jobs import curve, metrics, succeed, train


def weights(run: Path, step: int) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint, by a name with its parts joined by dots."""
    file = run / f"step-{step}.pt"
    dcp_to_torch_save(run / "checkpoints" / f"step-{step:08}", file)
    flat: dict[str, torch.Tensor] = {}

    def collect(prefix: str, tree: object) -> None:
        if isinstance(tree, dict):
            for name, child in tree.items():
                collect(f"{prefix}.{name}", child)
        else:
            assert isinstance(tree, torch.Tensor)
            flat[prefix] = tree

    collect("", torch.load(file))
    return flat


def assert_identical(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return launch_jobs.write_config(tmp_path_factory.mktemp("training"))


@pytest.fixture(scope="module")
def whole(config: Path) -> Path:
    """Conda on 2 ranks, 8 steps without a stop."""
    output = config.parent / "whole"
    collect = ("--metrics.tensorboard", "true", "--optimizer.diagnostics_every", "3")
    given = (str(config), "--output", str(output), *collect)
    results = ranks.run(2, launch_jobs.drawn, *given)
    assert [result.code for result in results] == [0, 0], results
    return output


def _hurried(seconds: float, *arguments: str) -> launch_jobs.Result:
    """A job that prints each new basis, and whose watchdog is told; see `launch_jobs.job`."""
    told, go_on, quiet = [], Watchdog.go_on, report.QUIET_S

    def counted(dog: Watchdog) -> None:
        before = dog._place
        go_on(dog)
        told.append(dog._place.count == before.count and dog._place.since > before.since)

    Watchdog.go_on, report.QUIET_S = counted, seconds  # type: ignore[method-assign]
    try:
        ended = launch_jobs.job(*arguments)
    finally:
        Watchdog.go_on, report.QUIET_S = go_on, quiet  # type: ignore[method-assign]
    assert told == [True] * 14 * 2  # of 2 layers, in steps 1 and 4
    return ended


def test_a_long_refresh_is_seen(config: Path, tmp_path: Path) -> None:
    given = (str(config), "--output", str(tmp_path / "run"), "--training.steps", "5")
    ((code, out, err),) = ranks.run(1, _hurried, -1.0, *given)
    assert code == 0, err
    assert "step 1: rank 0 has 14 new bases, up to model.layers.1.mlp.down_proj.weight" in out
    assert out.count("new bases") == 28


def test_a_run_leaves_its_results(whole: Path) -> None:
    lines = metrics(whole)
    assert [line["step"] for line in lines] == list(range(1, 9))
    assert [line["step"] for line in lines if line["val_loss"] is not None] == [4, 8]
    assert lines[-1]["tokens"] == 8 * 8 * 32
    assert all(0 < line["optimizer_s"] < line["step_s"] for line in lines)
    assert lines[-1]["train_s"] == pytest.approx(sum(line["step_s"] for line in lines))
    summary = json.loads((whole / "summary.json").read_text())
    assert summary["step"] == 8
    assert summary["val_loss"] == lines[-1]["val_loss"]
    saved = weights(whole, 8)
    moments = 8 * sum(saved[name].numel() for name in saved if name.startswith(".model"))
    bases = 2 * 14 * 32 * 32 * 4  # each of two ranks has all of them
    assert moments + bases // 2 < summary["state_bytes"] < 1.01 * (moments + bases)
    assert (whole / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert (whole / "signals.png").read_bytes().startswith(b"\x89PNG")
    board = EventAccumulator(str(whole / "tensorboard")).Reload()
    for name in ("conda/update_ratio", "adamw/momentum_norm", "conda/staleness"):
        told = {line["step"]: line[name] for line in lines if name in line}
        assert list(told) == ([6] if name == "conda/staleness" else [3, 6])
        events = {event.step: event.value for event in board.Scalars(name)}
        assert events == pytest.approx(told)


@pytest.mark.thorough
def test_loss_falls_and_does_not_depend_on_the_number_of_ranks(
    config: Path, tmp_path: Path
) -> None:
    """Nor does it with other optimizers; see test_each_optimizer_resumes_on_other_ranks."""
    for world in (1, 3):
        succeed(world, config, "--output", tmp_path / str(world), "--training.steps", 30)
    alone, three = (metrics(tmp_path / str(world)) for world in (1, 3))
    losses = [line["loss"] for line in alone]
    assert sum(losses[-3:]) / 3 < losses[0] - 1.0
    # Global batches of 8 on 3 ranks are dealt 2, 3, 3: the loss is a mean over tokens, not ranks.
    assert [line["loss"] for line in three] == pytest.approx(losses, abs=2e-3)
    assert three[0]["grad_norm"] == pytest.approx(alone[0]["grad_norm"], rel=1e-5)
    assert three[-1]["val_loss"] == pytest.approx(alone[-1]["val_loss"], abs=2e-3)


@pytest.mark.parametrize("optimizer", SECTIONS)
def test_each_optimizer_resumes_on_other_ranks(
    config: Path, tmp_path: Path, optimizer: str
) -> None:
    """What two ranks have saved, one continues as they would have."""
    given = (config, "--output", tmp_path, "--optimizer.name", optimizer)
    given += ("--training.steps", 4, "--checkpoint.interval", 2, "--schedule.warmup_steps", 0)
    printed = succeed(2, *given)
    assert ("each rank has the whole model" in printed) is not SECTIONS[optimizer].knows_shards
    two = metrics(tmp_path)
    (tmp_path / "checkpoints" / "step-00000004").rename(tmp_path / "gone")
    succeed(1, *given, "--resume")
    one = metrics(tmp_path)
    assert one[:2] == two[:2]
    assert one[3] != two[3]
    assert two[3]["loss"] < two[0]["loss"]
    for ours, theirs in zip(one[2:], two[2:], strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-4)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-3)
    assert one[3]["val_loss"] == pytest.approx(two[3]["val_loss"], abs=1e-4)


def test_replicas_train_the_same_model(config: Path, tmp_path: Path) -> None:
    steps = ("--training.steps", 4, "--optimizer.name", "adamw")
    succeed(2, config, "--output", tmp_path / "fsdp", *steps)
    succeed(2, config, "--output", tmp_path / "hsdp", *steps, "--training.hsdp_replicas", 2)
    one, other = metrics(tmp_path / "fsdp"), metrics(tmp_path / "hsdp")
    for key in ("loss", "grad_norm"):
        assert [a[key] for a in one] == pytest.approx([b[key] for b in other], rel=1e-4)
    (refused, _) = train(2, config, "--output", tmp_path / "three", "--training.hsdp_replicas", 3)
    assert refused.code == 2
    assert "hsdp_replicas 3 does not divide the 2 ranks" in refused.err


@pytest.mark.parametrize("lean", ["true", "false"])
def test_accumulation_changes_nothing(config: Path, whole: Path, tmp_path: Path, lean: str) -> None:
    small_parts = ("--training.micro_batch_size", 3, "--training.lean_accumulation", lean)
    succeed(2, config, "--output", tmp_path, *small_parts)
    small, usual = metrics(tmp_path), metrics(whole)
    assert [a["loss"] for a in small] == pytest.approx([b["loss"] for b in usual], abs=1e-3)
    assert small[0]["grad_norm"] == pytest.approx(usual[0]["grad_norm"], rel=1e-5)


def test_resume_is_bit_identical(config: Path, whole: Path, tmp_path: Path) -> None:
    succeed(2, config, "--output", tmp_path, "--training.steps", 8)
    # A run cut off after step 5 has written a metric that its resume must not repeat.
    later = tmp_path / "checkpoints" / "step-00000008"
    later.rename(tmp_path / "gone")
    printed = succeed(2, config, "--output", tmp_path, "--resume")
    assert "start" in printed
    assert "step-00000004" in printed
    assert curve(tmp_path) == curve(whole)
    assert_identical(weights(tmp_path, 8), weights(whole, 8))


@pytest.mark.thorough
def test_dropout_resumes_bit_identically(config: Path, tmp_path: Path) -> None:
    gpt2 = ("--model.architecture", "gpt2", "--model.dropout", 0.1, "--optimizer.name", "muon")
    gpt2 += ("--model.tie_word_embeddings", "true")
    succeed(2, config, "--output", tmp_path / "whole", *gpt2)
    succeed(2, config, "--output", tmp_path / "parts", *gpt2)
    (tmp_path / "parts" / "checkpoints" / "step-00000008").rename(tmp_path / "gone")
    succeed(2, config, "--output", tmp_path / "parts", *gpt2, "--resume")
    assert curve(tmp_path / "parts") == curve(tmp_path / "whole")
    assert_identical(weights(tmp_path / "parts", 8), weights(tmp_path / "whole", 8))


def test_settings_changed_on_resume_are_followed(config: Path, tmp_path: Path) -> None:
    adamw = (config, "--output", tmp_path, "--optimizer.name", "adamw")
    succeed(1, *adamw, "--training.steps", 4, "--schedule.name", "constant")
    changed = ("--training.steps", 6, "--schedule.name", "constant", "--optimizer.lr", 5e-3)
    printed = succeed(1, *adamw, *changed, "--resume")
    assert "training.steps (4 there, 6 here)" in printed
    assert [line["lr"] for line in metrics(tmp_path)][-2:] == [5e-3, 5e-3]


def test_a_second_run_does_not_overwrite_the_first(config: Path, whole: Path) -> None:
    for result in train(2, config, "--output", whole):
        assert result.code == 2
        assert "holds a run already" in result.err
        assert "--resume" in result.err


def test_activation_checkpointing_changes_nothing(
    config: Path, whole: Path, tmp_path: Path
) -> None:
    succeed(2, config, "--output", tmp_path, "--training.activation_checkpointing", "true")
    assert curve(tmp_path) == curve(whole)


def test_bfloat16_compute_trains(config: Path, whole: Path, tmp_path: Path) -> None:
    succeed(2, config, "--output", tmp_path, "--training.compute_dtype", "bfloat16")
    ours, usual = metrics(tmp_path), metrics(whole)
    assert [a["loss"] for a in ours] == pytest.approx([b["loss"] for b in usual], abs=0.05)
    assert curve(tmp_path) != curve(whole)
    assert all(tensor.dtype == torch.float32 for tensor in weights(tmp_path, 8).values())


def test_a_loss_that_is_not_finite_ends_the_job_before_any_update(
    config: Path, tmp_path: Path
) -> None:
    hot = (
        "--optimizer.name",
        "adamw",
        "--optimizer.lr",
        1e9,
        "--optimizer.betas",
        "0,0",
        "--schedule.warmup_ratio",
        0,
    )
    hot += ("--checkpoint.interval", 1, "--training.skip_limit", 0)
    for result in train(2, config, "--output", tmp_path, *hot):
        assert result.code == 1
        assert "step 2: the loss is nan" in result.err or "step 3" in result.err
        assert "Nothing was updated" in result.err
    assert "Nothing was updated" in json.loads((tmp_path / "diverged.json").read_text())["error"]
    assert not (tmp_path / "summary.json").exists()
