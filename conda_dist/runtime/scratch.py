"""Memory that weights reuse, because they step one after another."""

import torch
from torch import Tensor


class Scratch:
    """Uninitialized tensors in numbered slots; a slot reuses the memory of its previous tensor.

    New memory for each weight would cost 4 % of a step on a CPU (matrices of 3 MiB), because the
    operating system maps it page by page.
    """

    def __init__(self) -> None:
        self._taken: dict[tuple[int, torch.dtype, torch.device], Tensor] = {}
        self._views: dict[tuple[int, torch.dtype, torch.device], Tensor] = {}

    def take(self, slot: int, like: Tensor, dtype: torch.dtype) -> Tensor:
        """See :class:`conda_dist.rules.rule.Buffers`."""
        key = slot, dtype, like.device
        view = self._views.get(key)
        if view is not None and view.shape == like.shape:
            return view
        held, count = self._taken.get(key), like.numel()
        if held is None or held.numel() < count:
            self._taken.pop(key, None)
            self._views.pop(key, None)
            del held, view  # free the memory before allocating more
            held = self._taken[key] = torch.empty(count, dtype=dtype, device=like.device)
        self._views[key] = held[:count].view(like.shape)
        return self._views[key]
