"""Rules beside Conda: as torch or their papers say, and the same on every layout."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

import models
import papers
import ranks
from conda_dist import NAMO, NAMO_D, Conda, Muon, NorMuon, param_groups
from conda_dist.rules.orthogonal import OrthogonalRule
from parallel import ALL, BATCHES, DENSE, EXPERTS, MATRICES, S0, S1, S2, Layout, strided
from traffic import recorded

SETTINGS: dict[str, Any] = {"lr": 0.05, "weight_decay": 0.1}
STEPS = 4
KINDS: dict[str, Any] = {"muon": Muon, "normuon": NorMuon, "namo": NAMO, "namo_d": NAMO_D}
RIVALS = ("normuon", "namo", "namo_d")
EVERY_LAYOUT = [*((at, MATRICES) for at in DENSE), *((at, EXPERTS) for at in BATCHES)]


def _whole(name: str, shape: tuple[int, ...], step: int) -> Tensor:
    return models.gradient(name, torch.empty(shape), step)


def _parameters(shapes: Mapping[str, tuple[int, ...]], layout: Layout | None) -> Any:
    params: dict[str, nn.Parameter] = {}
    mesh = init_device_mesh("cpu", layout[0]) if layout is not None else None
    for name, shape in shapes.items():
        whole = _whole(name, shape, -1)
        params[name] = nn.Parameter(_placed(whole, mesh, layout))
    return params


def _placed(whole: Tensor, mesh: Any, layout: Layout | None) -> Tensor:
    if layout is None:
        return whole
    start = [ALL] * mesh.ndim
    replicated = DTensor.from_local(whole, mesh, start, run_check=False)
    return replicated.redistribute(mesh, layout[1])


def _train(
    params: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer, steps: range
) -> None:
    for step in steps:
        for name, param in params.items():
            grad = _whole(name, tuple(param.shape), step).to(param.dtype)
            if isinstance(param, DTensor):
                layout = (tuple(param.device_mesh.shape), list(param.placements))
                grad = _placed(grad, param.device_mesh, layout)
            param.grad = grad
        optimizer.step()


def _torch_s(
    shapes: Mapping[str, tuple[int, ...]], splits: tuple[int, ...] | None = None, **settings: Any
) -> dict[str, Tensor]:
    """What torch.optim.Muon makes of every matrix by itself."""
    ended = {}
    for name, shape in shapes.items():
        whole = _whole(name, shape, -1)
        parts = [_rows(m, splits) for m in whole.reshape(-1, *shape[-2:])]
        matrices = [nn.Parameter(part) for cut in parts for part in cut]
        optimizer = torch.optim.Muon(matrices, **{**SETTINGS, **settings})
        for step in range(STEPS):
            grads = _whole(name, shape, step).reshape(-1, *shape[-2:])
            cut = [part for grad in grads for part in _rows(grad, splits)]
            for matrix, grad in zip(matrices, cut, strict=True):
                matrix.grad = grad
            optimizer.step()
        ended[name] = torch.cat(list(matrices)).detach().reshape(shape)
        if splits is not None and sum(splits) != shape[-2]:
            ended[name] = _woven([m.detach() for m in matrices], splits)
    return ended


def _rows(matrix: Tensor, splits: tuple[int, ...] | None) -> list[Tensor]:
    """The parts of a matrix whose splits repeat down it."""
    if splits is None:
        return [matrix.clone()]
    periods = [block.split(splits) for block in matrix.split(sum(splits))]
    return [torch.cat(pieces) for pieces in zip(*periods, strict=True)]


def _woven(parts: list[Tensor], splits: tuple[int, ...]) -> Tensor:
    pieces = [part.split(rows) for part, rows in zip(parts, splits, strict=True)]
    return torch.cat([piece for period in zip(*pieces, strict=True) for piece in period])


def _ended(
    shapes: Mapping[str, tuple[int, ...]],
    layout: Layout | None,
    group: Any = None,
    rule: str = "muon",
    **options: Any,
) -> dict[str, Tensor]:
    params = _parameters(shapes, layout)
    named = {"params": list(params.items()), "algorithm": rule, **(group or {})}
    optimizer = KINDS[rule]([named], **{**SETTINGS, **options})
    _train(params, optimizer, range(STEPS))
    more = {"second_moment"} if rule in RIVALS else set()
    assert set(next(iter(optimizer.state.values()))) == {"step", "momentum_buffer"} | more or group
    return {name: models.whole(param) for name, param in params.items()}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"nesterov": False, "momentum": 0.5},
        {"adjust_lr_fn": "match_rms_adamw", "ns_steps": 3},
        {"adjust_lr_fn": "spectral_unclamped", "ns_coefficients": (2.0, -1.5, 0.5)},
        {"lr": torch.tensor(0.03), "weight_decay": 0.0},
        {"eps": 100.0},
    ],
    ids=str,
)
def test_one_process_is_torch_s_muon(options: dict[str, Any]) -> None:
    assert not models.unequal(_ended(MATRICES, None, **options), _torch_s(MATRICES, **options))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("nesterov", [True, False])
def test_other_dtypes_are_torch_s(dtype: torch.dtype, nesterov: bool) -> None:
    starts = [torch.randn(9, 5).to(dtype), torch.randn(4, 8).to(dtype)]
    ours, theirs = ([nn.Parameter(start.clone()) for start in starts] for _ in range(2))
    optimizers = (
        Muon([{"params": ours, "algorithm": "muon"}], nesterov=nesterov, **SETTINGS),
        torch.optim.Muon(theirs, nesterov=nesterov, **SETTINGS),
    )
    for step in range(STEPS):
        for params, optimizer in zip((ours, theirs), optimizers, strict=True):
            for i, param in enumerate(params):
                param.grad = models.gradient(str(i), param, step)
            optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert optimizers[0].state[ours[0]]["momentum_buffer"].dtype == dtype


@pytest.mark.parametrize(("layout", "shapes"), EVERY_LAYOUT, ids=str)
def test_layouts_are_torch_s_muon(layout: Layout, shapes: dict[str, tuple[int, ...]]) -> None:
    alone = _torch_s(shapes)
    for ended in ranks.run(torch.Size(layout[0]).numel(), _ended, shapes, layout):
        assert not models.unequal(ended, alone)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"nesterov": False, "momentum": 0.5, "beta2": 0.9},
        {"lr": 3.0, "weight_decay": 0.3},  # NAMO's rates are at their bounds
        {"eps": 0.5, "weight_decay": 0.0},
    ],
    ids=str,
)
@pytest.mark.parametrize("rule", RIVALS)
def test_float64_is_the_paper_s(
    rule: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(OrthogonalRule, "iteration_dtype", torch.float64)
    own: list[dict[str, Any]] = [{"clamp": 0.9}, {"clamp": 0.3}] if rule == "namo_d" else [{}]
    for chosen in ({**options, **each} for each in own):
        starts = {name: _whole(name, shape, -1).double() for name, shape in MATRICES.items()}
        params = {name: nn.Parameter(start.clone()) for name, start in starts.items()}
        group = {"params": list(params.items()), "algorithm": rule}
        _train(params, KINDS[rule]([group], **chosen), range(STEPS))
        for name, start in starts.items():
            grads = [_whole(name, tuple(start.shape), step).double() for step in range(STEPS)]
            expected = getattr(papers, rule)(start, grads, **chosen)
            moved = (expected - start).norm()
            assert (params[name] - expected).norm() < 1e-11 * moved, (name, chosen)


def _rivals(shapes: dict[str, tuple[int, ...]], layout: Layout | None) -> list[dict[str, Tensor]]:
    return [_ended(shapes, layout, rule=rule) for rule in RIVALS]


@pytest.mark.parametrize(("layout", "shapes"), EVERY_LAYOUT, ids=str)
def test_layouts_are_one_process(layout: Layout, shapes: dict[str, tuple[int, ...]]) -> None:
    alone = _rivals(shapes, None)
    for ended in ranks.run(torch.Size(layout[0]).numel(), _rivals, shapes, layout):
        for rule, found, expected in zip(RIVALS, ended, alone, strict=True):
            assert not models.unequal(found, expected), rule


@pytest.mark.parametrize("rule", RIVALS)
def test_a_batch_and_parts_are_their_matrices(rule: str) -> None:
    """As matrices of their own, which the paper's test holds."""
    whole = _whole("w", (2, 6, 5), -1)
    batch, fused = (nn.Parameter(w) for w in (whole.clone(), whole.reshape(12, 5).clone()))
    alone = [nn.Parameter(matrix.clone()) for matrix in whole]
    groups = [
        {"params": [("batch", batch), *((f"w{i}", w) for i, w in enumerate(alone))]},
        {"params": [("fused", fused)], "splits": (6, 6)},
    ]
    optimizer = KINDS[rule]([{**group, "algorithm": rule} for group in groups])
    for step in range(STEPS):
        batch.grad = _whole("w", (2, 6, 5), step)
        fused.grad = batch.grad.reshape(12, 5).clone()
        for matrix, grad in zip(alone, batch.grad, strict=True):
            matrix.grad = grad.clone()
        optimizer.step()
    assert torch.equal(batch, torch.stack(list(alone)))
    assert torch.equal(fused.view(2, 6, 5), batch)


