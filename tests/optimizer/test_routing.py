"""Which parameters of real models go where, and what a user can say about it."""

import re
from functools import lru_cache
from typing import Any

import pytest
import torch
from torch import nn

import toys
from conda_dist import Conda, param_groups
from conda_dist.layer_kinds import KERNEL
from conda_dist.routing import clean_name, route

# Models of transformers, built on the meta device: names and shapes are all that is needed.

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 100,
}
SPECIAL = {"bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 0}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 100, **SPECIAL}
MOE = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
DEEPSEEK = {
    "n_routed_experts": 4,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "vocab_size": 100}
VIT = {"image_size": 32, "patch_size": 8}

LLAMA = r"layers\.\d\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)\.weight$"
EXPERTS = r"layers\.\d\.mlp\.experts\.(gate_up|down)_proj$"
SHARED = r"layers\.\d\.mlp\.shared_experts?\.(gate|up|down)_proj\.weight$"
BERT = r"layer\.\d\.(attention\.self\.(query|key|value)|.*\.dense)\.weight$"
MLA = r"self_attn\.(q_a_proj|q_b_proj|kv_a_proj_with_mqa|kv_b_proj)\.weight$"

MODELS: dict[str, tuple[str, str, dict[str, Any], str]] = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", SIZES, LLAMA),
    "llama_tied": ("LlamaForCausalLM", "LlamaConfig", SIZES | {"tie_word_embeddings": True}, LLAMA),
    "gpt2": (
        "GPT2LMHeadModel",
        "GPT2Config",
        GPT2,
        r"h\.\d\.(attn\.(c_attn|c_proj)|mlp\.(c_fc|c_proj))\.weight$",
    ),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", SIZES, LLAMA),
    "qwen2_moe": (
        "Qwen2MoeForCausalLM",
        "Qwen2MoeConfig",
        SIZES | MOE | {"num_experts": 4, "shared_expert_intermediate_size": 16},
        f"{LLAMA}|{EXPERTS}|{SHARED}",
    ),
    "qwen3_moe": (
        "Qwen3MoeForCausalLM",
        "Qwen3MoeConfig",
        SIZES | MOE | {"num_experts": 4},
        f"{LLAMA}|{EXPERTS}",
    ),
    "mixtral": (
        "MixtralForCausalLM",
        "MixtralConfig",
        SIZES | {"num_local_experts": 4},
        f"{LLAMA}|{EXPERTS}",
    ),
    "deepseek_v3": (
        "DeepseekV3ForCausalLM",
        "DeepseekV3Config",
        SIZES | MOE | DEEPSEEK,
        f"{LLAMA}|{EXPERTS}|{SHARED}|{MLA}",
    ),
    "gpt_oss": (
        "GptOssForCausalLM",
        "GptOssConfig",
        SIZES | {"num_local_experts": 4, "num_key_value_heads": 2, "head_dim": 8},
        f"{LLAMA}|{EXPERTS}",
    ),
    "bert": ("BertModel", "BertConfig", SIZES, BERT),
    "t5": (
        "T5ForConditionalGeneration",
        "T5Config",
        T5,
        r"block\.\d\.layer\.\d\.(\w+Attention\.[qkvo]|DenseReluDense\.w[io])\.weight$",
    ),
    "vit": (
        "ViTForImageClassification",
        "ViTConfig",
        SIZES | VIT,
        r"layers\.\d\.(attention\.[qkvo]_proj|mlp\.fc[12])\.weight$",
    ),
    "roberta_classifier": ("RobertaForSequenceClassification", "RobertaConfig", SIZES, BERT),
}
UNDECIDED = r"^pooler\.dense\.weight$"
"""Matrices outside the blocks that are neither embedding nor head."""


@lru_cache
def _model(name: str) -> nn.Module:
    import transformers

    model, config, sizes, _ = MODELS[name]
    sizes = {key: size for key, size in sizes.items() if name != "vit" or key != "vocab_size"}
    with torch.device("meta"):
        built = getattr(transformers, model)(getattr(transformers, config)(**sizes))
    if name == "llama_tied":
        built.tie_weights()
    assert isinstance(built, nn.Module)
    return built


def _projections(name: str) -> set[str]:
    """Names of the block projections, which the pattern of the model knows."""
    names = [n for n, _ in _model(name).named_parameters()]
    found = {n for n in names if re.search(MODELS[name][3], n)}
    assert found, "the pattern is out of date"
    return found


def _on_conda(chosen: dict[str, str]) -> set[str]:
    return {n for n, a in chosen.items() if a == "conda" and not re.search(UNDECIDED, n)}


