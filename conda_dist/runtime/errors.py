"""Errors that all ranks of a mesh raise together.

A rank that raised an error alone would leave the others waiting for it in their next collective.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from itertools import zip_longest
from typing import NoReturn

from conda_dist.runtime.collectives import Mesh, all_max, all_texts


def agree(
    mesh: Mesh,
    lines: Sequence[str],
    error: Exception | None,
    what: str = "cannot plan its step",
    explain: Callable[[Mapping[int, str]], str] | None = None,
) -> None:
    """Compares the ranks' plans, by a hash of them, before anything else is exchanged.

    Args:
        mesh: the ranks whose plans must be equal.
        lines: the plan of this rank as text.
        error: the exception with which planning failed on this rank, or None.
        what: what the optimizer cannot do if there is an error, for the message.
        explain: makes the message if plans differ, from the joined lines of each global rank. None:
            :func:`difference`.

    Raises:
        RuntimeError: plans differ, or a rank has an error; raised on all ranks.
        Exception: ``error`` itself, if there is only one rank.
    """
    if error is not None and not mesh.shared_dims():
        raise error
    digest = hashlib.sha256("\n".join(lines).encode()).digest()
    words = [int.from_bytes(digest[i : i + 7], "little") for i in range(0, 28, 7)]
    failed, *extremes = all_max(mesh, [error is not None, *words, *(-word for word in words)])
    if failed:
        raise_together(mesh, error, f"the optimizer {what}")
    if any(high != -low for high, low in zip(extremes[:4], extremes[4:], strict=True)):
        raise RuntimeError((explain or difference)(all_texts(mesh, "\n".join(lines))))


def difference(texts: Mapping[int, str]) -> str:
    """The message for plans that differ, with the first line that differs from the first rank's."""
    (first, reference), *others = texts.items()
    for rank, text in others:
        pairs = zip_longest(reference.split("\n"), text.split("\n"), fillvalue="nothing")
        for ours, theirs in pairs:
            if ours != theirs:
                return (
                    f"the optimizer's plan differs between ranks: rank {first} has {ours}; rank "
                    f"{rank} has {theirs}. Give all ranks the same parameters, in the same order, "
                    "with the same names, placements and options."
                )
    return "the optimizer's plan differs between ranks"


def raise_together(mesh: Mesh, error: Exception | None, what: str) -> NoReturn:
    """Raises the errors of all ranks of a mesh on all of them.

    Args:
        mesh: the ranks.
        error: this rank's error, with notes; None if it has none.
        what: what failed, for the message.
    """
    notes = "; ".join(getattr(error, "__notes__", []))
    text = f"{type(error).__name__}: {error}{f' ({notes})' if notes else ''}" if error else ""
    said = "; ".join(f"rank {rank}: {t}" for rank, t in all_texts(mesh, text).items() if t)
    raise RuntimeError(f"{what}: {said}") from error
