"""Any command line, TOML file or DeepSpeed JSON: understood, or refused with the key's name."""

import contextlib
import io
import json
import math
import subprocess
import sys
import tomllib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conda_dist.integrations.deepspeed import arguments
from conda_dist.launch import benchmark, compare, plan, pretrain
from conda_dist.launch.job import options
from conda_dist.launch.job.config import Config, ConfigError
from conda_dist.launch.job.files import EXIT_CONFIG
from conda_dist.launch.tools import benchmark_process
from conda_dist.options import OPTIONS
from fuzz import examples

# Anything TOML can say

SCALARS = st.one_of(
    st.booleans(),
    st.integers(),
    st.integers(-(2**63), 2**63 - 1),
    st.just(10**400),
    st.floats(),
    st.text(max_size=8),
    st.dates(),
    st.times(),
    st.datetimes(),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=2)
    ),
    max_leaves=5,
)
KEYS = st.one_of(
    st.sampled_from([*options.SCHEMA]),
    st.sampled_from([*options.SCHEMA]).map(lambda name: name.rpartition(".")[0] or name),
    st.sampled_from(["optimizer.lr", "optimizer.scale", "optimizer.ns_steps", "model", ""]),
    st.text(max_size=6),
)


def _toml(value: Any) -> str:
    """TOML of a value."""
    match value:
        case dict():
            pairs = (f"{options._toml_value(k)} = {_toml(v)}" for k, v in value.items())
            return "{" + ", ".join(pairs) + "}"
        case list():
            return "[" + ", ".join(map(_toml, value)) + "]"
        case bool() | int() | str():
            return options._toml_value(value)
        case float():
            return str(value).replace("+", "") if math.isfinite(value) else str(value)
        case _:
            return str(value.isoformat())


def _sound(config: Config) -> None:
    """What was understood is a config, and its own file says the same."""
    assert isinstance(config, Config)
    again = options.build(options.flatten(tomllib.loads(options.to_toml(config))))
    assert options.to_values(again) | {"resume": ""} == options.to_values(config) | {"resume": ""}


def _refused(said: str, words: Sequence[str]) -> None:
    """It names one of these, as it is or as in code; a key without letters by its quotes."""
    forms = {form for word in words if word for form in (word, repr(word)[1:-1])}
    if "" in words:
        forms |= {"''", "'."}
    assert any(form in said for form in forms), said


@given(KEYS, VALUES)
@examples(150)
def test_any_value_of_any_key_in_a_file(
    tmp_path_factory: pytest.TempPathFactory, name: str, value: Any
) -> None:
    file = _file(tmp_path_factory)
    quoted = ".".join(options._toml_value(part) for part in name.split("."))
    try:
        file.write_text(f"{quoted} = {_toml(value)}\n")
    except UnicodeEncodeError:
        return  # TOML is UTF-8
    try:
        _sound(options.load(file))
    except ConfigError as error:
        _refused(str(error), [name, name.rpartition(".")[2] or name, "not valid TOML"])


FOUND: dict[str, tuple[bytes, str]] = {
    "a folder": (b"", "cannot read the config file"),
    "not UTF-8": (b"\x80", "not valid TOML"),
    "too many digits": (b"steps = " + b"9" * 5000, "not valid TOML"),
    "nested too deep": (b"a = " + b"[" * 3000, "not valid TOML"),
    "a key too deep": (b"a." * 3000 + b"a = 1", "not valid TOML"),
    "no float": (b"optimizer.lr = 1" + b"0" * 400, "optimizer.conda.lr"),
    "no 64 bits": (b"training.steps = 9223372036854775808", "training.steps"),
}
"""Files whose errors were Python's own."""


@pytest.mark.parametrize(("content", "words"), FOUND.values(), ids=FOUND)
def test_files_that_were_found(tmp_path: Path, content: bytes, words: str) -> None:
    file = tmp_path / "config.toml"
    if content:
        file.write_bytes(content)
    else:
        file.mkdir()
    with pytest.raises(ConfigError, match=words) as caught:
        options.load(file)
    assert str(file) in str(caught.value)


