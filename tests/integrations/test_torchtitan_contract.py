"""What the integration refuses, and what it relies on in torchtitan.

The second half fails if a torchtitan release moves what is overridden, and says what was moved.
torchtitan is imported by the tests that need it, as the import takes seconds.
"""

import dataclasses
import inspect
import sys
import types
from typing import Any

import pytest
import torch
from torch import nn

import titan_cpu
import titan_jobs
from titan_jobs import CONDA, FSDP, ONE, OVERRIDE, PP

MOVED = "torchtitan moved what conda_dist.integrations.torchtitan builds on: "


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--optimizer.name=condor"], ["name", "condor", "conda"]),
        ([*CONDA, "--optimizer.update_proj_gapp=5"], ["update_proj_gapp", "update_proj_gap"]),
        ([*CONDA, "--optimizer.refresh_method=qr"], ["qr", "eigh64"]),
        ([*CONDA, "--optimizer.betas", "0.9"], ["betas"]),
        ([*CONDA, "--optimizer.update_proj_gap=0"], ["update_proj_gap", "0"]),
        ([*CONDA, "--optimizer.adamw_params=*"], ["AdamW under another name"]),
    ],
)
def test_wrong_option_is_refused(options: list[str], said: list[str]) -> None:
    (refusal,) = titan_jobs.refusals(ONE, "llama3", *options)
    for word in said:
        assert word in refusal


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            '{"state_dtype": "float16"}',
            "state_dtype must be one of float64, float32, bfloat16",
        ),
        ('{"betas": 0.9}', "betas must be a pair"),
        ('{"betas": null, "lr": null}', "lr must be a number"),
        ('{"name": "stock"}', "Conda has no option 'name'"),
        ('{"splits": "*.w1.weight=2"}', "splits must be a list"),
    ],
)
def test_wrong_values_of_the_override(options: str, said: str) -> None:
    given = ["--override.imports", f"conda_dist.integrations.torchtitan.override.conda={options}"]
    for refusal in titan_jobs.refusals(ONE, "llama3", *given):
        assert said in refusal


GROUP = "--optimizer.param-groups.0"


REGISTRY = ["--module=conda_dist.integrations.torchtitan", "--config=titan_configs.llama3", *CONDA]


@pytest.mark.parametrize(
    ("given", "route", "option", "said"),
    [
        (CONDA, "launcher", f"{GROUP}.optimizer-kwargs.lr=3e-4", "Give --optimizer.lr"),
        (
            REGISTRY,
            "torchtitan",
            f"{GROUP}.optimizer-kwargs.weight-decay=0.2",
            "Give --optimizer.weight_decay",
        ),
        (OVERRIDE, "", f"{GROUP}.pattern=.*norm", "Leave it out"),
        (CONDA, "launcher", f"{GROUP}.optimizer-name=Adam", "Leave it out"),
    ],
)
def test_options_of_torchtitans_own_optimizers_are_not_ignored(
    given: tuple[str, ...], route: str, option: str, said: str
) -> None:
    """By all three ways to Conda."""
    for refusal in titan_jobs.refusals(ONE, "llama3", *given, option, route=route):
        key = option.partition("=")[0]
        assert f"{key} (" in refusal
        assert "Conda would ignore it" in refusal
        assert said in refusal


def test_conda_among_torchtitans_param_groups() -> None:
    option = f"{GROUP}.optimizer-name=Conda"
    for refusal in titan_jobs.refusals(ONE, "llama3", "--optimizer.name=stock", option):
        assert "add --optimizer.name conda" in refusal


def test_bfloat16_state_of_torchtitan_is_not_ours() -> None:
    option = "--optimizer.implementation=fused_opt_states_bf16"
    for refusal in titan_jobs.refusals(ONE, "llama3", *CONDA, option):
        assert "--optimizer.state_dtype bfloat16" in refusal


def test_wrong_option_of_the_override_is_refused() -> None:
    override = 'conda_dist.integrations.torchtitan.override.conda={"update_proj_gapp": 5}'
    given = ["--override.imports", override]
    (refusal,) = titan_jobs.refusals(ONE, "llama3", *given, route="torchtitan")
    assert "'update_proj_gapp'" in refusal
    assert "'update_proj_gap'" in refusal


def test_pattern_that_matches_nothing_is_refused_on_every_rank() -> None:
    options = (*CONDA, "--optimizer.adamw_params=layers.0.*,layers.9.*")
    refusals = titan_jobs.refusals(PP, "llama3", *options)
    assert len(refusals) == 2
    for refusal in refusals:
        assert "'layers.9.*'" in refusal
        assert "'layers.0.*'" not in refusal


