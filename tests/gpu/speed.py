"""Sections that measure: a steady step of LLaMA layers, and the ways to a new basis."""

import math
import statistics
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from common import DEVICE, TOY, Section, copy_rate, timed
from torch import Tensor, nn

from conda_dist import Conda
from conda_dist.launch.tools.benchmark_process import (
    HALF,
    NEVER,
    Contender,
    Found,
    Step,
    compare,
    conda_step,
    contenders,
    shapes,
)
from conda_dist.numerics import decomposition
from conda_dist.numerics.precision import matmul_precision
from conda_dist.options import Options
from conda_dist.rules.conda import CondaRule

SHAPES = (
    {"toy": (64, 176)} if TOY else {"60M": (512, 1376), "1B": (2048, 5461), "7B": (4096, 11008)}
)
"""Width and MLP of a layer."""


def _contenders(sizes: list[tuple[int, int]]) -> dict[str, Contender]:
    """The benchmark's, and Conda in fewer bits."""
    made = contenders(sizes, NEVER, "svd", DEVICE.type)
    made.pop("pytorch_optimizer.SOAP", None)  # its first step decomposes
    half: dict[str, Any] = {"matmul_dtype": HALF, "basis_dtype": HALF}
    made["conda_dist, bfloat16 bases"] = Contender(lambda: conda_step(sizes, **half))
    made["conda_dist, bfloat16 parameters"] = Contender(
        lambda: conda_step(sizes, dtype=HALF, matmul_dtype=HALF)
    )
    return made


def steps(section: Section, out: Path) -> None:
    """A steady step, by layer: on the device, on the host, and the memory it takes."""
    copied = copy_rate()
    section.add("copy, read and written", f"{copied / 1e9:.0f} GB/s")
    for name, (width, mlp) in reversed(SHAPES.items()):  # what is demanded comes first
        layers = 2 if name in ("7B", "toy") else 8 if name == "60M" else 4
        sizes = shapes(width, mlp, layers)
        times: dict[str, tuple[float, float]] = {}
        section.details[name] = times
        for what, contender in _contenders(sizes).items():
            try:
                found = compare({what: contender}, 3 if TOY else 12, 1, DEVICE.type)[what]
            except Exception as error:
                said = f"{type(error).__name__}: {str(error)[:160]}"
                section.add(f"{name}: {what}", said, "", False)
                continue
            times[what] = device, host = _medians(found)
            section.add(
                f"{name}: {what}, a layer",
                f"{device / layers:.3f} ms, host {host / layers:.3f} ms, "
                f"{(found.temporary or 0) / 2**20:.0f} MiB",
            )
        needed = "conda_dist, bfloat16", "two products, bfloat16"
        if not times.keys() >= set(needed):
            continue
        (device, host), (floor, _) = (times[what] for what in needed)
        passed = 1e3 * 24 * sum(m * n for m, n in sizes) / copied
        section.add(f"{name}: to the products alone", f"{device / floor:.2f}")
        for what, ratio, most in (
            (
                "to the products and one pass of 24 bytes an element",
                device / (floor + passed),
                1.15,
            ),
            ("host to device time", host / device, 0.9),  # 1 where the device waits for the host
        ):
            if name == "7B":
                section.most(f"{name}: {what}", ratio, most)
            else:
                section.add(f"{name}: {what}", f"{ratio:.2f}")


def _medians(found: Found) -> tuple[float, float]:
    """Milliseconds of the device and of the host."""
    device, host = zip(*((t.device, t.host) for t in found.rounds), strict=True)
    return 1e3 * statistics.median(device), 1e3 * statistics.median(host)


def _momentum(r: int, seed: int = 0) -> Tensor:
    """Of a decaying spectrum, and nearly diagonal: in coordinates of a basis some steps old."""
    torch.manual_seed(seed)
    values = torch.logspace(0, -4, r, device=DEVICE)
    near = torch.eye(r, device=DEVICE) + 0.1 * torch.randn(r, r, device=DEVICE) / r**0.5
    left = torch.linalg.qr(torch.randn(r, r, device=DEVICE)).Q
    return (left * values) @ torch.linalg.qr(near).Q.mT


def refreshes(section: Section, out: Path) -> None:
    """Ways to a new basis of a matrix (r, r)."""
    sizes = (48,) if TOY else (1024, 2048, 4096)
    for r in reversed(sizes):  # what is demanded comes first
        _iterations(section, r)
    with mock.patch.object(decomposition, "BY_CHOLESKY", {torch.device(DEVICE).type}):
        for r in (32,) if TOY else (1024, 512, 256):
            _equal_ones(section, r)
    _beside_products(section)
    for r in sizes:
        _decompositions(section, r)


