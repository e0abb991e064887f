"""Arithmetic: functions of plain tensors, without torch.distributed."""
