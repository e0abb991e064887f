"""torchtitan's debug configs with models small enough that ten steps take a second on one core.

    --module titan_configs --config llama3

Built by torchtitan's own builders from its own debug configs: same layers, same names, same
parallelization. Three layers make four stages of an interleaved schedule on two ranks, of which the
last has the head alone. Nothing is computed twice to save memory, and the loss is cut into two
chunks; the jobs of torchtitan's own debug configs do as those say.
"""

from dataclasses import replace
from typing import Any

from torchtitan.models import deepseek_v3 as _deepseek
from torchtitan.models import llama3 as _llama
from torchtitan.models import qwen3 as _qwen
from torchtitan.models.deepseek_v3.config_registry import deepseek_v3_debugmodel
from torchtitan.models.llama3.config_registry import llama3_debugmodel
from torchtitan.models.qwen3.config_registry import qwen3_moe_debug

WIDTH, HEADS, LAYERS, VOCABULARY = 64, 4, 3, 2048


def _shrink(config: Any, layers: list[Any]) -> Any:
    """The config with those layers and what stands around them in their width."""
    model = config.model_spec.model
    model = replace(
        model,
        dim=WIDTH,
        layers=layers,
        tok_embeddings=replace(model.tok_embeddings, embedding_dim=WIDTH),
        norm=replace(model.norm, normalized_shape=WIDTH),
        lm_head=replace(model.lm_head, in_features=WIDTH),
    )
    config.model_spec = replace(config.model_spec, model=model)
    config.activation_checkpoint = None
    config.loss = replace(config.loss, num_chunks=2)
    return config


def llama3() -> Any:
    config = llama3_debugmodel()
    rope = replace(config.model_spec.model.layers[0].attention.rope, dim=WIDTH // HEADS)
    layers = _llama._build_llama3_layers(
        n_layers=LAYERS,
        dim=WIDTH,
        n_heads=HEADS,
        hidden_dim=160,
        rope=rope,
        attn_backend="flex",
    )
    return _shrink(config, layers)


def qwen3_moe() -> Any:
    config = qwen3_moe_debug()
    rope = replace(config.model_spec.model.layers[0].attention.rope, dim=WIDTH // HEADS)
    layers = _qwen._build_qwen3_moe_layers(
        n_layers=2,
        dim=WIDTH,
        n_heads=HEADS,
        n_kv_heads=2,
        head_dim=WIDTH // HEADS,
        moe_hidden_dim=16,
        num_experts=4,
        top_k=2,
        attn_backend="flex",
        moe_comm_backend="standard",
        rope=rope,
    )
    return _shrink(config, layers)


def deepseek_v3() -> Any:
    config = deepseek_v3_debugmodel()
    rope = replace(config.model_spec.model.layers[0].attention.rope, dim=16)
    layers = _deepseek._build_dsv3_layers(
        n_layers=2,
        n_dense_layers=1,
        dim=WIDTH,
        n_heads=HEADS,
        q_lora_rank=0,
        kv_lora_rank=32,
        qk_nope_head_dim=16,
        qk_rope_head_dim=16,
        v_head_dim=16,
        mscale=0.7,
        dense_hidden_dim=160,
        moe_hidden_dim=16,
        num_experts=4,
        num_shared_experts=1,
        router_top_k=2,
        router_score_func="softmax",
        attn_backend="flex",
        moe_comm_backend="standard",
        non_blocking_capacity_factor=None,
        rope=rope,
    )
    return _shrink(config, layers)
