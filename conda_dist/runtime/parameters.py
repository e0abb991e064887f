"""Makes the plans of an optimizer's parameters.

Not when the optimizer is constructed but at the first step: frameworks replace parameters before.
"""

import itertools
from collections.abc import Container, Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from conda_dist.layout.layout import Layout
from conda_dist.options import Options
from conda_dist.parameter_groups import check_parameter
from conda_dist.parameter_names import name_of, path_of
from conda_dist.plan.compute_groups import Choice, Request, assign_owners, choose
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
from conda_dist.runtime.collectives import Mesh, all_max, is_distributed
from conda_dist.runtime.errors import agree, difference
from conda_dist.runtime.state_form import check_form, check_parts, chosen_by
from conda_dist.runtime.weight import Weight


@dataclass(slots=True)
class Setup:
    """The trainable parameters of an optimizer with their plans.

    Attributes:
        weights: the weights that the rule steps, mesh after mesh, in the order of the parameters.
        adamw_parameters: the parameters on the adamw path.
        meshes: the meshes of all parameters, in the same order on all ranks.
        signature: :func:`signature` of the parameter groups that this was made for.
        rule: the rule's name.
        agreed: whether the ranks have compared their plans.
        started: for each mesh whether a step of its parameters has counted.
        comparisons: for each mesh the comparison of its ranks' step counts.
        reduced: parameters that have had a gradient with partial sums, which had to be reduced over
            ranks, with a gradient without elements as an example.
        searched_replaced: whether replaced parameters have been searched for after the first step.
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
    searched_replaced: bool = False
    members: tuple[Weight | AdamWParameter, ...] = field(init=False)
    _stepping: tuple[list[int], list[AdamWParameter]] | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        """Finds from the existing states which meshes have started, and makes the comparisons."""
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
        """Whether parameters were added, replaced or unfrozen, or state was removed."""
        if self.signature != signature(groups):
            return True
        if self.members and self.members[0].states is not state:
            return True
        for member in self.members if self.agreed else ():
            if "step" not in state.get(member.param, ()):
                return True
        return False

    def init_state(self) -> None:
        """Allocates missing state."""
        for member in self.members:
            member.init_state()

    def check_state(self) -> None:
        """Checks that the existing states fit the plans.

        Raises:
            ValueError: a state is missing, or its local shape, placements or device differ from the
                plan.
        """
        for member in (m for m in self.members if has_own(m.state)):
            needed = ("step", *member.counts, *member.state_layouts())
            missing = [key for key in needed if key not in member.state]
            if missing and all(base_name(key) in ("exp_avg_sq", CODES) for key in missing):
                raise ValueError(
                    f"{member.name}: its state was made with another second_moment_dtype; drop the "
                    "state (del optimizer.state[param]), or load a state dict, which converts it."
                )
            if missing:
                raise ValueError(
                    f"{member.name}: its state has no {', '.join(missing)}; drop the other states, "
                    "too (del optimizer.state[param]), or load a checkpoint."
                )
            for key, layout in member.state_layouts().items():
                held = tuple(dtensor.local(member.state[key]).shape)
                if held != (expected := layout.local_shape(member.mesh.coordinate)):
                    raise ValueError(
                        f"{member.name}: rank {member.mesh.rank} holds {held} of its {key}, but "
                        f"should hold {expected}: the parameter was moved or resharded after its "
                        "state was made. Drop the state (del optimizer.state[param]), or load a "
                        "checkpoint after the move."
                    )
                if isinstance(member, AdamWParameter) or not member.plan.separate:
                    dtensor.check_state(member.name, member.param, key, member.state[key], layout)

    def agree(self, error: Exception | None, *, new: bool) -> None:
        """Compares the ranks' plans before anything else is exchanged, then allocates state.

        Args:
            error: the exception with which planning failed on this rank, or None.
            new: whether these are the optimizer's first plans.

        Raises:
            RuntimeError: plans or gradients differ, or a rank has an error; raised on all ranks.
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
            comparison.record_agreement()
        if wrong is not None:  # this rank's own error says more than the other ranks' message
            raise wrong
        self.init_state()
        self.agreed = True

    def _wrong_gradient(self, new: bool) -> Exception | None:
        """The error in this rank's gradients, which all ranks must learn before any sends one."""
        try:
            for member in self.members:
                dtensor.check_gradient(member.name, member.param)
            if new:
                self.refuse_strangers()
        except RuntimeError as error:
            return error
        return None

    def gradients(self) -> dict[Tensor, Tensor | None]:
        """The local gradient of each parameter; None if it has none.

        Gradients that are partial sums are reduced over the ranks. Then a rank without the gradient
        contributes zeros, because the other ranks would wait for it.

        Raises:
            RuntimeError: see :func:`conda_dist.runtime.dtensor.check_gradient`.
        """
        grads: dict[Tensor, Tensor | None] = {}
        for member in self.members:  # parts of a weight share a parameter: reduce its gradient once
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
        """Raises an error for parameters that the model has replaced, but the optimizer has not.

        The search takes time, so it is made in distributed jobs only, in the first step and once in
        a later step without any gradient.

        Raises:
            RuntimeError: see :func:`conda_dist.replaced_parameters.refuse_strangers`.
        """
        if is_distributed():
            refuse_strangers((m.name, m.param) for m in self.members if m.param.grad is None)

    def stepping(
        self, grads: Mapping[Tensor, Tensor | None]
    ) -> tuple[list[int], list[AdamWParameter]]:
        """The indices of the weights, and the parameters on the adamw path, that take this step.

        These are all, except on a mesh whose gradients have all been zero so far: frameworks run a
        step with zero gradients to create state, and it must not count. Once a step has counted, no
        gradient is read, so that the host does not wait for the device.
        """
        if self._stepping is not None:
            return self._stepping
        for i, mesh in enumerate(self.meshes):
            if not self.started[i]:
                params = {member.param for member in self.members if member.mesh == mesh}
                ours = (grads[param] for param in params)
                any_here = any(bool(grad.any()) for grad in ours if grad is not None)
                self.started[i] = bool(all_max(mesh, [any_here])[0])
        meshes = [m for m, started in zip(self.meshes, self.started, strict=True) if started]
        weights = [i for i, weight in enumerate(self.weights) if weight.mesh in meshes]
        stepping = weights, [other for other in self.adamw_parameters if other.mesh in meshes]
        if all(self.started):
            self._stepping = stepping
        return stepping

    def lines(self, mesh: Mesh) -> list[str]:
        """The plans of one mesh as text, which its ranks compare."""
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
    """The message for texts of :meth:`Setup.agree` that differ: in plans, or in gradients."""
    parts = {rank: text.partition("\n\n") for rank, text in texts.items()}
    plans = {rank: plan for rank, (plan, _, _) in parts.items()}
    if len(set(plans.values())) > 1:
        return difference(plans)
    return explain({rank: counts for rank, (_, _, counts) in parts.items()})


