"""The optimizers of the job: a section of the configuration for each, in one table.

A new one is a subclass of `Settings` and a line of `SECTIONS`. Nothing here imports torch.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from annotated_types import Interval
from pydantic import Field, create_model

from conda_dist.launch.job.section import (
    LARGE,
    LONGEST,
    NULL,
    Betas,
    Count,
    Decay,
    Norm,
    NotNegative,
    Positive,
    Section,
    Size,
    SmallPositive,
)
from conda_dist.options import OPTIONS, Option, with_preset

_Rate = Annotated[Positive, Field(description="peak learning rate of the blocks' matrices")]
_WeightDecay = Annotated[
    NotNegative, Field(description="decoupled weight decay, lr times it of both parts")
]
_Betas = Annotated[Betas, Field(description="decay of the two moments")]
_Momentum = Annotated[Decay, Field(description="decay of the momentum")]
_Beta = Annotated[Decay, Field(description="decay of the second moment")]
_Eps = Annotated[Positive, Field(description="added to the square root of the second moment")]
_Iterations = Annotated[int, Interval(ge=1, le=99), Field(description="Newton-Schulz iterations")]
_Adjust = Annotated[
    Literal["original", "match_rms_adamw", "spectral_unclamped"],
    Field(description="how the rate follows a matrix's shape"),
]
_Diagnostics = Annotated[Count, Field(description=OPTIONS["diagnostics_every"].help)]


class Settings(Section):
    """What each optimizer has: it steps the blocks' matrices, and one AdamW all the rest.

    A subclass has the arguments of its class, by the names that they have there.
    """

    built_by: ClassVar[str]  # the class that steps the matrices, as MODULE:NAME
    factor: ClassVar[str] = ""  # the key that multiplies `lr` in the matrices' rate, if one does
    # Whether the class steps sharded matrices (DTensors); else each rank has the whole model.
    knows_shards: ClassVar[bool] = True
    under_zero: ClassVar[bool] = False  # whether engine deepspeed takes it
    package: ClassVar[str] = ""  # the optional package that has the class, if one does

    lr: _Rate = 1e-3
    adamw_scale: Positive = 1.0
    """the rate of embeddings, head, norms and biases is lr times it"""
    weight_decay: _WeightDecay = 0.0
    grad_clip: Norm = 0.0
    """largest gradient norm; 0: no clipping"""

    @property
    def arguments(self) -> dict[str, Any]:
        """The arguments of the class, but for its groups; dtypes by name."""
        return self.model_dump(exclude={"grad_clip"})


def _field(option: Option) -> Any:
    """An option of Conda as a field; the job refuses a rate of zero and very large numbers."""
    positive = option.name in ("lr", "eps", "scale", "adamw_scale")
    bounds = Interval(
        gt=0 if positive else None,
        ge=None if positive else option.least,
        le=LARGE if option.type is float else LONGEST,
        lt=option.below,
    )
    kind: Any = Betas if option.name == "betas" else option.config_type
    if option.name != "betas" and option.least is not None:
        kind = Annotated[kind, bounds]
    if option.optional or option.by_preset:
        kind = Annotated[kind | None, NULL]
    return kind, Field(option.config_default, description=option.config_help)


_OWN: dict[str, Any] = {name: _field(option) for name, option in OPTIONS.items()}
_CondaOptions: Any = create_model("_CondaOptions", __base__=Settings, **_OWN)


class CondaConfig(_CondaOptions):  # type: ignore[misc]
    """All options of `conda_dist.options`. None stands for the preset's value."""

    built_by: ClassVar[str] = "conda_dist:Conda"
    factor: ClassVar[str] = "scale"
    under_zero: ClassVar[bool] = True

    def with_preset(self) -> CondaConfig:
        """The same with the preset's values in place of None."""
        filled: CondaConfig = self.model_copy(update=with_preset(self.model_dump()))
        return filled


