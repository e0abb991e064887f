"""Layer: integrations. The optimizer class that DeepSpeed's engine calls."""

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from deepspeed.utils import log_dist
from torch import Tensor

from conda_dist.integrations.deepspeed import checkpoint, engine
from conda_dist.integrations.deepspeed.arguments import parse, part_rows
from conda_dist.integrations.deepspeed.partition_step import PartitionStep, allocate
from conda_dist.integrations.deepspeed.partitions import (
    ParameterInfo,
    find_shards,
    replica_mesh,
    verify_shards,
)
from conda_dist.parameter_groups import check_hyperparameters
from conda_dist.report import Row, as_text, rows
from conda_dist.routing import CONDA, clean_name, no_matrix_message, route_parameters
from conda_dist.rules.gradient_bases import conda_rule
from conda_dist.rules.states import moment_dtype
from conda_dist.runtime.collectives import Mesh
from conda_dist.runtime.diagnostics import Diagnostics, Signals, read
from conda_dist.runtime.environment import without_autocast
from conda_dist.runtime.errors import agree
from conda_dist.runtime.parameters import Setup

NAME_WEIGHTS = 'Name weights with "conda_params": ["pattern"] among the optimizer\'s params'


class Conda(torch.optim.Optimizer):
    """Conda for DeepSpeed's engine, at ZeRO stages 0 to 3.

    The engine makes it from ``"optimizer": {"type": "Conda", "params": {...}}``, or a script makes
    it from ``model.named_parameters()`` and gives it to ``deepspeed.initialize``. It computes the
    same as :class:`conda_dist.Conda`.

    The engine replaces the parameters by flat partitions. The state of a partition is ``step`` (),
    and ``exp_avg`` and ``exp_avg_sq`` in the shape of the partition: the moments of a weight's
    element have the element's index. Bases are separate, and ``state_dict()`` has them under
    "conda".

    Args:
        params: tensors, (name, tensor) pairs or group dicts.
        given: the arguments of :class:`conda_dist.Conda` except ``process_group``, and three more.
            ``conda_params`` and ``adamw_params`` are lists of patterns (see :mod:`fnmatch`) of
            names of parameters to put on one path in any case. ``splits`` is a dict of patterns
            of fused weights, with the rows of each part, such as
            ``{"*.qkv_proj.weight": [4096, 1024, 1024]}``, or the number of equal parts. It is
            that of :func:`conda_dist.param_groups`, but only for weights of two dimensions, and
            without repetition.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument is unknown or out of range; a pattern matches no parameter; splits
            do not fit a weight; no matrix takes the conda path; or Conda does not support an
            option in the engine's config.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[tuple[str, Tensor]] | Iterable[dict[str, Any]],
        **given: Any,
    ) -> None:
        self._prefix = engine.errors_prefix()
        self._arguments = parse(given, self._prefix)
        self._rule = conda_rule(self._arguments.options)
        super().__init__(params, dict(self._arguments.defaults))
        for group in self.param_groups:
            check_hyperparameters(group)
            group["betas"] = tuple(group["betas"])
        # Keep the groups and their parameters: at stages 1 and 2 the engine sets param_groups to
        # one group at a time, and it filters the lists of parameters in place.
        self._groups = self.param_groups
        self._params = [list(group["params"]) for group in self.param_groups]
        self._engine_info = engine.EngineInfo()
        self._infos: dict[Tensor, ParameterInfo] = {}
        self._steps: dict[tuple[int, ...], PartitionStep] = {}  # by ids of the engine's tensors
        self._verified = set[tuple[int, ...]]()
        self._loaded = checkpoint.SavedBases()  # until the steps that need them exist
        self._reported = self._named = False
        names = [group.pop("param_names", [None] * len(group["params"])) for group in self._groups]
        pairs = zip(self._params, names, strict=True)
        own = {p: n for params, named in pairs for p, n in zip(params, named, strict=True) if n}
        info = engine.current_engine_info()
        if info is not None or own:
            self.attach(info or engine.EngineInfo(), own)

    def attach(self, info: engine.EngineInfo, own: dict[Tensor, str] | None = None) -> None:
        """Routes the parameters again, with information from the engine.

        Args:
            info: the information.
            own: the names that the optimizer was given; they win over the engine's.

        Raises:
            ValueError: see :class:`Conda`.
        """
        self._engine_info = info
        before = {param: old.name for param, old in self._infos.items() if self._named}
        self._route({**info.names, **before, **(own or {})})

    def _route(self, names: dict[Tensor, str]) -> None:
        """Chooses the path of each parameter.

        Args:
            names: the parameters' names; used only if all parameters have one.
        """
        places = [
            (f"param_groups[{g}]['params'][{i}]", param)
            for g, params in enumerate(self._params)
            for i, param in enumerate(params)
        ]
        self._named = all(param in names for _, param in places)
        if not self._named:
            warnings.warn(
                "Conda got parameters without names, so it cannot tell embeddings, the output head "
                "and routers from other matrices, and treats all matrices alike. Names decide: "
                "pass model.named_parameters().",
                stacklevel=4,
            )
            names = {}
        # Route meta tensors in the full shapes, because ZeRO-3 has partitioned the parameters.
        shapes = {p: tuple(getattr(p, "ds_shape", p.shape)) for _, p in places}
        stand_ins = {
            param: torch.empty(shape, device="meta", requires_grad=param.requires_grad)
            for param, shape in shapes.items()
        }
        named = [(names.get(param, place), stand_ins[param]) for place, param in places]
        by_param = self._engine_info.kinds
        kinds = {id(stand_ins[p]): by_param[id(p)] for _, p in places if id(p) in by_param}
        routed = route_parameters(named, kinds, self._arguments.conda, self._arguments.adamw)
        if routed.unmatched:
            key = "conda_params" if routed.unmatched[0] in self._arguments.conda else "adamw_params"
            raise ValueError(
                f"{self._prefix}{key} pattern {routed.unmatched[0]!r} matches no parameter; names "
                f"look like {', '.join(repr(clean_name(name)) for name, _ in named[:3])}"
            )
        if not any(stand_in.requires_grad for _, stand_in in routed.conda):
            raise ValueError(no_matrix_message(named, NAME_WEIGHTS))
        try:
            rows = part_rows(routed, self._arguments.splits)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{self._prefix}{error}") from None
        self._infos = {
            param: ParameterInfo(
                clean_name(names.get(param, place)),
                shapes[param],
                CONDA if id(stand_ins[param]) in rows else "adamw",
                rows.get(id(stand_ins[param]), ()),
            )
            for place, param in places
        }
        self._check_groups()
        count = sum(s.requires_grad for _, s in routed.conda)
        log_dist(f"Conda: {count} weights of {len(named)} are on the conda path", ranks=[0])

    def _check_groups(self) -> None:
        """Refuses groups whose ``algorithm`` or ``splits`` differ from the parameters' routes."""
        for group, params in zip(self._groups, self._params, strict=True):
            algorithm, splits = group.get("algorithm"), group.get("splits")
            for info in (self._infos[param] for param in params):
                if algorithm not in (None, info.algorithm):
                    raise ValueError(
                        f"{info.name}: its group's algorithm is {algorithm!r}, its path "
                        f"{info.algorithm!r}; name it in conda_params or adamw_params instead"
                    )
                if splits is not None and tuple(splits) != tuple(info.splits):
                    raise ValueError(
                        f"{info.name}: its group has splits={splits}; give splits among the "
                        "optimizer's params instead, by pattern"
                    )

    @torch._disable_dynamo  # type: ignore[attr-defined]
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Takes one step with the tensors that the engine has put into the groups.

        Args:
            closure: must be None; the engine does not support closures.

        Raises:
            TypeError: a hyperparameter was set to a value of the wrong type.
            ValueError: a hyperparameter was set to a value out of range.
            RuntimeError: on all ranks together: the engine's tensors do not contain the expected
                elements, ranks have different plans, or a decomposition raised or failed too
                often; and, in the first step of these tensors, also for a wrong hyperparameter.
        """
        if closure is not None:
            raise ValueError("a closure is not supported under DeepSpeed")
        with without_autocast():
            self._step()

    def _step(self) -> None:
        if not self._infos:
            self._route({})
        error = self._check_hyperparameters()
        pairs = [(t, g) for g in self.param_groups for t in g["params"] if t.requires_grad]
        key = tuple(id(tensor) for tensor, _ in pairs)
        groups = [group for _, group in pairs]
        partition_step = self._steps.get(key)
        if error is not None and (partition_step is not None or not pairs):
            raise error
        # Allocate the states of all groups: the engine reads them all after its first call.
        for group in self._groups:
            for tensor in group["params"]:
                if tensor.requires_grad:
                    allocate(tensor, self.state, self._arguments.options)
        if not pairs:
            return
        if partition_step is None:
            tensors = [tensor for tensor, _ in pairs]
            partition_step = self._steps[key] = self._plan(key, tensors, groups, error)
        partition_step.step(groups, self.state)
        if not self._reported and self._all_planned():
            self._reported = True
            log_dist(f"Conda's parameters\n{as_text(self.report())}", ranks=[0])

    def _check_hyperparameters(self) -> Exception | None:
        """The error of the first wrong hyperparameter in any group; None if all are right.

        It checks all groups although the engine may step them one by one.
        """
        try:
            for i, group in enumerate(self._groups):
                check_hyperparameters(group, f"parameter group {i}: ", scheduled=True)
        except (TypeError, ValueError) as error:
            return error
        return None

    def _plan(
        self,
        key: tuple[int, ...],
        tensors: list[Tensor],
        groups: list[dict[str, Any]],
        error: Exception | None,
    ) -> PartitionStep:
        """Plans the tensors of a call, and compares the plan with the other ranks.

        Args:
            key: ids of the tensors.
            tensors: the tensors that the engine steps together.
            groups: the parameter group of each tensor.
            error: an error of this rank, which all ranks raise; or None.
        """
        shards, partition_step, lines = [], None, list[str]()
        mesh = self._mesh(groups)
        try:
            if error is not None:
                raise error
            for group in {id(group): group for group in groups}.values():
                inside = [i for i, other in enumerate(groups) if other is group]
                infos = {p: self._infos[p] for p in self._params_of(group)}
                own = [tensors[i] for i in inside]
                shards += find_shards(inside[0], own, infos, mesh)
            for shard in shards:
                if shard.mesh != mesh:
                    raise ValueError(
                        f"{shard.info.name}: DeepSpeed steps it together with parameters that "
                        "other ranks share, which Conda does not support"
                    )
            if key not in self._verified:
                verify_shards(shards, tensors)
                self._verified.add(key)
            options = self._arguments.options
            if options.basis_budget is not None:
                spent = sum(other.basis_bytes() for other in self._steps.values())
                options = replace(options, basis_budget=max(options.basis_budget - spent, 0))
            partition_step = PartitionStep(tensors, groups, shards, mesh, options)
            partition_step.init_state(self.state, self._loaded)
            lines = partition_step.setup().lines(mesh)
        except Exception as caught:
            error = caught
        agree(mesh, lines, error)
        assert partition_step is not None
        for shard in shards:
            self._loaded.weights.pop(shard.info.name, None)
            self._loaded.counts.pop(shard.info.name, None)
        return partition_step

    def _mesh(self, groups: Sequence[dict[str, Any]]) -> Mesh:
        """The ranks that share the parameters of these groups, without communication."""
        for param in self._params_of(groups[0]):
            for attribute in ("ds_process_group", "_dp_group"):
                if (group := getattr(param, attribute, None)) is not None:
                    return Mesh.of_group(group)
        return replica_mesh(self._engine_info.replicas)

    def _params_of(self, group: dict[str, Any]) -> list[Tensor]:
        """The parameters with which a group was made."""
        for ours, params in zip(self._groups, self._params, strict=True):
            if ours is group:
                return params
        raise ValueError("DeepSpeed has replaced a parameter group, which Conda does not support")

    def _all_planned(self) -> bool:
        """Whether the calls of ``step()`` so far contain all trainable parameters."""
        planned = sum(len(partition_step.shards) for partition_step in self._steps.values())
        infos = [i for p, i in self._infos.items() if p.requires_grad and all(i.shape)]
        return planned == sum(len(info.parts) for info in infos)

    def report(self) -> list[Row]:
        """The report on each parameter that a step has contained; see ``report.Row``."""
        setups = [partition_step.setup() for partition_step in self._steps.values()]
        weights = [weight for setup in setups for weight in setup.weights]
        adamw_parameters = [parameter for setup in setups for parameter in setup.adamw_parameters]
        return rows(
            Setup(weights, adamw_parameters, list(dict.fromkeys(s.meshes[0] for s in setups)), None)
        )

    def diagnostics(self, *, summed: bool = False) -> dict[str, Signals]:
        """What the last steps that collected have found; see ``conda_dist.Conda.diagnostics``."""
        return read(self._diagnostics(), summed)

    @property
    def diagnostics_step(self) -> int:
        """The step that has collected what :meth:`diagnostics` returns; 0 before the first."""
        return max((found.step for found in self._diagnostics()), default=0)

    def _diagnostics(self) -> list[Diagnostics]:
        found = (partition_step.diagnostics for partition_step in self._steps.values())
        return [diagnostics for diagnostics in found if diagnostics is not None]

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group in ``__init__``. Later it raises: DeepSpeed partitions only these groups.

        Raises:
            RuntimeError: the optimizer was made before.
        """
        if hasattr(self, "_groups"):
            raise RuntimeError("groups cannot be added once DeepSpeed's optimizer is made")
        super().add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        """torch's state dict, with the bases and counts under the key "conda".

        All ranks must call it together only while the engine saves a ZeRO checkpoint; the engine
        does so.
        """
        problem = engine.zero_checkpoint_problem()
        whole = problem == ""
        bases = checkpoint.SavedBases(dict(self._loaded.weights), dict(self._loaded.counts))
        for partition_step in self._steps.values():
            part = partition_step.saved_bases(whole)
            bases.weights |= part.weights
            bases.counts |= part.counts
        state = super().state_dict()
        packed = checkpoint.pack(bases, state["param_groups"], self._infos)
        if problem is not None and not any(self._mesh(self._groups).coordinate):
            state["param_groups"][0][checkpoint.KEY] = {"unfit": problem} if problem else packed
        return {**state, checkpoint.KEY: packed}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state dict of this optimizer that as many ranks have saved.

        Everything is checked before anything changes, except the shapes and dtypes of the bases:
        the next step plans the bases, and checks them then.

        Raises:
            ValueError: the state dict is from another optimizer or other parameters, or is damaged.
        """
        loaded = checkpoint.check(state_dict, self.param_groups, self._infos, self._rule)
        for tensor, saved in checkpoint.saved_states(state_dict, self.param_groups):
            state = allocate(tensor, self.state, self._arguments.options)
            for name, value in state.items():
                value.copy_(saved[name]) if saved else value.zero_()
        for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=True):
            checkpoint.restore_hyperparameters(group, saved)
        self._loaded = loaded
        self._steps.clear()

    @contextmanager
    def loading(self, folder: str, wanted: bool) -> Iterator[None]:
        """A context in which the engine loads a universal checkpoint, on any number of ranks.

        On entry it checks the checkpoint; on exit it loads the bases and hyperparameters.

        Args:
            folder: the checkpoint's folder, including its tag.
            wanted: whether to load the optimizer's state. Otherwise the engine loads the model
                alone, and the optimizer starts afresh with its current hyperparameters.

        Raises:
            ValueError: the checkpoint is from another optimizer or other parameters. Nothing has
                changed.
            RuntimeError: the same on all ranks together, if there are several.
        """
        found: Mapping[str, Any] = {}
        error = None
        try:
            if wanted:
                found = checkpoint.read_universal(folder, self._groups, self._infos, self._rule)
        except Exception as caught:
            error = caught
        agree(self._mesh(self._groups), [], error, "cannot load the universal checkpoint")
        # At stage 3, the engine gives all groups the hyperparameters of the first: restore them.
        groups = found.get("groups") or [checkpoint.hyperparameters(g) for g in self._groups]
        yield
        for group, saved in zip(self._groups, groups, strict=True):
            checkpoint.restore_hyperparameters(group, saved)
        for tensor, state in self.state.items():
            dtype = moment_dtype(tensor.dtype, self._arguments.options)
            for key in ("exp_avg", "exp_avg_sq"):
                state[key] = state[key].to(dtype) if wanted else state[key].zero_()
            # The engine may give several tensors one count: make a count for each.
            state["step"] = torch.tensor(float(state.get("step") or 0) if wanted else 0.0)
        self._loaded = checkpoint.SavedBases(
            dict(found.get("weights", {})), dict(found.get("counts", {}))
        )
        self._steps.clear()
