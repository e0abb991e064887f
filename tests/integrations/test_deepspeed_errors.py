"""What Conda under DeepSpeed refuses, and what it says."""

import os
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import models
import ranks
import zero
from conda_dist import Conda, Muon, param_groups

os.environ["DS_ACCELERATOR"] = "cpu"

PARAMS = "DeepSpeed JSON, optimizer.params: "
NVME = {"device": "nvme", "nvme_path": "/tmp"}
REFUSED: list[tuple[dict[str, Any], str]] = [
    (
        {"params": {"updat_proj_gap": 3}},
        f"{PARAMS}Conda has no param 'updat_proj_gap' \\(the nearest is 'update_proj_gap'\\)\\.",
    ),
    ({"params": {"colour": 1}}, "no param 'colour'. It takes lr, betas, eps, .* splits"),
    (
        {"params": {"torch_adam": True, "zeal": 1, "adam_w_mode": True, "Betas": [0.9, 0.99]}},
        "no param 'torch_adam' \\(Adam's: leave it out\\), 'zeal', 'adam_w_mode' \\(Adam's: leave "
        "it out\\), 'Betas' \\(the nearest is 'betas'\\). It takes lr",
    ),
    ({"params": {"bias_correction": False}}, "Adam's: leave it out, or say correct_bias"),
    (
        {"params": {"lr": "auto", "eps": "auto"}},
        f'{PARAMS}"auto" is the value of lr, eps, and nobody has replaced it: Hugging Face',
    ),
    ({"params": {"betas": "auto"}}, '"auto" is the value of betas, and'),
    ({"params": {"lr": "0.01"}}, f"TypeError: {PARAMS}lr must be a number, got '0.01'"),
    ({"params": {"lr": -1}}, f"ValueError: {PARAMS}lr must be at least 0"),
    ({"params": {"adamw_scale": "2"}}, f"TypeError: {PARAMS}adamw_scale must be a number"),
    ({"params": {"adamw_lr": 1e-3}}, "no param 'adamw_lr'. It takes .*adamw_scale"),
    ({"params": {"update_proj_gap": 3.5}}, f"TypeError: {PARAMS}update_proj_gap must be an int"),
    (
        {"params": {"state_dtype": "bf16"}},
        f"{PARAMS}state_dtype must be one of float64, float32, bfloat16",
    ),
    ({"params": {"basis_budget": "4"}}, f"{PARAMS}basis_budget must be an int"),
    ({"params": {"refresh_delay": 5}}, "refresh_delay 5 is not supported under DeepSpeed"),
    ({"params": {"second_moment_dtype": "uint8"}}, "second_moment_dtype is not supported under"),
    ({"compile": {"deepcompile": True}}, "not support compile.deepcompile .*DeepCompile was not"),
    ({"params": {"adamw_params": "*"}}, f"{PARAMS}adamw_params must be a list of patterns"),
    (
        {"params": {"conda_params": ["*.kqv"]}},
        rf"{PARAMS}conda_params pattern '\*.kqv' matches no parameter; names look",
    ),
    ({"params": {"adamw_params": ["*.kqv"]}}, r"adamw_params pattern '\*.kqv' matches no parame"),
    (
        {"params": {"splits": {"*.kqv": 2}}},
        rf"{PARAMS}splits pattern '\*.kqv' matches no parameter",
    ),
    ({"params": {"conda_params": ["*.norm.weight"]}}, "norm.weight: a parameter of shape"),
    ({"params": {"adamw_params": ["*"]}}, "no trainable matrix would reach the conda path"),
    (
        {"optimizer": {"type": "Conda", "lr": 1e-4, "adam_w_mode": True, "params": {}}},
        "DeepSpeed JSON, optimizer: 'lr' \\(put it into params\\), 'adam_w_mode' \\(Adam's: leave",
    ),
    (
        {"zero": {"elastic_checkpoint": True}},
        "not support zero_optimization.elastic_checkpoint in this DeepSpeed config: it saves mo",
    ),
    ({"zero": {"offload_optimizer": NVME}}, 'zero_optimization.offload_optimizer.device "nvme"'),
    (
        {"zero": {"offload_optimizer": {"device": "cpu", "ratio": 0.5}}},
        "zero_optimization.offload_optimizer.ratio in this .* splits the step",
    ),
    ({"zero": {"zero_quantized_weights": True}}, "zero_optimization.zero_quantized_weights in"),
]
"""Entries of a config, and what is said of them."""


