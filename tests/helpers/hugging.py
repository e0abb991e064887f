"""Hugging Face's Trainer and Accelerate on the processes of ``ranks``: model and data."""

import contextlib
import os
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

import zero

VOCABULARY, LENGTH, BATCH = 31, 8, 8
GAP, RATE = 3, 1e-2


def settle() -> None:
    """Makes DeepSpeed and Accelerate forget earlier calls, and lets them find the ranks."""
    zero.settle()
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    for name in [n for n in os.environ if n.startswith(("ACCELERATE_", "FSDP_"))]:
        del os.environ[name]
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="1", ACCELERATE_TORCH_DEVICE="cpu")


def fsdp_on_cpus(wanted: bool) -> contextlib.AbstractContextManager[Any]:
    """Accelerate offers FSDP on accelerators alone; this makes it do the same on CPUs."""
    from accelerate import PartialState
    from accelerate.utils import DistributedType

    make = PartialState.__init__

    def pretend(state: Any, cpu: bool = True, **more: Any) -> None:
        make(state, cpu=True, **more)
        if state.distributed_type == DistributedType.MULTI_CPU:
            state.distributed_type = DistributedType.MULTI_GPU

    return patch.object(PartialState, "__init__", pretend if wanted else make)


def language_model() -> Any:
    """A tiny LLaMA, the same on all ranks."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=LENGTH,
            use_cache=False,
            bos_token_id=None,
            eos_token_id=None,
        )
    )


def texts(count: int = 64) -> list[dict[str, Tensor]]:
    """Sequences in which each token follows from the one before."""
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(VOCABULARY, (1,), generator=generator) for _ in range(count)]
    steps = torch.arange(LENGTH)
    return [
        {"input_ids": ids, "labels": ids}
        for row in rows
        for ids in [(row + 3 * steps) % VOCABULARY]
    ]
