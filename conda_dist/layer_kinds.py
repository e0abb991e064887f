"""What kind of weight a parameter is, by its name and shape and by the modules of its model.

Conda projects the matrices inside a model's blocks. This file recognizes everything else:
:func:`kind_by_name` by the words of a name, such as "emb" in ``tok_emb.weight``, and
:func:`kinds_by_module` by the types of the modules.
"""

import math
import re
from collections import defaultdict
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from torch import Tensor, nn

WRAPPERS = frozenset({"module", "_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"})
"""Components that torch's wrappers (DDP, compile, checkpointing, FSDP) add to parameter names."""

# Kinds, as reports and errors name them.
BIAS, EMBEDDING, HEAD, ROUTER = "bias", "embedding", "output head", "router"
NORM, STATE_SPACE = "norm or scale", "state-space parameter"
TOKENS = "learned tokens or positions"
LAST_LINEAR = "the last matrix outside the blocks"
KERNEL = "a convolution kernel, not a matrix"
MATRIX, BATCH = "a matrix", "a batch of matrices"

# Words and names of parameters and modules, by what they say about a weight.
EMBEDDING_WORDS = frozenset({"emb", "embs", "wte", "wpe", "codebook", "codebooks"})
TOKEN_WORDS = frozenset({"token", "tokens", "latent", "latents", "codevectors", "prototypes"})
LEARNED_WORDS = TOKEN_WORDS | {
    *("query", "queries", "table", "prompt", "prompts", "memory"),
    *("pos", "position", "positions", "positional", "ape"),
}
"""Words in the name of a parameter itself that mean that it is learned directly, not a weight of a
linear module. In ``attention.query.weight``, "query" is the name of a linear module."""
SCALE_WORDS = frozenset({"scale", "scales", "gamma", "shift", "gain", "temperature"})
NORM_WORDS = frozenset({"norm", "norms", "layernorm", "rmsnorm", "groupnorm", "batchnorm", "ln"})
STATE_SPACE_NAMES = frozenset(
    {
        *("A_log", "A_logs", "log_A", "A_real", "A_imag", "log_A_real", "log_A_imag"),
        *("D", "Ds", "dt", "dt_bias", "log_dt", "inv_dt"),
        *("time_decay", "time_first", "time_faaaa"),
    }
)
SYSTEM_NAMES = frozenset({"A", "B", "C", "P"})
STATE_SPACE_WORDS = frozenset({"ssm", "s4", "s4d", "s5", "s6", "kernel", "mamba", "mixer"})
HEAD_WORDS = frozenset(
    {
        *("head", "heads", "classifier", "classifiers", "classification", "score", "logits"),
        *("output", "outputs", "prediction", "predictions", "vocab", "pooler", "cls"),
    }
)
HEAD_NAMES = frozenset({"proj_out", "lm_loss", "final_layer", "unembed", "seq_relationship"})
HEADS_ANYWHERE = frozenset({"lm_head", "lm_heads", "embed_out", "to_logits", "lm_loss"})
ROUTERS = frozenset({"router", "gate", "gate_network", "shared_expert_gate"})
CONVOLUTION_WORDS = frozenset({"conv", "convs", "kernel"})
PROJECTION_WORDS = frozenset({"proj", "projection", "weight", "linear", "mlp"})
WEIGHTS = frozenset({"weight", "kernel", "original0", "original1", "weight_v", "weight_g"})
"""Names of a module's weight, including the two factors of weight normalization."""


@lru_cache(maxsize=65536)
def _words(part: str) -> tuple[str, ...]:
    """The words of a name's component: ("tok", "emb") of "tok_emb", "tokEmb" and "TokEmb"."""
    found = re.findall(r"[A-Z]+(?=[A-Z][a-z])|[A-Z]?[a-z]+|[A-Z]+|\d+", part)
    return tuple(word.lower() for word in found)


