"""The command that compares optimizers: what it refuses, plans, runs, keeps and continues."""

import json
import math
import re
import time
from pathlib import Path
from typing import Any

import pytest

import launch_jobs
from conda_dist.launch import compare
from conda_dist.launch.job import options
from conda_dist.launch.job.config import ConfigError
from conda_dist.launch.tools import protocol, trials
from conda_dist.launch.tools.comparison import Findings
from processes import DEADLINE, children, forked, has_ended, started, wait_for_step

RESULTS = Path(__file__).parents[2] / "launch" / "results"


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return launch_jobs.write_config(tmp_path_factory.mktemp("compare"))


# The command line


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--optimizers", "sgd"], "unknown 'sgd'"),
        (["--optimizers", "conda+update_proj_gap=0"], "optimizer.conda.update_proj_gap = '0'"),
        (["--optimizers", "conda+gap=1"], "unknown key 'optimizer.conda.gap'"),
        (["--optimizer.lr", "1"], "of which optimizer"),
        (["--optimizer.name", "adamw"], "compare sets it itself"),
        (["--output", "out", "--resume"], "compare sets it itself"),
        (["--training.step", "1"], "Did you mean 'training.steps'"),
        (["--optimizers", "muon", "--optimizer.conda.lr", "1"], "has no effect"),
        (["--optimizers", "muon", "--engine", "deepspeed"], "not supported by engine deepspeed"),
        (["--schedule.min_lr", "1e-5"], "min_lr_ratio instead"),
        (["--schedule.warmup_steps", "6"], "schedule.warmup_steps 6 is more than training.steps"),
        (["--data.path", "absent"], "data.path 'absent' names no file"),
        (["--budget", "0"], "--budget"),
        (["--draw"], "--draw runs nothing"),
    ],
)
def test_refusals(
    config: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    words: str,
) -> None:
    try:
        code = compare.main([str(config), "--output", str(tmp_path / "out"), *arguments])
    except SystemExit as ended:
        code = int(ended.code or 0)
    assert code == 2
    said = capsys.readouterr().err
    assert words in said
    assert said.count("\n") == 1
    assert not (tmp_path / "out").exists()


def planned(config: Path, output: Path, *arguments: str) -> protocol.Comparison:
    given, overrides = compare.parse([str(config), "--output", str(output), *arguments])
    return protocol.plan(given, overrides, arguments)


def test_a_run_s_command_says_all_that_it_differs_in(config: Path, tmp_path: Path) -> None:
    rules = "conda,conda+scale=0.5,adamw"
    found = planned(config, tmp_path, "--optimizers", rules, "--optimizer.conda.betas", "0.8,0.9")
    assert [rule.name for rule in found.protocol.rules] == rules.split(",")
    assert [rule.matrices for rule in found.protocol.rules] == [2.5e-3, 5e-3, 1e-2]
    (tmp_path / "config.toml").write_text(options.to_toml(found.config))
    for rule in found.protocol.rules:
        run = found.protocol.trial(rule, (1, -2))
        *_, module, path = (word for word in found.command(run) if not word.startswith("--"))
        assert module == "conda_dist.launch.pretrain"
        loaded = options.load(path, [w for w in found.command(run) if w.startswith("--")])
        assert loaded.optimizer.name == rule.name.partition("+")[0]
        rates = loaded.optimizer.effective_rates
        assert rates == pytest.approx((2 * rule.matrices, rule.rest / 4))
        assert loaded.optimizer.conda.betas == (0.8, 0.9)
        assert loaded.output == str(tmp_path / "runs" / run.name)
    assert found.results["sessions"][0]["versions"]["torch"]


def test_a_list_of_rules_may_hold_blanks_and_lists_of_numbers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rules = " conda, conda+ betas = 0.8, .9 + lr=1e+0,muon"
    output = ["--output", str(tmp_path)]
    given, _ = compare.parse([*output, "--optimizers", rules])
    assert given.optimizers == ["conda", "conda+betas=0.8,.9+lr=1e+0", "muon"]
    keys = protocol.keys_of(given.optimizers[1])
    assert keys["optimizer.conda.betas"] == (0.8, 0.9)
    assert keys["optimizer.conda.lr"] == 1.0
    assert compare.main([*output, "--draw", "--seeds", "0"]) == 2
    assert "--draw runs nothing" in capsys.readouterr().err


def test_a_folder_that_is_not_what_was_planned_for_is_refused(config: Path, tmp_path: Path) -> None:
    found = planned(config, tmp_path)
    (tmp_path / "results.json").write_text(json.dumps({**found.results, "runs": []}))
    with pytest.raises(ConfigError, match="another command has just written"):
        trials.Runner(found)
    assert {each.name for each in tmp_path.iterdir()} == {"results.json"}