def _refusals() -> list[str]:
    said = []
    for others, _ in REFUSED:
        stage = 3 if "zero" in others else 1
        said.append(models.attempt(lambda o=others, s=stage: zero.build(zero.config(s, **o))))
    return said


def test_what_is_refused_and_why() -> None:
    for (others, expected), said in zip(REFUSED, ranks.run(1, _refusals)[0], strict=True):
        assert re.search(expected, said), (others, said)


FILLED = {"lr": 1e-2, "betas": [0.9, 0.99], "eps": 1e-4, "weight_decay": 0.1}
ONE_BIT = {"freeze_step": 400, "cuda_aware": False, "comm_backend_name": "nccl"}
ZERO_ONE = dict.fromkeys(
    ("var_freeze_step", "var_update_scaler", "local_step_scaler", "local_step_clipper"), 16
)
PUBLISHED: list[dict[str, Any]] = [
    {**FILLED, "torch_adam": True, "adam_w_mode": True},  # Hugging Face's documentation
    {**FILLED, "bias_correction": True, "adam_w_mode": True},  # FusedAdam
    {**FILLED, "amsgrad": False, "adamw_mode": True, "fp32_optimizer_states": True},  # CPUAdam
    {**FILLED, "torch_adam": True, "foreach": False},
    {**FILLED, "bias_correction": False, **ONE_BIT},  # 1-bit Adam's tutorial
    {**FILLED, "bias_correction": False, **ZERO_ONE, **ONE_BIT},  # 0/1 Adam's
    {"max_coeff": 0.3, "min_coeff": 0.01, "coeff_beta": 0.9, "factor_max": 4.0, **FILLED},  # LAMB
    {"lr": 1e-2, "momentum": 0.9, "ns_method": "gram", "muon_lr": 1e-2, "adam_lr": 1e-3},  # Muon
]
"""Optimizer blocks as they are published, their "type" made Conda."""


def _published() -> list[tuple[str, str]]:
    """What is said of each, and of each without what was said to be left out."""
    said = []
    tried: dict[str, str] = {}  # many are the same without that

    def attempt(params: dict[str, Any]) -> str:
        made = zero.config(1, optimizer={"type": "Conda", "params": dict(params)})
        key = repr(params)
        if key not in tried:
            tried[key] = models.attempt(zero.build, made)
        return tried[key]

    for params in PUBLISHED:
        left = {key: value for key, value in params.items() if key in FILLED}
        said.append((attempt(params), attempt(left)))
    return said


def test_published_optimizer_blocks_work_without_what_is_named() -> None:
    for params, (first, then) in zip(PUBLISHED, ranks.run(1, _published)[0], strict=True):
        named = [key for key in params if key not in FILLED]
        found = re.findall(r"'(\w+)' \([^)]*'s: leave it out", first.partition("\n")[0])
        assert found == named, first
        assert then == "nothing was raised"


def _routes(stage: int) -> tuple[dict[str, str], list[str]]:
    """Paths by name, with a pattern for each side, and what was logged."""
    deepspeed = zero.settle()
    said: list[str] = []
    module = __import__("conda_dist.integrations.deepspeed.optimizer", fromlist=["log_dist"])
    before, module.log_dist = module.log_dist, lambda text, ranks: said.append(text)
    params = {"conda_params": ["head.weight"], "adamw_params": ["blocks.0.q.*"]}
    try:
        torch.manual_seed(0)
        made = zero.config(stage, params=params)
        if stage == 3:
            with deepspeed.zero.Init(config_dict_or_path=made):
                model = models.Tiny()
        else:
            model = models.Tiny()
        engine = zero.build(made, model)
        zero.train(engine, range(2))
    finally:
        module.log_dist = before
    inner = engine.optimizer if stage == 0 else engine.optimizer.optimizer
    return {row["name"]: row["path"] for row in inner.report()}, said


@pytest.mark.parametrize("stage", range(4))
def test_routes_are_by_name_and_shape(stage: int) -> None:
    conda = {"head.weight", "blocks.1.q.weight"}
    conda |= {f"blocks.{i}.{n}" for i in range(2) for n in ("up.weight", "down.weight", "experts")}
    for paths, said in ranks.run(2, _routes, stage):
        assert paths == {
            name: "conda" if name in conda else "adamw"
            for name, _ in models.Tiny().named_parameters()
        }
        assert any("8 weights of 15 are on the conda path" in text for text in said)
        assert any("blocks.*.down.weight" in text and "refreshed by" in text for text in said)