def clean_name(name: str) -> str:
    """A parameter's name without the components that torch's wrappers add."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def _says_embedding(part: str) -> bool:
    return "embed" in part.lower() or not EMBEDDING_WORDS.isdisjoint(_words(part))


def block_of(name: str) -> str:
    """The name of the innermost repeated block that contains a parameter; "" outside of blocks.

    A block has an index and at least two more components after it: ``layers.0.mlp.up.weight`` is
    in the block "layers.0". A layer of a ``Sequential``, as in ``head.2.weight``, is no block.
    """
    parts = name.split(".")
    for i in reversed(range(len(parts) - 2)):
        if parts[i].isdigit() and not (i and _says_embedding(parts[i - 1])):
            return ".".join(parts[: i + 1])
    return ""


def kind_by_name(name: str, shape: Sequence[int]) -> str | None:
    """The kind of a weight if its name says that it should not be projected, else None.

    Args:
        name: from :func:`clean_name`.
        shape: two or more dimensions.
    """
    block = block_of(name)
    *path, leaf = name.removeprefix(f"{block}.").split(".")
    owner = path[-1] if path else leaf  # the module that has the parameter
    label = owner if leaf in WEIGHTS else leaf  # "weight" says nothing, so take the module's name
    experts = any("expert" in part.lower() or part == "moe" for part in name.split("."))
    if "bias" in leaf or ("bias" in owner and leaf in WEIGHTS):
        return BIAS
    if any(map(_says_embedding, (*path, leaf))) or (owner == "shared" and leaf == "weight"):
        return EMBEDDING
    if leaf in STATE_SPACE_NAMES or (leaf in SYSTEM_NAMES and _is_of_state_space(path)):
        return STATE_SPACE
    if _is_learned_token(label, leaf in WEIGHTS):
        return TOKENS
    may_scale = leaf not in WEIGHTS or "norm" in path[-2:-1]
    if not NORM_WORDS.isdisjoint(_words(label)) or (
        may_scale and not SCALE_WORDS.isdisjoint(_words(label))
    ):
        return NORM
    if any(map(_says_head, path or [leaf])) if not block else owner in HEADS_ANYWHERE:
        return HEAD
    if not block and owner == "decoder":  # a Linear named "decoder", not a module inside a decoder
        return HEAD
    if _is_in_router(path or [leaf]):
        return ROUTER
    if owner in ROUTERS and not _is_gate_of_mlp(owner, path, block, shape):
        return ROUTER
    if len(shape) == 3 and not experts:
        words = {*_words(owner), *_words(leaf)}
        if words & CONVOLUTION_WORDS or (leaf in WEIGHTS and "linear" not in words):
            return KERNEL
        if shape[0] == 1:
            return TOKENS
    return None


def _is_learned_token(label: str, of_module: bool) -> bool:
    """Whether a name means learned tokens, positions or a table.

    Args:
        label: the name of the parameter, or of its module.
        of_module: whether it is the name of the module.
    """
    words = _words(label)
    if of_module:
        return words[-1] in TOKEN_WORDS if words else False
    return not LEARNED_WORDS.isdisjoint(words) and PROJECTION_WORDS.isdisjoint(words)


def _says_head(part: str) -> bool:
    words = set(_words(part))
    if words & {"attention", "attn", "multi", "multihead"}:
        return False
    return part in HEAD_NAMES or part in HEADS_ANYWHERE or bool(words & HEAD_WORDS)


def _is_of_state_space(path: Sequence[str]) -> bool:
    """Whether a path leads into a state-space layer, where "A", "B", "C" and "P" are parameters."""
    words = {word for part in path for word in part.lower().split("_")}
    return bool(words & STATE_SPACE_WORDS) and "lora" not in words


def _is_in_router(path: Sequence[str]) -> bool:
    """Whether a path leads into a router, as in ``mlp.router.classifier``, but not to an expert.

    DeepSpeed and Tutel name the linear module of a router ``wg``.
    """
    inner = list(path)
    while inner and "router" not in _words(inner[0]):
        inner.pop(0)
    if inner:
        return not any("expert" in part.lower() for part in inner)
    return path[-1] == "wg" and any(part in ("gate", "gates") for part in path[:-1])


def _is_gate_of_mlp(owner: str, path: Sequence[str], block: str, shape: Sequence[int]) -> bool:
    """Whether a "gate" belongs to a gated MLP: it is tall or square, or inside an expert."""
    above = [*block.split("."), *path[:-1]]
    return owner == "gate" and (
        shape[-2] >= shape[-1] or any("expert" in part.lower() for part in above[-2:])
    )


@dataclass(frozen=True, slots=True)
class Kind:
    """What the modules of a model say about a parameter.

    Attributes:
        reason: the kind of weight, if it should not be projected; else None.
        excluded: kinds that its name may suggest but that its module rules out.
        kernel: whether it is a convolution kernel.
        groups: number of channel groups of a kernel.
        transposed: whether it is the kernel (in, out / groups, ...) of a transposed convolution.
    """

    reason: str | None = None
    excluded: frozenset[str] = frozenset()
    kernel: bool = False
    groups: int = 1
    transposed: bool = False


def shape_of(param: Tensor) -> tuple[int, ...]:
    """A parameter's full shape, also if ZeRO-3 has partitioned it."""
    return tuple(getattr(param, "ds_shape", param.shape))


