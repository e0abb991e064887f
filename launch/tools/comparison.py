"""The findings of a comparison as a table and a picture, made from its results.json."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from conda_dist.launch.job.picture import new_figure
from conda_dist.launch.tools.protocol import SHARED, keys_of, parts_of, protocol_of, read
from conda_dist.launch.tools.search import Rule, edges, steps_to
from conda_dist.launch.tools.trials import loss_of, losses_of, run_of
from conda_dist.options import PRESETS

_HEADER = (
    *("rule", "matrices", "rest", "trials", "best trial", "final loss"),
    *("above the first, by seed", "ms a step", "optimizer ms", "state MiB"),
)


def show(folder: Path) -> tuple[str, str]:
    """Writes table and picture of a comparison; returns the table, and where the picture is."""
    findings, picture = Findings(read(folder)), folder / "comparison.png"
    (folder / "comparison.md").write_text(text := findings.table())
    findings.draw(picture)
    return text, f"curves in {picture}"


class Findings:
    """A comparison's results; it need not be complete."""

    def __init__(self, results: dict[str, Any]) -> None:
        """Sorts the rules, the lowest mean loss first."""
        self._results, self._protocol = results, protocol_of(results)
        self._records = {run_of(record): record for record in results["runs"]}
        self._losses = losses_of(results["runs"])
        self._full = self._protocol.steps
        self._means = {
            rule: self._protocol.mean(rule, self._losses, self._full)
            for rule in self._protocol.rules
        }
        self._rules = sorted(self._means, key=lambda rule: self._means[rule] or math.inf)

    def _repeats(self, rule: Rule, steps: int) -> list[dict[str, Any]]:
        """The records of a rule's runs on the seeds that were not tuned on."""
        runs = self._protocol.repeats(rule, self._losses, steps)
        return [self._records[run] for run in runs if run in self._records]

    def table(self) -> str:
        """All there is to say, as Markdown."""
        sessions, lengths = self._results["sessions"], map(str, self._protocol.lengths)
        jobs = max(session["jobs"] for session in sessions)
        others = [f"{_label(rule)}'s" for rule in self._rules]
        return "\n".join(
            [
                f"Final validation loss in nats per token after {self._full} steps: mean and "
                "standard deviation over seeds that were not tuned on, also of the differences "
                "from the first rule on the same seed. Effective peak rates of the matrices, and "
                "of embeddings, head, norms and biases, were tuned on seed "
                f"{self._protocol.seed} by factors of two. State is that of all ranks.\n",
                *(f"{note}\n" for note in self._notes()),
                *_markdown(_HEADER, map(self._row, self._rules)),
                "Steps of a run that ends at the mean final loss of another rule, and their share; "
                "in brackets seconds of training, and those in the optimizer. Interpolated between "
                f"runs of {', '.join(lengths)} steps. At most {jobs} runs shared the machine.\n",
                *_markdown(("rule", *others), map(self._shares, self._rules)),
                "All trials.\n",
                *_markdown((*_HEADER[:3], "loss"), self._trials()),
                "Made by:\n",
                *(
                    f"    {session['command']}  # {session['begun']}, {session['machine']}, "
                    + ", ".join(f"{name} {text}" for name, text in session["versions"].items())
                    for session in sessions
                ),
                "",
            ]
        )

    def _notes(self) -> list[str]:
        """What else the rules, or the runs, do not have in common: a sentence each."""
        notes, config = [], self._results["config"]
        for key in SHARED:
            values = {}
            for rule in self._rules:
                own = keys_of(rule.name)
                name = f"optimizer.{own['optimizer.name']}.{key}"
                values[_label(rule)] = own.get(name, config[name])
            if len({*values.values()}) > 1:
                listed = ", ".join(f"{name} {value:g}" for name, value in values.items())
                notes.append(f"{key} was not tuned, and differs: {listed}.")
        used = sorted({run["session"] for run in self._results["runs"]})
        sessions = [self._results["sessions"][index] for index in used]
        made = [{"machine": each["machine"], **each["versions"]} for each in sessions]
        for what in dict.fromkeys(name for each in made for name in each):
            found = dict.fromkeys(each.get(what, "none") for each in made)
            if len(found) > 1:
                notes.append(f"Runs were made with more than one {what}: {'; '.join(found)}.")
        if len({run["data"] for run in self._results["runs"] if run.get("data")}) > 1:
            notes.append("Runs had not the same data: text or tokenizer changed in between.")
        return notes

    def _row(self, rule: Rule) -> list[str]:
        """What was tuned, the losses on other seeds, and what a step costs."""
        points, best = self._protocol.search(rule, self._losses)
        tried = sum(self._protocol.trial(rule, point) in self._losses for point in points)
        spent = f"{tried} of {rule.budget}"
        if best is None:
            return [_label(rule), "", "", spent, "not known yet", *[""] * 5]
        open_sides = ", ".join(edges(points, best))
        run = self._protocol.trial(rule, best)
        cells = [_label(rule), f"{run.matrices:.3g}", f"{run.rest:.3g}", spent]
        cells.append(f"at an edge: no trial of {open_sides}" if open_sides else "inside")
        records = self._full_runs(rule)
        losses = {record["seed"]: loss_of(record) for record in records}
        first = {r["seed"]: loss_of(r) for r in self._repeats(self._rules[0], self._full)}
        # Seeds move all rules alike: differences on the same seed vary less than losses do.
        above = [loss - first[seed] for seed, loss in losses.items() if seed in first]
        diverged = sum(map(math.isinf, losses.values()))
        said = f"{len(losses)} of {rule.seeds} seeds"
        said += f", {diverged} of them diverged" if diverged else ""
        if [*losses] == [run.seed]:
            said = f"only seed {run.seed}"
        final = f"{_spread(losses.values()) or 'diverged'} ({said})"
        times = [f"{1e3 * seconds:.1f}" for seconds in self._times(rule)]
        held = [f"{r['state_bytes'] / 2**20:.2f}" for r in records if r["state_bytes"]] or [""]
        return [*cells, final, _spread(above) if rule != self._rules[0] else "", *times, held[0]]

    def _full_runs(self, rule: Rule) -> list[dict[str, Any]]:
        """The records that stand for a tuned rule: on other seeds, or the best trial's alone."""
        _, best = self._protocol.search(rule, self._losses)
        tuned = [self._records[self._protocol.trial(rule, best)]] if best else []
        return self._repeats(rule, self._full) or tuned

    def _times(self, rule: Rule) -> list[float]:
        """Mean seconds of a step, and those of them in the optimizer."""
        records = self._full_runs(rule)
        return [
            statistics.fmean(each[key] for each in records) for key in ("step_s", "optimizer_s")
        ]

    def _shares(self, rule: Rule) -> list[str]:
        """How soon a rule gets to the final loss of each rule."""
        cells, curve = [_label(rule)], self._protocol.curve(rule, self._losses)
        for other in self._rules:
            target = self._means[other]
            if other == rule or not curve or target is None or math.isinf(target):
                cells.append("")
            elif (found := steps_to(target, curve)) is None:
                cells.append("not reached")
            else:
                steps, exact = found
                times = ", ".join(f"{steps * seconds:.1f} s" for seconds in self._times(rule))
                share = f"{'' if exact else 'at most '}{steps / self._full:.2f}"
                cells.append(f"{share}: {steps:.0f} steps ({times})")
        return cells

    def _trials(self) -> Iterable[list[str]]:
        for rule in self._rules:
            for point in self._protocol.search(rule, self._losses)[0]:
                run = self._protocol.trial(rule, point)
                if (loss := self._losses.get(run)) is not None:
                    said = "diverged" if math.isinf(loss) else f"{loss:.4f}"
                    yield [_label(rule), f"{run.matrices:.3g}", f"{run.rest:.3g}", said]

    def draw(self, path: Path) -> None:
        """Draws means over the seeds, in bands from the least to the greatest.

        On the left there are losses in the course of the full runs, on the right the final losses
        of runs of several lengths.
        """
        figure, (course, ends) = new_figure(2)
        lowest, highest = math.inf, -math.inf
        for index, rule in enumerate(self._rules):
            runs = self._repeats(rule, self._full)
            curves = [run["curve"] for run in runs if run["val_loss"] is not None]
            if not curves:
                continue
            end = statistics.fmean(curve[-1][1] for curve in curves)
            label = "\n    ".join(parts_of(_label(rule)))  # in one line it would cover the curves
            mean = _band(course, curves, f"C{index}", f"{label}: {end:.3f}")
            lowest, highest = min(lowest, *mean), max(highest, *mean)
            curve = self._protocol.curve(rule, self._losses)[::-1]
            lengths = [steps for steps, loss in curve if math.isfinite(loss)]
            seeds = zip(*(self._repeats(rule, steps) for steps in lengths), strict=True)
            finals = [[(run["steps"], run["val_loss"]) for run in seed] for seed in seeds]
            if finals:
                _band(ends, finals, f"C{index}", _label(rule), "o")
        course.set(xlabel="step", ylabel="validation loss (nats per token)")
        ends.set(xlabel="steps of the whole run", ylabel="final validation loss")
        if lowest < highest:  # past the first fall, which would squeeze all the rest
            course.set_ylim(lowest - 0.05 * (highest - lowest), lowest + 0.6 * (highest - lowest))
            title = "mean over seeds, least to greatest"
            course.legend(frameon=False, title=title, fontsize=7, title_fontsize=8)
        figure.savefig(path, dpi=110)


