"""Conda in DeepSpeed's own engine, from the JSON: every stage follows one process.

``PYTHONPATH=tests/helpers python tests/integrations/test_deepspeed.py`` prints a table of more of
them than the tests have time for.
"""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import models
import ranks
import zero
from conda_dist import Conda, param_groups
from conda_dist.rules.conda import CondaRule

os.environ["DS_ACCELERATOR"] = "cpu"

Config = tuple[int, str, dict[str, Any]]
"""Stage, dtype and other entries of a config."""
STAGES: list[Config] = [(stage, "fp32", {}) for stage in range(4)]
SUB_GROUPS = {"zero": {"sub_group_size": 300}}
OFFLOADED = {"offload_optimizer": {"device": "cpu"}}
SPLIT_BASES = {"params": {"basis_budget": 0, "buffer_bytes": 500}}
GRADIENTS: dict[str, Any] = {
    "basis_source": "gradients",
    "refresh_method": "orthogonal_iteration",
    "nesterov": True,
}
SPLITS = {"blocks.*.up.weight": (10, 12)}
ACCUMULATED = {"gradient_accumulation_steps": 2}
VARIANTS: list[Config] = [
    (3, "fp32", SUB_GROUPS),
    (3, "fp32", {"zero": {"stage3_param_persistence_threshold": 10**4}, **SPLIT_BASES}),
    (3, "fp32", {"zero": OFFLOADED}),
    (3, "fp32", {"zero": {"offload_param": {"device": "cpu"}}, **ACCUMULATED}),
    (1, "fp32", {"zero": OFFLOADED}),
    (2, "fp32", {"zero": OFFLOADED, **SPLIT_BASES}),
    (1, "fp32", {"zero": {"round_robin_gradients": True}, **ACCUMULATED}),
    (2, "fp32", {"zero": {"round_robin_gradients": True, "reduce_bucket_size": 500}}),
    (2, "fp32", {"zero": {"contiguous_gradients": False, "overlap_comm": True}}),
]
PLAIN_LINEAR: dict[str, Any] = {"zero": {"memory_efficient_linear": False}}
"""Stage 3's own linear layers round otherwise."""
LOW: list[Config] = [
    *((stage, "bf16", {}) for stage in range(3)),
    (3, "bf16", PLAIN_LINEAR),
    (1, "bf16", {"data_types": {"grad_accum_dtype": "fp32"}}),  # the BF16 optimizer
    (0, "fp16", {"fp16": {"enabled": True, "loss_scale": 1}}),  # the engine's does not scale there
    *((stage, "fp16", {"fp16": {"enabled": True, "loss_scale": 64}}) for stage in (1, 2)),
    (3, "fp16", {"fp16": {"enabled": True, "loss_scale": 64}, **PLAIN_LINEAR}),
]


def _follow(configs: list[Config], factor: float = 1) -> list[dict[str, Tensor]]:
    ended = []
    for stage, dtype, others in configs:
        engine = zero.build(zero.config(stage, dtype, **others))
        zero.train(engine, range(zero.STEPS), factor)
        ended.append(zero.weights(engine))
    return ended


def _errors(
    world: int,
    configs: list[Config],
    theirs: dict[str, Tensor],
    start: dict[str, Tensor] | None = None,
    factor: float = 1,
) -> list[float]:
    start = start or zero.start()
    runs = ranks.run(world, _follow, configs, factor)
    return [
        max(models.farthest(e, theirs, start) for e in ended) for ended in zip(*runs, strict=True)
    ]


@pytest.mark.parametrize("world", [1, 2])
def test_stages_follow_one_process(world: int) -> None:
    """On three ranks in test_deepspeed_splits.py."""
    configs = STAGES + (VARIANTS if world == 2 else VARIANTS[:1])
    for config, error in zip(configs, _errors(world, configs, zero.alone()), strict=True):
        print(config, world, error)
        assert error < 1e-4, config


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.thorough
def test_low_precision_follows_one_process(world: int) -> None:
    """Ranks round their gradients before they are added up; one rank does as one process."""
    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16}
    theirs = {name: zero.alone(dtype=dtype) for name, dtype in dtypes.items()}
    configs = LOW if world == 1 else [LOW[i] for i in (1, 3, 4, 5, 7, 8)]
    runs = ranks.run(world, _follow, configs)
    for i, config in enumerate(configs):
        name = config[1]
        start = zero.start(dtypes[name])
        error = max(models.farthest(ended[i], theirs[name], start) for ended in runs)
        print(config, world, error)
        assert error < (0.01 if world == 1 else 0.1), config


@pytest.mark.thorough
def test_nesterov_of_split_weights_follows_one_process() -> None:
    """With new bases by the SVD; with orthogonal iteration below."""
    params = {"nesterov": True, "splits": SPLITS}
    configs: list[Config] = [(stage, "fp32", {"params": params}) for stage in range(4)]
    theirs = zero.alone(splits=SPLITS, nesterov=True)
    for config, error in zip(configs, _errors(2, configs, theirs), strict=True):
        assert error < 1e-4, config


