"""Sections that measure: a steady step of LLaMA layers, and the ways to a new basis."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import DEVICE, TOY, Section, flags, timed
from torch import Tensor

from conda_dist import Conda, Muon
from conda_dist.launch.tools.benchmark_process import (
    NEVER,
    Step,
    parameters,
    shapes,
    two_products,
)
from conda_dist.numerics import decomposition
from conda_dist.numerics.precision import matmul_precision

SHAPES = (
    {"toy": (64, 176)} if TOY else {"60M": (512, 1376), "1B": (2048, 5461), "7B": (4096, 11008)}
)
"""Width and MLP of a layer."""
HALF = torch.bfloat16


def _conda(sizes: list[tuple[int, int]], dtype: torch.dtype, **options: Any) -> Step:
    """Steps with random bases, which cost as much as those of an SVD that takes minutes."""
    params = parameters(sizes, dtype)
    group = {"params": params, "algorithm": "conda"}
    optimizer = Conda([group], update_proj_gap=NEVER, **options)
    optimizer.init_state()
    for param in params:
        state, r = optimizer.state[param], min(param.shape)
        state["basis"].copy_(torch.linalg.qr(torch.randn(r, r, device=DEVICE)).Q)
        state["basis_step"].fill_(0)
        state["step"].fill_(1)
    optimizer._setup = None  # its meshes have started
    return optimizer.step


def _other(sizes: list[tuple[int, int]]) -> Step:
    from pytorch_optimizer import Conda as Other

    return Other([{"params": parameters(sizes), "update_proj_gap": NEVER, "scale": 0.25}]).step


def _contenders(
    name: str, sizes: list[tuple[int, int]]
) -> dict[str, tuple[str, Callable[[], Step]]]:
    full = torch.float32
    half: dict[str, Any] = {"matmul_dtype": HALF}
    found: dict[str, tuple[str, Callable[[], Step]]] = {
        "two products, float32": ("highest", lambda: two_products(sizes, full)),
        "two products, TF32": ("high", lambda: two_products(sizes, full)),
        "two products, bfloat16": ("highest", lambda: two_products(sizes, HALF)),
        "Conda, float32": ("highest", lambda: _conda(sizes, full)),
        "Conda, tf32": ("highest", lambda: _conda(sizes, full, matmul_dtype="tf32")),
        "Conda, bfloat16 products": ("highest", lambda: _conda(sizes, full, **half)),
        "Conda, bfloat16 products and bases": (
            "highest",
            lambda: _conda(sizes, full, **half, basis_dtype=HALF),
        ),
        "Conda, bfloat16 parameters": ("highest", lambda: _conda(sizes, HALF, **half)),
        "AdamW, fused": (
            "highest",
            lambda: torch.optim.AdamW(parameters(sizes), fused=True).step,
        ),
        "torch.optim.Muon": ("highest", lambda: torch.optim.Muon(parameters(sizes)).step),
        "conda_dist.Muon": (
            "highest",
            lambda: Muon([{"params": parameters(sizes), "algorithm": "muon"}]).step,
        ),
    }
    if name in ("toy", "60M"):  # its first step takes an SVD of each
        found["pytorch_optimizer.Conda"] = "highest", lambda: _other(sizes)
    return found


def steps(section: Section, out: Path) -> None:
    """A steady step, by layer: on the device, on the host, and the memory it takes."""
    copied = 1e9 * float(section.details.get("copy GB/s") or 1.0)
    for name, (width, mlp) in SHAPES.items():
        layers = 2 if name in ("7B", "toy") else 8 if name == "60M" else 4
        sizes = shapes(width, mlp, layers)
        times: dict[str, Any] = {}
        for what, (precision, make) in _contenders(name, sizes).items():
            try:
                with flags(precision):
                    with torch.device(DEVICE):
                        step = make()
                    if not TOY:
                        torch.cuda.reset_peak_memory_stats()
                        before = torch.cuda.memory_allocated()
                    times[what] = taken = timed(step, cap_s=3.0)
                    peak = 0 if TOY else torch.cuda.max_memory_allocated() - before
                said = f"{taken.device / layers:.3f} ms, host {taken.host / layers:.3f} ms"
                section.add(f"{name}: {what}, a layer", f"{said}, {peak / 2**20:.0f} MiB")
                del step
            except Exception as error:
                section.add(
                    f"{name}: {what}", f"{type(error).__name__}: {str(error)[:160]}", "", False
                )
            if not TOY:
                torch.cuda.empty_cache()
        section.details[name] = {what: [t.device, t.host] for what, t in times.items()}
        half, products = times["Conda, bfloat16 products"], times["two products, bfloat16"]
        passed = 1e3 * 24 * sum(m * n for m, n in sizes) / copied
        floor, demanded = products.device + passed, name == "7B"
        section.add(f"{name}: to the products alone", f"{half.device / products.device:.2f}")
        ratio = half.device / floor
        section.add(
            f"{name}: to the products and one pass of 24 bytes an element",
            f"{ratio:.2f}",
            "<= 1.15" if demanded else "",
            ratio <= 1.15 if demanded else None,
        )
        ahead = half.host <= half.device
        section.add(
            f"{name}: host to device time",
            f"{half.host / half.device:.2f}",
            "<= 1" if demanded else "",
            ahead if demanded else None,
        )


def _momentum(r: int) -> Tensor:
    """Of a decaying spectrum, and nearly diagonal: in coordinates of a basis some steps old."""
    torch.manual_seed(0)
    values = torch.logspace(0, -4, r, device=DEVICE)
    near = torch.eye(r, device=DEVICE) + 0.1 * torch.randn(r, r, device=DEVICE) / r**0.5
    left = torch.linalg.qr(torch.randn(r, r, device=DEVICE)).Q
    return (left * values) @ torch.linalg.qr(near).Q.mT


def refreshes(section: Section, out: Path) -> None:
    """Ways to a new basis of a matrix (r, r)."""
    for r in (48,) if TOY else (1024, 2048, 4096):
        momentum = _momentum(r)
        with matmul_precision("ieee"):
            gram = momentum.mT @ momentum
        wide = gram.double()
        ways: dict[str, Step] = {
            "Gram matrix": lambda m=momentum: m.mT @ m,
            "iteration by Householder": lambda g=gram: decomposition.householder_factor(g),
            "iteration by Cholesky": lambda g=gram: decomposition.cholesky_factor(g),
            "iteration, whole": lambda m=momentum: decomposition.decompose(
                m, True, "orthogonal_iteration"
            ),
            "eigh, float64": lambda g=wide: torch.linalg.eigh(g),
            "eigh, float32": lambda g=gram: torch.linalg.eigh(g),
            **{
                f"SVD, {driver}": lambda m=momentum, d=driver: torch.linalg.svd(
                    m, full_matrices=False, driver=None if TOY else d
                )
                for driver in ("gesvdj", "gesvd")
            },
            "SVD, whole": lambda m=momentum: decomposition.decompose(m, True, "svd"),
        }
        taken: dict[str, float] = {}
        for what, run in ways.items():
            slow = what.startswith(("SVD", "eigh"))
            half = section.details.get(str(r // 2), {}).get(what, 0.0)
            if slow and half > 1500:
                section.add(f"r = {r}: {what}", "left out: too long at half the size")
                continue
            try:
                taken[what] = timed(run, 1 if slow else 6, 0 if slow else 2, 8.0).device
                section.add(f"r = {r}: {what}", f"{taken[what]:.2f} ms")
            except Exception as error:
                section.add(f"r = {r}: {what}", f"{type(error).__name__}: {str(error)[:120]}")
        section.details[str(r)] = taken
        if r == 4096 and "iteration, whole" in taken:
            section.most("r = 4096: a refresh by iteration, ms", taken["iteration, whole"], 30)
        rotation = decomposition.cholesky_factor(gram)
        if rotation is None:
            section.add(f"r = {r}: Cholesky", "not factorised", "", False)
            continue
        wide_rotation = rotation.double()
        off = wide_rotation.mT @ wide_rotation - torch.eye(r, dtype=torch.float64, device=DEVICE)
        section.most(f"r = {r}: Cholesky, |P^T P - I|", float(off.abs().max()), 1e-5)
