"""Layer: integrations. What one call of ``step()`` concerns, with its plan and its states.

The engine calls ``step()`` once for each group (stages 1 and 2), for each sub-group (stage 3) or
for all (stage 0, the BF16 optimizer). A unit's moments are views of flat tensors that the engine
sees as ``state[flat]``; bases are its own, and so survive whatever the engine does to its states.
"""

from collections import defaultdict
from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor

from conda_dist.integrations.deepspeed.checkpoint import Kept
from conda_dist.integrations.deepspeed.partitions import Piece
from conda_dist.layout.redistribution import plan_hops
from conda_dist.numerics.adamw import Entry, adamw_
from conda_dist.options import Options
from conda_dist.plan.weight_plan import basis_to_first, copied_basis_bytes
from conda_dist.routing import CONDA
from conda_dist.rules.conda import CondaRule
from conda_dist.rules.hyperparameters import hyper_of
from conda_dist.rules.states import moment_dtype
from conda_dist.runtime.adamw import AdamWParameter
from conda_dist.runtime.collectives import Exchange, Mesh, all_max
from conda_dist.runtime.parameters import Setup, UnplannedWeight, plan_weights
from conda_dist.runtime.step import MatrixPath
from conda_dist.runtime.weight import Weight

KEPT = ("step", "basis", "basis_step")
"""What a weight has beside its moments."""


def allocate(
    tensor: Tensor, states: MutableMapping[Tensor, dict[str, Any]], options: Options
) -> dict[str, Any]:
    """The state the engine sees of one of its tensors, allocated if it is not there."""
    if not states.get(tensor):
        dtype = moment_dtype(tensor.dtype, options)
        states[tensor] = {
            "step": torch.zeros((), dtype=torch.float32, device="cpu"),
            "exp_avg": torch.zeros_like(tensor, dtype=dtype, requires_grad=False),
            "exp_avg_sq": torch.zeros_like(tensor, dtype=dtype, requires_grad=False),
        }
    return states[tensor]