class AdamWConfig(Settings):
    """torch.optim.AdamW's keys."""

    built_by: ClassVar[str] = "torch.optim:AdamW"
    under_zero: ClassVar[bool] = True
    betas: _Betas = (0.9, 0.999)
    eps: _Eps = 1e-8


class MuonConfig(Settings):
    """conda_dist.Muon's keys."""

    built_by: ClassVar[str] = "conda_dist:Muon"
    momentum: _Momentum = 0.95
    ns_steps: _Iterations = 5
    adjust_lr_fn: _Adjust = "match_rms_adamw"
    diagnostics_every: _Diagnostics = 0


class NorMuonConfig(MuonConfig):
    """conda_dist.NorMuon's keys; the defaults are its own."""

    built_by: ClassVar[str] = "conda_dist:NorMuon"
    lr: _Rate = 0.02
    adjust_lr_fn: _Adjust = "original"
    beta2: _Beta = 0.95
    eps: _Eps = 1e-10


class NAMOConfig(Settings):
    """conda_dist.NAMO's keys; the defaults are the paper's (arXiv 2602.17080)."""

    built_by: ClassVar[str] = "conda_dist:NAMO"
    lr: _Rate = 1e-2
    weight_decay: _WeightDecay = 0.1
    momentum: _Momentum = 0.95
    beta2: _Beta = 0.99
    eps: _Eps = 1e-8
    ns_steps: _Iterations = 5
    scale: Positive = 0.2
    """multiplies the update, beside sqrt(max(m, n))"""
    diagnostics_every: _Diagnostics = 0


class NAMODConfig(NAMOConfig):
    """conda_dist.NAMO_D's keys; the defaults are the paper's."""

    built_by: ClassVar[str] = "conda_dist:NAMO_D"
    clamp: SmallPositive = 0.75
    """columns' factors lie between it and 1 over it, times their mean"""


class AdafactorConfig(Settings):
    """torch.optim.Adafactor's keys; the rate is relative to the size of a matrix's elements."""

    built_by: ClassVar[str] = "torch.optim:Adafactor"
    knows_shards: ClassVar[bool] = False
    lr: _Rate = 1e-2
    d: Annotated[float, Interval(ge=1, le=LARGE)] = 1.0
    """largest root mean square of an update"""


class SOAPConfig(Settings):
    """pytorch_optimizer.SOAP's keys (arXiv 2409.11321)."""

    built_by: ClassVar[str] = "pytorch_optimizer:SOAP"
    knows_shards: ClassVar[bool] = False
    package: ClassVar[str] = "pytorch_optimizer"
    lr: _Rate = 3e-3
    betas: _Betas = (0.95, 0.95)
    eps: _Eps = 1e-8
    precondition_frequency: Size = 10
    """steps between two refreshes of the bases"""
    max_precondition_dim: Size = 10_000
    """a side of a matrix that is longer has no basis"""


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

_EACH: dict[str, Any] = {name: (kind, kind()) for name, kind in SECTIONS.items()}
_Sections: Any = create_model("_Sections", __base__=Section, **_EACH)


class OptimizerConfig(_Sections):  # type: ignore[misc]
    """Which optimizer, and the settings of each, so that one file serves a comparison.

    `optimizer.KEY` is short for `optimizer.NAME.KEY` of the chosen optimizer.
    """

    name: Literal[(*SECTIONS,)] = "conda"  # type: ignore[valid-type]
    """the optimizer to train with"""
    adamw_betas: Betas = (0.9, 0.99)
    """betas of the AdamW that steps embeddings, head, norms and biases, of every optimizer"""
    adamw_eps: Positive = 1e-8
    """eps of the same"""

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
        """The keys, with values, that give the chosen optimizer these effective peak rates."""
        lr = matrices / self.effective_rates[0] * self.chosen.lr
        section = f"optimizer.{self.name}"
        return {f"{section}.lr": lr, f"{section}.adamw_scale": rest / lr}