def kinds_by_module(model: nn.Module) -> dict[int, Kind]:
    """What the modules of a model say about its parameters, by ``id(parameter)``.

    Embeddings, norms and kernels are known by the type of their module. Output heads are what
    ``get_output_embeddings()`` returns, and every Linear outside the repeated blocks with as many
    outputs as an embedding has rows. If the model has no such method, the last Linear outside the
    blocks is a head, too.
    """
    found: dict[int, Kind] = {}
    inputs, outputs = _declared_embeddings(model)
    embeddings = {id(p): p for p in inputs}
    for module in model.modules():
        if isinstance(module, nn.Embedding | nn.EmbeddingBag):
            embeddings |= {id(p): p for p in module.parameters()}
        elif _is_convolution(module):
            groups, transposed = (getattr(module, key, 0) for key in ("groups", "transposed"))
            kernel = Kind(KERNEL, kernel=True, groups=groups or 1, transposed=bool(transposed))
            found |= {id(p): kernel for p in module.parameters() if len(shape_of(p)) > 2}
        elif isinstance(module, nn.LayerNorm | nn.GroupNorm | nn.RMSNorm):
            found |= {id(p): Kind(NORM) for p in module.parameters()}
        else:
            own = (p for key, p in module.named_parameters(recurse=False) if key in WEIGHTS)
            found = {id(p): Kind(excluded=frozenset({KERNEL})) for p in own} | found
        found |= _gate_kinds(module)
    heads = [*outputs, *_vocabulary_heads(model, embeddings.values())]
    reasons = dict.fromkeys(map(id, _last_linear(model)) if not outputs else (), LAST_LINEAR)
    reasons |= dict.fromkeys(map(id, heads), HEAD)
    reasons |= dict.fromkeys(embeddings, EMBEDDING)
    return found | {
        key: replace(found.get(key, Kind()), reason=reason) for key, reason in reasons.items()
    }


def _is_convolution(module: nn.Module) -> bool:
    """Whether a module is one of torch's convolutions, or named "conv" and has a kernel itself."""
    if isinstance(module, nn.modules.conv._ConvNd):
        return True
    dims = (len(shape_of(param)) for param in module.parameters(recurse=False))
    return "conv" in type(module).__name__.lower() and max(dims, default=0) > 2


