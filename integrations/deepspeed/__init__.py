"""Layer: integrations. Conda in DeepSpeed 0.19, ZeRO stages 0 to 3: ``"type": "Conda"``.

Importing this package, anywhere before ``deepspeed.initialize``, is all it takes::

    import conda_dist.integrations.deepspeed

    {"optimizer": {"type": "Conda", "params": {"lr": 0.01, "adamw_params": ["*.router.weight"]}}}

``params`` takes the arguments of :class:`conda_dist.Conda` and patterns of parameter names; see
:class:`Conda`, which may also be made by the script and handed to ``deepspeed.initialize``.

``arguments`` checks what the JSON says, ``partitions`` knows where ZeRO keeps which elements,
``unit`` takes the step of what one call of ``step()`` concerns, ``optimizer`` is the class the
engine sees and ``engine`` makes it known there.
"""

from conda_dist.integrations.deepspeed.engine import register
from conda_dist.integrations.deepspeed.optimizer import Conda

__all__ = ["Conda"]

register()
