"""Conda in Hugging Face's Trainer and Accelerate: DeepSpeed from the JSON, and FSDP2."""

import functools
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import conda_dist
import ranks
from conda_dist import Conda, param_groups
from hugging import BATCH, GAP, RATE, language_model, settle, texts

os.environ["DS_ACCELERATOR"] = "cpu"

STEPS = 8
"""Of a training; a checkpoint is written after half of them, between two refreshes."""
ROOT = Path(__file__).parents[2]
README = re.findall(
    r"```python\n(.*?)```", (ROOT / "integrations" / "README.md").read_text(), re.DOTALL
)


@pytest.fixture(scope="module", autouse=True)
def _own_processes() -> Iterator[None]:
    """Accelerate and ZeRO keep what they know of a process for good."""
    ranks.close()
    yield
    ranks.close()


def deepspeed_json(stage: int) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "zero_optimization": {"stage": stage},
        "optimizer": {"type": "Conda", "params": {"lr": "auto", "update_proj_gap": GAP}},
    }


def _trainer(folder: Path, stage: int, factory: bool, resume: bool) -> list[float]:
    """The losses of a training by the Trainer, a line a step."""
    settle()
    import transformers

    from conda_dist.integrations import deepspeed
    from conda_dist.integrations.huggingface import conda_for_trainer

    made = deepspeed_json(stage)
    more: dict[str, Any] = {}
    if factory:
        del made["optimizer"]
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        deepspeed=made,
        learning_rate=RATE,
        max_steps=STEPS,
        per_device_train_batch_size=BATCH // dist.get_world_size(),
        logging_steps=1,
        save_steps=STEPS // 2,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,  # without it all ranks get the same rows
    )
    if factory:
        more["optimizer_cls_and_kwargs"] = conda_for_trainer(arguments, update_proj_gap=GAP)
    trainer = transformers.Trainer(language_model(), arguments, train_dataset=texts(), **more)
    saved = str(folder / f"checkpoint-{STEPS // 2}")
    trainer.train(resume_from_checkpoint=saved if resume else None)
    inner = trainer.model_wrapped.basic_optimizer
    assert isinstance(inner, deepspeed.Conda), type(inner)
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


@pytest.mark.parametrize(("stage", "factory"), [(2, True), (3, False), (3, True)])
@pytest.mark.thorough
def test_trainer(tmp_path: Path, stage: int, factory: bool) -> None:
    """The optimizer is in the JSON, or the Trainer makes it by conda_for_trainer."""
    alone = alone_for(STEPS, 0.0)
    whole, _ = ranks.run(2, _trainer, tmp_path, stage, factory, False)
    assert len(whole) == STEPS
    assert whole[-1] < 0.9 * whole[0]
    assert whole == pytest.approx(alone, abs=1e-3)
    again, _ = ranks.run(2, _trainer, tmp_path, stage, factory, True)
    assert again == whole


@functools.cache
def alone_for(steps: int, decay: float) -> list[float]:
    """The losses of one process."""
    (losses,) = ranks.run(1, _one_process, steps, decay)
    return losses


ALL_AUTO = dict.fromkeys(("lr", "betas", "eps", "weight_decay"), "auto")


