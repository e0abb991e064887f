"""State dicts in memory and in one file: whole, sharded, of every dtype and basis placement."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

import models
import ranks
from conda_dist.runtime import dtensor
from models import FSDP2, GAP, PLAIN, Layout

SAVED, LAST = GAP + 2, 2 * GAP + 2
LAYOUTS: list[Layout] = [("fsdp", (2,)), ("fsdp", (3,)), ("hsdp", (2, 2)), ("grid", (2, 2))]


def _trained(layout: Layout, steps: int = SAVED, **options: Any) -> tuple[Any, Any]:
    model, optimizer = models.build(layout, **options)
    models.train(model, optimizer, range(steps))
    return model, optimizer


def _all(model: Any, optimizer: Any) -> dict[str, torch.Tensor]:
    return models.snapshot(model, optimizer, models.whole)


WAYS = [(False, False, False), (False, True, True), (True, False, True), (True, True, False)]
"""cpu_offload, broadcast_from_rank0 and flatten_optimizer_state_dict."""


OLD_BROADCAST = torch.__version__.startswith(("2.11.", "2.12."))
"""torch 2.11's full_tensor() of uneven column shards is a view of its padded rows, and its
dist.broadcast over gloo sends such a view wrongly; 2.13's and later ones are contiguous."""


def _contiguous(part: Any) -> Any:
    if isinstance(part, dict):
        return {key: _contiguous(value) for key, value in part.items()}
    return part.contiguous() if isinstance(part, torch.Tensor) else part


def _full_round_trips(layout: Layout, ways: list[tuple[bool, ...]], **sizes: int) -> list[str]:
    """Gathers and loads in these ways; what was gathered or loaded wrong."""
    model, optimizer = _trained(layout, **sizes)
    before = models.snapshot(model, optimizer)
    problems = []
    for offload, broadcast, flat in ways:
        case = f"offload {offload}, broadcast {broadcast}: "
        gather = StateDictOptions(
            full_state_dict=True, cpu_offload=offload, flatten_optimizer_state_dict=flat
        )
        parts = list(get_state_dict(model, optimizer, options=gather))
        if OLD_BROADCAST:
            parts = [_contiguous(part) for part in parts]
        if offload:  # torch gives the whole to the first rank only
            if bool(parts[1]) != (dist.get_rank() == 0):
                problems.append(case + "gathered on the wrong ranks")
            if not broadcast:
                dist.broadcast_object_list(parts)
        elif broadcast and dist.get_rank():
            parts = [{}, {}]
        spread = StateDictOptions(
            full_state_dict=True, cpu_offload=offload, broadcast_from_rank0=broadcast
        )
        resumed, loaded = models.build(layout, seed=1, **sizes)
        set_model_state_dict(resumed, parts[0], options=spread)
        set_optimizer_state_dict(resumed, loaded, parts[1], options=spread)
        problems += [case + n for n in models.unequal(models.snapshot(resumed, loaded), before)]
    return problems


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_full_state_dict(layout: Layout) -> None:
    # torch cannot take a whole tensor apart into uneven _StridedShards, which the moments of a
    # wide weight have on a grid that divides it unevenly.
    sizes = {"width": 8, "hidden": 24} if layout[0] == "grid" else {}
    world = torch.Size(layout[1]).numel()
    ways = WAYS if layout == LAYOUTS[0] else WAYS[:2] if layout[0] == "hsdp" else WAYS[2:]
    trip = partial(_full_round_trips, layout, ways, **sizes)
    for problems in ranks.run(world, trip, timeout=60):
        assert not problems


def _whole_into_shards(layout: Layout, plain: dict[str, Any]) -> tuple[list[str], list[str]]:
    """Loads a plain optimizer's state dict as it is, and gives one back."""
    model, optimizer = models.build(layout)
    optimizer.load_state_dict(plain)
    loaded = {k: v for k, v in _all(model, optimizer).items() if ":" in k}
    alone, other = models.build(PLAIN)
    other.load_state_dict(plain)
    there = {k: v for k, v in _all(alone, other).items() if ":" in k}
    # And back: DTensors into an optimizer of plain tensors.
    last, back = models.build(PLAIN)
    back.load_state_dict(optimizer.state_dict())
    again = {k: v for k, v in _all(last, back).items() if ":" in k}
    return models.unequal(loaded, there), models.unequal(again, there)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_whole_tensors_into_shards_and_back(layout: Layout) -> None:
    _, optimizer = _trained(PLAIN)
    world = torch.Size(layout[1]).numel()
    for there, back in ranks.run(
        world, _whole_into_shards, layout, optimizer.state_dict(), timeout=60
    ):
        assert not there
        assert not back


