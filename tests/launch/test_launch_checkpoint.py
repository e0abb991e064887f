"""Checkpoints: whole or absent, the newest few kept, damage named on every rank."""

import json
import os
import shutil
from pathlib import Path

import pytest

import launch_jobs
from conda_dist.launch.job.checkpoint import complete_checkpoints, record_hash, step_of
from damage import Damage, delete, flip, newest, truncate
from launch_jobs import metrics, succeed, train


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return launch_jobs.write_config(tmp_path_factory.mktemp("checkpoints"))


@pytest.fixture(scope="module")
def finished(config: Path) -> Path:
    """A run of 8 steps on 2 ranks that saved at each step and kept three."""
    output = config.parent / "finished"
    succeed(2, config, "--output", output, "--checkpoint.interval", 1, "--checkpoint.keep", 3)
    return output


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy of that run, to be damaged."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


def test_the_newest_are_kept(finished: Path) -> None:
    found = complete_checkpoints(finished / "checkpoints")
    assert [step_of(path) for path in found] == [6, 7, 8]
    assert sorted(os.listdir(finished / "checkpoints")) == [path.name for path in found]


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    files = (file for file in folder.rglob("*") if file.is_file())
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


@pytest.mark.parametrize(
    ("name", "damage", "words"),
    [
        ("__1_0.distcp", delete, "__1_0.distcp is missing"),
        ("__0_0.distcp", truncate, "__0_0.distcp is damaged"),
        ("__0_0.distcp", flip, "__0_0.distcp is damaged"),
        ("__1_0.distcp", flip, "__1_0.distcp is damaged"),
        (".metadata", delete, ".metadata is missing"),
        (".metadata", flip, ".metadata is damaged"),
        ("trainer.json", delete, "trainer.json: No such file"),
        ("trainer.json", truncate, "trainer.json is damaged"),
        ("trainer.json", flip, "trainer.json is damaged"),
    ],
)
def test_damage_is_named_on_every_rank(
    config: Path, run: Path, name: str, damage: Damage, words: str
) -> None:
    damage(newest(run) / name)
    results = train(2, config, "--output", run, "--resume")
    for result in results:
        assert result.code == 1
        assert "step-00000008 cannot be used" in result.err
        assert words in result.err
        assert f"--resume {run / 'checkpoints' / 'step-00000007'}" in result.err


def test_a_damaged_checkpoint_is_set_aside(config: Path, run: Path) -> None:
    """What :func:`test_damage_is_named_on_every_rank` is told to do works."""
    flip(newest(run) / "__0_0.distcp")
    resumed = succeed(
        2, config, "--output", run, "--resume", newest(run).with_name("step-00000007")
    )
    assert "set aside" in resumed
    aside = newest(run).with_name("abandoned-step-00000008")
    assert aside.is_dir()
    assert [step_of(path) for path in complete_checkpoints(aside.parent)] == [7, 8]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--model.hidden_size", 64), "model.hidden_size (32 there, 64 here)"),
        (("--optimizer.name", "adamw"), "optimizer.name (conda there, adamw here)"),
        (("--training.seed", 1), "training.seed (0 there, 1 here)"),
        (("--data.val_fraction", 0.3), "trained on other data"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(
    config: Path, run: Path, arguments: tuple[object, ...], words: str
) -> None:
    before = contents(run)
    for result in train(2, config, "--output", run, "--resume", *arguments):
        assert result.code == 2
        assert words in result.err
        assert result.err.count("\n") == 1
    assert contents(run) == before


def test_a_checkpoint_of_another_version_is_refused(config: Path, run: Path) -> None:
    """One that lacks what this version needs, and one of a model that had a key more."""
    file, before = newest(run) / "trainer.json", contents(run)
    saved = json.loads(file.read_text())
    for change, words in (
        ({"fingerprint": None}, "was written by another version of this job"),
        ({"config": {**saved["facts"]["config"], "model.depth": 3}}, "model.depth (3 there, unkno"),
    ):
        facts = {k: v for k, v in {**saved["facts"], **change}.items() if v is not None}
        record = {"facts": facts, "files": saved["files"]}
        file.write_text(json.dumps({**record, "sha256": record_hash(record)}))
        (result,) = train(1, config, "--output", run, "--resume")
        assert result.code == 2
        assert words in result.err
        file.write_text(json.dumps(saved))
    assert contents(run).keys() == before.keys()


def test_a_file_s_hash_beside_its_size_is_understood(config: Path, run: Path) -> None:
    """As older checkpoints have it."""
    file = newest(run) / "trainer.json"
    saved = json.loads(file.read_text())
    sizes = {name: (newest(run) / name).stat().st_size for name in saved["files"]}
    files = {name: {"bytes": sizes[name], "sha256": h} for name, h in saved["files"].items()}
    record = {"facts": saved["facts"], "files": files}
    file.write_text(json.dumps({**record, "sha256": record_hash(record)}))
    assert "step-00000008" in succeed(2, config, "--output", run, "--resume")


def test_what_is_not_a_checkpoint_is_refused(config: Path, tmp_path: Path) -> None:
    for result in train(2, config, "--output", tmp_path / "out" / "in", "--resume", tmp_path):
        assert result.code == 2
        assert "Checkpoints are folders such as" in result.err
    assert not (tmp_path / "out").exists()


def test_a_write_cut_short_is_ignored_and_cleared(config: Path, run: Path) -> None:
    checkpoints = run / "checkpoints"
    cut = checkpoints / ".writing-step-00000009"
    shutil.copytree(newest(run), cut)
    (cut / "trainer.json").unlink()
    printed = succeed(2, config, "--output", run, "--resume", "--training.steps", 9)
    assert "step-00000008" in printed
    assert not cut.exists()
    assert step_of(newest(run)) == 9


def test_nothing_to_resume_starts_afresh(config: Path, tmp_path: Path) -> None:
    printed = succeed(1, config, "--output", tmp_path, "--resume", "--training.steps", 1)
    assert "step 0, from scratch" in printed


def test_a_complete_run_resumes_to_its_end(config: Path, run: Path) -> None:
    before = metrics(run)
    succeed(2, config, "--output", run, "--resume")
    assert metrics(run) == before
    assert json.loads((run / "summary.json").read_text())["step"] == 8


def test_a_failure_to_save_keeps_the_last_checkpoint(config: Path, run: Path) -> None:
    checkpoints = run / "checkpoints"
    blocker = checkpoints / ".writing-step-00000009"
    blocker.write_text("a file where a folder has to be")
    for result in train(2, config, "--output", run, "--resume", "--training.steps", 9):
        assert result.code == 1
        assert "making the checkpoint's folder failed on rank 0" in result.err
    assert step_of(newest(run)) == 8
    blocker.unlink()
    succeed(2, config, "--output", run, "--resume", "--training.steps", 9)
