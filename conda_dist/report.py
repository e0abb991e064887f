"""The report on every parameter (path, layout, owners, bytes), as data and as a table."""

import io
import re
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from typing import Any, TypedDict

import torch
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from conda_dist.parameter_names import route_by_name
from conda_dist.plan.costs import Sizes, costs, save_costs
from conda_dist.rules.rule import Rule
from conda_dist.rules.states import moment_dtype, second_dtype
from conda_dist.runtime.adamw import AdamWParameter
from conda_dist.runtime.parameters import Setup
from conda_dist.runtime.weight import Weight


class Row(TypedDict):
    """The report on one parameter, or on one part of a parameter that ``splits`` cut.

    Attributes:
        name: its fully qualified name, or its place in the groups if it has none.
        shape: its global shape.
        path: the rule's, such as "conda" or "muon", or "adamw".
        rate: the current factor on its normalized update: ``lr * scale`` on the path of a
            rule with a ``scale``, else ``lr``; ``lr * adamw_scale`` on the adamw path.
        settings: options that decide its update beside the rate, such as ``betas`` and
            ``update_proj_gap``.
        reason: why it is on this path.
        layout: its placements, the layout in which the parameter is stored.
        compute: the layout in which its step is computed and its moments are stored.
        basis: the layout of its basis; "" if it has none.
        group: global ranks that compute its step if it has a compute group, else [].
        owners: global ranks that decompose it, one for each matrix of a batch; [] if it
            has no basis.
        state_bytes: bytes of its state on this rank.
        step_bytes: bytes that this rank sends in a step without a refresh.
        refresh_bytes: bytes that this rank sends in a step with a refresh. With ``refresh_delay``,
            the sum of a step, of starting the refresh and of taking the new bases.
        save_bytes: bytes that this rank sends in ``state_dict()``; ``load_state_dict`` sends about
            as many.
    """

    name: str
    shape: tuple[int, ...]
    path: str
    rate: float
    settings: dict[str, Any]
    reason: str
    layout: str
    compute: str
    basis: str
    group: list[int]
    owners: list[int]
    state_bytes: int
    step_bytes: int
    refresh_bytes: int
    save_bytes: int


def _reason(name: str, shape: tuple[int, ...], path: str) -> str:
    """Why a parameter is on its path: its kind, or its group if that chose another path."""
    found = route_by_name(name, torch.empty(shape, device="meta"))
    by_name = (found.algorithm == "adamw") == (path == "adamw")
    return found.reason if by_name else "chosen by its group"


def _rate(group: Mapping[str, Any], scale: str | None) -> float:
    return float(group["lr"]) * (1.0 if scale is None else float(group[scale]))


def rows(setup: Setup) -> list[Row]:
    """The rows of all trainable parameters and parts, without communication."""
    matrices = [_matrix_row(weight) for weight in setup.weights]
    return matrices + [_adamw_row(parameter) for parameter in setup.adamw_parameters]


def _adamw_row(parameter: AdamWParameter) -> Row:
    numel = parameter.layout.numel(parameter.mesh.coordinate)
    first, second = (
        of(parameter.param.dtype, parameter.options) for of in (moment_dtype, second_dtype)
    )
    return Row(
        name=parameter.name,
        shape=parameter.layout.shape,
        path="adamw",
        rate=_rate(parameter.group, "adamw_scale"),
        settings={"betas": parameter.group["betas"]},
        reason=_reason(parameter.name, parameter.layout.shape, "adamw"),
        layout=str(parameter.layout),
        compute=str(parameter.layout),
        basis="",
        group=[],
        owners=[],
        state_bytes=numel * (first.itemsize + second.itemsize) + 4,
        step_bytes=0,
        refresh_bytes=0,
        save_bytes=0,
    )


def sizes_of(rule: Rule, m: int, n: int, dtype: torch.dtype) -> Sizes:
    """The bytes per element of what a rule keeps and sends for a matrix (m, n) of a dtype."""
    states, names = rule.states(m, n, dtype), rule.bases(m, n)
    gradient, update = rule.exchange_dtypes(dtype)
    basis = states.get("basis")
    return Sizes(
        gradient.itemsize,
        update.itemsize,
        tuple(state.dtype.itemsize for state in states.values() if state.cut),
        tuple((s.shape, s.dtype.itemsize) for s in states.values() if not s.cut),
        len(rule.counts),
        0 if basis is None else basis.dtype.itemsize,
        torch.promote_types(states[names[0]].dtype, torch.float32).itemsize if names else 0,
    )


