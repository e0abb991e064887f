"""Long runs and odd circumstances: bases stay orthonormal, replicas equal, counts right."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

import models
import ranks
from conda_dist import Conda
from conda_dist.runtime import weight
from models import FSDP2, GAP, PLAIN, Layout


@pytest.mark.parametrize("options", [{}, {"state_dtype": torch.bfloat16}], ids=str)
def test_bases_stay_orthonormal(options: dict[str, Any]) -> None:
    """Q is the product of all rotations so far."""
    torch.manual_seed(0)
    params = [nn.Parameter(torch.randn(shape)) for shape in ((24, 16), (16, 40), (2, 16, 16))]
    optimizer = Conda([{"params": params, "algorithm": "conda"}], update_proj_gap=1, **options)
    for _ in range(500):
        for param in params:
            param.grad = torch.randn(param.shape)
        optimizer.step()
    for param in params:
        basis = optimizer.state[param]["basis"]
        assert optimizer.state[param]["basis_step"].eq(499).all()
        assert (basis.mT @ basis - torch.eye(16)).abs().max() < 1e-5


def _drift(dtype: torch.dtype = torch.float32) -> float:
    """How far a basis is from orthonormal after 200 refreshes by orthogonal iteration."""
    torch.manual_seed(0)
    param = nn.Parameter(torch.randn(160, 96))
    options = {"refresh_method": "orthogonal_iteration", "basis_dtype": dtype}
    optimizer = Conda([{"params": [param], "algorithm": "conda"}], update_proj_gap=1, **options)
    for _ in range(200):
        param.grad = torch.randn(param.shape)
        optimizer.step()
    basis = optimizer.state[param]["basis"].float()
    return (basis.mT @ basis - torch.eye(96)).abs().max().item()


def test_iterated_bases_are_corrected_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    often, rounded = _drift(), _drift(torch.bfloat16)
    monkeypatch.setattr(weight, "CORRECTED_EVERY", 10**9)
    never, rounded_too = _drift(), _drift(torch.bfloat16)
    print(often, never, rounded)
    assert often < 5e-6
    assert often < 0.5 * never
    # In bfloat16 every refresh rounds the basis, and each has to correct it.
    assert rounded == rounded_too < 2e-2


def _bits(layout: Layout) -> dict[str, Tensor]:
    model, optimizer = models.build(layout)
    models.train(model, optimizer, range(24))
    return models.snapshot(model, optimizer)


@pytest.mark.parametrize("layout", [("hsdp", (2, 2)), ("ddp", (3,))], ids=str)
def test_replicas_never_part(layout: Layout) -> None:
    """The replicas of rank r are those a whole set of shards away."""
    answers = ranks.run_on(layout, _bits)
    shards = 2 if layout[0] == "hsdp" else 1
    for rank in range(shards, len(answers)):
        assert not models.unequal(answers[rank], answers[rank - shards])


@pytest.mark.parametrize("layout", [("fsdp", (3,)), ("grid", (2, 2))], ids=str)
def test_the_same_run_twice_is_bit_identical(layout: Layout) -> None:
    world = torch.Size(layout[1]).numel()
    first, second = (ranks.run(world, _bits, layout, timeout=60) for _ in range(2))
    for ours, theirs in zip(first, second, strict=True):
        assert not models.unequal(ours, theirs)


def _real(layout: Layout) -> list[str]:
    """Forward and backward; saved in memory, resumed, against not stopping."""

    def steps(model: nn.Module, optimizer: Any, which: range) -> None:
        for step in which:
            generator = torch.Generator().manual_seed(step)
            tokens = torch.randint(models.VOCABULARY, (4, 9), generator=generator)
            logits = model(tokens[:, :-1]).flatten(0, 1)
            nn.functional.cross_entropy(logits, tokens[:, 1:].flatten()).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler = schedulers.get(optimizer)
            if scheduler:
                scheduler.step()
            optimizer.zero_grad()

    schedulers: dict[Any, Any] = {}

    def build(seed: int) -> tuple[Any, Any]:
        model, optimizer = models.build(layout, seed=seed)
        schedulers[optimizer] = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
        return model, optimizer

    model, optimizer = build(0)
    steps(model, optimizer, range(GAP + 2))
    resumed, loaded = build(1)
    resumed.load_state_dict(model.state_dict())
    loaded.load_state_dict(optimizer.state_dict())
    schedulers[loaded].load_state_dict(schedulers[optimizer].state_dict())
    for with_ in ((model, optimizer), (resumed, loaded)):
        steps(*with_, range(GAP + 2, 2 * GAP + 2))
    rates = {g["lr"] for o in (optimizer, loaded) for g in o.param_groups}
    problems = [] if len(rates) == 1 and rates != {models.SETTINGS["lr"]} else [f"rates {rates}"]
    return problems + models.unequal(
        models.snapshot(resumed, loaded), models.snapshot(model, optimizer)
    )


@pytest.mark.parametrize("layout", [FSDP2, ("hsdp", (2, 2))], ids=str)
def test_a_real_run_resumed_is_bit_identical(layout: Layout) -> None:
    for problems in ranks.run_on(layout, _real):
        assert not problems


def _frozen_meanwhile(layout: Layout) -> list[str]:
    """Frozen for a while and trained again: as if it had had no gradient in between."""
    name = "blocks.0.down.weight"
    model, optimizer = models.build(layout)
    twin, other = models.build(layout)
    models.train(model, optimizer, range(2))
    models.train(twin, other, range(2))
    frozen, bare = (dict(m.named_parameters())[name] for m in (model, twin))
    frozen.requires_grad_(False)
    models.train(model, optimizer, range(2, GAP + 2))
    frozen.requires_grad_(True)
    for step in range(2, GAP + 2):
        for key, param in twin.named_parameters():
            param.grad = None if param is bare else models.gradient(key, param, step)
        other.step()
    for with_ in ((model, optimizer), (twin, other)):
        models.train(*with_, range(GAP + 2, GAP + 5))
    state = optimizer.state[frozen]
    counts = [] if state["step"] == 5 and state["basis_step"] == GAP else ["counts are wrong"]
    return counts + models.unequal(models.snapshot(model, optimizer), models.snapshot(twin, other))


def test_frozen_and_trained_again() -> None:
    assert not _frozen_meanwhile(PLAIN)
    for problems in ranks.run(2, _frozen_meanwhile, FSDP2, timeout=60):
        assert not problems


@pytest.fixture
def _of_bfloat16() -> Iterator[None]:
    torch.set_default_dtype(torch.bfloat16)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.usefixtures("_of_bfloat16")
def test_steps_are_counted_whatever_the_default_dtype() -> None:
    """bfloat16 counts to 256 and no further."""
    params = [nn.Parameter(torch.zeros(4, 4)), nn.Parameter(torch.zeros(4))]
    optimizer = Conda([params[0]], update_proj_gap=150)
    optimizer.add_param_group({"params": [params[1]]})
    for _ in range(302):
        for param in params:
            param.grad = torch.ones_like(param)
        optimizer.step()
    assert [int(optimizer.state[param]["step"]) for param in params] == [302, 302]
    assert optimizer.state[params[0]]["basis_step"] == 300


def test_counts_stay_on_the_cpu_whatever_the_default_device() -> None:
    """Else they would be read back from the device at every step."""
    param, bias = nn.Parameter(torch.zeros(4, 4)), nn.Parameter(torch.zeros(4))
    optimizer = Conda([param, bias])
    with torch.device("meta"):  # stands for a GPU
        optimizer.init_state()
    for of in (param, bias):
        assert all(v.device.type == "cpu" for v in optimizer.state[of].values())


def test_batches_of_any_strides() -> None:
    """The leading dimensions of a batch need not lie in order for it to be updated."""
    torch.manual_seed(0)
    values, grad = torch.randn(2, 3, 5, 4), torch.randn(2, 3, 5, 4)
    ends = []
    for start in (values.clone(), values.transpose(0, 1).contiguous().transpose(0, 1)):
        param = nn.Parameter(start)
        optimizer = Conda([{"params": [param], "algorithm": "conda"}])
        param.grad = grad.clone()
        optimizer.step()
        ends.append(param.detach())
    assert not torch.equal(ends[0], values)
    torch.testing.assert_close(ends[0], ends[1])


@pytest.mark.parametrize("shape", [(6, 5), (5, 6), (6, 6)])
def test_matrices_of_any_strides(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    values, grad = torch.randn(shape), torch.randn(shape)
    ends = []
    for start in (values.clone(), values.T.contiguous().T):
        param = nn.Parameter(start)
        optimizer = Conda([{"params": [param], "algorithm": "conda"}], update_proj_gap=2)
        for _ in range(4):
            param.grad = grad.clone().T.contiguous().T
            optimizer.step()
        ends.append(param.detach())
    torch.testing.assert_close(ends[0], ends[1])


def _one_row() -> str:
    """A weight of one row, its basis of one number split over two ranks."""
    mesh = init_device_mesh("cpu", (2,))
    example = DTensor.from_local(torch.zeros(1), mesh, [Shard(0)], run_check=False)
    param = nn.Parameter(models.like(example, torch.ones(1, 6)))
    optimizer = Conda([{"params": [("w", param)], "algorithm": "conda"}], basis_budget=0)
    for _ in range(2):
        param.grad = models.like(param, torch.ones(1, 6))
        if (said := models.attempt(optimizer.step)) != "nothing was raised":
            return said
        other = nn.Parameter(models.like(example, torch.ones(4, 6)))
        optimizer.add_param_group({"params": [("x", other)], "algorithm": "conda"})
    return "nothing was raised"


def test_a_weight_of_one_row() -> None:
    for said in ranks.run(2, _one_row, timeout=60):
        assert said == "nothing was raised"
