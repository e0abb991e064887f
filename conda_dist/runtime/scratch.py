"""Memory that weights which step one after another work in, in turns."""

import torch
from torch import Tensor


class Scratch:
    """Tensors that are not initialised, each in the place of the one that had its slot before.

    Fresh memory for each is paid for page by page: 4 % of a step of matrices of 3 MiB on a CPU.
    """

    def __init__(self) -> None:
        self._taken: dict[tuple[int, torch.dtype, torch.device], Tensor] = {}

    def take(self, slot: int, like: Tensor, dtype: torch.dtype) -> Tensor:
        """A contiguous tensor of a shape, on its device, until the slot is taken again."""
        key = slot, dtype, like.device
        held, count = self._taken.get(key), like.numel()
        if held is None or held.numel() < count:
            self._taken.pop(key, None)
            del held  # before there is another
            held = self._taken[key] = torch.empty(count, dtype=dtype, device=like.device)
        return held[:count].view(like.shape)
