"""How a key of the job's configuration is declared."""

from __future__ import annotations

from dataclasses import dataclass

MOST = 2**31 - 1
"""Upper bound of sizes and counts: the libraries below take no larger ones."""
LARGE = 1e9
"""Upper bound of rates and decays: nobody needs more, and float32 can multiply two of them."""


@dataclass(frozen=True, slots=True)
class Key:
    """What the declaration of a key says besides its type and default.

    The bounds apply to the value; to each item, where that is a list.
    """

    help: str
    """One line for `--help`, with the unit where there is one."""
    ge: float | None = None
    gt: float | None = None
    le: float | None = None
    lt: float | None = None
