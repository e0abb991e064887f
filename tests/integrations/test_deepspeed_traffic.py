"""What Conda's step sends at each ZeRO stage, counted, and held to what its report plans.

DeepSpeed itself moves the same with or without Conda; this is what Conda adds, on LLaMA's blocks.
``PYTHONPATH=tests/helpers python tests/integrations/test_deepspeed_traffic.py`` prints the table.
"""

import functools
import os
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import models
import ranks
import zero
from traffic import Call, recorded

os.environ["DS_ACCELERATOR"] = "cpu"

WORLD, WIDTH, MLP, LAYERS = 4, 32, 88, 3
CONFIGS: dict[str, tuple[int, dict[str, Any]]] = {
    "0": (0, {}),
    "1": (1, {}),
    "2": (2, {}),
    "3": (3, {}),
    "1, bases split": (1, {"basis_budget": 0}),
    "3, bases split": (3, {"basis_budget": 0}),
    "1, bases from gradients": (1, {"basis_source": "gradients"}),
    "3, bases from gradients": (3, {"basis_source": "gradients"}),
}
SQUARE = ("q_proj", "k_proj", "v_proj", "o_proj")


class _Block(nn.Module):
    """The seven projections of a LLaMA block, without what lies between them."""

    def __init__(self) -> None:
        super().__init__()
        for name in SQUARE:
            setattr(self, name, nn.Linear(WIDTH, WIDTH, bias=False))
        self.gate_proj = nn.Linear(WIDTH, MLP, bias=False)
        self.up_proj = nn.Linear(WIDTH, MLP, bias=False)
        self.down_proj = nn.Linear(MLP, WIDTH, bias=False)
        self.norm = nn.RMSNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        inside = self.norm(x)
        x = x + self.o_proj(torch.sigmoid(self.q_proj(inside) * self.k_proj(inside)))
        x = x + self.v_proj(inside)
        return x + self.down_proj(torch.sigmoid(self.gate_proj(x)) * self.up_proj(x))


class _Llama(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(models.VOCABULARY, WIDTH)
        self.layers = nn.Sequential(*(_Block() for _ in range(LAYERS)))
        self.lm_head = nn.Linear(WIDTH, models.VOCABULARY, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.lm_head(self.layers(self.embed_tokens(tokens)))


Traffic = tuple[list[Call], list[Call], list[dict[str, Any]], int, int]
"""Collectives of a step and of a refresh, the report, and bytes of bases and of all state."""


def _measure(name: str) -> Traffic:
    stage, options = CONFIGS[name]
    torch.manual_seed(0)
    params = {"update_proj_gap": 2, **options}
    engine = zero.build(zero.config(stage, params=params), _Llama())
    optimizer = engine.basic_optimizer
    step = optimizer.step
    calls: list[Call] = []

    def counted(*args: Any) -> None:
        with recorded() as made:
            step(*args)
        calls.extend(made)

    traffic = []
    for at in range(3):
        calls.clear()
        optimizer.step = counted
        zero.train(engine, range(at, at + 1))
        traffic.append(list(calls))
    optimizer.step = step
    steps = optimizer._steps.values()
    states = [state for partition_step in steps for state in partition_step._states.values()]
    bases = sum(t.nbytes for state in states for key, t in state.items() if key.endswith("basis"))
    report = optimizer.report()
    held = sum(t.nbytes for state in states for t in state.values())
    assert sum(r["state_bytes"] for r in report) == held
    return traffic[1], traffic[2], report, bases, sum(row["state_bytes"] for row in report)


@functools.cache
def _measured(name: str) -> list[Traffic]:
    """What each rank measured."""
    return ranks.run(WORLD, _measure, name)


def _sent(calls: list[Call]) -> int:
    return sum(call.sent for call in calls if call.name == "all_to_all")


@pytest.mark.parametrize("name", CONFIGS)
def test_traffic_is_what_the_report_says(name: str) -> None:
    answers = _measured(name)
    for steady, refreshing, report, _, _ in answers:
        assert {call.name for call in steady} <= {"all_to_all"}
        assert _sent(steady) == sum(row["step_bytes"] for row in report)
        assert {call.name for call in refreshing} <= {"all_to_all", "all_reduce"}
        assert _sent(refreshing) == sum(row["refresh_bytes"] for row in report)


def test_stage_0_refreshes_only() -> None:
    """Replicas step alone, and share the decompositions out."""
    for steady, refreshing, _, _, _ in _measured("0"):
        assert not steady
        assert _sent(refreshing)
    totals = [_sent(answer[1]) for answer in _measured("0")]
    assert sum(totals) == LAYERS * 7 * (WORLD - 1) * WIDTH * WIDTH * 4


def test_bases_of_stages_1_and_2_are_where_their_matrices_are() -> None:
    """Together the ranks keep one of each, and one more where a boundary cuts a matrix."""
    one = WIDTH * WIDTH * 4
    for name in ("1", "2"):
        held = [answer[3] for answer in _measured(name)]
        assert LAYERS * 7 * one <= sum(held) <= (LAYERS * 7 + WORLD - 1) * one
    assert [answer[3] for answer in _measured("3")] == [LAYERS * 7 * one] * WORLD


def _table() -> None:
    elements = LAYERS * (4 * WIDTH * WIDTH + 3 * WIDTH * MLP)
    print(
        f"{LAYERS} LLaMA blocks of width {WIDTH}, MLP {MLP}, on {WORLD} ranks; KiB, mean of ranks"
    )
    print("| ZeRO stage | collectives a step | sent a step | ... a refresh | bases | all state |")
    print("|---|---|---|---|---|---|")
    for name in CONFIGS:
        answers = _measured(name)
        steady = max(len(answer[0]) for answer in answers)
        step, refresh = (sum(_sent(answer[i]) for answer in answers) / WORLD for i in (0, 1))
        bases, state = (sum(answer[i] for answer in answers) / WORLD for i in (3, 4))
        print(
            f"| {name} | {steady} | {step / 1024:.1f} ({step / 4 / elements:.3f} of the weights) | "
            f"{refresh / 1024:.1f} | {bases / 1024:.1f} | {state / 1024:.1f} |"
        )


if __name__ == "__main__":
    _table()
    ranks.close()
