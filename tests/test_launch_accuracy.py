"""The accuracy of refresh methods on the momenta of a run."""

import contextlib
import io
from pathlib import Path
from typing import Any

import pytest
import torch

import launch_jobs
import ranks
import toys
from conda_dist.launch import accuracy
from conda_dist.launch.accuracy import BEFORE, EXACT
from conda_dist.launch.pretrain import EXIT_CONFIG
from conda_dist.options import REFRESH_METHODS
from launch_jobs import Result


def _tabulated(*arguments: Any) -> Result:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = accuracy.main([*map(str, arguments)])
    return Result(code, out.getvalue(), err.getvalue())


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two ranks' run; its checkpoints are of steps 4 and 8."""
    folder = tmp_path_factory.mktemp("accuracy")
    launch_jobs.succeed(2, launch_jobs.write_config(folder), "--output", folder / "run")
    return folder / "run"


@pytest.mark.parametrize("shape", [(24, 8), (8, 24), (12, 12)], ids=str)
def test_what_is_measured(shape: tuple[int, int]) -> None:
    """Two of the methods are exact, the third comes nearer, and none loses orthonormality."""
    right, r = shape[0] >= shape[1], min(shape)
    values = torch.logspace(0, -1, r)
    momentum = toys.random(*shape) * (values if right else values[:, None])
    basis, _ = torch.linalg.qr(toys.random(r, r, seed=1))
    found = accuracy.measure(momentum, basis, right)
    assert [*found] == [BEFORE, EXACT, *REFRESH_METHODS]
    assert found[EXACT].residual < 1e-14
    for method in ("svd", "eigh64"):
        assert found[method].residual < 1e-5
        assert found[method].quarter == pytest.approx(1, abs=1e-5)
    iterated = found["orthogonal_iteration"]
    assert 1e-4 < iterated.residual < 0.9 * found[BEFORE].residual
    assert found[BEFORE].quarter < iterated.quarter < 1
    assert all(each.orthonormality < 1e-6 for each in found.values())


def test_the_basis_in_use_is_that_of_its_coordinates() -> None:
    """Of a momentum whose coordinates are its singular vectors nothing is off the diagonal."""
    momentum = torch.diag(torch.arange(9.0, 0, -1))[:, :5]
    basis, _ = torch.linalg.qr(toys.random(5, 5))
    found = accuracy.measure(momentum, basis, right=True)
    assert found[BEFORE].residual < 1e-6
    assert found["orthogonal_iteration"].residual < 1e-6


def test_bases_of_fewer_bits_are_judged_as_they_are_kept() -> None:
    basis, _ = torch.linalg.qr(toys.random(8, 8, seed=1))
    found = accuracy.measure(toys.random(24, 8), basis.bfloat16(), right=True)
    assert 1e-4 < found["svd"].residual < 0.05
    assert 1e-4 < found["svd"].orthonormality < 0.05


def test_a_run_is_tabulated(run: Path) -> None:
    (said,) = ranks.run(1, _tabulated, run)
    assert said.code == 0, said.err
    assert f"{run}, step 8: 14 matrices" in said.out.replace("\n", "")
    for name in (BEFORE, EXACT, *REFRESH_METHODS):
        assert name in said.out
    (said,) = ranks.run(1, _tabulated, run, "--checkpoint", run / "checkpoints" / "step-00000004")
    assert "step 4: 14" in said.out


def test_what_cannot_be_tabulated(run: Path, tmp_path: Path) -> None:
    other = tmp_path / "adamw"
    steps = ("--training.steps", 1, "--optimizer.name", "adamw")
    launch_jobs.succeed(1, run.parent / "micro.toml", "--output", other, *steps)
    for arguments, words in (
        ((tmp_path,), "config.toml"),
        ((other,), "--optimizer.name conda is wanted"),
        ((run, "--checkpoint", tmp_path), str(tmp_path)),
    ):
        (said,) = ranks.run(1, _tabulated, *arguments)
        assert said.code == EXIT_CONFIG
        assert words in said.err
