"""Conda (Column-Normalized Adam, arXiv 2509.24218) for sharded training.

Read ``reference.py`` first, then ``README.md`` in this folder: it follows one gradient through a
step.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from conda_dist.muon import Muon
    from conda_dist.namo import NAMO, NAMO_D
    from conda_dist.normuon import NorMuon
    from conda_dist.numerics.refresh_hooks import register_refresh_hook
    from conda_dist.optimizer import Conda
    from conda_dist.options import from_adamw
    from conda_dist.routing import param_groups

__all__ = [
    "NAMO",
    "NAMO_D",
    "Conda",
    "Muon",
    "NorMuon",
    "from_adamw",
    "param_groups",
    "register_refresh_hook",
]

_MODULES = {
    "Conda": "conda_dist.optimizer",
    "Muon": "conda_dist.muon",
    "NAMO": "conda_dist.namo",
    "NAMO_D": "conda_dist.namo",
    "NorMuon": "conda_dist.normuon",
    "from_adamw": "conda_dist.options",
    "param_groups": "conda_dist.routing",
    "register_refresh_hook": "conda_dist.numerics.refresh_hooks",
}


def __getattr__(name: str) -> Any:
    """Imports a public name when it is first used.

    Importing torch takes seconds. The commands of ``launch`` check their arguments before that.
    """
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(_MODULES[name]), name)
    return value
