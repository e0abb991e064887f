"""Every option of Conda, declared once: name, type, default, bounds and a line of help.

DeepSpeed's JSON, torchtitan's config and the job's TOML are made from :data:`OPTIONS`. The
constructor's signature and docstring and the README's table are written, and tested against it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from numbers import Real
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import torch

LARGEST = 1e30
"""Float32 kernels divide numbers by a bias correction; larger ones could overflow there."""

FLOATS = ("float64", "float32", "bfloat16")
"""float16 is not among them: it overflows above 65504 and loses the squares of small gradients."""

COPIES = 5
"""How many copies of one bucket a step holds: a bucket arrives (packed and received), one is
computed, and one leaves (packed and received). Measured in tests/plan/test_memory.py."""


def _about(help: str, **bounds: Any) -> dict[str, Any]:
    """Declares a field as an option; ``bounds`` are other attributes of :class:`Option`."""
    return {"help": help, **bounds}


@dataclass(frozen=True, slots=True)
class GroupOptions:
    """The options that a parameter group may set for itself. torch calls them hyperparameters."""

    lr: float = field(default=1e-2, metadata=_about("learning rate of all parameters", least=0))
    betas: tuple[float, float] = field(
        default=(0.9, 0.99), metadata=_about("decay of the two moments", least=0, below=1)
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
        default=2000, metadata=_about("steps between two refreshes of a basis", least=1)
    )
    correct_bias: bool = field(
        default=True, metadata=_about("divide moments by 1 - beta^t, as Adam does")
    )


@dataclass(frozen=True, slots=True)
class Options:
    """The options of a whole optimizer. Dtypes may be given by name.

    Raises:
        TypeError: a value has the wrong type.
        ValueError: a value is out of range, or two values contradict each other.
    """

    refresh_method: str = field(
        default="svd",
        metadata=_about(
            "how a basis is refreshed",
            choices=("svd", "orthogonal_iteration", "eigh64"),
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
        metadata=_about("bytes of a rank for bases that all ranks hold; None: no limit", least=0),
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
        metadata=_about("half of the bytes that a step may hold in buffers", least=1),
    )

    @property
    def product_dtype(self) -> torch.dtype | None:
        """Dtype of the operands of a step's two products; None: the basis's."""
        return dtype_of("float32") if self.matmul_dtype == "tf32" else self.matmul_dtype

    @property
    def tf32(self) -> bool:
        """Whether CUDA may round the operands of a step's two products to TF32."""
        return self.matmul_dtype == "tf32"

    @property
    def is_async(self) -> bool:
        """Whether refreshes after the first are decomposed in the background."""
        return self.refresh_delay > 0

    @property
    def task_bytes(self) -> int:
        """Most bytes that one task holds on a rank, so that a step holds 2 * ``buffer_bytes``."""
        return 2 * self.buffer_bytes // COPIES

    def __post_init__(self) -> None:
        for name in _names(type(self)):
            object.__setattr__(self, name, OPTIONS[name].check(getattr(self, name)))
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
        name: its name, the same everywhere.
        type: the type of its value: float, int, bool, str, or a tuple of floats. Of an option with
            ``choices`` str.
        default: its default.
        help: one line.
        least: the smallest value, or the smallest of each item.
        below: what the value, or each item, must be less than.
        choices: the names that it accepts.
        is_dtype: whether the names are those of dtypes, which it accepts, too.
        optional: whether None is a value.
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

    @property
    def config_type(self) -> Any:
        """The type that a configuration file or a command line has for it: dtypes are names."""
        kind: Any = Literal.__getitem__(self.choices) if self.choices else self.type
        return kind | None if self.optional else kind

    def check(self, value: Any, where: str = "", *, least: float | None = None) -> Any:
        """Checks a value.

        Args:
            value: the value; a dtype, or its name.
            where: what errors put before the option's name.
            least: replaces the declared bound.

        Returns:
            The value; a dtype for a dtype's name.

        Raises:
            TypeError: the value has the wrong type.
            ValueError: it is out of range.
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
        spelled = value
        if self.is_dtype:
            spelled = str(value).removeprefix("torch.")  # of a dtype
        if not isinstance(spelled, str) or spelled not in self.choices:
            none = " or None" if self.optional else ""
            raise ValueError(
                f"{name} must be one of {', '.join(self.choices)}{none}; got {value!r}"
            )
        return dtype_of(spelled) if self.is_dtype and spelled != "tf32" else spelled


def check_number(name: str, value: Any, *, least: float = 0.0, below: float | None = None) -> None:
    """Refuses what is no number, or out of its range.

    Raises:
        TypeError: it is no number.
        ValueError: it is out of its range.
    """
    if not isinstance(value, Real) or isinstance(value, bool):
        raise TypeError(f"{name} must be a number, got {value!r}")
    most = math.inf if below is None else below
    if not least <= value < most or value > LARGEST:  # type: ignore[operator]
        bound = "at least 0" if not least else "a number"
        limit = " and finite" if below is None else f" and below {below:g}"
        raise ValueError(f"{name} must be {bound}{limit}, got {value}")


def dtype_of(name: str) -> torch.dtype:
    """The dtype of that name. torch is imported here: commands check options without it."""
    import torch

    dtype: torch.dtype = getattr(torch, name)
    return dtype


def _names(cls: Any) -> list[str]:
    return [each.name for each in fields(cls)]


def _declared(cls: Any) -> dict[str, Option]:
    """The options that the fields of a class declare. Their annotations are for readers."""
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
"""By name, the options that a parameter group may set for itself."""

OPTIONS = {**GROUP_OPTIONS, **_declared(Options)}
"""By name, all options that a configuration can give. The constructor alone also takes a
``process_group``, which is no value of a file."""

REFRESH_METHODS = OPTIONS["refresh_method"].choices
