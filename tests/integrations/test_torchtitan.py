"""torchtitan's real Trainer with Conda: every layout follows the one-process run."""

import json
from pathlib import Path

import pytest

import ranks
import titan_cpu
import titan_data
import titan_jobs
from processes import DEADLINE, TORCHRUN, forked
from titan_jobs import CONDA, EP, EP_TP, FSDP, FSDP_TP, HSDP, ONE, OVERRIDE, PP, Layout

DENSE, MOE, BFLOAT16 = 5e-5, 1e-3, 3e-3
"""Relative tolerances of losses; measured 1e-6 and 2e-5.

A router takes the largest logits, so that a rounding can send a token to another expert. Cutting
the batch in two on one process moves these losses as far as two processes do."""


def check(layout: Layout, config: str, tolerance: float, *options: str) -> None:
    found = titan_jobs.trajectory(layout, config, *options)
    expected = titan_jobs.trajectory(ONE, config)
    assert len(found) == titan_jobs.STEPS
    assert titan_jobs.distance(found, expected) < tolerance


DIAGNOSED = f"--optimizer.diagnostics_every={titan_jobs.STEPS}"
DENSE_LAYOUTS = [
    (FSDP, "full_dtensor"),
    (PP, "spmd_types"),
    (HSDP, "partial_dtensor"),
    (FSDP_TP, "full_dtensor"),  # and with spmd_types, the default, in the test of splits
]


def options_of(backend: str) -> tuple[str, str]:
    return f"--parallelism.spmd_backend={backend}", DIAGNOSED


@pytest.mark.parametrize(("layout", "backend"), DENSE_LAYOUTS, ids=str)
def test_dense_layouts_follow_one_process(layout: Layout, backend: str) -> None:
    check(layout, "llama3", DENSE, *options_of(backend))


def test_what_is_logged_once_for_each_stage() -> None:
    """In the same runs."""
    for (layout, backend), expected in zip(DENSE_LAYOUTS[:2], ([1, 0], [2, 2]), strict=True):
        runs = titan_jobs.conda_runs(layout, "llama3", *options_of(backend))
        last = f"Conda's diagnostics, step {titan_jobs.STEPS}:"
        for text in ("Conda: what each parameter gets", last):
            assert [titan_jobs.messages([run]).count(text) for run in runs] == expected


def test_expert_parallel_follows_one_process() -> None:
    """With the default backend, spmd_types, in test_torchtitan_checkpoint.py."""
    check(EP, "qwen3_moe", MOE, "--parallelism.spmd_backend=partial_dtensor")


@pytest.mark.parametrize(
    ("layout", "config"), [(FSDP, "qwen3_moe"), (EP_TP, "deepseek_v3")], ids=str
)
@pytest.mark.thorough
def test_moe_layouts_follow_one_process(layout: Layout, config: str) -> None:
    check(layout, config, MOE)


@pytest.mark.thorough
def test_options_that_change_no_result() -> None:
    """Sharded bases, CPU offload and the gradients of two batches."""
    sizes = ("--training.global_batch_size=4", "--training.local_batch_size=1")
    budget = "--optimizer.basis_budget=0"
    check(FSDP, "llama3", DENSE, budget, "--training.enable_cpu_offload", *sizes)


@pytest.mark.parametrize("layout", [PP, FSDP_TP], ids=str)
@pytest.mark.thorough
def test_split_weights_follow_one_process(layout: Layout) -> None:
    """Each head of the fused projection by itself, and two halves of another weight."""
    option = "--optimizer.splits=*.wqkv.weight=12,*.w1.weight=80+80"
    found = titan_jobs.trajectory(layout, "llama3", option)
    expected = titan_jobs.trajectory(ONE, "llama3", option)
    assert titan_jobs.distance(found, expected) < DENSE
    assert titan_jobs.distance(expected, titan_jobs.trajectory(ONE, "llama3")) > 10 * DENSE


@pytest.mark.thorough
def test_a_rule_for_one_fused_weight_counts_before_what_is_known_of_all() -> None:
    rule = "--optimizer.splits=layers.0.attention.qkv_linear.wqkv.weight=1"
    known = titan_jobs.trajectory(ONE, "llama3")
    assert titan_jobs.distance(titan_jobs.trajectory(ONE, "llama3", rule), known) > DENSE


