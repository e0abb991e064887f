"""What kind of weight a parameter is: by its name and shape, and by the modules of its model.

Conda projects the matrices inside a model's blocks. Everything else is told apart here, first by
the words of its name, such as "emb" in ``tok_emb.weight``, then by the type of its module.
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

BIAS, EMBEDDING, HEAD, ROUTER = "bias", "embedding", "output head", "router"
NORM, STATE_SPACE = "norm or scale", "state-space parameter"
TOKENS = "learned tokens or positions"
LAST = "the last matrix outside the blocks"
KERNEL = "a convolution kernel, not a matrix"
MATRIX, BATCH = "a matrix", "a batch of matrices"

EMBEDDING_WORDS = frozenset({"emb", "embs", "wte", "wpe", "codebook", "codebooks"})
TOKEN_WORDS = frozenset({"token", "tokens", "latent", "latents", "codevectors", "prototypes"})
LEARNED_WORDS = TOKEN_WORDS | {
    *("query", "queries", "table", "prompt", "prompts", "memory"),
    *("pos", "position", "positions", "positional", "ape"),
}
"""Words of parameters that no linear module has: in ``attention.query.weight`` "query" is one."""
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
"""What modules call their weight, and weight normalisation its parts."""


@lru_cache(maxsize=65536)
def _words(part: str) -> tuple[str, ...]:
    """The words of a component: "tok_emb", "tokEmb" and "TokEmb" are "tok" and "emb"."""
    found = re.findall(r"[A-Z]+(?=[A-Z][a-z])|[A-Z]?[a-z]+|[A-Z]+|\d+", part)
    return tuple(word.lower() for word in found)


def clean_name(name: str) -> str:
    """A parameter's name without the components that torch's wrappers put in."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def _says_embedding(part: str) -> bool:
    return "embed" in part.lower() or not EMBEDDING_WORDS.isdisjoint(_words(part))


def block_of(name: str) -> str:
    """The name of the innermost repeated block that a parameter is in; "" outside of them.

    A block is known by its index, and by what it has inside: "layers.0" of
    ``layers.0.mlp.up.weight``. One layer of a ``Sequential``, as in ``head.2.weight``, is none.
    """
    parts = name.split(".")
    for i in reversed(range(len(parts) - 2)):
        if parts[i].isdigit() and not (i and _says_embedding(parts[i - 1])):
            return ".".join(parts[: i + 1])
    return ""


def kind_of_name(name: str, shape: Sequence[int]) -> str | None:
    """What a weight is, if its name says that it is none of a block's projections.

    Args:
        name: without wrappers, see :func:`clean_name`.
        shape: its shape, of two dimensions or more.
    """
    block = block_of(name)
    *path, leaf = name.removeprefix(f"{block}.").split(".")
    owner = path[-1] if path else leaf
    own = owner if leaf in WEIGHTS else leaf  # what is named after the parameter alone
    experts = any("expert" in part.lower() or part == "moe" for part in name.split("."))
    if "bias" in leaf or ("bias" in owner and leaf in WEIGHTS):
        return BIAS
    if any(map(_says_embedding, (*path, leaf))) or (owner == "shared" and leaf == "weight"):
        return EMBEDDING
    if leaf in STATE_SPACE_NAMES or (leaf in SYSTEM_NAMES and _is_of_state_space(path)):
        return STATE_SPACE
    if _is_learned(own, leaf in WEIGHTS):
        return TOKENS
    scales = leaf not in WEIGHTS or "norm" in path[-2:-1]
    if not NORM_WORDS.isdisjoint(_words(own)) or (
        scales and not SCALE_WORDS.isdisjoint(_words(own))
    ):
        return NORM
    if any(map(_says_head, path or [leaf])) if not block else owner in HEADS_ANYWHERE:
        return HEAD
    if not block and owner == "decoder":  # a Linear of that name, not what is in a decoder
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


