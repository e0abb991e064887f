"""Every option of Conda, declared once: name, type, default, bounds and a line of help.

DeepSpeed's JSON, torchtitan's config and the job's TOML are made from :data:`OPTIONS`. The
constructor's signature, its docstring and the table in conda_dist/README.md are written by hand,
and a test compares them with :data:`OPTIONS`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from numbers import Real
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import torch

LARGEST = 1e30
"""Upper bound of all numbers. Kernels divide hyperparameters by a bias correction in float32, and
larger numbers could overflow."""

FLOATS = ("float64", "float32", "bfloat16")
"""Dtypes of states. float16 overflows above 65504 and loses the squares of small gradients."""

PRESETS: dict[str, dict[str, Any]] = {
    "paper": {},
    "2026-11-draft": {
        "betas": (0.95, 0.98),
        "update_proj_gap": 5,
        "nesterov": True,
        "basis_source": "gradients",
        "refresh_method": "orthogonal_iteration",
    },
}
"""For each preset, the options whose values differ from the declared defaults, which are the
paper's (arXiv 2509.24218). A preset with a date has what trained better in ``launch/results``. It
never changes, and a better one gets a new name. A draft is being compared there, is not yet shown
to be better, and may change."""

COPIES = 5
"""How many buffers of a task's size a step holds: the gradients of the next task are sent (one) and
received (two), the current task is computed (three), and the updates of the last task are sent
(four) and received (five). ``tests/plan/test_memory.py`` measures this."""


def _about(help: str, **bounds: Any) -> dict[str, Any]:
    """A field's metadata that declares an option; ``bounds``: attributes of :class:`Option`."""
    return {"help": help, **bounds}


@dataclass(frozen=True, slots=True)
class GroupOptions:
    """The options that each parameter group may set, which torch calls hyperparameters."""

    lr: float = field(default=1e-2, metadata=_about("learning rate of all parameters", least=0))
    betas: tuple[float, float] = field(
        default=(0.9, 0.99),
        metadata=_about("decay rates of the two moments", least=0, below=1, by_preset=True),
    )
    eps: float = field(
        default=1e-8, metadata=_about("added to the square root of the second moment", least=0)
    )
    weight_decay: float = field(default=0.0, metadata=_about("decoupled weight decay", least=0))
    scale: float = field(
        default=0.25, metadata=_about("multiplies the update of projected weights", least=0)
    )
    adamw_scale: float = field(
        default=1.0,
        metadata=_about("multiplies the update of embeddings, head, norms and biases", least=0),
    )
    update_proj_gap: int = field(
        default=2000,
        metadata=_about("steps between two refreshes of a basis", least=1, by_preset=True),
    )
    correct_bias: bool = field(
        default=True, metadata=_about("divide moments by 1 - beta^t, as Adam does")
    )
    nesterov: bool = field(
        default=False,
        metadata=_about(
            "Nesterov's momentum: the moment is averaged with the gradient once more",
            by_preset=True,
        ),
    )


