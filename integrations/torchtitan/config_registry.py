"""Layer: integrations. Every torchtitan config, with an optimizer config that knows Conda.

torchtitan finds a config with ``getattr(module, name)``. This module accepts names of the form
``MODULE.CONFIG``, such as ``llama3.llama3_8b``, and returns that config with an optimizer config
that has ``--optimizer.name``.
"""

from collections.abc import Callable
from typing import Any

from torchtitan.config import ConfigManager

from conda_dist.integrations.torchtitan.container import conda_config


def __getattr__(name: str) -> Callable[[], Any]:
    module, _, config = name.rpartition(".")
    if not module:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def load() -> Any:
        arguments = ["--module", module, "--config", config]
        loaded, _ = ConfigManager()._load_config(arguments)
        loaded.optimizer = conda_config(loaded.optimizer)
        return loaded

    return load
