"""Conda (Column-Normalized Adam, arXiv 2509.24218) for sharded training.

Layers, each importing only those before it: ``maths``, ``layout``, ``compute_layout`` (pure),
``transfer``, ``plan`` (who sends and computes what), ``exchange`` (collectives), ``storage``,
``runtime`` (the step), ``optimizer``. ``reference`` is the oracle.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from conda_dist.optimizer import Conda
    from conda_dist.routing import param_groups

__all__ = ["Conda", "param_groups"]

_MODULES = {"Conda": "conda_dist.optimizer", "param_groups": "conda_dist.routing"}


def __getattr__(name: str) -> Any:
    """Imports ``Conda`` and ``param_groups`` when they are first asked for.

    They import torch, which takes seconds. The commands of ``launch`` check what they are given
    before that.
    """
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = globals()[name] = getattr(importlib.import_module(_MODULES[name]), name)
    return found
