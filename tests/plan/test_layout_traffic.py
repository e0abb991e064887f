"""What a step and a refresh of each parallel layout send, counted, and held to the report.

FSDP2 itself moves the same in all of them with or without Conda; this is what Conda adds.
``PYTHONPATH=tests/helpers python tests/plan/test_layout_traffic.py`` prints the table.
"""

from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

import models
import ranks
from conda_dist import Conda
from traffic import Call, recorded, sent_bytes

WIDTH, MLP, EXPERTS = 32, 96, 8
S0, S1, S2, ALL = Shard(0), Shard(1), Shard(2), Replicate()
FSDP_TP = _StridedShard(0, split_factor=2)
Weight = tuple[str, tuple[int, ...], list[Placement]]


def _block(column_wise: list[Placement], row_wise: list[Placement]) -> list[Weight]:
    """The projections of a LLaMA block."""
    square, tall, wide = (WIDTH, WIDTH), (MLP, WIDTH), (WIDTH, MLP)
    return [
        *((name, square, column_wise) for name in ("wq", "wk", "wv")),
        ("wo", square, row_wise),
        *((name, tall, column_wise) for name in ("w1", "w3")),
        ("w2", wide, row_wise),
    ]


def _experts(rows: list[Placement], columns: list[Placement]) -> list[Weight]:
    return [
        ("w1", (EXPERTS, MLP, WIDTH), rows),
        ("w2", (EXPERTS, WIDTH, MLP), columns),
        ("w3", (EXPERTS, MLP, WIDTH), rows),
    ]


FUSED: list[Weight] = [("wqkv", (WIDTH + 32, WIDTH), [S0]), ("w2", (WIDTH, MLP), [S0])]
LAYOUTS: dict[str, tuple[tuple[int, ...], list[Weight]]] = {
    "FSDP 4": ((4,), _block([S0], [S0])),
    "FSDP 4, w2 by columns": ((4,), [*_block([S0], [S0])[:-1], ("w2", (WIDTH, MLP), [S1])]),
    "HSDP 2x2": ((2, 2), _block([ALL, S0], [ALL, S0])),
    "TP 4": ((4,), _block([S0], [S1])),
    "FSDP 2 x TP 2": ((2, 2), _block([FSDP_TP, S0], [S0, S1])),
    "HSDP 2 x FSDP 2 x TP 2": ((2, 2, 2), _block([ALL, FSDP_TP, S0], [ALL, S0, S1])),
    "experts, FSDP 4": ((4,), _experts([S0], [S0])),
    "experts, FSDP 2 x TP 2": ((2, 2), _experts([S0, S1], [S0, S2])),
    "experts, EFSDP 2 x EP 2": ((2, 2), _experts([FSDP_TP, S0], [FSDP_TP, S0])),
    "experts, EFSDP 2 by rows x EP 2": ((2, 2), _experts([S1, S0], [S1, S0])),
    "fused q, k, v, FSDP 4": ((4,), FUSED),
}
SPLITS = (32, 16, 16)

Traffic = tuple[list[Call], list[Call], int, int]


def _optimizer(name: str, **options: Any) -> Conda:
    mesh_shape, weights = LAYOUTS[name]
    groups: list[dict[str, Any]] = []
    mesh = init_device_mesh("cpu", mesh_shape)
    for weight, shape, places in weights:
        torch.manual_seed(len(groups))
        param = nn.Parameter(models.place(torch.randn(shape), mesh, places))
        param.grad = models.place(torch.randn(shape), mesh, places)
        splits = SPLITS if weight == "wqkv" else None
        groups.append({"params": [(weight, param)], "algorithm": "conda", "splits": splits})
    return Conda(groups, update_proj_gap=2, **options)


def measure(name: str, options: dict[str, Any]) -> Traffic:
    """Calls of a steady step and of one with a refresh, and the bytes that the report has."""
    optimizer = _optimizer(name, **options)
    report = optimizer.report(show=False)
    traffic = []
    for _ in range(3):
        with recorded() as calls:
            optimizer.step()
        traffic.append(list(calls))
    step = sum(row["step_bytes"] for row in report)
    return traffic[1], traffic[2], step, sum(row["refresh_bytes"] for row in report)


@pytest.mark.parametrize("name", LAYOUTS)
def test_traffic_is_what_the_report_says(name: str) -> None:
    answers = ranks.run(torch.Size(LAYOUTS[name][0]).numel(), measure, name, {})
    for steady, refreshing, step_bytes, refresh_bytes in answers:
        assert {call.name for call in steady} <= {"all_to_all"}
        assert sent_bytes(steady) == step_bytes
        assert {call.name for call in refreshing} <= {"all_to_all", "all_reduce"}
        assert sent_bytes(refreshing) == refresh_bytes


def _measure_async(name: str) -> tuple[list[Call], int, int]:
    """Traffic of a step that launches refreshes and of the next, which takes the bases."""
    optimizer = _optimizer(name, refresh_delay=1)
    report = optimizer.report(show=False)
    for _ in range(2):
        optimizer.step()
    with recorded() as calls:
        for _ in range(2):
            optimizer.step()
    planned = sum(row["step_bytes"] + row["refresh_bytes"] for row in report)
    held = sum(
        value.to_local().nbytes if isinstance(value, DTensor) else value.nbytes
        for state in optimizer.state.values()
        for value in state.values()
    )
    return list(calls), planned, held - sum(row["state_bytes"] for row in report)


@pytest.mark.parametrize("name", ["FSDP 4", "HSDP 2 x FSDP 2 x TP 2", "fused q, k, v, FSDP 4"])
def test_traffic_and_state_of_asynchronous_refreshes(name: str) -> None:
    for calls, planned, more in ranks.run(
        torch.Size(LAYOUTS[name][0]).numel(), _measure_async, name
    ):
        assert sent_bytes(calls) == planned
        assert not more or name.startswith("fused")  # whose parts share their counts


@pytest.mark.parametrize(
    "name",
    ["FSDP 4, w2 by columns", "TP 4", "experts, FSDP 4", "experts, EFSDP 2 x EP 2"],
)
def test_layouts_that_fit_the_algebra_move_nothing(name: str) -> None:
    """But for TP: its row-wise wo is square, of which Conda keeps rows and TP has columns."""
    for steady, _, step_bytes, _ in ranks.run(4, measure, name, {}):
        expected = 2 * 3 * WIDTH * WIDTH // 16 * 4 + 3 * 4 if name == "TP 4" else 0
        assert step_bytes == expected
        assert len(steady) == (2 if expected else 0)


def _table() -> None:
    print("| layout | ranks | collectives a step | KiB sent a step | ... a refresh |")
    print("|---|---|---|---|---|")
    for name, (shape, weights) in LAYOUTS.items():
        world = torch.Size(shape).numel()
        answers = ranks.run(world, measure, name, {})
        elements = sum(torch.Size(size).numel() for _, size, _ in weights)
        steady = max(len(answer[0]) for answer in answers)
        step, refresh = (sum(answer[i] for answer in answers) / world for i in (2, 3))
        part = step / (elements * 4)
        print(
            f"| {name} | {world} | {steady} | {step / 1024:.1f} ({part:.3f} of the weights) | "
            f"{refresh / 1024:.1f} |"
        )


if __name__ == "__main__":
    _table()
    ranks.close()
