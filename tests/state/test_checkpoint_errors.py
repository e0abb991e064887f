"""Checkpoints that do not fit are refused on every rank, and nothing is changed by trying."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

import models
import ranks
from conda_dist import Conda, param_groups
from models import FSDP2, GAP, PLAIN, Layout

SAVED, LAST = GAP + 2, 2 * GAP + 2
WHOLE = StateDictOptions(full_state_dict=True)
Q = "blocks.0.q.weight"


def _trained(layout: Layout, **options: Any) -> tuple[Any, Any]:
    model, optimizer = models.build(layout, **options)
    models.train(model, optimizer, range(SAVED))
    return model, optimizer


def _index(optimizer: Any, name: str) -> int:
    """The number torch gives a parameter in a state dict."""
    names = [name for group in optimizer.param_groups for name in group["param_names"]]
    return names.index(name)


def _adamw(layout: Layout, one_group: bool) -> dict[str, Any]:
    """AdamW's state dict, with the groups of Conda or with a single one."""
    model, optimizer = models.build(layout, optimizer=torch.optim.AdamW)
    if not one_group:
        groups = [{k: g[k] for k in ("params",)} for g in param_groups(model)]
        optimizer = torch.optim.AdamW(groups)
    models.train(model, optimizer, range(2))
    return optimizer.state_dict()


def _other_path(layout: Layout) -> dict[str, Any]:
    """All groups on the adamw path but the last."""
    model, optimizer = models.build(layout)
    groups = [{**g, "algorithm": "adamw"} for g in optimizer.param_groups]
    optimizer = Conda([{k: g[k] for k in ("params", "param_names", "algorithm")} for g in groups])
    models.train(model, optimizer, range(2))
    return optimizer.state_dict()


def _without(optimizer: Any, name: str, *keys: str) -> dict[str, Any]:
    given = optimizer.state_dict()
    index = _index(optimizer, name)
    kept = {k: v for k, v in given["state"][index].items() if k not in keys}
    return {**given, "state": {**given["state"], index: kept}}


BAD: dict[str, tuple[Callable[[Layout, Any], dict[str, Any]], list[str]]] = {
    "AdamW": (lambda layout, _: _adamw(layout, False), ["not written by Conda"]),
    "AdamW, one group": (lambda layout, _: _adamw(layout, True), ["not written by Conda"]),
    "other shapes": (
        lambda layout, _: _trained(layout, width=12)[1].state_dict(),
        ["blocks.0.experts", "(3, 12, 6)", "(3, 10, 6)", "another model"],
    ),
    "another path": (
        lambda layout, _: _other_path(layout),
        ["blocks.0.experts", "adamw path", "conda path"],
    ),
    "states of others": (
        lambda _, o: {**o.state_dict(), "state": {99: o.state_dict()["state"][0]}},
        ["of none of this optimizer's", "blocks.0.experts"],
    ),
    "a basis missing": (lambda _, o: _without(o, Q, "basis"), [Q, "basis"]),
    "a moment missing": (
        lambda _, o: _without(o, "head.weight", "exp_avg"),
        ["head.weight", "exp_avg"],
    ),
    "bases and a moment missing": (
        lambda _, o: _without(o, Q, "basis", "basis_step", "exp_avg"),
        [Q, "exp_avg", "damaged"],
    ),
    "other groups": (
        lambda _, o: {**o.state_dict(), "param_groups": o.state_dict()["param_groups"][:1]},
        ["parameter groups"],
    ),
}
"""State dicts that must be refused, and what must be said of each."""


def _refusals(layout: Layout) -> dict[str, list[str]]:
    """Loads every bad state dict; what was not said, or was changed."""
    model, optimizer = _trained(layout)
    twin, other = _trained(layout)
    before = models.snapshot(model, optimizer)
    groups = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
    problems: dict[str, list[str]] = {}
    for case, (make, expected) in BAD.items():
        said = models.attempt(optimizer.load_state_dict, make(layout, optimizer))
        found = [f"{said!r} lacks {part!r}" for part in expected if part not in said]
        if not said.startswith("ValueError"):
            found.append(f"raised {said}")
        found += models.unequal(models.snapshot(model, optimizer), before)
        now = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
        if now != groups:
            found.append("the groups were changed")
        if found:
            problems[case] = found
    # The optimizer is as good as new: it goes on as one that was never asked.
    for with_ in ((model, optimizer), (twin, other)):
        models.train(*with_, range(SAVED, LAST))
    if models.unequal(models.snapshot(model, optimizer), models.snapshot(twin, other)):
        problems["afterwards"] = ["trains differently"]
    return problems


def test_what_does_not_fit_is_refused() -> None:
    assert not _refusals(PLAIN)
    for problems in ranks.run(2, _refusals, FSDP2, timeout=60):
        assert not problems