@pytest.mark.parametrize("name", MODELS)
def test_block_projections_of_real_models(name: str) -> None:
    """All of them, and nothing else: no embedding, head, router, norm, bias or kernel."""
    chosen = toys.chosen(param_groups(_model(name)))
    assert chosen.keys() == {n for n, _ in _model(name).named_parameters()}
    assert _on_conda(chosen) == _projections(name)


@pytest.mark.parametrize("name", MODELS)
def test_names_alone_tell_the_same(name: str) -> None:
    """Given ``named_parameters()`` the constructor cannot see types, and must not need to."""
    model = _model(name)
    by_name = {n: route(n, p).algorithm for n, p in model.named_parameters()}
    assert _on_conda(by_name) == _projections(name)
    assert by_name == toys.chosen(param_groups(model))
    chosen = toys.paths(Conda(model.named_parameters()))
    trainable = [n for n, p in model.named_parameters() if p.requires_grad]
    assert chosen == {n: by_name[n] for n in trainable}


def test_tied_embeddings_are_routed_as_embeddings() -> None:
    chosen = toys.chosen(param_groups(_model("llama_tied")))
    assert chosen["model.embed_tokens.weight"] == "adamw"
    assert "lm_head.weight" not in chosen


# Names

DECIDED: dict[str, list[tuple[str, tuple[int, ...]]]] = {
    "conda": [
        # torchtitan
        ("layers.0.attention.wq.weight", (8, 8)),
        ("layers.0.attention.wo.weight", (8, 8)),
        ("layers.0.attention.wkv_a.weight", (6, 8)),
        ("layers.0.feed_forward.w1.weight", (16, 8)),
        ("layers.0.feed_forward.w2.weight", (8, 16)),
        ("layers.0.moe.experts.w1", (4, 16, 8)),
        ("layers.0.moe.experts.w2", (4, 8, 16)),
        ("layers.0.moe.shared_experts.w1.weight", (16, 8)),
        ("layers.0.mlp.gate_proj.weight", (16, 8)),
        # names of heads and routers inside blocks, where they are none
        ("encoder.layer.0.output.dense.weight", (8, 16)),
        ("layers.3.attention.output.weight", (8, 8)),
        ("blocks.11.attn.head.weight", (8, 8)),
        ("h.0.attn.c_attn.weight", (8, 24)),
        ("transformer.layers.0.self_attn.in_proj_weight", (24, 8)),
        ("up.weight", (16, 8)),
        ("weight", (16, 8)),
        ("base_model.model.layers.0.self_attn.q_proj.lora_A.default.weight", (4, 8)),
        ("base_model.model.layers.0.self_attn.q_proj.lora_B.default.weight", (8, 4)),
    ],
    "adamw": [
        ("tok_embeddings.weight", (100, 8)),
        ("output.weight", (100, 8)),
        ("layers.0.moe.router.gate.weight", (4, 8)),
        ("layers.0.mlp.gate.weight", (4, 8)),
        ("layers.0.mlp.router.weight", (4, 8)),
        ("layers.0.mlp.shared_expert_gate.weight", (1, 8)),
        ("model.embed_tokens.weight", (100, 8)),
        ("transformer.wte.weight", (100, 8)),
        ("transformer.wpe.weight", (100, 8)),
        ("gpt_neox.embed_in.weight", (100, 8)),
        ("embed_out.weight", (100, 8)),
        ("transformer.word_embeddings.weight", (100, 8)),
        ("embeddings.patch_embeddings.projection.weight", (8, 3, 4, 4)),
        ("pos_embed", (1, 17, 8)),
        ("cls_token", (1, 1, 8)),
        ("lm_head.weight", (100, 8)),
        ("score.weight", (2, 8)),
        ("layers.0.attention_norm.weight", (8,)),
        ("layers.0.attention.wq.bias", (8,)),
        ("layers.0.conv.weight", (8, 1, 4)),
        ("logit_scale", ()),
        # a head of several layers
        ("classifier.dense.weight", (8, 8)),
        ("classifier.out_proj.weight", (2, 8)),
        ("head.0.weight", (8, 8)),
        # an embedding that is a parameter of a module called otherwise
        ("encoder.pos_embedding", (1, 17, 8)),
        ("vision_model.position_embedding", (17, 8)),
        ("shared.weight", (100, 8)),
        # biases of several experts, and of pairs of positions
        ("layers.0.mlp.experts.down_proj_bias", (4, 8)),
        ("block.0.layer.0.SelfAttention.relative_attention_bias.weight", (32, 4)),
    ],
}
KINDS: list[tuple[str, tuple[int, ...], str, str]] = [
    # embeddings by other names
    ("tok_emb.weight", (100, 8), "adamw", "embedding"),
    ("transformer.pos_emb", (1, 16, 8), "adamw", "embedding"),
    ("token_emb.emb.weight", (100, 8), "adamw", "embedding"),
    ("tokEmb.weight", (100, 8), "adamw", "embedding"),
    ("embeddings.word.weight", (100, 8), "adamw", "embedding"),
    ("embed_tokens.0.weight", (100, 8), "adamw", "embedding"),
    ("embed_tokens.modules_to_save.default.weight", (100, 8), "adamw", "embedding"),
    ("patch_embed.proj.0.weight", (8, 12), "adamw", "embedding"),
    ("quantizer.codebook.weight", (100, 8), "adamw", "embedding"),
    ("t_embedder.mlp.2.weight", (8, 8), "adamw", "embedding"),
    ("embedder.layers.0.mlp.up.weight", (16, 8), "conda", "a matrix"),
    ("members.0.up.weight", (16, 8), "conda", "a matrix"),
    # routers of several modules
    ("layers.0.mlp.router.classifier.weight", (8, 16), "adamw", "router"),
    ("layers.0.mlp.experts.router.layer.weight", (8, 16), "adamw", "router"),
    ("layers.0.mlp.gate.router_mlp.fc1.weight", (16, 16), "adamw", "router"),
    ("layers.0.altup.modality_router.weight", (4, 16), "adamw", "router"),
    ("layers.0.moe.deepspeed_moe.gate.wg.weight", (8, 16), "adamw", "router"),
    ("layers.0.moe.router.experts.w1", (4, 16, 8), "conda", "a batch of matrices"),
    # state spaces whose matrices have names of one letter
    ("layers.0.kernel.C", (16, 8, 2), "adamw", "state-space parameter"),
    ("layers.0.ssm.B", (8, 16), "adamw", "state-space parameter"),
    ("layers.0.mixer.in_proj.lora.A", (8, 16), "conda", "a matrix"),
    # heads by other names
    ("cls.predictions.decoder.weight", (100, 8), "adamw", "output head"),
    ("cls.seq_relationship.weight", (2, 8), "adamw", "output head"),
    ("generator_lm_head.weight", (100, 8), "adamw", "output head"),
    ("proj_out.weight", (100, 8), "adamw", "output head"),
    ("lm_loss.weight", (100, 8), "adamw", "output head"),
    ("to_logits.weight", (100, 8), "adamw", "output head"),
    ("0.lm_head.weight", (100, 8), "adamw", "output head"),
    ("classification_head.out_proj.weight", (2, 8), "adamw", "output head"),
    ("qa_outputs.weight", (2, 8), "adamw", "output head"),
    ("mlp_head.1.weight", (10, 8), "adamw", "output head"),
    ("decoder.weight", (100, 8), "adamw", "output head"),
    ("vocab_projector.weight", (100, 8), "adamw", "output head"),
    ("final_layer.linear.weight", (12, 8), "adamw", "output head"),
    ("pooler.dense.weight", (8, 8), "adamw", "output head"),
    ("classifier.encoder.layer.0.attention.q.weight", (8, 8), "conda", "a matrix"),
    ("decoder.layers.0.fc1.weight", (16, 8), "conda", "a matrix"),
    ("mid_block.attentions.0.proj_out.weight", (8, 8), "conda", "a matrix"),
    ("multi_head_attention.q.weight", (8, 8), "conda", "a matrix"),
    # routers, and the gates of gated MLPs
    ("layers.0.mlp.gate.weight", (16, 8), "conda", "a matrix"),
    ("layers.0.mlp.experts.3.gate.weight", (4, 8), "conda", "a matrix"),
    ("layers.0.mlp.shared_experts.gate.weight", (4, 8), "conda", "a matrix"),
    ("layers.0.mlp.gate.weight", (4, 8), "adamw", "router"),
    # convolutions
    ("encoder.conv1.weight", (8, 4, 3), "adamw", KERNEL),
    ("layers.0.mixer.conv1d.weight", (16, 2, 4), "adamw", KERNEL),
    ("layers.0.mixer.conv1d.weight", (16, 1, 4), "adamw", KERNEL),
    ("upsampler.0.weight", (8, 4, 3), "adamw", KERNEL),
    (
        "pos_conv.parametrizations.weight.original1",
        (8, 4, 3),
        "adamw",
        KERNEL,
    ),
    ("layers.0.conv.weight_v", (8, 4, 3), "adamw", KERNEL),
    (
        "down_blocks.0.resnets.0.conv1.weight",
        (8, 4, 3, 3),
        "adamw",
        KERNEL,
    ),
    ("layers.0.experts.input_linear.weight", (4, 16, 8), "conda", "a batch of matrices"),
    ("layers.0.moe.w1", (4, 16, 8), "conda", "a batch of matrices"),
    ("layers.0.mlp.experts.w1", (1, 16, 8), "conda", "a batch of matrices"),
    # state-space models
    ("layers.0.mixer.A_log", (16, 4), "adamw", "state-space parameter"),
    ("layers.0.mixer.D", (2, 16), "adamw", "state-space parameter"),
    ("blocks.0.att.time_decay", (4, 8), "adamw", "state-space parameter"),
    ("layers.0.mixer.in_proj.weight", (64, 8), "conda", "a matrix"),
    ("layers.0.mixer.x_proj.weight", (6, 16), "conda", "a matrix"),
    ("layers.0.mixer.dt_proj.weight", (16, 2), "conda", "a matrix"),
    # learned tokens, positions and tables; norms and scales of two dimensions
    ("query_tokens", (1, 6, 8), "adamw", "learned tokens or positions"),
    ("resampler.latents", (6, 8), "adamw", "learned tokens or positions"),
    ("layers.0.attn.relative_position_bias_table", (49, 4), "adamw", "bias"),
    ("layers.0.attn.rel_pos_h", (7, 8), "adamw", "learned tokens or positions"),
    ("mask_decoder.mask_tokens.weight", (4, 8), "adamw", "learned tokens or positions"),
    ("layers.0.attention.query.weight", (8, 8), "conda", "a matrix"),
    ("layers.0.q_norm.weight", (4, 8), "adamw", "norm or scale"),
    ("layers.0.norm1.linear.weight", (48, 8), "conda", "a matrix"),
    ("transformer_blocks.0.scale_shift_table", (6, 8), "adamw", "learned tokens or positions"),
    ("blocks.0.adaLN_modulation.1.weight", (48, 8), "conda", "a matrix"),
    (
        "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.weight",
        (8, 8),
        "conda",
        "a matrix",
    ),
]
"""What each kind of weight gets, and the reason, by name and shape alone."""
WRAPPED = [
    "module.{}",
    "_orig_mod.{}",
    "module._orig_mod.{}",
    "_fsdp_wrapped_module._checkpoint_wrapped_module.{}",
]


