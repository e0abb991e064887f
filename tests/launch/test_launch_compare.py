"""Comparing optimizers and engines: what is run, what is kept, what the table says."""

import json
from itertools import combinations
from pathlib import Path

import pytest

import launch_jobs
from conda_dist.launch import compare
from conda_dist.launch.job import options
from conda_dist.launch.job.config import ConfigError
from conda_dist.launch.tools import comparison, sweeps
from conda_dist.launch.tools.comparison import (
    Curve,
    Distance,
    Outcome,
    Pair,
    Point,
    farthest,
    tabulate,
)
from conda_dist.launch.tools.sweeps import ENGINES, OPTIMIZERS, Trial


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return launch_jobs.write_config(tmp_path_factory.mktemp("compare"))


def plan(config: Path, rates: list[str], overrides: list[str]) -> list[Trial]:
    return sweeps.optimizer_trials(str(config), Path("out"), OPTIMIZERS, rates, overrides)


def test_a_sweep_is_one_run_per_rate(config: Path) -> None:
    trials = plan(config, ["conda=5e-3,1e-2", "adamw=2e-3"], [])
    assert [str(trial.folder) for trial in trials] == [
        "out/conda-lr0.005",
        "out/conda-lr0.01",
        "out/adamw-lr0.002",
        "out/muon-lr0.01",
    ]


def test_an_optimizer_s_key_goes_to_its_runs_only(config: Path) -> None:
    overrides = ["--optimizer.conda.scale", "0.5", "--training.steps=5"]
    arguments = [trial.arguments for trial in plan(config, [], overrides)]
    assert all("--training.steps=5" in each for each in arguments)
    assert ["--optimizer.conda.scale=0.5" in each for each in arguments] == [True, False, False]


@pytest.mark.parametrize(
    ("rates", "overrides", "words"),
    [
        ([], ["--optimizer.lr", "1"], "of which optimizer"),
        ([], ["--optimizer.name", "adamw"], "compare sets it itself"),
        ([], ["--output", "x"], "compare sets it itself"),
        ([], ["--training.step", "1"], "Did you mean 'training.steps'"),
        (["conda=fast"], [], "NAME=RATE,RATE is wanted"),
        (["sgd=1"], [], "not among the optimizers"),
    ],
)
def test_refusals(config: Path, rates: list[str], overrides: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        plan(config, rates, overrides)
    with pytest.raises(ConfigError, match="unknown optimizer 'sgd'"):
        sweeps.optimizer_trials(str(config), Path("out"), ["sgd"], [], [])


def outcome(name: str, lr: float, losses: list[float], seconds: float) -> Outcome:
    """A run of 100 steps with validations spread evenly over it."""
    every = 100 // len(losses)
    points = [
        Point(every * i, seconds * every * i / 100, loss) for i, loss in enumerate(losses, start=1)
    ]
    return Outcome(name, lr, tuple(points), optimizer_s=0.01, step_s=seconds / 100)


def test_the_table_measures_against_adamw_s_best_run() -> None:
    rows = tabulate(
        [
            outcome("conda", 1e-2, [5.0, 4.0, 3.0, 2.5], seconds=20.0),
            outcome("adamw", 1e-3, [5.5, 5.0, 4.5, 4.2], seconds=10.0),
            outcome("adamw", 2e-3, [5.5, 4.9, 4.4, 4.0], seconds=10.0),
            outcome("muon", 1e-3, [6.0, 5.0, 4.5, 4.1], seconds=15.0),
        ]
    )
    assert [row.best for row in rows] == [True, False, True, True]
    assert [row.steps_to_baseline for row in rows] == [50, None, 100, None]
    assert rows[0].steps_ratio == 0.5
    assert rows[0].seconds_to_baseline == pytest.approx(10.0)
    assert rows[0].seconds_ratio == pytest.approx(1.0)
    assert rows[0].optimizer_share == pytest.approx(0.05)


def test_without_adamw_the_first_optimizer_is_the_measure() -> None:
    rows = tabulate(
        [outcome("muon", 1e-3, [5.0, 4.0], 10.0), outcome("conda", 1e-2, [4.0, 3.0], 10.0)]
    )
    assert [row.steps_to_baseline for row in rows] == [100, 50]


def test_a_comparison_runs_draws_and_continues(
    config: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(config), "--output", str(tmp_path), "--nproc", "1"]
    arguments += ["--optimizers", "conda,adamw", "--training.steps", "12"]
    assert compare.main(arguments) == 0
    printed = capfd.readouterr().out
    assert "**conda**" in printed
    found = json.loads((tmp_path / "comparison.json").read_text())
    assert found["baseline"] == "adamw"
    assert [run["optimizer"] for run in found["runs"]] == ["conda", "adamw"]
    for run, name in zip(found["runs"], ("conda-lr0.01", "adamw-lr0.01"), strict=True):
        lines = launch_jobs.metrics(tmp_path / name)
        assert run["val_loss"] == lines[-1]["val_loss"]
    picture = tmp_path / "comparison.png"
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "comparison.md").read_text() in printed
    # Both saw the same batches.
    first = [launch_jobs.metrics(tmp_path / n)[0]["loss"] for n in ("conda-lr0.01", "adamw-lr0.01")]
    assert first[0] == first[1]

    # Extended by one run, the two complete ones are not repeated; a failed one is reported.
    before = {file: file.stat().st_mtime_ns for file in tmp_path.glob("*/metrics.jsonl")}
    assert compare.main([*arguments, "--lr", "adamw=1e-2,1e9"]) == 1
    captured = capfd.readouterr()
    assert captured.out.count("complete already") == 2
    assert "failed" in captured.err
    assert "adamw-lr1e+09" in captured.err
    assert all(file.stat().st_mtime_ns == time for file, time in before.items())
    assert comparison.read_outcome(tmp_path / "adamw-lr0.01", "adamw", 0.01).final.step == 12

    # The folders of another configuration are not taken for this one's.
    assert compare.main([*arguments[:-1], "14"]) == 2
    said = capfd.readouterr().err
    assert "conda-lr0.01 holds a run of another configuration" in said
    assert "training.steps" in said