FUSED = {"qkv": (16, 6), "wide": (8, 20)}


@pytest.mark.parametrize("splits", [(8,), (2, 1, 1)], ids=str)
@pytest.mark.parametrize("layout", [None, ((3,), [S0]), ((2, 2), [ALL, S1])], ids=str)
def test_parts_are_matrices_of_their_own(layout: Layout | None, splits: tuple[int, ...]) -> None:
    expected = _torch_s(FUSED, splits)
    world = 1 if layout is None else torch.Size(layout[0]).numel()
    for ended in ranks.run(world, _ended, FUSED, layout, {"splits": splits}):
        assert not models.unequal(ended, expected)


def test_kernels_are_matrices() -> None:
    model = nn.ModuleDict({"blocks": nn.ModuleList([nn.Conv2d(4, 6, 3)])})
    kernel = next(param for param in model.parameters() if param.ndim == 4)
    matrix = nn.Parameter(kernel.detach().clone().flatten(1))
    ours = Muon(param_groups(model, kernels=True, rule="muon"), **SETTINGS)
    theirs = torch.optim.Muon([matrix], **SETTINGS)
    for step in range(STEPS):
        kernel.grad = models.gradient("kernel", kernel, step)
        matrix.grad = kernel.grad.flatten(1).clone()
        ours.step()
        theirs.step()
    assert torch.equal(kernel.flatten(1), matrix)


