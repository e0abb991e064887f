"""torch's distributed checkpoints on disk: saved on one layout, resumed on another."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.tensor import DTensor

import models
import ranks
from conda_dist import Conda
from models import FSDP2, GAP, PLAIN, Layout

SAVED, LAST = (GAP, GAP + 1, GAP + 2), 3 * GAP
"""Steps taken when saving: right before a refresh, right after it, and in between."""
LAYOUTS: list[Layout] = [
    ("fsdp", (1,)),
    ("fsdp", (2,)),
    ("fsdp", (3,)),
    ("fsdp", (4,)),
    ("hsdp", (2, 2)),
    ("grid", (2, 2)),
]
TOLERANCE = 1e-4
"""Of the distance travelled since the checkpoint: what another order of summation may cost."""


def _groups(optimizer: Any) -> list[dict[str, Any]]:
    return [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]


def _run(folder: Path, layout: Layout, saved: tuple[int, ...]) -> None:
    """The run that never stops; leaves checkpoints, and what came of it, in ``folder``."""
    model, optimizer = models.build(layout)
    rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
    for step in range(LAST):
        models.train(model, optimizer, [step])
        for group in optimizer.param_groups:
            group["lr"] = 0.01 / (step + 2)
        if step + 1 in saved:
            models.save(folder / str(step + 1), model, optimizer)
            whole = models.snapshot(model, optimizer, models.whole)
            torch.save(whole, folder / f"{step + 1}.whole{rank}")
            torch.save(_groups(optimizer), folder / f"{step + 1}.groups{rank}")
    torch.save(models.snapshot(model, optimizer), folder / f"last.rank{rank}")
    torch.save(models.snapshot(model, optimizer, models.whole), folder / f"last.whole{rank}")


@pytest.fixture(scope="module")
def from_two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of a run on two ranks with FSDP2."""
    folder = tmp_path_factory.mktemp("two")
    ranks.run(2, _run, folder, FSDP2, SAVED, timeout=60)
    return folder