def test_engines_run_the_same_job(config: Path) -> None:
    overrides = ["--optimizer.name", "adamw", "--deepspeed.config", "zero.json"]
    trials = sweeps.engine_trials(str(config), Path("out"), list(ENGINES), overrides)
    assert [trial.name for trial in trials] == list(ENGINES)
    assert ["--deepspeed.config=zero.json" in trial.arguments for trial in trials] == [
        trial.name.startswith("zero") for trial in trials
    ]
    loaded = [options.load(trial.arguments[0], trial.arguments[1:]) for trial in trials]
    assert {each.optimizer.name for each in loaded} == {"adamw"}
    assert [each.engine for each in loaded] == ["fsdp2", *["deepspeed"] * 4, "fsdp2"]
    assert [each.deepspeed.stage for each in loaded[1:5]] == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("engines", "overrides", "words"),
    [
        (["zero4"], [], "unknown engine 'zero4'"),
        (["zero1"], ["--deepspeed.stage", "2"], "compare sets it itself"),
        (["zero1"], ["--optimizer.name", "muon"], "is not supported by engine deepspeed"),
    ],
)
def test_refusals_of_engines(
    config: Path, engines: list[str], overrides: list[str], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        sweeps.engine_trials(str(config), Path("out"), engines, overrides)


def test_the_farthest_pair_of_curves_is_found() -> None:
    one = Curve("one", {1: 5.0, 2: 4.0, 3: 3.0}, {2: 4.5})
    other = Curve("other", {1: 5.0, 2: 4.25}, {2: 4.0})
    assert farthest(one, other) == Distance(0.5, "val_loss", 2, "one", "other")
    assert farthest(one, one).distance == 0.0


@pytest.mark.thorough
def test_engines_are_compared(
    config: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(config), "--output", str(tmp_path), "--engines", "fsdp2,zero2"]
    arguments += ["--training.steps", "4", "--checkpoint.interval", "0"]
    assert compare.main([*arguments, "--lr", "conda=1"]) == 2
    assert "--engines runs one optimizer" in capfd.readouterr().err
    assert compare.main(arguments) == 0
    found = json.loads((tmp_path / "engines.json").read_text())
    assert {frozenset((pair["one"], pair["other"])) for pair in found} == {
        frozenset(pair) for pair in combinations(("fsdp2", "zero2"), 2)
    }
    losses = {
        name: [line["loss"] for line in launch_jobs.metrics(tmp_path / name)]
        for name in ("fsdp2", "zero2")
    }
    assert len(set(losses["fsdp2"])) == 4
    for name, engine in (("fsdp2", "fsdp2"), ("zero2", "deepspeed")):
        assert f'engine = "{engine}"' in (tmp_path / name / "config.toml").read_text()
    for pair in found:  # the same on a machine whose products do not depend on the batch's size
        ways = (losses[pair["one"]], losses[pair["other"]])
        assert pair["distance"] >= max(abs(a - b) for a, b in zip(*ways, strict=True))
        assert pair["distance"] < 1e-4
    assert (tmp_path / "engines.md").read_text() in capfd.readouterr().out
    assert (tmp_path / "engines.png").read_bytes().startswith(b"\x89PNG")


# Refresh methods and intervals


def test_a_run_for_every_method_interval_and_seed(config: Path) -> None:
    wanted = ["svd=5", "orthogonal_iteration=1,5,5"]
    trials = sweeps.refresh_trials(str(config), Path("out"), wanted, ["0", "3"], [])
    assert [trial.folder.name for trial in trials] == [
        f"{pair}-seed{seed}"
        for pair in ("svd-gap5", "orthogonal_iteration-gap1", "orthogonal_iteration-gap5")
        for seed in (0, 3)
    ]
    assert {trial.config.optimizer.name for trial in trials} == {"conda"}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--refreshes", "qr=5"), "'qr' is none of the methods svd, orthogonal_iteration"),
        (("--refreshes", "svd"), "METHOD=GAP,GAP is wanted"),
        (("--refreshes", "svd=5", "--seeds", "one"), "training.seed"),
        (("--refreshes", "svd=0"), "update_proj_gap"),
        (("--refreshes", "svd=5", "--training.seed", "1"), "compare sets it itself"),
        (("--refreshes", "svd=5", "--optimizer.update_proj_gap", "1"), "sets it itself"),
        (("--refreshes", "svd=5", "--engines", "fsdp2"), "leave the others out"),
        (("--seeds", "1"), "--seeds is for --refreshes"),
    ],
)
def test_refusals_of_refreshes(
    config: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
    words: str,
) -> None:
    assert compare.main([str(config), "--output", str(tmp_path / "out"), *arguments]) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_table_of_refreshes_has_the_lowest_loss_first(tmp_path: Path) -> None:
    pairs = [Pair("svd", 5, (3.5, 3.25), 0.02), Pair("eigh64", 1, (3.25, 3.25), 0.04)]
    lines = comparison.write_refreshes(pairs, tmp_path).splitlines()
    assert lines[2] == "| eigh64 | 1 | 3.250, 3.250 | 3.250 | 40.0 |"
    assert lines[3] == "| svd | 5 | 3.500, 3.250 | 3.375 | 20.0 |"


@pytest.mark.thorough
def test_refreshes_are_compared(
    config: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(config), "--output", str(tmp_path), "--training.steps", "4"]
    arguments += ["--refreshes", "orthogonal_iteration=1,2"]
    assert compare.main(arguments) == 0
    found = json.loads((tmp_path / "intervals.json").read_text())
    for gap, pair in zip((1, 2), found, strict=True):
        lines = launch_jobs.metrics(tmp_path / f"orthogonal_iteration-gap{gap}-seed0")
        assert pair["gap"] == gap
        assert pair["val_losses"] == [lines[-1]["val_loss"]]
    assert (tmp_path / "intervals.png").read_bytes().startswith(b"\x89PNG")
    capfd.readouterr()
    assert compare.main(arguments) == 0
    assert capfd.readouterr().out.count("complete already") == 2
