"""Cases for fuzzing the optimizer: parameters, gradients and arguments, and what they come to.

A case is plain data, so that processes can be sent it. :func:`run` trains it, on one process or on
a mesh, and returns what it came to; :func:`oracle` is what it should: the paper's steps in float64,
matrix by matrix, with nothing of the package in it.

``FUZZ_EXAMPLES=5000 pytest tests/fuzz`` tries as many cases anew in each test, in place
of the few that the suite repeats.
"""

import math
import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from hypothesis import HealthCheck, settings
from torch import Tensor, nn

import toys
from conda_dist import Conda
from conda_dist.options import OPTIONS
from conda_dist.reference import (
    Sides,
    decompose,
    eigenvectors,
    gram_matrices,
    project,
    project_back,
)

ASKED = os.environ.get("FUZZ_EXAMPLES")


def examples(count: int, share: float = 1.0) -> Callable[[Any], Any]:
    """How many cases a test tries: ``count``, or ``share`` of what the environment asks for."""
    return settings(
        max_examples=max(1, round(int(ASKED) * share)) if ASKED else count,
        derandomize=ASKED is None,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


@dataclass(frozen=True, slots=True)
class Param:
    """A parameter of a case.

    Attributes:
        name: its name.
        shape: its shape.
        dtype: name of its dtype.
        form: how its elements lie in memory; see ``FORMS``.
        grads: for each step "normal", "zero", "none" or one of ``GRADIENTS``.
        frozen: whether it needs no gradient.
        splits: rows of its parts, if it is split.
        places: for each mesh dimension "R", "S0", "S1", ..., "T0", ... (strided) or "P" (partial);
            None if it is no DTensor.
        partial: whether its gradients are yet to be summed up over the ranks that replicate it.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str = "float32"
    form: str = "plain"
    grads: tuple[str, ...] = ("normal",) * 4
    frozen: bool = False
    splits: tuple[int, ...] | None = None
    places: tuple[str, ...] | None = None
    partial: bool = False


@dataclass(frozen=True, slots=True)
class Case:
    """Parameters and arguments.

    Attributes:
        params: the parameters, in the optimizer's order.
        arguments: of the optimizer.
        algorithm: of all parameters, or None for the default rule.
        group: options of their group.
        named: whether the optimizer is told their names.
        later: hyperparameters given to the groups after the second step.
        spoilt: what is wrong on purpose: words of which a refusal has to say one.
        group_size: ranks of each compute group; None for as many as the plan chooses.
    """

    params: tuple[Param, ...]
    arguments: dict[str, Any] = field(default_factory=dict)
    algorithm: str | None = None
    group: dict[str, Any] = field(default_factory=dict)
    named: bool = True
    later: dict[str, Any] = field(default_factory=dict)
    spoilt: tuple[str, ...] = ()
    group_size: int | None = None


def _spread(values: Tensor) -> Tensor:
    """Every other element of a larger tensor."""
    wide = torch.zeros(*values.shape[:-1], 2 * values.shape[-1], dtype=values.dtype)
    wide[..., ::2] = values
    return wide[..., ::2]


FORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "plain": lambda t: t,
    "transposed": lambda t: t.mT.contiguous().mT if t.ndim > 1 else t,
    "spread": lambda t: _spread(t) if t.ndim else t,
    "offset": lambda t: torch.cat([t.new_zeros(3), t.flatten()])[3:].view(t.shape),
    "permuted": lambda t: t.movedim(0, -1).contiguous().movedim(-1, 0) if t.ndim else t,
    # No optimizer can update what follows.
    "expanded": lambda t: t.flatten()[:1].expand(t.shape) if t.ndim else t,
    "sparse": lambda t: t.to_sparse(),
    "meta": lambda t: t.to("meta"),
    "computed": lambda t: t.requires_grad_() * 1,
}
"""Ways in which the elements of a tensor may lie in memory."""

GRADIENTS: dict[str, Callable[[Tensor], Tensor]] = {
    "normal": lambda g: g,
    "zero": torch.zeros_like,
    "transposed": FORMS["transposed"],
    "spread": FORMS["spread"],
    "huge": lambda g: g * 1e15,
    "small": lambda g: g * 1e-6,
    "nan": lambda g: g.masked_fill(torch.arange(g.numel()).view(g.shape) == 0, math.nan),
    "inf": lambda g: g.masked_fill(torch.arange(g.numel()).view(g.shape) == 0, math.inf),
    "sparse": lambda g: g.to_sparse(),
    "complex": lambda g: torch.complex(g.float(), g.float()),
    "integer": lambda g: torch.ones_like(g, dtype=torch.int64),
    "bfloat16": lambda g: g.to(torch.bfloat16),
    "float64": lambda g: g.to(torch.float64),
}
"""What a gradient may be."""


def whole(param: Param, seed: int) -> Tensor:
    """A parameter's elements at the start."""
    dtype = getattr(torch, param.dtype)
    values = toys.random(*param.shape, seed=seed, dtype=torch.float32) / 4
    return (values * 8).to(dtype) if not dtype.is_floating_point else values.to(dtype)


def gradient(param: Param, index: int, step: int) -> Tensor | None:
    """Its whole gradient at a step, as it lies in memory."""
    if (kind := param.grads[step]) == "none" or param.frozen:
        return None
    dtype = getattr(torch, param.dtype)
    normal = toys.random(*param.shape, seed=1000 + 50 * step + index, dtype=torch.float64)
    grad = GRADIENTS[kind](normal.to(dtype))
    return grad.to("meta") if param.form == "meta" else grad


Options = dict[str, Any]
Place = Callable[[Param, Tensor, bool], Tensor]
"""Puts a whole tensor where its parameter is, or its gradient."""


def run(case: Case, place: Place = lambda _, tensor, __: tensor, **more: Any) -> Any:
    """Trains a case.

    Args:
        case: the case.
        place: puts a whole tensor on a mesh.
        more: further arguments, such as ``process_group``.

    Returns:
        The parameters (on a mesh: what this rank has of them), or what was raised.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return _train(case, place, more)
        except Exception as error:
            return error


def _train(case: Case, place: Place, more: dict[str, Any]) -> list[Tensor]:
    tensors = []
    for i, spec in enumerate(case.params):
        values = place(spec, FORMS[spec.form](whole(spec, i)), False)
        needs = not spec.frozen and values.dtype.is_floating_point | values.dtype.is_complex
        computed = spec.form == "computed"
        tensors.append(values if computed else nn.Parameter(values.detach(), requires_grad=needs))
    pairs = [
        (spec.name, t) if case.named else t for spec, t in zip(case.params, tensors, strict=True)
    ]
    groups = _groups(case, pairs)
    optimizer = Conda(groups, **case.arguments, **more)
    for step in range(len(case.params[0].grads)):
        for i, (spec, tensor) in enumerate(zip(case.params, tensors, strict=True)):
            grad = gradient(spec, i, step)
            if grad is not None and grad.dtype != tensor.dtype:
                tensor.grad_dtype = None
            tensor.grad = None if grad is None else place(spec, grad, True)
        if step == 2:
            for group in optimizer.param_groups:
                group.update(case.later)
        optimizer.step()
    return [tensor.detach() for tensor in tensors]


def _groups(case: Case, pairs: Sequence[Any]) -> list[dict[str, Any]]:
    """One group, and one for each parameter that is split."""
    algorithm = {} if case.algorithm is None else {"algorithm": case.algorithm}
    plain = [p for p, spec in zip(pairs, case.params, strict=True) if spec.splits is None]
    groups = [{"params": plain, **case.group, **algorithm}] if plain else []
    for pair, spec in zip(pairs, case.params, strict=True):
        if spec.splits is not None:
            groups.append({"params": [pair], "splits": spec.splits, **case.group, **algorithm})
    return groups


# What should come of a case

DEFAULTS: dict[str, Any] = {
    "lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.0, "scale": 0.25,
    "update_proj_gap": 2000, "correct_bias": True, "nesterov": False, "refresh_delay": 0,
    "refresh_method": "svd", "basis_source": "momentum",
}  # fmt: skip


def _given(arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments without those whose value None stands for the preset's."""
    by_preset = {name for name, option in OPTIONS.items() if option.by_preset}
    return {n: v for n, v in arguments.items() if v is not None or n not in by_preset}


def projects(case: Case, spec: Param) -> bool:
    """Whether a parameter is on the conda path, by the rule that the README states."""
    if case.algorithm is not None:
        return case.algorithm == "conda"
    if case.named and len(spec.shape) == 3 and spec.shape[0] == 1:
        return False  # learned tokens, by the default rule
    return len(spec.shape) in (2, 3) and min(spec.shape[-2:]) > 1 and 0 not in spec.shape


def oracle(case: Case) -> list[Tensor]:
    """The parameters after all steps, in float64."""
    start = {**DEFAULTS, **_given(case.arguments), **case.group}
    options = [{**start, **(case.later if t > 1 else {})} for t in range(len(case.params[0].grads))]
    grads = [
        [gradient(spec, i, step) for step in range(len(spec.grads))]
        for i, spec in enumerate(case.params)
    ]
    # What is on a mesh begins apart from what is not.
    begun = {}
    for meshed in (True, False):
        mine = [g for g, spec in zip(grads, case.params, strict=True) if _meshed(spec) == meshed]
        steps = [any(g is not None and g.any() for g in row) for row in zip(*mine, strict=True)]
        begun[meshed] = steps.index(True) if any(steps) else len(options)
    ended = {}
    # Weights that are split have groups of their own, after the one of all others.
    order = sorted(range(len(case.params)), key=lambda i: case.params[i].splits is not None)
    for i in order:
        spec = case.params[i]
        first = begun[_meshed(spec)]
        param, given = whole(spec, i).double(), [None] * first + grads[i][first:]
        if spec.frozen or not projects(case, spec):
            ended[i] = _adam(param, given, options)
            continue
        parts = torch.split(param, list(spec.splits or param.shape[-2:-1]), -2)
        cut = [
            [None] * len(parts) if g is None else torch.split(g, [p.shape[-2] for p in parts], -2)
            for g in given
        ]
        after = []
        for k, part in enumerate(parts):
            after.append(_conda(part, [row[k] for row in cut], options))
        ended[i] = torch.cat(after, -2)
    return [ended[i] for i in range(len(case.params))]


def _meshed(spec: Param) -> bool:
    return spec.places is not None


def _size(options: dict[str, Any], count: int, ahead: bool = False) -> float:
    beta1, beta2 = options["betas"]
    correction = math.sqrt(1 - beta2**count) / (1 - beta1 ** (count + ahead))
    return float(options["lr"]) * (correction if options["correct_bias"] else 1)


def _adam(param: Tensor, grads: Sequence[Tensor | None], given: Sequence[Options]) -> Tensor:
    first, second, count = torch.zeros_like(param), torch.zeros_like(param), 0
    for grad, options in zip(grads, given, strict=True):
        if grad is not None:
            beta1, beta2 = options["betas"]
            first = beta1 * first + (1 - beta1) * grad.double()
            second = beta2 * second + (1 - beta2) * grad.double() ** 2
            count += 1
            param = param - _size(options, count) * first / (second.sqrt() + options["eps"])
            param = param - float(options["lr"]) * options["weight_decay"] * param
    return param


def _conda(param: Tensor, grads: Sequence[Tensor | None], given: Sequence[Options]) -> Tensor:
    """The paper's steps; a basis is that of a momentum of so many steps ago if refreshed async."""
    first, second, count = torch.zeros_like(param), torch.zeros_like(param), 0
    bases: Sides = (None, None)
    grams: Sides = (None, None)
    taken, pending = -1, None
    for grad, options in zip(grads, given, strict=True):
        if grad is None:
            continue
        beta1, beta2 = options["betas"]
        gap, late = options["update_proj_gap"], options["refresh_delay"] > 0
        delay = min(options["refresh_delay"], gap)
        first = beta1 * first + (1 - beta1) * grad.double()
        if not first.isfinite().all():
            return param + math.nan
        of_gradients = options["basis_source"] == "gradients"
        if of_gradients:
            grams = [
                None if x is None else (1 - beta2) * x + (0 if old is None else beta2 * old)
                for x, old in zip(gram_matrices(grad.double()), grams, strict=True)
            ]
        if taken < 0 and not first.any():
            continue
        last, begins = count - count % gap, taken < 0
        if begins:
            bases, taken = eigenvectors(grams) if of_gradients else decompose(first), count
        elif late and pending is not None and pending[0] <= count - delay:
            taken, bases, pending = *pending, None
        elif not late and taken < last and (of_gradients or first.any()):
            decomposed = grams if of_gradients else _gram_of(first)
            bases, taken = _refreshed(decomposed, bases, options), count
        seen = grad.double()
        if of_gradients and begins:  # what gives the first bases is in no moment
            first = seen = torch.zeros_like(first)
        side = project(seen, *bases)
        ahead = options["nesterov"]
        momentum = beta1 * first + (1 - beta1) * seen if ahead else first
        along = project(momentum, *bases)
        second = beta2 * second + (1 - beta2) * side**2
        update = along / (second.sqrt() + options["eps"])
        count += 1
        size = _size(options, count, ahead)
        param = param - options["scale"] * size * project_back(update, *bases)
        param = param - float(options["lr"]) * options["weight_decay"] * param
        if late and pending is None and taken < last and first.any():
            pending = count - 1, _refreshed(_gram_of(first), bases, options)
    return param


def _gram_of(momentum: Tensor) -> Sides:
    """Of the side of its basis alone."""
    left, right = gram_matrices(momentum)
    return (left if right is None else None), right


def _refreshed(grams: Sides, bases: Sides, options: dict[str, Any]) -> Sides:
    if options["refresh_method"] != "orthogonal_iteration":
        return eigenvectors(grams)
    return [_iterated(*side) for side in zip(grams, bases, strict=True)]


def _iterated(gram: Tensor | None, basis: Tensor | None) -> Tensor | None:
    if gram is None or basis is None:
        return None
    q, r = torch.linalg.qr(basis.mT @ gram @ basis)
    return basis @ (q * r.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-2))


