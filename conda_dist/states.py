"""Names and dtypes of a parameter's states, which follow from the options."""

import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from conda_dist.options import Options

CODES = "exp_avg_sq_codes"
"""The state that is a second moment in 8 bits; see :func:`conda_dist.maths.decode`."""

OWN = re.compile(
    r"step|(exp_avg|exp_avg_sq|exp_avg_sq_codes|basis|snapshot)(_\d+)?|basis_step|snapshot_step"
)
"""Names of the states that this optimizer makes. A wrapper may keep states of its own there too."""


def is_own(key: Any) -> bool:
    """Whether this optimizer, not a wrapper, makes the state of this name."""
    return isinstance(key, str) and OWN.fullmatch(key) is not None


def has_own(state: Iterable[Any]) -> bool:
    """Whether this optimizer has made any of a parameter's states."""
    return any(map(is_own, state))


def is_basis(key: Any) -> bool:
    """Whether the state of this name is a basis or a count of bases, which the adamw path lacks."""
    return is_own(key) and key.startswith("basis")


def moment_dtype(param: Tensor, options: Options) -> torch.dtype:
    """Dtype of a parameter's moments: ``state_dtype``, else its own but at least float32."""
    return options.state_dtype or torch.promote_types(param.dtype, torch.float32)


def second_dtype(param: Tensor, options: Options) -> torch.dtype:
    """Dtype of a parameter's second moment: ``second_moment_dtype``, else that of its moments."""
    return options.second_moment_dtype or moment_dtype(param, options)


def second_key(options: Options) -> str:
    """Name of the second moment's state. Codes have another name, so that neither passes for the
    other in a checkpoint.
    """
    return CODES if options.second_moment_dtype == torch.uint8 else "exp_avg_sq"


def basis_dtype(param: Tensor, options: Options) -> torch.dtype:
    """Dtype of a weight's basis: ``basis_dtype``, else its moments' but at least float32."""
    return options.basis_dtype or torch.promote_types(moment_dtype(param, options), torch.float32)


def basis_key(part: int | None) -> str:
    """Name of the state that is a weight's basis, or that of one of its parts."""
    return "basis" if part is None else f"basis_{part}"