def _file(factory: pytest.TempPathFactory) -> Path:
    return factory.getbasetemp() / "fuzzed.toml"


BYTES = st.one_of(
    st.binary(max_size=60),
    st.text(max_size=60).map(lambda text: text.encode(errors="surrogatepass")),
    st.sampled_from(
        [
            b"[training]\nsteps = 1\nsteps = 2\n",
            b"[training]\n[training]\n",
            b"training.steps = 1\n[training]\nsteps = 2\n",
            b"\xff\xfe[\x00t\x00",
            b"\xef\xbb\xbf[training]\nsteps = 5\n",
            b"a = " + b"[" * 3000,
            b"a." * 3000 + b"a = 1",
            b"steps = " + b"9" * 5000,
        ]
    ),
)


@given(BYTES)
@examples(150)
def test_any_bytes_for_a_file(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    file = _file(tmp_path_factory)
    file.write_bytes(content)
    with contextlib.suppress(ConfigError):
        _sound(options.load(file))


# Any words on any command line

TEXTS = st.one_of(
    st.text(max_size=8),
    st.sampled_from(
        ["", "nan", "inf", "-inf", "1e400", "9" * 5000, "1_0", "0x10", "١٢", "True", "none", "[]",
         "0.9,0.99", "0.9,", ",", "[0.9", "\x00", "a=b", "-5", "1e-3", "\ud800", "../.."]
    ),
    st.integers().map(str),
    st.floats().map(str),
)  # fmt: skip


@st.composite
def _lines(draw: st.DrawFn, own: Sequence[str] = ()) -> list[str]:
    """Words, most of them options."""
    names = st.sampled_from([*options.SCHEMA, "optimizer.lr", "resume", *own]) | st.text(max_size=5)
    words: list[str] = []
    for _ in range(draw(st.integers(0, 5))):
        name, text = draw(names), draw(TEXTS)
        form = draw(st.sampled_from(["apart", "apart", "joined", "alone", "text"]))
        words += {
            "apart": [f"--{name}", text],
            "joined": [f"--{name}={text}"],
            "alone": [f"--{name}"],
            "text": [text],
        }[form]
    return words


@given(_lines())
@examples(300)
def test_any_command_line_of_the_job(words: list[str]) -> None:
    try:
        _sound(options.load(None, words))
    except ConfigError as error:
        names = [word.removeprefix("--").partition("=")[0] for word in words]
        _refused(str(error), [*names, *(name.rpartition(".")[2] or name for name in names)])


class _RanError(Exception):
    """In the place of what a command would do."""


def _command(main: Callable[[Sequence[str]], Any], words: list[str]) -> tuple[int, str]:
    """How a command line is answered: its code and what it says."""
    err = io.StringIO()
    with contextlib.redirect_stderr(err), contextlib.redirect_stdout(io.StringIO()):
        try:
            code = main(words)
        except SystemExit as ended:
            code = ended.code
        except _RanError:
            code = 0
    return int(code or 0), err.getvalue()


PLANNER = ("model", "mesh", "tp", "hardware", "tokens-per-rank", "scaling")
MODEL = str(Path(__file__).parents[2] / "configs" / "llama_tiny.toml")
MESHES = st.lists(
    st.sampled_from(["dp_shard", "dp_replicate", "tp", "pp", ""]).flatmap(
        lambda axis: (
            TEXTS.map(lambda text: f"{axis}={text}")
            | st.integers(-1, 64).map(lambda n: f"{axis}={n}")
        )
    ),
    max_size=3,
)


@given(_lines(PLANNER), MESHES)
@examples(100)
def test_any_command_line_of_the_planner(words: list[str], mesh: list[str]) -> None:
    # A picture is written where it is told, and of a model of any size every layer is made.
    if any(w.startswith(("--scaling", "--model", "--tokenizer")) for w in words):
        return
    code, said = _command(plan.main, ["--model", MODEL, "--mesh", *mesh, *words])
    assert code in (0, 2)
    assert code == 0 or "error:" in said


COMPARE = ("optimizers", "budget", "seeds", "nproc", "jobs", "output", "draw")


@given(_lines(COMPARE))
@examples(100)
def test_any_command_line_of_a_comparison(
    tmp_path_factory: pytest.TempPathFactory, words: list[str]
) -> None:
    def ran(*_: Any) -> int:
        raise _RanError

    folder = str(_file(tmp_path_factory).with_name("comparison"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compare, "run", ran)
        code, said = _command(compare.main, [MODEL, *words, "--output", folder])
    assert code in (0, 2)
    assert code == 0 or "error:" in said


BENCHMARK = ("width", "mlp", "layers", "rounds", "gap", "refresh-method")


@given(
    st.lists(st.sampled_from(BENCHMARK).flatmap(lambda n: st.tuples(st.just(n), TEXTS)), max_size=3)
)
@examples(100)
def test_any_command_line_of_the_benchmark(pairs: list[tuple[str, str]]) -> None:
    def ran(*_: Any) -> Any:
        raise _RanError

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(benchmark_process, "contenders", ran)
        code, said = _command(benchmark.main, [f"--{n}={text}" for n, text in pairs])
    assert code in (0, 2)
    assert code == 0 or "error:" in said


# DeepSpeed's JSON

JSON = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=6), st.just(10**400)
    ),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=2)
    ),
    max_leaves=4,
)
NAMES = [*OPTIONS, *arguments.PATTERNS, arguments.SPLITS]