class Unit:
    """The tensors of one call, and what they hold.

    Args:
        tensors: the tensors that the engine steps together.
        groups: for each of them the parameter group it is in.
        pieces: what they hold, in the same order on all ranks.
        mesh: the ranks that share them.
        options: the optimizer's options.
    """

    def __init__(
        self,
        tensors: Sequence[Tensor],
        groups: Sequence[dict[str, Any]],
        pieces: Sequence[Piece],
        mesh: Mesh,
        options: Options,
    ) -> None:
        self.tensors, self.pieces, self.mesh = list(tensors), list(pieces), mesh
        self._options, self._groups = options, list(groups)
        self._engine_states: MutableMapping[Tensor, dict[str, Any]] = {}
        self._states: dict[Tensor, dict[str, Any]] = {}
        self._where: list[int] = []
        self._views = [piece.of(self.tensors[piece.index].detach()) for piece in pieces]
        sites = [
            UnplannedWeight(p.member.name, view, mesh, groups[p.index], p.layout)
            for p, view in zip(pieces, self._views, strict=True)
            if p.member.algorithm == CONDA
        ]
        self.weights = plan_weights(sites, self._states, options, {}, CondaRule(options))
        self._path = MatrixPath(self.weights, options)
        self._conda = [i for i, piece in enumerate(pieces) if piece.member.algorithm == CONDA]
        self._adamw = [i for i, piece in enumerate(pieces) if piece.member.algorithm != CONDA]
        self.started = False

    def setup(self) -> Setup:
        """Its plan as the report and the comparison between ranks take it."""
        adamw_parameters = [
            AdamWParameter(
                p.member.name, view, self.mesh, p.layout, self._groups[p.index], {}, self._options
            )
            for p, view in ((self.pieces[i], self._views[i]) for i in self._adamw)
        ]
        return Setup(self.weights, adamw_parameters, [self.mesh], None)

    def basis_bytes(self) -> int:
        """Bytes of bases that are not split, on the rank that has most of them."""
        whole = [w for w in self.weights if not any(w.plan.basis.placements)]
        each = [copied_basis_bytes(w.plan, w.basis.element_size()) for w in whole]
        return max((sum(sizes) for sizes in zip(*each, strict=True)), default=0)

    def init_state(self, states: MutableMapping[Tensor, dict[str, Any]], kept: Kept) -> None:
        """Allocates all state, and takes up what was kept of it.

        Args:
            states: ``optimizer.state``.
            kept: what was kept, by name, of any parameters.

        Raises:
            ValueError: what was kept is not that of this weight as it is stored here.
        """
        self._bind(states)
        for piece in self.pieces:
            if piece.member.name in kept.counts:
                step: Tensor = self._engine_states[self.tensors[piece.index]]["step"]
                step.fill_(kept.counts[piece.member.name])
        for weight in self.weights:
            weight.init_state()
            if weight.name in kept.weights:
                _take(weight, kept.weights[weight.name])
        self.started = any(float(self._engine_states[t]["step"]) > 0 for t in self.tensors)

    def kept(self, whole: bool) -> Kept:
        """What the engine's states do not hold, and what its universal checkpoints do not.

        Args:
            whole: whether to bring the whole bases to the first rank; then a collective.
        """
        counts = {
            piece.member.name: float(self._engine_states[self.tensors[piece.index]]["step"])
            for piece in self.pieces
        }
        weights: dict[str, dict[str, Tensor]] = {
            w.name: {key: w.state[key] for key in KEPT} for w in self.weights
        }
        for weight in self.weights if whole else ():
            basis = self._whole_basis(weight)
            if basis is not None and not any(self.mesh.coordinate):
                weights[weight.name]["basis"] = basis.cpu()
        return Kept(dict(weights), counts)

    def _whole_basis(self, weight: Weight) -> Tensor | None:
        """A weight's basis, whole, on the first rank."""
        hops, basis = plan_hops([basis_to_first(weight.plan)], self.mesh.coordinate), weight.basis
        return Exchange(self.mesh, hops, [basis], [basis.dtype], basis.device).wait()[0]

    def _bind(self, states: MutableMapping[Tensor, dict[str, Any]]) -> None:
        """Makes the views anew if the engine has moved its tensors (``offload_states``)."""
        self._engine_states = states
        engine = [allocate(t, self._engine_states, self._options) for t in self.tensors]
        where = [
            pointer.data_ptr()
            for tensor, state in zip(self.tensors, engine, strict=True)
            for pointer in (tensor, state["exp_avg"], state["exp_avg_sq"])
        ]
        if where == self._where:
            return
        before, after = self._views, dict[Tensor, dict[str, Any]]()
        self._views = []
        for i, piece in enumerate(self.pieces):
            view, state = piece.of(self.tensors[piece.index].detach()), engine[piece.index]
            own = self._states.get(before[i], {})
            after[view] = {**own, **{k: piece.of(state[k]) for k in ("exp_avg", "exp_avg_sq")}}
            if piece.start is None:  # a tensor of its own counts its own steps
                after[view]["step"] = state["step"]
            self._views.append(view)
        self._states.clear()
        self._states.update(after)
        for i, weight in zip(self._conda, self.weights, strict=True):
            weight.param = self._views[i]
        self._where = where

    def step(
        self,
        groups: Sequence[dict[str, Any]],
        states: MutableMapping[Tensor, dict[str, Any]],
    ) -> None:
        """Takes one step with the gradients of the tensors.

        Nothing happens, and nothing is counted, while all gradients of all ranks are zero: engines
        take such a step to have states made.

        Args:
            groups: for each tensor the parameter group it is in now.
            states: ``optimizer.state``.

        Raises:
            RuntimeError: a decomposition raised, or failed too often; on all ranks alike.
        """
        self._bind(states)
        self._groups = list(groups)
        grads = [
            None if (grad := self.tensors[piece.index].grad) is None else piece.of(grad)
            for piece in self.pieces
        ]
        if not self.started:
            any_here = any(bool(grad.any()) for grad in grads if grad is not None)
            self.started = bool(all_max(self.mesh, [any_here])[0])
            if not self.started:
                return
        for i, weight in zip(self._conda, self.weights, strict=True):
            weight.group = groups[self.pieces[i].index]
        self._path.step(
            {place: grad for place, i in enumerate(self._conda) if (grad := grads[i]) is not None}
        )
        self._adamw_step(grads)

    def _adamw_step(self, grads: Sequence[Tensor | None]) -> None:
        for index in {p.index for p in self.pieces if p.start is not None}:
            self._engine_states[self.tensors[index]]["step"] += 1
        alike: dict[tuple[int, int], list[Entry]] = defaultdict(list)
        for i in self._adamw:
            piece, view, grad = self.pieces[i], self._views[i], grads[i]
            if grad is None:
                continue
            count = self._engine_states[self.tensors[piece.index]]["step"]
            if piece.start is None:
                count += 1
            state = self._states[view]
            entry = Entry(piece.member.name, view, grad, state["exp_avg"], state["exp_avg_sq"])
            alike[id(self._groups[piece.index]), int(count)].append(entry)
        known = {id(group): group for group in self._groups}
        for (group, step), entries in alike.items():
            adamw_(entries, step, hyper_of(known[group], "adamw_scale"))


def _take(weight: Weight, kept: Mapping[str, Tensor]) -> None:
    """Copies what was kept of a weight into its state; a whole basis as far as it is needed."""
    layout = weight.plan.basis
    for key in KEPT:
        ours, theirs = weight.state[key], kept[key]
        whole = key == "basis" and tuple(theirs.shape) == layout.shape != tuple(ours.shape)
        if ours.dtype != theirs.dtype or (ours.shape != theirs.shape and not whole):
            raise ValueError(
                f"{weight.name}: the checkpoint's {key} has shape {tuple(theirs.shape)} and dtype "
                f"{theirs.dtype}, here they are {tuple(ours.shape)} and {ours.dtype}. Load it on "
                "as many ranks (or from a universal checkpoint), with the same "
                "basis_budget, basis_dtype and state_dtype."
            )
        if not whole:
            ours.copy_(theirs)
            continue
        for block in layout.blocks(weight.mesh.coordinate):
            here, there = (
                tuple(slice(a, a + n) for a, n in zip(start, block.shape, strict=True))
                for start in (block.local, block.start)
            )
            ours[here].copy_(theirs[there])
