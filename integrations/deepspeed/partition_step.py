"""Layer: integrations. One call of ``step()`` by the engine: its tensors, their plans and states.

The engine calls ``step()`` once for each parameter group (stages 1 and 2), once for each sub-group
(stage 3), or once for all parameters (stage 0 and the BF16 optimizer). The moments of a
:class:`PartitionStep` are views of the engine's flat ``optimizer.state[tensor]``. The engine does
not know the bases, so whatever it does to its states leaves them alone.
"""

from collections import defaultdict
from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor

from conda_dist.integrations.deepspeed.checkpoint import SavedBases, saved_keys
from conda_dist.integrations.deepspeed.partitions import ParameterShard
from conda_dist.layout.redistribution import plan_hops
from conda_dist.numerics.adamw import Entry, adamw_
from conda_dist.options import Options
from conda_dist.plan.weight_plan import copied_basis_bytes, copy_to_first
from conda_dist.routing import CONDA
from conda_dist.rules.gradient_bases import conda_rule
from conda_dist.rules.hyperparameters import hyper_of
from conda_dist.rules.states import moment_dtype
from conda_dist.runtime.adamw import AdamWParameter
from conda_dist.runtime.collectives import Exchange, Mesh, all_max
from conda_dist.runtime.diagnostics import Collection, Diagnostics
from conda_dist.runtime.parameters import Setup, UnplannedWeight, plan_weights
from conda_dist.runtime.step import MatrixPath
from conda_dist.runtime.weight import Weight


def allocate(
    tensor: Tensor, states: MutableMapping[Tensor, dict[str, Any]], options: Options
) -> dict[str, Any]:
    """The states of one of the engine's tensors, which are allocated if there are none.

    Args:
        tensor: the engine's tensor.
        states: ``optimizer.state``.
        options: the optimizer's options.

    Returns:
        ``step`` (), float32 on the CPU, and ``exp_avg`` and ``exp_avg_sq`` in the tensor's shape.
    """
    if not states.get(tensor):
        dtype = moment_dtype(tensor.dtype, options)
        states[tensor] = {
            "step": torch.zeros((), dtype=torch.float32, device="cpu"),
            "exp_avg": torch.zeros_like(tensor, dtype=dtype, requires_grad=False),
            "exp_avg_sq": torch.zeros_like(tensor, dtype=dtype, requires_grad=False),
        }
    return states[tensor]