def signature(groups: Iterable[Mapping[str, Any]]) -> object:
    """A value that changes when new plans are needed.

    It has the form of each parameter (see :func:`conda_dist.runtime.dtensor.form`) and the keys of
    its group that decide its path. Names are not in it: paths are decided when plans are made, so a
    steady step does not read names.
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
    """The mesh of every parameter that is trainable or in ``frozen``, sorted by mesh.

    Equal meshes are one object. The order is the same on all ranks, even if they list parameters in
    different orders: otherwise two ranks could wait for each other on two meshes.
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
    """Makes the plans of parameters.

    Args:
        groups: the optimizer's parameter groups.
        state: ``optimizer.state``.
        options: the optimizer's options.
        meshes: the parameters to plan, with their meshes, from :func:`find_meshes`.
        choices: see :func:`plan_weights`.
        rule: the rule that steps the matrices.

    Raises:
        ValueError: a parameter has a layout that cannot be planned, or one that does not fit its
            state.
    """
    places = {
        param: (group, name_of(groups, g, i))
        for g, group in enumerate(groups)
        for i, param in enumerate(group["params"])
    }
    unplanned: list[UnplannedWeight] = []
    adamw_parameters: list[AdamWParameter] = []
    for param, mesh in meshes.items():
        group, name = places[param]
        held = state.get(param, {})
        check_parameter(name, param)  # it may have been replaced, and so may its data
        path = path_of(name, param, group)
        if has_own(held) and is_of_rule(held) != (path != ADAMW):
            raise ValueError(
                f"{name}: it takes the {path} path (decided by {chosen_by(group)}), but its state "
                "was made on the other path; drop the state first: del optimizer.state[param]."
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
            unplanned += _unplanned(name, param, mesh, group, layout)
        else:
            adamw_parameters.append(
                AdamWParameter(name, param, mesh, layout, group, state, options)
            )
    weights = plan_weights(unplanned, state, options, choices, rule)
    order = list(dict.fromkeys(meshes.values()))
    setup = Setup(weights, adamw_parameters, order, signature(groups), rule.name)
    setup.check_state()
    return setup


@dataclass(frozen=True, slots=True)
class UnplannedWeight:
    """A weight, or one part of it if its group has ``splits``, before it has a plan."""

    name: str
    param: Tensor
    mesh: Mesh
    group: dict[str, Any]
    layout: Layout
    part: int | None = None


def plan_weights(
    unplanned: Sequence[UnplannedWeight],
    state: MutableMapping[Tensor, dict[str, Any]],
    options: Options,
    choices: MutableMapping[tuple[Tensor, int | None], Choice],
    rule: Rule,
) -> list[Weight]:
    """Plans weights together: which ranks compute each, and which decomposes each matrix.

    Args:
        unplanned: the weights, or parts of them.
        state: ``optimizer.state``.
        options: the optimizer's options.
        choices: by parameter and part, the choices with which existing state was made; choices for
            the other weights are added.
        rule: the rule that steps the weights.
    """
    requests = []
    for weight in unplanned:
        basis = rule.states(1, 1, weight.param.dtype).get("basis")
        itemsize = 0 if basis is None else basis.dtype.itemsize
        known = choices.get((weight.param, weight.part)) if state.get(weight.param) else None
        topology, layout = weight.mesh.topology, weight.layout
        requests.append(Request(weight.name, topology, layout, itemsize, rule.whole, known))
    plans = []
    for weight, choice in zip(unplanned, choose(requests, options.basis_budget), strict=True):
        choices[weight.param, weight.part] = choice
        plans.append(
            plan_weight(
                weight.name,
                weight.mesh.topology,
                weight.layout,
                group=choice.group,
                shard_basis=choice.shard_basis,
                part=weight.part,
                extra_shape=rule.extra_shape(*weight.layout.shape[-2:]),
                bases=len(rule.bases(*weight.layout.shape[-2:])),
            )
        )
    # Kernels and the parts of a weight are views of the stored weight's moments, but only if all
    # parts of the weight are in place. Else they have moments of their own.
    separate = {
        weight.param
        for weight, plan in zip(unplanned, plans, strict=True)
        if plan.separate or ((plan.part is not None or plan.seen_as_matrix) and not plan.in_place)
    }
    plans = [
        replace(plan, separate=weight.param in separate)
        for weight, plan in zip(unplanned, plans, strict=True)
    ]
    return [
        Weight(weight.param, plan, weight.mesh, weight.group, state, options, rule)
        for weight, plan in zip(unplanned, assign_owners(plans), strict=True)
    ]


def _unplanned(
    name: str, param: Tensor, mesh: Mesh, group: dict[str, Any], layout: Layout
) -> list[UnplannedWeight]:
    """One weight, or one for each part that the group's ``splits`` make."""
    kernel = bool(group.get("kernels")) and param.ndim > 2
    if kernel:
        check_kernel(name, dtensor.local(param))
        try:
            layout = layout.as_matrix()
        except ValueError as error:
            raise ValueError(f"{name}: {error}, or keep it with adamw.") from None
    if group["splits"] is None:
        return [UnplannedWeight(name, param, mesh, group, layout, None)]
    check_splits(name, param, group["splits"], kernel)
    total, period = layout.shape[-2], sum(group["splits"])
    again = f" of every {period}" if total > period else ""
    ends = list(itertools.accumulate(group["splits"]))
    unplanned = []
    for part, (start, stop) in enumerate(itertools.pairwise([0, *ends])):
        rows = tuple(range(i + start, i + stop) for i in range(0, total, period))
        full = f"{name}[{start}:{stop}{again}]"
        unplanned.append(UnplannedWeight(full, param, mesh, group, layout.rows(rows), part))
    return unplanned
