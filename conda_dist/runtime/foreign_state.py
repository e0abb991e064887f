"""What wrappers keep in the state of a parameter, beside this optimizer's own."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from conda_dist.runtime import dtensor


def keep(value: Any, param: Tensor, here: Any) -> Any:
    """A copy of what a wrapper keeps in a parameter's state, as this optimizer is to keep it.

    Dtypes and types stay. Tensors go to the parameter's device, as with torch's loader, but single
    numbers (counts) stay where they are. A tensor whose like is here already is laid out alike.

    Args:
        value: what was saved.
        param: the parameter.
        here: what the optimizer has in its place, if anything.
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
    """A copy of a tensor, a DTensor of any layout or a whole one, laid out like another."""
    if isinstance(value, DTensor) and value.device_mesh == here.device_mesh:
        return value.redistribute(placements=here.placements).clone()
    whole = value.full_tensor() if isinstance(value, DTensor) else value
    whole = whole.to(dtensor.local(here).device)
    return distribute_tensor(whole, here.device_mesh, here.placements, src_data_rank=None).clone()
