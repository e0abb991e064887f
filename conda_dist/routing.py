"""Which parameters take the conda path and which the adamw path, by shape and by name.

The paper projects the two-dimensional weights inside attention and MLP blocks; embeddings, the
output head, norms and biases take AdamW's step (arXiv 2509.24218, section 4).
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn

from conda_dist.layer_kinds import (
    BATCH,
    KERNEL,
    MATRIX,
    Kind,
    as_matrix,
    doubtful,
    kind_of_name,
    kinds,
)
from conda_dist.layer_kinds import clean_name as clean_name
from conda_dist.replaced_parameters import refuse_flat

CONDA, ADAMW = "conda", "adamw"
VECTOR = "a vector in two dimensions"


@dataclass(frozen=True, slots=True)
class Route:
    """The path of a parameter, and the rule that chose it."""

    algorithm: str
    reason: str


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
    if param.numel() == 0 or max(shape) == math.prod(shape):
        return Route(ADAMW, VECTOR)
    if name is not None and (kind := kind_of_name(clean_name(name), shape)):
        return Route(ADAMW, kind)
    if len(shape) > 3:
        return Route(ADAMW, KERNEL)
    if min(shape[-2:]) < 2:
        return Route(ADAMW, VECTOR)
    return Route(CONDA, MATRIX if len(shape) == 2 else BATCH)


def decide(name: str, param: Tensor, kind: Kind | None) -> Route:
    """The rule for a parameter of which the modules say something, too; see :func:`route`."""
    found = route(name, param)
    if kind is None or len(param.shape) < 2 or found.reason == VECTOR:
        return found
    if kind.reason and (kind.reason != KERNEL or found.algorithm == CONDA):
        return Route(ADAMW, kind.reason)  # of a kernel its name may say that it embeds patches
    if found.reason in kind.denied and len(param.shape) <= 3:
        return Route(CONDA, MATRIX if len(param.shape) == 2 else BATCH)
    return found


def param_groups(
    model: nn.Module,
    *,
    conda: Sequence[str] = (),
    adamw: Sequence[str] = (),
    kernels: bool = False,
    splits: Mapping[str, int | Sequence[int]] | None = None,
    rule: str = CONDA,
    conda_options: Mapping[str, Any] | None = None,
    adamw_options: Mapping[str, Any] | None = None,
) -> list[dict[str, Any]]:
    """Parameter groups for :class:`conda_dist.Conda`, or another rule, by name, type and shape.

    Matrices go to conda, but those whose name or module says that they are embeddings, the output
    head or routers; norms, biases, learned tokens, state-space parameters and kernels go to adamw.
    Output heads are what the model's ``get_output_embeddings()`` returns, each Linear outside the
    repeated blocks with as many outputs as an embedding has rows, and, in a model without that
    method, the last Linear outside the blocks. Call it after ``fully_shard`` or whatever else
    replaces parameters. Tied weights appear once, under their first name.

    Args:
        model: the module.
        conda: patterns (as of :mod:`fnmatch`) of parameter names to put on the conda path
            whatever their names say, such as ``"*.router.weight"``. A kernel is then taken as with
            ``kernels``.
        adamw: patterns of names to keep off it. Wins over ``conda``.
        kernels: whether convolution kernels (out, in, k, k) go to the conda path, too, each seen as
            one matrix (out, in * k * k), and one for each group of its channels where it has
            groups. State keeps the kernel's shape. Depthwise kernels stay with adamw.
        splits: patterns of fused weights, each with the rows (dimension -2) of its parts, such as
            ``{"*.qkv_proj.weight": (4096, 1024, 1024)}``, or the number of equal parts, such as
            ``{"*.gate_up_proj.weight": 2}``. Rows that make up a fraction of the weight repeat
            down it, and what they stand for is a part together: ``(512, 128, 128)`` for four query
            heads, a key and a value head, again and again. Each part is a matrix of its own, with
            its own basis; the parameter stays whole. The first pattern that matches counts.
        rule: the path of the matrices: "conda", or "muon" for :class:`conda_dist.Muon`. What is
            said here of the conda path holds for it, too.
        conda_options: hyperparameters of the matrices' group, such as ``{"weight_decay": 0.1}``.
        adamw_options: hyperparameters of the adamw group, such as ``{"lr": 1e-3}``.

    Returns:
        One group dict, named, for each algorithm that has parameters, and for each way in which
        weights are split.

    Raises:
        TypeError: patterns or splits of the wrong type.
        ValueError: FSDP1 or ZeRO has made flat parameters; a pattern matches no parameter, or a
            conda pattern one that is no matrix, or a splits pattern one that has other rows or is
            not on the conda path; a kernel cannot be seen as a matrix; or no trainable weight is
            left for the conda path.
    """
    options = {CONDA: conda_options or {}, ADAMW: adamw_options or {}}
    for algorithm, chosen_options in options.items():
        own = {"params", "param_names", "algorithm", "splits", "kernels"}
        if undone := chosen_options.keys() & own:
            raise ValueError(f"{algorithm}_options cannot set {', '.join(sorted(undone))}")
    named = list(model.named_parameters())
    refuse_flat((clean_name(name), param, {}) for name, param in named)
    division = divide(model, conda, adamw, kernels=kernels)
    if division.unmatched:
        raise ValueError(
            f"pattern {division.unmatched[0]!r} matches no parameter of {type(model).__name__}; "
            f"names look like {', '.join(repr(clean_name(name)) for name, _ in named[:3])}"
        )
    if not any(param.requires_grad for _, param in division.conda):
        raise ValueError(nothing_to_project(named, path=rule))
    ways, unmatched = split(division, splits or {})
    if unmatched:
        raise ValueError(
            f"splits pattern {unmatched[0]!r} matches no parameter on the conda path of "
            f"{type(model).__name__}"
        )
    groups = [{"params": named, **way.keys(rule), **options[CONDA]} for way, named in ways.items()]
    rest = {"params": division.adamw, "algorithm": ADAMW, "splits": None, **options[ADAMW]}
    return [group for group in (*groups, rest) if group["params"]]


@dataclass(frozen=True, slots=True)
class Division:
    """The named parameters of each path.

    Attributes:
        conda: those to project.
        adamw: the others.
        kernels: by id of those of ``conda`` that are kernels to see as matrices, into how many
            groups their channels are divided.
        unmatched: the patterns that match no parameter.
    """

    conda: list[tuple[str, Tensor]]
    adamw: list[tuple[str, Tensor]]
    kernels: dict[int, int]
    unmatched: list[str]


@dataclass(frozen=True, slots=True)
class Way:
    """How weights of a group are seen: cut into rows of parts or not, as kernels or not."""

    splits: tuple[int, ...] | None
    kernels: bool

    def keys(self, rule: str = CONDA) -> dict[str, Any]:
        """The keys of a group of such weights."""
        seen = {"kernels": True} if self.kernels else {}
        return {"algorithm": rule, "splits": self.splits, **seen}


def split(
    division: Division, splits: Mapping[str, int | Sequence[int]]
) -> tuple[dict[Way, list[tuple[str, Tensor]]], list[str]]:
    """The weights of the conda path by how they are seen, those that stay whole first.

    Args:
        division: the parameters.
        splits: as of :func:`param_groups`.

    Returns:
        The weights, and the patterns that match none of them.

    Raises:
        TypeError: splits of the wrong type.
        ValueError: a matching weight has other rows, or is a kernel with groups.
    """
    ways: dict[Way, list[tuple[str, Tensor]]] = {Way(None, False): []}
    matched = set[str]()
    if not isinstance(splits, Mapping):
        raise TypeError(f"splits must be a dict of patterns and rows, got {splits!r}")
    for name, param in division.conda:
        hits = [pattern for pattern in splits if fnmatchcase(clean_name(name), pattern)]
        matched.update(hits)
        channel_groups = division.kernels.get(id(param))
        rows = None
        if hits and channel_groups not in (None, 1):
            raise ValueError(
                f"{clean_name(name)}: splits pattern {hits[0]!r} matches a kernel whose channels "
                f"are in {channel_groups} groups, each a matrix of its own already; leave it out"
            )
        if hits:
            rows = _rows(clean_name(name), param, splits[hits[0]], channel_groups is not None)
        elif channel_groups is not None and channel_groups > 1:
            rows = (param.shape[0] // channel_groups,) * channel_groups
        ways.setdefault(Way(rows, channel_groups is not None), []).append((name, param))
    return ways, [pattern for pattern in splits if pattern not in matched]


def _rows(
    name: str, param: Tensor, rule: int | Sequence[int], kernel: bool = False
) -> tuple[int, ...]:
    rows = param.shape[0 if kernel else -2]
    if not isinstance(rule, int) or isinstance(rule, bool):
        check_splits(name, param, rule, kernel)
        return tuple(rule)  # type: ignore[arg-type]
    if rule < 1 or rows % rule:
        raise ValueError(f"{name}: {rows} rows cannot be split into {rule} equal parts")
    return (rows // rule,) * rule


def divide(
    model: nn.Module, conda: Sequence[str], adamw: Sequence[str], *, kernels: bool = False
) -> Division:
    """The named parameters of each path.

    For models of which only a part is here, such as a pipeline stage: there neither an empty path
    nor a pattern without a match is an error yet. See :func:`param_groups` for the arguments.

    Raises:
        TypeError: patterns are a text instead of a list.
        ValueError: a conda pattern matches a parameter that is no matrix, or a kernel cannot be
            seen as one.
    """
    return assign(list(model.named_parameters()), kinds(model), conda, adamw, kernels=kernels)


def assign(
    named: Sequence[tuple[str, Tensor]],
    known: Mapping[int, Kind],
    conda: Sequence[str],
    adamw: Sequence[str],
    *,
    kernels: bool = False,
) -> Division:
    """The named parameters of each path.

    Args:
        named: names with parameters, or with anything of their shapes.
        known: what their modules say of them, by id; see :func:`conda_dist.layer_kinds.kinds`.
        conda: see :func:`param_groups`.
        adamw: see :func:`param_groups`.
        kernels: see :func:`param_groups`.

    Raises:
        TypeError: patterns are a text instead of a list.
        ValueError: see :func:`divide`.
    """
    for side, patterns in (("conda", conda), ("adamw", adamw)):
        if isinstance(patterns, str):
            raise TypeError(f"{side} must be a list of patterns, got the text {patterns!r}")
    division = Division([], [], {}, [])
    for name, param in named:
        kind = known.get(id(param))
        found = decide(name, param, kind)
        chosen = found.algorithm
        kernel = found.reason == KERNEL if kind is None else kind.kernel
        forced = _matches(name, conda) and not _matches(name, adamw)
        if forced or (kernels and found.reason == KERNEL and not _matches(name, adamw)):
            check_matrix(clean_name(name), param)
            chosen = CONDA
            if kernel:
                chosen = _kernel_path(clean_name(name), param, kind or Kind(), forced)
                division.kernels[id(param)] = 1 if kind is None else kind.groups
        if _matches(name, adamw):
            chosen = ADAMW
        (division.conda if chosen == CONDA else division.adamw).append((name, param))
    names = [clean_name(name) for name, _ in named]
    patterns = (*conda, *adamw)
    division.unmatched.extend(p for p in patterns if not any(fnmatchcase(n, p) for n in names))
    return division


def _kernel_path(name: str, param: Tensor, kind: Kind, forced: bool) -> str:
    """The path of a kernel that is to be seen as a matrix, or as one for each of its groups.

    Raises:
        ValueError: it cannot be.
    """
    leave = f'keep it with adamw: param_groups(model, adamw=["{name}"])'
    if kind.transposed:
        raise ValueError(
            f"{name}: the kernel {tuple(param.shape)} of a transposed convolution has its outputs "
            f"in dimension 1, and cannot be seen as a matrix (out, in * k * k); {leave}."
        )
    check_kernel(name, param)
    rows, columns = as_matrix(tuple(param.shape))
    if min(rows // kind.groups, columns) < 2:
        if not forced:
            return ADAMW
        raise ValueError(
            f"{name}: a kernel {tuple(param.shape)} in {kind.groups} groups has a vector for each, "
            f"not a matrix; {leave}."
        )
    return CONDA


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(clean_name(name), pattern) for pattern in patterns)


def check_kernel(name: str, param: Tensor) -> None:
    """Refuses a kernel whose elements are not in memory row by row, as those of a matrix are.

    Raises:
        ValueError: it is channels_last, or not contiguous otherwise.
    """
    if not param.is_contiguous():
        raise ValueError(
            f"{name}: the kernel {tuple(param.shape)} has strides {param.stride()}, as "
            "channels_last gives it, and only a contiguous one can be seen as a matrix. Use "
            "model.to(memory_format=torch.contiguous_format) (inputs may be channels_last), or "
            "keep it with adamw."
        )


def check_matrix(name: str, param: Tensor, path: str = CONDA) -> None:
    """Refuses what is no matrix for a path that takes matrices.

    Raises:
        ValueError: fewer than two dimensions, or no elements.
    """
    if param.ndim < 2 or param.numel() == 0:
        raise ValueError(
            f"{name}: a parameter of shape {tuple(param.shape)} cannot take the {path} path, which "
            'takes matrices; put it in a group with algorithm="adamw".'
        )


def check_splits(name: str, param: Tensor, splits: Any, kernel: bool = False) -> None:
    """Refuses what cannot be cut into these blocks of rows.

    Args:
        name: the parameter's name.
        param: the parameter.
        splits: rows of the parts.
        kernel: whether it is seen as a matrix (out, in * k * k).

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
    shape = as_matrix(param.shape) if kernel and param.ndim > 2 else tuple(param.shape)
    if shape[-2] % sum(splits) or len(shape) > 3:
        raise ValueError(
            f"{name}: splits {tuple(splits)} make {sum(splits)} rows, but the weight is "
            f"{shape}: they must be all rows, or a block that repeats down all rows, "
            "of a matrix or of each matrix of a three-dimensional weight."
        )


