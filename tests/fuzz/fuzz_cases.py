"""What hypothesis draws for :mod:`fuzz`: sound cases, and cases with one thing wrong."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st

from fuzz import Case, Param, projects

STEPS = 4

NUMBERS = st.one_of(
    st.floats(0, 1),
    st.integers(0, 2),
    st.sampled_from([np.float64(0.5), np.float32(0.25), Fraction(1, 3)]),
)
DTYPES = st.sampled_from([None, torch.float32, torch.float64, torch.bfloat16])
MATHS: dict[str, st.SearchStrategy[Any]] = {
    "lr": NUMBERS | st.sampled_from([torch.tensor(0.1), torch.tensor([0.1]), torch.tensor(1)]),
    "betas": st.tuples(st.floats(0, 0.99), st.floats(0.5, 0.999)) | st.just([0, 0.9]),
    "eps": st.floats(1e-10, 1) | st.just(1),
    "weight_decay": NUMBERS,
    "scale": NUMBERS,
    "update_proj_gap": st.integers(1, 4) | st.just(10**30),
    "correct_bias": st.booleans(),
    "nesterov": st.booleans(),
}
"""Hyperparameters of a group."""
OPTIONS: dict[str, st.SearchStrategy[Any]] = {
    "state_dtype": DTYPES,
    "second_moment_dtype": DTYPES | st.just(torch.uint8),
    "matmul_dtype": DTYPES,
    "basis_dtype": DTYPES,
    "basis_source": st.sampled_from(["momentum", "gradients"]),
    "basis_budget": st.none() | st.just(0) | st.integers(0, 10**15) | st.integers(0, 300),
    "buffer_bytes": st.integers(1, 10**15) | st.integers(1, 300),
    "refresh_method": st.sampled_from(["svd", "orthogonal_iteration", "eigh64"]),
    "refresh_delay": st.integers(0, 4) | st.just(10**30),
    "diagnostics_every": st.integers(0, 3) | st.just(10**30),
}
"""Options of the optimizer."""

JUNK = st.one_of(
    st.none(),
    st.booleans(),
    st.text(max_size=3),
    st.floats(max_value=-1e-9, allow_infinity=True),
    st.integers(max_value=-1),
    st.sampled_from([math.nan, math.inf, 10**400, 1j, 0, 1e308, 1e-320, 5e-324]),
    st.lists(st.floats(), max_size=3),
    st.dictionaries(st.text(max_size=2), st.integers(), max_size=1),
    st.sampled_from(
        [
            torch.tensor([0.1, 0.2]),
            torch.tensor(math.nan),
            torch.tensor(-1.0),
            torch.tensor(1j),
            torch.tensor(True),
            torch.tensor(0.1, device="meta"),
            torch.empty(0),
            torch.eye(1).to_sparse(),
            np.array(0.1),
            np.array([0.1, 0.2]),
            np.float16(0.1),
            np.int64(3),
            np.bool_(True),
            Fraction(-1, 3),
            torch.int32,
            torch.float16,
            torch.float8_e4m3fn,
            torch.complex64,
            b"svd",
            range(2),
        ]
    ),
)
"""Values that some argument may not have; a few are as good as any for others."""

SMALL = st.integers(2, 7)
MATRICES = st.one_of(
    st.tuples(SMALL, SMALL),
    st.tuples(SMALL, SMALL, SMALL),
    st.sampled_from([(2, 600), (700, 3), (1, 2, 2), (9, 2, 2)]),
)
VECTORS = st.one_of(
    st.just(()),
    st.tuples(st.integers(0, 9)),
    st.tuples(st.just(1), st.integers(1, 2000)),
    st.tuples(st.integers(1, 2000), st.just(1)),
    st.sampled_from([(0, 4), (4, 0), (0, 0), (0, 3, 3), (2, 0, 3), (2, 3, 1), (2, 1, 3)]),
    st.sampled_from([(2, 3, 2, 2), (1, 1, 1, 1), (2, 0, 2, 2), (2, 2, 1, 2, 2)]),
)
THIN = st.sampled_from([(1, 1), (1, 9), (9, 1), (2, 1, 5), (1, 1500)])
"""On the conda path when they are sent there."""


@st.composite
def params(draw: st.DrawFn, name: str, shapes: st.SearchStrategy[Any]) -> Param:
    """A sound parameter."""
    shape = tuple(draw(shapes))
    dtype = draw(st.sampled_from(["float32", "float32", "float64", "bfloat16", "float16"]))
    kinds = ["normal", "normal", "normal", "zero", "none", "transposed", "spread", "small"]
    kinds += [] if dtype == "float16" else ["huge", "bfloat16"]
    kinds += ["float64"] if dtype == "float32" else []
    forms = ["plain", "plain", "transposed", "spread", "offset", "permuted"]
    grads = draw(st.lists(st.sampled_from(kinds), min_size=STEPS, max_size=STEPS))
    return Param(name, shape, dtype, draw(st.sampled_from(forms)), tuple(grads))


@st.composite
def cuts(draw: st.DrawFn, rows: int) -> tuple[int, ...]:
    """Rows in one to three parts."""
    at = sorted(draw(st.sets(st.integers(1, max(rows - 1, 1)), max_size=2)))
    bounds = [0, *(a for a in at if a < rows), rows]
    return tuple(b - a for a, b in itertools.pairwise(bounds))


@st.composite
def sound(draw: st.DrawFn, arguments: Sequence[str] = (*MATHS, *OPTIONS)) -> Case:
    """A case that has to train."""
    algorithm = draw(st.sampled_from([None, None, "conda", "adamw"]))
    shapes = {None: MATRICES | VECTORS, "conda": MATRICES | THIN, "adamw": MATRICES | VECTORS}
    count = draw(st.integers(1, 4))
    chosen = [draw(params(f"w{i}", shapes[algorithm])) for i in range(count)]
    if algorithm is None:
        # One that is on the conda path whatever its name: (1, m, n) is taken for learned tokens.
        matrices = MATRICES.filter(lambda shape: len(shape) == 2 or shape[0] > 1)
        chosen.append(draw(params(f"w{count}", matrices)))
    else:
        frozen = draw(st.lists(st.booleans(), min_size=count - 1, max_size=count - 1))
        chosen = [replace(p, frozen=f) for p, f in zip(chosen, [*frozen, False], strict=True)]
    if algorithm == "conda":
        for i, spec in enumerate(chosen):
            if draw(st.booleans()) and 1 < spec.shape[-2] < 10 and len(spec.shape) < 4:
                chosen[i] = replace(spec, splits=draw(cuts(spec.shape[-2])))
    names = draw(st.sets(st.sampled_from(sorted(arguments)), max_size=6))
    given = {n: draw({**MATHS, **OPTIONS}[n]) for n in sorted(names)}
    halves = torch.bfloat16 in (given.get("state_dtype"), given.get("second_moment_dtype"))
    if halves and draw(st.booleans()):
        given["stochastic_rounding"] = True
    if given.get("basis_source") == "gradients":
        given.pop("refresh_delay", None)
    group = {n: given.pop(n) for n in sorted(names & MATHS.keys()) if draw(st.booleans())}
    return Case(tuple(chosen), given, algorithm, group, named=draw(st.booleans()))


LATER = (
    "betas",
    "eps",
    "weight_decay",
    "scale",
    "update_proj_gap",
    "correct_bias",
    "nesterov",
    "lr",
)
NO_PARAMETERS = [
    *({"dtype": d} for d in ("complex64", "int64", "bool", "float8_e4m3fn", "uint8")),
    *({"form": f} for f in ("expanded", "sparse", "meta", "computed")),
]
NO_GRADIENTS = ["sparse", "complex", "integer", "nan", "inf"]


@st.composite
def spoilt(draw: st.DrawFn) -> Case:
    """A case with one thing wrong, or perhaps only odd."""
    case = draw(sound())
    what = draw(st.sampled_from(["argument", "group", "later", "parameter", "gradient"]))
    if what in ("argument", "group", "later"):
        known = {"argument": (*MATHS, *OPTIONS), "group": tuple(MATHS), "later": LATER}[what]
        name, junk = draw(st.sampled_from(known)), draw(JUNK)
        if name == "eps" and isinstance(junk, int | float) and 0 <= junk < 1e-40:
            junk = -1  # without an eps, what has no gradient is 0 / 0, as with Adam
        if isinstance(junk, int | float) and abs(junk) > 1e4:
            # torch's kernels for float16, its own optimizers' as well, refuse them as they are
            wide = [p if p.dtype != "float16" else replace(p, dtype="float32") for p in case.params]
            case = replace(case, params=tuple(wide))
        if name == "betas" and draw(st.booleans()):
            junk = (0.9, junk)
        where = {"argument": "arguments", "group": "group", "later": "later"}[what]
        group = {k: v for k, v in case.group.items() if k != name}
        case = replace(case, group=group, spoilt=(name,))
        return replace(case, **{where: {**getattr(case, where), name: junk}})
    i = draw(st.integers(0, len(case.params) - 1))
    spec = case.params[i]
    if what == "parameter":
        changes: dict[str, Any] = draw(st.sampled_from(NO_PARAMETERS))
        shape = (3, 4) if 0 in spec.shape else spec.shape
        spec = replace(spec, shape=shape, grads=("normal",) * STEPS, frozen=False, **changes)
    else:
        step = draw(st.integers(0, STEPS - 1))
        grads = list(spec.grads)
        grads[step] = draw(st.sampled_from(NO_GRADIENTS))
        spec = replace(spec, grads=tuple(grads), frozen=False)
    words = (spec.name,) if case.named else ("parameter", "param_groups")
    chosen = (*case.params[:i], spec, *case.params[i + 1 :])
    return replace(case, params=chosen, spoilt=words)


def conda_weights(case: Case) -> int:
    """How many parameters are on the conda path."""
    return sum(projects(case, spec) for spec in case.params)
