"""Keeps what surrounds a step from changing it: the caller's autocast, a CUDA graph."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def without_autocast() -> Iterator[None]:
    """Computes in the tensors' own dtypes, though the caller may be inside ``torch.autocast``.

    Autocast would round the operands of every product to 8 or 11 bits, and so the bases. It also
    caches the weights that the forward pass has cast, until the caller leaves the outermost
    autocast block (even a disabled one). This clears the cache, so that the next forward pass casts
    the weights as they are after the step.
    """
    accelerator = torch.accelerator.current_accelerator()
    kinds = ("cpu",) if accelerator is None else ("cpu", accelerator.type)
    enabled = [kind for kind in kinds if torch.is_autocast_enabled(kind)]
    for kind in enabled:
        torch.set_autocast_enabled(kind, False)
    try:
        yield
    finally:
        for kind in enabled:
            torch.set_autocast_enabled(kind, True)
        torch.clear_autocast_cache()


def refuse_capture() -> None:
    """Refuses to be recorded in a CUDA graph.

    A replay would repeat the count of one step, and would never refresh a basis.

    Raises:
        RuntimeError: a CUDA graph is being captured.
    """
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "Conda cannot be captured in a CUDA graph: which steps refresh their bases is decided "
            "on the host. Capture forward and backward, and call optimizer.step() outside."
        )