def doubt(named: Sequence[tuple[str, Tensor]]) -> str | None:
    """The warning for weights whose names do not tell what they are, if there are any.

    Args:
        named: the parameters that take the path of their names.
    """
    shapes = {clean_name(name): tuple(param.shape) for name, param in named}
    projected = {clean_name(n) for n, param in named if route(n, param).algorithm == CONDA}
    found = doubtful(shapes, projected)
    if not found:
        return None
    listed = ", ".join(found[:5]) + (", ..." if len(found) > 5 else "")
    return (
        f"{len(found)} matrices have names that do not tell whether they are embeddings, output "
        f"heads, routers or projections: {listed}. Use conda_dist.param_groups(model), which looks "
        "at the modules, or give their group an algorithm."
    )


TAKE_KERNELS = "param_groups(model, kernels=True) sees convolution kernels as matrices"
NO_MATRIX = "None of them is a matrix to project: use AdamW"


def nothing_to_project(
    named: Sequence[tuple[str, Tensor]], how: str | None = None, path: str = CONDA
) -> str:
    """The error for a model none of whose matrices would reach a rule's path; ``how`` to mend."""
    of_rule = "" if path == CONDA else f", rule={path!r}"
    own = how is not None
    how = how or (
        f'Name weights with param_groups(model, conda=["pattern"]{of_rule}) or give their group '
        f'algorithm="{path}"'
    )
    reasons = [route(name, param).reason for name, param in named]
    listed = [
        f"{clean_name(name)} {tuple(param.shape)}"
        f"{'' if param.requires_grad else ', frozen'}: {reason}"
        for (name, param), reason in zip(named[:8], reasons, strict=False)
    ]
    # What cannot be a matrix is refused where it is named as one.
    able = [
        param.requires_grad
        for (_, param), reason in zip(named, reasons, strict=True)
        if len(param.shape) > 1 and reason not in (KERNEL, VECTOR)
    ]
    advice = [how] if any(able) else []
    advice += [TAKE_KERNELS] if KERNEL in reasons and not own else []
    advice += ["Let weights that are matrices require gradients"] if able and not any(able) else []
    advice = advice or [NO_MATRIX + ("" if own else ', or a group with algorithm="adamw"')]
    return (
        f"no trainable matrix would reach the {path} path, so this would be AdamW under another "
        f"name. Found {len(named)} parameters: {'; '.join(listed)}"
        f"{'; ...' if len(named) > 8 else ''}. {'. '.join(advice)}."
    )
