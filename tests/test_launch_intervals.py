"""The study of refresh methods and intervals: what is run, what is kept, what the table says."""

import json
from pathlib import Path

import pytest

import launch_jobs
from conda_dist.launch import intervals
from conda_dist.launch.intervals import Pair
from conda_dist.launch.pretrain import EXIT_CONFIG


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return launch_jobs.write_config(tmp_path_factory.mktemp("intervals"))


def test_a_run_for_every_method_interval_and_seed(config: Path) -> None:
    wanted = ["svd=5", "orthogonal_iteration=1,5,5"]
    trials = intervals.plan(str(config), Path("out"), wanted, ["0", "3"], [])
    assert list(trials) == [("svd", 5), ("orthogonal_iteration", 1), ("orthogonal_iteration", 5)]
    folders = [trial.folder.name for trial in trials["orthogonal_iteration", 1]]
    assert folders == ["orthogonal_iteration-gap1-seed0", "orthogonal_iteration-gap1-seed3"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--refreshes", "qr=5"), "'qr' is none of the methods svd, orthogonal_iteration"),
        (("--refreshes", "svd"), "METHOD=GAP,GAP is wanted"),
        (("--refreshes", "svd=5", "--seeds", "one"), "training.seed"),
        (("--refreshes", "svd=0"), "update_proj_gap"),
        (("--refreshes", "svd=5", "--training.seed", "1"), "intervals sets it itself"),
        (("--refreshes", "svd=5", "--optimizer.update_proj_gap", "1"), "sets it itself"),
    ],
)
def test_refusals(
    config: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
    words: str,
) -> None:
    given = [str(config), "--output", str(tmp_path), *arguments]
    assert intervals.main(given) == EXIT_CONFIG
    assert words in capsys.readouterr().err


def test_the_table_has_the_lowest_loss_first(tmp_path: Path) -> None:
    pairs = [Pair("svd", 5, (3.5, 3.25), 0.02), Pair("eigh64", 1, (3.25, 3.25), 0.04)]
    lines = intervals.write_tables(pairs, tmp_path).splitlines()
    assert lines[2] == "| eigh64 | 1 | 3.250, 3.250 | 3.250 | 40.0 |"
    assert lines[3] == "| svd | 5 | 3.500, 3.250 | 3.375 | 20.0 |"


def test_a_study_runs_draws_and_continues(
    config: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(config), "--output", str(tmp_path), "--training.steps", "4"]
    arguments += ["--refreshes", "orthogonal_iteration=1,2"]
    assert intervals.main(arguments) == 0
    found = json.loads((tmp_path / "intervals.json").read_text())
    for gap, pair in zip((1, 2), found, strict=True):
        lines = launch_jobs.metrics(tmp_path / f"orthogonal_iteration-gap{gap}-seed0")
        assert pair["gap"] == gap
        assert pair["val_losses"] == [lines[-1]["val_loss"]]
    assert (tmp_path / "intervals.png").read_bytes().startswith(b"\x89PNG")
    capfd.readouterr()
    assert intervals.main(arguments) == 0
    assert capfd.readouterr().out.count("complete already") == 2