@pytest.fixture(scope="module")
def from_one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a run on one process without torch.distributed."""
    folder = tmp_path_factory.mktemp("one")
    _run(folder, PLAIN, SAVED[-1:])
    return folder


def _go_on(model: Any, optimizer: Any, step: int) -> None:
    """The steps from the checkpoint to the end, the first at the rate that was saved."""
    while step < LAST:
        models.train(model, optimizer, [step])
        step += 1
        for group in optimizer.param_groups:
            group["lr"] = 0.01 / (step + 1)


def _resume_here(folder: Path, saved: int) -> list[str]:
    """Goes on where the run was on this layout; what is not as in the run that never stopped."""
    model, optimizer = models.build(FSDP2, seed=1)
    models.load(folder / str(saved), model, optimizer)
    _go_on(model, optimizer, saved)
    rank = torch.distributed.get_rank()
    return models.unequal(
        models.snapshot(model, optimizer), torch.load(folder / f"last.rank{rank}")
    )


@pytest.mark.parametrize("saved", SAVED)
def test_same_layout_is_bit_identical(from_two: Path, saved: int) -> None:
    for differing in ranks.run(2, _resume_here, from_two, saved, timeout=60):
        assert not differing


def _resume(folder: Path, layout: Layout, used: bool = False) -> tuple[list[str], float]:
    """Goes on on another layout.

    Args:
        folder: from :func:`_run`.
        layout: where to go on.
        used: whether the optimizer has taken steps of its own before it loads.

    Returns:
        What was not loaded bit for bit; the distance from the run that never stopped.
    """
    saved = SAVED[-1]
    model, optimizer = models.build(layout, seed=1, lr=5.0, betas=(0.0, 0.0), scale=7.0)
    if used:
        models.train(model, optimizer, range(50, 52))
    models.load(folder / str(saved), model, optimizer)
    start = torch.load(folder / f"{saved}.whole0")
    lost = models.unequal(models.snapshot(model, optimizer, models.whole), start)
    if _groups(optimizer) != torch.load(folder / f"{saved}.groups0"):
        lost.append("the groups are not those that were saved")
    _go_on(model, optimizer, saved)
    ended = models.snapshot(model, optimizer, models.whole)
    return lost, models.farthest(ended, torch.load(folder / "last.whole0"), start)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_resume_on_another_layout(from_two: Path, layout: Layout) -> None:
    for lost, distance in ranks.run(math.prod(layout[1]), _resume, from_two, layout, timeout=60):
        assert not lost
        assert distance < TOLERANCE


def test_resume_without_torch_distributed(from_two: Path) -> None:
    assert not torch.distributed.is_initialized()
    lost, distance = _resume(from_two, PLAIN)
    assert not lost
    assert distance < TOLERANCE


@pytest.mark.parametrize("layout", [("fsdp", (2,)), ("fsdp", (3,)), ("grid", (2, 2))], ids=str)
def test_resume_what_one_process_saved(from_one: Path, layout: Layout) -> None:
    for lost, distance in ranks.run(math.prod(layout[1]), _resume, from_one, layout, timeout=60):
        assert not lost
        assert distance < TOLERANCE


def test_loading_replaces_all_that_was_there(from_two: Path) -> None:
    """An optimizer that has already trained forgets it: basis, moments and counts."""
    lost, distance = _resume(from_two, PLAIN, used=True)
    assert not lost
    assert distance < TOLERANCE


def _states(layout: Layout) -> tuple[list[str], list[str]]:
    """The keys of all states, and what is wrong with their tensors."""
    model, optimizer = models.build(layout)
    models.train(model, optimizer, range(1))
    wrong, keys = [], []
    for name, param in model.named_parameters():
        for key, value in optimizer.state[param].items():
            keys.append(f"{name}:{key}")
            if key in ("step", "basis_step"):
                right = type(value) is torch.Tensor and value.device.type == "cpu"
                batch = tuple(param.shape[:-2]) if key == "basis_step" else ()
                right &= tuple(value.shape) == batch and value.dtype == torch.float32
            else:
                r = min(param.shape[-2:])
                shape = (*param.shape[:-2], r, r) if key == "basis" else tuple(param.shape)
                right = isinstance(value, DTensor) and value.device_mesh == param.device_mesh
                right &= tuple(value.shape) == shape
            if not right:
                wrong.append(f"{name}:{key} {type(value)} {tuple(value.shape)}")
    return keys, wrong


@pytest.mark.parametrize("layout", [("fsdp", (4,)), ("hsdp", (2, 2)), ("grid", (2, 2))], ids=str)
def test_states_are_dtensors_with_the_same_keys_everywhere(layout: Layout) -> None:
    answers = ranks.run(4, _states, layout, timeout=60)
    assert all(wrong == [] for _, wrong in answers)
    assert all(keys == answers[0][0] for keys, _ in answers)
    keys = answers[0][0]
    assert {k.split(":")[1] for k in keys if k.startswith("blocks.0.experts")} == {
        "step",
        "exp_avg",
        "exp_avg_sq",
        "basis",
        "basis_step",
    }
    assert {k.split(":")[1] for k in keys if k.startswith("head")} == {
        "step",
        "exp_avg",
        "exp_avg_sq",
    }


def _before_the_first_step(folder: Path, layout: Layout, reported: bool) -> list[str]:
    """Saves an optimizer that has done nothing, loads it into another, and trains both."""
    model, optimizer = models.build(layout)
    fresh, untouched = models.build(layout)
    if reported:
        optimizer.report(show=False)
    start = models.snapshot(model, optimizer)
    models.save(folder, model, optimizer)  # torch takes a step of zero gradients for this
    primed = models.snapshot(model, optimizer)
    problems = models.unequal({name: primed[name] for name in start}, start)
    for name, param in model.named_parameters():
        state = optimizer.state[param]
        if set(state) < {"step", "exp_avg", "exp_avg_sq"} or state["step"] != 0:
            problems.append(f"{name}: step counted or state missing")
        if "basis_step" in state and (state["basis_step"] != -1).any():
            problems.append(f"{name}: has a basis")
    resumed, loaded = models.build(layout, seed=1)
    if reported:
        loaded.report(show=False)
    models.load(folder, resumed, loaded)
    ends = []
    for trained, with_ in ((model, optimizer), (fresh, untouched), (resumed, loaded)):
        models.train(trained, with_, range(GAP + 2))
        ends.append(models.snapshot(trained, with_))
    return problems + models.unequal(ends[0], ends[1]) + models.unequal(ends[0], ends[2])


def test_saved_before_the_first_step(tmp_path: Path) -> None:
    for problems in ranks.run(
        2, _before_the_first_step, tmp_path / "two", FSDP2, False, timeout=60
    ):
        assert not problems
    assert not _before_the_first_step(tmp_path / "one", PLAIN, False)


def test_a_report_before_the_first_step_does_not_spoil_saving(tmp_path: Path) -> None:
    """torch takes an optimizer whose ``state`` is not empty for one that has its state."""
    assert not _before_the_first_step(tmp_path / "one", PLAIN, True)


def _frozen(folder: Path) -> list[str]:
    """A parameter that is never trained has no state, and needs none."""
    pairs = []
    for seed in range(2):
        model, optimizer = models.build(FSDP2, seed=seed)
        model.blocks[0].up.weight.requires_grad_(False)
        model.blocks[1].q.bias.requires_grad_(False)
        pairs.append((model, optimizer))
    models.train(*pairs[0], range(GAP + 1))
    models.save(folder, *pairs[0])
    models.load(folder, *pairs[1])
    for pair in pairs:
        models.train(*pair, range(GAP + 1, LAST))
    return models.unequal(*(models.snapshot(*pair) for pair in pairs))


def test_frozen_parameters(tmp_path: Path) -> None:
    for differing in ranks.run(2, _frozen, tmp_path, timeout=60):
        assert not differing


def _other_order(folder: Path) -> tuple[list[str], list[str]]:
    """Loads by name into an optimizer whose groups list the parameters backwards."""
    model, optimizer = models.build(PLAIN, seed=1)
    groups = [
        {"params": list(zip(g["param_names"], g["params"], strict=True))[::-1], **kept}
        for g in optimizer.param_groups
        for kept in [{"algorithm": g["algorithm"]}]
    ]
    other = Conda(groups, **models.SETTINGS)
    models.load(folder / str(SAVED[-1]), model, other)
    lost = models.unequal(
        models.snapshot(model, other, models.whole), torch.load(folder / f"{SAVED[-1]}.whole0")
    )
    shapes = {name: tuple(param.shape) for name, param in model.named_parameters()}
    misnamed = [r["name"] for r in other.report(show=False) if shapes[r["name"]] != r["shape"]]
    return lost, misnamed


def test_parameters_in_another_order(from_two: Path) -> None:
    """States go by name, and each parameter keeps its own name afterwards."""
    lost, misnamed = _other_order(from_two)
    assert not lost
    assert not misnamed
