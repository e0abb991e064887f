"""The planner: its bytes are those of real runs, its words are checked, its tables are printed."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.tensor import DTensor

import ranks
from conda_dist import Conda
from conda_dist.launch import forecast, plan
from conda_dist.launch.config import CondaConfig
from conda_dist.launch.forecast import Mesh
from conda_dist.launch.hardware import HARDWARE
from conda_dist.options import DTYPES
from conda_dist.storage import placements
from test_layout_traffic import _place, _sent
from traffic import recorded

CONFIGS = Path(__file__).parents[1] / "configs"
WIDTH, MLP, LAYERS = 32, 80, 2
PROJECTED = {
    f"layers.{i}.{name}.weight": shape
    for i in range(LAYERS)
    for name, shape in {
        "self_attn.q_proj": (WIDTH, WIDTH),
        "self_attn.k_proj": (WIDTH // 4, WIDTH),
        "self_attn.v_proj": (WIDTH // 4, WIDTH),
        "self_attn.o_proj": (WIDTH, WIDTH),
        "mlp.gate_proj": (MLP, WIDTH),
        "mlp.up_proj": (MLP, WIDTH),
        "mlp.down_proj": (WIDTH, MLP),
    }.items()
}
OTHERS = {"embed_tokens.weight": (100, WIDTH), "norm.weight": (WIDTH,)}
MESHES = [
    Mesh(),
    Mesh(dp_shard=2),
    Mesh(dp_shard=3),
    Mesh(dp_shard=8),
    Mesh(dp_replicate=2, dp_shard=2),
    Mesh(tp=2),
    Mesh(dp_shard=2, tp=2),
    Mesh(dp_replicate=2, dp_shard=2, tp=2),
]
BUDGET = 25_000
"""Bytes: some bases are replicated, some are not."""
SETTINGS = [
    CondaConfig(update_proj_gap=2),
    CondaConfig(update_proj_gap=2, basis_placement="owner", matmul_dtype="bfloat16"),
    CondaConfig(
        update_proj_gap=2,
        basis_placement="shard",
        basis_dtype="bfloat16",
        state_dtype="bfloat16",
        second_moment_dtype="uint8",
    ),
]


def _count(mesh: Mesh, settings: CondaConfig) -> list[tuple[int, int, int]]:
    """Bytes this rank keeps, sends in a step and in one with a refresh: counted, and planned."""
    groups: list[dict[str, Any]] = []
    for algorithm, shapes in (("conda", PROJECTED), ("adamw", OTHERS)):
        for name, shape in shapes.items():
            where = forecast.layout(name, shape, mesh)
            torch.manual_seed(len(groups))
            places = list(placements(where))
            param = nn.Parameter(_place(torch.randn(shape), mesh.sizes, places))
            param.grad = _place(torch.randn(shape), mesh.sizes, places)
            groups.append({"params": [(name, param)], "algorithm": algorithm})
    optimizer = Conda(
        groups,
        update_proj_gap=settings.update_proj_gap,
        basis_placement=settings.basis_placement,
        basis_budget=BUDGET,
        matmul_dtype=DTYPES.get(settings.matmul_dtype),
        basis_dtype=DTYPES.get(settings.basis_dtype),
        state_dtype=DTYPES.get(settings.state_dtype),
        second_moment_dtype=DTYPES.get(settings.second_moment_dtype),
    )
    sent = []
    for _ in range(3):
        with recorded() as calls:
            optimizer.step()
        sent.append(_sent(calls))
    state = sum(
        (value.to_local() if isinstance(value, DTensor) else value).nbytes
        for state in optimizer.state.values()
        for value in state.values()
    )
    coordinate = next(iter(optimizer.state)).device_mesh.get_coordinate()
    found = forecast.forecast_conda(PROJECTED, OTHERS, mesh, settings, BUDGET, tuple(coordinate))
    step = sum(found.step.values())
    return [(state, sent[1], sent[2]), (found.state, step, step + sum(found.refresh.values()))]


@pytest.mark.parametrize("mesh", MESHES, ids=lambda m: "x".join(map(str, m.sizes)))
def test_bytes_are_those_of_real_runs(mesh: Mesh) -> None:
    for settings in SETTINGS:
        for counted, planned in ranks.run(mesh.ranks, _count, mesh, settings):
            assert counted == planned


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--mesh", "dp=64"], "--mesh has no axis 'dp'; it has dp_replicate, dp_shard, tp"),
        (["--mesh", "dp_shard=0"], "dp_shard must be a positive number of ranks"),
        (["--mesh", "dp_shard=2.5"], "dp_shard must be a positive number of ranks"),
        (["--mesh", "dp_shard=2", "dp_shard=4"], "dp_shard is given twice"),
        (["--mesh", "tp=2", "--tp", "2"], "tp is given twice"),
        ([], "name a --model and a --mesh"),
        (["--mesh", "dp_shard=2", "--optimizer.conda.lrr", "1"], "optimizer.conda.lr"),
    ],
)
def test_what_cannot_be_planned_is_said(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert plan.main(["--model", str(CONFIGS / "llama_60m.toml"), *words]) == 2
    assert said in capsys.readouterr().err


def test_gpt2_has_no_tensor_parallelism_here(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--model", str(CONFIGS / "gpt2_125m.toml"), "--mesh", "tp=2"]
    assert plan.main(arguments) == 2
    assert "tensor parallelism is planned for LLaMA only" in capsys.readouterr().err


def test_the_tables(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--mesh", "dp_shard=64", "--tp", "8", "--optimizer.conda.matmul_dtype", "bfloat16"]
    assert plan.main(["--model", str(CONFIGS / "llama_70b.toml"), *arguments]) == 0
    said = capsys.readouterr().out
    assert "Conda on 512 ranks (dp_replicate 1, dp_shard 64, tp 8), 70.6 B parameters" in said
    for name in ("Conda, sharded", "AdamW, sharded", "Muon, gathered", "Conda, replicated"):
        assert name in said
    assert "every 2000 steps, async, bases taken 20 steps later" in said


def test_the_sizes_of_known_models() -> None:
    for name, billions in (("7b", 6.7), ("70b", 70.6), ("405b", 405.9)):
        config = plan.options.load(str(CONFIGS / f"llama_{name}.toml"), [])
        planned = plan.Planned(config, Mesh(dp_shard=8), 4.0, 8192)
        assert round(planned.parameters / 1e9, 1) == billions


def test_delegating_keeps_a_step_small() -> None:
    """A rank sends four times its share of the weights, and again what it owns and passes on."""
    config = plan.options.load(str(CONFIGS / "llama_70b.toml"), [])
    planned = plan.Planned(config, Mesh(dp_shard=64, tp=8), 4.0, 8192)
    share = 4 * planned.parameters / 512
    assert 4 * share < sum(planned.conda.step.values()) < 12 * share


def test_more_ranks_take_less_time_each() -> None:
    config = plan.options.load(str(CONFIGS / "llama_7b.toml"), [])
    times, states = [], []
    for count in (8, 64, 512):
        planned = plan.Planned(config, Mesh(dp_shard=count), 4.0, 8192)
        times.append(planned.seconds(planned.conda, HARDWARE["h100-ib400"]).step)
        states.append(planned.conda.state)
    assert times == sorted(times, reverse=True)
    assert states == sorted(states, reverse=True)


def test_the_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "RANKS", [1, 8])
    monkeypatch.setattr(plan, "SCALES", ("llama_60m",))
    assert plan.main(["--scaling", str(tmp_path / "plan.png")]) == 0
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")
