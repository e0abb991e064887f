"""The benchmark measures what it says: real steps, in turns, of optimizers that have begun."""

import json
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor

from conda_dist.launch import benchmark
from conda_dist.launch.tools import benchmark_process
from conda_dist.launch.tools.benchmark_process import NEVER, Step

SIZES = benchmark_process.shapes(16, 24, 1)


def _begin(gap: int = NEVER, *names: str, method: str = "svd") -> dict[str, Step]:
    made = benchmark_process.contenders(SIZES, gap, method, "cpu")
    return benchmark_process.begin({name: made[name] for name in names or made}, "cpu")


def test_every_contender_steps_in_every_round() -> None:
    assert SIZES == [(16, 16)] * 4 + [(24, 16)] * 2 + [(16, 24)]
    steps = _begin()
    assert next(iter(steps)) == "pytorch_optimizer.Conda"
    params = [
        group["params"]
        for s in steps.values()
        if hasattr(s, "__self__")
        for group in s.__self__.param_groups
    ]
    before = [[param.detach().clone() for param in some] for some in params]
    taken = benchmark_process.measure(steps, 3)
    assert {name: len(times) for name, times in taken.items()} == dict.fromkeys(steps, 3)
    assert len(params) == 12
    for some, were in zip(params, before, strict=True):
        assert not any(map(torch.equal, some, were))


def test_prints_its_table_draws_it_and_writes_it(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """With the shapes of a config, and a refresh in every third step."""
    config, picture, file = (tmp_path / name for name in ("c.toml", "times.svg", "times.json"))
    config.write_text(
        "[model]\nhidden_size = 16\nintermediate_size = 24\nnum_attention_heads = 2\n"
    )
    small = ["--model", str(config), "--layers", "1", "--rounds", "2", "--gap", "3"]
    small += ["--refresh-method", "svd"]
    assert not benchmark.main([*small, "--picture", str(picture), "--json", str(file)])
    said = capsys.readouterr().out
    assert "7 matrices, width 16, MLP 24" in said
    assert "<svg" in picture.read_text()
    steps = json.loads(file.read_text())["steps"]
    for name in ("torch.optim.AdamW", "torch.optim.Muon", "two products, bfloat16"):
        assert f"{steps[name]['median_ms']:.2f}" in said
        assert name in said
    for name, row in steps.items():
        assert (row["refresh_ms"] is not None) is ("onda" in name or "SOAP" in name), name


def test_the_bytes_of_state_are_those_of_the_tensors() -> None:
    """A moment each of a matrix for Muon, two for AdamW; and the bases for Conda."""
    held = {name: benchmark_process.state_bytes(step) for name, step in _begin().items()}
    moment = 4 * sum(m * n for m, n in SIZES)
    bases, counts = 4 * len(SIZES) * 16 * 16, 4 * len(SIZES)
    assert held["torch.optim.Muon"] == moment
    assert held["torch.optim.AdamW"] == 2 * moment + counts
    assert held["conda_dist"] == 2 * moment + bases + 2 * counts
    # Of the 7 matrices 4 are square, with two sides; a side has a Gram matrix and a basis.
    assert held["conda_dist, bases from gradients"] == 2 * moment + 4 * 22 * 16 * 16 + 3 * counts
    assert held["pytorch_optimizer.Conda"] == 2 * moment + bases
    assert held["two products"] == 0


def test_random_bases_are_stepped_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without refreshes nothing is decomposed, neither by this Conda nor by the other one."""

    def forbidden(*_: Tensor, **__: object) -> None:
        raise AssertionError("a decomposition")

    monkeypatch.setattr(torch.linalg, "svd", forbidden)
    monkeypatch.setattr(torch.linalg, "eigh", forbidden)
    gradients = "conda_dist, bases from gradients"
    steps = _begin(NEVER, "conda_dist", gradients, "pytorch_optimizer.Conda")
    for state in steps[gradients].__self__.state.values():  # type: ignore[attr-defined]
        for basis in (value for name, value in state.items() if name.endswith("_basis")):
            assert (basis.T @ basis - torch.eye(16)).norm() < 1e-4
    for state in steps["conda_dist"].__self__.state.values():  # type: ignore[attr-defined]
        basis, identity = state["basis"], torch.eye(16)
        torch.testing.assert_close(basis.T @ basis, identity, atol=1e-5, rtol=0)
        assert (basis - identity).norm() > 1


def test_a_refresh_is_what_it_adds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a step that takes 2 ms, and 30 ms more in one of eight."""
    calls, now = 0, 0.0

    def step() -> None:
        nonlocal calls, now
        calls += 1
        now += 0.032 if calls % 8 == 0 else 0.002

    monkeypatch.setattr(time, "perf_counter", lambda: now)
    (times,) = benchmark_process.measure({"it": step}, 1, 8)["it"]
    assert times.refresh == pytest.approx(0.03)
    assert times.device == times.host == pytest.approx(0.046 / 8)


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
        (["--json", "times.txt"], "--json times.txt: name a file that ends in .json"),
        (["--model", "absent.toml"], "absent.toml"),
        (["--only", "Adam"], "--only 'Adam': there are"),
    ],
)
def test_arguments(capsys: pytest.CaptureFixture[str], arguments: list[str], words: str) -> None:
    """Each is refused in one line, with exit code 2."""
    try:
        code: object = benchmark.main(arguments)
    except SystemExit as ended:
        code = ended.code
    said = capsys.readouterr().err
    assert words in said
    assert (code, said.count("\n")) == (2, 1)


def test_refreshes_are_in_the_mean() -> None:
    steps = _begin(3, "conda_dist", method="orthogonal_iteration")
    benchmark_process.measure(steps, 2, 3)
    optimizer = steps["conda_dist"].__self__  # type: ignore[attr-defined]
    taken = {int(state["basis_step"]) for state in optimizer.state.values()}
    assert taken == {6}  # of 8 steps, two of them at the start
