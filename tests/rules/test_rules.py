"""Rules beside Conda: as their papers say, the same on every layout, and what they refuse."""

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

import models
import papers
import ranks
import rule_runs
from conda_dist import Conda, Muon, param_groups
from conda_dist.rules.orthogonal import OrthogonalRule
from parallel import ALL, EXPERTS, MATRICES, S0, S1, S2, Layout, strided
from rule_runs import EVERY_LAYOUT, FUSED, OPTIMIZERS, RIVALS, SETTINGS, STEPS, WHOLE, make, value
from traffic import recorded, sent_bytes


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
        starts = {
            name: rule_runs.value(name, shape, -1).double() for name, shape in MATRICES.items()
        }
        params = {name: nn.Parameter(start.clone()) for name, start in starts.items()}
        group = {"params": list(params.items()), "algorithm": rule}
        rule_runs.train(params, OPTIMIZERS[rule]([group], **chosen), range(STEPS))
        for name, start in starts.items():
            grads = [
                rule_runs.value(name, tuple(start.shape), step).double() for step in range(STEPS)
            ]
            expected = getattr(papers, rule)(start, grads, **chosen)
            moved = (expected - start).norm()
            assert (params[name] - expected).norm() < 1e-11 * moved, (name, chosen)


def _each(shapes: dict[str, tuple[int, ...]], layout: Layout | None) -> list[dict[str, Tensor]]:
    return [rule_runs.ended(shapes, layout, rule=rule) for rule in WHOLE]


@pytest.mark.parametrize(("layout", "shapes"), EVERY_LAYOUT, ids=str)
def test_layouts_are_one_process(layout: Layout, shapes: dict[str, tuple[int, ...]]) -> None:
    alone = _each(shapes, None)
    for ended in ranks.run(torch.Size(layout[0]).numel(), _each, shapes, layout):
        for rule, found, expected in zip(WHOLE, ended, alone, strict=True):
            assert not models.unequal(found, expected), rule


@pytest.mark.parametrize("rule", WHOLE)
def test_a_batch_and_parts_are_their_matrices(rule: str) -> None:
    """As matrices of their own, which the paper's test holds, or the reference's."""
    whole = rule_runs.value("w", (2, 6, 5), -1)
    batch, fused = (nn.Parameter(w) for w in (whole.clone(), whole.reshape(12, 5).clone()))
    alone = [nn.Parameter(matrix.clone()) for matrix in whole]
    optimizers = [
        rule_runs.make(rule, {"batch": batch, **{f"w{i}": w for i, w in enumerate(alone)}}),
        rule_runs.make(rule, {"fused": fused}, {"splits": (6, 6)}),
    ]
    for step in range(STEPS):
        batch.grad = rule_runs.value("w", (2, 6, 5), step)
        fused.grad = batch.grad.reshape(12, 5).clone()
        for matrix, grad in zip(alone, batch.grad, strict=True):
            matrix.grad = grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    # A product of a batch may round otherwise than those of its matrices.
    equal = torch.allclose if rule == "gradients" else torch.equal
    assert equal(batch, torch.stack(list(alone)))
    assert equal(fused.view(2, 6, 5), batch)


# The rest of a model


def _built(layout: models.Layout, rule: str = "muon", **options: Any) -> Any:
    torch.manual_seed(0)
    model = models.shard(models.Tiny(), layout)
    if rule == "conda":
        return model, Conda(param_groups(model), **options)
    return model, OPTIMIZERS[rule](param_groups(model, rule=rule), **{**SETTINGS, **options})


