"""Layer: integrations. The optimizer that DeepSpeed's engine sees."""

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from deepspeed.utils import log_dist
from torch import Tensor

from conda_dist.integrations.deepspeed import checkpoint, engine
from conda_dist.integrations.deepspeed.arguments import cut, parse
from conda_dist.integrations.deepspeed.partitions import (
    Member,
    find_pieces,
    replica_mesh,
    verify,
)
from conda_dist.integrations.deepspeed.unit import Unit, allocate
from conda_dist.parameter_groups import check_hyperparameters
from conda_dist.report import Row, as_text, rows
from conda_dist.routing import CONDA, assign, clean_name, nothing_to_project
from conda_dist.rules.states import moment_dtype
from conda_dist.runtime.collectives import Mesh, agree
from conda_dist.runtime.environment import without_autocast
from conda_dist.runtime.parameters import Setup

HOW = 'Name weights with "conda_params": ["pattern"] among the optimizer\'s params'


class Conda(torch.optim.Optimizer):
    """Conda for DeepSpeed's engine, at ZeRO stages 0 to 3.

    Made by the engine from ``"optimizer": {"type": "Conda", "params": {...}}``, or by the script,
    from ``model.named_parameters()``, and handed to ``deepspeed.initialize``. The arithmetic is
    that of :class:`conda_dist.Conda`.

    The engine replaces the parameters by flat partitions; the state of each is ``step``, and
    ``exp_avg`` and ``exp_avg_sq``, as long as the partition, in which elements of projected moments
    are where the weight's elements are. The bases are not among them, but in ``state_dict()`` under
    "conda".

    Args:
        params: what torch's optimizers take.
        given: the arguments of :class:`conda_dist.Conda` except ``process_group``, dtypes as
            texts or torch's; ``conda_params`` and ``adamw_params``: lists of patterns (as of
            :mod:`fnmatch`) of names to project, or not to, whatever their names say; ``splits``:
            patterns of fused weights with the rows of their parts, such as
            ``{"*.qkv_proj.weight": [4096, 1024, 1024]}``, or the number of equal parts, as of
            :func:`conda_dist.param_groups` but of two dimensions and without repetition.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: there is no such argument, or its value is out of range; a pattern matches no
            parameter; a weight cannot be split as it says; no matrix would be on the conda path;
            the engine's config asks for what is not supported.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[tuple[str, Tensor]] | Iterable[dict[str, Any]],
        **given: Any,
    ) -> None:
        self._section = engine.section()
        self._arguments = parse(given, self._section)
        super().__init__(params, dict(self._arguments.defaults))
        for group in self.param_groups:
            check_hyperparameters(group)
            group["betas"] = tuple(group["betas"])
        # The engine shows us one group at a time at stages 1 and 2, and filters the list in place.
        self._groups = self.param_groups
        self._given = [list(group["params"]) for group in self.param_groups]
        self._known = engine.Known()
        self._members: dict[Tensor, Member] = {}
        self._units: dict[tuple[int, ...], Unit] = {}
        self._verified = set[tuple[int, ...]]()
        self._loaded = checkpoint.Kept()
        self._shown = self._named = False
        names = [group.pop("param_names", [None] * len(group["params"])) for group in self._groups]
        pairs = zip(self._given, names, strict=True)
        own = {p: n for params, named in pairs for p, n in zip(params, named, strict=True) if n}
        known = engine.current()
        if known is not None or own:
            self.attach(known or engine.Known(), own)

    def attach(self, known: engine.Known, own: dict[Tensor, str] | None = None) -> None:
        """Routes the parameters by what the engine knows of them.

        Args:
            known: what that is.
            own: the names the optimizer was given, which count more.

        Raises:
            ValueError: see :class:`Conda`.
        """
        self._known = known
        before = {param: member.name for param, member in self._members.items() if self._named}
        self._route({**known.names, **before, **(own or {})})

    def _route(self, names: dict[Tensor, str]) -> None:
        """Decides which path each parameter takes."""
        places = [
            (f"param_groups[{g}]['params'][{i}]", param)
            for g, params in enumerate(self._given)
            for i, param in enumerate(params)
        ]
        self._named = all(param in names for _, param in places)
        if not self._named:
            warnings.warn(
                "Conda got parameters without names, so it cannot tell embeddings, output head and "
                "routers from the projections it is meant for and will treat them alike.",
                stacklevel=4,
            )
            names = {}
        # Stand-ins of the shapes the parameters had before ZeRO took them apart.
        shapes = {p: tuple(getattr(p, "ds_shape", p.shape)) for _, p in places}
        stand_ins = {
            param: torch.empty(shape, device="meta", requires_grad=param.requires_grad)
            for param, shape in shapes.items()
        }
        named = [(names.get(param, place), stand_ins[param]) for place, param in places]
        kinds = self._known.kinds
        known = {id(stand_ins[p]): kinds[id(p)] for _, p in places if id(p) in kinds}
        routed = assign(named, known, self._arguments.conda, self._arguments.adamw)
        if routed.unmatched:
            key = "conda_params" if routed.unmatched[0] in self._arguments.conda else "adamw_params"
            raise ValueError(
                f"{self._section}{key} pattern {routed.unmatched[0]!r} matches no parameter; names "
                f"look like {', '.join(repr(clean_name(name)) for name, _ in named[:3])}"
            )
        if not any(stand_in.requires_grad for _, stand_in in routed.conda):
            raise ValueError(nothing_to_project(named, HOW))
        try:
            rows = cut(routed, self._arguments.splits)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{self._section}{error}") from None
        self._members = {
            param: Member(
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
        """Refuses groups that ask for another path or other parts than their parameters get."""
        for group, params in zip(self._groups, self._given, strict=True):
            asked, splits = group.get("algorithm"), group.get("splits")
            for member in (self._members[param] for param in params):
                if asked not in (None, member.algorithm):
                    raise ValueError(
                        f"{member.name}: its group's algorithm is {asked!r}, its path "
                        f"{member.algorithm!r}; name it in conda_params or adamw_params instead"
                    )
                if splits is not None and tuple(splits) != tuple(member.splits):
                    raise ValueError(
                        f"{member.name}: its group has splits={splits}; give splits among the "
                        "optimizer's params instead, by pattern"
                    )

    @torch._disable_dynamo  # type: ignore[attr-defined]
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Takes one step with the tensors the engine has put into the groups.

        Args:
            closure: not supported, as by the engine.

        Raises:
            TypeError: a hyperparameter was set to something of another type.
            ValueError: one was set to something out of its range.
            RuntimeError: one was when a plan is made; the engine's tensors are not where they
                should be, ranks have different plans, or a decomposition raised or failed too
                often; on all ranks alike.
        """
        if closure is not None:
            raise ValueError("a closure is not supported under DeepSpeed")
        with without_autocast():
            self._step()

    def _step(self) -> None:
        if not self._members:
            self._route({})
        error = self._check_hyperparameters()
        live = [group for group in self.param_groups if group["params"]]
        pairs = [(t, group) for group in live for t in group["params"] if t.requires_grad]
        key = tuple(id(tensor) for tensor, _ in pairs)
        groups = [group for _, group in pairs]
        unit = self._units.get(key)
        if error is not None and (unit is not None or not pairs):
            raise error
        for group in self._groups:  # the engine links the states of all after the first call
            for tensor in group["params"]:
                if tensor.requires_grad:
                    allocate(tensor, self.state, self._arguments.options)
        if not pairs:
            return
        if unit is None:
            tensors = [tensor for tensor, _ in pairs]
            unit = self._units[key] = self._resolve(key, tensors, groups, error)
        unit.step(groups, self.state)
        if not self._shown and self._complete():
            self._shown = True
            log_dist(f"Conda's parameters\n{as_text(self.report())}", ranks=[0])

    def _check_hyperparameters(self) -> Exception | None:
        """What is wrong with a value of any group; the engine may step the groups one by one."""
        try:
            for i, group in enumerate(self._groups):
                check_hyperparameters(group, f"parameter group {i}: ", scheduled=True)
        except (TypeError, ValueError) as error:
            return error
        return None

    def _resolve(
        self,
        key: tuple[int, ...],
        tensors: list[Tensor],
        groups: list[dict[str, Any]],
        error: Exception | None,
    ) -> Unit:
        """Finds out what the tensors of a call hold, and agrees on it with the other ranks."""
        pieces, unit, lines = [], None, list[str]()
        mesh = self._mesh(groups)
        try:
            if error is not None:
                raise error
            for group in {id(group): group for group in groups}.values():
                inside = [i for i, other in enumerate(groups) if other is group]
                members = {p: self._members[p] for p in self._given_to(group)}
                own = [tensors[i] for i in inside]
                pieces += find_pieces(inside[0], own, members, mesh)
            if any(piece.mesh != mesh for piece in pieces):
                raise ValueError("parameters stepped together are shared by different ranks")
            if key not in self._verified:
                verify(pieces, tensors)
                self._verified.add(key)
            options = self._arguments.options
            if options.basis_budget is not None:
                spent = sum(other.basis_bytes() for other in self._units.values())
                options = replace(options, basis_budget=max(options.basis_budget - spent, 0))
            unit = Unit(tensors, groups, pieces, mesh, options)
            unit.init_state(self.state, self._loaded)
            lines = unit.setup().lines(mesh)
        except Exception as caught:
            error = caught
        agree(mesh, lines, error)
        assert unit is not None
        for piece in unit.pieces:
            self._loaded.weights.pop(piece.member.name, None)
            self._loaded.counts.pop(piece.member.name, None)
        return unit

    def _mesh(self, groups: Sequence[dict[str, Any]]) -> Mesh:
        """The ranks that share what the groups hold; the same question on all of them."""
        for param in self._given_to(groups[0]):
            for attribute in ("ds_process_group", "_dp_group"):
                if (group := getattr(param, attribute, None)) is not None:
                    return Mesh.of_group(group)
        return replica_mesh(self._known.replicas)

    def _given_to(self, group: dict[str, Any]) -> list[Tensor]:
        for ours, params in zip(self._groups, self._given, strict=True):
            if ours is group:
                return params
        raise ValueError("DeepSpeed has put a parameter group in the place of another")

    def _complete(self) -> bool:
        count = sum(len(unit.pieces) for unit in self._units.values())
        members = [m for p, m in self._members.items() if p.requires_grad and all(m.shape)]
        return count == sum(len(member.parts) for member in members)

    def report(self) -> list[Row]:
        """What each parameter gets, of those that a step has concerned; see ``report.Row``."""
        setups = [unit.setup() for unit in self._units.values()]
        weights = [weight for setup in setups for weight in setup.weights]
        adamw_parameters = [parameter for setup in setups for parameter in setup.adamw_parameters]
        return rows(
            Setup(weights, adamw_parameters, list(dict.fromkeys(s.meshes[0] for s in setups)), None)
        )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group, while the optimizer is made; the engine could not partition a later one.

        Raises:
            RuntimeError: the optimizer is made.
        """
        if hasattr(self, "_groups"):
            raise RuntimeError("groups cannot be added once DeepSpeed's optimizer is made")
        super().add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        """torch's state dict, and under "conda" the bases and counts that it cannot hold.

        A collective only while the engine saves ZeRO's checkpoint, as it then is there.
        """
        unfit = engine.saving()
        whole = unfit == ""
        kept = checkpoint.Kept(dict(self._loaded.weights), dict(self._loaded.counts))
        for unit in self._units.values():
            part = unit.kept(whole)
            kept.weights |= part.weights
            kept.counts |= part.counts
        state = super().state_dict()
        extra = checkpoint.pack(kept, state["param_groups"], self._members)
        if unfit is not None and not any(self._mesh(self._groups).coordinate):
            state["param_groups"][0][checkpoint.KEY] = {"unfit": unfit} if unfit else extra
        return {**state, checkpoint.KEY: extra}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes up where a state dict of this optimizer was written, on as many ranks.

        Everything is checked before anything is changed, but what only the next step can know:
        whether the bases are stored as they were.

        Raises:
            ValueError: the state dict is of another optimizer, of other parameters, or damaged.
        """
        loaded = checkpoint.check(state_dict, self.param_groups, self._members)
        for tensor, saved in checkpoint.states(state_dict, self.param_groups):
            state = allocate(tensor, self.state, self._arguments.options)
            for name, value in state.items():
                value.copy_(saved[name]) if saved else value.zero_()
        for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=True):
            checkpoint.restore(group, saved)
        self._loaded = loaded
        self._units.clear()

    @contextmanager
    def loading(self, folder: str, wanted: bool) -> Iterator[None]:
        """Surrounds the engine's loading of a universal checkpoint, on any number of ranks.

        Args:
            folder: of the checkpoint, with its tag.
            wanted: whether to load the optimizer's state, or the model alone; then the optimizer
                begins anew, with the hyperparameters it has.

        Raises:
            ValueError: the checkpoint is of another optimizer or of other parameters; nothing was
                changed then.
            RuntimeError: the same, where there is more than one rank; on all of them alike.
        """
        found: Mapping[str, Any] = {}
        error = None
        try:
            if wanted:
                found = checkpoint.read_universal(folder, self._groups, self._members)
        except Exception as caught:
            error = caught
        agree(self._mesh(self._groups), [], error, "cannot load the universal checkpoint")
        # The engine gives all groups the first one's hyperparameters at stage 3.
        groups = found.get("groups") or [checkpoint.hyperparameters(g) for g in self._groups]
        yield
        for group, saved in zip(self._groups, groups, strict=True):
            checkpoint.restore(group, saved)
        for tensor, state in self.state.items():
            dtype = moment_dtype(tensor.dtype, self._arguments.options)
            for key in ("exp_avg", "exp_avg_sq"):
                state[key] = state[key].to(dtype) if wanted else state[key].zero_()
            # One tensor may count for all that the engine steps.
            state["step"] = torch.tensor(float(state.get("step") or 0) if wanted else 0.0)
        self._loaded = checkpoint.Kept(
            dict(found.get("weights", {})), dict(found.get("counts", {}))
        )
        self._units.clear()
