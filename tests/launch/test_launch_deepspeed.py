"""The pretraining job on DeepSpeed's engine: the FSDP2 job's losses, checkpoints, refusals."""

import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import injected
import launch_jobs
import ranks
import zero
from conda_dist.launch.cluster import process_group
from conda_dist.launch.cluster.process_group import JobError
from conda_dist.launch.job import options
from conda_dist.launch.job.checkpoint import complete_checkpoints
from conda_dist.launch.job.config import ConfigError
from launch_jobs import Result, curve, metrics

os.environ["DS_ACCELERATOR"] = "cpu"

STAGES = range(4)
CLASSES = (0, 2, 3)
"""Stages that DeepSpeed has different classes for: 1 has that of 2."""
UNEVEN = (
    *("--training.global_batch_size", 7, "--training.micro_batch_size", 1),
    *("--optimizer.grad_clip", 0.5, "--optimizer.adamw_scale", 0.3),
)
"""On three ranks two of them have no row in the last micro-batch."""


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return launch_jobs.write_config(tmp_path_factory.mktemp("deepspeed"))


@pytest.fixture(scope="module")
def fsdp2(config: Path) -> Path:
    """A complete run of 8 steps on 2 ranks, by the other engine."""
    launch_jobs.succeed(2, config, "--output", config.parent / "fsdp2")
    return config.parent / "fsdp2"


@pytest.fixture(scope="module")
def whole(config: Path) -> list[Path]:
    """The same by DeepSpeed, a run for each stage."""
    folders = [config.parent / f"zero{stage}" for stage in STAGES]
    for stage, folder in zip(STAGES, folders, strict=True):
        succeed(2, config, stage, "--output", folder)
    return folders


def zero_job(*arguments: str) -> Result:
    """Runs a job in this process, in which other engines may have been."""
    zero.settle()
    return launch_jobs.job(*arguments)


def train(world: int, config: Path, stage: int, *arguments: Any) -> list[Result]:
    """Runs a job on DeepSpeed's engine and returns how it ended on each rank."""
    engine = ("--engine", "deepspeed", "--deepspeed.stage", stage)
    results: list[Result] = ranks.run(world, zero_job, *map(str, (config, *engine, *arguments)))
    return results


def succeed(world: int, config: Path, stage: int, *arguments: Any) -> str:
    results = train(world, config, stage, *arguments)
    assert [result.code for result in results] == [0] * world, results
    return results[0].out


def farthest(one: Path, other: Path, key: str) -> float:
    """The greatest distance between two runs' values in any step."""
    pairs = zip(metrics(one), metrics(other), strict=True)
    return max(abs(a[key] - b[key]) for a, b in pairs if a[key] is not None)


def assert_close(one: Path, other: Path, tolerance: float) -> None:
    for key in ("loss", "val_loss", "grad_norm"):
        distance = farthest(one, other, key)
        print(one.name, other.name, key, distance)
        assert distance < tolerance
    for key in ("lr", "tokens"):
        assert farthest(one, other, key) == 0


def test_every_stage_follows_fsdp2(fsdp2: Path, whole: list[Path]) -> None:
    for folder in whole:
        assert metrics(folder)[0].keys() == metrics(fsdp2)[0].keys()
        assert_close(folder, fsdp2, 1e-5)
    runs = (fsdp2, *whole)
    held = [json.loads((run / "summary.json").read_text())["state_bytes"] for run in runs]
    # Stage 0 has all states on both ranks. In stages 1 and 2 a matrix's basis is on one rank, in
    # stage 3 and under FSDP2 on both; moments are on one in all of them.
    assert held[1] == pytest.approx(2 * held[2], rel=0.01)  # but for counts of steps
    assert held[2] == held[3] < held[4] == held[0]


def test_resumes_bit_for_bit(config: Path, whole: list[Path], tmp_path: Path) -> None:
    for stage, folder in zip(STAGES, whole, strict=True):
        parts = tmp_path / folder.name
        shutil.copytree(folder, parts)
        shutil.rmtree(parts / "checkpoints" / "step-00000008")
        printed = succeed(2, config, stage, "--output", parts, "--resume")
        assert "step-00000004" in printed
        assert curve(parts) == curve(folder)


@pytest.mark.thorough
def test_uneven_ranks_clip_and_accumulate_alike(config: Path, tmp_path: Path) -> None:
    brief = (*UNEVEN, "--training.steps", 5, "--checkpoint.interval", 0)
    launch_jobs.succeed(3, config, "--output", tmp_path / "fsdp2", *brief)
    for stage in CLASSES:
        succeed(3, config, stage, "--output", tmp_path / f"{stage}", *brief)
        assert_close(tmp_path / f"{stage}", tmp_path / "fsdp2", 1e-4)


