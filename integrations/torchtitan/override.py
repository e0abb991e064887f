"""Layer: integrations. Conda through ``--override.imports``, which replaces a component."""

import difflib
import sys
from dataclasses import fields
from typing import Any

from torchtitan.components.optimizer import OptimizersContainer
from torchtitan.config import ConfigManager
from torchtitan.config.override import override

from conda_dist.integrations.torchtitan.container import CondaOptimizersContainer, conda_config
from conda_dist.options import OPTIONS


@override(target=OptimizersContainer.Config, description="Conda (arXiv 2509.24218)")  # type: ignore[untyped-decorator]
def conda(config: Any, **options: Any) -> CondaOptimizersContainer.Config:
    """Replaces the optimizer of a torchtitan config by Conda.

    Args:
        config: the optimizer's config.
        options: fields of :class:`CondaOptimizersContainer.Config`, such as ``lr``.

    Raises:
        TypeError: a value has the wrong type.
        ValueError: there is no such field, a value is out of range, or this optimizer cannot be
            replaced.
    """
    known = (f.name for f in fields(CondaOptimizersContainer.Config))
    names = [name for name in known if name not in ("name", "_stock")]
    if unknown := [option for option in options if option not in names]:
        near = {option: difflib.get_close_matches(option, names, 1, 0.8) for option in unknown}
        said = (f"{o!r}{f' (the nearest is {n[0]!r})' if n else ''}" for o, n in near.items())
        raise ValueError(f"Conda has no option {', '.join(said)}")
    if isinstance(options.get("betas"), list):
        options["betas"] = tuple(options["betas"])  # JSON has lists only
    for option in ("conda_params", "adamw_params", "splits"):
        if not isinstance(options.get(option, []), list):
            raise ValueError(f"{option} must be a list, got {options[option]!r}")
    for option, value in options.items():
        if option in OPTIONS and not (value is None and OPTIONS[option].by_preset):
            OPTIONS[option].check(value)
    return conda_config(config, _before(), name="conda", **options)


def _before() -> Any:
    """The optimizer's config before the command line changed it; None if torchtitan has no such."""
    try:
        loaded, _ = ConfigManager()._load_config(sys.argv[1:])
    except (ImportError, ValueError):
        return None
    return loaded.optimizer
