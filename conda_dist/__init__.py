"""Conda (Column-Normalized Adam, arXiv 2509.24218) for sharded training.

Layers, each importing only those before it: ``maths``, ``layout``, ``compute_layout`` (pure),
``transfer``, ``plan`` (who sends and computes what), ``exchange`` (collectives), ``storage``,
``rules`` (the arithmetic), ``runtime`` (the step), ``matrix_optimizer``, ``optimizer`` and
``muon``. ``reference`` is the oracle.
"""

from conda_dist.muon import Muon
from conda_dist.optimizer import Conda
from conda_dist.routing import param_groups

__all__ = ["Conda", "Muon", "param_groups"]
