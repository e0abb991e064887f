"""Settings of the surrounding program that would change a step: autocast, TF32, CUDA graphs."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def without_autocast() -> Iterator[None]:
    """Turns ``torch.autocast`` off in a block, and clears its cache of weights.

    Autocast would round the operands of every matrix product to 8 or 11 bits, also those that make
    bases. It also caches the cast weights of the forward pass until the caller leaves the outermost
    autocast block, even a disabled one. A step changes the weights, so the cache must be cleared:
    then the next forward pass casts the new weights.
    """
    accelerator = torch.accelerator.current_accelerator()
    enabled = []
    for kind in ("cpu",) if accelerator is None else ("cpu", accelerator.type):
        if torch.is_autocast_enabled(kind):
            torch.set_autocast_enabled(kind, False)
            enabled.append(kind)
    try:
        yield
    finally:
        for kind in enabled:
            torch.set_autocast_enabled(kind, True)
        torch.clear_autocast_cache()


def refuse_capture() -> None:
    """Raises an error while a CUDA graph is being captured.

    A replay of the graph would repeat the same step count, and would never refresh a basis.

    Raises:
        RuntimeError: a CUDA graph is being captured.
    """
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "Conda cannot be captured in a CUDA graph, because the host decides in which steps "
            "bases are refreshed. Capture forward and backward only, and call optimizer.step() "
            "outside the graph."
        )