VARIANTS: dict[str, dict[str, Any]] = {
    "float32": {},
    "bfloat16": {"dtype": torch.bfloat16},
    "bfloat16 moments": {"state_dtype": torch.bfloat16},
    "bfloat16 throughout": {"dtype": torch.bfloat16, "state_dtype": torch.bfloat16},
    "float64": {"dtype": torch.float64},
    "float64 moments": {"state_dtype": torch.float64},
    "split bases": {"basis_budget": 0},
    "rate in a tensor": {"lr": torch.tensor(1e-2)},
    "few bytes": {"basis_budget": 500, "buffer_bytes": 1},
}


SAVED_BY_DCP = (
    "float32",
    "bfloat16 throughout",
    "float64 moments",
    "rate in a tensor",
    "few bytes",
)


def _resume(layout: Layout, folder: Path, how: str) -> list[str]:
    """Saves, loads and goes on in every variant; what differs from the run that went on."""
    problems = []
    rank = dist.get_rank() if dist.is_initialized() else 0
    for variant in VARIANTS if how == "plain" else SAVED_BY_DCP:
        options = VARIANTS[variant]
        model, optimizer = _trained(layout, **options)
        # Allocated already, or not at all: both kinds of optimizer must take it.
        resumed, loaded = models.build(layout, seed=1, **options)
        if how == "dcp":
            models.save(folder / variant, model, optimizer)
            models.load(folder / variant, resumed, loaded)
        else:
            file = folder / f"{variant}.{rank}"
            torch.save([model.state_dict(), optimizer.state_dict()], file)
            parts = torch.load(file, weights_only=True)
            resumed.load_state_dict(parts[0])
            loaded.load_state_dict(parts[1])
        states = models.snapshot(model, optimizer)
        lost = models.unequal(models.snapshot(resumed, loaded), states)
        dtypes = {str(states[k].dtype) for k in states if k.endswith(("exp_avg", "exp_avg_sq"))}
        expected = options.get("state_dtype", options.get("dtype", torch.float32))
        if "state_dtype" not in options:
            expected = torch.promote_types(expected, torch.float32)
        if dtypes != {str(expected)}:
            lost.append(f"moments are {dtypes}")
        for with_ in ((model, optimizer), (resumed, loaded)):
            models.train(*with_, range(SAVED, LAST))
        lost += models.unequal(models.snapshot(resumed, loaded), models.snapshot(model, optimizer))
        problems += [f"{variant}: {name}" for name in lost]
    return problems


@pytest.mark.parametrize("how", ["dcp", "plain"])
@pytest.mark.thorough
def test_every_dtype_and_option_is_bit_identical(tmp_path: Path, how: str) -> None:
    for problems in ranks.run(2, _resume, FSDP2, tmp_path / ".", how, timeout=60):
        assert not problems
    (tmp_path / "alone").mkdir()
    assert not _resume(PLAIN, tmp_path / "alone", how)


PLACEMENTS: list[dict[str, Any]] = [
    {"basis_budget": None},
    {"basis_budget": 0},
    {"basis_budget": 1500},
]