def _replicas() -> dict[str, Tensor]:
    return _ended(MATRICES | EXPERTS, None, process_group=dist.group.WORLD)


def test_plain_parameters_with_a_process_group() -> None:
    for ended in ranks.run(2, _replicas):
        assert not models.unequal(ended, _torch_s(MATRICES | EXPERTS))


# The rest of a model


def _built(layout: models.Layout, rule: str = "muon", **options: Any) -> Any:
    torch.manual_seed(0)
    model = models.shard(models.Tiny(), layout)
    if rule == "conda":
        return model, Conda(param_groups(model), **options)
    return model, KINDS[rule](param_groups(model, rule=rule), **{**SETTINGS, **options})


def test_the_rest_takes_adamw_s_step_with_options_of_its_own() -> None:
    """As it does beside Conda: rate lr * adamw_scale, decay lr * weight_decay."""
    ours = {"betas": (0.8, 0.9), "adamw_scale": 3.0}
    pairs = [
        _built(models.PLAIN, adamw_eps=1e-4, **ours),
        _built(models.PLAIN, "conda", **{**SETTINGS, "eps": 1e-4, **ours}),
    ]
    for model, optimizer in pairs:
        models.train(model, optimizer, range(STEPS))
    muon, conda = (dict(model.named_parameters()) for model, _ in pairs)
    rest = [row["name"] for row in pairs[0][1].report(show=False) if row["path"] == "adamw"]
    assert "embed.weight" in rest
    assert all(torch.equal(muon[name], conda[name]) for name in rest)
    assert {row["rate"] for row in pairs[0][1].report(show=False)} == {0.05, 0.05 * 3.0}


def test_paths_by_name_and_shape() -> None:
    model = models.Tiny()
    by_name = Muon(model.named_parameters()).report(show=False)
    by_module = Muon(param_groups(model, rule="muon")).report(show=False)
    assert by_name == by_module
    assert {row["path"] for row in by_name} == {"muon", "adamw"}
    with pytest.raises(ValueError, match=r"would reach the muon path.*rule='muon'"):
        Muon([("embed.weight", nn.Parameter(torch.ones(3, 4)))])


# Checkpoints


def _train_and_save(layout: models.Layout, folder: str, to: str, kind: str) -> Any:
    """Trains, saves half way, and gives where it ends."""
    model, optimizer = _built(layout, kind)
    models.train(model, optimizer, range(2))
    if to == "dcp":
        models.save(folder, model, optimizer)
    else:
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        parts = get_state_dict(model, optimizer, options=options)
        if dist.get_rank() == 0:
            torch.save(parts, f"{folder}/full.pt")
    models.train(model, optimizer, range(2, STEPS))
    ended = models.snapshot(model, optimizer, models.whole)
    # The rest's elements are rounded by where they are in torch's fused kernel.
    rule = {row["name"] for row in optimizer.report(show=False) if row["path"] == kind}
    return {name: value for name, value in ended.items() if name.partition(":")[0] in rule}


