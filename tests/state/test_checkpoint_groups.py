"""Checkpoints of two explicit groups load into one group, and of one group into two, by name."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

import models
import ranks
from conda_dist import Conda
from models import FSDP2, GAP, PLAIN, Layout

SAVED, LAST = GAP + 2, 2 * GAP + 2


def _build(layout: Layout, groups: int, seed: int = 0) -> tuple[Any, Any]:
    model, optimizer = models.build(layout, seed=seed)
    if groups == 1:
        optimizer = Conda(model.named_parameters(), **models.SETTINGS)
    assert len(optimizer.param_groups) == groups
    return model, optimizer


def _trained(layout: Layout, groups: int) -> tuple[Any, Any]:
    model, optimizer = _build(layout, groups)
    models.train(model, optimizer, range(SAVED))
    for group in optimizer.param_groups:  # what the checkpoint says counts, not the constructor
        group["lr"] = 5e-3
    return model, optimizer


def _go_on(ours: tuple[Any, Any], other: tuple[Any, Any]) -> list[str]:
    """What differs of two runs after some more steps."""
    for model, optimizer in (ours, other):
        models.train(model, optimizer, range(SAVED, LAST))
    return models.unequal(models.snapshot(*ours), models.snapshot(*other))


@pytest.mark.parametrize("groups", [1, 2])
def test_state_dict(groups: int) -> None:
    ours, other = _trained(PLAIN, groups), _build(PLAIN, 3 - groups, seed=1)
    other[0].load_state_dict(ours[0].state_dict())
    other[1].load_state_dict(copy.deepcopy(ours[1].state_dict()))
    assert [group["lr"] for group in other[1].param_groups] == [5e-3] * (3 - groups)
    algorithms = [group["algorithm"] for group in other[1].param_groups]
    assert algorithms == ([None] if groups == 2 else ["conda", "adamw"])
    assert not _go_on(ours, other)


FORMS = ["nested", "flat", "nested, file", "flat, file"]


def _by_tools(groups: int, form: str, folder: Path) -> list[str]:
    options = StateDictOptions(flatten_optimizer_state_dict="flat" in form)
    ours, other = _trained(FSDP2, groups), _build(FSDP2, 3 - groups, seed=1)
    other[0].load_state_dict(ours[0].state_dict())
    given = copy.deepcopy(get_optimizer_state_dict(*ours, options=options))
    if "file" in form:
        dcp.save({"optim": given}, checkpoint_id=str(folder))
        read = {"optim": get_optimizer_state_dict(*other, options=options)}
        dcp.load(read, checkpoint_id=str(folder))
        given = read["optim"]
    set_optimizer_state_dict(*other, given, options=options)
    assert [group["lr"] for group in other[1].param_groups] == [5e-3] * (3 - groups)
    return _go_on(ours, other)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("form", FORMS)
def test_distributed_checkpoints(groups: int, form: str, tmp_path: Path) -> None:
    if groups == 1 and form == "nested, file":
        # torch's planner has no hyperparameters for the second group, and says so.
        for said in ranks.run(2, models.attempt, _by_tools, groups, form, tmp_path, timeout=60):
            assert "Missing key in checkpoint state_dict: optim.param_groups.1" in said
        return
    for problems in ranks.run(2, _by_tools, groups, form, tmp_path, timeout=60):
        assert not problems


@pytest.mark.parametrize(
    ("key", "value"),
    [("lr", 1e-3), ("betas", (0.9, 0.95)), ("weight_decay", 0.0), ("initial_lr", 0.3)],
)
def test_groups_that_differ(key: str, value: Any) -> None:
    """One group cannot hold two values; nothing is changed. The other way round it can."""
    _, optimizer = _trained(PLAIN, 2)
    for group in optimizer.param_groups:
        group["initial_lr"] = 0.1
    optimizer.param_groups[1][key] = value
    first = optimizer.param_groups[0][key]
    other = _build(PLAIN, 1)
    before = copy.deepcopy(other[1].state_dict())
    with pytest.raises(ValueError, match="which one group cannot hold") as caught:
        other[1].load_state_dict(optimizer.state_dict())
    said = str(caught.value)
    assert f"{key} {first} in group 0 (of blocks.0." in said
    assert f"and {value} in group 1 (of " in said
    assert other[1].state_dict() == before


@pytest.mark.parametrize(
    ("group", "key", "value"),
    [(1, "scale", 0.5), (1, "update_proj_gap", 7), (0, "adamw_scale", 0.5), (1, "name", "rest")],
)
def test_values_of_no_effect(group: int, key: str, value: Any) -> None:
    """A factor of the other path is no difference, nor is a text that a framework keeps."""
    ours, other = _trained(PLAIN, 2), _build(PLAIN, 1, seed=1)
    expected = ours[1].param_groups[1 - group].get(key)
    ours[1].param_groups[group][key] = value
    other[0].load_state_dict(ours[0].state_dict())
    other[1].load_state_dict(copy.deepcopy(ours[1].state_dict()))
    assert other[1].param_groups[0].get(key) in (expected, "rest")
    assert not _go_on(ours, other)


def test_differences_that_torch_hides() -> None:
    """torch's tools give one group the hyperparameters of one saved group: there is a warning."""
    model, optimizer = _trained(PLAIN, 2)
    optimizer.param_groups[1]["lr"] = 1e-3
    other = _build(PLAIN, 1)
    with pytest.warns(UserWarning, match="group 0 was saved as several groups"):
        set_optimizer_state_dict(*other, get_optimizer_state_dict(model, optimizer))


def test_without_names() -> None:
    """Positions in other groups say nothing."""
    _, optimizer = _trained(PLAIN, 2)
    saved = optimizer.state_dict()
    for group in saved["param_groups"]:
        del group["param_names"]
    with pytest.raises(ValueError, match=r"or with the names of the parameters on both sides\."):
        _build(PLAIN, 1)[1].load_state_dict(saved)