def test_seeds_are_all_rules_and_trials_each_one_s(config: Path, tmp_path: Path) -> None:
    """Means over other seeds could not be compared. Rules without other seeds have no mean."""
    last: tuple[str, ...] = ("--optimizers", "conda", "--seeds", "2", "--budget", "4")
    for more, expected in (
        (last, [("conda", 4, 2)]),
        (("--optimizers", "muon"), [("conda", 4, 2), ("muon", 8, 2)]),
        (("--optimizers", "muon", "--seeds", "5"), [("conda", 4, 5), ("muon", 8, 5)]),
        (("--budget", "9"), [("conda", 9, 5), ("muon", 9, 5)]),
        (("--optimizers", "muon", "--seeds", "0"), [("conda", 9, 5), ("muon", 9, 0)]),
        (("--optimizers", "adamw"), [("conda", 9, 5), ("muon", 9, 0), ("adamw", 8, 5)]),
        (("--seeds", "4"), [("conda", 9, 4), ("muon", 9, 4), ("adamw", 8, 4)]),
    ):
        found = planned(config, tmp_path, *more)
        assert [(r.name, r.budget, r.seeds) for r in found.protocol.rules] == expected
        (tmp_path / "results.json").write_text(json.dumps(found.results))


def test_a_key_that_is_newer_than_the_results_had_its_default(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = planned(config, tmp_path, "--optimizers", "conda")
    del found.results["config"]["optimizer.conda.nesterov"]
    (tmp_path / "results.json").write_text(json.dumps(found.results))
    assert planned(config, tmp_path).results["config"]["optimizer.conda.nesterov"] is None
    with pytest.raises(ConfigError, match=r"with another optimizer\.conda\.nesterov"):
        planned(config, tmp_path, "--optimizer.conda.nesterov", "true")


@pytest.mark.parametrize("folder", sorted(RESULTS.glob("*/")), ids=lambda folder: folder.name)
def test_results_in_the_repository_are_drawn_and_continued(folder: Path) -> None:
    found = protocol.read(folder)
    assert (folder / "comparison.md").read_text() == Findings(found).table()
    assert not re.findall(r'[ ="]/', (folder / "results.json").read_text())  # no machine's paths
    given, overrides = compare.parse(["--output", str(folder)])
    assert protocol.plan(given, overrides, []).results["rules"] == found["rules"]


def test_runs_at_once_share_cores_and_gpus(config: Path, tmp_path: Path) -> None:
    found = planned(config, tmp_path, "--nproc", "2", "--jobs", "2")
    given = trials.environment_of(found, 1, list("0123"))
    assert given["CUDA_VISIBLE_DEVICES"] == "2,3"
    assert "CUDA_VISIBLE_DEVICES" not in trials.environment_of(found, 0, [])


# The results


WRONG: list[tuple[str, Any, str]] = [
    ("runs.0.rule", None, "runs.0.rule: Field required"),
    ("sessions.0.versions", None, "sessions.0.versions: Field required"),
    ("runs.0.session", 1, "runs.0.session: there is no session 1"),
    ("runs.0.session", -1, "runs.0.session: must be greater than or equal to 0"),
    ("runs.0.matrices", 0, "runs.0.matrices: must be greater"),
    ("runs.0.matrices", -1e-3, "runs.0.matrices: must be greater"),
    ("rules.0.matrices", 0.0, "rules.0.matrices: must be greater"),
    ("runs.0.val_loss", math.nan, "runs.0.val_loss: must be a finite number"),
    ("runs.0.curve", [], "runs.0: its curve does not end at step 8"),
    ("runs.0.curve", [[8]], "runs.0.curve.0: List should have at least 2 items"),
    ("sessions", 5, "sessions: must be a valid list"),
    ("sessions", [], "sessions: List should have at least 1 item"),
    ("runs", [5], "runs.0: must be a valid dictionary"),
    ("rules.0.budget", "3", "rules.0.budget: must be a valid integer"),
    ("rules.0.more", 1, "rules.0.more: Extra inputs are not permitted"),
    ("rules.0.name", "sgd", "unknown 'sgd'"),
    ("config", [], "config: must be a valid dictionary"),
    ("config.optimizer:conda:weight_decay", None, "has no optimizer.conda.weight_decay"),
    ("config.optimizer:conda:grad_clip", "1", "optimizer.conda.grad_clip = '1': must be"),
    ("config.training:steps", 0, "training.steps = 0: must be greater"),
]


@pytest.mark.parametrize(("place", "value", "words"), WRONG, ids=[f"{p}={v}" for p, v, _ in WRONG])
def test_results_that_are_damaged_are_refused(
    config: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    place: str,
    value: Any,
    words: str,
) -> None:
    """In one line; None: it is not there."""
    found = planned(config, tmp_path, "--optimizers", "conda", "--budget", "1", "--seeds", "1")
    (run,), _ = found.protocol.ahead({})
    whole = {
        **found.results,
        "runs": [launch_jobs.record(run, 4.0, curve=[[run.steps, 4.0]], wall_s=1.0)],
    }
    (file := tmp_path / "results.json").write_text(json.dumps(whole))
    assert protocol.read(tmp_path) == json.loads(file.read_text())
    at: Any = (spoilt := json.loads(file.read_text()))
    *above, last = (int(key) if key.isdigit() else key for key in place.split("."))
    for key in above:
        at = at[key]
    last = last.replace(":", ".") if isinstance(last, str) else last
    at[last] = value
    if value is None:
        del at[last]
    file.write_text(json.dumps(spoilt))
    assert compare.main(["--output", str(tmp_path), "--draw"]) == 2
    said = capsys.readouterr().err
    assert f"{file} is damaged: " in said
    assert words in said
    assert said.count("\n") == 1
    assert {each.name for each in tmp_path.iterdir()} == {"results.json"}


# All of it


@pytest.mark.thorough
def test_a_comparison_of_two_processes_each_in_new_pythons(config: Path, tmp_path: Path) -> None:
    typed = (config, "--output", tmp_path, "--optimizers", "adamw", "--nproc", 2)
    typed += ("--budget", 1, "--seeds", 0, "--training.steps", 2, "--schedule.warmup_steps", 1)
    with started("-m", "conda_dist.launch.compare", *typed) as process:
        said, _ = process.communicate(timeout=DEADLINE)
    assert process.returncode == 0, said
    run = tmp_path / "runs" / "adamw-matrices0.01-rest0.01-seed0-steps2"
    assert len(launch_jobs.metrics(run)) == 2
    assert "ranks      2 (2 on" in run.with_name(f"{run.name}.log").read_text()
    assert "(only seed 0)" in (tmp_path / "comparison.md").read_text()


def compared(code: int, *arguments: Any) -> str:
    """What a comparison prints, which ends with that code."""
    with forked("-m", "conda_dist.launch.compare", *arguments) as process:
        said, _ = process.communicate(timeout=DEADLINE)
        assert process.returncode == code, said
    return said


@pytest.mark.thorough
def test_a_comparison_is_killed_continued_and_extended(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run that was begun goes on from its checkpoint, and one that is finished stays."""
    output, more = tmp_path / "out", ["--seeds", "1", "--budget", "1"]
    typed = [str(config), "--output", str(output), "--optimizers", "conda", *more]
    typed += ["--checkpoint.interval", "1", "--training.val_interval", "2"]
    first = output / "runs" / "conda-matrices0.0025-rest0.01-seed0-steps8"
    with forked("-m", "conda_dist.launch.compare", *typed) as process:
        wait_for_step(first, 3, process)
        (job,) = children(process.pid)
        process.kill()
        deadline = time.monotonic() + DEADLINE
        while not has_ended(job):  # nor does it train on alone
            assert time.monotonic() < deadline
            time.sleep(0.05)
    assert not (first / "summary.json").exists()
    reached = launch_jobs.metrics(first)

    # The same again, with a rule that diverges in its second step, and one that is better.
    extended = ["--output", str(output), "--optimizers", "muon,adamw", *more]
    extended += ["--optimizer.muon.lr=1e9", "--jobs", "2"]
    assert "continues: conda" in compared(0, *extended)
    assert launch_jobs.metrics(first)[: len(reached) - 1] == reached[:-1]
    results = json.loads((output / "results.json").read_text())
    runs = {(r["rule"], r["seed"], r["steps"]): r for r in results["runs"]}
    assert {key for key in runs if key[2] == 8} == {
        ("conda", 0, 8), ("conda", 1, 8), ("adamw", 0, 8), ("adamw", 1, 8), ("muon", 0, 8)
    }  # fmt: skip
    assert {key[2] for key in runs} > {8}  # the better rule's shorter runs
    assert runs["muon", 0, 8]["val_loss"] is None
    assert runs["conda", 1, 8]["state_bytes"] > 100_000
    assert len({run["data"] for run in results["runs"]} - {None}) == 1
    assert len(results["sessions"]) == 2
    table, picture = output / "comparison.md", output / "comparison.png"
    assert "| muon | 1e+09 |" in table.read_text()
    assert not list(output.glob("runs/*/checkpoints"))

    # Once more: nothing is run again. A run that fails is said, and the rest is drawn.
    text = table.read_text()
    table.unlink()
    picture.unlink()
    assert compare.main(["--output", str(output), "--draw"]) == 0
    assert table.read_text() == text
    assert picture.exists()
    for rule in ("conda-matrices0.0025", "adamw-matrices0.01"):
        (output / "runs" / f"{rule}-rest0.01-seed2-steps8").touch()
    said = compared(1, "--output", output, "--optimizers", "conda", "--seeds", "2")
    assert "begins" not in said
    assert "failed: conda-matrices0.0025-rest0.01-seed2-steps8: " in said
    assert compare.main(["--output", str(output), "--training.steps", "9"]) == 2
    assert "another training.steps" in capsys.readouterr().err
