"""Layer: integrations. Conda for trainers whose configuration gives an optimizer's import path.

torchtune and verl import a function by its path, and call it with ``model.parameters()`` and the
options of their configuration. Conda chooses paths by the names of parameters, which
``model.parameters()`` does not yield; :func:`conda` finds them.
"""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from conda_dist import Conda, param_groups


def conda(
    params: nn.Module | Iterator[nn.Parameter],
    lr: float | Tensor = 1e-2,
    *,
    conda_params: Sequence[str] = (),
    adamw_params: Sequence[str] = (),
    splits: Mapping[str, int | Sequence[int]] | None = None,
    **options: Any,
) -> Conda:
    """Makes the optimizer of a model.

    Embeddings, head, norms and biases take the adamw path, as in :func:`conda_dist.param_groups`.
    Parameters that are not trained are left out.

    Args:
        params: the model, or what its method ``parameters()`` returned. That generator knows the
            module that it belongs to, and so the names.
        lr: the learning rate of both paths.
        conda_params: patterns of names of parameters to put on the conda path in any case; see
            ``conda`` of :func:`conda_dist.param_groups`.
        adamw_params: patterns of names of parameters to put on the adamw path.
        splits: the rows of the parts of fused weights; see :func:`conda_dist.param_groups`.
        options: other arguments of :class:`conda_dist.Conda`.

    Raises:
        TypeError: ``params`` is something else, or an option is not one of Conda's.
        ValueError: see :func:`conda_dist.param_groups`.
    """
    model = params if isinstance(params, nn.Module) else _module_of(params)
    chosen = set(model.parameters() if isinstance(params, nn.Module) else params)
    groups = []
    for group in param_groups(model, conda=conda_params, adamw=adamw_params, splits=splits):
        named = [(n, p) for n, p in group["params"] if p in chosen and p.requires_grad]
        groups += [{**group, "params": named}] if named else []
    return Conda(groups, lr=lr, **options)


def _module_of(params: Any) -> nn.Module:
    """The module whose method ``parameters()`` returned a generator.

    Raises:
        TypeError: it is no such generator, or one that has yielded parameters already.
    """
    made = inspect.isgenerator(params) and params.gi_code is nn.Module.parameters.__code__
    if made and inspect.getgeneratorstate(params) == inspect.GEN_CREATED:
        module = inspect.getgeneratorlocals(params).get("self")
        if isinstance(module, nn.Module):
            return module
    raise TypeError(
        f"params must be a model or model.parameters(), got {type(params).__name__}: Conda needs "
        "the names of parameters to tell embeddings and the output head from other matrices. "
        "Pass the model, or use conda_dist.Conda with conda_dist.param_groups(model)."
    )
