"""Fused weights: blocks of rows of one parameter as matrices of their own, on every layout."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint import load, save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.placement_types import _StridedShard

import models
import ranks
from conda_dist import Conda, param_groups
from conda_dist.runtime import dtensor

ROWS, COLUMNS = (9, 3, 5), 7
"""A tall part and two wide ones; no rank count from 2 to 4 divides them or their sum."""
WEIGHTS = {
    "qkv": (sum(ROWS), COLUMNS),
    "experts": (3, sum(ROWS), COLUMNS),
    "repeated": (3 * sum(ROWS), COLUMNS),  # three groups of heads: all parts are tall
}
OPTIONS: dict[str, Any] = {"lr": 0.02, "weight_decay": 0.1, "update_proj_gap": 3}
STEPS = 7

Layout = tuple[tuple[int, ...], list[Placement]]
"""A mesh and placements on it."""
PLAIN: Layout = ((), [])
LAYOUTS: list[Layout] = [
    ((2,), [Shard(0)]),
    ((3,), [Shard(0)]),
    ((4,), [Shard(0)]),
    ((2,), [Shard(1)]),
    ((2,), [Replicate()]),
    ((2, 2), [Replicate(), Shard(0)]),
    ((2, 2), [Shard(0), Shard(1)]),
    ((2, 2), [_StridedShard(0, split_factor=2), Shard(0)]),
]


def _start(name: str) -> Tensor:
    generator = torch.Generator().manual_seed(len(name))
    return torch.randn(WEIGHTS[name], generator=generator)


def _fused(layout: Layout) -> dict[str, nn.Parameter]:
    shape, places = layout
    params = {name: _start(name) for name in WEIGHTS}
    if shape:
        mesh = init_device_mesh("cpu", shape)
        example = DTensor.from_local(torch.zeros(1), mesh, [Replicate()] * len(shape))
        for name, whole in params.items():
            # Rows and columns of the experts are one dimension further back.
            back = whole.ndim - 2
            moved = [_back(place, back) for place in places]
            params[name] = models.like(example, whole).redistribute(mesh, moved)
    return {name: nn.Parameter(param) for name, param in params.items()}


def _back(place: Placement, by: int) -> Placement:
    if isinstance(place, _StridedShard):
        return _StridedShard(place.dim + by, split_factor=place.split_factor)
    return Shard(place.dim + by) if isinstance(place, Shard) else place


def _optimizer(params: dict[str, nn.Parameter], **options: Any) -> Conda:
    group = {"params": list(params.items()), "algorithm": "conda", "splits": ROWS}
    return Conda([group], **{**OPTIONS, **options})


def _take(params: dict[str, nn.Parameter], optimizer: Conda, steps: range) -> None:
    for step in steps:
        for name, param in params.items():
            param.grad = models.gradient(name, param, step)
        optimizer.step()


def _rows(name: str) -> list[list[int]]:
    """The rows of each part."""
    ends = [sum(ROWS[: i + 1]) for i in range(len(ROWS))]
    starts = range(0, WEIGHTS[name][-2], sum(ROWS))
    return [
        [at + row for at in starts for row in range(end - rows, end)]
        for rows, end in zip(ROWS, ends, strict=True)
    ]


def _separate() -> dict[str, Tensor]:
    """The same training with a parameter for each part."""
    parts = {
        (name, i): nn.Parameter(_start(name)[..., rows, :].clone())
        for name in WEIGHTS
        for i, rows in enumerate(_rows(name))
    }
    group = {"params": [(f"{n}.{i}", p) for (n, i), p in parts.items()], "algorithm": "conda"}
    optimizer = Conda([group], **OPTIONS)
    for step in range(STEPS):
        for (name, i), param in parts.items():
            param.grad = models.gradient(name, _start(name), step)[..., _rows(name)[i], :].clone()
        optimizer.step()
    ended = {name: _start(name) for name in WEIGHTS}
    for (name, i), param in parts.items():
        ended[name][..., _rows(name)[i], :] = param.detach()
    return ended


@pytest.fixture(scope="module")
def separate() -> dict[str, Tensor]:
    return _separate()


def _far(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    return models.farthest(ours, theirs, {name: _start(name) for name in WEIGHTS})


def test_parts_step_as_matrices_of_their_own(separate: dict[str, Tensor]) -> None:
    params = _fused(PLAIN)
    _take(params, _optimizer(params), range(STEPS))
    ended = {name: param.detach() for name, param in params.items()}
    # Rows in one piece step in place, by the same kernels; those in several, and those of each
    # matrix of a batch, which are not contiguous, by others, whose last bits may differ.
    assert set(models.unequal(ended, separate)) <= {"experts", "repeated"}
    assert _far(ended, separate) < 1e-5


def _on(layout: Layout, options: dict[str, Any]) -> dict[str, Tensor]:
    params = _fused(layout)
    storages = {name: dtensor.local(p).data_ptr() for name, p in params.items()}
    _take(params, _optimizer(params, **options), range(STEPS))
    assert storages == {n: dtensor.local(p).data_ptr() for n, p in params.items()}
    return {name: models.whole(param) for name, param in params.items()}


@pytest.mark.parametrize(
    "options", [{}, {"basis_budget": 0, "buffer_bytes": 1}], ids=["", "sharded bases"]
)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_layouts(layout: Layout, options: dict[str, Any], separate: dict[str, Tensor]) -> None:
    for ended in ranks.run(math.prod(layout[0]), _on, layout, options, timeout=60):
        assert _far(ended, separate) < 1e-4


def _state(params: dict[str, nn.Parameter], optimizer: Conda) -> dict[str, Any]:
    states = optimizer.state_dict()["state"]
    return {f"{n}.{key}": v for i, n in enumerate(params) for key, v in states[i].items()}


def _save(layout: Layout, folder: Path) -> None:
    params = _fused(layout)
    optimizer = _optimizer(params)
    _take(params, optimizer, range(4))
    save({**params, **_state(params, optimizer)}, checkpoint_id=str(folder))


def _resume(layout: Layout, folder: Path) -> dict[str, Tensor]:
    params = _fused(layout)
    optimizer = _optimizer(params)
    optimizer.init_state()
    read = {**{n: p.detach() for n, p in params.items()}, **_state(params, optimizer)}
    load(read, checkpoint_id=str(folder))
    saved = optimizer.state_dict()
    for i, name in enumerate(params):
        saved["state"][i] = {key: read[f"{name}.{key}"] for key in saved["state"][i]}
    optimizer.load_state_dict(saved)
    _take(params, optimizer, range(4, STEPS))
    return {name: models.whole(param) for name, param in params.items()}


@pytest.mark.thorough
def test_checkpoints_move_between_layouts(tmp_path: Path, separate: dict[str, Tensor]) -> None:
    ranks.run(2, _save, LAYOUTS[0], tmp_path, timeout=60)
    for layout in LAYOUTS[1:]:
        for ended in ranks.run(math.prod(layout[0]), _resume, layout, tmp_path, timeout=60):
            assert _far(ended, separate) < 1e-4
    assert _far(_resume(PLAIN, tmp_path), separate) < 1e-4


def test_other_splits_are_not_loaded() -> None:
    params = _fused(PLAIN)
    optimizer = _optimizer(params)
    _take(params, optimizer, range(1))
    for splits in (None, (9, 8), (5, 3, 9)):
        group = {"params": list(params.items()), "algorithm": "conda", "splits": splits}
        other = Conda([group], **OPTIONS)
        with pytest.raises(ValueError, match=r"qkv: the checkpoint was written with splits=\(9, "):
            other.load_state_dict(optimizer.state_dict())


class _Fused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.qkv = nn.Linear(8, 12, bias=False)
        self.gate_up = nn.Linear(8, 32, bias=False)
        self.out = nn.Linear(8, 8, bias=False)


def test_param_groups_cut_what_patterns_name() -> None:
    splits = {"*qkv.weight": (8, 2, 2), "gate_up*": 2}
    optimizer = Conda(param_groups(_Fused(), splits=splits))
    rows = {row["name"]: (row["path"], row["shape"]) for row in optimizer.report(show=False)}
    assert rows == {
        "embed.weight": ("adamw", (11, 8)),
        "out.weight": ("conda", (8, 8)),
        "qkv.weight[0:8]": ("conda", (8, 8)),
        "qkv.weight[8:10]": ("conda", (2, 8)),
        "qkv.weight[10:12]": ("conda", (2, 8)),
        "gate_up.weight[0:16]": ("conda", (16, 8)),
        "gate_up.weight[16:32]": ("conda", (16, 8)),
    }


@pytest.mark.parametrize(
    ("splits", "said"),
    [
        ({"*qkv.weight": (8, 2)}, r"qkv.weight: splits \(8, 2\) make 10 rows, but .* \(12, 8\)"),
        ({"*qkv.weight": 5}, "qkv.weight: 12 rows cannot be split into 5 equal parts"),
        ({"*kqv.weight": 3}, r"splits pattern '\*kqv.weight' matches no parameter"),
        ({"embed.weight": 1}, "splits pattern 'embed.weight' matches no parameter on the conda"),
    ],
)
def test_impossible_splits(splits: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        param_groups(_Fused(), splits=splits)


@pytest.mark.parametrize(
    "rows", [(), (0,), (8, -2, 6), "3", ("a",), 3.0, None, True, (True, 11)], ids=str
)
def test_rows_of_the_wrong_type(rows: Any) -> None:
    with pytest.raises(TypeError, match=r"qkv.weight: splits must be rows of parts"):
        param_groups(_Fused(), splits={"*qkv.weight": rows})


def test_splits_that_are_no_dict() -> None:
    with pytest.raises(TypeError, match="splits must be a dict"):
        param_groups(_Fused(), splits=[("*qkv.weight", 3)])  # type: ignore[arg-type]


def test_splits_on_the_adamw_path() -> None:
    group = {"params": list(_fused(PLAIN).items()), "algorithm": "adamw", "splits": ROWS}
    with pytest.raises(ValueError, match="no meaning on the adamw path"):
        Conda([group])


def test_splits_cannot_change_under_a_state() -> None:
    params = _fused(PLAIN)
    optimizer = _optimizer(params)
    _take(params, optimizer, range(1))
    optimizer.param_groups[0]["splits"] = (9, 8)
    with pytest.raises(ValueError, match="qkv: its state has basis_0, basis_1, basis_2, but"):
        _take(params, optimizer, range(1, 2))
    optimizer.param_groups[0]["splits"] = ROWS
    _take(params, optimizer, range(1, 2))


def _reductions(splits: tuple[int, ...] | None) -> list[str]:
    mesh = init_device_mesh("cpu", (2,))
    param = nn.Parameter(DTensor.from_local(_start("qkv"), mesh, [Replicate()]))
    group = {"params": [("qkv", param)], "algorithm": "conda", "splits": splits}
    optimizer = Conda([group], update_proj_gap=100)
    for _ in range(2):
        param.grad = DTensor.from_local(_start("qkv"), mesh, [Partial()])
        with CommDebugMode() as counted:
            optimizer.step()
    return [f"{name} {count}" for name, count in counted.get_comm_counts().items()]


def test_a_partial_gradient_is_reduced_once() -> None:
    assert ranks.run(2, _reductions, ROWS) == ranks.run(2, _reductions, None)


@pytest.mark.parametrize("splits", [3, (), (8, 0, 4), "8,4", (8.0, 4.0)], ids=str)
def test_splits_of_a_group_are_checked(splits: Any) -> None:
    group = {"params": list(_fused(PLAIN).items()), "algorithm": "conda", "splits": splits}
    with pytest.raises(TypeError, match="splits must be rows of parts"):
        Conda([group])
