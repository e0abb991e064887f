"""Any parameters, gradients and arguments: trained as the paper says, or refused in words."""

import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given

from fuzz import Case, Param, examples, problem, run
from fuzz_cases import sound, spoilt


@given(sound())
@examples(80)
def test_what_is_sound_follows_the_paper(case: Case) -> None:
    assert not problem(case, run(case))


@given(spoilt())
@examples(150)
def test_what_is_not_is_refused_in_words(case: Case) -> None:
    assert not problem(case, run(case))


def _weights(**changes: Any) -> tuple[Param, ...]:
    """A matrix with these attributes, and one that is as it should be."""
    return Param("odd", **{"shape": (4, 6), **changes}), Param("even", (6, 4))


def _later(**changes: Any) -> Case:
    return Case(_weights(), later=changes, spoilt=tuple(changes))


FOUND: dict[str, Case] = {
    # Gradients above 65504 became infinite.
    "float16 products": Case(
        _weights(grads=("normal", "huge") * 2),
        {"matmul_dtype": torch.float16},
        spoilt=("matmul_dtype",),
    ),
    # TypeError of a kernel; they are numbers, and now become what kernels know.
    "fractions": Case(
        _weights(), {"lr": Fraction(1, 3), "weight_decay": Fraction(1, 3), "scale": Fraction(1, 2)}
    ),
    "fractions for vectors": Case(_weights(), {"lr": Fraction(1, 3)}, algorithm="adamw"),
    # The truth value of an array is ambiguous.
    "an array for a word": Case(
        _weights(), {"refresh_method": np.array([0.1, 0.2])}, spoilt=("refresh_method",)
    ),
    # RuntimeErrors of kernels, of numbers that float32 does not have.
    "a rate beyond float32": Case(_weights(), {"lr": 1e300}, spoilt=("lr",)),
    "a product beyond float32": Case(_weights(), {"lr": 1e20, "scale": 1e20}, spoilt=("scale",)),
    # NaN in every weight.
    "a tensor of NaN": Case(_weights(), {"lr": torch.tensor(math.nan)}, spoilt=("lr",)),
    "no rate later": _later(lr=math.nan),
    "an infinite scale later": _later(scale=math.inf),
    "an infinite decay later": _later(weight_decay=-math.inf),
    # Errors of our own making: ZeroDivisionError, OverflowError, TypeErrors of subscripts.
    "no interval later": _later(update_proj_gap=0),
    "an infinite interval later": _later(update_proj_gap=math.inf),
    "no betas later": _later(betas=None),
    "no pair later": _later(betas=(0.9,)),
    "a text later": _later(weight_decay="0.1"),
    # A scheduler's rounding error must not end a run.
    "a rate just below zero later": _later(lr=-1e-18),
    # RuntimeErrors of kernels that named no parameter.
    "one element for all": Case(_weights(form="expanded"), spoilt=("odd",)),
    "one row for all": Case(_weights(form="expanded", shape=(1, 6)), spoilt=("odd",)),
    "no elements": Case(_weights(form="meta"), spoilt=("odd",)),
    "no elements, not looked at": Case(
        (*_weights(), Param("odd", (3, 4), form="meta"))[1:], spoilt=("odd",)
    ),
    # The imaginary part was dropped.
    "a complex gradient": Case(_weights(grads=("complex",) * 4), spoilt=("odd",)),
    "a gradient of integers": Case(_weights(grads=("integer",) * 4), spoilt=("odd",)),
}
"""What long runs have found, in the smallest cases that show it."""


@pytest.mark.parametrize("case", FOUND.values(), ids=FOUND)
def test_what_was_found(case: Case) -> None:
    came = run(case)
    trains = not case.spoilt or case.later == {"lr": -1e-18}
    assert isinstance(came, list) == trains, came
    assert not problem(case, came)


def test_the_oracle_sees_what_is_wrong() -> None:
    """So that the tests above can fail: other steps than the case's are no answer to it."""
    case = Case(_weights(), {"update_proj_gap": 2})
    for other in ({"update_proj_gap": 3}, {"lr": 1.1e-2}, {"betas": (0.8, 0.99)}, {"scale": 0.3}):
        assert "way was" in problem(case, run(Case(case.params, {**case.arguments, **other})))
    assert "our own making" in problem(Case(case.params, spoilt=("lr",)), IndexError("lr"))
    assert "says nothing" in problem(Case(case.params, spoilt=("lr",)), ValueError("wrong"))
    assert "sound case" in problem(case, ValueError("lr"))