class PartitionStep:
    """What the optimizer does in one call of ``step()``.

    Args:
        tensors: the tensors that the engine steps together.
        groups: the parameter group of each tensor.
        shards: the shards in the tensors, in the same order on all ranks.
        mesh: the ranks that share the parameters.
        options: the optimizer's options.
    """

    def __init__(
        self,
        tensors: Sequence[Tensor],
        groups: Sequence[dict[str, Any]],
        shards: Sequence[ParameterShard],
        mesh: Mesh,
        options: Options,
    ) -> None:
        self.tensors, self.shards, self.mesh = list(tensors), list(shards), mesh
        self._options, self._groups = options, list(groups)
        self._engine_states: MutableMapping[Tensor, dict[str, Any]] = {}
        self._states: dict[Tensor, dict[str, Any]] = {}  # by view
        self._pointers: list[int] = []
        self._views = [shard.view(self.tensors[shard.tensor_index].detach()) for shard in shards]
        unplanned = [
            UnplannedWeight(s.info.name, view, mesh, groups[s.tensor_index], s.layout)
            for s, view in zip(shards, self._views, strict=True)
            if s.info.algorithm == CONDA
        ]
        self.weights = plan_weights(unplanned, self._states, options, {}, conda_rule(options))
        self._path = MatrixPath(self.weights, options)
        # Indices of the shards of each path.
        self._conda = [i for i, shard in enumerate(shards) if shard.info.algorithm == CONDA]
        self._adamw = [i for i, shard in enumerate(shards) if shard.info.algorithm != CONDA]
        self.started = False
        self.diagnostics: Diagnostics | None = None

    def setup(self) -> Setup:
        """The plan, for the report and for the comparison between ranks."""
        return Setup(self.weights, self._adamw_parameters(), [self.mesh], None)

    def _adamw_parameters(self) -> list[AdamWParameter]:
        return [
            AdamWParameter(
                s.info.name,
                view,
                self.mesh,
                s.layout,
                self._groups[s.tensor_index],
                self._states,
                self._options,
            )
            for s, view in ((self.shards[i], self._views[i]) for i in self._adamw)
        ]

    def basis_bytes(self) -> int:
        """The bytes of bases that are not sharded, on the rank with most of them."""
        whole = [w for w in self.weights if not any(w.plan.basis.placements)]
        on_ranks = [copied_basis_bytes(w.plan, w.basis.element_size()) for w in whole]
        return max((sum(sizes) for sizes in zip(*on_ranks, strict=True)), default=0)

    def init_state(self, states: MutableMapping[Tensor, dict[str, Any]], saved: SavedBases) -> None:
        """Allocates all state, and loads the bases and counts of a checkpoint.

        Args:
            states: ``optimizer.state``.
            saved: bases and counts of any parameters.

        Raises:
            ValueError: a saved basis has another shape or dtype than here.
        """
        self._bind(states)
        for shard in self.shards:
            if shard.info.name in saved.counts:
                step: Tensor = self._engine_states[self.tensors[shard.tensor_index]]["step"]
                step.fill_(saved.counts[shard.info.name])
        for weight in self.weights:
            weight.init_state()
            if weight.name in saved.weights:
                _load_bases(weight, saved.weights[weight.name])
        self.started = any(float(self._engine_states[t]["step"]) > 0 for t in self.tensors)

    def saved_bases(self, whole: bool) -> SavedBases:
        """The states that the engine's checkpoints do not contain.

        Args:
            whole: whether to gather whole bases on the first rank. Then all ranks must call this
                together.
        """
        counts = {
            shard.info.name: float(self._engine_states[self.tensors[shard.tensor_index]]["step"])
            for shard in self.shards
        }
        weights: dict[str, dict[str, Tensor]] = {
            w.name: {key: w.state[key] for key in saved_keys(w.rule, *w.shape)}
            for w in self.weights
        }
        for weight in self.weights if whole else ():
            for key, tensor in self._gather(weight).items():
                if not any(self.mesh.coordinate):
                    weights[weight.name][key] = tensor.cpu()
        return SavedBases(dict(weights), counts)

    def _gather(self, weight: Weight) -> dict[str, Tensor]:
        """A weight's copied states, whole, on the first rank; not meaningful on others."""
        copied = {key: spec.shape for key, spec in weight.specs.items() if not spec.cut}
        tensors = [weight.state[key] for key in copied]
        routes = [copy_to_first(weight.plan, shape) for shape in copied.values()]
        exchange = Exchange(
            self.mesh,
            plan_hops(routes, self.mesh.coordinate),
            tensors,
            [tensor.dtype for tensor in tensors],
            tensors[0].device,
        )
        return {k: x for k, x in zip(copied, exchange.wait(), strict=True) if x is not None}

    def _bind(self, states: MutableMapping[Tensor, dict[str, Any]]) -> None:
        """Makes new views if the engine has moved its tensors or states (``offload_states``)."""
        self._engine_states = states
        engine = [allocate(t, self._engine_states, self._options) for t in self.tensors]
        pointers = [
            moved.data_ptr()
            for tensor, state in zip(self.tensors, engine, strict=True)
            for moved in (tensor, state["exp_avg"], state["exp_avg_sq"])
        ]
        if pointers == self._pointers:
            return
        old_views, new_states = self._views, dict[Tensor, dict[str, Any]]()
        self._views = []
        for i, shard in enumerate(self.shards):
            view = shard.view(self.tensors[shard.tensor_index].detach())
            state, own = engine[shard.tensor_index], self._states.get(old_views[i], {})
            moments = {key: shard.view(state[key]) for key in ("exp_avg", "exp_avg_sq")}
            new_states[view] = {**own, **moments}
            # A weight has a count of its own if other parameters share the engine's tensor.
            if shard.start is None or shard.info.algorithm != CONDA:
                new_states[view]["step"] = state["step"]
            self._views.append(view)
        self._states.clear()
        self._states.update(new_states)
        for i, weight in zip(self._conda, self.weights, strict=True):
            weight.param = self._views[i]
        self._pointers = pointers
        if self.diagnostics is not None:
            self.diagnostics.replace(self.setup().members)

    def step(
        self,
        groups: Sequence[dict[str, Any]],
        states: MutableMapping[Tensor, dict[str, Any]],
    ) -> None:
        """Takes one step with the gradients of the tensors.

        Steps before the first gradient that is not zero on some rank change nothing and are not
        counted, because engines take such a step to allocate states.

        Args:
            groups: the current parameter group of each tensor.
            states: ``optimizer.state``.

        Raises:
            RuntimeError: on all ranks together: a decomposition raised or failed too often.
        """
        self._bind(states)
        self._groups = list(groups)
        grads = [
            None if (grad := self.tensors[shard.tensor_index].grad) is None else shard.view(grad)
            for shard in self.shards
        ]
        if not self.started:
            any_here = any(bool(grad.any()) for grad in grads if grad is not None)
            self.started = bool(all_max(self.mesh, [any_here])[0])
            if not self.started:
                return
        for i, weight in zip(self._conda, self.weights, strict=True):
            weight.group = groups[self.shards[i].tensor_index]
        collection = self._collection(grads)
        self._path.step(
            {place: grad for place, i in enumerate(self._conda) if (grad := grads[i]) is not None},
            collection,
        )
        self._adamw_step(grads, collection)
        if collection is not None:
            collection.finish()

    def _collection(self, grads: Sequence[Tensor | None]) -> Collection | None:
        """The collection of diagnostics to fill in this step; None if it does not collect."""
        if not (every := self._options.diagnostics_every):
            return None
        if self.diagnostics is None:
            self.diagnostics = Diagnostics(self.setup().members, [self.mesh], every)
        return self.diagnostics.begin(dict(zip(self._views, grads, strict=True)), [True])

    def _adamw_step(
        self, grads: Sequence[Tensor | None], collection: Collection | None = None
    ) -> None:
        """Steps the parameters on the adamw path, one kernel for equal groups and counts."""
        # A flat tensor has one count for all parameters in it; a whole tensor counts its own steps.
        for index in {shard.tensor_index for shard in self.shards if shard.start is not None}:
            self._engine_states[self.tensors[index]]["step"] += 1
        members = {} if collection is None else {m.param: m for m in self._adamw_parameters()}
        together: dict[tuple[int, int], list[Entry]] = defaultdict(list)
        for i in self._adamw:
            shard, view, grad = self.shards[i], self._views[i], grads[i]
            if grad is None:
                continue
            count = self._engine_states[self.tensors[shard.tensor_index]]["step"]
            if shard.start is None:
                count += 1
            state = self._states[view]
            entry = Entry(shard.info.name, view, grad, state["exp_avg"], state["exp_avg_sq"])
            together[id(self._groups[shard.tensor_index]), int(count)].append(entry)
        groups = {id(group): group for group in self._groups}
        for (group, step), entries in together.items():
            hyper = hyper_of(groups[group], "adamw_scale")
            if collection is None:
                adamw_(entries, step, hyper)
                continue
            for entry in entries:
                with collection.change(members[entry.param]):
                    adamw_([entry], step, hyper)


