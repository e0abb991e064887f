"""Layer: integrations. Checks the arguments of Conda in a DeepSpeed JSON."""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from conda_dist.options import GROUP_OPTIONS, OPTIONS, Options, with_preset
from conda_dist.parameter_groups import check_hyperparameters
from conda_dist.routing import RoutedParameters, clean_name, group_by_view

PATTERNS = ("conda_params", "adamw_params")
SPLITS = "splits"

NEAR = 0.8
"""Errors suggest a known name from this similarity on (difflib's ratio, 0 to 1)."""

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
        ("momentum", "dampening", "ns_method", "muon_lr", "adam_lr"),
        "SGD's or Muon's: leave it out",
    ),
}
"""Keys of other optimizers in published JSON files: whose they are, and what to do."""

FILLED = ("lr", "betas", "eps", "weight_decay")
"""The keys for which Hugging Face's Trainer replaces "auto" by a value."""


@dataclass(frozen=True, slots=True)
class Arguments:
    """The checked arguments of an optimizer.

    Attributes:
        defaults: default hyperparameters of its groups.
        options: the options of the whole optimizer.
        conda: patterns (see :mod:`fnmatch`) of names of parameters for the conda path.
        adamw: patterns of names of parameters for the adamw path.
        splits: patterns of fused weights, with the rows of each part or the number of equal parts.
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
        where: text that errors begin with.

    Raises:
        TypeError: a value has the wrong type.
        ValueError: a key is unknown, or a value is out of range.
    """
    try:
        return _parse(given)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{where}{error}") from None


def _parse(given: Mapping[str, Any]) -> Arguments:
    _refuse_keys(given, [*OPTIONS, *PATTERNS, SPLITS])
    given = with_preset(given)
    defaults = {name: given.get(name, option.default) for name, option in GROUP_OPTIONS.items()}
    check_hyperparameters(defaults)
    own = OPTIONS.keys() - GROUP_OPTIONS.keys()
    options = Options(**{name: value for name, value in given.items() if name in own})
    _refuse_unsupported(options)
    if isinstance(defaults["lr"], torch.Tensor):
        raise TypeError("lr must be a number: DeepSpeed's schedulers set it anew")
    defaults["betas"] = tuple(defaults["betas"])  # JSON has lists only
    conda, adamw = (_patterns(name, given.get(name, ())) for name in PATTERNS)
    splits = given.get(SPLITS) or {}
    if not isinstance(splits, Mapping):
        raise TypeError(f"splits must be a dict of patterns and rows, got {splits!r}")
    return Arguments(defaults, options, conda, adamw, splits)


def _refuse_keys(given: Mapping[str, Any], known: Sequence[str]) -> None:
    """Refuses unknown keys, and the value "auto" if no framework has replaced it.

    Raises:
        ValueError: there are such keys. The message names all of them in their order.
    """
    unknown = [key for key in given if key not in known]
    if unknown:
        hints = [describe_key(key, known) for key in unknown]
        named = ", ".join(f"{key!r}{hint}" for key, hint in zip(unknown, hints, strict=True))
        takes = "" if all(hints) else f" It takes {', '.join(known)}."
        raise ValueError(f"Conda has no param {named}.{takes}")
    auto = [key for key, value in given.items() if value in ("auto", ["auto", "auto"])]
    if auto:
        raise ValueError(
            f'"auto" is the value of {", ".join(auto)}, and nobody has replaced it: Hugging Face\'s'
            f" Trainer replaces it only for {', '.join(FILLED)}, Accelerate only for lr and "
            "weight_decay. Give a value, or leave the key out for Conda's default."
        )


def describe_key(key: str, known: Sequence[str]) -> str:
    """A hint for an unknown key, in parentheses: its optimizer, or the nearest known key, or ""."""
    if key in FOREIGN:
        return f" ({FOREIGN[key]})"
    near = difflib.get_close_matches(key, known, n=1, cutoff=NEAR)
    return f" (the nearest is {near[0]!r})" if near else ""


def part_rows(
    routed: RoutedParameters, splits: Mapping[str, int | Sequence[int]]
) -> dict[int, tuple[int, ...]]:
    """The rows of each part of each weight on the conda path, by its id; () if it is not split.

    Args:
        routed: the parameters.
        splits: see :class:`Arguments`.

    Raises:
        TypeError: splits have the wrong type.
        ValueError: a pattern matches no weight; a weight has other rows, or splits that repeat; or
            a weight is a convolution kernel.
    """
    by_view, unmatched = group_by_view(routed, splits)
    if unmatched:
        raise ValueError(f"splits pattern {unmatched[0]!r} matches no parameter on the conda path")
    for name, weight in routed.conda:
        if id(weight) in routed.kernels:
            raise ValueError(
                f"{clean_name(name)}: a convolution kernel {tuple(weight.shape)} cannot take the "
                "conda path under DeepSpeed; take it out of conda_params"
            )
    by_rows = [(view.splits, weights) for view, weights in by_view.items()]
    for rows, weights in by_rows:
        for name, weight in weights if rows else ():
            if weight.ndim != 2 or weight.shape[0] != sum(rows or ()):
                raise ValueError(
                    f"{clean_name(name)}: splits {rows} of a weight {tuple(weight.shape)} repeat. "
                    "Under DeepSpeed a split weight must be a matrix, and each part one block of "
                    "its rows. Leave the splits out, or store the parts one after the other."
                )
    return {id(weight): rows or () for rows, weights in by_rows for _, weight in weights}


def _refuse_unsupported(options: Options) -> None:
    """Refuses options that DeepSpeed's partitions do not support.

    Raises:
        ValueError: there is one.
    """
    if options.refresh_delay:
        raise ValueError(
            f"refresh_delay {options.refresh_delay} is not supported under DeepSpeed, whose "
            "universal checkpoints would lose the pending refreshes: leave it out"
        )
    for name, neutral in (("second_moment_dtype", None), ("stochastic_rounding", False)):
        if getattr(options, name) != neutral:
            raise ValueError(
                f"{name} is not supported under DeepSpeed, whose partitions store both moments in "
                "one dtype, rounded to nearest: leave it out (state_dtype sets both)"
            )


def _patterns(name: str, value: Any) -> tuple[str, ...]:
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise TypeError(f"{name} must be a list of patterns of parameter names, got {value!r}")
    for pattern in value:
        if not isinstance(pattern, str):
            raise TypeError(f"{name} must be a list of texts, got {pattern!r} in it")
    return tuple(value)