def _load_and_go_on(layout: models.Layout, folder: str, to: str, kind: str) -> Any:
    model, optimizer = _built(layout, kind)
    if to == "dcp":
        models.load(folder, model, optimizer)
    else:
        parts = torch.load(f"{folder}/full.pt")
        options = StateDictOptions(full_state_dict=True)
        set_state_dict(
            model,
            optimizer,
            model_state_dict=parts[0],
            optim_state_dict=parts[1],
            options=options,
        )
    models.train(model, optimizer, range(2, STEPS))
    ended = models.snapshot(model, optimizer, models.whole)
    # The rest's elements are rounded by where they are in torch's fused kernel.
    rule = {row["name"] for row in optimizer.report(show=False) if row["path"] == kind}
    return {name: value for name, value in ended.items() if name.partition(":")[0] in rule}


@pytest.mark.parametrize(
    ("to", "kind"), [("dcp", "muon"), ("full", "muon"), ("full", "namo_d")], ids=str
)
@pytest.mark.thorough
def test_resumed_on_other_ranks(tmp_path: Path, to: str, kind: str) -> None:
    ended = ranks.run(3, _train_and_save, ("fsdp", (3,)), str(tmp_path), to, kind)[0]
    assert "blocks.0.up.weight:momentum_buffer" in ended
    assert ("blocks.0.up.weight:second_moment" in ended) == (kind in RIVALS)
    layouts: list[models.Layout] = [("fsdp", (2,)), ("hsdp", (2, 2)), ("grid", (2, 2))]
    for layout in layouts:
        world = torch.Size(layout[1]).numel()
        for resumed in ranks.run(world, _load_and_go_on, layout, str(tmp_path), to, kind):
            assert not models.unequal(resumed, ended)


OTHERS = [("muon", "conda"), ("conda", "muon"), ("normuon", "muon"), ("namo", "namo_d")]


def _other_rules(layout: models.Layout) -> list[tuple[str, bool]]:
    """What each rule says to the other's checkpoint, and whether it has changed nothing."""
    answers = []
    for ours, theirs in OTHERS:
        (model, optimizer), (other, foreign) = _built(layout, ours), _built(layout, theirs)
        models.train(model, optimizer, range(2))
        models.train(other, foreign, range(2))
        saved, before = foreign.state_dict(), models.snapshot(model, optimizer)
        said = models.attempt(optimizer.load_state_dict, saved)
        answers.append((said, not models.unequal(models.snapshot(model, optimizer), before)))
    return answers


@pytest.mark.parametrize("layout", [models.PLAIN, models.FSDP2], ids=str)
def test_another_rule_s_checkpoint_is_refused_with_both_names(layout: models.Layout) -> None:
    for answers in ranks.run(max(1, *layout[1], 1), _other_rules, layout):
        for names, (said, unchanged) in zip(OTHERS, answers, strict=True):
            assert all(f"{name!r}" in said for name in names)
            assert unchanged


# What is refused


