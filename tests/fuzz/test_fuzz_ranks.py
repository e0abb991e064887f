"""The same on ranks: any mesh and placements, equal to one process or refused by all alike."""

import hashlib
import logging
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

import models
import ranks
from conda_dist.plan import compute_groups
from fuzz import Case, Param, examples, problem, run
from fuzz_cases import sound, spoilt

Answer = tuple[str, str, str]
"""What a rank raised; what is wrong with what it came to; a hash of the parameters."""
PATIENCE = 40.0
"""Seconds until ranks count as hanging; a case takes a fraction of one."""


def _placement(word: str, strides: int) -> Placement:
    kind, dim = word[0], int(word[1:] or 0)
    match kind:
        case "S":
            return Shard(dim)
        case "T":
            return _StridedShard(dim, split_factor=strides)
        case "P":
            return Partial()
    return Replicate()


def _attempt(case: Case, sizes: tuple[int, ...], others: dict[int, Case], group: bool) -> Answer:
    """Trains on a mesh; some ranks may have cases of their own."""
    logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)
    mesh = init_device_mesh("cpu", sizes)
    mine = others.get(dist.get_rank(), case)

    def place(spec: Param, values: Tensor, gradient: bool) -> Tensor:
        if spec.places is None:
            return values
        start: list[Placement] = [Replicate()] * mesh.ndim
        places = [_placement(word, sizes[-1]) for word in spec.places]
        if "P" in spec.places:
            return DTensor.from_local(values, mesh, places, run_check=False)
        if gradient and spec.partial:
            values = values / mesh.size()
            start = [Partial()] * mesh.ndim
            places = [Partial() if p.is_replicate() else p for p in places]
        return DTensor.from_local(values, mesh, start, run_check=False).redistribute(mesh, places)

    more = {"process_group": dist.group.WORLD} if group else {}
    if case.group_size is None:
        came = run(mine, place, **more)
    else:
        size = case.group_size
        with mock.patch.object(compute_groups, "group_size", lambda _, ranks: min(size, ranks)):
            came = run(mine, place, **more)
    failed = torch.tensor(isinstance(came, Exception))
    said = f"{type(came).__name__}: {came}" if failed else ""
    dist.all_reduce(failed, op=dist.ReduceOp.MAX)
    if failed:
        return said or "nothing was raised", "", ""
    wholes = [models.whole(tensor) for tensor in came]
    # Packed first: the one element of a tensor may have a stride, of which view complains.
    packed = (torch.cat([w.flatten()]).view(torch.uint8) for w in wholes)
    content = b"".join(bits.numpy().tobytes() for bits in packed)
    wrong = "" if dist.get_rank() else problem(case, wholes)
    return "", wrong, hashlib.sha256(content).hexdigest()


def judge(case: Case, answers: list[Answer], alike: bool = True) -> str:
    """What is wrong with what the ranks came to; "" if nothing is."""
    errors = {said for said, _, _ in answers}
    if "nothing was raised" in errors:
        return f"some ranks raised, others did not: {errors}"
    if errors != {""}:
        # Before a plan is made nobody has told the others, and each says it of itself.
        if len(errors) > 1:
            return f"ranks raised different errors: {errors}"
        kind, _, text = errors.pop().partition(": ")
        known = {"TypeError": TypeError, "ValueError": ValueError, "RuntimeError": RuntimeError}
        return problem(case, known.get(kind, Exception)(text))
    if len({digest for _, _, digest in answers}) > 1:
        return "ranks have different parameters"
    return answers[0][1]


MESHES = st.sampled_from([(2,), (3,), (4,), (2, 2), (1, 2), (3, 1), (2, 1, 2)])


@st.composite
def _on_mesh(draw: st.DrawFn, case: Case, sizes: tuple[int, ...]) -> Case:
    """The case with a placement for each parameter."""
    placed = []
    for spec in case.params:
        words = ["R", *(f"S{d}" for d in range(len(spec.shape)))]
        places = [draw(st.sampled_from(words)) for _ in sizes]
        dim = draw(st.integers(0, max(len(spec.shape) - 1, 0)))
        if len(sizes) == 2 and spec.shape and draw(st.booleans()):
            places = [f"T{dim}", f"S{dim}"]  # as fully_shard leaves what is sharded already
        plain = "sparse" in spec.grads or spec.form == "sparse" or draw(st.integers(0, 9)) == 0
        whole = spec.dtype in ("float32", "float64") and 3 not in sizes  # halves are exact
        partial = whole and not {"integer", "complex"} & {*spec.grads} and draw(st.booleans())
        at = None if plain else tuple(places)
        placed.append(replace(spec, places=at, partial=partial and not plain))
    size = draw(st.sampled_from([None, 1, 2, 3, 4]))
    if size is not None and "basis_budget" not in case.spoilt:  # else nothing would be in a group
        budget = draw(st.sampled_from([0, 0, 100]))
        case = replace(case, arguments={**case.arguments, "basis_budget": budget})
    return replace(case, params=tuple(placed), group_size=size)


