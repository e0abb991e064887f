"""Comparing optimizers and engines: what is run, what is kept, what the table says."""

import json
from pathlib import Path
from typing import Any

import pytest

import launch_jobs
from conda_dist.launch import compare
from conda_dist.launch.job import options
from conda_dist.launch.tools import sweeps
from conda_dist.launch.tools.comparison import Run, baseline_of, tabulate
from conda_dist.launch.tools.sweeps import ENGINES, Trial


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return launch_jobs.write_config(tmp_path_factory.mktemp("compare"))


def plan(config: Path, *vary: str, **others: Any) -> list[Trial]:
    return sweeps.plan(str(config), Path("out"), 2, vary=vary, **others)


def test_a_run_for_each_combination(config: Path) -> None:
    """A key of one optimizer varies its runs only."""
    rates = "optimizer.conda.lr=5e-3,1e-2"
    trials = plan(config, rates, "training.seed=0,3", optimizers=["conda", "adamw"])
    assert [str(trial.folder) for trial in trials] == [
        "out/conda-lr5e-3-seed0",
        "out/conda-lr5e-3-seed3",
        "out/conda-lr1e-2-seed0",
        "out/conda-lr1e-2-seed3",
        "out/adamw-seed0",
        "out/adamw-seed3",
    ]
    assert [trial.config.optimizer.chosen.lr for trial in trials[:4:2]] == [5e-3, 1e-2]
    assert trials[1].config.training.seed == 3
    (alone,) = plan(config)
    assert alone.name == "conda"
    methods = "optimizer.refresh_method=svd,orthogonal_iteration"
    names = [trial.name for trial in plan(config, methods, "optimizer.update_proj_gap=5,5")]
    assert names == ["conda-refresh_methodsvd-update_proj_gap5",
                     "conda-refresh_methodorthogonal_iteration-update_proj_gap5"]  # fmt: skip


def test_an_optimizer_s_key_goes_to_its_runs_only(config: Path) -> None:
    overrides = ["--optimizer.conda.scale", "0.5", "--training.steps=5"]
    trials = plan(config, optimizers=["conda", "adamw"], overrides=overrides)
    assert all("--training.steps=5" in trial.arguments for trial in trials)
    own = ["--optimizer.conda.scale=0.5" in trial.arguments for trial in trials]
    assert own == [True, False]


def test_engines_run_the_same_job(config: Path) -> None:
    overrides = ["--optimizer.name", "adamw", "--deepspeed.config", "zero.json"]
    trials = plan(config, engines=list(ENGINES), overrides=overrides)
    assert [trial.name for trial in trials] == list(ENGINES)
    assert [trial.processes for trial in trials] == [2] * 5 + [1]
    assert ["--deepspeed.config=zero.json" in trial.arguments for trial in trials] == [
        trial.name.startswith("zero") for trial in trials
    ]
    loaded = [options.load(trial.arguments[0], trial.arguments[1:]) for trial in trials]
    assert {each.optimizer.name for each in loaded} == {"adamw"}
    assert [each.engine for each in loaded] == ["fsdp2", *["deepspeed"] * 4, "fsdp2"]
    assert [each.deepspeed.stage for each in loaded[1:5]] == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--optimizer.lr", "1"], "of which optimizer"),
        (["--vary", "optimizer.lr=1,2", "--optimizers", "conda"], "of which optimizer"),
        (["--optimizer.name", "adamw"], "compare sets it itself"),
        (["--output", "out", "--resume"], "compare sets it itself"),
        (["--training.step", "1"], "Did you mean 'training.steps'"),
        (["--optimizers", "sgd"], "unknown 'sgd'"),
        (["--engines", "zero4"], "unknown 'zero4'"),
        (["--engines", "zero1", "--deepspeed.stage", "2"], "compare sets it itself"),
        (["--engines", "zero1", "--optimizer.name", "muon"], "not supported by engine deepspeed"),
        (["--engines", "fsdp2", "--optimizers", "conda"], "--engines runs one optimizer"),
        (["--vary", "training.seed"], "KEY=VALUE,VALUE is wanted"),
        (["--vary", "training.sed=1"], "Did you mean 'training.seed'"),
        (["--vary", "training.seed=one"], "training.seed one: a whole number is wanted"),
        (["--vary", "training.seed=1,2", "--training.seed", "1"], "compare sets it itself"),
        (["--vary", "optimizer.conda.update_proj_gap=0"], "optimizer.conda.update_proj_gap = 0"),
    ],
)
def test_refusals(
    config: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    words: str,
) -> None:
    assert compare.main([str(config), "--output", str(tmp_path / "out"), *arguments]) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def run(name: str, optimizer: str, losses: list[float], seconds: float) -> Run:
    """A run of 100 steps with validations spread evenly over it."""
    every = 100 // len(losses)
    lines = [
        {
            "step": every * i,
            "train_s": seconds * every * i / 100,
            "loss": loss,
            "val_loss": loss,
            "optimizer_s": 0.01,
            "step_s": 0.2,
        }
        for i, loss in enumerate(losses, start=1)
    ]
    return Run(name, optimizer, 1e-3, lines)


