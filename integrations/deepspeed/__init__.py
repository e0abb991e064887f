"""Layer: integrations. Conda in DeepSpeed 0.19, ZeRO stages 0 to 3: ``"type": "Conda"``.

Import this package anywhere before ``deepspeed.initialize``, and name Conda in the JSON::

    import conda_dist.integrations.deepspeed

    {"optimizer": {"type": "Conda", "params": {"lr": 0.01, "adamw_params": ["*.router.weight"]}}}

``params`` takes the arguments of :class:`conda_dist.Conda` and patterns of parameter names; see
:class:`Conda`. A script may also make this optimizer and give it to ``deepspeed.initialize``.

``engine`` registers Conda with DeepSpeed, ``arguments`` checks the JSON, ``optimizer`` is the class
that the engine calls, ``partitions`` finds which elements ZeRO keeps on which rank,
``partition_step`` is one call of ``step()``, and ``checkpoint`` adds bases to checkpoints.
"""

from conda_dist.integrations.deepspeed.engine import register
from conda_dist.integrations.deepspeed.optimizer import Conda

__all__ = ["Conda"]

register()
