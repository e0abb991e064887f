"""Which runs a comparison makes, and what its table says of them."""

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

import launch_jobs
from conda_dist.launch.tools.comparison import Findings
from conda_dist.launch.tools.search import Point, Protocol, Rule, Run, edges, search, steps_to

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


# The table


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
        "runs": [
            launch_jobs.record(run, None if math.isinf(at) else at) for run, at in losses.items()
        ],
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
        f"conda+{values}+update_proj_gap=5+refresh_method=orthogonal_iteration+lr=1e-1": (
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