@pytest.mark.parametrize(
    ("stage", "arguments"),
    [
        (2, ("--optimizer.name", "adamw")),
        (3, ("--model.architecture", "gpt2", "--model.tie_word_embeddings", "true")),
        (3, ("--training.activation_checkpointing", "true")),
    ],
)
@pytest.mark.thorough
def test_variants_follow_fsdp2(
    config: Path, tmp_path: Path, stage: int, arguments: tuple[Any, ...]
) -> None:
    brief = (*arguments, "--training.steps", 4, "--checkpoint.interval", 0)
    launch_jobs.succeed(2, config, "--output", tmp_path / "fsdp2", *brief)
    succeed(2, config, stage, "--output", tmp_path / "zero", *brief)
    assert_close(tmp_path / "zero", tmp_path / "fsdp2", 1e-4)


@pytest.mark.thorough
def test_bfloat16_follows_fsdp2(config: Path, tmp_path: Path) -> None:
    """Its master weights begin with rounded ones, which FSDP2's do not."""
    brief = ("--training.compute_dtype", "bfloat16", "--training.micro_batch_size", 2)
    launch_jobs.succeed(2, config, "--output", tmp_path / "fsdp2", *brief)
    for stage in CLASSES:
        succeed(2, config, stage, "--output", tmp_path / f"{stage}", *brief)
        assert_close(tmp_path / f"{stage}", tmp_path / "fsdp2", 0.01)


def test_a_user_s_json_is_merged(config: Path, fsdp2: Path, tmp_path: Path) -> None:
    zero = {"stage": 2, "round_robin_gradients": True, "reduce_bucket_size": 500}
    file = tmp_path / "zero.json"
    file.write_text(json.dumps({"zero_optimization": zero, "wall_clock_breakdown": False}))
    run = tmp_path / "run"
    printed = succeed(2, config, 2, "--output", run, "--deepspeed.config", file)
    assert "ZeRO stage 2" in printed
    assert "q_proj" in printed  # the report, of the first step
    assert_close(run, fsdp2, 1e-5)


def build(config: str, output: str, stage: int, dtype: str) -> tuple[Any, Any]:
    """An engine, and a micro-batch for this rank."""
    zero.settle()
    from conda_dist.launch.job.deepspeed_engine import DeepSpeedEngine

    given = ["--output", output, "--training.compute_dtype", dtype, "--optimizer.update_proj_gap=2"]
    loaded = options.load(config, [*given, "--engine=deepspeed", f"--deepspeed.stage={stage}"])
    rows = torch.arange(4 * 33).reshape(4, 33).numpy() + dist.get_rank()
    return DeepSpeedEngine(loaded, 400, process_group.join(60.0)), rows


def finite(loss: float, norm: float) -> bool:
    return math.isfinite(loss) and math.isfinite(norm)


def _spoil(block: Any, args: Any, output: torch.Tensor) -> None:
    if output.requires_grad:
        output.register_hook(lambda grad: grad * math.nan)


def _skipped(*arguments: Any) -> tuple[list[Any], list[float], list[bool]]:
    """Steps that are not taken: a good one, by decision, and one with a NaN on one rank.

    Returns what the steps said, the loss before, between and after them, and whether the optimizer
    state was the same before and after.
    """
    engine, rows = build(*arguments)
    for _ in range(2):
        engine.forward_backward([rows], 256)
        assert engine.step(finite).skipped is None
    losses, states = [engine.evaluate([rows], 256)], [_state(engine)]

    def step(take: Any) -> Any:
        engine.forward_backward([rows], 256)
        result = engine.step(take)
        losses.append(engine.evaluate([rows], 256))
        states.append(_state(engine))
        return result.grad_norm, result.skipped

    said = [step(lambda loss, norm: False)]
    if dist.get_rank() == 1:
        block = engine._engine.module.model.layers[1]
        hook = block.register_forward_hook(_spoil)
    said.append(step(finite))
    if dist.get_rank() == 1:
        hook.remove()
    said.append(step(finite))  # as the first would have been, had it been taken
    return said, losses, [_equal(states[0], state) for state in states[1:]]


def _state(engine: Any) -> list[torch.Tensor]:
    """Copies of what the optimizer keeps."""
    kept = engine._engine.basic_optimizer.state.values()
    return [t.clone() for state in kept for t in state.values() if isinstance(t, torch.Tensor)]


