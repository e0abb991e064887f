"""From parameter groups to weights with plans: the layout is resolved here, at the first step.

Not at construction, because frameworks replace parameters between the two.
"""

import itertools
from collections.abc import Container, Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from conda_dist.layout.layout import Layout
from conda_dist.options import Options
from conda_dist.parameter_groups import check_parameter
from conda_dist.parameter_names import name_of, path_of
from conda_dist.plan.compute_groups import Choice, Request, choose, deal_owners
from conda_dist.plan.weight_plan import plan_weight
from conda_dist.replaced_parameters import refuse_strangers
from conda_dist.routing import ADAMW, CONDA, check_kernel, check_matrix, check_splits
from conda_dist.rules.rule import Rule
from conda_dist.rules.states import (
    CODES,
    base_name,
    has_own,
    is_of_rule,
    moment_dtype,
    second_dtype,
    second_key,
)
from conda_dist.runtime import dtensor
from conda_dist.runtime.adamw import AdamWParameter
from conda_dist.runtime.agreement import Comparison, explain
from conda_dist.runtime.collectives import Mesh, agree, all_max, difference, is_distributed
from conda_dist.runtime.state_form import check_form, check_parts, chosen_by
from conda_dist.runtime.weight import Weight


@dataclass(slots=True)
class Setup:
    """An optimizer's parameters, resolved.

    Attributes:
        weights: those that the rule steps, mesh after mesh, in the order of the parameters.
        adamw_parameters: those on the adamw path.
        meshes: the meshes they are on, in the order in which all ranks use them.
        signature: of the parameters all this was made for.
        rule: the rule's name.
        agreed: whether the ranks have found their plans to be the same.
        started: for each mesh whether a step of its parameters has counted.
        comparisons: for each mesh when its ranks compare which gradients they have had.
        reduced: parameters whose gradients were still to be summed up over ranks, with what such a
            gradient looks like.
        looked: whether parameters that were replaced have been looked for since the first step.
        members: all parameters: the weights, then those on the adamw path.
    """

    weights: list[Weight]
    adamw_parameters: list[AdamWParameter]
    meshes: list[Mesh]
    signature: object
    rule: str = CONDA
    agreed: bool = False
    started: list[bool] = field(default_factory=list)
    comparisons: list[Comparison] = field(default_factory=list)
    reduced: dict[Tensor, DTensor] = field(default_factory=dict)
    looked: bool = False
    members: tuple[Weight | AdamWParameter, ...] = field(init=False)
    _live: tuple[list[int], list[AdamWParameter]] | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        """Takes up from the states there are."""
        self.members = (*self.weights, *self.adamw_parameters)
        self.started = [False] * len(self.meshes)
        for member in self.members:
            if "step" in member.state and member.state["step"].any():
                self.started[self.meshes.index(member.mesh)] = True
        self.comparisons = [
            Comparison(
                mesh,
                [w for w in self.weights if w.mesh == mesh],
                [p for p in self.adamw_parameters if p.mesh == mesh],
            )
            for mesh in self.meshes
        ]

    def outdated(self, groups: Iterable[Mapping[str, Any]], state: Mapping[Tensor, Any]) -> bool:
        """Whether parameters were added, replaced or unfrozen, or state thrown away, since."""
        if self.signature != signature(groups):
            return True
        if self.members and self.members[0].states is not state:
            return True
        for member in self.members if self.agreed else ():
            if "step" not in state.get(member.param, ()):
                return True
        return False

    def init_state(self) -> None:
        """Allocates what state is missing."""
        for member in self.members:
            member.init_state()

    def check_state(self) -> None:
        """Holds the states that are there against the plan.

        Raises:
            ValueError: one is not where the plan has it.
        """
        for member in (m for m in self.members if has_own(m.state)):
            needed = ("step", *member.counts, *member.state_layouts())
            missing = [key for key in needed if key not in member.state]
            if missing and all(base_name(key) in ("exp_avg_sq", CODES) for key in missing):
                raise ValueError(
                    f"{member.name}: its state was made with another second_moment_dtype; drop it "
                    "(del optimizer.state[param]), or load its state dict, which converts it."
                )
            if missing:
                raise ValueError(
                    f"{member.name}: its state has no {', '.join(missing)}; drop the rest, too "
                    "(del optimizer.state[param]), or load a checkpoint."
                )
            for key, layout in member.state_layouts().items():
                held = tuple(dtensor.local(member.state[key]).shape)
                if held != (expected := layout.local_shape(member.mesh.coordinate)):
                    raise ValueError(
                        f"{member.name}: rank {member.mesh.rank} holds {held} of its {key}, and "
                        f"should hold {expected}: the parameter was moved or resharded after its "
                        "state was made. Drop the state (del optimizer.state[param]) or load a "
                        "checkpoint after moving it."
                    )
                if isinstance(member, AdamWParameter) or not member.plan.separate:
                    dtensor.check_state(member.name, member.param, key, member.state[key], layout)

    def agree(self, error: Exception | None, *, new: bool) -> None:
        """Holds the ranks' plans against each other before anything else is sent, and allocates.

        Args:
            error: what went wrong on this rank in making the plan, or None.
            new: whether the optimizer has had no plan before.

        Raises:
            RuntimeError: on all ranks alike, if plans differ, or something is wrong on a rank.
        """
        wrong = None if error else self._wrong_gradient(new)
        for mesh, comparison in zip(self.meshes, self.comparisons, strict=True):
            lines = [*self.lines(mesh), "", *comparison.lines()]
            try:
                agree(mesh, lines, error or wrong, explain=_explain)
            except RuntimeError:
                if wrong is None:
                    raise
                break
            comparison.compared()
        if wrong is not None:  # it says more than that some rank has one
            raise wrong
        self.init_state()
        self.agreed = True

    def _wrong_gradient(self, new: bool) -> Exception | None:
        """What is wrong with the gradients, for all ranks to hear of it before any of them sends.

        Looked at whenever the parameters were planned anew.
        """
        try:
            for member in self.members:
                dtensor.check_gradient(member.name, member.param)
            if new:
                self.refuse_strangers()
        except RuntimeError as error:
            return error
        return None

    def gradients(self) -> dict[Tensor, Tensor | None]:
        """This rank's part of the gradient of each parameter, None where it has none.

        A gradient that is a partial sum is summed up over the ranks: with zeros of this rank where
        it has none, for the others would wait.

        Raises:
            RuntimeError: see :func:`conda_dist.runtime.dtensor.check_gradient`.
        """
        grads: dict[Tensor, Tensor | None] = {}
        for member in self.members:  # parts share a parameter, whose gradient is reduced once
            param, grad = member.param, member.param.grad
            if param in grads:
                continue
            grads[param] = dtensor.local_gradient(member.name, param)
            if grad is None and param in self.reduced:
                dtensor.reduce_zeros(param, self.reduced[param])
            elif (
                isinstance(grad, DTensor)
                and param not in self.reduced
                and grad.placements != getattr(param, "placements", ())
            ):
                self.reduced[param] = dtensor.meta_like(grad)
        return grads

    def refuse_strangers(self) -> None:
        """Refuses parameters without gradients that have been replaced in the model alone.

        Looked for in a distributed job where it is likely, for it takes time: in the first step,
        and once in a later one without any gradient.

        Raises:
            RuntimeError: see :func:`conda_dist.replaced_parameters.refuse_strangers`.
        """
        if is_distributed():
            refuse_strangers((m.name, m.param) for m in self.members if m.param.grad is None)

    def live(self, grads: Mapping[Tensor, Tensor | None]) -> tuple[list[int], list[AdamWParameter]]:
        """Indices of the weights, and the parameters on the adamw path, that step.

        All, but those of a mesh whose gradients were all zero so far: frameworks run such a step
        to create state, and it must not count. Once a step has counted, no gradient is read.
        """
        if self._live is not None:
            return self._live
        for i, mesh in enumerate(self.meshes):
            if not self.started[i]:
                params = {member.param for member in self.members if member.mesh == mesh}
                ours = (grads[param] for param in params)
                any_here = any(bool(grad.any()) for grad in ours if grad is not None)
                self.started[i] = bool(all_max(mesh, [any_here])[0])
        meshes = [m for m, started in zip(self.meshes, self.started, strict=True) if started]
        weights = [i for i, weight in enumerate(self.weights) if weight.mesh in meshes]
        live = weights, [other for other in self.adamw_parameters if other.mesh in meshes]
        if all(self.started):
            self._live = live
        return live

    def lines(self, mesh: Mesh) -> list[str]:
        """The plan of one mesh as text, for the ranks to compare."""
        said = [
            f"{w.plan} {w.rule.describe(w.group)}, {w.param.dtype}"
            for w in self.weights
            if w.mesh == mesh
        ]
        said += [
            f"{p.name} {p.layout.shape} stored {p.layout}, adamw, {p.param.dtype}"
            for p in self.adamw_parameters
            if p.mesh == mesh
        ]
        return [*said, *{f"{self.rule}, {member.options}" for member in self.members[:1]}]


