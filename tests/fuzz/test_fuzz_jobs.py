"""Jobs of any settings within their bounds: they train, or end with an error and no traceback."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import pytest
from hypothesis import given
from hypothesis import strategies as st

import launch_jobs
from conda_dist.launch.job import options
from fuzz import examples

SMALL: Mapping[str, st.SearchStrategy[Any]] = {
    "model.hidden_size": st.integers(1, 33),
    "model.intermediate_size": st.integers(1, 33),
    "model.num_hidden_layers": st.integers(1, 2),
    "model.num_attention_heads": st.integers(1, 4),
    "model.num_key_value_heads": st.integers(1, 4),
    "training.steps": st.integers(1, 3),
    "training.sequence_length": st.integers(2, 33),
    "training.global_batch_size": st.integers(1, 9),
    "training.val_sequences": st.integers(1, 99),
    "training.hsdp_replicas": st.integers(1, 2),
}
"""What a job's size and length follow from."""
NOT_DRAWN = (
    "output",
    "resume",
    "engine",
    "data.",
    "tokenizer.",
    "deepspeed.",
    "metrics.tensorboard",
    "training.compile",
    "training.stall_timeout_s",
)
"""Files and folders, what other tests have, what compiles for minutes, and what ends a rank."""


def _plain(kind: Any) -> tuple[Any, dict[str, Any]]:
    """A type without its bounds, and these by name."""
    if get_origin(kind) is not Annotated:
        return kind, {}
    marks = [mark for mark in kind.__metadata__ if type(mark).__module__ == "annotated_types"]
    each = [asdict(mark) for mark in marks]
    return get_args(kind)[0], {n: v for mark in each for n, v in mark.items() if v is not None}


def _values(key: options.Declared) -> st.SearchStrategy[Any]:
    """Values that the declaration allows, its bounds among them."""
    if key.name in SMALL:
        return SMALL[key.name]
    kind, bounds = _plain(key.type)
    if get_origin(kind) in (Union, UnionType):
        kind, bounds = _plain(get_args(kind)[0])
        if get_origin(kind) is Literal:
            return st.sampled_from((*get_args(kind), "none"))
    if get_origin(kind) is Literal:
        return st.sampled_from(get_args(kind))
    if kind is bool:
        return st.booleans()
    if get_origin(kind) is tuple:
        return st.lists(st.just(0.0) | st.floats(0, 1, exclude_max=True), min_size=2, max_size=2)
    least = bounds.get("ge", bounds.get("gt", 0))
    if kind is int:
        most = bounds.get("le", 2**63)
        some = [*range(int(least), 6), 10**6, int(most) - 1, int(most)]
        return st.sampled_from([number for number in some if least <= number < 2**63])
    most = bounds.get("le", bounds.get("lt", 1e300))
    return (
        st.sampled_from([least, most])
        | st.floats(least, most)
        | st.floats(max(least, 1e-40), min(most, 10.0))
    ).filter(lambda value: "gt" not in bounds or value > bounds["gt"])


DRAWN = {name: key for name, key in options.SCHEMA.items() if not name.startswith(NOT_DRAWN)}


@st.composite
def _settings(draw: st.DrawFn) -> dict[str, Any]:
    """A few settings, of the optimizer that they name."""
    values: dict[str, Any] = {"optimizer.name": draw(_values(DRAWN["optimizer.name"]))}
    own = f"optimizer.{values['optimizer.name']}."
    fitting = [n for n in DRAWN if not n.startswith("optimizer.") or n.startswith(own)]
    for name in draw(st.lists(st.sampled_from(fitting), max_size=6, unique=True)):
        values[name] = draw(_values(DRAWN[name]))
    return values


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return launch_jobs.write_config(tmp_path_factory.mktemp("fuzzed"))


@given(_settings())
@examples(20)
def test_any_settings_within_their_bounds(
    config: Path, tmp_path_factory: pytest.TempPathFactory, values: dict[str, Any]
) -> None:
    words = {"training.steps": 2, **values}
    output = tmp_path_factory.mktemp("run")
    given_words = [f"--{name}={_text(value)}" for name, value in words.items()]
    result = launch_jobs.train(1, config, "--output", output, *given_words)[0]
    assert result.code in (0, 1, 2)
    assert "Traceback" not in result.err
    if result.code == 0:
        assert launch_jobs.metrics(output)[-1]["step"] == words["training.steps"]
    else:
        assert "error: " in result.err


def _text(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)