def _label(rule: Rule) -> str:
    """The rule's name. If its options include a preset's values, the preset takes their place."""
    own = keys_of(rule.name)
    given = {key.rpartition(".")[2]: value for key, value in own.items()}
    for preset, values in PRESETS.items():
        if values and "preset" not in given and given.items() >= values.items():
            name, *own_parts = parts_of(rule.name)
            others = [part for part in own_parts if part.partition("=")[0] not in values]
            return "+".join([name, f"preset={preset}", *others])
    return rule.name


def _spread(values: Iterable[float]) -> str:
    """The mean of those that are finite, and their standard deviation."""
    finite = [value for value in values if math.isfinite(value)]
    mean = f"{statistics.fmean(finite):.4f}" if finite else ""
    return f"{mean} ± {statistics.stdev(finite):.4f}" if len(finite) > 1 else mean


def _band(
    axis: Any, curves: Sequence[Sequence[Any]], colour: str, label: str, marker: str = ""
) -> list[float]:
    """Draws the mean of curves of (step, loss), and their extent; returns the mean."""
    # A loss that was not finite for a while is in no curve.
    losses = [dict(curve) for curve in curves]
    steps = [step for step in losses[0] if all(step in each for each in losses)]
    values = [[each[step] for each in losses] for step in steps]
    mean = [statistics.fmean(each) for each in values]
    axis.fill_between(steps, [*map(min, values)], [*map(max, values)], color=colour, alpha=0.2)
    axis.plot(steps, mean, color=colour, label=label, marker=marker)
    return mean


def _markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """The lines of a table, and an empty one."""
    lines = [header, ["---"] * len(header), *rows]
    return [*(f"| {' | '.join(cells)} |" for cells in lines), ""]
