"""Families of transformers' models, tiny: ``param_groups``, names alone and types of modules agree.

Models are built on the meta device, each once: names, shapes and types are all that is needed.
"""

import warnings
from functools import lru_cache
from typing import Any

import pytest
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

import toys
from conda_dist import Conda, param_groups
from conda_dist.layer_kinds import ambiguous_names, block_of
from conda_dist.routing import route

TINY: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "embedding_size"), 32),
    **dict.fromkeys(("intermediate_size", "d_ff", "encoder_ffn_dim", "decoder_ffn_dim"), 64),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "num_layers", "encoder_layers"), 2),
    **dict.fromkeys(("decoder_layers", "n_layers", "num_key_value_heads"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "num_heads", "n_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("num_local_experts", "num_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("head_dim", "d_kv", "patch_size"), 8),
    **{"vocab_size": 100, "max_position_embeddings": 64, "image_size": 32, "num_labels": 3},
    **{"num_experts_per_tok": 2, "moe_intermediate_size": 16, "state_size": 4, "ffn_dim": 64},
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1, "hidden_dim": 64},
    "shared_expert_intermediate_size": 16,
}

DECODERS = """Llama Mistral Qwen2 Qwen3 Qwen2Moe Qwen3Moe Mixtral DeepseekV3 GptOss Gemma Gemma2 Phi
Phi3 GPTNeoX GPTNeo GPTJ CodeGen OPT Bloom Falcon Mpt StableLm Starcoder2 Olmo Olmo2 Cohere
Cohere2 GraniteMoe JetMoe Jamba Mamba FalconMamba RecurrentGemma Rwkv BioGpt XGLM"""
FAMILIES = {
    **{name: f"{name}ForCausalLM" for name in DECODERS.split()},
    **{name: f"{name}LMHeadModel" for name in ("GPT2", "CTRL")},
    **{
        name: f"{name}ForConditionalGeneration"
        for name in ("T5", "Bart", "Pegasus", "MBart", "Whisper", "Speech2Text")
    },
    **{
        name: f"{name}ForMaskedLM"
        for name in ("Bert", "Roberta", "Albert", "Electra", "DistilBert", "DebertaV2", "MPNet")
    },
    "XLMRoberta": "XLMRobertaForSequenceClassification",
    "BertPreTraining": "BertForPreTraining",
    "BertAnswers": "BertForQuestionAnswering",
    **{name: f"{name}ForCTC" for name in ("Wav2Vec2", "Hubert", "WavLM", "Wav2Vec2Conformer")},
    **{
        name: f"{name}ForImageClassification"
        for name in ("ViT", "DeiT", "Beit", "Swin", "ConvNext", "PvtV2")
    },
    **{
        "CLIP": "CLIPModel",
        "Siglip": "SiglipModel",
        "Vits": "VitsModel",
        "Encodec": "EncodecModel",
    },
    **{"SegFormer": "SegformerForSemanticSegmentation", "Sam": "SamModel", "Mamba2": "Mamba2Model"},
    **{"SpeechT5": "SpeechT5ForTextToSpeech", "Blip2": "Blip2ForConditionalGeneration"},
}
CONVOLUTIONS = {name: f"{name}ForImageClassification" for name in ("ResNet", "MobileNetV2")}
"""Of which only kernels are left to project."""


@lru_cache
def _model(family: str) -> nn.Module:
    import torch
    import transformers

    kind: Any = getattr(transformers, (FAMILIES | CONVOLUTIONS)[family])
    config = kind.config_class
    inside = vars(config())
    alike = (type(None), int)  # some families have a list, one for each stage
    sizes = {k: size for k, size in TINY.items() if k in inside and type(inside[k]) in alike}
    try:
        made = config(**sizes)
    except Exception:  # sizes that depend on each other
        made = config()
    with torch.device("meta"):
        built = kind(made)
    assert isinstance(built, nn.Module)
    return built


def _owners(model: nn.Module) -> dict[str, nn.Module]:
    return {
        f"{prefix}.{name}".lstrip("."): module
        for prefix, module in model.named_modules()
        for name, _ in module.named_parameters(recurse=False)
    }


def _heads(model: nn.Module) -> set[int]:
    found: Any = getattr(model, "get_output_embeddings", lambda: None)()
    return {id(p) for p in found.parameters()} if isinstance(found, nn.Module) else set()


def _by_type(name: str, param: Tensor, owner: nn.Module, heads: set[int]) -> str | None:
    """What the type of a weight's module says by itself; None where it does not say."""
    if isinstance(owner, nn.Embedding | _ConvNd | nn.LayerNorm | nn.GroupNorm):
        return "adamw"
    if param.ndim < 2 or min(param.shape) < 2 or id(param) in heads:
        return "adamw"
    if not isinstance(owner, nn.Linear) and type(owner).__name__ != "Conv1D":
        return None
    special = "embed" in name or "router" in name or name.endswith(".gate.weight")
    return "conda" if block_of(name) and not special else None


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family(family: str) -> None:
    model = _model(family)
    by_module = toys.chosen(param_groups(model))
    by_name = {name: route(name, param) for name, param in model.named_parameters()}
    owners, heads = _owners(model), _heads(model)
    for name, param in model.named_parameters():
        expected = _by_type(name, param, owners[name], heads)
        assert by_module[name] == (expected or by_module[name]), (name, by_name[name])
    shapes = {name: tuple(param.shape) for name, param in model.named_parameters()}
    doubts = ambiguous_names(
        shapes, {name for name in by_name if by_name[name].algorithm == "conda"}
    )
    differ = {name for name in by_module if by_module[name] != by_name[name].algorithm}
    assert differ <= set(doubts), differ
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        Conda(model.named_parameters())
    assert len(caught) == bool(doubts)
    assert all("param_groups" in str(warning.message) for warning in caught)


@pytest.mark.parametrize("family", CONVOLUTIONS)
def test_a_family_of_convolutions(family: str) -> None:
    """There is nothing to project but kernels, and the error says how."""
    model = _model(family)
    with pytest.raises(ValueError, match="kernels=True"):
        param_groups(model)
    owners = _owners(model)
    chosen = toys.chosen(param_groups(model, kernels=True))
    depthwise = set()
    for name, param in model.named_parameters():
        owner = owners[name]
        if isinstance(owner, _ConvNd) and "embed" not in name:
            assert chosen[name] == ("adamw" if owner.groups > 1 else "conda"), name
            depthwise |= {name} if owner.groups == param.shape[0] else set()
        elif "classifier" not in name:
            assert chosen[name] == "adamw"
    assert bool(depthwise) == (family == "MobileNetV2")


def test_there_are_enough() -> None:
    assert len(FAMILIES) + len(CONVOLUTIONS) > 60
