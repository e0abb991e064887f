"""Comparing optimizers: which runs are made, what is kept, what the table says."""

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
from conda_dist.launch.tools.search import Point, Protocol, Rule, Run, edges, search, steps_to
from processes import DEADLINE, children, forked, has_ended, started, wait_for_step

RESULTS = Path(__file__).parents[2] / "launch" / "results"


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return launch_jobs.write_config(tmp_path_factory.mktemp("compare"))


# The search


def measured(loss: Any, budget: int) -> tuple[list[Point], Point, int]:
    """All points that a search measures, the best, and in how many rounds it asked for them."""
    losses: dict[Point, float] = {}
    for rounds in range(100):
        points, best = search(losses, budget)
        if best is not None:
            assert set(points) == set(losses)
            return points, best, rounds
        losses |= {point: loss(*point) for point in points}
    raise AssertionError("no end")


def test_a_search_goes_along_one_rate_then_the_other() -> None:
    points, best, rounds = measured(lambda i, j: (i - 1) ** 2 + (j + 1) ** 2, budget=20)
    assert best == (1, -1)
    assert points[:4] == [(0, 0), (-1, 0), (1, 0), (2, 0)]  # extended at the edge
    assert points[4:] == [(1, -1), (1, 1), (1, -2), (0, -1), (2, -1)]  # around the best, twice
    assert rounds == 5
    assert edges(points, best) == []


@pytest.mark.parametrize("budget", [1, 2, 3, 5, 8])
def test_a_search_keeps_to_its_budget_and_says_where_it_is_open(budget: int) -> None:
    points, best, _ = measured(lambda i, j: -i - j / 10, budget)
    assert len(points) == budget
    assert best == max(points)
    assert {"matrices x 2", "rest x 2"} <= set(edges(points, best))
    assert ("matrices / 2" in edges(points, best)) == (budget == 1)


def test_a_search_backs_out_of_rates_at_which_all_diverges() -> None:
    _, best, _ = measured(lambda i, j: math.inf if i > -2 else abs(i + 3) + j * j, budget=8)
    assert best == (-3, 0)


# The runs

ONE, TWO = Rule("conda", 3e-3, 1e-2, 3, 2), Rule("adamw", 1e-3, 1e-3, 3, 2)


def play(loss: Any, *rules: Rule, steps: int = 600) -> tuple[Protocol, dict[Run, float]]:
    """A whole comparison with these losses."""
    plan, losses = Protocol(rules, seed=5, steps=steps), dict[Run, float]()
    left = math.inf
    while (ahead := plan.ahead(losses))[0]:
        assert ahead[1] <= left  # the estimate never grows
        left = ahead[1]
        run = ahead[0][0]
        assert run not in losses
        losses[run] = loss(run)
    assert ahead[1] == 0
    return plan, losses


def test_other_seeds_and_shorter_runs_follow_the_best_rates() -> None:
    def loss(run: Run) -> float:
        best = {"conda": 6e-3, "adamw": 1e-3}[run.rule]
        lead = 0.3 if run.rule == "conda" else 0.0
        shorter = 1.0 - run.steps / 600
        return 4.0 - lead + shorter + abs(math.log2(run.matrices / best)) + run.seed / 100

    plan, losses = play(loss, ONE, TWO)
    tuned = [run for run in losses if run.seed == 5]
    assert {run.steps for run in tuned} == {600}
    assert len(tuned) == 6
    others = [run for run in losses if run.seed != 5]
    assert {(run.rule, run.matrices) for run in others} == {("conda", 6e-3), ("adamw", 1e-3)}
    assert {run.seed for run in others} == {6, 7}
    lengths = [run.steps for run in losses]
    assert lengths == sorted(lengths, reverse=True)  # all final losses come before shorter runs
    # adamw beats nothing. At 2/3 of the steps conda is above its loss: no shorter run helps.
    assert sorted({run.steps for run in others if run.rule == "adamw"}) == [600]
    assert sorted({run.steps for run in others if run.rule == "conda"}) == [400, 500, 600]
    found = steps_to(plan.mean(TWO, losses, 600) or 0.0, plan.curve(ONE, losses))
    assert found is not None
    assert 400 < found[0] < 430  # 420, if it were linear in the loss
    # Another seed for one rule asks for that seed's runs alone.
    more = Protocol((ONE, Rule("adamw", 1e-3, 1e-3, 3, 3)), 5, 600)
    assert more.ahead(losses)[0] == [Run("adamw", 1e-3, 1e-3, 8, 600)]


def test_a_rule_that_diverges_everywhere_ends_there() -> None:
    _, losses = play(lambda run: math.inf if run.rule == "conda" else 4.0, ONE, TWO)
    assert [run.seed for run in losses if run.rule == "conda"] == [5] * 3
    assert {run.steps for run in losses} == {600}


def test_steps_to_a_loss() -> None:
    curve = [(600, 3.0), (500, 3.3), (400, 4.0), (300, math.inf)]
    assert steps_to(2.9, curve) is None
    assert steps_to(3.0, curve) == (600.0, True)
    assert steps_to(math.sqrt(3.0 * 3.3), curve) == (pytest.approx(550.0), True)
    assert steps_to(4.5, curve) == (400.0, True)  # the next shorter run diverged
    assert steps_to(4.5, curve[:3]) == (400.0, False)  # sooner, by how much is not known
    assert steps_to(4.0, []) is None


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


