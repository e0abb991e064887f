"""Checkpoints without the state of some parameters, which were frozen: those start afresh."""

import copy
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
)

import models
import ranks
from conda_dist.rules.conda import CondaRule
from models import FSDP2, GAP, PLAIN, Layout

SAVED, LAST = GAP + 2, 2 * GAP + 2
FROZEN = ["blocks.0.experts", "blocks.1.q.weight", "norm.weight"]


def _freeze(model: Any, frozen: bool) -> None:
    for name, param in model.named_parameters():
        if name in FROZEN:
            param.requires_grad_(not frozen)


def _unfrozen(layout: Layout, **options: Any) -> tuple[Any, Any]:
    """Trained with some parameters frozen, which now are not."""
    model, optimizer = models.build(layout, **options)
    _freeze(model, True)
    models.train(model, optimizer, range(SAVED))
    _freeze(model, False)
    return model, optimizer


def _warned(action: Any, *args: Any) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        action(*args)
    return [str(w.message) for w in caught if "has no state of" in str(w.message)]


def _all_are_listed(said: list[str]) -> bool:
    return len(said) == 1 and all(name in said[0] for name in FROZEN) and "head" not in said[0]


def _plain(layout: Layout, kind: type[torch.optim.Optimizer], used: int) -> list[str]:
    """By ``load_state_dict``: what differs from the run that never stopped."""
    model, optimizer = _unfrozen(layout, optimizer=kind)
    resumed, loaded = models.build(layout, optimizer=kind, seed=1)
    models.train(resumed, loaded, range(used))
    resumed.load_state_dict(model.state_dict())
    given = copy.deepcopy(optimizer.state_dict())  # AdamW would go on sharing its tensors
    said = _warned(loaded.load_state_dict, given)
    problems = []
    if kind is models.Conda and not _all_are_listed(said):
        problems.append(f"warned {said}")
    for with_ in ((model, optimizer), (resumed, loaded)):
        models.train(*with_, range(SAVED, LAST))
    ended = models.snapshot(model, optimizer)
    return problems + models.unequal(ended, models.snapshot(resumed, loaded))


@pytest.mark.parametrize("used", [0, 2])
def test_unfrozen_before_saving(used: int) -> None:
    """As with AdamW, also into an optimizer that has a state of them already."""
    for kind in (torch.optim.AdamW, models.Conda):
        assert not _plain(PLAIN, kind, used)
    for problems in ranks.run(2, _plain, FSDP2, models.Conda, used, timeout=60):
        assert not problems


def test_a_state_that_was_thrown_away_or_never_made() -> None:
    """A parameter added after the last step has none; neither has one whose state was deleted."""
    model, optimizer = models.build(PLAIN)
    models.train(model, optimizer, range(SAVED))
    del optimizer.state[model.head.weight]
    optimizer.add_param_group({"params": [("new.weight", torch.nn.Parameter(torch.ones(3, 4)))]})
    _, loaded = models.build(PLAIN)
    loaded.add_param_group({"params": [("new.weight", torch.nn.Parameter(torch.ones(3, 4)))]})
    (said,) = _warned(loaded.load_state_dict, optimizer.state_dict())
    assert "no state of head.weight, new.weight," in said


@pytest.mark.parametrize("frozen_here", [True, False])
def test_what_needs_no_warning(frozen_here: bool) -> None:
    """Parameters that are frozen here, too; and a checkpoint of before the first step."""
    _, optimizer = _unfrozen(PLAIN) if frozen_here else models.build(PLAIN)
    model, loaded = models.build(PLAIN)
    _freeze(model, frozen_here)
    assert not _warned(loaded.load_state_dict, optimizer.state_dict())


def _tools(folder: Path) -> list[str]:
    """By torch's tools for distributed checkpoints, which decide it by ``strict``."""
    return [problem for kind in KINDS for problem in _by_tools(folder / kind.__name__, kind)]


KINDS: list[type[torch.optim.Optimizer]] = [torch.optim.AdamW, models.Conda]