# Whether it is so

ROUGH = ("state_dtype", "second_moment_dtype", "matmul_dtype", "basis_dtype")


def problem(case: Case, came: Any) -> str:
    """What is wrong with what a case came to; "" if nothing is."""
    if isinstance(came, Exception):
        return _refusal(case, came)
    expected = oracle(case)
    for i, (spec, ours, theirs) in enumerate(zip(case.params, came, expected, strict=True)):
        if tuple(ours.shape) != spec.shape or ours.dtype != getattr(torch, spec.dtype):
            return f"{spec.name} is now {ours.dtype} {tuple(ours.shape)}"
        if not (theirs.abs() < torch.finfo(ours.dtype).max / 9).all():
            continue  # it was given what is not finite, or a rate that leads there
        start = whole(spec, i).double()
        off, way = (ours.double() - theirs).norm(), (theirs - start).norm()
        rough = any(case.arguments.get(key) in HALVES for key in ROUGH)
        # Every step rounds to the parameter's dtype, and a direction whose gradient is nearly
        # zero may step either way; moments of 8 bits may be many times what they should be there.
        allowed = (0.3 if rough else 1e-2) * way
        largest = max(start.abs().max(), theirs.abs().max()) if theirs.numel() else 0.0
        unit = 2 * torch.finfo(ours.dtype).eps * largest
        allowed += len(spec.grads) * unit * math.sqrt(max(theirs.numel(), 1)) + 1e-7
        if not off <= allowed:
            return f"{spec.name} is {off:.3g} from where it should be; its way was {way:.3g}"
    return ""


HALVES = (torch.bfloat16, torch.float16, torch.uint8)


def _refusal(case: Case, error: Exception) -> str:
    said = f"{type(error).__name__}: {error}"
    if not case.spoilt:
        return f"a sound case raised {said}"
    if type(error) not in (TypeError, ValueError, RuntimeError):
        return f"an error of our own making: {said}"
    if not any(word in str(error) for word in case.spoilt):
        return f"says nothing of {' or '.join(case.spoilt)}: {said}"
    return ""
