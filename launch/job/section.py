"""A section of the job's configuration, and the types of its numbers with their bounds."""

from __future__ import annotations

from typing import Annotated, Any, TypeVar

from annotated_types import Gt, Interval, Lt
from pydantic import BaseModel, BeforeValidator, ConfigDict

T = TypeVar("T")

MOST = 2**31 - 1
"""Upper bound of sizes and counts: the libraries below take no larger ones."""
LONGEST = 2**63 - 1
"""Upper bound of numbers of bytes and of Conda's counts: torch's integers are no larger."""
LARGE = 1e9
"""Upper bound of rates and decays: nobody needs more, and float32 can multiply two of them."""

Size = Annotated[int, Interval(ge=1, le=MOST)]
Count = Annotated[int, Interval(ge=0, le=MOST)]
Positive = Annotated[float, Interval(gt=0, le=LARGE)]
NotNegative = Annotated[float, Interval(ge=0, le=LARGE)]
Share = Annotated[float, Interval(ge=0, le=1)]
SmallPositive = Annotated[float, Interval(gt=0, le=1)]
Decay = Annotated[float, Interval(ge=0, lt=1)]
Betas = tuple[Decay, Decay]
HeldOut = Annotated[float, Gt(0), Lt(1)]
Factor = Annotated[float, Interval(ge=1, le=1e30)]
Norm = Annotated[float, Interval(ge=0, le=1e30)]


def _none(value: Any) -> Any:
    # Behind a validator in Python, pydantic no longer takes a list of JSON's for a tuple.
    value = tuple(value) if isinstance(value, list) else value
    return None if value == "none" else value


NULL = BeforeValidator(_none)
"""TOML has no null: None is written "none"."""
Maybe = Annotated[T | None, NULL]


def _listed(value: Any) -> Any:
    if isinstance(value, str):
        return (value,)
    return tuple(value) if isinstance(value, list) else value


Texts = Annotated[tuple[str, ...], BeforeValidator(_listed)]
"""A list of texts; one text stands for a list of it alone."""


class Section(BaseModel):
    """Keys and their defaults; the text below a key is its line of `--help`."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,  # 1 may be a float, True may not
        allow_inf_nan=False,
        use_attribute_docstrings=True,
        validate_default=False,
    )