def _by_tools(folder: Path, kind: type[torch.optim.Optimizer]) -> Iterator[str]:
    model, optimizer = _unfrozen(FSDP2, optimizer=kind)
    ended = {}
    parts = dict(zip(("model", "optim"), get_state_dict(model, optimizer), strict=True))
    dcp.save(parts, checkpoint_id=str(folder))
    for case in ("strict", "lenient", "lenient, full", "lenient, flat", "strict, file", "file"):
        whole, flat = "full" in case, "flat" in case
        saving = StateDictOptions(full_state_dict=whole, flatten_optimizer_state_dict=flat)
        strict = StateDictOptions(
            full_state_dict=whole, flatten_optimizer_state_dict=flat, strict="strict" in case
        )
        resumed, loaded = models.build(FSDP2, optimizer=kind, seed=1)
        given = get_optimizer_state_dict(model, optimizer, options=saving)
        if "file" in case:
            given = get_optimizer_state_dict(resumed, loaded)
            planner = DefaultLoadPlanner(allow_partial_load="strict" not in case)
            read = {"optim": given}
            said = models.attempt(
                lambda read=read, planner=planner: dcp.load(
                    read, checkpoint_id=str(folder), planner=planner
                )
            )
            if "strict" in case:
                if "Missing key" not in said:
                    yield f"{kind} {case}: {said}"
                continue
        resumed.load_state_dict(model.state_dict())
        said = models.attempt(
            lambda given=given, strict=strict, with_=(resumed, loaded): set_optimizer_state_dict(
                *with_, copy.deepcopy(given), options=strict
            )
        )
        if "strict" in case:
            if "Missing optimizer state for parameter" not in said:
                yield f"{kind} {case}: {said}"
            continue
        if case != "lenient" and kind is torch.optim.AdamW:
            continue  # its states are those of a step of zeros that counts, or empty dicts
        if said != "nothing was raised":
            yield f"{kind} {case}: {said}"
            continue
        models.train(resumed, loaded, range(SAVED, LAST))
        ended[case] = models.snapshot(resumed, loaded)
    models.train(model, optimizer, range(SAVED, LAST))
    unbroken = models.snapshot(model, optimizer)
    for case, there in ended.items():
        yield from (f"{kind} {case}: {name}" for name in models.unequal(there, unbroken))


def test_strict_decides_with_torchs_tools(tmp_path: Path) -> None:
    for problems in ranks.run(2, _tools, tmp_path, timeout=60):
        assert not problems


# Options that were added later


def _without_added(layout: Layout, folder: str, route: str) -> list[str]:
    """Loads a checkpoint whose groups lack these keys; says what has gone wrong."""
    added = CondaRule.added
    model, optimizer = models.build(layout)
    models.train(model, optimizer, range(SAVED))
    resumed, loaded = models.build(layout, seed=1, **dict.fromkeys(added, True))
    whole = StateDictOptions(full_state_dict=route == "whole")
    if route == "plain":
        given = copy.deepcopy(optimizer.state_dict())
    else:
        given = get_optimizer_state_dict(model, optimizer, options=whole)
    for group in given["param_groups"]:
        for key in added:
            del group[key]
    if route == "plain":
        loaded.load_state_dict(given)
    elif route == "dcp":
        dcp.save(given, checkpoint_id=folder)
        read = get_optimizer_state_dict(resumed, loaded)
        planner = DefaultLoadPlanner(allow_partial_load=True)
        dcp.load(read, checkpoint_id=folder, planner=planner)
        set_optimizer_state_dict(resumed, loaded, read)
    else:
        set_optimizer_state_dict(resumed, loaded, given, options=whole)
    groups = loaded.param_groups
    problems = [f"{key} {g[key]}" for g in groups for key in added if g[key] is not True]
    taken = {int(state["step"]) for state in loaded.state_dict()["state"].values()}
    return problems if taken == {SAVED} else [*problems, f"steps {taken}"]


@pytest.mark.parametrize("route", ["plain", "whole", "sharded", "dcp"])
def test_options_that_are_newer_than_a_checkpoint_stay(route: str, tmp_path: Path) -> None:
    assert not _without_added(PLAIN, str(tmp_path / "1"), route)
    for problems in ranks.run(2, _without_added, FSDP2, str(tmp_path / "2"), route):
        assert not problems