def _client(stage: int) -> tuple[list[str], float]:
    """An optimizer that the script makes, without names: the engine knows them."""
    zero.settle()
    from conda_dist.integrations.deepspeed import Conda

    torch.manual_seed(0)
    model = models.Tiny()
    made = zero.config(stage)
    del made["optimizer"]
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Conda got parameters without names")
        optimizer = Conda(model.parameters(), **zero.SETTINGS)
        engine = zero.build(made, model, optimizer=optimizer)
    zero.train(engine, range(zero.STEPS))
    names = [row["name"] for row in optimizer.report() if row["path"] == "conda"]
    return names, models.farthest(zero.weights(engine), zero.alone(), zero.start())


def test_a_script_may_make_the_optimizer() -> None:
    for stage in (0, 2, 3):
        for names, error in ranks.run(2, _client, stage):
            assert "blocks.0.q.weight" in names
            assert "embed.weight" not in names
            assert error < 1e-4


def _partitioned() -> str:
    """What is said when it is made from parameters that ZeRO 3 has partitioned already."""
    deepspeed = zero.settle()
    made = zero.config(3)
    del made["optimizer"]
    with deepspeed.zero.Init(config_dict_or_path=made):
        model = models.Tiny()
    try:
        return models.attempt(lambda: Conda(model.named_parameters()))
    finally:
        deepspeed.zero.partition_parameters.shutdown_init_context()


def test_a_partitioned_parameter_is_told_the_two_ways_that_work() -> None:
    said = ranks.run(1, _partitioned)[0]
    assert '"optimizer": {"type": "Conda"}' in said
    assert "conda_dist.integrations.deepspeed.Conda(model.named_parameters())" in said


def _plain(stage: int) -> list[str]:
    """conda_dist's own Conda as a client optimizer: made by the script, and by what it gives."""
    said = []
    for callable_ in (False, True):
        torch.manual_seed(0)
        model = models.Tiny()
        optimizer = Conda(param_groups(model), **zero.SETTINGS)
        given: Any = (lambda _, o=optimizer: o) if callable_ else optimizer
        config = zero.config(stage)
        del config["optimizer"]
        said.append(
            models.attempt(lambda m=model, c=config, g=given: zero.build(c, m, optimizer=g))
        )
    return said


def test_a_plain_conda_under_zero_is_told_the_two_ways_that_work() -> None:
    for stage in (1, 2, 3):
        for answers in ranks.run(2, _plain, stage):
            for said in answers:
                assert "cannot step ZeRO's flat partitions of parameters" in said
                assert f"at stage {stage}" in said
                assert '"optimizer": {"type": "Conda"}' in said
                assert "conda_dist.integrations.deepspeed.Conda(model.named_parameters()" in said
                assert "adamw" not in said


def _muon(stage: int) -> list[str]:
    """Another rule's optimizer, made by the script, and by what it gives."""
    said = []
    for callable_ in (False, True):
        model = models.Tiny()
        optimizer = Muon(param_groups(model, rule="muon"))
        given: Any = (lambda _, o=optimizer: o) if callable_ else optimizer
        config = zero.config(stage)
        del config["optimizer"]
        said.append(
            models.attempt(lambda m=model, c=config, g=given: zero.build(c, m, optimizer=g))
        )
    return said


def test_other_rules_are_refused_by_name() -> None:
    for stage in (1, 3):
        for answers in ranks.run(2, _muon, stage):
            for said in answers:
                assert f"Muon is not supported under ZeRO, at stage {stage}" in said


def _replaced() -> list[str]:
    """As Accelerate does with ``offload_optimizer``: another optimizer of a Conda's groups."""
    zero.settle()
    from conda_dist.integrations.deepspeed import Conda as Ours

    said = []
    for kind in (Ours, Conda):
        model = models.Tiny()
        optimizer = torch.optim.AdamW(kind(model.named_parameters(), **zero.SETTINGS).param_groups)
        config = zero.config(2)
        del config["optimizer"]
        said.append(
            models.attempt(lambda m=model, c=config, o=optimizer: zero.build(c, m, optimizer=o))
        )
    return said