Drawn = tuple[Case, tuple[int, ...], bool, dict[int, Case]]
"""A case, the mesh, whether it is a process group of plain tensors, and cases of some ranks."""


@st.composite
def _cases(draw: st.DrawFn, kind: Any) -> Drawn:
    sizes = draw(MESHES)
    case = draw(kind)
    group = draw(st.integers(0, 4)) == 0
    return (case if group else draw(_on_mesh(case, sizes))), sizes, group, {}


def _come(case: Case, sizes: tuple[int, ...], group: bool, others: dict[int, Case]) -> list[Answer]:
    world = torch.Size(sizes).numel()
    return ranks.run(world, _attempt, case, sizes, others, group, timeout=PATIENCE)


@given(_cases(sound()))
@examples(20, share=0.1)
def test_what_is_sound_follows_one_process(drawn: Drawn) -> None:
    assert not judge(drawn[0], _come(*drawn))


@given(_cases(spoilt()))
@examples(15, share=0.1)
def test_what_is_not_is_refused_by_all(drawn: Drawn) -> None:
    assert not judge(drawn[0], _come(*drawn))


CHANGES: list[Any] = [
    {"dtype": "float64"},
    {"shape": (5, 9)},
    {"shape": (4, 5, 9)},
    {"frozen": True},
    {"name": "another"},
    {"splits": (1, 2)},
    {"places": "others"},
]
OPTIONS: list[dict[str, Any]] = [
    {"state_dtype": torch.float64},
    {"basis_dtype": torch.bfloat16},
    {"basis_budget": 0},
    {"refresh_delay": 20},
    {"refresh_method": "eigh64"},
    {"buffer_bytes": 1},
    {"update_proj_gap": 7},
]


@st.composite
def _differing(draw: st.DrawFn) -> Drawn:
    """Weights of which some rank has others."""
    sizes, group = draw(MESHES), draw(st.booleans())
    shapes = st.sampled_from([(3, 4), (6, 5), (3, 9)])
    params = tuple(Param(f"w{i}", draw(shapes)) for i in range(draw(st.integers(2, 3))))
    case = Case(params, algorithm="conda")
    case = case if group else draw(_on_mesh(case, sizes))
    case = replace(case, params=tuple(replace(p, partial=False) for p in case.params))
    if not group:  # a tensor that is not on the mesh is nobody else's business
        everywhere = ("R",) * len(sizes)
        case = replace(
            case, params=tuple(replace(p, places=p.places or everywhere) for p in case.params)
        )
    what = draw(st.sampled_from(["missing", "order", "path", "option", "change"]))
    first, *rest = case.params
    match what:
        case "missing":
            other = replace(case, params=(first, *rest[1:]))
        case "order":
            other = replace(case, params=(*rest, first))
        case "path":
            other = replace(case, algorithm="adamw")
        case "option":
            other = replace(case, arguments=draw(st.sampled_from(OPTIONS)))
        case _:
            change = dict(draw(st.sampled_from(CHANGES)))
            if "places" in change:
                change = {"dtype": "bfloat16"} if group else {"places": _others(first, sizes)}
            if "splits" in change:
                change["shape"] = first.shape if first.shape[0] == 3 else (3, 4)
            if change == {"shape": (4, 5, 9)} and not group:
                change["places"] = ("S2",) * len(sizes)
            other = replace(case, params=(replace(first, **change), *rest))
    rank = draw(st.integers(0, torch.Size(sizes).numel() - 1))
    return case, sizes, group, {rank: other}


def _others(spec: Param, sizes: tuple[int, ...]) -> tuple[str, ...]:
    return ("S1",) * len(sizes) if spec.places and "S1" not in spec.places else ("R",) * len(sizes)


def judge_difference(drawn: Drawn) -> str:
    """What is wrong with how ranks that differ found it out."""
    answers = _come(*drawn)
    said = {error for error, _, _ in answers}
    ((rank, _),) = drawn[3].items()
    if len(said) != 1:
        return f"ranks say different things: {said}"
    (text,) = said
    if not text.startswith("RuntimeError: the optimizer") or f"rank {rank}" not in text:
        return f"says nothing of rank {rank}: {text}"
    return ""


@given(_differing())
@examples(15, share=0.1)
def test_ranks_that_differ_all_say_so(drawn: Drawn) -> None:
    assert not judge_difference(drawn)