def _explain(texts: Mapping[int, str]) -> str:
    """Says how plans differ, or else which gradients ranks have."""
    parts = {rank: text.partition("\n\n") for rank, text in texts.items()}
    plans = {rank: plan for rank, (plan, _, _) in parts.items()}
    if len(set(plans.values())) > 1:
        return difference(plans)
    return explain({rank: counts for rank, (_, _, counts) in parts.items()})


def signature(groups: Iterable[Mapping[str, Any]]) -> object:
    """What a setup was made for: changes when parameters are added, replaced or changed in form.

    Paths are decided when it is made, so that a steady step does not read names.
    """
    found: list[object] = []
    for group in groups:
        found += id(group), group["algorithm"], str(group["splits"]), group.get("kernels")
        for param in group["params"]:
            found.append(dtensor.form(param))
    return found


def find_meshes(
    groups: Iterable[Mapping[str, Any]],
    process_group: dist.ProcessGroup | None,
    frozen: Container[Tensor] = (),
) -> dict[Tensor, Mesh]:
    """The mesh of every parameter that is trainable or in ``frozen``; equal meshes are one object.

    In the order of the meshes: parameters may have been listed in different orders on ranks that
    share several meshes, which must not wait for each other on two of them at once.
    """
    known: dict[Any, Mesh] = {}
    meshes: dict[Tensor, Mesh] = {}
    for group in groups:
        for param in group["params"]:
            if param.requires_grad or param in frozen:
                key = getattr(param, "device_mesh", None)
                if key not in known:
                    known[key] = dtensor.find_mesh(param, process_group)
                meshes[param] = known[key]
    return dict(sorted(meshes.items(), key=lambda item: item[1].sort_key))