@pytest.mark.thorough
def test_pattern_of_one_pipeline_stage_is_none() -> None:
    patterns = ("--optimizer.adamw_params=layers.0.*", "--optimizer.conda_params=lm_head.*")
    options = (*patterns, "--training.steps=3")
    staged = titan_jobs.trajectory(PP, "llama3", *options)
    whole = titan_jobs.trajectory(ONE, "llama3", *options)
    assert titan_jobs.distance(staged, whole) < 1e-4
    assert whole != titan_jobs.trajectory(ONE, "llama3")[:3]


@pytest.mark.thorough
def test_option_wrong_on_one_stage_only_is_refused_on_every_rank() -> None:
    for option in (
        "splits=layers.0.*wqkv.weight=100+100",
        "splits=layers.0.*wqkv.weight=0+0",
        "conda_params=norm.weight",
    ):
        refusals = titan_jobs.refusals(PP, "llama3", *CONDA, f"--optimizer.{option}", timeout=30)
        assert not [refusal for refusal in refusals if "Timed out" in refusal]


def test_conda_options_without_its_name_are_refused() -> None:
    options = ["--optimizer.name=stock", "--optimizer.update_proj_gap=5"]
    for refusal in titan_jobs.refusals(FSDP, "llama3", *options):
        assert "--optimizer.update_proj_gap" in refusal
        assert "--optimizer.name conda" in refusal


@pytest.fixture
def _torchtitan() -> None:
    """torchtitan in this process: with a CPU for its device, as on the ranks."""
    titan_cpu.stand_in_device()


pytestmark = pytest.mark.usefixtures("_torchtitan")


def test_a_config_of_python_is_not_ignored_either() -> None:
    from torchtitan.components.optimizer import default_adamw

    from conda_dist.integrations.torchtitan.container import CondaOptimizersContainer, conda_config

    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 4))
    groups = default_adamw(lr=3e-4).param_groups
    made = CondaOptimizersContainer.Config(name="conda", param_groups=groups)
    with pytest.raises(ValueError, match=r"param-groups.0.* Conda would ignore it"):
        made.build(model_parts=[model])
    made = conda_config(default_adamw(), name="conda", lr=3e-4)
    assert made.build(model_parts=[model]).optimizers[0].param_groups[0]["lr"] == 3e-4
    made.optimizer_factory_kwargs_by_name["AdamW"] = {"maximize": True}
    with pytest.raises(ValueError, match=r"AdamW.maximize .True. is an option of torchtitan's own"):
        made.build(model_parts=[model])


def test_other_rules_are_refused_by_name() -> None:
    from conda_dist.integrations.torchtitan.container import CondaOptimizersContainer

    for name in ("muon", "normuon", "namo", "namo_d"):
        made = CondaOptimizersContainer.Config(name=name)
        with pytest.raises(ValueError, match=f"name {name} is not supported under torchtitan"):
            made.build(model_parts=[nn.Linear(4, 6)])


def test_torchft_is_refused() -> None:
    from torchtitan.experiments.torchft.optimizer import TorchFTOptimizersContainer

    from conda_dist.integrations.torchtitan.container import conda_config

    with pytest.raises(ValueError, match="TorchFTOptimizersContainer"):
        conda_config(TorchFTOptimizersContainer.Config(), name="conda")


def parameters(function: Any) -> list[str]:
    return [name for name in inspect.signature(function).parameters if name != "self"]


def test_contract_methods() -> None:
    from torchtitan.components.optimizer import OptimizersContainer

    container = OptimizersContainer
    expected = {
        "_resolve_optimizer_factory": ["name"],
        "_build_param_groups": ["model", "param_group_configs", "impl_kwargs"],
        "__init__": ["config", "model_parts"],
    }
    for name, arguments in expected.items():
        assert hasattr(container, name), f"{MOVED}OptimizersContainer.{name} is gone"
        found = parameters(getattr(container, name))
        assert found == arguments, f"{MOVED}OptimizersContainer.{name} takes {found}"


def test_contract_config_fields() -> None:
    from torchtitan.components.optimizer import OptimizersContainer

    fields = {field.name for field in dataclasses.fields(OptimizersContainer.Config)}
    known = {"param_groups", "implementation", "optimizer_factory_kwargs_by_name"}
    assert fields == known, (
        f"{MOVED}OptimizersContainer.Config has {sorted(fields)}; what is new may mean something "
        "to Conda, or be a name that Conda's own option has"
    )


