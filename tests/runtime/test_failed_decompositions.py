"""Decompositions that fail, on one rank or all: no basis is spoilt, and no rank raises alone."""

import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.linalg import LinAlgError

import models
import ranks
from conda_dist import register_refresh_hook
from models import GAP, Layout

LAYOUTS: list[Layout] = [("fsdp", (2,)), ("fsdp", (3,)), ("hsdp", (2, 2)), ("ddp", (2,))]
ON_ALL = pytest.mark.parametrize("layout", LAYOUTS, ids=str)

LATE = "blocks.1.up.weight"

SVD = torch.linalg.svd


@contextmanager
def _svd(replacement: Callable[[Tensor], Any]) -> Iterator[None]:
    """Has the SVD ask first whether to raise; None goes on as ever."""

    def svd(A: Tensor, *args: Any, **kwargs: Any) -> Any:
        instead = replacement(A)
        return SVD(A, *args, **kwargs) if instead is None else instead

    torch.linalg.svd = svd
    try:
        yield
    finally:
        torch.linalg.svd = SVD


def _no_float32(A: Tensor) -> None:
    if A.dtype == torch.float32:
        raise LinAlgError("linalg.svd: the algorithm failed to converge")


def _nan_in_float32(A: Tensor) -> Any:
    """As some GPU drivers: no error, but NaN."""
    found = SVD(A, full_matrices=False)
    if A.dtype == torch.float32:
        for part in found:
            part.fill_(float("nan"))
    return found


def _retried(layout: Layout, silently: bool) -> tuple[list[str], float]:
    """An SVD that fails in float32; warnings, and how far from a run in which it does not."""
    model, optimizer = models.build(layout)
    twin, other = models.build(layout)
    start = models.snapshot(model, optimizer, models.whole)
    models.train(twin, other, range(GAP + 2))
    said = []
    fault = _nan_in_float32 if silently else _no_float32
    with _svd(fault):
        for step in range(GAP + 2):
            said += models.warned_step(model, optimizer, step)
    ended = models.snapshot(model, optimizer, models.whole)
    return said, models.farthest(ended, models.snapshot(twin, other, models.whole), start)


@ON_ALL
@pytest.mark.parametrize("silently", [False, True])
def test_an_svd_that_fails_is_tried_again_in_float64(layout: Layout, silently: bool) -> None:
    for said, distance in ranks.run_on(layout, _retried, silently):
        assert not said
        assert distance < 1e-4


def _no_svd(A: Tensor) -> None:
    raise LinAlgError("linalg.svd: the algorithm failed to converge")


def _never_converges(layout: Layout) -> tuple[list[str], list[str], list[str], str]:
    """On rank 1 no SVD converges, in any precision.

    Returns:
        Names of the matrices it decomposes, names of those not refreshed, warnings, error.
    """
    model, optimizer = models.build(layout)
    models.train(model, optimizer, range(GAP))
    before = models.snapshot(model, optimizer)
    theirs = [row["name"] for row in optimizer.report(show=False) if 1 in row["owners"]]
    with _svd(_no_svd if dist.get_rank() == 1 else lambda _: None):
        said = models.warned_step(model, optimizer, GAP)
        now = models.snapshot(model, optimizer)
        old = [
            name.split(":")[0]
            for name, value in now.items()
            if name.endswith("basis_step") and (value != GAP).any()
        ]
        kept = [f"{name}:basis" for name in old if "experts" not in name]
        if models.unequal({k: now[k] for k in kept}, {k: before[k] for k in kept}):
            said.append("a basis was changed")
        said += models.warned_step(model, optimizer, GAP + 1)
        error = models.attempt(models.train, model, optimizer, [GAP + 2])
    return sorted(theirs), sorted(old), said, error


@ON_ALL
def test_an_svd_that_never_converges_keeps_the_old_basis(layout: Layout) -> None:
    answers = ranks.run_on(layout, _never_converges)
    for theirs, old, said, error in answers:
        assert theirs
        assert old == theirs
        assert "a basis was changed" not in said
        assert error.startswith("RuntimeError")
        assert all(name in error for name in theirs)
    said = answers[0][2]
    assert len(said) == 2
    assert all(name in said[0] and name in said[1] for name in answers[0][0])
    assert "converge" in said[0]


