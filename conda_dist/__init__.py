"""Conda (Column-Normalized Adam, arXiv 2509.24218) for sharded training.

Layers, each importing only those before it: ``maths``, ``layout``, ``compute_layout`` (pure),
``transfer``, ``plan`` (who sends and computes what), ``exchange`` (collectives), ``storage``,
``runtime`` (the step), ``optimizer``. ``reference`` is the oracle.
"""

from conda_dist.optimizer import Conda
from conda_dist.routing import param_groups

__all__ = ["Conda", "param_groups"]
