"""What optimizers would cost a model on a mesh that need not exist.

Layouts, owners and bytes are those of the optimizer's own plans; seconds follow from them and the
stated rates of the hardware, with nothing overlapped: upper bounds of the time, given the rates.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields

import torch
from torch import nn

from conda_dist import param_groups
from conda_dist.launch.job.optimizer_config import CondaConfig
from conda_dist.launch.tools.hardware import (
    BF16_LAUNCHES,
    EXCHANGE_LAUNCHES,
    HOST_BF16,
    HOST_EXCHANGE,
    HOST_STEP,
    HOST_UPDATE,
    UPDATE_LAUNCHES,
    Hardware,
    Mesh,
)
from conda_dist.layout.layout import Coordinate, Layout, Split, Topology
from conda_dist.options import Options
from conda_dist.plan.compute_groups import Request, assign_owners, choose
from conda_dist.plan.costs import Costs, Sizes, collectives, costs, refresh_flops, svd_flops
from conda_dist.plan.schedule import fill_tasks
from conda_dist.plan.weight_plan import WeightPlan, plan_weight
from conda_dist.report import sizes_of
from conda_dist.rules.gradient_bases import GradientBasesRule, conda_rule, sides_of
from conda_dist.rules.muon import MuonRule
from conda_dist.rules.rule import Rule
from conda_dist.rules.states import moment_dtype, second_dtype

ROW_WISE = (".o_proj.", ".down_proj.", ".attn.c_proj.", ".mlp.c_proj.")
"""Weights whose columns tensor parallelism splits; it splits the rows of the others."""
PASSES = 11
"""Times an element of 4 bytes is read or written in a step, beside the two products."""


Shapes = Mapping[str, tuple[int, ...]]
"""Shapes of parameters by name."""


@dataclass(slots=True)
class Kind:
    """Weights that are alike: those of one name in all layers."""

    name: str  # with * for the layer
    plan: WeightPlan  # of one of them
    count: int = 0
    state: int = 0  # bytes of state that all of them cost the rank that was asked
    step: int = 0  # bytes it sends for them in a step without a refresh
    refresh: int = 0  # bytes it sends more for a refresh
    flops: float = 0.0  # operations of its matrix products in a step


@dataclass(slots=True)
class Forecast:
    """What an optimizer costs the busiest rank."""

    state: int = 0  # bytes of optimizer state
    # Bytes it sends in a step without a refresh, and more for a refresh, by mesh dimension.
    step: Counter[int] = field(default_factory=Counter)
    refresh: Counter[int] = field(default_factory=Counter)
    flops: float = 0.0  # operations of its matrix products in a step
    waited: float = 0.0  # and those of a task's busiest group beyond its own, which it waits for
    # Operations of the decompositions in a refresh that training waits for, one after another: the
    # busiest owner's of each task. Beside them those of the owner that has most of them, which
    # nothing holds up in the background.
    decompose: float = 0.0
    busiest: float = 0.0
    rotate: float = 0.0  # operations of taking what it has to new bases
    elements: int = 0  # that it updates in a step
    collectives: int = 0  # of a step
    updates: int = 0  # matrices of which it computes an update in a step
    copies: int = 0  # times that it packs or unpacks a gradient or an update in a step
    bf16: bool = False  # whether its products are in bfloat16
    svd: bool = True  # whether decompositions run at the SVD's rate, else that of float32 products
    kinds: list[Kind] = field(default_factory=list)  # its projected weights


def layout(name: str, shape: tuple[int, ...], mesh: Mesh) -> Layout:
    """Where torchtitan's FSDP2 over tensor parallelism puts a parameter's elements."""
    tp: Split | None = None
    if mesh.tp > 1 and len(shape) == 2:
        tp = Split(1) if any(part in f".{name}" for part in ROW_WISE) else Split(0)
    cut_again = tp is not None and tp.dim == 0
    shard = Split(0, mesh.tp if cut_again else 1)
    return Layout(shape, mesh.sizes, (None, shard, tp))


def named_shapes(model: nn.Module) -> tuple[Shapes, Shapes]:
    """Shapes of a model's parameters by name: on the conda path, and on AdamW's."""
    paths: dict[str, dict[str, tuple[int, ...]]] = {"conda": {}, "adamw": {}}
    for group in param_groups(model):
        for name, param in group["params"]:
            paths[group["algorithm"]][name] = tuple(param.shape)
    return paths["conda"], paths["adamw"]


def forecast_conda(
    projected: Shapes,
    others: Shapes,
    mesh: Mesh,
    settings: CondaConfig,
    at: Coordinate | None = None,
) -> Forecast:
    """Conda on shards.

    Args:
        projected: Shapes of the projected weights by name.
        others: Shapes of those that AdamW updates.
        mesh: The ranks.
        settings: Conda's own options.
        at: The rank to look at, by its coordinate; the busiest if none is given.
    """
    options = conda_options(settings)
    return _sum_up(conda_rule(options), options, projected, others, mesh, at)


def conda_options(settings: CondaConfig) -> Options:
    """The options of a Conda with these settings."""
    values = settings.with_preset()
    return Options(**{option.name: getattr(values, option.name) for option in fields(Options)})


def _plans(rule: Rule, options: Options, projected: Shapes, mesh: Mesh) -> list[WeightPlan]:
    topology = Topology(mesh.sizes, tuple(range(mesh.ranks)))
    basis = rule.states(1, 1, torch.float32).get("basis")
    size = 0 if basis is None else basis.dtype.itemsize
    requests = [
        Request(name, topology, layout(name, shape, mesh), size, rule.whole)
        for name, shape in projected.items()
    ]
    choices = choose(requests, options.basis_budget)
    return assign_owners(
        [
            plan_weight(
                request.name,
                topology,
                request.storage,
                group=choice.group,
                bases=len(rule.bases(*request.storage.shape)),
            )
            for request, choice in zip(requests, choices, strict=True)
        ]
    )


def _sizes(rule: Rule, plan: WeightPlan) -> Sizes:
    m, n = plan.storage.shape
    return sizes_of(rule, m, n, torch.float32)


def _products(rule: Rule, plan: WeightPlan, numel: int) -> float:
    """Operations of the products of a step, of a rank that computes some elements of a weight."""
    r = min(plan.storage.shape)
    if isinstance(rule, GradientBasesRule):
        # A Gram matrix, two projections and the way back, on each side.
        return len(sides_of(*plan.storage.shape)) * 4 * 2.0 * numel * r
    if not rule.whole:
        return 2 * 2.0 * numel * r
    return 5 * (4.0 * numel * r + 2.0 * r**3) if numel else 0.0


def _refresh_work(rule: Rule, options: Options, plan: WeightPlan) -> dict[Coordinate, float]:
    """Operations of a refresh of a weight, by the coordinate that decomposes it."""
    m, n = plan.storage.shape
    if not rule.refreshes:
        return {}
    work = refresh_flops(m, n, options.refresh_method)
    if isinstance(rule, GradientBasesRule):
        iterated = options.refresh_method == "orthogonal_iteration"
        # For each basis two products, and a QR decomposition or eigenvectors.
        work = plan.bases * (8.0 if iterated else 13.0) * min(m, n) ** 3
    return {plan.owners[0]: work}


def _sum_up(
    rule: Rule,
    options: Options,
    projected: Shapes,
    others: Shapes,
    mesh: Mesh,
    at: Coordinate | None,
) -> Forecast:
    plans = _plans(rule, options, projected, mesh)
    load: dict[Coordinate, float] = defaultdict(float)
    multiplied: dict[Coordinate, float] = defaultdict(float)
    for plan in plans:
        for coordinate, flops in _refresh_work(rule, options, plan).items():
            load[coordinate] += flops
        for coordinate, flops in _grouped(rule, plan).items():
            multiplied[coordinate] += flops
    asked = {*load, *multiplied, (0,) * len(mesh.sizes)}
    busiest = at or max(asked, key=lambda c: (multiplied[c], load[c], c))
    found = Forecast(
        busiest=max(load.values(), default=0.0),
        bf16=rule.name == "muon" or torch.bfloat16 == (options.matmul_dtype or options.basis_dtype),
        svd=options.refresh_method == "svd"
        or (isinstance(rule, GradientBasesRule) and options.refresh_method == "eigh64"),
    )
    known: dict[object, Costs] = {}
    for plan in plans:
        numel = plan.compute.numel(busiest)
        computes = bool(plan.basis.numel(busiest))
        # What a rank sends depends on the owner only by where their coordinates agree, and of a
        # weight that others compute not on who they are.
        agree = tuple(a == b for a, b in zip(plan.owners[0], busiest, strict=True))
        key = (plan.storage, plan.compute if computes else None, agree)
        if key not in known:
            known[key] = costs(plan, busiest, _sizes(rule, plan), options.is_async)
        cost = known[key]
        found.state += cost.state
        found.step.update(cost.step)
        found.refresh.update(cost.refresh)
        r, flops = min(plan.storage.shape), _products(rule, plan, numel)
        found.flops += flops
        rotated = (0 if rule.whole else 2) * 2.0 * numel * r + plan.bases * 2.0 * r**3
        found.rotate += rotated * (computes and rule.refreshes)
        found.elements += plan.storage.numel(busiest) if plan.group is None else numel
        found.updates += computes or plan.group is None
        if plan.moves:  # it packs the gradient it stores and unpacks the update, or the reverse
            found.copies += 2 + 2 * computes
        _count(found.kinds, plan, cost, flops)
    _together(found, rule, plans, options, busiest)
    moments = (moment_dtype(torch.float32, options), second_dtype(torch.float32, options))
    _add_adamw(found, others, mesh, busiest, sum(dtype.itemsize for dtype in moments))
    return found


def _grouped(rule: Rule, plan: WeightPlan) -> dict[Coordinate, float]:
    """Operations of the products of a weight that a group computes, by coordinate."""
    if plan.group is None:
        return {}
    return {c: _products(rule, plan, plan.compute.numel(c)) for c in plan.computing()}


def _together(
    found: Forecast, rule: Rule, plans: Sequence[WeightPlan], options: Options, at: Coordinate
) -> None:
    """Adds what weights that step together cost: collectives, and the waiting for each other."""
    sending = [i for i, plan in enumerate(plans) if plan.communicates]
    for task in fill_tasks(plans, sending, options.task_bytes, refreshing=False):
        sizes = _sizes(rule, plans[task[0]])
        found.collectives += collectives([plans[i] for i in task], at, sizes)
        load: dict[Coordinate, float] = defaultdict(float)
        for i in task:
            for coordinate, flops in _grouped(rule, plans[i]).items():
                load[coordinate] += flops
        found.waited += max(load.values(), default=0.0) - load[at]
    together = range(len(plans))
    for task in fill_tasks(plans, together, options.task_bytes, refreshing=rule.refreshes):
        load = defaultdict(float)
        for i in task:
            for coordinate, flops in _refresh_work(rule, options, plans[i]).items():
                load[coordinate] += flops
        found.decompose += max(load.values(), default=0.0)


def _count(kinds: list[Kind], plan: WeightPlan, cost: Costs, flops: float) -> None:
    name = ".".join("*" if part.isdigit() else part for part in plan.name.split("."))
    alike = (kind for kind in kinds if kind.name == name and kind.plan.basis == plan.basis)
    if (kind := next(alike, None)) is None:
        kinds.append(kind := Kind(name, plan))
    kind.count += 1
    kind.state += cost.state
    kind.step += sum(cost.step.values())
    kind.refresh += sum(cost.refresh.values())
    kind.flops += flops


def _add_adamw(
    found: Forecast, shapes: Shapes, mesh: Mesh, at: Coordinate = (0, 0, 0), moments: int = 8
) -> None:
    for name, shape in shapes.items():
        numel = layout(name, shape, mesh).numel(at)
        found.state += moments * numel + 4
        found.elements += numel


def forecast_adamw(projected: Shapes, others: Shapes, mesh: Mesh) -> Forecast:
    """AdamW on shards: nothing is sent beyond what FSDP2 sends in any case."""
    found = Forecast()
    _add_adamw(found, {**projected, **others}, mesh)
    return found


def forecast_muon(
    projected: Shapes, others: Shapes, mesh: Mesh, at: Coordinate | None = None
) -> Forecast:
    """:class:`conda_dist.Muon` on shards, five steps of Newton-Schulz; see :func:`forecast_conda`.

    Gradients go to one owner of each matrix as they are, for its momentum; updates come back in
    bfloat16.
    """
    return _sum_up(MuonRule(), Options(), projected, others, mesh, at)


def forecast_replicated(projected: Shapes, others: Shapes, mesh: Mesh) -> Forecast:
    """Conda as released: every rank has all states and takes every step (DDP)."""
    found = Forecast()
    for shape in projected.values():
        m, n = shape
        numel, r = math.prod(shape), min(shape)
        found.state += 4 * (2 * numel + r * r)
        found.flops += 3 * 2.0 * numel * r
        found.decompose += svd_flops(m, n)
        found.busiest = found.decompose
        found.elements += numel
    _add_adamw(found, others, Mesh())
    return found


def launches(found: Forecast) -> int:
    """Kernels that the device runs for the matrices in a step."""
    each = UPDATE_LAUNCHES + found.bf16 * BF16_LAUNCHES
    return found.updates * each + found.copies * EXCHANGE_LAUNCHES


@dataclass(frozen=True, slots=True)
class Seconds:
    """Time of the busiest rank."""

    step: float  # without a refresh: the device's, or the host's if that is longer
    host: float  # of the host in such a step
    decompose: float  # of the decompositions in a refresh, where training waits for them
    busiest: float  # of those of the busiest owner
    exchange: float  # of what a refresh moves and rotates, beside them
    training: float  # of forward and backward passes of a step

    def stall(self, delay: int) -> float:
        """Seconds a refresh holds training up; ``delay`` steps go on meanwhile, 0 if none do."""
        hidden = delay * (self.training + self.step)
        return self.exchange + (max(0.0, self.busiest - hidden) if delay else self.decompose)


def seconds(
    found: Forecast, mesh: Mesh, hardware: Hardware, *, parameters: int, tokens: int
) -> Seconds:
    """Time that a forecast takes.

    Args:
        found: The forecast.
        mesh: Its ranks.
        hardware: What they are.
        parameters: Elements of the whole model.
        tokens: Tokens of a step on each data-parallel rank.
    """
    rate = (hardware.bf16_flops if found.bf16 else hardware.fp32_flops) * hardware.reached
    fp32 = hardware.fp32_flops * hardware.reached

    def moved(sent: Mapping[int, int]) -> float:
        return sum(
            count
            / (hardware.near if mesh.is_near(axis, hardware) else hardware.far)
            / hardware.reached
            for axis, count in sent.items()
        )

    step = (
        (found.flops + found.waited) / rate
        + found.elements * 4.0 * PASSES / (hardware.memory * hardware.reached)
        + moved(found.step)
        + found.collectives * hardware.latency
    )
    update = HOST_UPDATE + found.bf16 * HOST_BF16
    host = HOST_STEP + found.updates * update + found.copies * HOST_EXCHANGE
    exchange = moved(found.refresh) + found.rotate / fp32
    training = 6.0 * parameters * tokens / mesh.tp / (hardware.bf16_flops * hardware.training)
    decomposing = hardware.svd_flops if found.svd else fp32
    waited, busiest = found.decompose / decomposing, found.busiest / decomposing
    return Seconds(max(step, host), host, waited, busiest, exchange, training)
