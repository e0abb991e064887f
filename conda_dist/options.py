"""Options that hold for a whole optimizer, apart from the hyperparameters of its groups."""

from dataclasses import dataclass

import torch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "uint8": torch.uint8}
"""Dtypes of moments and products by name, for command lines and JSON; codes in uint8 are for the
second moment alone."""

OF_DTYPES = ("state_dtype", "second_moment_dtype", "matmul_dtype", "basis_dtype")
"""The options that are dtypes."""

REFRESH_METHODS = ("svd", "orthogonal_iteration", "eigh64")
REFRESHES = ("sync", "async")

COPIES = 5
"""Times that a step has what travels in one bucket in memory: one bucket comes, packed and
received, one is computed, and one goes, packed and received. Measured in tests/test_memory.py."""


@dataclass(frozen=True, slots=True)
class Options:
    """See :class:`conda_dist.Conda`, whose keyword arguments these are."""

    state_dtype: torch.dtype | None = None
    matmul_dtype: torch.dtype | None = None
    basis_dtype: torch.dtype | None = None
    basis_budget: int | None = 4 * 2**30
    bucket_bytes: int = 64 * 2**20
    refresh_bytes: int = 512 * 2**20
    max_refresh_failures: int = 3
    refresh_method: str = "svd"
    refresh: str = "sync"
    refresh_delay: int = 20
    second_moment_dtype: torch.dtype | None = None
    stochastic_rounding: bool = False
    compile: bool = False

    @property
    def bucket_limit(self) -> int:
        """Most bytes that travel in one bucket, so that a step holds twice ``bucket_bytes``."""
        return 2 * self.bucket_bytes // COPIES

    @property
    def refresh_limit(self) -> int:
        """Most bytes that a wave gathers on a rank, so that it holds twice ``refresh_bytes``."""
        return 2 * self.refresh_bytes // COPIES

    def __post_init__(self) -> None:
        """Refuses what cannot be meant.

        Raises:
            TypeError: a dtype is none.
            ValueError: a value is out of its range.
        """
        for name in OF_DTYPES:
            dtype = getattr(self, name)
            if dtype is not None and not isinstance(dtype, torch.dtype):
                raise TypeError(f"{name} must be a torch.dtype or None, got {dtype!r}")
            if name == "second_moment_dtype" and dtype == torch.uint8:
                continue
            if dtype is not None and not dtype.is_floating_point:
                coded = " or torch.uint8" if name == "second_moment_dtype" else ""
                raise ValueError(f"{name} must be a floating point dtype{coded}, got {dtype}")
            if dtype is not None and dtype.itemsize < 2:
                raise ValueError(f"{name} must have at least 16 bits, got {dtype}")
        for name in ("state_dtype", "second_moment_dtype"):
            if getattr(self, name) == torch.float16:
                raise ValueError(
                    f"{name}=torch.float16 loses the squares of small gradients; use bfloat16"
                )
        for name in ("stochastic_rounding", "compile"):
            if not isinstance(value := getattr(self, name), bool):
                raise TypeError(f"{name} must be a bool, got {value!r}")
        if self.stochastic_rounding and torch.bfloat16 not in (
            self.state_dtype,
            self.second_moment_dtype,
        ):
            raise ValueError(
                "stochastic_rounding has nothing to round: moments are bfloat16 by "
                "state_dtype=torch.bfloat16 or second_moment_dtype=torch.bfloat16"
            )
        if self.matmul_dtype == torch.float16:
            raise ValueError(
                "matmul_dtype=torch.float16 has no room for gradients above 65504, and loses small "
                "ones; use bfloat16"
            )
        if self.basis_dtype == torch.float16:
            raise ValueError("basis_dtype must be float64, float32 or bfloat16, got torch.float16")
        for name, known in (
            ("refresh_method", REFRESH_METHODS),
            ("refresh", REFRESHES),
        ):
            value = getattr(self, name)
            if not isinstance(value, str) or value not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}; got {value!r}")
        for name, least in (
            ("basis_budget", 0),
            ("bucket_bytes", 1),
            ("refresh_bytes", 1),
            ("max_refresh_failures", 1),
            ("refresh_delay", 1),
        ):
            value = getattr(self, name)
            if value is None and name == "basis_budget":
                continue
            if not isinstance(value, int) or isinstance(value, bool):
                raise TypeError(f"{name} must be an int, got {value!r}")
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
