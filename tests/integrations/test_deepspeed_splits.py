"""Fused weights in DeepSpeed's partitions: parts are matrices of their own, at every stage."""

import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import models
import ranks
import test_deepspeed_universal as universal
import zero

os.environ["DS_ACCELERATOR"] = "cpu"

SPLITS = {"*.up.weight": [13, 4, 5], "*.q.weight": 2}
"""A tall part and wide ones, and two halves; no partition ends where they do."""
CONFIGS: list[tuple[int, str, dict[str, Any]]] = [
    *((stage, "fp32", {}) for stage in range(4)),
    (3, "fp32", {"zero": {"sub_group_size": 300}, "params": {"basis_budget": 0}}),
    (1, "fp32", {"zero": {"round_robin_gradients": True}}),
    (0, "bf16", {}),
]


def _config(stage: int, dtype: str, others: dict[str, Any]) -> dict[str, Any]:
    params = {"splits": SPLITS, **others.get("params", {})}
    return zero.config(stage, dtype, **{**others, "params": params})


def _follow(folder: Path) -> tuple[list[dict[str, Tensor]], list[str], set[str]]:
    """Weights at the end; what differs after a stop and a new start; names of the parts."""
    ended, differing = [], []
    for stage, dtype, others in CONFIGS:
        made, place = _config(stage, dtype, others), f"{folder}/{len(ended)}"
        engine = zero.build(made)
        zero.train(engine, range(4))
        engine.save_checkpoint(place)
        zero.train(engine, range(4, zero.STEPS))
        ended.append(zero.weights(engine))
        again = zero.build(made)
        again.load_checkpoint(place)
        zero.train(again, range(4, zero.STEPS))
        differing += models.unequal(zero.weights(again), ended[-1])
    report = engine.basic_optimizer.report()
    return ended, differing, {row["name"] for row in report if row["path"] == "conda"}


@pytest.mark.thorough
def test_parts_follow_one_process(tmp_path: Path) -> None:
    start, theirs = zero.start(), zero.alone(splits=SPLITS)
    low = zero.alone(dtype=torch.bfloat16, splits=SPLITS)
    assert models.farthest(zero.alone(), theirs, start) > 0.01
    for ended, differing, names in ranks.run(3, _follow, tmp_path):
        assert not differing
        assert {"blocks.0.up.weight[13:17]", "blocks.1.q.weight[5:10]"} <= names
        for (stage, dtype, others), weights in zip(CONFIGS, ended, strict=True):
            if dtype == "bf16":
                assert models.farthest(weights, low, zero.start(torch.bfloat16)) < 0.15
            else:
                assert models.farthest(weights, theirs, start) < 1e-4, (stage, others)


def test_universal_checkpoints_of_parts(tmp_path: Path) -> None:
    configs = [(stage, "fp32", {"params": {"splits": SPLITS}}) for stage in (1, 3)]
    saved = ranks.run(2, universal._save, tmp_path, configs)[0]
    loaded = ranks.run(3, universal._load, tmp_path, configs)[0]
    for (ours, held), (theirs, kept) in zip(loaded, saved, strict=True):
        assert models.farthest(ours[1], theirs[1], zero.start()) < 1e-5
        assert not models.unequal(held, kept)


REFUSED: list[tuple[Any, str]] = [
    ({"*.kqv": 2}, r"splits pattern '\*.kqv' matches no parameter on the conda path"),
    ({"*.up.weight": [13, 4]}, "blocks.0.up.weight: splits .13, 4. make 17 rows"),
    ({"*.up.weight": [8, 3]}, "blocks.0.up.weight: splits .8, 3. of a weight .22, 10. repeat"),
    ({"*.experts": 2}, "blocks.0.experts: splits .5, 5. of a weight .3, 10, 6. repeat"),
    ([3, 4], "TypeError: splits must be a dict of patterns and rows"),
    ({"*.up.weight": "2"}, "TypeError: blocks.0.up.weight: splits must be rows of parts"),
]


def _refusals() -> list[str]:
    made = [zero.config(1, params={"splits": splits}) for splits, _ in REFUSED]
    return [models.attempt(zero.build, config) for config in made]


def test_what_cannot_be_split() -> None:
    for (splits, expected), said in zip(REFUSED, ranks.run(1, _refusals)[0], strict=True):
        assert re.search(expected, said), (splits, said)