def _is_learned(own: str, of_module: bool) -> bool:
    """Whether a name is that of tokens, positions or a table, or of the module that has them."""
    words = _words(own)
    if of_module:
        return words[-1] in TOKEN_WORDS if words else False
    return not LEARNED_WORDS.isdisjoint(words) and PROJECTION_WORDS.isdisjoint(words)


def _says_head(part: str) -> bool:
    words = set(_words(part))
    if words & {"attention", "attn", "multi", "multihead"}:
        return False
    return part in HEAD_NAMES or part in HEADS_ANYWHERE or bool(words & HEAD_WORDS)


def _is_of_state_space(path: Sequence[str]) -> bool:
    """Whether the module is one of a state space, of whose matrices the names are one letter."""
    words = {word for part in path for word in part.lower().split("_")}
    return bool(words & STATE_SPACE_WORDS) and "lora" not in words


def _is_in_router(path: Sequence[str]) -> bool:
    """Whether one of these modules is a router, as in ``mlp.router.classifier``, not an expert.

    DeepSpeed and Tutel call the linear module of a router ``wg``.
    """
    inner = list(path)
    while inner and "router" not in _words(inner[0]):
        inner.pop(0)
    if inner:
        return not any("expert" in part.lower() for part in inner)
    return path[-1] == "wg" and any(part in ("gate", "gates") for part in path[:-1])


def _is_gate_of_mlp(owner: str, path: Sequence[str], block: str, shape: Sequence[int]) -> bool:
    """Whether a "gate" is the weight of a gated MLP: it has more outputs, or is an expert's own."""
    above = [*block.split("."), *path[:-1]]
    return owner == "gate" and (
        shape[-2] >= shape[-1] or any("expert" in part.lower() for part in above[-2:])
    )


@dataclass(frozen=True, slots=True)
class Kind:
    """What the modules of a model say of a parameter.

    Attributes:
        reason: what it is, if it is nothing to project.
        denied: what it is not, whatever its name says.
        kernel: whether it is a convolution kernel.
        groups: of a kernel, into how many its channels are divided.
        transposed: whether it is the kernel of a transposed convolution, (in, out / groups, ...).
    """

    reason: str | None = None
    denied: frozenset[str] = frozenset()
    kernel: bool = False
    groups: int = 1
    transposed: bool = False


def shape_of(param: Tensor) -> tuple[int, ...]:
    """A parameter's shape, before DeepSpeed's ZeRO took it apart."""
    return tuple(getattr(param, "ds_shape", param.shape))


def kinds(model: nn.Module) -> dict[int, Kind]:
    """What the modules of a model say of its parameters, by ``id``; nothing of most.

    Embeddings and kernels are known by their module's type. Output heads are what
    ``get_output_embeddings()`` returns, where a model has that; any Linear outside repeated blocks
    that has as many outputs as an embedding has rows; and, where a model does not say, the last
    Linear outside its blocks.
    """
    found: dict[int, Kind] = {}
    inputs, outputs = _declared(model)
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
            found = {id(p): Kind(denied=frozenset({KERNEL})) for p in own} | found
        found |= _routers(module)
    reasons = dict.fromkeys(map(id, _last(model)) if not outputs else (), LAST)
    reasons |= dict.fromkeys(map(id, (*outputs, *_as_wide_as(model, embeddings.values()))), HEAD)
    reasons |= dict.fromkeys(embeddings, EMBEDDING)
    return found | {
        key: replace(found.get(key, Kind()), reason=reason) for key, reason in reasons.items()
    }


def _is_convolution(module: nn.Module) -> bool:
    """Whether it is one of torch's, or a class that is called so and has a kernel itself."""
    if isinstance(module, nn.modules.conv._ConvNd):
        return True
    own = (len(shape_of(param)) for param in module.parameters(recurse=False))
    return "conv" in type(module).__name__.lower() and max(own, default=0) > 2


