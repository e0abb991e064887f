"""Arithmetic on tensors, without torch.distributed."""
