"""A Hugging Face model from the config, initialised and sharded block by block.

The initial weights depend on the seed and the parameter's name only, so they are the same on any
number of ranks; and no rank ever holds more than one block (or the embeddings) unsharded, so the
same path serves a toy model and a 7B one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from itertools import chain
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from conda_dist.launch.cluster.process_group import World
from conda_dist.launch.job.config import ConfigError, ModelConfig, TrainingConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def build_model(
    config: ModelConfig, training: TrainingConfig, vocab_size: int, world: World
) -> PreTrainedModel:
    """A randomly initialised causal language model, sharded with FSDP2 over all ranks."""
    replicas = training.hsdp_replicas
    ranks = {"dp_replicate": replicas} if replicas > 1 else {}
    ranks["dp_shard"] = world.size // replicas
    mesh = init_device_mesh(world.device.type, (*ranks.values(),), mesh_dim_names=(*ranks,))
    dtype = compute_dtype(training, world.device)
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)

    def shard(module: nn.Module) -> None:
        if training.compile and not hasattr(module, "lm_head"):  # a block
            module.compile()
        fully_shard(module, mesh=mesh, mp_policy=policy)

    model = initialised_model(config, training, vocab_size, shard)
    # The loss is divided by the number of tokens of the global batch, so sums of the ranks'
    # gradients are what is wanted, also where ranks hold different numbers of rows.
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    return model


def initialised_model(
    config: ModelConfig,
    training: TrainingConfig,
    vocab_size: int,
    shard: Callable[[nn.Module], None],
) -> PreTrainedModel:
    """The model with its initial weights, on the CPU but for what `shard` has done to them.

    It is called with each block and at last with the whole model, as soon as its values are there.
    """
    model = empty_model(config, training, vocab_size)
    model.train()
    if training.activation_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    for name, block in _blocks(model):
        _initialise(model, block, f"{training.seed}/{name}")
        shard(block)
    _initialise(model, model, f"{training.seed}/")
    shard(model)
    return model


def empty_model(config: ModelConfig, training: TrainingConfig, vocab_size: int) -> PreTrainedModel:
    """The model without values: names, modules and shapes."""
    with torch.device("meta"):
        return _architecture(config, training.sequence_length, vocab_size)


def compute_dtype(training: TrainingConfig, device: torch.device) -> torch.dtype:
    """Type of the forward and backward passes; parameters and gradient sums stay in float32.

    `auto` takes bfloat16 on GPUs, and on CPUs with AMX. On a Xeon that has bfloat16 in AVX-512
    alone, a product in bfloat16 took twice the time of one in float32.
    """
    if training.compute_dtype != "auto":
        return {"bfloat16": torch.bfloat16, "float32": torch.float32}[training.compute_dtype]
    fast = device.type == "cuda" or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if fast else torch.float32


def parameter_count(model: nn.Module) -> int:
    """Number of parameters (elements) of the whole model, not of this rank's shard."""
    # ZeRO-3 leaves nothing in a parameter but its size.
    return sum(getattr(each, "ds_numel", each.numel()) for each in model.parameters())


def _architecture(config: ModelConfig, length: int, vocab_size: int) -> PreTrainedModel:
    # Importing transformers takes seconds, which a job that is refused need not wait for.
    import transformers
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    transformers.AttentionInterface.register(_CAUSAL, sdpa_attention_forward)
    common: dict[str, Any] = {
        "vocab_size": vocab_size,
        "initializer_range": config.initializer_range,
        "tie_word_embeddings": config.tie_word_embeddings,
        "use_cache": False,
        "bos_token_id": None,
        "eos_token_id": None,
        "attn_implementation": _CAUSAL,
    }
    if config.architecture == "llama":
        # The config's names are the library's.
        blocks = {"hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"}
        own = config.model_dump(include={*blocks, "num_key_value_heads", "rms_norm_eps"})
        rope = {"rope_type": "default", "rope_theta": config.rope_theta}
        llama = transformers.LlamaConfig(
            max_position_embeddings=length, rope_parameters=rope, **own, **common
        )
        return transformers.LlamaForCausalLM(llama)
    gpt2 = transformers.GPT2Config(
        n_embd=config.hidden_size,
        n_inner=config.intermediate_size,
        n_layer=config.num_hidden_layers,
        n_head=config.num_attention_heads,
        n_positions=length,
        resid_pdrop=config.dropout,
        embd_pdrop=config.dropout,
        attn_pdrop=config.dropout,
        **common,
    )
    return transformers.GPT2LMHeadModel(gpt2)


_CAUSAL = "causal_sdpa"
"""The library's "sdpa" without a mask, which is causal. For "sdpa" itself the library looks in
every forward pass whether rows hold several texts, and the host waits for the device."""


def _blocks(model: PreTrainedModel) -> list[tuple[str, nn.Module]]:
    """The transformer blocks with their names."""
    path = "model.layers" if model.config.model_type == "llama" else "transformer.h"
    blocks = model.get_submodule(path)
    return [(f"{path}.{name}", block) for name, block in blocks.named_children()]


def _initialise(model: PreTrainedModel, root: nn.Module, seed: str) -> None:
    """Gives every module below `root` that is still on the meta device its initial values.

    The library's own rule for each module class is used. The values are drawn on the CPU: the
    same ones on every rank and for every device.
    """
    library = cast(Any, model)
    pending = [
        module
        for module in root.modules()
        if any(tensor.is_meta for tensor in chain(module.parameters(), module.buffers()))
    ]
    for module in pending:
        module.to_empty(device="cpu", recurse=False)
    if root is model:
        library.tie_weights()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int.from_bytes(hashlib.sha256(seed.encode()).digest()[:8], "big") >> 1)
        # Children first: GPT-2's attention and MLP rescale a projection their child has drawn.
        for module in reversed(pending):
            library._init_weights(module)


def require_replicas(training: TrainingConfig, ranks: int) -> None:
    """Raises ConfigError unless `training.hsdp_replicas` divides the number of ranks."""
    if ranks % training.hsdp_replicas != 0:
        raise ConfigError(
            f"training.hsdp_replicas {training.hsdp_replicas} does not divide the {ranks} ranks of "
            "this job"
        )
