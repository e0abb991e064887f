"""The planner: its bytes are those of real runs, its words are checked, its tables are printed."""

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.utils.flop_counter import FlopCounterMode

import models
import ranks
from conda_dist import Conda, Muon
from conda_dist.launch import plan
from conda_dist.launch.job import options
from conda_dist.launch.job.optimizer_config import CondaConfig
from conda_dist.launch.tools import forecast, planned
from conda_dist.launch.tools.hardware import HARDWARE, Mesh
from conda_dist.launch.tools.planned import Planned
from conda_dist.layout.layout import Layout, Split, Topology
from conda_dist.numerics.decomposition import decompose_gram
from conda_dist.plan.compute_groups import assign_owners
from conda_dist.plan.costs import svd_flops
from conda_dist.plan.schedule import fill_tasks
from conda_dist.plan.weight_plan import plan_weight
from conda_dist.runtime.dtensor import placements
from traffic import recorded, sent_bytes

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs"
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
    Mesh(dp_shard=3),
    Mesh(dp_replicate=2, dp_shard=2, tp=2),
    Mesh(tp=2),
    Mesh(dp_shard=2, tp=2),
]
SETTINGS = [
    # For some bases, and not for all.
    CondaConfig(update_proj_gap=2, basis_budget=25_000, refresh_method="orthogonal_iteration"),
    CondaConfig(update_proj_gap=2, basis_budget=0, matmul_dtype="bfloat16"),
    CondaConfig(
        update_proj_gap=2,
        basis_budget=0,
        basis_dtype="bfloat16",
        state_dtype="bfloat16",
        second_moment_dtype="uint8",
        refresh_method="orthogonal_iteration",
    ),
    CondaConfig(
        update_proj_gap=2, basis_source="gradients", state_dtype="bfloat16", matmul_dtype="bfloat16"
    ),
]


Counts = tuple[int, int, int, int, float]


def _added(into: tuple[int, ...], a: tuple[int, ...], b: tuple[int, ...], **_: Any) -> int:
    """Operations of a product that is added in place, by shapes; torch's counter has none."""
    return 2 * math.prod(a) * b[-1]


IN_PLACE = {torch.ops.aten.addmm_: _added, torch.ops.aten.baddbmm_: _added}


def _conda(groups: list[dict[str, Any]], settings: CondaConfig) -> Conda:
    return Conda(
        groups,
        update_proj_gap=settings.update_proj_gap,
        basis_budget=settings.basis_budget,
        matmul_dtype=settings.matmul_dtype,
        basis_dtype=settings.basis_dtype,
        state_dtype=settings.state_dtype,
        second_moment_dtype=settings.second_moment_dtype,
        refresh_method=settings.refresh_method,
        basis_source=settings.basis_source,
    )


def _count(mesh: Mesh, settings: CondaConfig | None) -> tuple[Counts, Counts]:
    """Bytes this rank keeps, sends in a step and in one with a refresh, counted and planned.

    Of Conda, or of Muon where there are no settings.

    And the collectives of a step, and the operations of its products.
    """
    groups: list[dict[str, Any]] = []
    ranks_here = init_device_mesh("cpu", mesh.sizes)
    rule = "muon" if settings is None else "conda"
    for algorithm, shapes in ((rule, PROJECTED), ("adamw", OTHERS)):
        for name, shape in shapes.items():
            where = forecast.layout(name, shape, mesh)
            torch.manual_seed(len(groups))
            places = list(placements(where))
            param = nn.Parameter(models.place(torch.randn(shape), ranks_here, places))
            param.grad = models.place(torch.randn(shape), ranks_here, places)
            groups.append({"params": [(name, param)], "algorithm": algorithm})
    optimizer = Muon(groups) if settings is None else _conda(groups, settings)
    sent, counts, flops = [], [], []
    for _ in range(3):
        counter = FlopCounterMode(display=False, custom_mapping=IN_PLACE)
        with recorded() as calls, counter:
            optimizer.step()
        sent.append(sent_bytes(calls))
        counts.append(len(calls))
        flops.append(counter.get_total_flops())
    state = sum(
        (value.to_local() if isinstance(value, DTensor) else value).nbytes
        for state in optimizer.state.values()
        for value in state.values()
    )
    coordinate = next(iter(optimizer.state)).device_mesh.get_coordinate()
    if settings is None:
        found = forecast.forecast_muon(PROJECTED, OTHERS, mesh, tuple(coordinate))
    else:
        found = forecast.forecast_conda(PROJECTED, OTHERS, mesh, settings, tuple(coordinate))
    step = sum(found.step.values())
    both = step + sum(found.refresh.values())
    planned = (found.state, step, both, found.collectives, found.flops)
    return (state, sent[1], sent[2], counts[1], flops[1]), planned