def _arrivals() -> list[tuple[str, set[Any], list[float]]]:
    """Which optimizer the Trainer uses, its (weight decay, second beta)s and the losses."""
    settle()
    import transformers

    from conda_dist.integrations import deepspeed
    from conda_dist.integrations.huggingface import conda_for_trainer

    own: tuple[Any, dict[str, Any]] = (deepspeed.Conda, {"lr": RATE, "update_proj_gap": GAP})
    cases: list[tuple[dict[str, Any] | None, dict[str, Any], dict[str, Any]]] = [
        ({"lr": "auto", "update_proj_gap": GAP}, {}, {}),
        ({**ALL_AUTO, "update_proj_gap": GAP}, {}, {}),
        (None, {}, {"optimizer_cls_and_kwargs": own}),
        (None, {"weight_decay": 0.0}, {"optimizer_cls_and_kwargs": own}),
        (None, {"use_cpu": True}, {"optimizer_cls_and_kwargs": conda_for_trainer}),
        (None, {}, {"optimizers": Conda}),
        ({"lr": "auto"}, {"use_cpu": True}, {}),
    ]
    ends = []
    for params, others, more in cases:
        settle()
        made, model = deepspeed_json(2), language_model()
        made["optimizer"]["params"] = params
        if params is None:
            del made["optimizer"]
        if others.get("use_cpu"):
            made["train_batch_size"] = "auto"
        if more.get("optimizers"):
            more = {"optimizers": (Conda(param_groups(model)), None)}
        options = {"weight_decay": 0.1, "learning_rate": RATE, **others}
        arguments = transformers.TrainingArguments(
            output_dir="unused",
            deepspeed=made,
            max_steps=3,
            per_device_train_batch_size=BATCH // dist.get_world_size(),
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            **options,
        )
        if more.get("optimizer_cls_and_kwargs") is conda_for_trainer:
            more = {"optimizer_cls_and_kwargs": conda_for_trainer(arguments, update_proj_gap=GAP)}
        trainer = transformers.Trainer(model, arguments, train_dataset=texts(), **more)
        trainer.train()
        inner = trainer.model_wrapped.basic_optimizer
        groups = {(group["weight_decay"], group["betas"][1]) for group in inner.param_groups}
        losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
        ends.append((f"{type(inner).__module__}.{type(inner).__name__}", groups, losses))
    return ends


def _one_process(steps: int, decay: float) -> list[float]:
    """The losses of the same steps without DeepSpeed."""
    settle()
    import transformers

    from conda_dist.integrations.huggingface import conda_for_trainer

    arguments = transformers.TrainingArguments(
        output_dir="unused",
        weight_decay=decay,
        learning_rate=RATE,
        max_steps=steps,
        per_device_train_batch_size=BATCH,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
    )
    made = conda_for_trainer(arguments, update_proj_gap=GAP)
    trainer = transformers.Trainer(
        language_model(), arguments, train_dataset=texts(), optimizer_cls_and_kwargs=made
    )
    trainer.train()
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


def test_what_of_the_trainers_arguments_arrives() -> None:
    """The README says so; where it does not, that is the Trainer's doing."""
    ours = "conda_dist.integrations.deepspeed.optimizer.Conda"
    alone = alone_for(3, 0.1)
    for only_rate, auto, own, whole, factory, given, cpu in ranks.run(2, _arrivals):
        assert only_rate[:2] == (ours, {(0.0, 0.99)})
        assert auto[:2] == (ours, {(0.1, 0.999)})
        assert own[:2] == (ours, {(0.1, 0.99), (0.0, 0.99)})
        assert whole[2] == pytest.approx(only_rate[2], abs=1e-5)
        assert factory[:2] == own[:2]
        assert factory[2] == pytest.approx(alone, abs=1e-4)
        assert given[0] == "torch.optim.adamw.AdamW"
        assert cpu[0] == ours


def batches() -> list[Tensor]:
    """This rank's rows of each step."""
    rank, world = dist.get_rank(), dist.get_world_size()
    rows = torch.stack([text["input_ids"] for text in texts()])
    return [batch.chunk(world)[rank] for batch in rows.split(BATCH)]


def train(accelerator: Any, model: Any, optimizer: Any) -> list[float]:
    """A step on each batch; returns the mean losses of all ranks."""
    losses = []
    for ids in batches():
        loss = model(input_ids=ids, labels=ids).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        losses.append(float(mean) / dist.get_world_size())
    return losses


