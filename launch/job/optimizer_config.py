"""The optimizers of the job: a section of the configuration for each, in one table.

A new one is a subclass of `Settings` and a line of `SECTIONS`. Nothing here imports torch.
"""

from __future__ import annotations

from dataclasses import dataclass, field, make_dataclass
from typing import Annotated, Any, ClassVar, Literal

from conda_dist.launch.job.key import LARGE, MOST, Key
from conda_dist.options import OPTIONS, Option

_Rate = Annotated[float, Key("peak learning rate of the blocks' matrices", gt=0, le=LARGE)]
_Decay = Annotated[float, Key("decoupled weight decay, lr times it of both parts", ge=0, le=LARGE)]
_Betas = Annotated[tuple[float, float], Key("decay of the two moments", ge=0, lt=1)]
_Momentum = Annotated[float, Key("decay of the momentum", ge=0, lt=1)]
_Iterations = Annotated[int, Key("Newton-Schulz iterations", ge=1, le=99)]
_Adjust = Annotated[
    Literal["original", "match_rms_adamw", "spectral_unclamped"],
    Key("how the rate follows a matrix's shape"),
]
_Beta = Annotated[float, Key("decay of the second moment", ge=0, lt=1)]
_Diagnostics = Annotated[int, Key(OPTIONS["diagnostics_every"].help, ge=0, le=MOST)]
_Eps = Annotated[float, Key("added to the square root of the second moment", gt=0, le=LARGE)]


@dataclass(frozen=True, slots=True)
class Settings:
    """What each optimizer has: it steps the blocks' matrices, and one AdamW all the rest.

    A subclass has the arguments of its class, by the names that they have there.
    """

    built_by: ClassVar[str]
    """The class that steps the matrices, as MODULE:NAME."""
    factor: ClassVar[str] = ""
    """The key that multiplies `lr` in the matrices' rate, if one does."""
    knows_shards: ClassVar[bool] = True
    """Whether the class steps sharded matrices (DTensors); else each rank has the whole model."""
    package: ClassVar[str] = ""
    """The optional package that has the class, if one does."""

    lr: _Rate = 1e-3
    adamw_scale: Annotated[
        float,
        Key("the rate of embeddings, head, norms and biases is lr times it", gt=0, le=LARGE),
    ] = 1.0
    weight_decay: _Decay = 0.0
    grad_clip: Annotated[float, Key("largest gradient norm; 0: no clipping", ge=0, le=1e30)] = 0.0


def _key(option: Option) -> Key:
    """An option of Conda as a key of the job, which refuses a rate of zero and very large ones."""
    positive = option.name in ("lr", "eps", "scale", "adamw_scale")
    most = LARGE if option.type is float else None
    least = None if positive else option.least
    return Key(option.help, ge=least, gt=0 if positive else None, le=most, lt=option.below)


_CondaOptions: Any = make_dataclass(
    "_CondaOptions",
    [(n, Annotated[o.config_type, _key(o)], o.default) for n, o in OPTIONS.items()],
    bases=(Settings,),
    frozen=True,
    slots=True,
)


@dataclass(frozen=True, slots=True)
class CondaConfig(_CondaOptions):  # type: ignore[misc]
    """All options of `conda_dist.options`; the defaults are the paper's (arXiv 2509.24218)."""

    built_by: ClassVar[str] = "conda_dist:Conda"
    factor: ClassVar[str] = "scale"


@dataclass(frozen=True, slots=True)
class AdamWConfig(Settings):
    """torch.optim.AdamW's keys."""

    built_by: ClassVar[str] = "torch.optim:AdamW"
    betas: _Betas = (0.9, 0.999)
    eps: _Eps = 1e-8


@dataclass(frozen=True, slots=True)
class MuonConfig(Settings):
    """conda_dist.Muon's keys."""

    built_by: ClassVar[str] = "conda_dist:Muon"
    momentum: _Momentum = 0.95
    ns_steps: _Iterations = 5
    adjust_lr_fn: _Adjust = "match_rms_adamw"
    diagnostics_every: _Diagnostics = 0


@dataclass(frozen=True, slots=True)
class NorMuonConfig(MuonConfig):
    """conda_dist.NorMuon's keys; the defaults are its own."""

    built_by: ClassVar[str] = "conda_dist:NorMuon"
    lr: _Rate = 0.02
    adjust_lr_fn: _Adjust = "original"
    beta2: _Beta = 0.95
    eps: _Eps = 1e-10


