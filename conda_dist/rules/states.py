"""Names and dtypes of a parameter's states, as the options have them."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from conda_dist.options import Options

CODES = "exp_avg_sq_codes"
"""The second moment in 8 bits; see :func:`conda_dist.numerics.low_precision.decode`."""

ADAMW_STATES = frozenset({"step", "exp_avg", "exp_avg_sq", CODES})
"""Names of the states of a parameter on the adamw path."""

RULE_STATES = set[str]()
"""Names of the states that rules keep beside those; see :class:`conda_dist.rules.Rule`."""

PART = re.compile(r"(?<!step)_\d+$")


def base_name(key: Any) -> str:
    """The name of a state without the number of the part of a weight that it is of."""
    return PART.sub("", key) if isinstance(key, str) else ""


def is_own(key: Any) -> bool:
    """Whether a state of this name is this optimizer's, not one that a wrapper keeps."""
    return (name := base_name(key)) in ADAMW_STATES or name in RULE_STATES


def has_own(state: Any) -> bool:
    """Whether this optimizer has made any of a parameter's states.

    A wrapper may also keep something of its own, of any type, in the place of such a dict.
    """
    return isinstance(state, Mapping) and any(map(is_own, state))


def is_of_rule(state: Iterable[Any]) -> bool:
    """Whether a parameter's states are those of a rule: adamw has not all of them."""
    return not RULE_STATES.isdisjoint(map(base_name, state))


def moment_dtype(dtype: torch.dtype, options: Options) -> torch.dtype:
    """Dtype of a parameter's moments: ``state_dtype``, else its own but at least float32."""
    return options.state_dtype or torch.promote_types(dtype, torch.float32)


def second_dtype(dtype: torch.dtype, options: Options) -> torch.dtype:
    """Dtype of a parameter's second moment: ``second_moment_dtype``, else that of both."""
    return options.second_moment_dtype or moment_dtype(dtype, options)


def second_key(options: Options) -> str:
    """Name of the state that is the second moment, or its codes: none may pass for the other."""
    return CODES if options.second_moment_dtype == torch.uint8 else "exp_avg_sq"


def basis_dtype(dtype: torch.dtype, options: Options) -> torch.dtype:
    """Dtype of a weight's basis: ``basis_dtype``, else its moments' but at least float32."""
    return options.basis_dtype or torch.promote_types(moment_dtype(dtype, options), torch.float32)