def test_new_bases_of_gram_matrices_follow_one_process() -> None:
    """Which two ranks' owners add up, of ranges that end anywhere; and other options."""
    options: dict[str, Any] = {
        "refresh_method": "orthogonal_iteration",
        "adamw_scale": 0.3,
        "nesterov": True,
    }
    configs: list[Config] = [(stage, "fp32", {"params": options}) for stage in range(4)]
    theirs, plain = zero.alone(**options), zero.alone()
    for name, value in options.items():
        assert models.farthest(plain, zero.alone(**{name: value}), zero.start()) > 0.01
    for config, error in zip(configs, _errors(2, configs, theirs), strict=True):
        assert error < 1e-4, config


@pytest.mark.parametrize("world", [1, 2, 3])
def test_bases_from_gradients_follow_one_process(world: int) -> None:
    """One rank steps a whole matrix, of ranges that end anywhere."""
    theirs = zero.alone(**GRADIENTS, splits=SPLITS)
    params = {**GRADIENTS, "splits": SPLITS}
    configs: list[Config] = [(stage, "fp32", {"params": params}) for stage in range(4)]
    configs.append((3, "fp32", {"params": {**params, "buffer_bytes": 500}, **SUB_GROUPS}))
    for config, error in zip(configs, _errors(world, configs, theirs), strict=True):
        assert error < 1e-4, config


def _diagnosed(configs: list[Config]) -> list[Any]:
    found = []
    for stage, dtype, others in configs:
        params = {"diagnostics_every": zero.STEPS - 1}
        engine = zero.build(zero.config(stage, dtype, params=params, **others))
        zero.train(engine, range(zero.STEPS))
        optimizer = engine.basic_optimizer
        found.append([optimizer.diagnostics(), optimizer.diagnostics(summed=True)])
        assert optimizer.diagnostics_step == zero.STEPS - 1
    return found


def test_diagnostics_follow_one_process() -> None:
    torch.manual_seed(0)
    model = models.Tiny()
    options = {**zero.SETTINGS, "diagnostics_every": zero.STEPS - 1}
    optimizer = Conda(param_groups(model), **options)
    for step in range(zero.STEPS):
        optimizer.zero_grad()
        zero.loss(model, zero.tokens(step)).backward()
        optimizer.step()
    expected = [optimizer.diagnostics(), optimizer.diagnostics(summed=True)]
    for rank in ranks.run(2, _diagnosed, [*STAGES, (3, "fp32", SUB_GROUPS)]):
        for found in rank:
            for ours, theirs in zip(found, expected, strict=True):
                assert ours.keys() == theirs.keys()
                for name, signals in theirs.items():
                    for key, value in signals.items():
                        close = pytest.approx(value, 1e-3) if isinstance(value, float) else value
                        assert ours[name][key] == close, (name, key)


def _changed_later(stage: int) -> bool:
    """Steps with a factor of 0 move nothing of the adamw path, once it was 1."""
    engine = zero.build(zero.config(stage, params={"weight_decay": 0.0}))
    zero.train(engine, range(2))
    before = zero.weights(engine)
    engine.optimizer.param_groups[0]["adamw_scale"] = 0.0
    zero.train(engine, range(2, 4))
    after = zero.weights(engine)
    paths = {row["name"]: row["path"] for row in engine.basic_optimizer.report()}
    moved = {paths[name] for name in models.unequal(before, after)}
    return moved == {"conda"}


def test_the_factor_may_change_between_steps() -> None:
    for stage in range(4):
        assert all(ranks.run(2, _changed_later, stage))


CLIPPED: list[Config] = [
    *((stage, "fp32", {"gradient_clipping": 0.5}) for stage in range(4)),
    (3, "fp32", {"gradient_clipping": 0.5, **SUB_GROUPS}),
]


@pytest.mark.thorough
def test_clipping_is_that_of_one_process() -> None:
    theirs = zero.alone(clip=0.5, factor=10)
    errors = _errors(2, CLIPPED, theirs, factor=10)
    assert models.farthest(zero.alone(factor=10), theirs, zero.start()) > 0.01
    for config, error in zip(CLIPPED, errors, strict=True):
        assert error < 1e-4, config


def _moved_away(stage: int, dtype: str) -> list[str]:
    """What differs if all states leave the device and come back between two steps."""
    ends = []
    for moves in (False, True):
        engine = zero.build(zero.config(stage, dtype))
        zero.train(engine, range(4))
        if moves:
            engine.offload_states()
            engine.reload_states()
        zero.train(engine, range(4, zero.STEPS))
        ends.append(zero.weights(engine))
    return models.unequal(*ends)


@pytest.mark.thorough
def test_states_may_be_moved_between_steps() -> None:
    """At stage 3 DeepSpeed has it for its FusedAdam alone."""
    assert not any(ranks.run(2, _moved_away, 2, "bf16"))


def _grouped(params: list[Any]) -> list[dict[str, Any]]:
    """Two groups of every second parameter."""
    return [{"params": params[::2]}, {"params": params[1::2], "weight_decay": 0.0, "lr": 5e-3}]