def _iterations(section: Section, r: int) -> None:
    """Orthogonal iteration, and how far a basis by Cholesky is from orthonormal."""
    momentum = _momentum(r)
    with matmul_precision("ieee"):
        gram = momentum.mT @ momentum
    whole = "iteration, whole"
    ways: dict[str, Step] = {
        whole: lambda: decomposition.decompose([momentum], True, "orthogonal_iteration"),
        "Gram matrix": lambda: momentum.mT @ momentum,
        "iteration by Householder": lambda: decomposition.householder_factor(gram),
        "iteration by Cholesky": lambda: decomposition.cholesky_factors(gram[None]),
    }
    _time(section, r, ways, 6, 2)
    if r == 4096:
        taken = section.details[str(r)].get(whole, math.inf)
        section.most(f"r = {r}: a refresh by iteration, ms", taken, 30)
    (rotation,) = decomposition.cholesky_factors(gram[None])
    if rotation is None:
        section.add(f"r = {r}: Cholesky", "not factorised", "", False)
        return
    rotation = rotation.double()
    off = rotation.mT @ rotation - torch.eye(r, dtype=torch.float64, device=DEVICE)
    section.most(f"r = {r}: Cholesky, |P^T P - I|", float(off.abs().max()), 1e-5)


def _equal_ones(section: Section, r: int) -> None:
    """Orthogonal iteration of 16 equal matrices (r, r), one by one and as a step decomposes them.

    The two may round differently, so their rotations are compared, and both must be orthonormal.
    """
    momenta, method = [_momentum(r, seed) for seed in range(16)], "orthogonal_iteration"
    most = CondaRule(Options(refresh_method=method)).refreshed_together(momenta[0], False)

    def decomposed(at_once: int) -> list[Tensor]:
        found: list[decomposition.Found] = []
        for start in range(0, len(momenta), at_once):
            found += decomposition.decompose(momenta[start : start + at_once], True, method)
        return [rotation for _, rotation, _ in found if rotation is not None]

    ways: dict[str, Step] = {
        "16 iterations, one by one": lambda: decomposed(1),
        "16 iterations, together": lambda: decomposed(most),
    }
    _time(section, r, ways, 6, 2)
    at_once = min(most, len(momenta))
    section.add(f"r = {r}: decomposed together", str(at_once), "2 or more", at_once > 1)
    times = section.details[str(r)]
    if len(ratio := [times[way] for way in ways if way in times]) == 2:
        section.most(
            f"r = {r}: together, time of one by one", ratio[1] / ratio[0], 1.1, on_gpu=True
        )
    alone, together = torch.stack(decomposed(1)), torch.stack(decomposed(most))
    section.add(f"r = {r}: together, |P - P alone|", f"{float((together - alone).abs().max()):.1e}")
    off = together.mT.double() @ together.double() - torch.eye(r, device=DEVICE).double()
    section.most(f"r = {r}: together, |P^T P - I|", float(off.abs().max()), 1e-5)


def _decompositions(section: Section, r: int) -> None:
    """What takes whole decompositions; what took long at half the size is left out."""
    momentum = _momentum(r)
    with matmul_precision("ieee"):
        gram = momentum.mT @ momentum
    wide = gram.double()

    def svd(driver: str) -> Step:
        given = None if TOY else driver
        return lambda: torch.linalg.svd(momentum, full_matrices=False, driver=given)

    ways: dict[str, Step] = {
        "eigh, float64": lambda: torch.linalg.eigh(wide),
        "eigh, float32": lambda: torch.linalg.eigh(gram),
        **{f"SVD, {driver}": svd(driver) for driver in ("gesvdj", "gesvd")},
        "SVD, whole": lambda: decomposition.decompose([momentum], True, "svd"),
    }
    for what, half in section.details.get(str(r // 2), {}).items():
        if what in ways and half > 1500:
            section.add(f"r = {r}: {what}", "left out: too long at half the size")
            del ways[what]
    _time(section, r, ways, 1, 0)


def _time(section: Section, r: int, ways: dict[str, Step], rounds: int, warm: int) -> None:
    taken: dict[str, float] = section.details.setdefault(str(r), {})
    for what, run in ways.items():
        try:
            taken[what] = timed(run, rounds, warm, 8.0).device
            section.add(f"r = {r}: {what}", f"{taken[what]:.2f} ms")
        except Exception as error:
            section.add(f"r = {r}: {what}", f"{type(error).__name__}: {str(error)[:120]}")


def _beside_products(section: Section) -> None:
    """Whether a decomposition in the background delays the products of training."""
    r, n = (48, 64) if TOY else (2048, 8192)
    param = nn.Parameter(torch.randn(r, r, device=DEVICE))
    factor = torch.randn(n, n, device=DEVICE, dtype=HALF)
    group = {"params": [param], "algorithm": "conda"}
    optimizer = Conda([group], update_proj_gap=20, refresh_delay=15)

    def products() -> None:
        for _ in range(10):
            factor @ factor

    alone, beside, stepping = timed(products, 5).device, [], []
    for _ in range(6 if TOY else 45):
        param.grad = torch.randn_like(param)
        beside.append(timed(products, 1, 0).device)
        stepping.append(timed(optimizer.step, 1, 0).device)
    del stepping[0], beside[0]  # the first step takes the basis itself
    said = f"{alone:.2f} ms alone; beside it {statistics.median(beside):.2f}, at most"
    section.add(f"ten products beside r = {r}", f"{said} {max(beside):.2f} ms")
    said = f"{statistics.median(stepping):.2f} ms, at most {max(stepping):.2f} ms"
    section.add(f"optimizer steps, r = {r} in the background", said)