def _matrix_row(weight: Weight) -> Row:
    plan, rule, here = weight.plan, weight.rule, weight.mesh.coordinate
    sizes = sizes_of(rule, *weight.shape, weight.param.dtype)
    weight_costs = costs(plan, here, sizes, weight.is_async)
    step = sum(weight_costs.step.values())
    return Row(
        name=plan.name,
        shape=plan.storage.shape,
        path=rule.name,
        rate=_rate(weight.group, rule.factor),
        settings=rule.settings(weight.group),
        reason=_reason(plan.name, plan.storage.split_shape, rule.name),
        layout=str(plan.storage),
        compute=str(plan.compute),
        basis=str(plan.basis) if rule.refreshes else "",
        group=[plan.topology.rank_at(c) for c in plan.computing()] if plan.group else [],
        owners=[plan.topology.rank_at(c) for c in plan.owners] if rule.refreshes else [],
        state_bytes=weight_costs.state,
        step_bytes=step,
        refresh_bytes=step + sum(weight_costs.refresh.values()),
        save_bytes=sum(save_costs(plan, here, sizes).values()),
    )


def print_table(table: Sequence[Row], console: Console | None = None) -> None:
    """Prints the report as a table. Equal rows of all layers share one line.

    Args:
        table: from :func:`rows`.
        console: where to print. By default the terminal or, if standard output is no terminal,
            standard output with 220 columns.
    """
    alike: dict[tuple[str, ...], list[Row]] = defaultdict(list)
    for row in table:
        moved = "" if row["compute"] == row["layout"] else f" -> {row['compute']}"
        shape = "x".join(map(str, row["shape"])) or "scalar"
        name = re.sub(r"(?<=\.)\d+(?=\.)|^\d+(?=\.)", "*", row["name"])
        path = f"{row['path']}, {row['rate']:.3g}"
        # Equal weights have compute groups on different ranks: show how many ranks, not which.
        placed = (_without_ranks(text) for text in (row["layout"] + moved, row["basis"]))
        alike[name, shape, path, *placed].append(row)

    if console is None:
        console = Console()
        if not console.is_terminal:
            console = Console(width=220)
    # Leave columns out on a narrow terminal instead of folding them into an unreadable table.
    wide = console.width >= 130
    rule = next((row["path"] for row in table if row["path"] != "adamw"), "conda").capitalize()
    title = f"{rule}: what each parameter gets on this rank"
    settings = (f"{row['path']}: {_written(row['settings'])}" for row in table)
    caption = "\n".join(dict.fromkeys(settings))
    grid = Table(title=title, caption=caption, caption_justify="left", box=SIMPLE, show_footer=True)
    grid.add_column(
        "parameter", f"{len(table)} in all", overflow="fold", min_width=44 if wide else 24
    )
    texts = ("shape", "path, rate", "stored -> computed", "basis", "refreshed by")
    for name in texts if wide else texts[:2]:
        grid.add_column(name, no_wrap=True)
    for name, size in zip(("state", "sent a step", "a refresh"), _sizes(table), strict=True):
        grid.add_column(name, size, justify="right", no_wrap=True)
    for (name, *described), rows_alike in alike.items():
        count = f"{len(rows_alike)} x " if len(rows_alike) > 1 else ""
        described.append(_spans({owner for row in rows_alike for owner in row["owners"]}))
        shown = described if wide else described[:2]
        grid.add_row(count + name, *shown, *_sizes(rows_alike))
    console.print(grid)


def _written(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in settings.items())


def _without_ranks(layout: str) -> str:
    """A layout's text with the number of ranks in a compute group instead of their indices."""

    def count(found: re.Match[str]) -> str:
        first, last = int(found[1]), int(found[2] or found[1])
        return f"in groups of {last - first + 1}"

    return re.sub(r"on (\d+)(?:-(\d+))?", count, layout)


def as_text(table: Sequence[Row]) -> str:
    """The table of :func:`print_table` as text with 220 columns, for a log."""
    text = io.StringIO()
    print_table(table, Console(file=text, width=220))
    return text.getvalue()


def _sizes(table: Sequence[Row]) -> tuple[str, str, str]:
    return (
        _bytes(sum(row["state_bytes"] for row in table)),
        _bytes(sum(row["step_bytes"] for row in table)),
        _bytes(sum(row["refresh_bytes"] for row in table)),
    )


def _spans(ranks: Collection[int]) -> str:
    """Ranks in the form "0-3,8", or "5 of 0-31" if that is too long for the table."""
    spans: list[list[int]] = []
    for rank in sorted(ranks):
        if spans and spans[-1][-1] == rank - 1:
            spans[-1][1:] = [rank]
        else:
            spans.append([rank])
    text = ",".join("-".join(map(str, span)) for span in spans)
    return text if len(text) <= 18 else f"{len(ranks)} of {min(ranks)}-{max(ranks)}"


def _bytes(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"