def test_contract_methods_are_called_by_way_of_self() -> None:
    from torchtitan.components.optimizer import OptimizersContainer, default_adamw

    called = []

    class Spy(OptimizersContainer):  # type: ignore[misc]
        def _build_param_groups(self, *args: Any, **named: Any) -> Any:
            called.append("_build_param_groups")
            return super()._build_param_groups(*args, **named)

        def _resolve_optimizer_factory(self, *args: Any, **named: Any) -> Any:
            called.append("_resolve_optimizer_factory")
            return super()._resolve_optimizer_factory(*args, **named)

    config = default_adamw()
    config.implementation = "for-loop"
    container = Spy(config, model_parts=[nn.Linear(2, 2)])
    expected = ["_build_param_groups", "_resolve_optimizer_factory"]
    assert called == expected, f"{MOVED}its container called {called} of {expected} on itself"
    (group,) = container.optimizers[0].param_groups
    assert group["param_names"] == ["weight", "bias"], f"{MOVED}groups have no param_names"


def test_contract_configs_are_found_by_getattr(monkeypatch: pytest.MonkeyPatch) -> None:
    from torchtitan.config import ConfigManager

    module = types.ModuleType("titan_contract")
    module.__dict__["__getattr__"] = lambda name: lambda: name
    monkeypatch.setitem(sys.modules, "titan_contract", module)
    monkeypatch.setitem(sys.modules, "titan_contract.config_registry", module)
    arguments = ["--module", "titan_contract", "--config", "llama3.any", "--x=1"]
    try:
        loaded = ConfigManager()._load_config(arguments)
    except (AttributeError, ValueError) as error:
        pytest.fail(f"{MOVED}ConfigManager does not find configs by getattr any more: {error}")
    assert loaded == ("llama3.any", ["--x=1"]), f"{MOVED}ConfigManager._load_config gave {loaded}"


def test_contract_rows_of_fused_projections() -> None:
    from torchtitan.models.common.attention import FusedQKVLinear
    from torchtitan.models.common.linear import Linear

    config = FusedQKVLinear.Config(
        head_dim=2, n_heads=4, n_kv_heads=2, wqkv=Linear.Config(in_features=1, out_features=16)
    )
    module = config.build()
    assert [name for name, _ in module.named_parameters()] == ["wqkv.weight"]
    with torch.no_grad():
        module.wqkv.weight.copy_(torch.arange(16.0).view(16, 1))
        found = [part.flatten().int().tolist() for part in module(torch.ones(1, 1, 1))]
    block = [module.heads_per_kv * module.head_dim, module.head_dim, module.head_dim]
    rows = torch.arange(16).split(block * 2)
    expected = [torch.cat(rows[i::3]).tolist() for i in range(3)]
    assert found == expected, f"{MOVED}q, k and v are rows {found} of a fused weight"


class _Steps(torch.optim.SGD):
    """Records what it was stepped with."""

    seen: tuple[float, float] | None = None

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for param in group["params"]:
                self.seen = (float(param.grad.abs().max()), group["lr"])
                self.state[param]["exp_avg"] = torch.ones_like(param)


def test_contract_checkpoint_state() -> None:
    from torchtitan.components import checkpoint_utils

    weight = nn.Parameter(torch.ones(2))
    optimizer = _Steps([("layers.0.weight", weight)], lr=0.5)
    checkpoint_utils.init_optim_state(optimizer)
    assert optimizer.seen == (0.0, 0.0), f"{MOVED}state is primed with (gradient, lr) other than 0"
    assert optimizer.param_groups[0]["lr"] == 0.5
    assert weight.grad is None, f"{MOVED}a gradient is left after state is primed"
    optimizer.seen = None
    checkpoint_utils.init_optim_state(optimizer)
    assert optimizer.seen is None, f"{MOVED}state that exists is primed again"
    flat = checkpoint_utils.get_flat_optim_state_dict(optimizer)
    for key in ("state.layers.0.weight.exp_avg", "param_groups.layers.0.weight.lr"):
        assert key in flat, f"{MOVED}optimizer state has keys {sorted(flat)}"
    flat["state.layers.0.weight.exp_avg"] = torch.zeros(2)
    checkpoint_utils.load_flat_optim_state_dict(optimizer, flat)
    assert not optimizer.state[weight]["exp_avg"].any(), f"{MOVED}flat state is loaded otherwise"
