"""State that wrappers of the optimizer, such as Lookahead, keep in a parameter's state dict."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from conda_dist.runtime import dtensor


def keep(value: Any, param: Tensor, here: Any) -> Any:
    """A copy of a wrapper's saved state, to be put into ``optimizer.state[param]``.

    Types and dtypes stay. As in torch's loader, tensors are moved to the parameter's device, and
    0-d tensors (counts) stay on theirs. A DTensor gets the placements of the state that the
    optimizer has in its place, if that has the same shape.

    Args:
        value: the saved value, of any type.
        param: the parameter.
        here: the value that the optimizer has in its place; None if there is none.
    """
    if isinstance(value, Mapping):
        known = here if isinstance(here, Mapping) else {}
        return {key: keep(item, param, known.get(key)) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(keep(item, param, None) for item in value)
    if not isinstance(value, Tensor):
        return value
    value = value.detach()
    if isinstance(here, DTensor) and value.shape == here.shape:
        return _laid_out(value, here)
    if not isinstance(value, DTensor) and value.ndim:
        value = value.to(param.device)
    return value.clone()


def _laid_out(value: Tensor, here: DTensor) -> Tensor:
    """A copy of a whole tensor, or of a DTensor of any placements, placed like ``here``."""
    if isinstance(value, DTensor) and value.device_mesh == here.device_mesh:
        return value.redistribute(placements=here.placements).clone()
    whole = value.full_tensor() if isinstance(value, DTensor) else value
    whole = whole.to(dtensor.local(here).device)
    return distribute_tensor(whole, here.device_mesh, here.placements, src_data_rank=None).clone()