def set_up(
    groups: Sequence[dict[str, Any]],
    state: MutableMapping[Tensor, dict[str, Any]],
    options: Options,
    meshes: Mapping[Tensor, Mesh],
    choices: MutableMapping[tuple[Tensor, int | None], Choice],
    rule: Rule,
) -> Setup:
    """Plans parameters.

    Args:
        groups: the optimizer's parameter groups.
        state: its state.
        options: its options.
        meshes: from :func:`find_meshes`: the parameters to plan.
        choices: see :func:`plan_sites`.
        rule: what steps the matrices.

    Raises:
        ValueError: a parameter's layout is none that can be planned, or not that of its state.
    """
    places = {
        param: (group, name_of(groups, g, i))
        for g, group in enumerate(groups)
        for i, param in enumerate(group["params"])
    }
    sites: list[Site] = []
    adamw_parameters: list[AdamWParameter] = []
    for param, mesh in meshes.items():
        group, name = places[param]
        held = state.get(param, {})
        check_parameter(name, param)  # it may have been replaced, and so may its data
        path = path_of(name, param, group)
        if has_own(held) and is_of_rule(held) != (path != ADAMW):
            raise ValueError(
                f"{name}: its state was made on the other path than the {path} path, which it "
                f"takes by {chosen_by(group)}; drop the state first: del optimizer.state[param]."
            )
        dtypes = {"exp_avg": moment_dtype(param.dtype, options)}
        dtypes[second_key(options)] = second_dtype(param.dtype, options)
        if path != ADAMW:
            kept = rule.states(1, 1, param.dtype)
            dtypes = {key: spec.dtype for key, spec in kept.items() if spec.cut}
            check_parts(name, held, group["splits"], [k for k in kept if k not in dtypes])
        check_form(name, param, held, dtypes)
        layout = dtensor.find_layout(name, param, mesh)
        if path != ADAMW:
            check_matrix(name, param, path)  # it may have been replaced
            sites += _sites(name, param, mesh, group, layout)
        else:
            adamw_parameters.append(
                AdamWParameter(name, param, mesh, layout, group, state, options)
            )
    weights = plan_sites(sites, state, options, choices, rule)
    order = list(dict.fromkeys(meshes.values()))
    setup = Setup(weights, adamw_parameters, order, signature(groups), rule.name)
    setup.check_state()
    return setup