@dataclass(frozen=True, slots=True)
class Options:
    """The options of the whole optimizer. A dtype may be given by its name.

    ``preset`` is kept for reports. It has no effect here: see :func:`with_preset`.

    Raises:
        TypeError: a value has the wrong type.
        ValueError: a value is out of range, or two values contradict each other.
    """

    preset: str = field(
        default="paper",
        metadata=_about("the values of options that are not given", choices=tuple(PRESETS)),
    )
    basis_source: str = field(
        default="momentum",
        metadata=_about(
            "what bases are taken from", choices=("momentum", "gradients"), by_preset=True
        ),
    )
    refresh_method: str = field(
        default="svd",
        metadata=_about(
            "how a basis is refreshed",
            choices=("svd", "orthogonal_iteration", "eigh64"),
            by_preset=True,
        ),
    )
    refresh_delay: int = field(
        default=0,
        metadata=_about("0: a step waits for its refresh; N: bases change N steps later", least=0),
    )
    matmul_dtype: torch.dtype | Literal["tf32"] | None = field(
        default=None,
        metadata=_about(
            "precision of a step's two products; None: as the basis",
            choices=(*FLOATS, "tf32"),
            is_dtype=True,
        ),
    )
    basis_dtype: torch.dtype | None = field(
        default=None,
        metadata=_about(
            "dtype of bases; None: as the moments, at least float32", choices=FLOATS, is_dtype=True
        ),
    )
    basis_budget: int | None = field(
        default=4 * 2**30,
        metadata=_about("bytes on a rank for bases that all ranks copy; None: no limit", least=0),
    )
    state_dtype: torch.dtype | None = field(
        default=None,
        metadata=_about(
            "dtype of moments; None: as the parameter, at least float32",
            choices=FLOATS,
            is_dtype=True,
        ),
    )
    second_moment_dtype: torch.dtype | None = field(
        default=None,
        metadata=_about(
            "dtype of second moments; None: state_dtype",
            choices=(*FLOATS, "uint8"),
            is_dtype=True,
        ),
    )
    stochastic_rounding: bool = field(
        default=False,
        metadata=_about("round bfloat16 moments up or down in proportion, not to nearest"),
    )
    buffer_bytes: int = field(
        default=512 * 2**20,
        metadata=_about("half of the bytes that a step may use for buffers", least=1),
    )
    diagnostics_every: int = field(
        default=0,
        metadata=_about("steps between two collections of diagnostics; 0: never", least=0),
    )

    @property
    def product_dtype(self) -> torch.dtype | None:
        """Dtype of the operands of a step's two products; None: the dtype of the basis."""
        return dtype_of("float32") if self.matmul_dtype == "tf32" else self.matmul_dtype

    @property
    def tf32(self) -> bool:
        """Whether CUDA may round the operands of a step's two products to TF32."""
        return self.matmul_dtype == "tf32"

    @property
    def is_async(self) -> bool:
        """Whether all refreshes but the first are computed in the background."""
        return self.refresh_delay > 0

    @property
    def task_bytes(self) -> int:
        """Upper bound of a task's bytes on a rank, so that a step uses 2 * ``buffer_bytes``."""
        return 2 * self.buffer_bytes // COPIES

    def __post_init__(self) -> None:
        for name in _names(type(self)):
            object.__setattr__(self, name, OPTIONS[name].check(getattr(self, name)))
        if self.basis_source == "gradients" and self.is_async:
            raise ValueError(
                "bases from gradients are not refreshed in the background: set refresh_delay to 0, "
                'or basis_source to "momentum"'
            )
        dtypes = self.state_dtype, self.second_moment_dtype
        if self.stochastic_rounding and dtype_of("bfloat16") not in dtypes:
            raise ValueError(
                "stochastic_rounding rounds only bfloat16 moments, and there are none: give "
                'state_dtype="bfloat16" or second_moment_dtype="bfloat16"'
            )


@dataclass(frozen=True, slots=True)
class Option:
    """The declaration of one option.

    Attributes:
        name: its name, the same in the constructor and in all configuration files.
        type: the type of its value: float, int, bool, tuple[float, float], or str if it has
            ``choices``.
        default: its default.
        help: one line.
        least: inclusive lower bound of the value, or of each item of a tuple.
        below: exclusive upper bound of the value, or of each item of a tuple.
        choices: the allowed names.
        is_dtype: whether ``choices`` are names of dtypes; then the dtypes are allowed, too.
        optional: whether None is allowed.
        by_preset: whether a preset may set it. Then the constructor and configuration files have
            None in place of ``default``, which stands for the preset's value.
    """

    name: str
    type: Any
    default: Any
    help: str
    least: float | None = None
    below: float | None = None
    choices: tuple[str, ...] = ()
    is_dtype: bool = False
    optional: bool = False
    by_preset: bool = False

    @property
    def config_type(self) -> Any:
        """Its type in a configuration file or on a command line, where a dtype is a name."""
        kind: Any = Literal.__getitem__(self.choices) if self.choices else self.type
        return kind | None if self.optional or self.by_preset else kind

    @property
    def config_default(self) -> Any:
        """Its default in the constructor and in a configuration file."""
        return None if self.by_preset else self.default

    @property
    def config_help(self) -> str:
        """Its line of help in a configuration file or on a command line."""
        return f"{self.help}; none: the preset's" if self.by_preset else self.help

    def check(self, value: Any, where: str = "", *, least: float | None = None) -> Any:
        """Checks a value.

        Args:
            value: the value; a dtype may be given by its name.
            where: text that errors put before the option's name.
            least: replaces the declared lower bound.

        Returns:
            The value, with a dtype in place of its name.

        Raises:
            TypeError: the value has the wrong type.
            ValueError: the value is out of range.
        """
        name = f"{where}{self.name}"
        if self.type is float:
            least = self.least if least is None else least
            check_number(name, value, least=least or 0.0, below=self.below)
        elif self.choices:
            return self._choose(value, name)
        elif self.type is bool:
            if not isinstance(value, bool):
                raise TypeError(f"{name} must be a bool, got {value!r}")
        elif self.type == tuple[float, float]:
            if not isinstance(value, tuple | list) or len(value) != 2:
                raise TypeError(f"{name} must be a pair of numbers, got {value!r}")
            for i, item in enumerate(value):
                check_number(f"{name}[{i}]", item, least=self.least or 0.0, below=self.below)
        elif value is not None or not self.optional:
            if not isinstance(value, int) or isinstance(value, bool):
                raise TypeError(f"{name} must be an int, got {value!r}")
            if self.least is not None and value < self.least:
                raise ValueError(f"{name} must be at least {self.least:g}, got {value}")
        return value

    def _choose(self, value: Any, name: str) -> Any:
        if value is None and self.optional:
            return None
        chosen = str(value).removeprefix("torch.") if self.is_dtype else value
        if not isinstance(chosen, str) or chosen not in self.choices:
            none = " or None" if self.optional else ""
            raise ValueError(
                f"{name} must be one of {', '.join(self.choices)}{none}; got {value!r}"
            )
        return dtype_of(chosen) if self.is_dtype and chosen != "tf32" else chosen