def _placements(layout: Layout, folder: Path) -> list[str]:
    """Saves with bases in each place, loads into each other; what was lost."""
    problems, kept = [], set()
    placed = [
        [row["basis"] for row in models.build(layout, **options)[1].report(show=False)]
        for options in PLACEMENTS
    ]
    for i, saved in enumerate(PLACEMENTS):
        model, optimizer = _trained(layout, **saved)
        models.save(folder / str(i), model, optimizer)
        start, ended = _all(model, optimizer), {}
        kept.add(tuple(row["basis"] for row in optimizer.report(show=False)))
        for j, loading in enumerate(PLACEMENTS):
            if i == j:
                continue
            resumed, loaded = models.build(layout, seed=1, **loading)
            if j == 1:  # by torch's state dicts in memory, the others from disk
                resumed.load_state_dict(model.state_dict())
                loaded.load_state_dict(optimizer.state_dict())
            else:
                models.load(folder / str(i), resumed, loaded)
            case = f"{saved} to {loading}: "
            problems += [case + name for name in models.unequal(_all(resumed, loaded), start)]
            if [row["basis"] for row in loaded.report(show=False)] != placed[j]:
                problems.append(case + "bases are not where this optimizer puts them")
            models.train(resumed, loaded, range(SAVED, LAST))
            ended[case] = _all(resumed, loaded)
        models.train(model, optimizer, range(SAVED, LAST))
        unbroken = _all(model, optimizer)
        for case, there in ended.items():
            if (distance := models.farthest(there, unbroken, start)) > 1e-4:
                problems.append(f"{case}went {distance} of the way elsewhere")
    if len(kept) != len(PLACEMENTS):
        problems.append("the placements tested do not differ")
    return problems


@pytest.mark.thorough
def test_bases_move_between_placements(tmp_path: Path) -> None:
    for problems in ranks.run(4, _placements, ("hsdp", (2, 2)), tmp_path, timeout=60):
        assert not problems


def _other_dtype(layout: Layout, folder: Path) -> list[str]:
    """Loads moments of one dtype into an optimizer that keeps them in another."""
    problems = []
    dtypes = (torch.bfloat16, torch.float32, torch.float64)
    for saved, kept in zip(dtypes, dtypes[1:] + dtypes[:1], strict=True):
        model, optimizer = _trained(layout, state_dtype=saved)
        models.save(folder / str(saved), model, optimizer)
        wide = torch.promote_types(kept, torch.float32)
        expected = {
            key: value.to(
                kept if ":exp" in key else wide if key.endswith(":basis") else value.dtype
            )
            for key, value in models.snapshot(model, optimizer).items()
        }
        for way in ("dcp", "plain"):
            resumed, loaded = models.build(layout, seed=1, state_dtype=kept)
            if way == "dcp":
                models.load(folder / str(saved), resumed, loaded)
            else:
                resumed.load_state_dict(model.state_dict())
                loaded.load_state_dict(optimizer.state_dict())
            lost = models.unequal(models.snapshot(resumed, loaded), expected)
            problems += [f"{way} {saved} to {kept}: {name}" for name in lost]
    return problems


def test_states_keep_the_dtype_of_the_optimizer(tmp_path: Path) -> None:
    for problems in ranks.run(2, _other_dtype, FSDP2, tmp_path, timeout=60):
        assert not problems


def _other_mesh() -> list[str]:
    """Loads DTensors of another mesh of the same ranks, without a file between."""
    model, optimizer = _trained(("hsdp", (2, 2)))
    resumed, loaded = models.build(("fsdp", (4,)), seed=1)
    loaded.load_state_dict(optimizer.state_dict())
    ours, theirs = _all(resumed, loaded), _all(model, optimizer)
    return [name for name in models.unequal(ours, theirs) if ":" in name]


def test_states_of_another_mesh() -> None:
    for problems in ranks.run(4, _other_mesh, timeout=60):
        assert not problems


def _shares_memory(optimizer: Any, tensors: list[torch.Tensor]) -> bool:
    theirs = {t.untyped_storage().data_ptr() for t in map(dtensor.local, tensors) if t.numel()}
    return any(
        dtensor.local(value).untyped_storage().data_ptr() in theirs
        for state in optimizer.state.values()
        for value in state.values()
        if value.numel()
    )


def _aliases(layout: Layout) -> list[str]:
    """Loads; then what was loaded from changes, which must not be seen."""
    problems = []
    _, optimizer = _trained(layout)
    frozen = "blocks.0.q.weight"
    for used in (False, True):
        resumed, loaded = models.build(layout, seed=1)
        if used:
            models.train(resumed, loaded, range(1))
        dict(resumed.named_parameters())[frozen].requires_grad_(False)
        given = optimizer.state_dict()
        loaded.load_state_dict(given)
        tensors = [value for state in given["state"].values() for value in state.values()]
        if _shares_memory(loaded, tensors):
            problems.append(f"shares memory, used {used}")
    return problems


def test_loading_does_not_share_memory() -> None:
    assert not _aliases(PLAIN)
    for problems in ranks.run(2, _aliases, FSDP2, timeout=60):
        assert not problems
