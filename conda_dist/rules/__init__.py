"""Rules: the arithmetic of optimizers of matrices, and what the engine must know about it.

The engine (``plan`` and ``runtime``) moves shards, assigns compute groups and saves state from what
a :class:`Rule` declares; it has no code for a particular rule. A rule computes with the tensors
that it is given; it has no code for meshes, ranks or collectives.
"""

from conda_dist.rules.rule import RefreshedRule, Rule, StateSpec, WeightSlice

__all__ = ["RefreshedRule", "Rule", "StateSpec", "WeightSlice"]
