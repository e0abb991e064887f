"""Memory that weights which step one after another work in, in turns."""

import torch
from torch import Tensor


class Scratch:
    """Tensors that are not initialised, each in the place of the one that had its slot before.

    Fresh memory for each is paid for page by page: 4 % of a step of matrices of 3 MiB on a CPU.
    """

    def __init__(self) -> None:
        self._taken: dict[tuple[int, torch.dtype, torch.device], Tensor] = {}
        self._views: dict[tuple[int, torch.dtype, torch.device], Tensor] = {}

    def take(self, slot: int, like: Tensor, dtype: torch.dtype) -> Tensor:
        """A contiguous tensor of a shape, on its device, until the slot is taken again."""
        key = slot, dtype, like.device
        view = self._views.get(key)
        if view is not None and view.shape == like.shape:
            return view
        held, count = self._taken.get(key), like.numel()
        if held is None or held.numel() < count:
            self._taken.pop(key, None)
            self._views.pop(key, None)
            del held, view  # before there is another
            held = self._taken[key] = torch.empty(count, dtype=dtype, device=like.device)
        self._views[key] = held[:count].view(like.shape)
        return self._views[key]
