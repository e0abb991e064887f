"""Carries a schedule out: collectives, tensors and the step."""