def _follow_groups() -> list[dict[str, Tensor]]:
    ended = []
    for stage in range(4):
        torch.manual_seed(0)
        model = models.Tiny()
        made = zero.config(stage, zero={"sub_group_size": 700})
        engine = zero.build(made, model, model_parameters=_grouped(list(model.parameters())))
        zero.train(engine, range(zero.STEPS))
        ended.append(zero.weights(engine))
    return ended


def test_groups_keep_their_hyperparameters() -> None:
    start, theirs = zero.start(), zero.alone(grouped=_grouped)
    for ended in ranks.run(2, _follow_groups):
        assert all(models.farthest(e, theirs, start) < 1e-4 for e in ended)


def _resume(folder: Path, configs: list[Config]) -> list[list[str]]:
    """Names of what is not the same after a stop and a new start, for each config."""
    unequal = []
    for stage, dtype, others in configs:
        made = zero.config(stage, dtype, **others)
        place = str(folder / f"{len(unequal)}")
        engine = zero.build(made)
        zero.train(engine, range(4))
        engine.save_checkpoint(place)
        losses = zero.train(engine, range(4, zero.STEPS))
        ended = zero.weights(engine)
        other = zero.build(made)
        zero.train(other, range(1))  # its states are filled, not replaced
        other.load_checkpoint(place)
        again = zero.train(other, range(4, zero.STEPS))
        differing = models.unequal(zero.weights(other), ended)
        unequal.append(differing + ([] if losses == again else ["losses"]))
    return unequal


@pytest.mark.thorough
def test_resumes_bit_for_bit(tmp_path: Path) -> None:
    """The other stages in test_deepspeed_splits.py."""
    params = {"params": GRADIENTS}
    configs = [STAGES[2], STAGES[3], (1, "fp32", params), (3, "fp32", params), *LOW[1:6]]
    for unequal in ranks.run(2, _resume, tmp_path, configs):
        assert dict(zip(map(str, configs), unequal, strict=True)) == {
            str(config): [] for config in configs
        }


def _newer_option(folder: Path) -> list[Any]:
    """What groups have of options that a checkpoint lacks, after loading it."""
    added = sorted(CondaRule.added)
    found = []
    for stage in range(4):
        made = zero.config(stage, params=dict.fromkeys(added, True))
        engine = zero.build(made)
        zero.train(engine, range(1))
        for group in engine.basic_optimizer.param_groups:
            for key in added:
                del group[key]
            group["lr"] = 0.5
        engine.save_checkpoint(str(folder / f"{stage}"))
        other = zero.build(made)
        other.load_checkpoint(str(folder / f"{stage}"))
        groups = other.basic_optimizer.param_groups
        found += [(*(group[key] for key in added), group["lr"]) for group in groups]
    return found


def test_options_that_are_newer_than_a_checkpoint_stay(tmp_path: Path) -> None:
    (found,) = ranks.run(1, _newer_option, tmp_path)
    assert {*found} == {(True, 0.5)}


READY = sorted((Path(__file__).parents[2] / "configs" / "deepspeed").glob("*.json"))


def _ready() -> list[tuple[float, float]]:
    ends = []
    for file in READY:
        made = json.loads(file.read_text())
        made["train_micro_batch_size_per_gpu"] = zero.BATCH // dist.get_world_size()
        losses = zero.train(zero.build(made), range(12))
        ends.append((losses[0], losses[-1]))
    return ends


def test_ready_configs_train() -> None:
    assert [file.stem for file in READY] == ["zero1", "zero2", "zero3"]
    for ends in zip(*ranks.run(2, _ready), strict=True):  # of each stage, on both ranks
        assert sum(last for _, last in ends) < sum(first for first, _ in ends), ends


TABLE: list[Config] = [
    *STAGES,
    *VARIANTS,
    *LOW,
    *(  # the plain linear layers are an option of stage 3 alone, and ignored by others
        (stage, "bf16", {**others, "zero": {**PLAIN_LINEAR["zero"], **others.get("zero", {})}})
        for stage, _, others in VARIANTS
    ),
]


def _table() -> None:
    """Worst distance from one process, relative to the distance travelled, on 1 to 3 ranks."""
    print("| ZeRO stage | dtype | others | 1 rank | 2 ranks | 3 ranks |")
    print("|---|---|---|---|---|---|")
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    theirs = {name: zero.alone(dtype=dtype) for name, dtype in dtypes.items()}
    rows: list[list[float]] = [[] for _ in TABLE]
    for world in (1, 2, 3):
        for name, dtype in dtypes.items():
            places = [i for i, config in enumerate(TABLE) if config[1] == name]
            configs = [TABLE[i] for i in places]
            start = zero.start(dtype)
            for i, error in zip(places, _errors(world, configs, theirs[name], start), strict=True):
                rows[i].append(error)
    for (stage, dtype, others), errors in zip(TABLE, rows, strict=True):
        said = json.dumps(others) if others else ""
        print(f"| {stage} | {dtype} | {said} | {' | '.join(f'{e:.1e}' for e in errors)} |")


if __name__ == "__main__":
    _table()
    ranks.close()
