"""Counts what collectives really send: wraps torch.distributed's own functions, which still run."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

OTHERS = (
    "all_reduce",
    "all_gather",
    "all_gather_object",
    "all_gather_into_tensor",
    "reduce_scatter_tensor",
    "broadcast",
    "gather",
    "scatter",
    "send",
    "recv",
    "barrier",
)


@dataclass(frozen=True)
class Call:
    """One collective, and the bytes this rank sent to others in it."""

    name: str
    sent: int


@contextmanager
def recorded() -> Iterator[list[Call]]:
    """Collectives called through torch.distributed inside the block, in order."""
    calls: list[Call] = []
    kept = {name: getattr(dist, name) for name in (*OTHERS, "all_to_all_single")}

    def all_to_all_single(output: Any, sent: Any, into: Any, out: Any, **options: Any) -> Any:
        here = dist.get_rank(options["group"])
        ranks = dist.get_world_size(options["group"])
        sizes = [sent.numel() // ranks] * ranks if out is None else out
        others = sum(size for peer, size in enumerate(sizes) if peer != here)
        assert sum(sizes) == sent.numel()
        calls.append(Call("all_to_all", others * sent.element_size()))
        return kept["all_to_all_single"](output, sent, into, out, **options)

    def watched(name: str) -> Any:
        def call(tensor: Any, *args: Any, **options: Any) -> Any:
            size = tensor.numel() * tensor.element_size() if hasattr(tensor, "numel") else 0
            calls.append(Call(name, size))
            return kept[name](tensor, *args, **options)

        return call

    try:
        for name in OTHERS:
            setattr(dist, name, watched(name))
        dist.all_to_all_single = all_to_all_single
        yield calls
    finally:
        for name, function in kept.items():
            setattr(dist, name, function)


def sent_bytes(calls: list[Call]) -> int:
    """Bytes that this rank sent in exchanges, without reductions."""
    return sum(call.sent for call in calls if call.name == "all_to_all")
