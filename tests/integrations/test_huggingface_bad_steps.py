"""Trainers of Hugging Face that skip bad steps."""

import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import ranks
from conda_dist.runtime.dtensor import local
from hugging import BATCH, GAP, RATE, fsdp_on_cpus, language_model, settle, texts

os.environ["DS_ACCELERATOR"] = "cpu"


@pytest.fixture(scope="module", autouse=True)
def _own_processes() -> Iterator[None]:
    """Accelerate keeps what it knows of a process for good."""
    ranks.close()
    yield
    ranks.close()


def _spoilt(model: Any, factors: dict[int, float], first: int) -> Any:
    """Multiplies the gradient of a model's loss in some steps, on the last rank."""
    steps = itertools.count(first + 1)

    def spoil(module: Any, args: Any, output: Any) -> None:
        step = next(steps) if output.loss.requires_grad else 0
        if step in factors and dist.get_rank() == dist.get_world_size() - 1:
            output.loss.register_hook(lambda gradient: gradient * factors[step])

    model.register_forward_hook(spoil)
    return model


BAD = {3: float("nan"), 6: 1e4}
"""Steps, and what their gradients are multiplied by."""


def _skipping(
    folder: Path, resume: bool, factors: dict[int, float], sharded: bool
) -> tuple[list[dict[str, str]], list[Tensor], list[Tensor]]:
    """What a Trainer logs that skips bad steps, its weights, and the moments of its optimizer."""
    settle()
    import transformers

    from conda_dist.integrations.bad_steps import skip_bad_steps
    from conda_dist.integrations.huggingface import conda_for_trainer

    with fsdp_on_cpus(sharded):
        arguments = transformers.TrainingArguments(
            output_dir=str(folder),
            learning_rate=RATE,
            max_steps=8,
            per_device_train_batch_size=BATCH // dist.get_world_size(),
            logging_steps=1,
            save_steps=4,
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
            fsdp=sharded,
            fsdp_config={"transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]},
        )
        trainer = transformers.Trainer(
            _spoilt(language_model(), factors, 4 if resume else 0),
            arguments,
            train_dataset=texts(),
            optimizer_cls_and_kwargs=conda_for_trainer(arguments, update_proj_gap=GAP),
        )
        callback = skip_bad_steps(trainer, factor=20.0, window=4, limit=1)
        trainer.train(resume_from_checkpoint=str(folder / "checkpoint-4") if resume else None)
        assert callback.skipped == 2
    # As text: a NaN is not equal to another.
    history = [line for line in trainer.state.log_history if "loss" in line]
    lines = [{key: repr(line[key]) for key in sorted(line)} for line in history]
    weights = [local(param.detach()).clone() for param in trainer.model.parameters()]
    states = trainer.optimizer.optimizer.state.values()
    moments = [local(state["exp_avg"]) for state in states if "exp_avg" in state]
    return lines, weights, moments


@pytest.mark.parametrize("sharded", [False, True])
def test_the_trainer_skips_bad_steps(tmp_path: Path, sharded: bool) -> None:
    """DDP and FSDP2. Step 6 is compared with 1, 2, 4 and 5, also after a resume from 4."""
    whole = ranks.run(2, _skipping, tmp_path, False, BAD, sharded)
    lines, weights, moments = whole[0]
    assert [line["skipped_steps"] for line in lines] == list("00111222")
    norms, losses = ([float(line[key]) for line in lines] for key in ("grad_norm", "loss"))
    assert norms[5] > 100 * norms[4]
    assert losses[-1] < losses[0]
    assert all(tensor.isfinite().all() for tensor in (*weights, *moments))
    again, resumed, kept = ranks.run(2, _skipping, tmp_path, True, BAD, sharded)[0]
    assert again == lines
    for ours, theirs in zip((*resumed, *kept), (*weights, *moments), strict=True):
        assert torch.equal(ours, theirs)


def _hopeless(folder: Path) -> str:
    """What a Trainer says whose gradients are all NaN from a step on."""
    try:
        _skipping(folder, False, dict.fromkeys(range(3, 9), float("nan")), False)
    except RuntimeError as error:
        return str(error)
    return "trained"


def test_the_trainer_ends_after_too_many_bad_steps(tmp_path: Path) -> None:
    for said in ranks.run(2, _hopeless, tmp_path):
        assert said.startswith(
            "step 4: the gradient's norm is nan; 2 in a row; up to 1 are skipped"
        )


def _trained_anew(folder: Path) -> tuple[list[int], str]:
    """Steps skipped in each of two trainings, and what a third says whose norm nobody is told."""
    settle()
    import transformers

    from conda_dist.integrations.bad_steps import skip_bad_steps

    arguments = transformers.TrainingArguments(
        str(folder), max_steps=2, save_strategy="no", report_to=[], disable_tqdm=True, use_cpu=True
    )
    model = _spoilt(language_model(), {2: float("nan")}, 0)
    trainer = transformers.Trainer(model, arguments, train_dataset=texts())
    callback = skip_bad_steps(trainer)
    counts = []
    for _ in range(2):
        trainer.train()
        counts.append(callback.skipped)
    del trainer.accelerator.clip_grad_norm_  # as where the Trainer has made another accelerator
    try:
        trainer.train()
    except RuntimeError as error:
        return counts, str(error)
    return counts, "trained"


def test_bad_steps_of_each_training_are_counted_anew(tmp_path: Path) -> None:
    """And where the Trainer does not compute the norm where it is watched, that is an error."""
    ((counts, said),) = ranks.run(1, _trained_anew, tmp_path)
    assert counts == [1, 0]
    assert said.startswith("step 1: skip_bad_steps cannot judge it")