@pytest.mark.parametrize(
    ("algorithm", "name", "shape"),
    [(a, n, s) for a, decided in DECIDED.items() for n, s in decided],
)
def test_names(algorithm: str, name: str, shape: tuple[int, ...]) -> None:
    param = torch.empty(shape, device="meta")
    found = route(name, param)
    assert found.algorithm == algorithm, found.reason
    assert found.reason
    for pattern in WRAPPED:
        assert route(pattern.format(name), param) == found
        assert clean_name(pattern.format(name)) == name


@pytest.mark.parametrize(("name", "shape", "algorithm", "reason"), KINDS)
def test_kinds(name: str, shape: tuple[int, ...], algorithm: str, reason: str) -> None:
    param = torch.empty(shape, device="meta")
    for pattern in ("{}", *WRAPPED):
        found = route(pattern.format(name), param)
        assert (found.algorithm, found.reason) == (algorithm, reason)


def test_wrappers_between_modules() -> None:
    name = "model.layers.0._checkpoint_wrapped_module.mlp._orig_mod.up_proj.weight"
    assert clean_name(name) == "model.layers.0.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("shape", "algorithm"),
    [
        ((), "adamw"),
        ((5,), "adamw"),
        ((5, 3), "conda"),
        ((2, 2), "conda"),
        ((1, 5), "adamw"),
        ((5, 1), "adamw"),
        ((0, 5), "adamw"),
        ((4, 5, 3), "conda"),
        ((4, 5, 1), "adamw"),
        ((0, 5, 3), "adamw"),
        ((8, 3, 4, 4), "adamw"),
    ],
)
def test_shapes_decide_without_names(shape: tuple[int, ...], algorithm: str) -> None:
    assert route(None, torch.empty(shape)).algorithm == algorithm
    params = [nn.Parameter(torch.empty(shape)), nn.Parameter(torch.empty(3, 3))]
    optimizer = Conda(params)
    assert toys.paths(optimizer)["param_groups[0]['params'][0]"] == algorithm