def record(run: Run, loss: float | None, **others: Any) -> dict[str, Any]:
    rule, matrices, rest, seed, steps = run.rule, run.matrices, run.rest, run.seed, run.steps
    about = {"rule": rule, "matrices": matrices, "rest": rest, "seed": seed, "steps": steps}
    measures = {"step_s": 0.5, "optimizer_s": 0.1, "state_bytes": 2**21, "session": 0, "data": "x"}
    curve = [] if loss is None else [[300, loss + 1.0], [steps, loss]]
    return {**about, "val_loss": loss, **measures, "curve": curve, **others}


def test_the_table_and_the_picture_of_results(tmp_path: Path) -> None:
    three, alone = Rule("muon", 1e-3, 1e-3, 1, 2), Rule("soap", 1e-3, 1e-3, 1, 0)

    def loss(run: Run) -> float:
        if run.rule == "muon":
            return math.inf if run.seed == 7 else 5.0
        return (
            {"conda": 3.5, "adamw": 4.0, "soap": 3.0}[run.rule]
            + run.seed / 100
            + (600 - run.steps) / 150
        )

    plan, losses = play(loss, ONE, TWO, three, alone)
    session = {"command": "python -m x", "begun": "now", "machine": "here", "jobs": 2}
    settings = {f"optimizer.{r.name}.weight_decay": 0.0 for r in plan.rules}
    settings |= {f"optimizer.{r.name}.grad_clip": 1.0 for r in plan.rules}
    settings["optimizer.muon.weight_decay"] = 0.1
    results = {
        "config": {"training.seed": 5, "training.steps": 600, **settings},
        "nproc": 1,
        "rules": [{f: getattr(r, f) for f in r.__slots__} for r in plan.rules],
        "sessions": [{**session, "versions": {"torch": each}} for each in ("2.9", "3.0", "3.1")],
        "runs": [record(run, None if math.isinf(at) else at) for run, at in losses.items()],
    }
    results["runs"][-1] |= {"session": 1, "data": "other"}  # none is of the last session
    full = next(run for run in results["runs"] if run["seed"] == 6 and run["steps"] == 600)
    del full["curve"][0]  # where its loss was not finite
    again = json.loads(json.dumps(results))
    text = Findings(again).table()
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith("| ")]
    conda, adamw, muon, soap = rows[2:6]
    names = [row[0] for row in (conda, adamw, muon, soap)]
    assert names == ["| conda", "| adamw", "| muon", "| soap"]
    assert conda[5:7] == ["3.5650 ± 0.0071 (2 of 2 seeds)", ""]
    assert adamw[5:7] == ["4.0650 ± 0.0071 (2 of 2 seeds)", "0.5000 ± 0.0000"]
    assert conda[4] == "at an edge: no trial of matrices / 2, rest / 2, rest x 2"
    assert conda[7:] == ["500.0", "100.0", "2.00 |"]
    assert muon[5] == "5.0000 (2 of 2 seeds, 1 of them diverged)"
    assert soap[5:] == ["3.0500 (only seed 5)", "", "500.0", "100.0", "2.00 |"]
    shares = {row[0].removeprefix("| "): row[1:] for row in rows[8:12]}
    share, steps, seconds, own = map(float, re.findall(r"[\d.]+", shares["conda"][1]))
    assert 500 < steps < 600  # at 500 conda is above adamw at 600
    assert share == pytest.approx(steps / 600, abs=0.01)
    assert seconds == pytest.approx(steps * 0.5, rel=0.01)
    assert own == pytest.approx(steps * 0.1, rel=0.01)
    assert shares["adamw"][0] == "not reached"
    assert "python -m x" in text
    assert "torch 3.0" in text
    assert "weight_decay was not tuned, and differs: conda 0, adamw 0, muon 0.1, soap 0." in text
    assert "grad_clip was" not in text
    assert "Runs had not the same data" in text
    assert "Runs were made with more than one torch: 2.9; 3.0." in text
    Findings(again).draw(tmp_path / "x.png")
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


def test_a_table_names_a_preset_in_place_of_its_values() -> None:
    values = "betas=0.95,0.98+nesterov=true+basis_source=gradients"
    rules = {
        f"conda+{values}+update_proj_gap=20+refresh_method=orthogonal_iteration+lr=1e-1": (
            "conda+preset=2026-11-draft+lr=1e-1"
        ),
        f"conda+{values}": f"conda+{values}",
        "muon": "muon",
    }
    named = [Rule(name, 1e-3, 1e-3, 8, 3) for name in rules]
    settings = {f"optimizer.{name}.weight_decay": 0.0 for name in ("conda", "muon")}
    settings |= {f"optimizer.{name}.grad_clip": 1.0 for name in ("conda", "muon")}
    session = {"command": "x", "begun": "now", "machine": "here", "jobs": 1, "versions": {}}
    results = {
        "config": {"training.seed": 5, "training.steps": 600, **settings},
        "rules": [{f: getattr(rule, f) for f in rule.__slots__} for rule in named],
        "sessions": [session],
        "runs": [],
    }
    rows = [line.split(" | ")[0] for line in Findings(results).table().splitlines()]
    assert rows[4:7] == [f"| {label}" for label in rules.values()]


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
    whole = {**found.results, "runs": [record(run, 4.0, curve=[[run.steps, 4.0]], wall_s=1.0)]}
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
