"""Which parameters take the conda path and which the adamw path.

The paper projects the two-dimensional weights inside attention and MLP blocks. Embeddings, the
output head, norms and biases take AdamW's step (arXiv 2509.24218, section 4). Three functions
choose the path: :func:`route` by name and shape, :func:`route_parameters` also by the modules and
by patterns that the user gives, and :func:`route_model` does the same for a module.
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
    kind_by_name,
    kinds_by_module,
)
from conda_dist.layer_kinds import clean_name as clean_name
from conda_dist.replaced_parameters import refuse_flat

CONDA, ADAMW = "conda", "adamw"
VECTOR = "a vector in two dimensions"
PathParameters = list[tuple[str, Tensor]]
"""(name, parameter) pairs."""


@dataclass(frozen=True, slots=True)
class Route:
    """The path of a parameter.

    Attributes:
        algorithm: "conda" or "adamw".
        reason: why, in words for the report: what kind of weight it is.
    """

    algorithm: str
    reason: str


def route(name: str | None, param: Tensor) -> Route:
    """Chooses a path by name and shape alone.

    Args:
        name: fully qualified name such as ``"layers.0.mlp.up_proj.weight"``; None if unknown, and
            then the shape alone decides.
        param: the parameter; only its shape is read.
    """
    shape = tuple(param.shape)
    if len(shape) < 2:
        return Route(ADAMW, f"{len(shape)}-D")
    if param.numel() == 0 or max(shape) == math.prod(shape):
        return Route(ADAMW, VECTOR)
    if name is not None and (kind := kind_by_name(clean_name(name), shape)):
        return Route(ADAMW, kind)
    if len(shape) > 3:
        return Route(ADAMW, KERNEL)
    if min(shape[-2:]) < 2:
        return Route(ADAMW, VECTOR)
    return Route(CONDA, MATRIX if len(shape) == 2 else BATCH)


def _route_with_kind(name: str, param: Tensor, kind: Kind | None) -> Route:
    """Chooses a path by name and shape, and by what the modules say about the parameter."""
    found = route(name, param)
    if kind is None or len(param.shape) < 2 or found.reason == VECTOR:
        return found
    # If the name already says why a kernel takes adamw (a patch embedding), keep that reason.
    if kind.reason and (kind.reason != KERNEL or found.algorithm == CONDA):
        return Route(ADAMW, kind.reason)
    if found.reason in kind.excluded and len(param.shape) <= 3:
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
    """Builds parameter groups for :class:`conda_dist.Conda` or another rule's optimizer.

    Matrices take the conda path, except embeddings, output heads and routers, which are known by
    their names and modules. Norms, biases, learned tokens, state-space parameters and convolution
    kernels take the adamw path. :func:`conda_dist.layer_kinds.kinds_by_module` says which modules
    are output heads. Call this after ``fully_shard`` and everything else that replaces parameters.
    A tied weight appears once, under its first name.

    Args:
        model: the module.
        conda: patterns (see :mod:`fnmatch`) of parameter names to put on the conda path in any
            case, such as ``"*.router.weight"``. A convolution kernel that matches is projected as
            with ``kernels``.
        adamw: patterns of parameter names to put on the adamw path. Wins over ``conda``.
        kernels: whether convolution kernels (out, in, k, k) take the conda path, too: each as one
            matrix (out, in * k * k), or as one matrix for each of its channel groups. Their state
            keeps the kernel's shape. Depthwise kernels stay on the adamw path.
        splits: patterns of fused weights, with the rows (dimension -2) of each part, such as
            ``{"*.qkv_proj.weight": (4096, 1024, 1024)}``, or the number of equal parts, such as
            ``{"*.gate_up_proj.weight": 2}``. If the rows sum to a fraction of the weight's rows,
            they repeat: ``(512, 128, 128)`` means 512 rows of queries, 128 of a key and 128 of a
            value, again and again, and all the queries are one part. Each part is a matrix with
            its own basis; the parameter stays whole. The first pattern that matches counts.
        rule: the path of the matrices, "conda", "muon", "normuon", "namo" or "namo_d".
        conda_options: hyperparameters of the groups of matrices, such as ``{"weight_decay": 0.1}``.
        adamw_options: hyperparameters of the adamw group, such as ``{"lr": 1e-3}``.

    Returns:
        Group dicts with named parameters: for the conda path one for each combination of splits
        and ``kernels`` that weights have, and one for the adamw path.

    Raises:
        TypeError: patterns or splits have the wrong type.
        ValueError: FSDP1 or ZeRO has made flat parameters; a pattern matches no parameter; a conda
            pattern matches a parameter that is no matrix; a splits pattern matches a weight with
            other rows, or one on the adamw path; a kernel cannot be seen as a matrix; or no
            trainable weight takes the conda path.
    """
    options = {CONDA: conda_options or {}, ADAMW: adamw_options or {}}
    for algorithm, chosen_options in options.items():
        reserved = {"params", "param_names", "algorithm", "splits", "kernels"}
        if refused := chosen_options.keys() & reserved:
            raise ValueError(f"{algorithm}_options cannot set {', '.join(sorted(refused))}")
    named = list(model.named_parameters())
    refuse_flat((clean_name(name), param, {}) for name, param in named)
    routed = route_model(model, conda, adamw, kernels=kernels)
    if routed.unmatched:
        raise ValueError(
            f"pattern {routed.unmatched[0]!r} matches no parameter of {type(model).__name__}; "
            f"names look like {', '.join(repr(clean_name(name)) for name, _ in named[:3])}"
        )
    if not any(param.requires_grad for _, param in routed.conda):
        raise ValueError(no_matrix_message(named, path=rule))
    by_view, unmatched = group_by_view(routed, splits or {})
    if unmatched:
        raise ValueError(
            f"splits pattern {unmatched[0]!r} matches no parameter on the conda path of "
            f"{type(model).__name__}"
        )
    groups = [
        {"params": p, **view.group_keys(rule), **options[CONDA]} for view, p in by_view.items()
    ]
    rest = {"params": routed.adamw, "algorithm": ADAMW, "splits": None, **options[ADAMW]}
    return [group for group in (*groups, rest) if group["params"]]


@dataclass(frozen=True, slots=True)
class RoutedParameters:
    """The named parameters of each path.

    Attributes:
        conda: the parameters on the conda path.
        adamw: all other parameters.
        kernels: for each parameter in ``conda`` that is a convolution kernel, by id: the number of
            its channel groups.
        unmatched: the patterns that match no parameter.
    """

    conda: PathParameters
    adamw: PathParameters
    kernels: dict[int, int]
    unmatched: list[str]


@dataclass(frozen=True, slots=True)
class MatrixView:
    """How the optimizer sees a weight as matrices.

    Attributes:
        splits: the rows of its parts, each of which is a matrix; None: it is not split.
        kernels: whether it is a convolution kernel, seen as a matrix (out, in * k * k).
    """

    splits: tuple[int, ...] | None
    kernels: bool

    def group_keys(self, rule: str = CONDA) -> dict[str, Any]:
        """The keys of a parameter group that holds such weights."""
        kernels = {"kernels": True} if self.kernels else {}
        return {"algorithm": rule, "splits": self.splits, **kernels}


def group_by_view(
    routed: RoutedParameters, splits: Mapping[str, int | Sequence[int]]
) -> tuple[dict[MatrixView, PathParameters], list[str]]:
    """Groups the weights of the conda path by how they are seen as matrices.

    Args:
        routed: the parameters.
        splits: see :func:`param_groups`.

    Returns:
        The weights by view, those that are not split first, and the patterns that match none.

    Raises:
        TypeError: splits have the wrong type.
        ValueError: a pattern matches a weight with other rows, or a kernel with channel groups.
    """
    by_view: dict[MatrixView, PathParameters] = {MatrixView(None, False): []}
    matched = set[str]()
    if not isinstance(splits, Mapping):
        raise TypeError(f"splits must be a dict of patterns and rows, got {splits!r}")
    for name, param in routed.conda:
        hits = [pattern for pattern in splits if fnmatchcase(clean_name(name), pattern)]
        matched.update(hits)
        channel_groups = routed.kernels.get(id(param))
        rows = None
        if hits and channel_groups not in (None, 1):
            raise ValueError(
                f"{clean_name(name)}: splits pattern {hits[0]!r} matches a kernel whose channels "
                f"are in {channel_groups} groups, each a matrix of its own already; leave it out"
            )
        if hits:
            rows = _part_rows(clean_name(name), param, splits[hits[0]], channel_groups is not None)
        elif channel_groups is not None and channel_groups > 1:
            rows = (param.shape[0] // channel_groups,) * channel_groups
        by_view.setdefault(MatrixView(rows, channel_groups is not None), []).append((name, param))
    return by_view, [pattern for pattern in splits if pattern not in matched]


def _part_rows(
    name: str, param: Tensor, splits: int | Sequence[int], kernel: bool
) -> tuple[int, ...]:
    """The rows of each part of a weight, from such rows or from the number of equal parts."""
    rows = param.shape[0 if kernel else -2]
    if not isinstance(splits, int) or isinstance(splits, bool):
        check_splits(name, param, splits, kernel)
        return tuple(splits)  # type: ignore[arg-type]
    if splits < 1 or rows % splits:
        raise ValueError(f"{name}: {rows} rows cannot be split into {splits} equal parts")
    return (rows // splits,) * splits


def route_model(
    model: nn.Module, conda: Sequence[str], adamw: Sequence[str], *, kernels: bool = False
) -> RoutedParameters:
    """Chooses a path for each parameter of a model, or of a part of one, such as a pipeline stage.

    Unlike :func:`param_groups`, it accepts an empty path and patterns that match no parameter:
    another part of the model may have the parameter. The arguments are those of
    :func:`param_groups`.

    Raises:
        TypeError: ``conda`` or ``adamw`` is a string instead of a list.
        ValueError: a conda pattern matches a parameter that is no matrix, or a kernel cannot be
            seen as a matrix.
    """
    named, kinds = list(model.named_parameters()), kinds_by_module(model)
    return route_parameters(named, kinds, conda, adamw, kernels=kernels)


def route_parameters(
    named: Sequence[tuple[str, Tensor]],
    kinds: Mapping[int, Kind],
    conda: Sequence[str],
    adamw: Sequence[str],
    *,
    kernels: bool = False,
) -> RoutedParameters:
    """Chooses a path for each of these parameters.

    Args:
        named: (name, parameter) pairs. Tensors on the meta device may stand for the parameters.
        kinds: what the modules say about them, by id, from
            :func:`conda_dist.layer_kinds.kinds_by_module`.
        conda: see :func:`param_groups`.
        adamw: see :func:`param_groups`.
        kernels: see :func:`param_groups`.

    Raises:
        TypeError: see :func:`route_model`.
        ValueError: see :func:`route_model`.
    """
    for argument, patterns in (("conda", conda), ("adamw", adamw)):
        if isinstance(patterns, str):
            raise TypeError(f"{argument} must be a list of patterns, got the text {patterns!r}")
    routed = RoutedParameters([], [], {}, [])
    for name, param in named:
        kind = kinds.get(id(param))
        found = _route_with_kind(name, param, kind)
        chosen = found.algorithm
        is_kernel = found.reason == KERNEL if kind is None else kind.kernel
        forced = _matches(name, conda) and not _matches(name, adamw)
        if forced or (kernels and found.reason == KERNEL and not _matches(name, adamw)):
            check_matrix(clean_name(name), param)
            chosen = CONDA
            if is_kernel:
                chosen = _kernel_path(clean_name(name), param, kind or Kind(), forced)
                routed.kernels[id(param)] = 1 if kind is None else kind.groups
        if _matches(name, adamw):
            chosen = ADAMW
        (routed.conda if chosen == CONDA else routed.adamw).append((name, param))
    names = [clean_name(name) for name, _ in named]
    patterns = (*conda, *adamw)
    routed.unmatched.extend(p for p in patterns if not any(fnmatchcase(n, p) for n in names))
    return routed


def _kernel_path(name: str, param: Tensor, kind: Kind, forced: bool) -> str:
    """The path of a kernel that patterns or ``kernels`` put on the conda path.

    It is adamw if the kernel has a vector for each channel group and no pattern forces it.

    Raises:
        ValueError: the kernel, or the part of it for each channel group, is no matrix.
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
    """Refuses a kernel that no view can turn into a matrix.

    Raises:
        ValueError: it is not contiguous, for example channels_last.
    """
    if not param.is_contiguous():
        raise ValueError(
            f"{name}: the kernel {tuple(param.shape)} has strides {param.stride()}, as in "
            "channels_last format, and only a contiguous kernel can be seen as a matrix. Use "
            "model.to(memory_format=torch.contiguous_format) (inputs may be channels_last), or "
            "keep it with adamw."
        )