def _declared_embeddings(model: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
    """The weights that a model, or a model inside it, declares as input and output embeddings."""
    declared: tuple[list[Tensor], list[Tensor]] = ([], [])
    for module in model.modules():
        for weights, method in zip(
            declared, ("get_input_embeddings", "get_output_embeddings"), strict=True
        ):
            if not callable(getattr(type(module), method, None)):
                continue
            try:
                returned: Any = getattr(module, method)()
            except Exception:  # some models of transformers raise if they have none
                continue
            if isinstance(returned, nn.Module):
                named = returned.named_parameters()
                weights += [p for n, p in named if len(shape_of(p)) > 1 and not block_of(n)]
    return declared


def _gate_kinds(module: nn.Module) -> dict[int, Kind]:
    """What a module says about the routers and gates that are its children.

    A "gate" with a sibling named "experts" is a router. A "gate" with a sibling of the same shape
    belongs to a gated MLP, whatever its name suggests.
    """
    children = dict(module.named_children())
    with_experts = any("expert" in child.lower() for child in children)
    if "router" in _words(type(module).__name__) and not with_experts:
        return {id(p): Kind(ROUTER) for p in module.parameters()}
    gate = getattr(module, "gate", None)
    if not isinstance(gate, nn.Module):
        return {}
    if with_experts:
        return {id(p): Kind(ROUTER) for p in gate.parameters()}
    weight = getattr(gate, "weight", None)
    if not isinstance(weight, Tensor):
        return {}
    others = (getattr(child, "weight", None) for child in children.values() if child is not gate)
    if any(shape_of(w) == shape_of(weight) for w in others if isinstance(w, Tensor)):
        return {id(weight): Kind(excluded=frozenset({ROUTER, KERNEL}))}
    return {}


def _linear_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Names and weights of all modules with ``out_features``, such as ``nn.Linear``, in order."""
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if hasattr(module, "out_features") and isinstance(weight, Tensor):
            yield clean_name(f"{name}.weight"), weight


def _vocabulary_heads(model: nn.Module, embeddings: Iterable[Tensor]) -> list[Tensor]:
    """Weights of linear modules outside blocks with as many outputs as an embedding has rows."""
    rows = {shape_of(p)[0] for p in embeddings if len(shape_of(p)) == 2}
    return [
        w for name, w in _linear_weights(model) if not block_of(name) and shape_of(w)[0] in rows
    ]


def _last_linear(model: nn.Module) -> list[Tensor]:
    """The weight of the last linear module outside the blocks; [] if there is none.

    A model without blocks may be an MLP: a list of linear modules and an output layer after it.
    """
    linear = list(_linear_weights(model))
    if any(block_of(clean_name(name)) for name, _ in model.named_parameters()):
        return [weight for name, weight in linear if not block_of(name)][-1:]
    indexed = [any(part.isdigit() for part in name.split(".")) for name, _ in linear]
    return [linear[-1][1]] if any(indexed) and not indexed[-1] else []


def ambiguous_names(shapes: Mapping[str, Sequence[int]], projected: Container[str]) -> list[str]:
    """Names that :func:`kind_by_name` may judge differently from :func:`kinds_by_module`.

    A projected matrix outside the blocks may be an embedding or a head. A "gate" may be a router or
    part of a gated MLP; the names of its siblings tell which.

    Args:
        shapes: the shapes of all parameters, by name from :func:`clean_name`.
        projected: the names of the parameters on the conda path.
    """
    has_blocks = any(map(block_of, shapes))
    routers = _gates_by_name(shapes)
    found = []
    for name, shape in shapes.items():
        if name in routers:
            found += [name] if routers[name] == (name in projected) else []
        elif name in projected and not block_of(name):
            # In a model without blocks, only a very tall matrix may be an embedding.
            tall = shape[-2] >= max(256, 8 * shape[-1])
            found += [name] if has_blocks or tall else []
    return found


def _gates_by_name(shapes: Mapping[str, Sequence[int]]) -> dict[str, bool]:
    """For each "gate" whose siblings' names tell what it is: whether it is a router.

    It decides by names as :func:`_gate_kinds` does by modules.
    """
    parts = {name: name.split(".") for name in shapes}
    weights: dict[str, list[str]] = defaultdict(list)  # by the name of the parent module
    with_experts = set[str]()
    for name, path in parts.items():
        weights[".".join(path[:-2])] += [name] if path[-1] == "weight" else []
        with_experts |= {".".join(path[:i]) for i, p in enumerate(path) if "expert" in p.lower()}
    found = {}
    for parent, names in weights.items():
        for gate in (name for name in names if parts[name][-2:-1] == ["gate"]):
            has_equal = sum(shapes[name] == shapes[gate] for name in names) > 1
            if parent in with_experts or has_equal:
                found[gate] = parent in with_experts
    return found


def as_matrix(shape: Sequence[int]) -> tuple[int, int]:
    """The shape (out, in * k * k) in which a kernel (out, in, k, k) is one matrix."""
    return shape[0], math.prod(shape[1:])