@dataclass(frozen=True, slots=True)
class Site:
    """A weight, or one of the parts its group splits it into, before it has a plan."""

    name: str
    param: Tensor
    mesh: Mesh
    group: dict[str, Any]
    layout: Layout
    part: int | None = None


def plan_sites(
    sites: Sequence[Site],
    state: MutableMapping[Tensor, dict[str, Any]],
    options: Options,
    choices: MutableMapping[tuple[Tensor, int | None], Choice],
    rule: Rule,
) -> list[Weight]:
    """Plans the weights that a rule steps together: who computes and who decomposes what.

    Args:
        sites: the weights, or parts of them.
        state: the optimizer's state.
        options: its options.
        choices: by parameter and part what was chosen for those that have state; the others' are
            added.
        rule: what steps them.
    """
    requests = [
        Request(
            site.name,
            site.mesh.topology,
            site.layout,
            _copied_itemsize(rule, site.param.dtype),
            rule.whole,
            known=choices.get((site.param, site.part)) if state.get(site.param) else None,
        )
        for site in sites
    ]
    plans = []
    for site, choice in zip(sites, choose(requests, options.basis_budget), strict=True):
        choices[site.param, site.part] = choice
        plans.append(
            plan_weight(
                site.name,
                site.mesh.topology,
                site.layout,
                group=choice.group,
                shard_basis=choice.shard_basis,
                part=site.part,
                beside=rule.beside(site.layout.shape[-2], site.layout.shape[-1]),
            )
        )
    # Kernels, and the parts of a weight, have views of its moments, if all parts are in place.
    apart = {
        site.param
        for site, plan in zip(sites, plans, strict=True)
        if plan.separate or ((plan.part is not None or plan.seen_as_matrix) and not plan.in_place)
    }
    plans = [
        replace(plan, separate=site.param in apart) for site, plan in zip(sites, plans, strict=True)
    ]
    return [
        Weight(site.param, plan, site.mesh, site.group, state, options, rule)
        for site, plan in zip(sites, deal_owners(plans), strict=True)
    ]


def _copied_itemsize(rule: Rule, dtype: torch.dtype) -> int:
    """Bytes of an element of the basis, or what stands for one in the budget; 0 without any."""
    kept = rule.states(1, 1, dtype).get("basis")
    return 0 if kept is None else kept.dtype.itemsize


def _sites(
    name: str, param: Tensor, mesh: Mesh, group: dict[str, Any], layout: Layout
) -> list[Site]:
    kernel = bool(group.get("kernels")) and param.ndim > 2
    if kernel:
        check_kernel(name, dtensor.local(param))
        try:
            layout = layout.as_matrix()
        except ValueError as error:
            raise ValueError(f"{name}: {error}, or keep it with adamw.") from None
    if group["splits"] is None:
        return [Site(name, param, mesh, group, layout, None)]
    check_splits(name, param, group["splits"], kernel)
    total, period = layout.shape[-2], sum(group["splits"])
    again = f" of every {period}" if total > period else ""
    ends = list(itertools.accumulate(group["splits"]))
    sites = []
    for part, (start, stop) in enumerate(itertools.pairwise([0, *ends])):
        rows = tuple(range(i + start, i + stop) for i in range(0, total, period))
        full = f"{name}[{start}:{stop}{again}]"
        sites.append(Site(full, param, mesh, group, layout.rows(rows), part))
    return sites