def _refusal(group: dict[str, Any], rule: str = "muon") -> str:
    return models.attempt(lambda: KINDS[rule]([group]))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"momentum": 1.0}, "momentum must be at least 0 and below 1, got 1.0"),
        ({"momentum": "x"}, "momentum must be a number"),
        ({"nesterov": 1}, "nesterov must be a bool, got 1"),
        ({"ns_coefficients": (1.0, 2.0)}, "ns_coefficients must be three numbers"),
        ({"ns_coefficients": (1.0, 2.0, float("nan"))}, r"ns_coefficients\[2\] must be"),
        ({"ns_steps": 100}, "ns_steps must be at least 0 and below 100, got 100"),
        ({"ns_steps": 2.0}, "ns_steps must be an int"),
        ({"adjust_lr_fn": "mine"}, "adjust_lr_fn must be one of original, match_rms_adamw, spec"),
        ({"adamw_eps": -1.0}, "adamw_eps must be at least 0"),
        ({"eps": -1.0}, "eps must be at least 0"),
        ({"lr": -1.0}, "lr must be at least 0"),
        ({"betas": (0.9, 1.0)}, r"betas\[1\]"),
        ({"rule": "normuon", "beta2": 1.0}, "beta2 must be at least 0 and below 1, got 1.0"),
        ({"rule": "normuon", "adjust_lr_fn": "mine"}, "adjust_lr_fn must be one of original"),
        ({"rule": "namo", "beta2": None}, "beta2 must be a number, got None"),
        ({"rule": "namo", "scale": -0.2}, "scale must be at least 0"),
        ({"rule": "namo", "ns_steps": 100}, "ns_steps must be at least 0 and below 100, got 100"),
        ({"rule": "namo_d", "clamp": 0.0}, "clamp must be above 0 and at most 1, got 0.0"),
        ({"rule": "namo_d", "clamp": 1.5}, "clamp must be above 0 and at most 1, got 1.5"),
        ({"rule": "namo_d", "clamp": float("nan")}, "clamp must be above 0"),
        ({"rule": "namo_d", "clamp": True}, "clamp must be a number, got True"),
    ],
    ids=str,
)
def test_options_out_of_their_range(options: dict[str, Any], said: str) -> None:
    kind = KINDS[options.get("rule", "muon")]
    options = {name: value for name, value in options.items() if name != "rule"}
    params = [("w", nn.Parameter(torch.ones(3, 3)))]
    with pytest.raises((TypeError, ValueError), match=said):
        kind(params, **options)
    with pytest.raises((TypeError, ValueError), match=f"parameter group 0: {said}"):
        kind([{"params": params, **options}])
    optimizer = kind(params)
    params[0][1].grad = torch.ones(3, 3)
    optimizer.param_groups[0].update(options)
    if options != {"lr": -1.0}:  # schedulers may leave a rounding error
        with pytest.raises((TypeError, ValueError), match=f"parameter group 0: {said}"):
            optimizer.step()


@pytest.mark.parametrize("rule", KINDS)
def test_parameters_that_the_rule_cannot_take(rule: str) -> None:
    vector, sparse = nn.Parameter(torch.ones(3)), torch.eye(3).to_sparse().requires_grad_()
    flat = nn.Parameter(torch.ones(12))
    flat._is_flat_param = True  # type: ignore[attr-defined]
    partitioned = nn.Parameter(torch.ones(0))
    partitioned.ds_id, partitioned.ds_shape = 0, (3, 3)  # type: ignore[attr-defined]
    weight, title = nn.Parameter(torch.ones(3, 3)), KINDS[rule].__name__

    said = _refusal({"params": [("a.bias", vector)], "algorithm": rule}, rule)
    assert f"a.bias: a parameter of shape (3,) cannot take the {rule} path" in said
    said = _refusal({"params": [("a.weight", sparse)], "algorithm": rule}, rule)
    assert "a.weight: only dense" in said
    said = _refusal({"params": [("a._flat_param", flat)], "algorithm": "adamw"}, rule)
    assert "a._flat_param" in said
    assert f"{title} cannot step" in said
    said = _refusal({"params": [("a.weight", partitioned)], "algorithm": "adamw"}, rule)
    assert "a.weight: ZeRO stage 3 has partitioned it" in said
    assert f"only Conda is supported, not {title}" in said
    said = _refusal({"params": [("a.weight", weight)], "algorithm": "conda"}, rule)
    assert f"algorithm must be one of {rule}, adamw" in said
    said = _refusal({"params": [("a.weight", weight)], "rule": "conda"}, rule)
    assert f"the group is for rule 'conda', this optimizer's is '{rule}'" in said


def _mixed() -> str:
    """One rank has another rule."""
    mesh = init_device_mesh("cpu", (2,))
    weight = nn.Parameter(_placed(torch.ones(4, 4), mesh, ((2,), [S0])))
    weight.grad = torch.ones_like(weight)
    kind = Muon if dist.get_rank() else Conda
    return models.attempt(kind([("a.weight", weight)]).step)


def test_ranks_with_different_rules() -> None:
    for said in ranks.run(2, _mixed):
        assert "plan differs" in said
        assert "conda every 2000 steps" in said
        assert "muon" in said


# What is moved and kept


def _counted(
    layout: Layout, shapes: dict[str, tuple[int, ...]], rule: str
) -> list[tuple[int, int]]:
    """What is reported and counted: bytes of state, sent in a step and in saving."""
    params = _parameters(shapes, layout)
    optimizer = KINDS[rule]([{"params": list(params.items()), "algorithm": rule}], **SETTINGS)
    _train(params, optimizer, range(2))
    for param in params.values():
        param.grad = torch.ones_like(param)
    sent = []
    for action in (optimizer.step, optimizer.state_dict):
        with recorded() as calls:
            action()
        sent.append(sum(call.sent for call in calls if call.name == "all_to_all"))
    state = sum(models.local(v).nbytes for s in optimizer.state.values() for v in s.values())
    rows = optimizer.report(show=False)
    for row in rows:
        assert row["owners"] == []
        assert row["basis"] == ""
        assert row["refresh_bytes"] == row["step_bytes"]
    keys = ("state_bytes", "step_bytes", "save_bytes")
    reported = [sum(int(row[key]) for row in rows) for key in keys]  # type: ignore[literal-required]
    return list(zip(reported, (state, *sent), strict=True))