@pytest.mark.parametrize("mesh", MESHES, ids=lambda m: "x".join(map(str, m.sizes)))
def test_bytes_and_operations_are_those_of_real_runs(mesh: Mesh) -> None:
    both = [*SETTINGS, None] * 2
    first = MESHES.index(mesh) % len(both)
    for settings in both[first : first + 2]:
        for counted, expected in ranks.run(mesh.ranks, _count, mesh, settings):
            assert counted == expected


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--mesh", "dp=64"], "--mesh has no axis 'dp'; it has dp_replicate, dp_shard, tp"),
        (["--mesh", "dp_shard=0"], "dp_shard must be a positive number of ranks"),
        (["--mesh", "dp_shard=2.5"], "dp_shard must be a positive number of ranks"),
        (["--mesh", "dp_shard=2", "dp_shard=4"], "dp_shard is given twice"),
        (["--mesh", "tp=2", "--tp", "2"], "tp is given twice"),
        ([], "name a --model and a --mesh"),
        (["--mesh", "dp_shard=1000000"], "1000000 ranks are more than the 65536"),
        (["--scaling", "x.png"], "--scaling draws its own models and meshes"),
        (["--mesh", "dp_shard=2", "--optimizer.conda.lrr", "1"], "optimizer.conda.lr"),
    ],
)
def test_what_cannot_be_planned_is_said(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert plan.main(["--model", str(CONFIGS / "llama_60m.toml"), *words]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--scaling", "/no/such/folder/x.png"], "there is no folder /no/such/folder"),
        (["--scaling", "x.bogus"], "name a file that ends in .png"),
    ],
)
def test_a_picture_that_cannot_be_drawn_is_said(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert plan.main(words) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [["--tokens-per-rank", "x"], ["--tokens-per-rank=-1"], ["--tokens-per-rank", "0"]],
    ids=str,
)
def test_numbers_that_mean_nothing_are_refused(words: list[str]) -> None:
    with pytest.raises(SystemExit):
        plan.main(["--model", str(CONFIGS / "llama_60m.toml"), "--mesh", "dp_shard=2", *words])


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
        config = options.load(str(CONFIGS / f"llama_{name}.toml"), [])
        planned = Planned(config, Mesh(dp_shard=8), 8192)
        assert round(planned.parameters / 1e9, 1) == billions


@pytest.mark.parametrize(("name", "ranks_", "tp"), [("7b", 64, 1), ("70b", 64, 8)])
def test_a_step_sends_what_muon_sends(name: str, ranks_: int, tp: int) -> None:
    """Past the budget a gradient goes to its group and an update comes back: 2mn/p, in bfloat16."""
    given = ["--optimizer.conda.basis_budget", "0", "--optimizer.conda.basis_dtype", "bfloat16"]
    config = options.load(str(CONFIGS / f"llama_{name}.toml"), given)
    planned = Planned(config, Mesh(dp_shard=ranks_, tp=tp), 8192)
    muon = planned.rivals()["Muon, gathered to owners"]
    assert sum(planned.conda.step.values()) < 1.1 * sum(muon.step.values())
    assert planned.conda.flops < 1.1 * _mean_flops(planned.projected) / (ranks_ * tp)


def _mean_flops(shapes: dict[str, tuple[int, ...]]) -> float:
    return sum(4.0 * math.prod(shape) * min(shape) for shape in shapes.values())


@pytest.mark.parametrize("name", ["7b", "70b"])
def test_rows_add_up_to_the_total(name: str) -> None:
    config = options.load(str(CONFIGS / f"llama_{name}.toml"), [])
    found = Planned(config, Mesh(dp_shard=64), 8192).conda
    assert sum(kind.step for kind in found.kinds) == sum(found.step.values())
    assert sum(kind.refresh for kind in found.kinds) == sum(found.refresh.values())
    assert sum(kind.flops for kind in found.kinds) == pytest.approx(found.flops)


def test_owners_work_at_the_same_time() -> None:
    """Each of many ranks may have one matrix in a task, however large: none waits for another."""
    topology = Topology((8,), tuple(range(8)))
    large = Layout((8192, 8192), (8,), (Split(0),))
    plans = assign_owners([plan_weight(f"{i}", topology, large) for i in range(16)])
    tasks = fill_tasks(plans, range(16), 2**20, refreshing=True)
    assert [len(task) for task in tasks] == [8, 8]
    for task in tasks:
        assert {plans[i].owners[0] for i in task} == {(rank,) for rank in range(8)}


