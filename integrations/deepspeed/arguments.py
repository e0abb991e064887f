"""Layer: integrations. What a DeepSpeed JSON may say about Conda, checked."""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from conda_dist.options import GROUP_OPTIONS, OPTIONS, Options
from conda_dist.parameter_groups import check_hyperparameters
from conda_dist.routing import Division, clean_name, split

PATTERNS = ("conda_params", "adamw_params")
SPLITS = "splits"

NEAR = 0.8
"""How similar (from 0 to 1, as difflib counts) a known name must be to be suggested."""

ADAMS = "Adam's: leave it out"
FOREIGN = {
    **dict.fromkeys(
        (
            *("torch_adam", "adam_w_mode", "adamw_mode", "fp32_optimizer_states", "amsgrad"),
            *("fused", "foreach", "maximize", "capturable", "differentiable", "set_grad_none"),
            *("eps_inside_sqrt", "freeze_step", "cuda_aware", "comm_backend_name"),
            *("var_freeze_step", "var_update_scaler", "local_step_scaler", "local_step_clipper"),
        ),
        ADAMS,
    ),
    "bias_correction": f"{ADAMS}, or say correct_bias",
    "max_grad_norm": f"{ADAMS}, and give DeepSpeed's own gradient_clipping",
    **dict.fromkeys(
        (
            *("max_coeff", "min_coeff", "coeff_beta"),
            *("factor_max", "factor_min", "factor_threshold"),
        ),
        "LAMB's: leave it out",
    ),
    **dict.fromkeys(
        ("momentum", "dampening", "nesterov", "ns_method", "muon_lr", "adam_lr"),
        "SGD's or Muon's: leave it out",
    ),
}
"""Keys of published optimizer blocks that Conda lacks: whose they are, and what to do."""

FILLED = ("lr", "betas", "eps", "weight_decay")
"""The keys whose "auto" Hugging Face's Trainer replaces by a value."""


@dataclass(frozen=True, slots=True)
class Arguments:
    """What an optimizer was asked for.

    Attributes:
        defaults: hyperparameters of its groups.
        options: what holds for the whole optimizer.
        conda: patterns (as of :mod:`fnmatch`) of names to project whatever their names say.
        adamw: patterns of names to keep off the conda path.
        splits: patterns of fused weights with the rows of their parts, or how many equal ones.
    """

    defaults: dict[str, Any]
    options: Options
    conda: tuple[str, ...]
    adamw: tuple[str, ...]
    splits: Mapping[str, int | Sequence[int]]


def parse(given: Mapping[str, Any], where: str = "") -> Arguments:
    """Checks the "params" of an optimizer's JSON.

    Args:
        given: the params.
        where: what to call their place in errors.

    Raises:
        TypeError: a value is of the wrong type.
        ValueError: there is no such key, or a value is out of its range.
    """
    try:
        return _parse(given)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{where}{error}") from None


def _parse(given: Mapping[str, Any]) -> Arguments:
    _refuse_keys(given, [*OPTIONS, *PATTERNS, SPLITS])
    defaults = {name: given.get(name, option.default) for name, option in GROUP_OPTIONS.items()}
    check_hyperparameters(defaults)
    own = OPTIONS.keys() - GROUP_OPTIONS.keys()
    options = Options(**{name: value for name, value in given.items() if name in own})
    _refuse(options)
    if isinstance(defaults["lr"], torch.Tensor):
        raise TypeError("lr must be a number: DeepSpeed's schedulers set it anew")
    defaults["betas"] = tuple(defaults["betas"])  # JSON has lists only
    conda, adamw = (_patterns(name, given.get(name, ())) for name in PATTERNS)
    splits = given.get(SPLITS) or {}
    if not isinstance(splits, Mapping):
        raise TypeError(f"splits must be a dict of patterns and rows, got {splits!r}")
    return Arguments(defaults, options, conda, adamw, splits)


def _refuse_keys(given: Mapping[str, Any], known: Sequence[str]) -> None:
    """Refuses unknown keys, and values "auto" that nobody has replaced.

    Raises:
        ValueError: there are some. The message names all of them, in their order.
    """
    unknown = [key for key in given if key not in known]
    if unknown:
        said = ", ".join(f"{key!r}{describe(key, known)}" for key in unknown)
        lost = not all(describe(key, known) for key in unknown)
        takes = f" It takes {', '.join(known)}." if lost else ""
        raise ValueError(f"Conda has no param {said}.{takes}")
    auto = [key for key, value in given.items() if value in ("auto", ["auto", "auto"])]
    if auto:
        raise ValueError(
            f'"auto" is the value of {", ".join(auto)}, and nobody has replaced it: Hugging Face\'s'
            f" Trainer does for {', '.join(FILLED)} alone, Accelerate for lr and weight_decay "
            "alone. Give a value, or leave the key out for Conda's own."
        )


def describe(key: str, known: Sequence[str]) -> str:
    """What is known of an unknown key, in parentheses: its owner, or the nearest known key."""
    if key in FOREIGN:
        return f" ({FOREIGN[key]})"
    near = difflib.get_close_matches(key, known, n=1, cutoff=NEAR)
    return f" (the nearest is {near[0]!r})" if near else ""


def cut(
    division: Division, splits: Mapping[str, int | Sequence[int]]
) -> dict[int, tuple[int, ...]]:
    """The rows of the parts of each weight, by its id; () if it stays whole.

    Raises:
        TypeError: splits of the wrong type.
        ValueError: a pattern matches nothing, or a weight cannot be cut that way; or a weight is a
            convolution kernel.
    """
    ways, unmatched = split(division, splits)
    if unmatched:
        raise ValueError(f"splits pattern {unmatched[0]!r} matches no parameter on the conda path")
    for name, weight in division.conda:
        if id(weight) in division.kernels:
            raise ValueError(
                f"{clean_name(name)}: a convolution kernel {tuple(weight.shape)} cannot take the "
                "conda path under DeepSpeed; take it out of conda_params"
            )
    by_rows = [(way.splits, weights) for way, weights in ways.items()]
    for rows, weights in by_rows:
        for name, weight in weights if rows else ():
            if weight.ndim != 2 or weight.shape[0] != sum(rows or ()):
                raise ValueError(
                    f"{clean_name(name)}: splits {rows} of a weight {tuple(weight.shape)} repeat, "
                    "and under DeepSpeed parts must be blocks of rows of a matrix that make up all "
                    "of it. Leave them out, or store the parts one after the other."
                )
    return {id(weight): rows or () for rows, weights in by_rows for _, weight in weights}


def _refuse(options: Options) -> None:
    """Refuses options that DeepSpeed's partitions do not support."""
    if options.refresh_delay:
        raise ValueError(
            f"refresh_delay {options.refresh_delay} is not supported under DeepSpeed, whose "
            "universal checkpoints would lose the pending refreshes: leave it out"
        )
    for name, neutral in (("second_moment_dtype", None), ("stochastic_rounding", False)):
        if getattr(options, name) != neutral:
            raise ValueError(
                f"{name} is not supported under DeepSpeed, whose partitions have both moments in "
                "one dtype, rounded to nearest: leave it out (state_dtype sets both)"
            )


def _patterns(name: str, value: Any) -> tuple[str, ...]:
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise TypeError(f"{name} must be a list of patterns of parameter names, got {value!r}")
    for pattern in value:
        if not isinstance(pattern, str):
            raise TypeError(f"{name} must be a list of texts, got {pattern!r} in it")
    return tuple(value)