def test_an_optimizer_made_of_a_conda_is_refused() -> None:
    for said in ranks.run(1, _replaced)[0]:
        assert "the optimizer, AdamW, has Conda's parameter groups: Accelerate replaces" in said
        assert '"zero_force_ds_cpu_optimizer": false' in said


def _plain_without_zero() -> list[float]:
    """There parameters are whole, or copies of their shapes."""
    errors = []
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        torch.manual_seed(0)
        model = models.Tiny()
        optimizer = Conda(param_groups(model), **zero.SETTINGS)
        config = zero.config(0, name)
        del config["optimizer"]
        engine = zero.build(config, model, optimizer=optimizer)
        zero.train(engine, range(zero.STEPS))
        ended = {
            name: param.detach().clone()
            for group in optimizer.param_groups
            for name, param in zip(group["param_names"], group["params"], strict=True)
        }
        errors.append(models.farthest(ended, zero.alone(dtype=dtype), zero.start(dtype)))
    return errors


def test_a_plain_conda_without_zero_follows_one_process() -> None:
    (single, low), _ = ranks.run(2, _plain_without_zero)
    assert single < 1e-4
    assert low < 0.1


def _ignored() -> list[str]:
    """The JSON's optimizer beside one of the script's."""
    zero.settle()
    from conda_dist.integrations.deepspeed import Conda as Ours

    said = []
    for kind in (Ours, torch.optim.AdamW):
        model = models.Tiny()
        optimizer = kind(model.parameters(), lr=1e-2)
        say = models.attempt(
            lambda m=model, o=optimizer: zero.build(zero.config(1), m, optimizer=o)
        )
        said.append(say)
    return said


def test_the_optimizer_of_the_json_is_not_ignored() -> None:
    ours, other = ranks.run(1, _ignored)[0]
    for said in (ours, other):
        assert 'the DeepSpeed JSON\'s optimizer (type "Conda") is ignored' in said
    assert "gives deepspeed.initialize one (AdamW)" in other


def _groups_that_differ() -> list[str]:
    zero.settle()
    from conda_dist.integrations.deepspeed import Conda

    said = []
    for splits, adamw in (({"*.up.weight": 2}, ()), (None, ["*.up.weight"])):
        torch.manual_seed(0)
        model = models.Tiny()
        groups = param_groups(model, splits=splits or {}, adamw=list(adamw))
        said.append(models.attempt(lambda g=groups: Conda(g, **zero.SETTINGS)))
    return said


def test_groups_that_ask_for_something_else_are_refused() -> None:
    (split, path) = ranks.run(1, _groups_that_differ)[0]
    assert "blocks.0.up.weight: its group has splits=" in split
    assert "blocks.0.up.weight: its group's algorithm is 'adamw', its path 'conda'" in path


def _mismatches(folder: Path) -> list[str]:
    sharded = {"basis_budget": 0}
    engine = zero.build(zero.config(3, params=sharded))
    zero.train(engine, range(2))
    engine.save_checkpoint(str(folder))
    said = []
    routed = {"adamw_params": ["blocks.0.up.weight"], **sharded}
    for params in (routed, {"basis_source": "gradients"}, {}):
        other = zero.build(zero.config(3, params=params))

        def load(other: Any = other) -> None:
            other.load_checkpoint(str(folder))
            zero.train(other, range(1))

        said.append(models.attempt(load))
    made = zero.config(3)
    made["optimizer"] = {"type": "AdamW", "params": {"torch_adam": True}}
    adamw = zero.build(made)
    zero.train(adamw, range(1))
    adamw.save_checkpoint(str(folder / "adamw"))
    fresh = zero.build(zero.config(3))
    said.append(models.attempt(fresh.load_checkpoint, str(folder / "adamw")))
    return said


@pytest.mark.thorough
def test_checkpoints_that_do_not_fit(tmp_path: Path) -> None:
    for routed, gradients, placed, foreign in ranks.run(2, _mismatches, tmp_path):
        assert "blocks.0.up.weight: the checkpoint has (22, 10) on the conda path, here" in routed
        assert re.search(
            r"blocks.0.\S+: the checkpoint has basis, basis_step, step, here it has averaged, "
            r"basis_step, \w+_basis, .*give the basis_source that it was saved with",
            gradients,
        )
        assert re.search(r"rank 1: ValueError: .* the checkpoint's basis has shape", placed)
        assert "was not written by Conda under DeepSpeed" in foreign