def _load_bases(weight: Weight, saved: Mapping[str, Tensor]) -> None:
    """Copies a weight's saved bases and counts into its state.

    A whole saved basis (r, r) fits any layout of the basis: this rank copies what it holds of it.

    Raises:
        ValueError: a saved state has another shape or dtype than here.
    """
    layouts = weight.state_layouts()  # counts have none
    for key in saved_keys(weight.rule, *weight.shape):
        ours, theirs = weight.state[key], saved[key]
        if ours.dtype == theirs.dtype and ours.shape == theirs.shape:
            ours.copy_(theirs)
            continue
        layout = layouts.get(key)
        if layout is None or ours.dtype != theirs.dtype or tuple(theirs.shape) != layout.shape:
            raise ValueError(
                f"{weight.name}: the checkpoint's {key} has shape {tuple(theirs.shape)} and dtype "
                f"{theirs.dtype}, here they are {tuple(ours.shape)} and {ours.dtype}. Load it on "
                "as many ranks (or from a universal checkpoint), with the same "
                "basis_budget, basis_dtype and state_dtype."
            )
        for block in layout.blocks(weight.mesh.coordinate):
            here, there = (
                tuple(slice(a, a + n) for a, n in zip(start, block.shape, strict=True))
                for start in (block.local, block.start)
            )
            ours[here].copy_(theirs[there])