def test_runs_are_measured_by_adamw_s_best() -> None:
    runs = [
        run("conda", "conda", [5.0, 4.0, 3.0, 2.5], seconds=20.0),
        run("adamw-1", "adamw", [5.5, 5.0, 4.5, 4.2], seconds=10.0),
        run("adamw-2", "adamw", [5.5, 4.9, 4.4, 4.0], seconds=10.0),
        run("muon", "muon", [6.0, 5.0, 4.5, 4.1], seconds=15.0),
    ]
    assert baseline_of(runs).name == "adamw-2"
    rows = tabulate(runs)
    assert [row.run for row in rows] == ["conda", "adamw-2", "muon", "adamw-1"]
    assert [row.steps_to_baseline for row in rows] == [50, 100, None, None]
    assert rows[0].seconds_to_baseline == pytest.approx(10.0)
    assert rows[0].optimizer_share == pytest.approx(0.05)
    assert rows[0].farthest_from_baseline == pytest.approx(1.5)
    assert rows[1].farthest_from_baseline == 0.0


def test_without_adamw_the_first_run_is_the_measure() -> None:
    runs = [run("muon", "muon", [5.0, 4.0], 10.0), run("conda", "conda", [4.0, 3.0], 10.0)]
    assert baseline_of(runs) is runs[0]
    assert {row.run: row.steps_to_baseline for row in tabulate(runs)} == {"muon": 100, "conda": 50}


@pytest.mark.thorough
def test_a_comparison_runs_draws_and_continues(
    config: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(config), "--output", str(tmp_path), "--nproc", "1"]
    arguments += ["--optimizers", "conda,adamw", "--training.steps", "12"]
    assert compare.main(arguments) == 0
    printed = capfd.readouterr().out
    found = json.loads((tmp_path / "comparison.json").read_text())
    assert found["baseline"] == "adamw"
    assert {row["run"] for row in found["runs"]} == {"conda", "adamw"}
    for row in found["runs"]:
        assert row["val_loss"] == launch_jobs.metrics(tmp_path / row["run"])[-1]["val_loss"]
    assert (tmp_path / "comparison.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "comparison.md").read_text() in printed
    # Both saw the same batches.
    first = [launch_jobs.metrics(tmp_path / name)[0]["loss"] for name in ("conda", "adamw")]
    assert first[0] == first[1]

    # Extended by one run, the two complete ones are not repeated; a failed one is reported.
    before = {file: file.stat().st_mtime_ns for file in tmp_path.glob("*/metrics.jsonl")}
    (tmp_path / "muon").mkdir()
    (tmp_path / "muon" / "checkpoints").touch()
    arguments[arguments.index("conda,adamw")] = "conda,adamw,muon"
    assert compare.main(arguments) == 1
    captured = capfd.readouterr()
    assert captured.out.count("complete already") == 2
    assert "failed" in captured.err
    assert str(tmp_path / "muon") in captured.err
    assert all(file.stat().st_mtime_ns == time for file, time in before.items())

    # The folders of another configuration are not taken for this one's.
    assert compare.main([*arguments[:-1], "14"]) == 2
    said = capfd.readouterr().err
    assert "conda holds a run of another configuration" in said
    assert "training.steps" in said


@pytest.mark.thorough
def test_engines_are_compared(
    config: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(config), "--output", str(tmp_path), "--engines", "fsdp2,zero2"]
    arguments += ["--training.steps", "4", "--checkpoint.interval", "0"]
    assert compare.main(arguments) == 0
    found = json.loads((tmp_path / "comparison.json").read_text())
    assert found["baseline"] == "fsdp2"
    losses = [
        [line["loss"] for line in launch_jobs.metrics(tmp_path / name)]
        for name in ("fsdp2", "zero2")
    ]
    assert len(set(losses[0])) == 4
    for name, engine in (("fsdp2", "fsdp2"), ("zero2", "deepspeed")):
        assert f'engine = "{engine}"' in (tmp_path / name / "config.toml").read_text()
    (distance,) = (row["farthest_from_baseline"] for row in found["runs"] if row["run"] == "zero2")
    assert max(abs(a - b) for a, b in zip(*losses, strict=True)) <= distance < 1e-4