def _alone() -> list[float]:
    """One process, the mean gradient of all rows."""
    model = language_model()
    optimizer = Conda(param_groups(model), lr=RATE, update_proj_gap=GAP)
    losses = []
    for ids in torch.stack([text["input_ids"] for text in texts()]).split(BATCH):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def _accelerate_deepspeed(stage: int) -> list[float]:
    settle()
    from accelerate import Accelerator, DeepSpeedPlugin
    from accelerate.utils import DummyOptim

    from conda_dist.integrations import deepspeed

    made = deepspeed_json(stage)
    made |= {"train_micro_batch_size_per_gpu": BATCH // dist.get_world_size()}
    plugin = DeepSpeedPlugin(hf_ds_config=made, gradient_clipping=0.0)
    accelerator = Accelerator(deepspeed_plugin=plugin)
    model = language_model()
    model, optimizer = accelerator.prepare(model, DummyOptim(model.parameters(), lr=RATE))
    assert isinstance(model.basic_optimizer, deepspeed.Conda)
    return train(accelerator, model, optimizer)


def test_accelerate_with_deepspeed() -> None:
    alone = _alone()
    for stage in (2, 3):
        for losses in ranks.run(2, _accelerate_deepspeed, stage):
            assert losses == pytest.approx(alone, abs=1e-4)


def accelerator_on_fsdp(**plugin: Any) -> Any:
    """An Accelerator with FSDP."""
    from accelerate import Accelerator, FullyShardedDataParallelPlugin, PartialState
    from accelerate.utils import DistributedType

    # Accelerate takes FSDP for something of accelerators; it is only on CPUs that nobody asks.
    state = PartialState()
    state.distributed_type, state.backend = DistributedType.MULTI_GPU, "gloo"
    state.num_processes, state.process_index = dist.get_world_size(), dist.get_rank()
    return Accelerator(
        fsdp_plugin=FullyShardedDataParallelPlugin(
            auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
            state_dict_type="SHARDED_STATE_DICT",
            **plugin,
        )
    )


def _accelerate_fsdp2(folder: Path) -> tuple[list[float], list[str]]:
    """Losses, and the paths of the parameters."""
    settle()
    from torch.distributed.tensor import DTensor

    accelerator = accelerator_on_fsdp(fsdp_version=2)
    model = language_model()
    scope = {"accelerator": accelerator, "model": model, "conda_dist": conda_dist}
    exec(README[2], scope)
    model, wrapped = scope["model"], scope["optimizer"]
    optimizer = wrapped.optimizer
    assert isinstance(optimizer, Conda)
    for group in optimizer.param_groups:
        group["update_proj_gap"] = GAP
    assert all(isinstance(p, DTensor) for g in optimizer.param_groups for p in g["params"])
    losses = train(accelerator, model, wrapped)
    accelerator.save_state(str(folder))
    further = train(accelerator, model, wrapped)
    accelerator.load_state(str(folder))
    again = train(accelerator, model, wrapped)
    assert again == further
    return losses, [row["path"] for row in optimizer.report(show=False)]


def test_accelerate_with_fsdp2(tmp_path: Path) -> None:
    alone = _alone()
    for losses, paths in ranks.run(2, _accelerate_fsdp2, tmp_path):
        assert losses == pytest.approx(alone, abs=1e-4)
        assert paths.count("conda") == 14


def _made(model: Any, scales: Mapping[str, float] | None = None, **more: Any) -> Conda:
    """The optimizer that the Trainer makes of a model in one process."""
    import transformers

    from conda_dist.integrations.huggingface import conda_for_trainer

    options = {"learning_rate": RATE, "weight_decay": 0.1, "use_cpu": True, **more}
    arguments = transformers.TrainingArguments("unused", report_to=[], **options)
    chosen = conda_for_trainer(arguments, update_proj_gap=GAP, **(scales or {}))
    made = transformers.Trainer(
        model, arguments, optimizer_cls_and_kwargs=chosen
    ).create_optimizer()
    assert isinstance(made, Conda)
    return made


def test_diagnostics_in_the_trainers_log() -> None:
    import transformers

    from conda_dist.integrations.huggingface import DiagnosticsCallback, conda_for_trainer

    options = {"learning_rate": RATE, "use_cpu": True, "logging_steps": 2, "max_steps": 4}
    arguments = transformers.TrainingArguments(
        "unused", report_to=[], save_strategy="no", disable_tqdm=True, **options
    )
    trainer = transformers.Trainer(
        language_model(),
        arguments,
        train_dataset=texts(),
        optimizer_cls_and_kwargs=conda_for_trainer(arguments, diagnostics_every=3),
    )
    trainer.add_callback(DiagnosticsCallback(trainer))
    trainer.train()
    logged = [line for line in trainer.state.log_history if "conda/update_ratio" in line]
    assert [line["step"] for line in logged] == [3]
    assert 0 < logged[0]["adamw/update_ratio"] < 1


def _groups(optimizer: Conda) -> dict[tuple[str, float], list[str]]:
    """The names of the parameters by path and weight decay."""
    return {(g["algorithm"], g["weight_decay"]): g["param_names"] for g in optimizer.param_groups}


def test_trainers_groups() -> None:
    """The Trainer's decay and rate, and the paths of param_groups."""
    optimizer = _made(language_model())
    groups = _groups(optimizer)
    assert {len(groups["conda", 0.1]), len(optimizer.param_groups)} == {14, 3}
    assert set(groups["adamw", 0.1]) == {"model.embed_tokens.weight", "lm_head.weight"}
    assert all("norm" in name for name in groups["adamw", 0.0])
    assert {group["lr"] for group in optimizer.param_groups} == {RATE}
    without = _made(language_model(), weight_decay=0.0).param_groups
    assert sum(len(group["params"]) for group in without) == 21
    with pytest.raises(
        ValueError, match=r"learning_rate: 5e-05 is the default of TrainingArg.*scale=1\.0"
    ):
        _made(language_model(), learning_rate=5e-5)
    adamws = _made(language_model(), conda_dist.from_adamw(), learning_rate=5e-5)
    assert {(g["lr"], g["scale"], g["adamw_scale"]) for g in adamws.param_groups} == {
        (5e-5, 2.5, 10.0)
    }


def _fsdp1() -> str:
    """The error in a process whose Accelerate uses FSDP1."""
    settle()
    import transformers

    from conda_dist.integrations.huggingface import conda_for_trainer

    arguments = transformers.TrainingArguments(
        "unused", learning_rate=RATE, use_cpu=True, report_to=[]
    )
    factory, options = conda_for_trainer(arguments)
    accelerator_on_fsdp(fsdp_version=1)
    with pytest.raises(ValueError, match="Conda does not support FSDP1") as error:
        factory()(language_model(), **options)
    return str(error.value)


def test_fsdp1() -> None:
    assert all('fsdp_config={"version": 2' in said for said in ranks.run(1, _fsdp1))


def test_trainers_that_pass_their_arguments_too() -> None:
    """Axolotl's makes the optimizer by factory()(model, args, **kwargs)."""
    import transformers

    from conda_dist.integrations.huggingface import conda_for_trainer

    arguments = transformers.TrainingArguments("unused", learning_rate=RATE, use_cpu=True)
    factory, options = conda_for_trainer(arguments)
    trainer = transformers.Trainer(
        language_model(), arguments, optimizer_cls_and_kwargs=(factory, options)
    )
    made = factory()(trainer.model, arguments, **options)
    assert _groups(made) == _groups(trainer.create_optimizer())


def test_adapters() -> None:
    """PEFT's A and B take the conda path, DoRA's magnitudes the adamw path; rank 1 has none."""
    from peft import LoraConfig, get_peft_model

    def adapted(rank: int) -> Any:
        config = LoraConfig(r=rank, target_modules="all-linear", use_dora=True)
        return get_peft_model(language_model(), config)

    groups = _groups(_made(adapted(4)))
    assert len(groups["conda", 0.1]) == 28
    assert all(".lora_A." in name or ".lora_B." in name for name in groups["conda", 0.1])
    assert all("magnitude" in name for name in groups["adamw", 0.1])
    with pytest.raises(ValueError, match="no trainable matrix would reach"):
        _made(adapted(1))


def test_an_option_that_conda_has_not() -> None:
    import transformers

    from conda_dist.integrations.huggingface import conda_for_trainer

    arguments = transformers.TrainingArguments("unused", learning_rate=RATE, use_cpu=True)
    with pytest.raises(TypeError, match="update_gap"):
        conda_for_trainer(arguments, update_gap=3)
