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

    def take(self, slot: int, like: Tensor, dtype: torch.dtype) -> Tensor:
        """See :class:`conda_dist.rules.rule.Buffers`."""
        key = slot, dtype, like.device
        held, count = self._taken.get(key), like.numel()
        if held is None or held.numel() < count:
            self._taken.pop(key, None)
            del held  # free it before allocating the larger one
            held = self._taken[key] = torch.empty(count, dtype=dtype, device=like.device)
        return held[:count].view(like.shape)
