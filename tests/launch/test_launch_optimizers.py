"""What the job is made of: initial weights, schedules, optimizers over shards."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import ranks
from conda_dist import Muon
from conda_dist.launch.cluster import process_group
from conda_dist.launch.job import options, schedule
from conda_dist.launch.job.config import Config, ScheduleConfig
from conda_dist.launch.job.engine import loss_sum
from conda_dist.launch.job.model import build_model, initialised_model
from conda_dist.launch.job.optimizer_config import SECTIONS
from conda_dist.launch.job.optimizers import build_optimizers, describe

SMALL = ["--model.hidden_size", "24", "--model.num_attention_heads", "2"]
SMALL += ["--model.intermediate_size", "40", "--model.num_hidden_layers", "2"]
SMALL += ["--training.sequence_length", "16"]


def full(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


# Initial weights.


def initial(config: Config) -> dict[str, torch.Tensor]:
    model = build_model(config.model, config.training, 50, process_group.join(60))
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
    return {name: full(p).detach().clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_initial_weights_do_not_depend_on_the_ranks(architecture: str) -> None:
    config = options.load(None, [*SMALL, "--model.architecture", architecture])
    (alone,) = ranks.run(1, initial, config)
    for world in (2, 3):
        for here in ranks.run(world, initial, config):
            assert here.keys() == alone.keys()
            assert all(torch.equal(here[name], alone[name]) for name in alone)
    other = options.load(None, [*SMALL, "--model.architecture", architecture, "--training.seed=1"])
    (reseeded,) = ranks.run(1, initial, other)
    matrices = [name for name, tensor in alone.items() if tensor.ndim == 2]
    assert all(not torch.equal(reseeded[name], alone[name]) for name in matrices)


def test_initial_weights_follow_the_library_s_rules() -> None:
    """The spread of each parameter is that of the model built by its own constructor."""
    wide = ["--model.hidden_size", "96", "--model.intermediate_size", "160"]
    config = options.load(None, [*SMALL, *wide, "--model.architecture", "gpt2"])
    (ours,) = ranks.run(1, initial, config)
    reference = GPT2LMHeadModel(
        GPT2Config(vocab_size=50, n_embd=96, n_inner=160, n_layer=2, n_head=2, n_positions=16,
                   tie_word_embeddings=False)
    )  # fmt: skip
    theirs = dict(reference.named_parameters())
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.std().item() == pytest.approx(theirs[name].std().item(), rel=0.1), name
        assert tensor.mean().item() == pytest.approx(theirs[name].mean().item(), abs=2e-3), name


def logits(config: Config, tokens: torch.Tensor) -> tuple[torch.Tensor, dict[str, Any]]:
    model = build_model(config.model, config.training, 50, process_group.join(60))
    output = model(input_ids=tokens).logits.detach()
    return output, {name: full(p).detach().clone() for name, p in model.named_parameters()}


def test_the_sharded_model_computes_what_the_library_s_does() -> None:
    """Buffers made on the meta device (rotary frequencies) must have their values, too."""
    config = options.load(None, [*SMALL, "--training.compute_dtype", "float32"])
    tokens = torch.arange(32).view(2, 16)
    for output, weights in ranks.run(2, logits, config, tokens):
        reference = LlamaForCausalLM(
            LlamaConfig(vocab_size=50, hidden_size=24, intermediate_size=40, num_hidden_layers=2,
                        num_attention_heads=2, max_position_embeddings=16)
        )  # fmt: skip
        reference.load_state_dict(weights)
        torch.testing.assert_close(output, reference(input_ids=tokens).logits)


class Reads(TorchDispatchMode):
    """Counts the numbers that the host reads: on a GPU it waits for each."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_a_forward_pass_reads_nothing(architecture: str) -> None:
    config = options.load(None, [*SMALL, "--model.architecture", architecture])
    model = initialised_model(config.model, config.training, 50, lambda module: None)
    rows = torch.arange(34).view(2, 17).numpy()
    with Reads() as reads:
        loss_sum(model, rows, torch.device("cpu")).backward()  # type: ignore[no-untyped-call]
    assert reads.count == 0


# Schedules.


@given(
    st.sampled_from(["cosine", "linear", "constant"]),
    st.integers(1, 500),
    st.integers(0, 100),
    st.floats(0, 1),
)
def test_schedules_rise_then_fall(name: Any, steps: int, warmup: int, floor: float) -> None:
    config = ScheduleConfig(name=name, warmup_steps=warmup, min_lr_ratio=floor)
    factors = [schedule.factor(config, 1e-2, steps, step) for step in range(steps + 1)]
    rising, falling = factors[:warmup], factors[warmup:]
    assert rising == sorted(rising)
    assert falling == sorted(falling, reverse=True)
    assert all(0 <= factor <= 1 for factor in factors)
    if steps > warmup:
        assert falling[0] == 1.0
        end = {"cosine": floor, "linear": 0.0, "constant": 1.0}[name]
        assert falling[-1] == pytest.approx(end)