@given(st.dictionaries(st.sampled_from(NAMES) | st.text(max_size=6), JSON, max_size=3))
@examples(300)
def test_any_params_of_a_deepspeed_json(given_params: dict[str, Any]) -> None:
    try:
        taken = arguments.parse(given_params)
    except (TypeError, ValueError) as error:
        _refused(str(error), [*given_params])
    else:
        assert not given_params.keys() - set(NAMES)
        for name, value in given_params.items():
            preset = value is None and name in OPTIONS and OPTIONS[name].by_preset
            if name in taken.defaults and not preset:
                expected = tuple(value) if isinstance(value, list) else value
                assert taken.defaults[name] == expected


# What every command refuses: one line that says what and where, code 2, nothing written

RUN = ("tiny.toml", "--output", "out")
PLAN = ("--model", "tiny.toml", "--mesh", "dp_shard=2")
REFUSED: list[tuple[Callable[[Sequence[str]], Any], tuple[str, ...], str]] = [
    (pretrain.main, (*RUN, "--training.steps", "9" * 5000), "training.steps"),
    (pretrain.main, (*RUN, "--training.steps", "a\nb"), "training.steps"),
    (pretrain.main, (*RUN, "--training.stps", "1"), "training.stps"),
    (pretrain.main, (*RUN, "extra"), "'extra'"),
    (pretrain.main, ("folder", "--output", "out"), "folder"),
    (pretrain.main, ("binary.toml", "--output", "out"), "binary.toml"),
    (pretrain.main, ("old.toml", "--output", "out"), "old.toml: unknown key 'optimizer.conda.old'"),
    (pretrain.main, ("tiny.toml", "--output", "binary.toml"), "binary.toml is a file"),
    (pretrain.main, ("tiny.toml", "--output", "binary.toml/a/b"), "binary.toml is a file"),
    (pretrain.main, ("tiny.toml", "--output", "a" * 300), "output"),
    (pretrain.main, (*RUN, "--data.path", "absent/*.txt"), "data.path 'absent/*.txt'"),
    (pretrain.main, (*RUN, "--tokenizer.path", "folder"), "tokenizer.path 'folder'"),
    (compare.main, ("binary.toml", "--output", "out"), "binary.toml"),
    (compare.main, ("old.toml", "--output", "out"), "old.toml: unknown key"),
    (compare.main, ("tiny.toml", "--output", "binary.toml"), "binary.toml is a file"),
    (compare.main, (*RUN, "--nproc", "0"), "--nproc"),
    (compare.main, (*RUN, "--nproc", "two"), "--nproc"),
    (compare.main, (*RUN, "--training.stps", "1"), "training.stps"),
    (compare.main, (*RUN, "--optimizers", "conda+lr=-1"), "optimizer.conda.lr"),
    (compare.main, ("tiny.toml", "--output", "other"), "training.steps"),
    (compare.main, ("--output", "torn"), "results.json is not there, or not the results"),
    (compare.main, ("--output", "out", "--draw"), "results.json is not there"),
    (compare.main, ("--output", "out"), "out holds no comparison yet"),
    (plan.main, ("--model", "binary.toml", "--mesh", "dp_shard=2"), "binary.toml"),
    (plan.main, ("--model", "old.toml", "--mesh", "dp_shard=2"), "old.toml: unknown key"),
    (plan.main, (*PLAN, "--tokens-per-rank", "many"), "--tokens-per-rank"),
    (plan.main, (*PLAN, "--hardware", "abacus"), "--hardware"),
    (plan.main, (*PLAN, "--training.stps", "1"), "training.stps"),
    (plan.main, ("--scaling", "folder"), "--scaling folder"),
    (plan.main, ("--scaling", "binary.toml/x.png"), "--scaling binary.toml/x.png"),
    (benchmark.main, ("--widht", "1"), "--widht"),
    (benchmark.main, ("--width", "1.5"), "--width"),
    (benchmark.main, ("--picture", "absent/x.png"), "there is no folder absent"),
]