@pytest.mark.parametrize(
    ("layout", "shapes"),
    [
        (((4,), [S0]), MATRICES),
        (((3,), [S1]), MATRICES),
        (((2, 2), [ALL, S0]), MATRICES),
        (((2, 2), [strided(0, 2), S0]), MATRICES),
        (((2, 3), [S1, S2]), EXPERTS),
    ],
    ids=str,
)
@pytest.mark.parametrize("rule", KINDS)
def test_reported_bytes_are_counted_ones(layout: Layout, shapes: Any, rule: str) -> None:
    answers = ranks.run(torch.Size(layout[0]).numel(), _counted, layout, shapes, rule)
    for counted in answers:
        assert all(reported == there for reported, there in counted), counted
    assert sum(counted[1][0] for counted in answers)


# States of other shapes: a number for each row, for each column, or for the matrix


def _halfway(
    shapes: Mapping[str, tuple[int, ...]],
    layout: Layout | None,
    splits: Any,
    rule: str,
    folder: str,
    how: str,
) -> dict[str, Tensor]:
    """Trains, and saves or loads half way."""
    params = _parameters(shapes, layout)
    named = {"params": list(params.items()), "algorithm": rule, "splits": splits}
    optimizer = KINDS[rule]([named], **SETTINGS)
    model = nn.ParameterDict(params)
    if how == "save":
        _train(params, optimizer, range(2))
        models.save(folder, model, optimizer)
    else:
        models.load(folder, model, optimizer)
    _train(params, optimizer, range(2, STEPS))
    return models.snapshot(model, optimizer, models.whole)


@pytest.mark.parametrize(
    ("shapes", "splits", "layouts"),
    [
        (MATRICES, None, [((3,), [S0]), ((2,), [S1]), ((2, 2), [strided(0, 2), S0])]),
        (EXPERTS, None, [((3,), [S1]), ((2, 2), [S0, S2]), ((2, 2), [S1, S2])]),
        (FUSED, (2, 2), [((3,), [S0]), ((2, 2), [ALL, S1])]),
    ],
    ids=["matrices", "batches", "parts"],
)
@pytest.mark.parametrize("rule", RIVALS)
@pytest.mark.thorough
def test_states_of_other_shapes(
    tmp_path: Path, shapes: Any, splits: Any, layouts: Any, rule: str
) -> None:
    """On every layout as on one process, saved on some ranks and resumed on others."""
    folders = [str(tmp_path / str(i)) for i in range(len(layouts) + 1)]
    at = ((1,), [ALL])
    (alone,) = ranks.run(1, _halfway, shapes, at, splits, rule, folders[0], "save")
    name, m, n = next((name, *shape[-2:]) for name, shape in shapes.items())
    key, rows = ("second_moment", m) if splits is None else ("second_moment_0", m // 2)
    shape = {"normuon": (rows, 1), "namo": (1,), "namo_d": (n,)}[rule]
    assert alone[f"{name}:{key}"].shape == (*shapes[name][:-2], *shape)
    for i, layout in enumerate(layouts):
        world = torch.Size(layout[0]).numel()
        for how, folder in (("save", folders[i + 1]), ("load", folders[i])):
            args = shapes, layout, splits, rule, folder, how
            for ended in ranks.run(world, _halfway, *args):
                assert not models.unequal(ended, alone)


def test_coefficients_set_in_place_are_checked() -> None:
    param = nn.Parameter(torch.ones(4, 6))
    optimizer = Muon([("w", param)], ns_coefficients=[3.4, -4.7, 2.0])  # type: ignore[arg-type]
    for _ in range(2):
        param.grad = torch.ones(4, 6)
        optimizer.step()
    before = param.detach().clone()
    optimizer.param_groups[0]["ns_coefficients"][0] = float("nan")
    with pytest.raises(ValueError, match=r"parameter group 0: ns_coefficients\[0\] must be"):
        optimizer.step()
    assert torch.equal(param.detach(), before)