def from_adamw() -> dict[str, float]:
    """The ``scale`` and ``adamw_scale`` with which Conda takes a learning rate tuned for AdamW.

    ``Conda(param_groups(model), lr=lr, weight_decay=weight_decay, **from_adamw())`` follows
    ``AdamW(model.parameters(), lr=lr, weight_decay=weight_decay)``: learning rate, its schedule
    and the decay ``lr * weight_decay`` stay as they are.

    The values are the paper's (arXiv 2509.24218). It trains LLaMA with AdamW at 1e-3, and with
    Conda at ``lr=1e-2`` and ``scale=0.25``: projected weights at 2.5 times AdamW's rate, all others
    at 10 times. They are a start for pretraining. For fine-tuning, start from ``scale=1.0`` and
    ``adamw_scale=1.0``, where updates have about the size of AdamW's.

    Returns:
        The two options, by name.
    """
    return {"scale": 2.5, "adamw_scale": 10.0}


def check_number(name: str, value: Any, *, least: float = 0.0, below: float | None = None) -> None:
    """Checks a number.

    Args:
        name: its name, for errors.
        value: the number.
        least: inclusive lower bound.
        below: exclusive upper bound; None: it must be finite.

    Raises:
        TypeError: it is not a real number.
        ValueError: it is out of range.
    """
    if not isinstance(value, Real) or isinstance(value, bool):
        raise TypeError(f"{name} must be a number, got {value!r}")
    most = math.inf if below is None else below
    if not least <= value < most or value > LARGEST:  # type: ignore[operator]
        bound = "at least 0" if not least else "a number"
        limit = " and finite" if below is None else f" and below {below:g}"
        raise ValueError(f"{name} must be {bound}{limit}, got {value}")


def dtype_of(name: str) -> torch.dtype:
    """The dtype with this name. It imports torch late: commands check options without torch."""
    import torch

    dtype: torch.dtype = getattr(torch, name)
    return dtype


def _names(cls: Any) -> list[str]:
    return [each.name for each in fields(cls)]


def _declared(cls: Any) -> dict[str, Option]:
    """The options that the fields of a class declare, by name.

    An option's type comes from the text of the annotation, because torch is not imported here.
    """
    kinds = {"float": float, "int": int, "bool": bool, "str": str}
    declared = {}
    for each in fields(cls):
        words = str(each.type).split(" | ")
        kind = tuple[float, float] if words[0].startswith("tuple") else kinds.get(words[0], str)
        optional = words[-1] == "None"
        declared[each.name] = Option(
            each.name, kind, each.default, optional=optional, **each.metadata
        )
    return declared


GROUP_OPTIONS = _declared(GroupOptions)
"""The options that each parameter group may set, by name."""

OPTIONS = {**GROUP_OPTIONS, **_declared(Options)}
"""All options that a configuration file can set, by name. The constructor also takes a
``process_group``, which a file cannot hold."""

REFRESH_METHODS = OPTIONS["refresh_method"].choices


def with_preset(given: Mapping[str, Any]) -> dict[str, Any]:
    """The given arguments, with the values of their ``preset`` for options that are not given.

    Args:
        given: arguments by name. An option that a preset may set counts as given unless it is None.

    Raises:
        ValueError: there is no such preset.
    """
    name = OPTIONS["preset"].check(given.get("preset", OPTIONS["preset"].default))
    values = {key: option.default for key, option in OPTIONS.items() if option.by_preset}
    values |= PRESETS[name]
    return {**given, **{k: value for k, value in values.items() if given.get(k) is None}}