def check_matrix(name: str, param: Tensor, path: str = CONDA) -> None:
    """Refuses a parameter that is no matrix, for a path that takes matrices.

    Raises:
        ValueError: it has fewer than two dimensions, or no elements.
    """
    if param.ndim < 2 or param.numel() == 0:
        raise ValueError(
            f"{name}: a parameter of shape {tuple(param.shape)} cannot take the {path} path, which "
            'takes matrices; put it in a group with algorithm="adamw".'
        )


def check_splits(name: str, param: Tensor, splits: Any, kernel: bool = False) -> None:
    """Refuses splits that do not fit a weight.

    Args:
        name: the parameter's name.
        param: the parameter.
        splits: the rows of each part.
        kernel: whether the parameter is seen as a matrix (out, in * k * k).

    Raises:
        TypeError: the splits are not a tuple or list of positive integers.
        ValueError: the weight's rows are no multiple of the sum of the splits, or the weight has
            more than three dimensions.
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


USE_KERNELS = "param_groups(model, kernels=True) sees convolution kernels as matrices"
NO_MATRIX = "None of them is a matrix to project: use AdamW"


def no_matrix_message(
    named: Sequence[tuple[str, Tensor]], advice: str | None = None, path: str = CONDA
) -> str:
    """The error for a model without a trainable matrix on a rule's path.

    Args:
        named: all parameters of the model.
        advice: how a user of this framework puts weights on the path; by default, how a user of
            :func:`param_groups` does.
        path: the rule's path.
    """
    of_rule = "" if path == CONDA else f", rule={path!r}"
    name_weights = advice or (
        f'Name weights with param_groups(model, conda=["pattern"]{of_rule}) or give their group '
        f'algorithm="{path}"'
    )
    reasons = [route(name, param).reason for name, param in named]
    listed = [
        f"{clean_name(name)} {tuple(param.shape)}"
        f"{'' if param.requires_grad else ', frozen'}: {reason}"
        for (name, param), reason in zip(named[:8], reasons, strict=False)
    ]
    trainable = [  # of the parameters that are matrices
        param.requires_grad
        for (_, param), reason in zip(named, reasons, strict=True)
        if len(param.shape) > 1 and reason not in (KERNEL, VECTOR)
    ]
    fixes = [name_weights] if any(trainable) else []
    if KERNEL in reasons and advice is None:
        fixes.append(USE_KERNELS)
    if trainable and not any(trainable):
        fixes.append("Let weights that are matrices require gradients")
    if not fixes:
        fixes.append(NO_MATRIX + (', or a group with algorithm="adamw"' if advice is None else ""))
    return (
        f"no trainable matrix would reach the {path} path, so this would be AdamW under another "
        f"name. Found {len(named)} parameters: {'; '.join(listed)}"
        f"{'; ...' if len(named) > 8 else ''}. {'. '.join(fixes)}."
    )
