"""The benchmark measures what it says: real steps, in turns, of optimizers that have begun."""

import time
from pathlib import Path

import pytest
import torch

from conda_dist.launch import benchmark
from conda_dist.launch.tools import benchmark_process


def test_every_contender_steps_in_every_round() -> None:
    sizes = benchmark_process.shapes(16, 24, 1)
    assert sizes == [(16, 16)] * 4 + [(24, 16)] * 2 + [(16, 24)]
    steps = benchmark_process.contenders(sizes)
    assert next(iter(steps)) == "pytorch_optimizer.Conda"
    params = [
        group["params"]
        for s in steps.values()
        if hasattr(s, "__self__")
        for group in s.__self__.param_groups
    ]
    before = [[param.detach().clone() for param in some] for some in params]
    taken = benchmark_process.measure(steps, 3)
    assert {name: len(seconds) for name, seconds in taken.items()} == dict.fromkeys(steps, 3)
    assert len(params) == 11
    for some, were in zip(params, before, strict=True):
        assert not any(map(torch.equal, some, were))


def test_prints_its_table_and_draws_it(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    picture = tmp_path / "times.svg"
    small = ["--width", "16", "--mlp", "24", "--layers", "1", "--rounds", "2"]
    benchmark.main([*small, "--picture", str(picture)])
    said = capsys.readouterr().out
    assert "7 matrices, width 16, MLP 24" in said
    for name in ("torch.optim.AdamW", "torch.optim.Muon", "conda_dist, async", "Newton-Schulz"):
        assert name in said
    assert "<svg" in picture.read_text()


@pytest.mark.thorough
def test_the_bytes_of_state_are_those_of_the_tensors() -> None:
    """A moment each of a 64 x 64 matrix for Muon, two for AdamW, and a basis for Conda."""
    sizes = [(64, 64)] * 3
    steps = benchmark_process.contenders(sizes)
    found = benchmark_process.facts(steps, sizes, "svd")
    matrices = {name: fact.state / (3 * 64 * 64 * 4) for name, fact in found.items()}
    assert matrices["torch.optim.Muon"] == 1
    assert 1 <= matrices["Muon"] < matrices["NAMO"] < matrices["NAMO_D"] < 1.03
    counters = 0.01  # of steps
    assert 2 <= matrices["torch.optim.AdamW"] < 2 + counters
    assert 3 <= matrices["conda_dist"] < 3 + counters
    assert found["two products"].state == 0
    for name, fact in found.items():
        refreshes = name.startswith(("conda_dist", "pytorch_optimizer"))
        assert (fact.stall_s is None) is not refreshes, name


def test_a_stall_is_what_refreshes_add(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a step that takes 2 ms, and 30 ms more in one of eight."""
    calls, now = 0, 0.0

    def step() -> None:
        nonlocal calls, now
        calls += 1
        now += 0.032 if calls % benchmark_process.STALL_GAP == 0 else 0.002

    monkeypatch.setattr(time, "perf_counter", lambda: now)
    assert benchmark_process.stall(step) == pytest.approx(0.03)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--gap", "0"], "'0' is not a whole number of 1 or more"),
        (["--width", "-3"], "'-3' is not a whole number"),
        pytest.param(
            ["--device", "cuda"],
            "torch finds no GPU here",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is one"),
        ),
        (["--picture", "times.doc"], "--picture times.doc: name a file that ends in .png"),
    ],
)
def test_arguments(capsys: pytest.CaptureFixture[str], arguments: list[str], words: str) -> None:
    with pytest.raises(SystemExit):
        benchmark.main(arguments)
    assert words in capsys.readouterr().err


def test_refreshes_are_in_the_mean() -> None:
    sizes = benchmark_process.shapes(16, 24, 1)
    steps = benchmark_process.contenders(sizes, 3, "orthogonal_iteration")
    benchmark_process.measure({"conda_dist": steps["conda_dist"]}, 2, 3)
    optimizer = steps["conda_dist"].__self__  # type: ignore[attr-defined]
    taken = {int(state["basis_step"]) for state in optimizer.state.values()}
    assert taken == {6}  # of 8 steps, two of them at the start
