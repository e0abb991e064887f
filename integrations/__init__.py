"""Adapters of Conda for FSDP2, DeepSpeed and torchtitan."""