@dataclass(frozen=True, slots=True)
class NAMOConfig(Settings):
    """conda_dist.NAMO's keys; the defaults are the paper's (arXiv 2602.17080)."""

    built_by: ClassVar[str] = "conda_dist:NAMO"
    lr: _Rate = 1e-2
    weight_decay: _Decay = 0.1
    momentum: _Momentum = 0.95
    beta2: _Beta = 0.99
    eps: _Eps = 1e-8
    ns_steps: _Iterations = 5
    scale: Annotated[
        float, Key("multiplies the update, beside sqrt(max(m, n))", gt=0, le=LARGE)
    ] = 0.2
    diagnostics_every: _Diagnostics = 0


@dataclass(frozen=True, slots=True)
class NAMODConfig(NAMOConfig):
    """conda_dist.NAMO_D's keys; the defaults are the paper's."""

    built_by: ClassVar[str] = "conda_dist:NAMO_D"
    clamp: Annotated[
        float, Key("columns' factors lie between it and 1 over it, times their mean", gt=0, le=1)
    ] = 0.75


@dataclass(frozen=True, slots=True)
class AdafactorConfig(Settings):
    """torch.optim.Adafactor's keys; the rate is relative to the size of a matrix's elements."""

    built_by: ClassVar[str] = "torch.optim:Adafactor"
    knows_shards: ClassVar[bool] = False
    lr: _Rate = 1e-2
    d: Annotated[float, Key("largest root mean square of an update", ge=1, le=LARGE)] = 1.0


@dataclass(frozen=True, slots=True)
class SOAPConfig(Settings):
    """pytorch_optimizer.SOAP's keys (arXiv 2409.11321)."""

    built_by: ClassVar[str] = "pytorch_optimizer:SOAP"
    knows_shards: ClassVar[bool] = False
    package: ClassVar[str] = "pytorch_optimizer"
    lr: _Rate = 3e-3
    betas: _Betas = (0.95, 0.95)
    eps: _Eps = 1e-8
    precondition_frequency: Annotated[
        int, Key("steps between two refreshes of the bases", ge=1, le=MOST)
    ] = 10
    max_precondition_dim: Annotated[
        int, Key("a side of a matrix that is longer has no basis", ge=1, le=MOST)
    ] = 10_000


SECTIONS: dict[str, type[Settings]] = {
    "conda": CondaConfig,
    "adamw": AdamWConfig,
    "muon": MuonConfig,
    "normuon": NorMuonConfig,
    "namo": NAMOConfig,
    "namo_d": NAMODConfig,
    "adafactor": AdafactorConfig,
    "soap": SOAPConfig,
}
"""The optimizers: `optimizer.name`, and what is declared in `[optimizer.NAME]`."""

_REST = "of the AdamW that steps embeddings, head, norms and biases, of every optimizer"

_Sections: Any = make_dataclass(
    "_Sections",
    [
        ("name", Annotated[Literal[(*SECTIONS,)], Key("the optimizer to train with")], "conda"),
        (
            "adamw_betas",
            Annotated[tuple[float, float], Key(f"betas {_REST}", ge=0, lt=1)],
            (0.9, 0.99),
        ),
        ("adamw_eps", Annotated[float, Key(f"eps {_REST}", gt=0, le=LARGE)], 1e-8),
        *((name, section, field(default_factory=section)) for name, section in SECTIONS.items()),
    ],
    frozen=True,
    slots=True,
)


@dataclass(frozen=True, slots=True)
class OptimizerConfig(_Sections):  # type: ignore[misc]
    """Which optimizer, and the settings of each, so that one file serves a comparison.

    `optimizer.KEY` is short for `optimizer.NAME.KEY` of the chosen optimizer.
    """

    @property
    def chosen(self) -> Settings:
        """The settings of the optimizer that `name` selects."""
        settings: Settings = getattr(self, self.name)
        return settings

    @property
    def effective_rates(self) -> tuple[float, float]:
        """The chosen optimizer's peak rates: of the matrices, and of all the rest."""
        settings = self.chosen
        factor = getattr(settings, settings.factor) if settings.factor else 1.0
        return settings.lr * factor, settings.lr * settings.adamw_scale

    def keys_for_rates(self, matrices: float, rest: float) -> dict[str, float]:
        """The keys, with their values, that give the chosen optimizer these effective rates.

        Args:
            matrices: The peak rate of the matrices.
            rest: The peak rate of embeddings, head, norms and biases.
        """
        lr = matrices / self.effective_rates[0] * self.chosen.lr
        section = f"optimizer.{self.name}"
        return {f"{section}.lr": lr, f"{section}.adamw_scale": rest / lr}
