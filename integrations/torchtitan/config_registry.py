"""Layer: integrations. Every torchtitan config under the name ``MODULE.CONFIG``, with Conda in it.

torchtitan finds a config by ``getattr(module, name)``; this module answers with any config of any
torchtitan module, such as ``llama3.llama3_8b``, its optimizer config made one that knows
``--optimizer.name``.
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
