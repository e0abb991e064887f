"""Which parameters take the conda path and which the adamw path, by shape and by name.

The paper projects the two-dimensional weights inside attention and MLP blocks; embeddings, the
output head, norms and biases take AdamW's step (arXiv 2509.24218, section 4).
"""

import itertools
from collections.abc import Container, Iterable, Mapping, Sequence
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
    splits: Mapping[str, int | Sequence[int]] | None = None,
    conda_options: Mapping[str, Any] | None = None,
    adamw_options: Mapping[str, Any] | None = None,
) -> list[dict[str, Any]]:
    """Parameter groups for :class:`conda_dist.Conda` from a module, by name, type and shape.

    Matrices go to conda, but those whose name or module says that they are embeddings, the output
    head or routers; norms, biases and kernels go to adamw. Call it after ``fully_shard`` or
    whatever else replaces parameters. Tied weights appear once, under their first name.

    Args:
        model: the module.
        conda: patterns (as of :mod:`fnmatch`) of parameter names to put on the conda path
            whatever their names say, such as ``"*.router.weight"``.
        adamw: patterns of names to keep off it. Wins over ``conda``.
        splits: patterns of fused weights, each with the rows (dimension -2) of its parts, such as
            ``{"*.qkv_proj.weight": (4096, 1024, 1024)}``, or the number of equal parts, such as
            ``{"*.gate_up_proj.weight": 2}``. Rows that make up a fraction of the weight repeat
            down it, and what they stand for is a part together: ``(512, 128, 128)`` for four query
            heads, a key and a value head, again and again. Each part is a matrix of its own, with
            its own basis; the parameter stays whole. The first pattern that matches counts.
        conda_options: hyperparameters of the conda group, such as ``{"weight_decay": 0.1}``.
        adamw_options: hyperparameters of the adamw group, such as ``{"lr": 1e-3}``.

    Returns:
        One group dict, named, for each algorithm that has parameters, and for each way in which
        weights are split.

    Raises:
        TypeError: patterns or splits of the wrong type.
        ValueError: a pattern matches no parameter, or a conda pattern one that is no matrix, or a
            splits pattern one that has other rows or is not on the conda path; or no trainable
            weight is left for the conda path.
    """
    options = {CONDA: conda_options or {}, ADAMW: adamw_options or {}}
    for algorithm, chosen_options in options.items():
        if undone := chosen_options.keys() & {"params", "param_names", "algorithm", "splits"}:
            raise ValueError(f"{algorithm}_options cannot set {', '.join(sorted(undone))}")
    groups, unmatched = divide(model, conda, adamw)
    named = list(model.named_parameters())
    if unmatched:
        raise ValueError(
            f"pattern {unmatched[0]!r} matches no parameter of {type(model).__name__}; names look "
            f"like {', '.join(repr(clean_name(name)) for name, _ in named[:3])}"
        )
    if not any(param.requires_grad for _, param in groups[CONDA]):
        raise ValueError(nothing_to_project(named))
    cut, unmatched = split(groups[CONDA], splits or {})
    if unmatched:
        raise ValueError(
            f"splits pattern {unmatched[0]!r} matches no parameter on the conda path of "
            f"{type(model).__name__}"
        )
    return [
        {"params": params, "algorithm": algorithm, "splits": rows, **options[algorithm]}
        for algorithm, rows, params in (
            *((CONDA, rows, params) for rows, params in cut.items()),
            (ADAMW, None, groups[ADAMW]),
        )
        if params
    ]


def split(
    named: Sequence[tuple[str, Tensor]], splits: Mapping[str, int | Sequence[int]]
) -> tuple[dict[tuple[int, ...] | None, list[tuple[str, Tensor]]], list[str]]:
    """The weights of the conda path by the rows of their parts, None for those that stay whole.

    Args:
        named: the weights, named.
        splits: as of :func:`param_groups`.

    Returns:
        The weights, and the patterns that match none of them.

    Raises:
        TypeError: splits of the wrong type.
        ValueError: a matching weight has other rows.
    """
    cut: dict[tuple[int, ...] | None, list[tuple[str, Tensor]]] = {None: []}
    matched = set[str]()
    if not isinstance(splits, Mapping):
        raise TypeError(f"splits must be a dict of patterns and rows, got {splits!r}")
    for name, param in named:
        hits = [pattern for pattern in splits if fnmatchcase(clean_name(name), pattern)]
        matched.update(hits)
        rows = _rows(clean_name(name), param, splits[hits[0]]) if hits else None
        cut.setdefault(rows, []).append((name, param))
    return cut, [pattern for pattern in splits if pattern not in matched]