@pytest.mark.thorough
def test_the_losses_depend_on_what_the_tests_compare() -> None:
    """Else the tolerances above would say nothing."""
    losses = titan_jobs.trajectory(ONE, "llama3")
    for change in ("--optimizer.update_proj_gap=2000", "--optimizer.scale=0.0"):
        changed = titan_jobs.trajectory(ONE, "llama3", change)
        assert titan_jobs.distance(changed, losses) > 100 * DENSE, change
    moe = titan_jobs.trajectory(ONE, "qwen3_moe")
    changed = titan_jobs.trajectory(ONE, "qwen3_moe", "--optimizer.scale=0.0")
    assert titan_jobs.distance(changed, moe) > 10 * MOE


@pytest.mark.thorough
def test_bfloat16_trains_alike() -> None:
    """Products alone; weights in bfloat16 in test_torchtitan_checkpoint.py."""
    options = ("--training.mixed_precision_param=bfloat16", "--optimizer.matmul_dtype=bfloat16")
    check(FSDP, "llama3", BFLOAT16, *options)


def test_registry_and_override_are_the_launcher() -> None:
    expected = titan_jobs.trajectory(ONE, "llama3")
    registry = ["--module=conda_dist.integrations.torchtitan", "--config=titan_configs.llama3"]
    for options in ((*registry, *CONDA), OVERRIDE):
        runs = titan_jobs.run(ONE, "llama3", *options, route="torchtitan")
        assert titan_jobs.losses(runs) == expected
        assert "layers.*.feed_forward.w2.weight" in titan_jobs.messages(runs)


@pytest.fixture(scope="module")
def stock() -> titan_cpu.Run:
    """A run of torchtitan's own optimizer."""
    (run,) = titan_jobs.run(ONE, "llama3", route="torchtitan")
    return run


@pytest.mark.thorough
def test_without_its_name_torchtitan_is_untouched(stock: titan_cpu.Run) -> None:
    launched = titan_jobs.run(ONE, "llama3")
    named = titan_jobs.run(ONE, "llama3", "--optimizer.name=stock")
    for runs in (launched, named):
        assert [run.steps for run in runs] == [stock.steps]
        assert "Optimizer AdamW" in titan_jobs.messages(runs)
    assert "Conda" not in titan_jobs.messages(launched)


def test_learning_rates_follow_the_schedule(stock: titan_cpu.Run) -> None:
    (conda,) = titan_jobs.run(ONE, "llama3", *CONDA, "--optimizer.adamw_scale=0.2")
    assert len({tuple(step.lrs) for step in stock.steps}) > 5
    for ours, theirs in zip(conda.steps, stock.steps, strict=True):
        factor = theirs.lrs[0] / stock.steps[1].lrs[0]
        assert ours.lrs == pytest.approx([5e-3 * factor] * len(ours.lrs))


@pytest.mark.thorough
def test_torchrun_trains_the_stock_debug_model(tmp_path: Path) -> None:
    """A user's command, on torchtitan's own config and data set, in processes of its own.

    test_packaging.py imports the launcher in a new Python.
    """
    arguments = [
        *("--module", "llama3", "--config", "llama3_debugmodel", "--optimizer.name", "conda"),
        *("--optimizer.lr", "5e-3", "--optimizer.betas", "0.9", "0.99"),
        *("--optimizer.update_proj_gap", "2", "--optimizer.adamw_params", "layers.0.*,*.wo.weight"),
        *("--training.steps", "3", "--training.seq_len", str(titan_data.SEQUENCE)),
        *("--training.local_batch_size", "2", "--validator.no-enable", "--debug.seed", "1"),
    ]
    record, cwd = tmp_path / "steps.json", titan_jobs.folder()
    job = (titan_cpu.__file__, "--folder", cwd, "--record", record, *arguments)
    with forked(*TORCHRUN, *job) as torchrun:
        said, _ = torchrun.communicate(timeout=DEADLINE)
    assert torchrun.returncode == 0, said
    expected = ranks.run(2, titan_cpu.job, "launcher", cwd, arguments)[-1]
    assert json.loads(record.read_text()) == [step._asdict() for step in expected.steps]
    assert len(expected.steps) == 3
