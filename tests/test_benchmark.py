"""The benchmark measures what it says: real steps, in turns, of optimizers that have begun."""

import pytest
import torch

from conda_dist.launch import benchmark


def test_every_contender_steps_in_every_round() -> None:
    sizes = benchmark.shapes(16, 24, 1)
    assert sizes == [(16, 16)] * 4 + [(24, 16)] * 2 + [(16, 24)]
    steps = benchmark.contenders(sizes)
    assert next(iter(steps)) == "pytorch_optimizer.Conda"
    params = [
        group["params"]
        for s in steps.values()
        if hasattr(s, "__self__")
        for group in s.__self__.param_groups
    ]
    before = [[param.detach().clone() for param in some] for some in params]
    taken = benchmark.measure(steps, 3)
    assert {name: len(seconds) for name, seconds in taken.items()} == dict.fromkeys(steps, 3)
    assert len(params) == 8
    for some, were in zip(params, before, strict=True):
        assert not any(map(torch.equal, some, were))


def test_prints_its_table(capsys: pytest.CaptureFixture[str]) -> None:
    benchmark.main(["--width", "16", "--mlp", "24", "--layers", "1", "--rounds", "2"])
    said = capsys.readouterr().out
    assert "7 matrices, width 16, MLP 24" in said
    assert "torch.optim.AdamW" in said
    assert "torch.optim.Muon" in said


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--gap", "0"], "0 is not positive"),
        (["--width", "-3"], "-3 is not positive"),
        (["--gap", "5", "--ranks", "2"], "--gap is for one process"),
    ],
)
def test_arguments(capsys: pytest.CaptureFixture[str], arguments: list[str], words: str) -> None:
    with pytest.raises(SystemExit):
        benchmark.main(arguments)
    assert words in capsys.readouterr().err


def test_refreshes_are_in_the_mean() -> None:
    sizes = benchmark.shapes(16, 24, 1)
    steps = benchmark.contenders(sizes, 3, "orthogonal_iteration")
    benchmark.measure({"conda_dist": steps["conda_dist"]}, 2, 3)
    optimizer = steps["conda_dist"].__self__  # type: ignore[attr-defined]
    taken = {int(state["basis_step"]) for state in optimizer.state.values()}
    assert taken == {6}  # of 8 steps, two of them at the start


def test_ranks_are_compared_with_one_process(capsys: pytest.CaptureFixture[str]) -> None:
    small = ["--width", "16", "--mlp", "24", "--layers", "1", "--rounds", "2"]
    benchmark.main([*small, "--ranks", "2"])
    said = capsys.readouterr().out
    assert "7 matrices on 2 ranks" in said
    ways = ("one process", "FSDP rows", "columns", "bases split", "owners multiply", "(DDP)")
    for name in ways:
        assert name in said