def _rows(name: str, param: Tensor, rule: int | Sequence[int]) -> tuple[int, ...]:
    rows = param.shape[-2]
    if not isinstance(rule, int) or isinstance(rule, bool):
        check_splits(name, param, rule)
        return tuple(rule)  # type: ignore[arg-type]
    if rule < 1 or rows % rule:
        raise ValueError(f"{name}: {rows} rows cannot be split into {rule} equal parts")
    return (rows // rule,) * rule


def divide(
    model: nn.Module, conda: Sequence[str], adamw: Sequence[str]
) -> tuple[dict[str, list[tuple[str, Tensor]]], list[str]]:
    """The named parameters of each path, and the patterns that match none of them.

    For models of which only a part is here, such as a pipeline stage: there neither an empty path
    nor a pattern without a match is an error yet. See :func:`param_groups` for the arguments.

    Raises:
        TypeError: patterns are a text instead of a list.
        ValueError: a conda pattern matches a parameter that is no matrix.
    """
    embeddings = {
        id(param)
        for module in model.modules()
        if isinstance(module, nn.Embedding | nn.EmbeddingBag)
        for param in module.parameters(recurse=False)
    }
    return assign(list(model.named_parameters()), embeddings, conda, adamw)


def assign(
    named: Sequence[tuple[str, Tensor]],
    embeddings: Container[int],
    conda: Sequence[str],
    adamw: Sequence[str],
) -> tuple[dict[str, list[tuple[str, Tensor]]], list[str]]:
    """The named parameters of each path, and the patterns that match none of them.

    Args:
        named: names with parameters, or with anything of their shapes.
        embeddings: ids of those that are embeddings.
        conda: see :func:`param_groups`.
        adamw: see :func:`param_groups`.

    Raises:
        TypeError: patterns are a text instead of a list.
        ValueError: a conda pattern matches a parameter that is no matrix.
    """
    for side, patterns in (("conda", conda), ("adamw", adamw)):
        if isinstance(patterns, str):
            raise TypeError(f"{side} must be a list of patterns, got the text {patterns!r}")
    groups: dict[str, list[tuple[str, Tensor]]] = {CONDA: [], ADAMW: []}
    for name, param in named:
        chosen = route(name, param).algorithm
        if id(param) in embeddings or _matches(name, adamw):
            chosen = ADAMW
        if _matches(name, conda) and not _matches(name, adamw):
            check_matrix(clean_name(name), param)
            chosen = CONDA
        groups[chosen].append((name, param))
    names = [clean_name(name) for name, _ in named]
    unmatched = [p for p in (*conda, *adamw) if not any(fnmatchcase(name, p) for name in names)]
    return groups, unmatched


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


def check_splits(name: str, param: Tensor, splits: Any) -> None:
    """Refuses what cannot be cut into these blocks of rows.

    Raises:
        TypeError: they are no sequence of positive integers.
        ValueError: they do not fit into the weight's rows a whole number of times, or it has more
            than three dimensions.
    """
    if (
        not isinstance(splits, tuple | list)
        or not splits
        or not all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in splits)
    ):
        raise TypeError(
            f"{name}: splits must be rows of parts, such as (4096, 1024), got {splits!r}"
        )
    if param.shape[-2] % sum(splits) or param.ndim > 3:
        raise ValueError(
            f"{name}: splits {tuple(splits)} make {sum(splits)} rows, but the weight is "
            f"{tuple(param.shape)}: they must be all rows, or a block that repeats down all rows, "
            "of a matrix or of each matrix of a three-dimensional weight."
        )


HOW = (
    'Name weights with param_groups(model, conda=["pattern"]) or give their group algorithm="conda"'
)


def nothing_to_project(named: Sequence[tuple[str, Tensor]], how: str = HOW) -> str:
    """The error for a model none of whose matrices would reach the conda path; ``how`` to mend."""
    listed = [
        f"{clean_name(name)} {tuple(param.shape)}"
        f"{'' if param.requires_grad else ', frozen'}: {route(name, param).reason}"
        for name, param in named[:8]
    ]
    return (
        "no trainable matrix would reach the conda path, so this would be AdamW under another "
        f"name. Found {len(named)} parameters: {'; '.join(listed)}"
        f"{'; ...' if len(named) > 8 else ''}. {how}."
    )
