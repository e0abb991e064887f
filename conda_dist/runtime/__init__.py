"""Runs what ``plan`` has planned: collectives, tensors and the step."""
