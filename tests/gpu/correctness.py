"""Sections in one process: the card, the authors' trajectories, drift, and waits for the device."""

import itertools
import platform
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import DEVICE, TOY, Section, copy_rate, flags, timed, wait, without_waits
from torch import nn

import golden as cases
from conda_dist import NAMO, NAMO_D, Conda, Muon, NorMuon
from conda_dist.reference import ReferenceConda


def card(section: Section, out: Path) -> None:
    """The card, the versions, and the rates that all times are held against."""
    section.add("torch", f"{torch.__version__}, CUDA {torch.version.cuda}")
    section.add("Python", platform.python_version())
    section.add("card", platform.machine() if TOY else torch.cuda.get_device_name(0))
    n = 256 if TOY else 8192
    kinds = {
        "float32": (torch.float32, "highest"),
        "TF32": (torch.float32, "high"),
        "bfloat16": (torch.bfloat16, "highest"),
        "float64": (torch.float64, "highest"),
    }
    for what, (dtype, precision) in kinds.items():
        a, b = (torch.randn(n, n, device=DEVICE, dtype=dtype) for _ in range(2))
        with flags(precision):
            ms = timed(lambda a=a, b=b: a @ b, 8).device
        section.details[what] = 2 * n**3 / ms / 1e9
        section.add(f"products in {what}", f"{section.details[what]:.1f} TFLOP/s")
        del a, b
    section.details["copy"] = copy_rate() / 1e9
    section.add("copy, read and written", f"{section.details['copy']:.0f} GB/s")


def golden(section: Section, out: Path) -> None:
    """The authors' trajectories, under flags that must not matter, and in fewer bits."""
    ways: dict[str, tuple[dict[str, Any], str, float | None]] = {
        "float32": ({}, "highest", cases.TOLERANCE),
        "float32, TF32 allowed": ({}, "high", cases.TOLERANCE),
        "eigh64": ({"refresh_method": "eigh64"}, "high", cases.TOLERANCE),
        "TF32 products": ({"matmul_dtype": "tf32"}, "highest", None),
        "bfloat16 products": ({"matmul_dtype": "bfloat16"}, "highest", None),
    }
    for what, (options, precision, most) in ways.items():
        errors = {}
        for name in cases.FLOAT32[:4] if TOY else cases.FLOAT32:
            case = cases.Case.load(name)
            param = nn.Parameter(case.tensors["param"].to(DEVICE, copy=True))
            with flags(precision):
                errors[name] = case.replay(
                    param,
                    Conda([case.group(param)], **options),
                    lambda tensor: tensor.to(DEVICE, copy=True),
                    lambda tensor: tensor.detach().cpu().clone(),
                )
        section.details[what] = errors
        worst = max(errors, key=errors.__getitem__)
        if most is None:
            section.add(f"worst error, {what}", f"{errors[worst]:.1e} ({worst})")
        else:
            section.most(f"worst error, {what}", errors[worst], most)

    _own_options(section)
    case = cases.Case.load("bfloat16")
    param = nn.Parameter(case.tensors["param"].to(DEVICE, copy=True))
    case.replay(
        param,
        Conda([case.group(param)], state_dtype=HALF),
        lambda tensor: tensor.to(DEVICE, copy=True),
        lambda tensor: tensor.detach().cpu().clone(),
    )
    theirs, start = case.tensors["params"][-1].float(), case.tensors["param"].float()
    error = float((param.detach().cpu().float() - theirs).norm() / (theirs - start).norm())
    section.most("error at the end, bfloat16 parameters and states", error, 0.06)


def _own_options(section: Section) -> None:
    """Options that the authors' code does not have, against the reference in float64."""
    own: list[dict[str, Any]] = [{"nesterov": True}, {"basis_source": "gradients"}]
    for shape, option in itertools.product(((48, 32), (32, 48), (32, 32)), own):
        torch.manual_seed(0)
        start = torch.randn(shape, dtype=torch.float64)
        ours, theirs = nn.Parameter(start.float().to(DEVICE)), nn.Parameter(start.clone())
        options: dict[str, Any] = {"lr": 1e-2, "update_proj_gap": 3, **option}
        group = {"params": [ours], "algorithm": "conda"}
        optimizers = Conda([group], **options), ReferenceConda([theirs], **options)
        for _ in range(8):
            grad = torch.randn(shape, dtype=torch.float64)
            ours.grad, theirs.grad = grad.float().to(DEVICE), grad
            for optimizer in optimizers:
                optimizer.step()
        moved = (theirs.detach() - start).norm()
        error = float((ours.detach().cpu().double() - theirs.detach()).norm() / moved)
        section.most(f"error at the end, {option}, {shape}", error, cases.TOLERANCE)