def test_the_floor_may_be_a_rate() -> None:
    config = ScheduleConfig(min_lr=3e-5, warmup_ratio=0.02)
    assert schedule.factor(config, 6e-3, 1000, 1000) * 6e-3 == pytest.approx(3e-5)
    assert schedule.factor(config, 6e-3, 1000, 9) == pytest.approx(0.5)


# Which parameters go where.


def paths(config: Config) -> tuple[list[str], dict[str, tuple[str, float]]]:
    """The optimizers' classes, and the path and rate of every parameter."""
    model = build_model(config.model, config.training, 50, process_group.join(60))
    optimizers = build_optimizers(model, config.optimizer)
    (optimizer,) = optimizers
    assert isinstance(optimizer, Muon)
    rows = optimizer.report(show=False)
    assert {row["name"] for row in rows} == {name for name, _ in model.named_parameters()}
    assert describe(optimizers).startswith(f"Muon, {len(rows)} tensors")
    return [type(o).__name__ for o in optimizers], {r["name"]: (r["path"], r["rate"]) for r in rows}


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_muon_takes_the_blocks_matrices_and_adamw_the_rest(architecture: str) -> None:
    chosen = [*SMALL, "--model.architecture", architecture, "--optimizer.name", "muon"]
    config = options.load(None, [*chosen, "--optimizer.lr=1e-3", "--optimizer.adamw_scale=10"])
    (_, found), *_ = ranks.run(1, paths, config)
    matrices = {name for name, (path, _) in found.items() if path == "muon"}
    assert all(".layers." in name or ".h." in name for name in matrices)
    assert len(matrices) == {"llama": 2 * 7, "gpt2": 2 * 4}[architecture]
    others = found.keys() - matrices
    assert not [name for name in others if "proj.weight" in name or "c_attn.weight" in name]
    assert {rate for name, (_, rate) in found.items() if name in matrices} == {1e-3}
    assert all(found[name] == ("adamw", pytest.approx(1e-2)) for name in others)


def test_settings_reach_the_optimizers() -> None:
    arguments = [*SMALL, "--optimizer.name", "conda", "--optimizer.lr", "3e-3"]
    arguments += ["--optimizer.scale", "0.5", "--optimizer.update_proj_gap", "7"]
    arguments += ["--optimizer.adamw_scale", "2.5", "--optimizer.weight_decay", "0.2"]
    for groups in ranks.run(1, group_settings, options.load(None, arguments)):
        assert [group["lr"] for group in groups] == [3e-3, 3e-3]
        assert [group["scale"] for group in groups] == [0.5, 0.5]
        assert [group["adamw_scale"] for group in groups] == [2.5, 2.5]
        assert groups[0]["update_proj_gap"] == 7
        assert [group["weight_decay"] for group in groups] == [0.2, 0.2]


def group_settings(config: Config) -> list[dict[str, Any]]:
    model = build_model(config.model, config.training, 50, process_group.join(60))
    (optimizer,) = build_optimizers(model, config.optimizer)
    return [
        {key: value for key, value in group.items() if key != "params"}
        for group in optimizer.param_groups
    ]


def rest_after_steps(configs: list[Config]) -> list[dict[str, torch.Tensor]]:
    """What each optimizer makes of all but the blocks' matrices, in two steps."""
    found = []
    for config in configs:
        model = build_model(config.model, config.training, 50, process_group.join(60))
        optimizers = build_optimizers(model, config.optimizer)
        for _ in range(2):
            for parameter in model.parameters():
                parameter.grad = parameter.detach().mul(50).cos()
            for optimizer in optimizers:
                optimizer.step()
        group = optimizers[-1].param_groups[-1]
        assert (group["betas"], group.get("adamw_eps", group["eps"])) == ((0.8, 0.9), 1e-7)
        named = model.named_parameters()
        found.append({n: full(p).detach() for n, p in named if "_proj" not in n})
    return found


def test_one_adamw_steps_the_rest_of_every_optimizer() -> None:
    """Its rate, betas and decay are the same, whatever steps the matrices.

    Conda decays after the update, torch before: they differ by rate times decay (5e-6).
    """
    configs = []
    for name in SECTIONS:
        chosen = [*SMALL, "--optimizer.name", name, "--optimizer.adamw_betas", "0.8,0.9"]
        chosen += ["--optimizer.adamw_eps", "1e-7"]
        keys = options.load(None, chosen).optimizer.keys_for_rates(1e-3, 5e-3)
        chosen += [f"--{key}={value!r}" for key, value in keys.items()]
        lr = options.load(None, chosen).optimizer.chosen.lr
        chosen += [f"--optimizer.weight_decay={1e-3 / lr}"]
        configs.append(options.load(None, chosen))
    (found,) = ranks.run(1, rest_after_steps, configs)
    for name, rest in zip(SECTIONS, found, strict=True):
        assert len(rest) == 2 * 2 + 3
        for key, tensor in rest.items():
            torch.testing.assert_close(
                tensor, found[0][key], rtol=0, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}"
            )
