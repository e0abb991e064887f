"""Which parameters take the conda path and which the adamw path, by shape and by name.

The paper projects the two-dimensional weights inside attention and MLP blocks; embeddings, the
output head, norms and biases take AdamW's step (arXiv 2509.24218, section 4).
"""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn

CONDA, ADAMW = "conda", "adamw"
ALGORITHMS = (CONDA, ADAMW)

EMBEDDINGS = frozenset({"wte", "wpe", "shared"})
HEADS = frozenset({"lm_head", "output", "head", "score", "classifier", "embed_out"})
ROUTERS = frozenset({"router", "gate", "gate_network", "shared_expert_gate"})
WRAPPERS = frozenset({"module", "_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"})


@dataclass(frozen=True, slots=True)
class Route:
    """The path of a parameter, and the rule that chose it."""

    algorithm: str
    reason: str


def clean_name(name: str) -> str:
    """A parameter's name without the components that torch's wrappers put in."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def route(name: str | None, param: Tensor) -> Route:
    """The default rule.

    Args:
        name: fully qualified name such as ``"layers.0.mlp.up_proj.weight"``; None if unknown, and
            then only the shape decides.
        param: the parameter.
    """
    shape = tuple(param.shape)
    if len(shape) < 2:
        return Route(ADAMW, f"{len(shape)}-D")
    if len(shape) > 3:
        return Route(ADAMW, f"{len(shape)}-D: a kernel, not a matrix")
    if min(shape[-2:]) < 2 or param.numel() == 0:
        return Route(ADAMW, "a vector in two dimensions")
    if name is not None and (kind := _special(clean_name(name))):
        return Route(ADAMW, kind)
    return Route(CONDA, "a matrix" if len(shape) == 2 else "a batch of matrices")


def _special(name: str) -> str | None:
    """What a weight is, if its name says that it is none of a block's projections."""
    *path, leaf = name.split(".")
    owner = path[-1] if path else leaf
    if "bias" in leaf or "bias" in owner:
        return "bias"
    if owner in EMBEDDINGS or "embed" in owner.lower() or "embed" in leaf.lower():
        return "embedding"
    # An output projection inside a block may have a head's name; a block is known by its index.
    outside = itertools.takewhile(lambda part: not part.isdigit(), path)
    if any(part in HEADS for part in outside):
        return "output head"
    if owner in ROUTERS:
        return "router"
    return None


def param_groups(
    model: nn.Module,
    *,
    conda: Sequence[str] = (),
    adamw: Sequence[str] = (),
    conda_options: Mapping[str, Any] | None = None,
    adamw_options: Mapping[str, Any] | None = None,
) -> list[dict[str, Any]]:
    """Parameter groups for :class:`conda_dist.Conda` from a module, by name, type and shape.

    Matrices inside the model's blocks go to conda; embeddings, output head, routers, norms,
    biases and kernels to adamw. Call it after ``fully_shard`` or whatever else replaces
    parameters. Tied weights appear once, under their first name.

    Args:
        model: the module.
        conda: patterns (as of :mod:`fnmatch`) of parameter names to put on the conda path
            whatever their names say, such as ``"*.router.weight"``.
        adamw: patterns of names to keep off it. Wins over ``conda``.
        conda_options: hyperparameters of the conda group, such as ``{"weight_decay": 0.1}``.
        adamw_options: hyperparameters of the adamw group, such as ``{"lr": 1e-3}``.

    Returns:
        One group dict for each algorithm that has parameters, named.

    Raises:
        ValueError: a pattern matches no parameter, or a conda pattern one that is no matrix; or
            no trainable weight is left for the conda path.
    """
    for side, patterns in (("conda", conda), ("adamw", adamw)):
        if isinstance(patterns, str):
            raise TypeError(f"{side} must be a list of patterns, got the text {patterns!r}")
    options = {CONDA: conda_options or {}, ADAMW: adamw_options or {}}
    for algorithm, chosen_options in options.items():
        if undone := chosen_options.keys() & {"params", "param_names", "algorithm"}:
            raise ValueError(f"{algorithm}_options cannot set {', '.join(sorted(undone))}")
    named = list(model.named_parameters())
    for pattern in (*conda, *adamw):
        if not any(fnmatchcase(clean_name(name), pattern) for name, _ in named):
            raise ValueError(
                f"pattern {pattern!r} matches no parameter of {type(model).__name__}; names look "
                f"like {', '.join(repr(clean_name(name)) for name, _ in named[:3])}"
            )
    embeddings = {
        id(param)
        for module in model.modules()
        if isinstance(module, nn.Embedding | nn.EmbeddingBag)
        for param in module.parameters(recurse=False)
    }
    groups: dict[str, list[tuple[str, Tensor]]] = {CONDA: [], ADAMW: []}
    for name, param in named:
        chosen = route(name, param).algorithm
        if id(param) in embeddings or _matches(name, adamw):
            chosen = ADAMW
        if _matches(name, conda) and not _matches(name, adamw):
            check_matrix(clean_name(name), param)
            chosen = CONDA
        groups[chosen].append((name, param))
    if not any(param.requires_grad for _, param in groups[CONDA]):
        raise ValueError(nothing_to_project(named))
    return [
        {"params": params, "algorithm": algorithm, **options[algorithm]}
        for algorithm, params in groups.items()
        if params
    ]


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(clean_name(name), pattern) for pattern in patterns)


def check_matrix(name: str, param: Tensor) -> None:
    """Refuses what cannot be projected.

    Raises:
        ValueError: fewer than two dimensions, or no elements.
    """
    if param.ndim < 2 or param.numel() == 0:
        raise ValueError(
            f"{name}: a parameter of shape {tuple(param.shape)} cannot take the conda path, which "
            'projects matrices; put it in a group with algorithm="adamw".'
        )


def nothing_to_project(named: Sequence[tuple[str, Tensor]]) -> str:
    """The error for a model none of whose matrices would reach the conda path."""
    listed = [
        f"{clean_name(name)} {tuple(param.shape)}"
        f"{'' if param.requires_grad else ', frozen'}: {route(name, param).reason}"
        for name, param in named[:8]
    ]
    return (
        "no trainable matrix would reach the conda path, so this would be AdamW under another "
        f"name. Found {len(named)} parameters: {'; '.join(listed)}"
        f"{'; ...' if len(named) > 8 else ''}. Name weights with "
        'param_groups(model, conda=["pattern"]) or give their group algorithm="conda".'
    )
