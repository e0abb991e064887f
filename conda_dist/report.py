"""What each parameter gets, as plain data and as a table."""

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
from conda_dist.rules.rule import StateSpec
from conda_dist.rules.states import moment_dtype, second_dtype
from conda_dist.runtime.adamw import AdamWParameter
from conda_dist.runtime.parameters import Setup
from conda_dist.runtime.weight import Weight


class Row(TypedDict):
    """One parameter, or one of the parts that its group's ``splits`` make of it.

    Attributes:
        name: its fully qualified name, or where it stands in the groups.
        shape: global shape.
        path: the rule's, "conda" or "muon", or "adamw".
        rate: what multiplies its normalised update now: ``lr * scale`` of its group on the conda
            path, ``lr`` on another rule's, ``lr * adamw_scale`` on the adamw path.
        reason: the rule that sends parameters of this name and shape there by default.
        layout: where its elements are, in DTensor's words.
        compute: where its moments are and its step is computed.
        basis: where its basis is kept; "" without one.
        group: global ranks that compute its step, where those are not all that hold it; else [].
        owners: global ranks that decompose its momentum, one for each matrix of a batch; else [].
        state_bytes: bytes of optimizer state on this rank.
        step_bytes: bytes this rank sends in a step without a refresh.
        refresh_bytes: bytes this rank sends in a step with one; of an asynchronous one in a step,
            in starting it and in taking its bases.
        save_bytes: bytes this rank sends for ``state_dict()``; loading takes about as many.
    """

    name: str
    shape: tuple[int, ...]
    path: str
    rate: float
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
    found = route_by_name(name, torch.empty(shape, device="meta"))
    by_name = (found.algorithm == "adamw") == (path == "adamw")
    return found.reason if by_name else "chosen by its group"


def _rate(group: Mapping[str, Any], scale: str | None) -> float:
    return float(group["lr"]) * (1.0 if scale is None else float(group[scale]))


def rows(setup: Setup) -> list[Row]:
    """The report of every trainable parameter or part; needs no communication."""
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


def sizes_of(
    states: Mapping[str, StateSpec], travel: torch.dtype, back: torch.dtype, counts: int
) -> Sizes:
    """Bytes of what a rule keeps and sends of a weight.

    Args:
        states: what it keeps.
        travel: in what the gradient travels.
        back: in what the update travels.
        counts: how many counts it keeps of each matrix.
    """
    basis = states.get("basis")
    return Sizes(
        travel.itemsize,
        back.itemsize,
        tuple(state.dtype.itemsize for state in states.values() if state.cut),
        tuple((s.shape, s.dtype.itemsize) for s in states.values() if not s.cut),
        counts,
        0 if basis is None else basis.dtype.itemsize,
        0 if basis is None else torch.promote_types(basis.dtype, torch.float32).itemsize,
    )


def _matrix_row(weight: Weight) -> Row:
    plan, rule, here = weight.plan, weight.rule, weight.mesh.coordinate
    sizes = sizes_of(weight.specs, weight.exchange_dtype, weight.update_dtype, len(rule.counts))
    costing = costs(plan, here, sizes, weight.is_async)
    step = sum(costing.step.values())
    return Row(
        name=plan.name,
        shape=plan.storage.shape,
        path=rule.name,
        rate=_rate(weight.group, rule.factor),
        reason=_reason(plan.name, plan.storage.split_shape, rule.name),
        layout=str(plan.storage),
        compute=str(plan.compute),
        basis=str(plan.basis) if rule.refreshes else "",
        group=[plan.topology.rank_at(c) for c in plan.computing()] if plan.group else [],
        owners=[plan.topology.rank_at(c) for c in plan.owners] if rule.refreshes else [],
        state_bytes=costing.state,
        step_bytes=step,
        refresh_bytes=step + sum(costing.refresh.values()),
        save_bytes=sum(save_costs(plan, here, sizes).values()),
    )


def print_table(table: Sequence[Row], console: Console | None = None) -> None:
    """Prints the report, alike parameters of all layers in one line, to the terminal or elsewhere.

    Args:
        table: from :func:`rows`.
        console: where to print; the terminal by default, or standard output in full width.
    """
    alike: dict[tuple[str, ...], list[Row]] = defaultdict(list)
    for row in table:
        moved = "" if row["compute"] == row["layout"] else f" -> {row['compute']}"
        shape = "x".join(map(str, row["shape"])) or "scalar"
        name = re.sub(r"(?<=\.)\d+(?=\.)|^\d+(?=\.)", "*", row["name"])
        path = f"{row['path']}, {row['rate']:.3g}"
        # Alike weights are dealt to different ranks: say to how many, not to which.
        placed = (_without_ranks(text) for text in (row["layout"] + moved, row["basis"]))
        alike[name, shape, path, *placed].append(row)

    if console is None:
        console = Console()
        if not console.is_terminal:
            console = Console(width=220)
    # What a narrow terminal can do without is left out, rather than folded beyond recognition.
    wide = console.width >= 130
    rule = next((row["path"] for row in table if row["path"] != "adamw"), "conda").capitalize()
    title = f"{rule}: what each parameter gets on this rank"
    grid = Table(title=title, box=SIMPLE, show_footer=True)
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


def _without_ranks(layout: str) -> str:
    """A layout in words, with the number of the ranks of a group in the place of their indices."""

    def count(found: re.Match[str]) -> str:
        first, last = int(found[1]), int(found[2] or found[1])
        return f"in groups of {last - first + 1}"

    return re.sub(r"on (\d+)(?:-(\d+))?", count, layout)


def as_text(table: Sequence[Row]) -> str:
    """The report as :func:`print_table` prints it, in full width, for a log."""
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
    """Ranks as in "0-3,8"."""
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
