"""torchtitan's checkpoints of Conda: saved on one layout, resumed on another."""

import functools
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load

import titan_jobs
from titan_jobs import (
    CONDA,
    EP,
    FSDP,
    FSDP_TP,
    HSDP,
    ONE,
    PP,
    STEPS,
    Layout,
    distance,
    losses,
    trajectory,
)

SAVED = 4
"""The step of the checkpoint: between two refreshes, so that bases and moments both matter."""

SYNC = "disabled"
"""torchtitan's mode of asynchronous checkpoints, for those that are not."""

DENSE, MOE, BFLOAT16 = 5e-5, 1e-3, 3e-3
"""Relative tolerances of losses, as in test_torchtitan.py; without the optimizer's state the dense
model's are 8e-4 away."""


@functools.cache
def saved(layout: Layout, config: str, mode: str) -> tuple[Path, list[float]]:
    """A run that saved a checkpoint on its way, and its losses."""
    output = titan_jobs.folder() / f"saved-{layout}-{config}-{mode}"
    runs = titan_jobs.run(
        layout,
        config,
        *CONDA,
        f"--dump_folder={output}",
        f"--checkpoint.interval={SAVED}",
        f"--checkpoint.async_mode={mode}",
    )
    return output, losses(runs)


def resume(layout: Layout, config: str, output: Path, *options: str) -> list[float]:
    """The losses of a run that goes on from it.

    torchtitan's loader resumes on as many readers only, so the data begin where they must.
    """
    runs = titan_jobs.run(
        layout,
        config,
        *CONDA,
        f"--dump_folder={output}",
        f"--checkpoint.load_step={SAVED}",
        "--checkpoint.load_only",
        *(options or ["--checkpoint.exclude_from_loading=dataloader"]),
        start=SAVED,
    )
    assert [step.step for step in runs[-1].steps] == [*range(SAVED + 1, STEPS + 1)]
    return losses(runs)


@pytest.mark.parametrize(
    ("before", "mode", "after"),
    [(FSDP, SYNC, PP), (PP, SYNC, FSDP_TP), (FSDP, "async", HSDP)],
    ids=str,
)
@pytest.mark.thorough
def test_resumed_on_another_layout(before: Layout, mode: str, after: Layout) -> None:
    output, uninterrupted = saved(before, "llama3", mode)
    expected = trajectory(ONE, "llama3")
    assert distance(uninterrupted, expected) < DENSE
    assert distance(resume(after, "llama3", output), expected[SAVED:]) < DENSE


def test_resumed_on_the_same_layout_bit_for_bit() -> None:
    output, uninterrupted = saved(FSDP, "llama3", SYNC)
    assert resume(FSDP, "llama3", output) == uninterrupted[SAVED:]


@pytest.mark.thorough
def test_saved_asynchronously() -> None:
    """The same tensors, bit for bit."""
    output, uninterrupted = saved(FSDP, "llama3", "async")
    other, expected = saved(FSDP, "llama3", SYNC)
    assert uninterrupted == expected
    ours, theirs = read(output, SAVED, ""), read(other, SAVED, "")
    assert ours.keys() == theirs.keys()
    assert any("exp_avg" in name for name in ours)
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name


@pytest.mark.thorough
def test_experts_saved_by_expert_parallel_ranks() -> None:
    output, uninterrupted = saved(EP, "qwen3_moe", SYNC)
    assert distance(uninterrupted, trajectory(ONE, "qwen3_moe")) < MOE
    assert distance(resume(ONE, "qwen3_moe", output), uninterrupted[SAVED:]) < MOE


def test_the_optimizer_state_matters() -> None:
    """Else losses that go on as before would say nothing about it."""
    output, uninterrupted = saved(FSDP, "llama3", SYNC)
    without = "--checkpoint.exclude_from_loading=dataloader,optimizer"
    assert distance(resume(ONE, "llama3", output, without), uninterrupted[SAVED:]) > 10 * DENSE


def read(output: Path, step: int, wanted: str) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint whose names contain ``wanted``."""
    folder = output / f"checkpoint/step-{step}"
    described = FileSystemReader(folder).read_metadata().state_dict_metadata
    state = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in described.items()
        if wanted in name and isinstance(entry, TensorStorageMetadata)
    }
    load(state, checkpoint_id=folder, no_dist=True)
    return state


@pytest.mark.thorough
def test_bfloat16_trains_alike_and_its_state_is_float32() -> None:
    output = titan_jobs.folder() / "bfloat16"
    options = ("--training.dtype=bfloat16", f"--dump_folder={output}")
    runs = titan_jobs.run(FSDP, "llama3", *CONDA, *options)
    assert distance(losses(runs), trajectory(ONE, "llama3")) < BFLOAT16
    weight = "layers.0.attention.wo.weight"
    state = read(output, STEPS, f"state.{weight}.")
    dtypes = {name.rpartition(".")[2]: tensor.dtype for name, tensor in state.items()}
    assert {"step", "exp_avg", "exp_avg_sq", "basis"} <= dtypes.keys()
    assert set(dtypes.values()) == {torch.float32}
    assert read(output, STEPS, weight)[weight].dtype == torch.bfloat16


@pytest.mark.thorough
def test_load_balancing_runs_once_a_step() -> None:
    """torchtitan's hook before the step moves the experts' biases; after AdamW's first as much."""
    biases = []
    for name, options in (("stock", ()), ("conda", CONDA)):
        output = titan_jobs.folder() / f"biases-{name}"
        saving = (f"--dump_folder={output}", "--training.steps=1")
        titan_jobs.run(ONE, "deepseek_v3", *options, *saving)
        biases.append(read(output, 1, "expert_bias"))
    assert biases[0].keys() == biases[1].keys()
    moved = [(biases[0][key], biases[1][key]) for key in biases[0]]
    assert moved
    for stock, conda in moved:
        assert stock.abs().max() > 0
        torch.testing.assert_close(conda, stock, rtol=0, atol=0)