def test_a_model_state_dict_is_refused() -> None:
    """Not a KeyError of our own making."""
    model, optimizer = _trained(PLAIN)
    with pytest.raises(ValueError, match="optimizer"):
        optimizer.load_state_dict(model.state_dict())


def _save_bad(folder: Path) -> None:
    models.save(folder / "good", *_trained(FSDP2))
    models.save(folder / "other shapes", *_trained(FSDP2, width=12))
    model, optimizer = models.build(FSDP2, optimizer=torch.optim.AdamW)
    models.train(model, optimizer, range(2))
    models.save(folder / "AdamW", model, optimizer)
    model, _ = models.build(FSDP2)
    groups = param_groups(model)
    optimizer = torch.optim.AdamW([{"params": g["params"]} for g in groups])
    models.train(model, optimizer, range(2))
    models.save(folder / "AdamW, our groups", model, optimizer)


@pytest.fixture(scope="module")
def bad(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """DCP checkpoints, good and bad."""
    folder = tmp_path_factory.mktemp("bad")
    ranks.run(2, _save_bad, folder, timeout=60)
    for which in ("truncated", "no metadata", "file missing"):
        shutil.copytree(folder / "good", folder / which)
    for file in (folder / "truncated").glob("__1_*.distcp"):
        data = file.read_bytes()
        file.write_bytes(data[: len(data) // 2])
    (folder / "no metadata" / ".metadata").unlink()
    for file in (folder / "file missing").glob("__1_*.distcp"):
        file.unlink()
    return folder


DAMAGED = ("truncated", "no metadata", "file missing")
MISFITS = ("other shapes", "AdamW", "AdamW, our groups")


def _load_bad(folder: Path, layout: Layout) -> dict[str, tuple[str, list[str]]]:
    """What loading each bad checkpoint says, and what it changed."""
    model, optimizer = _trained(layout)
    before = models.snapshot(model, optimizer)
    return {
        case: (
            models.attempt(models.load, folder / case, model, optimizer),
            models.unequal(models.snapshot(model, optimizer), before),
        )
        for case in (*MISFITS, *DAMAGED)
    }


@pytest.mark.parametrize("layout", [FSDP2, ("fsdp", (3,))], ids=str)
def test_bad_files_are_refused_on_every_rank(bad: Path, layout: Layout) -> None:
    """torch reads straight into parameters and states, so only a plan can fail without a trace."""
    for answers in ranks.run(layout[1][0], _load_bad, bad, layout, timeout=60):
        for case, (said, changed) in answers.items():
            assert said != "nothing was raised", case
            if case in MISFITS:
                assert "optim." in said or "size mismatch" in said.lower(), (case, said)
                assert not changed, case


def _regrouped(model: Any) -> Conda:
    """An optimizer with the adamw group first, and a square weight in it."""
    conda, adamw = (g["params"] for g in param_groups(model))
    moved = [pair for pair in conda if pair[0] == Q]
    rest = [pair for pair in conda if pair[0] != Q]
    groups = [
        {"params": moved + adamw, "algorithm": "adamw"},
        {"params": rest, "algorithm": "conda"},
    ]
    return Conda(groups, **models.SETTINGS)


def test_moments_of_another_path_are_not_taken() -> None:
    """torch maps a saved group to the last of ours that shares a parameter with it.

    So the adamw group, listed first, is given the hyperparameters of the saved adamw group, and
    only its state can tell that the square weight was on the conda path.
    """
    model, optimizer = _trained(PLAIN)
    state = get_optimizer_state_dict(model, optimizer)
    with pytest.raises(ValueError, match=Q):
        set_optimizer_state_dict(model, _regrouped(model), state)


def _other_paths_on_disk(folder: Path) -> tuple[str, list[str]]:
    """A square weight leaves the conda path between saving and loading."""
    model, optimizer = _trained(FSDP2)
    models.save(folder, model, optimizer)
    moved = Conda(param_groups(model, adamw=[Q]), **models.SETTINGS)
    said = models.attempt(models.load, folder, model, moved)
    names = [group["param_names"] for group in moved.param_groups]
    return said, [] if [len(n) for n in names] == [7, 8] else [f"names are {names}"]


def test_moments_of_another_path_are_not_taken_from_disk(tmp_path: Path) -> None:
    """Through DCP, which reads only the keys it is asked for, and so no basis of that weight."""
    for said, problems in ranks.run(2, _other_paths_on_disk, tmp_path, timeout=60):
        assert said.startswith("ValueError: ")
        assert "not written by Conda" not in said
        assert not problems


def test_names_in_another_order_are_not_confused() -> None:
    """Two weights of one shape have changed places: by number, each would get the other's."""
    model, optimizer = _trained(PLAIN)
    given = optimizer.state_dict()
    groups = param_groups(model)
    pairs = groups[0]["params"]
    places = {name: i for i, (name, _) in enumerate(pairs)}
    i, j = places[Q], places["blocks.1.q.weight"]
    pairs[i], pairs[j] = pairs[j], pairs[i]
    other = Conda(groups, **models.SETTINGS)
    said = models.attempt(other.load_state_dict, given)
    if said == "nothing was raised":
        for param, state in optimizer.state.items():
            for key, value in state.items():
                assert torch.equal(other.state[param][key], value), key
    else:
        assert Q in said


def _unfreeze(layout: Layout) -> list[str]:
    """A parameter is frozen when its state is loaded, and trained later on."""
    model, optimizer = _trained(layout)
    plain = get_optimizer_state_dict(model, optimizer, options=WHOLE)
    problems = []
    for name in ("blocks.0.down.weight", Q, "blocks.0.q.bias"):
        resumed, loaded = models.build(layout)
        resumed.load_state_dict(model.state_dict())
        frozen = dict(resumed.named_parameters())[name].requires_grad_(False)
        # Whole plain tensors by number: what a plain torch.load of one file gives.
        states = dict(enumerate(_by_number(loaded, plain)))
        loaded.load_state_dict({**loaded.state_dict(), "state": states})
        models.train(resumed, loaded, range(0))
        frozen.requires_grad_(True)
        said = models.attempt(models.train, resumed, loaded, range(SAVED, SAVED + 1))
        if said != "nothing was raised":
            problems.append(f"{name}: {said}")
            continue
        twin, other = _trained(layout)
        models.train(twin, other, range(SAVED, SAVED + 1))
        problems += [
            f"{name}: {n}"
            for n in models.unequal(models.snapshot(resumed, loaded), models.snapshot(twin, other))
        ]
    return problems


def _by_number(optimizer: Any, plain: dict[str, Any]) -> list[Any]:
    return [plain["state"][name] for g in optimizer.param_groups for name in g["param_names"]]


def test_frozen_when_loaded_and_trained_later() -> None:
    for problems in ranks.run(2, _unfreeze, FSDP2, timeout=60):
        assert not problems


def test_parameters_added_after_loading() -> None:
    """The new one starts from nothing, the others go on as if it were not there."""
    model, optimizer = _trained(PLAIN)
    resumed, loaded = models.build(PLAIN)
    resumed.load_state_dict(model.state_dict())
    loaded.load_state_dict(optimizer.state_dict())
    torch.manual_seed(3)
    added = torch.nn.Parameter(torch.randn(8, 4))
    loaded.add_param_group({"params": [("added", added)]})
    models.train(model, optimizer, range(SAVED, LAST))
    for step in range(SAVED, LAST):
        added.grad = models.gradient("added", added, step)
        models.train(resumed, loaded, [step])
    assert not models.unequal(models.snapshot(model, optimizer), models.snapshot(resumed, loaded))
    assert loaded.state[added]["step"] == LAST - SAVED
    assert loaded.state[added]["basis_step"] == 0


def test_another_gap_after_resuming() -> None:
    """The group's gap counts from where the checkpoint left off."""
    model, optimizer = _trained(PLAIN)
    resumed, loaded = models.build(PLAIN, update_proj_gap=100)
    resumed.load_state_dict(model.state_dict())
    loaded.load_state_dict(optimizer.state_dict())
    state = loaded.state[resumed.blocks[0].q.weight]
    assert {group["update_proj_gap"] for group in loaded.param_groups} == {GAP}
    for group in loaded.param_groups:
        group["update_proj_gap"] = 4
    taken = []
    for step in range(SAVED, SAVED + 8):
        models.train(resumed, loaded, [step])
        taken.append(int(state["basis_step"]))
    # Steps taken before each: 5 (one was due at 4, after the basis of 3), 6, 7, 8, ... 12.
    assert taken == [5, 5, 5, 8, 8, 8, 8, 12]


@pytest.mark.parametrize("options", [{}, {"basis_budget": 0}], ids=["all ranks", "groups"])
def test_async_save_keeps_what_was(tmp_path: Path, options: dict[str, Any]) -> None:
    """Training goes on while torch writes: the file has the states of the moment of saving.

    torch's thread must have a group of its own: on gloo, collectives that two threads start on one
    group meet those of other ranks in another order, which hangs, with or without Conda.
    """
    for problems in ranks.run(2, _async, tmp_path, options, timeout=60):
        assert not problems


def _async(folder: Path, options: dict[str, Any]) -> list[str]:
    group = dist.new_group()
    model, optimizer = _trained(FSDP2, **options)
    before = models.snapshot(model, optimizer)
    state = {"optim": get_optimizer_state_dict(model, optimizer), "model": model.state_dict()}
    future = dcp.async_save(state, checkpoint_id=str(folder), process_group=group)
    models.train(model, optimizer, range(SAVED, LAST))
    future.result()
    resumed, loaded = models.build(FSDP2, seed=1, **options)
    models.load(folder, resumed, loaded)
    return models.unequal(models.snapshot(resumed, loaded), before)
