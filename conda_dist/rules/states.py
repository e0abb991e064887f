"""Names and dtypes of a parameter's states."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from conda_dist.options import Options

CODES = "exp_avg_sq_codes"
"""Name of a second moment in 8-bit codes; see :func:`conda_dist.numerics.low_precision.decode`."""

ADAMW_STATES = frozenset({"step", "exp_avg", "exp_avg_sq", CODES})
"""Names of the states of a parameter on the adamw path."""

RULE_STATES = set[str]()
"""Names of the states that only rules keep: all ``state_names`` of the known rules."""

PART = re.compile(r"(?<!step)_\d+$")


def base_name(key: Any) -> str:
    """The name of a state without the number of a part: "basis" for "basis_2"."""
    return PART.sub("", key) if isinstance(key, str) else ""


def is_own(key: Any) -> bool:
    """Whether this optimizer keeps a state of this name; else a wrapper does."""
    return (name := base_name(key)) in ADAMW_STATES or name in RULE_STATES


def has_own(state: Any) -> bool:
    """Whether any state in a parameter's entry of ``optimizer.state`` is this optimizer's.

    Args:
        state: the entry. A wrapper may have put a value of any type there.
    """
    return isinstance(state, Mapping) and any(map(is_own, state))


def is_of_rule(state: Iterable[Any]) -> bool:
    """Whether a parameter's states are a rule's: some have names that adamw does not use."""
    return not RULE_STATES.isdisjoint(map(base_name, state))


def moment_dtype(dtype: torch.dtype, options: Options) -> torch.dtype:
    """Dtype of moments: ``state_dtype``, or else the parameter's dtype, at least float32."""
    return options.state_dtype or torch.promote_types(dtype, torch.float32)


def second_dtype(dtype: torch.dtype, options: Options) -> torch.dtype:
    """Dtype of second moments: ``second_moment_dtype``, or else :func:`moment_dtype`."""
    return options.second_moment_dtype or moment_dtype(dtype, options)


def second_key(options: Options) -> str:
    """Name of the second moment. Codes have another one, so that neither is taken for the other."""
    return CODES if options.second_moment_dtype == torch.uint8 else "exp_avg_sq"


def basis_dtype(dtype: torch.dtype, options: Options) -> torch.dtype:
    """Dtype of bases: ``basis_dtype``, or else :func:`moment_dtype`, at least float32."""
    return options.basis_dtype or torch.promote_types(moment_dtype(dtype, options), torch.float32)