@pytest.mark.parametrize("rule", [*OPTIMIZERS, "gradients", "momentum"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_leaves_gradients_as_they_are(rule: str, dtype: torch.dtype) -> None:
    """Steps with a refresh and without: the caller may log or accumulate them."""
    shapes = {"square": (4, 4), "tall": (6, 4), "wide": (4, 6), "experts": (2, 4, 4)}
    params = {name: nn.Parameter(value(name, at, -1).to(dtype)) for name, at in shapes.items()}
    named = [{"params": [*params.items()], "algorithm": "conda"}]
    optimizer = Conda(named, update_proj_gap=2) if rule == "momentum" else make(rule, params)
    for step in range(3):
        grads = {name: value(name, at, step).to(dtype) for name, at in shapes.items()}
        for name, param in params.items():
            param.grad = grads[name].clone()
        optimizer.step()
        for name, param in params.items():
            assert param.grad is not None
            assert torch.equal(param.grad, grads[name]), name


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


def _of_rule(model: Any, optimizer: Any, kind: str) -> dict[str, Tensor]:
    """The rule's weights and states. torch's fused kernel rounds the others by where they are."""
    ended = models.snapshot(model, optimizer, models.whole)
    rule = {row["name"] for row in optimizer.report(show=False) if row["path"] == kind}
    return {name: value for name, value in ended.items() if name.partition(":")[0] in rule}


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
    return _of_rule(model, optimizer, kind)


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
    return _of_rule(model, optimizer, kind)


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
    return models.attempt(lambda: OPTIMIZERS[rule]([group]))


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
    kind = OPTIMIZERS[options.get("rule", "muon")]
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


@pytest.mark.parametrize("rule", OPTIMIZERS)
def test_parameters_that_the_rule_cannot_take(rule: str) -> None:
    vector, sparse = nn.Parameter(torch.ones(3)), torch.eye(3).to_sparse().requires_grad_()
    flat = nn.Parameter(torch.ones(12))
    flat._is_flat_param = True  # type: ignore[attr-defined]
    partitioned = nn.Parameter(torch.ones(0))
    partitioned.ds_id, partitioned.ds_shape = 0, (3, 3)  # type: ignore[attr-defined]
    weight, title = nn.Parameter(torch.ones(3, 3)), OPTIMIZERS[rule].__name__

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
    weight = nn.Parameter(rule_runs.placed(torch.ones(4, 4), mesh, ((2,), [S0])))
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
    """What is reported and counted: bytes of state, and those sent in steps and in saving."""
    params = rule_runs.parameters(shapes, layout)
    optimizer = rule_runs.make(rule, params)
    rule_runs.train(params, optimizer, range(1))
    for param in params.values():
        param.grad = torch.ones_like(param)
    sent = []
    for action in (optimizer.step, optimizer.step, optimizer.state_dict):
        with recorded() as calls:
            action()
        sent.append(sent_bytes(calls))
    state = sum(models.local(v).nbytes for s in optimizer.state.values() for v in s.values())
    rows = optimizer.report(show=False)
    for row in rows:
        assert bool(row["owners"]) == bool(row["basis"]) == (rule == "gradients")
    keys = ("state_bytes", "step_bytes", "refresh_bytes", "save_bytes")
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
@pytest.mark.parametrize("rule", [*OPTIMIZERS, "gradients"])
def test_reported_bytes_are_counted_ones(layout: Layout, shapes: Any, rule: str) -> None:
    answers = ranks.run(torch.Size(layout[0]).numel(), _counted, layout, shapes, rule)
    for counted in answers:
        assert all(reported == there for reported, there in counted), counted
    assert sum(counted[1][0] for counted in answers)


# States of other shapes: a number for each row, for each column, or for the matrix; bases


def _halfway(
    shapes: Mapping[str, tuple[int, ...]],
    layout: Layout | None,
    splits: Any,
    rule: str,
    folder: str,
    how: str,
) -> dict[str, Tensor]:
    """Trains, and saves or loads half way."""
    params = rule_runs.parameters(shapes, layout)
    optimizer = rule_runs.make(rule, params, {"splits": splits})
    model = nn.ParameterDict(params)
    if how == "save":
        rule_runs.train(params, optimizer, range(2))
        models.save(folder, model, optimizer)
    else:
        models.load(folder, model, optimizer)
    rule_runs.train(params, optimizer, range(2, STEPS))
    return models.snapshot(model, optimizer, models.whole)


def _each_halfway(
    shapes: Mapping[str, tuple[int, ...]], layout: Layout, splits: Any, folder: str, how: str
) -> list[dict[str, Tensor]]:
    """All of them in one call: the rules share what torch keeps of how its operators shard."""
    return [_halfway(shapes, layout, splits, rule, f"{folder}/{rule}", how) for rule in WHOLE]


@pytest.mark.parametrize(
    ("shapes", "splits", "layouts"),
    [
        (MATRICES, None, [((3,), [S0]), ((2,), [S1]), ((2, 2), [strided(0, 2), S0])]),
        (EXPERTS, None, [((3,), [S1]), ((2, 2), [S0, S2]), ((2, 2), [S1, S2])]),
        (FUSED, (2, 2), [((3,), [S0]), ((2, 2), [ALL, S1])]),
    ],
    ids=["matrices", "batches", "parts"],
)
@pytest.mark.thorough
def test_states_of_other_shapes(tmp_path: Path, shapes: Any, splits: Any, layouts: Any) -> None:
    """On every layout as on one process, saved on some ranks and resumed on others."""
    folders = [str(tmp_path / str(i)) for i in range(len(layouts) + 1)]
    at = ((1,), [ALL])
    (alone,) = ranks.run(1, _each_halfway, shapes, at, splits, folders[0], "save")
    name, m, n = next((name, *shape[-2:]) for name, shape in shapes.items())
    part, rows = ("", m) if splits is None else ("_0", m // 2)
    for rule, ended in zip(WHOLE, alone, strict=True):
        state = (
            ("right_basis" if rows >= n else "left_basis")
            if rule == "gradients"
            else "second_moment"
        )
        shape = {
            "normuon": (rows, 1),
            "namo": (1,),
            "namo_d": (n,),
            "gradients": (min(rows, n),) * 2,
        }[rule]
        assert ended[f"{name}:{state}{part}"].shape == (*shapes[name][:-2], *shape)
    for i, layout in enumerate(layouts):
        world = torch.Size(layout[0]).numel()
        for how, folder in (("save", folders[i + 1]), ("load", folders[i])):
            for here in ranks.run(world, _each_halfway, shapes, layout, splits, folder, how):
                for rule, ended, expected in zip(WHOLE, here, alone, strict=True):
                    assert not models.unequal(ended, expected), (rule, layout, how)