def _declared(model: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
    """Weights of what a model, or one inside it, returns as its input and output embeddings."""
    declared: tuple[list[Tensor], list[Tensor]] = ([], [])
    for module in model.modules():
        for weights, method in zip(
            declared, ("get_input_embeddings", "get_output_embeddings"), strict=True
        ):
            if not callable(getattr(type(module), method, None)):
                continue
            try:
                returned: Any = getattr(module, method)()
            except Exception:  # transformers' models raise where they have none
                continue
            if isinstance(returned, nn.Module):
                named = returned.named_parameters()
                weights += [p for n, p in named if len(shape_of(p)) > 1 and not block_of(n)]
    return declared


def _routers(module: nn.Module) -> dict[int, Kind]:
    """What a "gate" is: a router beside experts, the weight of a gated MLP beside its equal."""
    beside = dict(module.named_children())
    with_experts = any("expert" in child.lower() for child in beside)
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
    others = (getattr(child, "weight", None) for child in beside.values() if child is not gate)
    if any(shape_of(w) == shape_of(weight) for w in others if isinstance(w, Tensor)):
        return {id(weight): Kind(denied=frozenset({ROUTER, KERNEL}))}
    return {}


def _linear(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Names and weights of the linear modules, in order, torch's or others' of that form."""
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if hasattr(module, "out_features") and isinstance(weight, Tensor):
            yield clean_name(f"{name}.weight"), weight


def _as_wide_as(model: nn.Module, embeddings: Iterable[Tensor]) -> list[Tensor]:
    """Weights of linear modules outside blocks with as many outputs as an embedding has rows."""
    rows = {shape_of(p)[0] for p in embeddings if len(shape_of(p)) == 2}
    return [w for name, w in _linear(model) if not block_of(name) and shape_of(w)[0] in rows]


def _last(model: nn.Module) -> list[Tensor]:
    """The weight of the last linear module outside the blocks of a model that has blocks.

    Without blocks those modules of a list are what repeats, as in an MLP with an output layer.
    """
    linear = list(_linear(model))
    if any(block_of(clean_name(name)) for name, _ in model.named_parameters()):
        return [weight for name, weight in linear if not block_of(name)][-1:]
    indexed = [any(part.isdigit() for part in name.split(".")) for name, _ in linear]
    return [linear[-1][1]] if any(indexed) and not indexed[-1] else []


def doubtful(shapes: Mapping[str, Sequence[int]], projected: Container[str]) -> list[str]:
    """Names of matrices of which the modules may say something else.

    Those outside the blocks that are to be projected may be embeddings or heads. A "gate" is told
    by what is beside it: experts, or an equal in a gated MLP.

    Args:
        shapes: the shapes of all parameters by :func:`clean_name`.
        projected: those that their names send to the conda path.
    """
    has_blocks = any(map(block_of, shapes))
    gates = _gates(shapes)
    found = []
    for name, shape in shapes.items():
        if name in gates:
            found += [name] if gates[name] == (name in projected) else []
        elif name in projected and not block_of(name):
            # Without blocks only what is as tall as an embedding is.
            tall = shape[-2] >= max(256, 8 * shape[-1])
            found += [name] if has_blocks or tall else []
    return found


def _gates(shapes: Mapping[str, Sequence[int]]) -> dict[str, bool]:
    """Weights called "gate" of which the names beside them tell whether they are routers.

    Of names what :func:`_routers` reads from modules.
    """
    parts = {name: name.split(".") for name in shapes}
    weights: dict[str, list[str]] = defaultdict(list)
    with_experts = set[str]()
    for name, path in parts.items():
        weights[".".join(path[:-2])] += [name] if path[-1] == "weight" else []
        with_experts |= {".".join(path[:i]) for i, p in enumerate(path) if "expert" in p.lower()}
    found = {}
    for above, names in weights.items():
        for gate in (name for name in names if parts[name][-2:-1] == ["gate"]):
            equal = sum(shapes[name] == shapes[gate] for name in names) > 1
            if above in with_experts or equal:
                found[gate] = above in with_experts
    return found


def as_matrix(shape: Sequence[int]) -> tuple[int, int]:
    """The shape (out, in * k * k) of a kernel (out, in, k, k) as one matrix."""
    return shape[0], math.prod(shape[1:])