@pytest.mark.parametrize(
    ("main", "words", "said"),
    REFUSED,
    ids=lambda each: " ".join(each)[:60] if isinstance(each, tuple) else None,
)
def test_what_is_wrong_is_said_in_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    main: Callable[[Sequence[str]], Any],
    words: tuple[str, ...],
    said: str,
) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "tiny.toml").write_text("[training]\nsteps = 5\n")
    (tmp_path / "old.toml").write_text("[optimizer.conda]\nold = 5\n")
    config = options.flatten(tomllib.loads(options.to_toml(options.load(None))))
    session = {"command": "x", "begun": "now", "machine": "here", "jobs": 1, "versions": {}}
    about = {"nproc": 1, "sessions": [session], "runs": []}
    rule = {"name": "conda", "matrices": 1.0, "rest": 1.0, "budget": 1, "seeds": 1}
    for name, content in (
        ("other", json.dumps({"config": config, "rules": [rule], **about})),
        ("torn", "{"),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "results.json").write_text(content)
    monkeypatch.chdir(tmp_path)
    before = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*")}
    code, err = _command(main, [*words])
    assert code == EXIT_CONFIG
    assert err.startswith("error: ")
    assert said in err
    assert err.count("\n") == 1
    assert {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*")} == before


@pytest.mark.parametrize(
    "module", ["conda_dist", *(f"conda_dist.launch.{n}" for n in ("pretrain", "compare", "plan"))]
)
def test_what_takes_seconds_to_import_comes_later(module: str) -> None:
    slow = "{'torch', 'transformers', 'deepspeed', 'matplotlib', 'datasets', 'numpy'}"
    program = f"import sys, {module}; print(sys.modules.keys() & {slow})"
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)
    assert said.stdout.strip() == b"set()"


# The processes themselves


def test_what_a_process_says_is_an_error_and_no_traceback(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "conda_dist.launch.pretrain", "nothing.toml"]
    ended = subprocess.run(
        command, capture_output=True, text=True, timeout=120, check=False, cwd=tmp_path
    )
    assert ended.returncode == EXIT_CONFIG, ended.stderr
    assert ended.stderr.startswith("error: ")
    assert "Traceback" not in ended.stderr