def _one_rank_fails(
    layout: Layout, source: str, fails: int
) -> tuple[str, float, list[str], int, dict[str, Tensor], str]:
    """Rank 1 raises whenever it has decomposed; then nothing is wrong any more.

    One weight has no gradient but zeros before step 2, where only its first bases are due.

    Returns:
        The error, seconds, the matrices decomposed, how many workspaces of failed decompositions
        were alive in a later one, what this rank held then, and what came of further steps.
    """
    model, optimizer = models.build(layout, basis_source=source)
    models.train(model, optimizer, range(min(fails, 2)), LATE)
    models.train(model, optimizer, range(2, fails))
    told: list[str] = []
    workspaces: list[weakref.ref[Tensor]] = []
    held = 0

    def refuse(name: str) -> None:
        nonlocal held
        held += sum(each() is not None for each in workspaces)
        told.append(name)
        workspace = torch.empty(4)
        workspaces.append(weakref.ref(workspace))
        if dist.get_rank() == 1 or fails == 2:
            raise MemoryError("no room for a workspace")

    begun = time.monotonic()
    with register_refresh_hook(refuse):
        said = models.attempt(models.train, model, optimizer, [fails])
    took = time.monotonic() - begun
    now = models.snapshot(model, optimizer)
    afterwards = models.attempt(models.train, model, optimizer, range(fails, 9))
    return said, took, told, held, now, afterwards


@pytest.mark.parametrize("fails", [0, 2, GAP])
@pytest.mark.parametrize("source", ["momentum", "gradients"])
@ON_ALL
def test_an_error_on_one_rank_is_raised_on_all(layout: Layout, source: str, fails: int) -> None:
    answers = ranks.run_on(layout, _one_rank_fails, source, fails)
    failed = [
        rank for rank, answer in enumerate(answers) if answer[2] and (rank == 1 or fails == 2)
    ]
    assert len(failed) == 1
    for said, took, _, held, _, afterwards in answers:
        assert said.startswith("RuntimeError: Conda could not refresh its bases: ")
        assert [rank for rank in range(len(answers)) if f"rank {rank}: " in said] == failed
        assert "MemoryError: no room for a workspace (while decomposing the " in said
        assert all(name in said for name in answers[failed[0]][2])
        assert took < 10
        assert not held
        assert afterwards == "nothing was raised"
    if layout[0] in ("ddp", "hsdp"):  # replicas are alike
        half = len(answers) // 2
        for first, second in zip(answers[:half], answers[half:], strict=True):
            assert not models.unequal(first[4], second[4])


def _tells_hooks(layout: Layout, source: str) -> tuple[list[str], list[str], str, str]:
    """Names that a hook is told, this rank's names, and what comes of an error in a hook."""
    model, optimizer = models.build(layout, basis_source=source)
    rows = [row for row in optimizer.report(show=False) if dist.get_rank() in row["owners"]]
    told: list[str] = []
    with register_refresh_hook(told.append):
        models.train(model, optimizer, range(2))  # one with a refresh and one without

    def refuse(name: str) -> None:
        raise ValueError(f"no more of {name}")

    models.train(model, optimizer, range(2, GAP))
    with register_refresh_hook(refuse):
        said = models.attempt(models.train, model, optimizer, [GAP])
    return (
        told,
        [row["name"] for row in rows],
        said,
        models.attempt(models.warned_step, model, optimizer, GAP),
    )


@pytest.mark.parametrize("source", ["momentum", "gradients"])
@ON_ALL
def test_hooks_are_told_of_each_decomposition(layout: Layout, source: str) -> None:
    """And each rank decomposes what it owns: replicas share the decompositions."""
    for told, theirs, said, afterwards in ranks.run_on(layout, _tells_hooks, source):
        assert theirs
        assert sorted(set(told)) == sorted(theirs)
        assert "ValueError: no more of" in said
        assert afterwards == "nothing was raised"