@pytest.mark.parametrize("delay", [0, 5])
def test_what_waits_for_a_refresh(delay: int) -> None:
    """16 matrices of 4 owners, four in turn, whether all ranks compute them or groups of one."""
    shapes = {f"layers.{i}.weight": (64, 64) for i in range(16)}
    one = svd_flops(64, 64)
    for budget in (4 * 2**30, 0):
        settings = CondaConfig(refresh_delay=delay, basis_budget=budget)
        found = forecast.forecast_conda(shapes, {}, Mesh(dp_shard=4), settings)
        assert (found.decompose, found.busiest) == (4 * one, 4 * one)
    time = forecast.Seconds(
        step=1.0, host=0.5, decompose=50.0, busiest=20.0, exchange=3.0, training=2.0
    )
    assert [time.stall(delay) for delay in (0, 1, 5, 9)] == [53.0, 20.0, 8.0, 3.0]


def test_bases_from_gradients_are_taken_where_a_matrix_is_computed() -> None:
    """16 matrices, four on each of 4 ranks; square ones have two bases, and others one.

    A refresh's products are those of a real one; beside them there is a QR decomposition of 4 r^3.
    """
    gram, basis = torch.eye(64), torch.linalg.qr(torch.randn(64, 64)).Q
    with FlopCounterMode(display=False) as counter:
        decompose_gram(gram, basis, "orthogonal_iteration")
    iteration = counter.get_total_flops() + 4 * 64**3
    for m, bases in ((64, 2), (128, 1)):
        shapes = {f"layers.{i}.weight": (m, 64) for i in range(16)}
        for method, flops in (("orthogonal_iteration", iteration), ("svd", 13 * 64**3)):
            settings = CondaConfig(basis_source="gradients", refresh_method=method)
            found = forecast.forecast_conda(shapes, {}, Mesh(dp_shard=4), settings)
            assert (found.decompose, found.busiest) == (4 * bases * flops,) * 2
            assert found.svd == (method == "svd")
            assert found.rotate == 4 * bases * 2 * 64**3
            assert not found.refresh


def test_more_ranks_take_less_time_each() -> None:
    config = options.load(str(CONFIGS / "llama_7b.toml"), [])
    times, states = [], []
    for count in (8, 64, 512):
        planned = Planned(config, Mesh(dp_shard=count), 8192)
        times.append(planned.seconds(planned.conda, HARDWARE["h100-ib400"]).step)
        states.append(planned.conda.state)
    assert times == sorted(times, reverse=True)
    assert states == sorted(states, reverse=True)


README = (ROOT / "README.md").read_text()
PLANNED = re.findall(r"^\| (\w+B) \| FSDP (\d+)(?: x TP (\d+))? \| (.*) \|$", README, re.MULTILINE)
HOSTS = re.findall(r"The host works (.*), (.*) and (.*) ms of it", README)[0]


@pytest.mark.parametrize(
    ("row", "host"), [*zip(PLANNED, HOSTS, strict=True)], ids=("7B", "70B", "405B")
)
def test_the_table_in_the_readme(row: tuple[str, ...], host: str) -> None:
    """And the sentence below it, on the host's time.

    A Muon in bfloat16 sends each element to an owner, and its update back, in 2 bytes each. Of p
    ranks, each owns 1/p of its own elements.
    """
    name, shards, tp, cells = row
    conda = "--optimizer.conda"
    given = [f"{conda}.matmul_dtype", "bfloat16", f"{conda}.basis_dtype", "bfloat16"]
    plans = [
        Planned(
            options.load(
                str(CONFIGS / f"llama_{name.lower()}.toml"),
                [*given, f"{conda}.basis_budget", str(budget)],
            ),
            Mesh(dp_shard=int(shards), tp=int(tp or 1)),
            8192,
        )
        for budget in (4 * 2**30, 0)
    ]
    times = [each.seconds(each.conda, HARDWARE["h100-ib400"]) for each in plans]
    states = "; ".join(f"{each.conda.state / 2**30:.1f}" for each in plans)
    sent = "; ".join(f"{sum(each.conda.step.values()) / 2**30:.2f}" for each in plans)
    p = plans[0].mesh.ranks
    muon = 4 * sum(map(math.prod, plans[0].projected.values())) / p * (1 - 1 / p)
    steps = "; ".join(f"{1e3 * time.step:.0f}" for time in times)
    exchanged = f"{sent}; Muon {muon / 2**30:.2f} GiB"
    assert cells == f"4 GiB; 0 | {states} GiB | {exchanged} | {steps} ms"
    hosts = sorted({round(1e3 * time.host) for time in times})
    assert host == " to ".join(map(str, hosts))


def test_the_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planned, "RANKS", [1, 8])
    monkeypatch.setattr(planned, "SCALES", ("llama_60m",))
    assert plan.main(["--scaling", str(tmp_path / "plan.png")]) == 0
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")