def _equal(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return len(one) == len(other) and all(map(torch.equal, one, other))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("stage", STAGES)
def test_a_skipped_step_updates_nothing(
    config: Path, tmp_path: Path, stage: int, dtype: str
) -> None:
    for said, losses, same in ranks.run(2, _skipped, str(config), str(tmp_path), stage, dtype):
        (norm, where), (bad, traced), (again, taken) = said
        assert where is not None
        assert not math.isfinite(bad)
        assert traced == "the gradient of rank 1 is not finite"
        assert taken is None
        assert again == norm
        assert losses[0] == losses[1] == losses[2] > losses[3]
        assert same == [True, True, False]


def bad_zero_job(*arguments: str) -> Result:
    """A job of which rank 1 has two bad steps: 3, and 5."""
    zero.settle()
    return injected.job("bad steps", 1, 3, *arguments)


def test_bad_steps_are_skipped_and_resumed(config: Path, tmp_path: Path) -> None:
    """Whether step 5 is bad depends on the steps before the checkpoint, of step 4."""
    engine = ("--engine", "deepspeed", "--deepspeed.stage", 2)
    skipping = ("--training.skip_factor", 20, "--training.skip_window", 3)
    words = [str(word) for word in (config, *engine, *skipping, "--output", tmp_path)]
    for again in ([], ["--resume"]):
        results = ranks.run(2, bad_zero_job, *words, *again)
        assert [result.code for result in results] == [0, 0], results
        assert "skipped step 5: the gradient's norm is " in results[0].out
        if not again:
            whole = curve(tmp_path)
            shutil.rmtree(tmp_path / "checkpoints" / "step-00000008")
    assert curve(tmp_path) == whole
    assert [line["skipped"] for line in metrics(tmp_path)] == [0, 0, 1, 1, 2, 2, 2, 2]


def _blocked(folder: Path, *arguments: Any) -> str:
    """What saving says where one rank cannot write its file."""
    engine, rows = build(*arguments)
    engine.forward_backward([rows], 256)
    engine.step(finite)
    try:
        engine.save(folder)
    except JobError as error:
        return str(error)
    return "saved"


def test_a_rank_that_cannot_write_fails_them_all(config: Path, tmp_path: Path) -> None:
    (tmp_path / "deepspeed" / "zero_pp_rank_1_mp_rank_00_optim_states.pt").mkdir(parents=True)
    said = ranks.run(2, _blocked, tmp_path, str(config), str(tmp_path), 2, "float32")
    assert said[0] == said[1]
    assert "failed on rank 1" in said[0]


@pytest.mark.parametrize(
    ("world", "stage", "arguments", "words"),
    [
        (1, 2, (), "ranks 2 there, 1 here"),
        (3, 3, (), "Start 2 ranks with --deepspeed.stage 3"),
        (2, 2, ("--training.compute_dtype", "bfloat16"), "dtype float32 there, bfloat16 here"),
    ],
)
def test_a_checkpoint_of_other_partitions_is_refused(
    config: Path, whole: list[Path], world: int, stage: int, arguments: tuple[Any, ...], words: str
) -> None:
    steps = ("--output", whole[stage], "--resume", *arguments)
    for result in train(world, config, stage, *steps):
        assert result.code == 1
        assert words in result.err


def test_a_checkpoint_of_another_engine_or_stage_is_refused(
    config: Path, fsdp2: Path, whole: list[Path]
) -> None:
    for result in train(2, config, 2, "--output", fsdp2, "--resume"):
        assert result.code == 2
        assert "engine (fsdp2 there, deepspeed here)" in result.err
    for result in train(2, config, 1, "--output", whole[2], "--resume"):
        assert result.code == 1
        assert "stage 2 there, 1 here" in result.err
    assert [len(complete_checkpoints(run / "checkpoints")) for run in (fsdp2, whole[2])] == [2, 2]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "it cannot be read: No such file"),
        ("{", "it is not valid JSON"),
        ("[1]", "an object is wanted"),
        ('{"zero_optimization": 3}', "zero_optimization = 3: an object is wanted"),
        ('{"zero_optimization": {"stage": 3}}', "give --deepspeed.stage 3"),
        ('{"zero_optimization": {"compute_grad_norm": false}}', "the job needs the norm"),
        ('{"zero_optimization": {"stages": 3}}', "DeepSpeed does not take the settings in"),
        ('{"zero_optimization": {"zenflow": {}}}', "it replaces the optimizer's step"),
        (
            '{"train_batch_size": 8, "scheduler": {}, "gradient_clipping": 1.0}',
            "'train_batch_size' is set by training.global_batch_size; 'scheduler' is set by "
            "[schedule]; 'gradient_clipping' is set by optimizer.grad_clip",
        ),
    ],
)
def test_a_user_s_json_is_checked(
    config: Path, tmp_path: Path, content: str | None, words: str
) -> None:
    file = tmp_path / "zero.json"
    if content is not None:
        file.write_text(content)
    output = tmp_path / "new" / "out"
    first, second = train(2, config, 2, "--output", output, "--deepspeed.config", file)
    assert (first.code, second.code) == (2, 2)
    assert words in first.err  # what is found before the ranks join is said once a host
    assert not output.parent.exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--engine", "horovod"], "'fsdp2' or 'deepspeed'"),
        (["--deepspeed.stage", "1"], "has no effect: the engine is fsdp2"),
        (
            ["--engine=deepspeed", "--deepspeed.stage", "4"],
            "deepspeed.stage = '4': must be less than or equal to 3",
        ),
        (["--engine=deepspeed", "--optimizer.name", "muon"], "set it to conda or adamw"),
        (["--engine=deepspeed", "--optimizer.name", "soap"], "optimizer.name soap is not supp"),
        (["--engine=deepspeed", "--training.hsdp_replicas", "2"], "training.hsdp_replicas"),
        (["--engine=deepspeed", "--training.compile", "true"], "training.compile"),
    ],
)
def test_options(arguments: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        options.load(None, arguments)
