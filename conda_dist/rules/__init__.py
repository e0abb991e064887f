"""What an optimizer of matrices is to the engine: its states, its needs, its arithmetic.

The engine moves shards, deals compute groups, stores and saves state by what a :class:`Rule` says
of itself, and knows none of them. A rule computes with the tensors that it is given, and knows no
mesh, rank or collective.
"""

from conda_dist.rules.rule import RefreshedRule, Rule, StateSpec, WeightSlice

__all__ = ["RefreshedRule", "Rule", "StateSpec", "WeightSlice"]