def drift(section: Section, out: Path) -> None:
    """How far bases are from orthonormal after many refreshes, whatever the flags allow."""
    r = 48 if TOY else 1024
    for method, times in (("orthogonal_iteration", 40), ("eigh64", 10)):
        for precision in ("highest", "high"):
            torch.manual_seed(0)
            param = nn.Parameter(0.02 * torch.randn(2 * r, r, device=DEVICE))
            group = {"params": [param], "algorithm": "conda"}
            optimizer = Conda([group], update_proj_gap=1, refresh_method=method)
            with flags(precision):
                for _ in range(6 if TOY else times):
                    param.grad = torch.randn_like(param)
                    optimizer.step()
            basis = optimizer.state[param]["basis"].double()
            off = basis.mT @ basis - torch.eye(r, dtype=basis.dtype, device=DEVICE)
            norm = float(torch.linalg.matrix_norm(off, 2))
            section.most(f"{method}, flags {precision}: |Q^T Q - I|", norm, 5e-5)


HALF = torch.bfloat16
STEADY: dict[str, tuple[torch.dtype, Callable[..., torch.optim.Optimizer], dict[str, Any]]] = {
    "float32": (torch.float32, Conda, {}),
    "tf32": (torch.float32, Conda, {"matmul_dtype": "tf32"}),
    "bfloat16 products": (torch.float32, Conda, {"matmul_dtype": HALF}),
    "bfloat16 parameters": (HALF, Conda, {}),
    "stochastic rounding": (HALF, Conda, {"state_dtype": HALF, "stochastic_rounding": True}),
    "8-bit second moments": (torch.float32, Conda, {"second_moment_dtype": torch.uint8}),
    "Nesterov's momentum": (torch.float32, Conda, {"nesterov": True}),
    "bases from gradients": (torch.float32, Conda, {"basis_source": "gradients"}),
    "refresh pending": (torch.float32, Conda, {"update_proj_gap": 3, "refresh_delay": 3}),
    "lr on the CPU": (torch.float32, Conda, {"lr": torch.tensor(1e-3, dtype=torch.float64)}),
    "lr on the device": (torch.float32, Conda, {"lr": torch.tensor(1e-3, dtype=torch.float64)}),
    "diagnostics": (torch.float32, Conda, {"diagnostics_every": 1}),
    **{rule.__name__: (torch.float32, rule, {}) for rule in (Muon, NorMuon, NAMO, NAMO_D)},
}
"""Dtype of the parameters, optimizer and options."""


def waits(section: Section, out: Path) -> None:
    """A steady step must not wait for the device: torch raises where it does."""
    for what, (dtype, rule, options) in STEADY.items():
        model = nn.Sequential(nn.Linear(64, 128), nn.Linear(128, 64)).to(DEVICE, dtype)
        named = [(f"layers.{name}", param) for name, param in model.named_parameters()]
        try:
            if what == "lr on the device":
                options["lr"] = options["lr"].to(DEVICE)
            optimizer = rule(named, **options)
            for step in range(6):
                for param in model.parameters():
                    param.grad = torch.randn_like(param)
                wait()
                if step in (0, 1, 2, 3):  # the first, and one that starts a refresh
                    optimizer.step()
                    continue
                with without_waits():
                    optimizer.step()
            section.add(what, "no wait", "no wait", None if TOY else True)
        except Exception as error:
            frames = traceback.extract_tb(error.__traceback__)
            ours = [frame for frame in frames if "conda_dist" in frame.filename][-1:]
            where = "".join(f" at {Path(f.filename).name}:{f.lineno}" for f in ours)
            said = f"{type(error).__name__}: {str(error)[:200]}{where}"
            section.add(what, said, "no wait", False)
