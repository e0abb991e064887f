"""Configuration: what is accepted, what is refused, and in which words."""

import contextlib
import json
import re
import subprocess
import sys
import tomllib
from datetime import timedelta
from pathlib import Path
from typing import Any, get_args, get_origin

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter

from conda_dist.launch import pretrain
from conda_dist.launch.cluster import mpi
from conda_dist.launch.job import options
from conda_dist.launch.job.config import Config, ConfigError
from conda_dist.launch.job.files import EXIT_CONFIG
from conda_dist.launch.job.optimizer_config import SECTIONS

CONFIGS = Path(__file__).parents[2] / "configs"


def write(folder: Path, text: str) -> Path:
    file = folder / "config.toml"
    file.write_text(text)
    return file


def test_defaults_file_and_command_line_in_that_order(tmp_path: Path) -> None:
    file = write(tmp_path, "[training]\nsteps = 7\nseed = 3\n")
    config = options.load(file, ["--training.seed=5", "--output", "somewhere"])
    assert (config.training.steps, config.training.seed, config.output) == (7, 5, "somewhere")
    assert config.training.sequence_length == Config().training.sequence_length


@pytest.mark.parametrize(
    ("argument", "text", "value"),
    [
        ("training.compile", "true", True),
        ("training.steps", "1_000", 1000),
        ("schedule.min_lr", "1e-5", 1e-5),
        ("schedule.min_lr", "none", None),
        ("optimizer.conda.basis_budget", "none", None),
        ("optimizer.conda.matmul_dtype", "tf32", "tf32"),
        ("optimizer.conda.betas", "0.8,0.9", (0.8, 0.9)),
        ("optimizer.conda.betas", "[0.8, 0.9]", (0.8, 0.9)),
        ("optimizer.conda.betas", "none", None),
        ("optimizer.conda.nesterov", "true", True),
        ("data.path", "a.txt", ("a.txt",)),
        ("data.path", "a.txt, b.jsonl", ("a.txt", "b.jsonl")),
        ("data.path", "part-[0-3].txt", ("part-[0-3].txt",)),
        ("data.path", "['a b (1)', c]", ("a b (1)", "c")),
        ("data.path", "[]", ()),
        ("data.path", "[", ("[",)),
    ],
)
def test_values_on_the_command_line(argument: str, text: str, value: object) -> None:
    assert options.to_values(options.load(None, [f"--{argument}", text]))[argument] == value


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--training.step", "5"], ["training.step", "Did you mean 'training.steps'"]),
        (["--trainnig.steps", "5"], ["Did you mean 'training.steps'"]),
        (["--optimizer.lrr", "5"], ["Did you mean 'optimizer.lr'"]),
        (["--schedule.warmup_steps", "9", "--training.steps", "5"], ["peak rate", "lower it"]),
        (["--training.steps", "many"], ["training.steps = 'many'", "a valid integer"]),
        (["--training.steps", "1.5"], ["a valid integer"]),
        (["--training.steps", "0"], ["training.steps = '0': must be greater than or equal to 1"]),
        (["--training.steps"], ["--training.steps needs a value"]),
        (["--training.compile", "maybe"], ["a valid boolean"]),
        (["--schedule.min_lr", "nan"], ["schedule.min_lr = 'nan'"]),
        (["--optimizer.name", "sgd"], ["'conda', 'adamw', 'muon'"]),
        (
            ["--optimizer.name=namo_d", "--optimizer.clamp=1.5"],
            ["namo_d.clamp = '1.5': must be less than or equal to 1"],
        ),
        (
            ["--optimizer.name", "soap", "--training.hsdp_replicas", "2"],
            ["optimizer.name soap, whose model is replicated: set it to 1"],
        ),
        (
            ["--optimizer.conda.betas", "0.9"],
            ["optimizer.conda.betas = ['0.9']: must be 2 numbers"],
        ),
        (["--optimizer.betas", "[]"], ["optimizer.conda.betas = []: must be 2 numbers"]),
        (["--optimizer.betas", "0,0,0"], ["betas = ['0', '0', '0']: must be 2 numbers"]),
        (["--optimizer.conda.betas", "0.9,1.0"], ["conda.betas has '1.0': must be less than 1"]),
        (["--optimizer.state_dtype", "int8"], ["'float32' or 'bfloat16', or 'none'"]),
        (["--optimizer.buffer_bytes", str(2**63)], [f"less than or equal to {2**63 - 1}"]),
        (["training.steps", "5"], ["found 'training.steps'"]),
        (["--data.path", "x", "--data.hf", "y"], ["data.path and data.hf"]),
        (["--data.path", " , "], ["--data.path", "a list is wanted"]),
        (["--output="], ["output is empty"]),
        (
            ["--tokenizer.vocab_size", "2147483647"],
            ["tokenizer.vocab_size", "less than or equal to 10000000"],
        ),
        (["--model.hidden_size", "100"], ["100 is not a multiple of", "num_attention_heads 6"]),
        (
            ["--model.hidden_size", "18"],
            ["18 over model.num_attention_heads 6 is an odd head size"],
        ),
        (["--training.stall_timeout_s", "1e-9"], ["give 0 (any time) or at least 1"]),
        (
            ["--training.timeout_s", "1e14"],
            ["training.timeout_s = '1e14': must be less than or equal to 10000000"],
        ),
        (["--model.dropout", "0.1"], ["no effect with model.architecture llama"]),
        (["--schedule.min_lr", "1.0"], ["above the peak rate 0.01"]),
    ],
)
def test_refusals_on_the_command_line(arguments: list[str], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        options.load(None, arguments)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[training]\nstep = 5", ["config.toml", "Did you mean 'training.steps'"]),
        ("[trainig]\nsteps = 5", ["Did you mean 'training.steps'"]),
        (
            "[optimizer.conda]\nrefresh = 'async'\nbucket_bytes = 5\nlr = 1.0",
            [
                "'optimizer.conda.refresh'. Did you mean 'optimizer.conda.refresh_",
                "'optimizer.conda.bucket_bytes'. Did you mean 'optimizer.conda.buffer_bytes'",
            ],
        ),
        ("[training]\nsteps = true", ["training.steps = True", "a valid integer"]),
        ("[training]\nsteps = '5'", ["a valid integer"]),
        ("[training]\ncompile = 1", ["a valid boolean"]),
        ("[optimizer.adamw]\nscale = 1.0", ["unknown key 'optimizer.adamw.scale'", "betas"]),
        (
            "[optimizer]\nname = 'adamw'\nscale = 1.0",
            ["unknown key 'optimizer.scale'. Did you mean 'optimizer.adamw_scale'"],
        ),
        ("[optimizer]\nlr = 1.0\n[optimizer.conda]\nlr = 2.0", ["the same key"]),
        ("training = 5", ["unknown key 'training'"]),
        ("data.path = 5", ["data.path = 5: must be a list of texts"]),
        ("data.path = ['a', 5]", ["data.path has 5: must be a valid string"]),
        ("optimizer.betas = [0.9]", ["optimizer.conda.betas = [0.9]: must be 2 numbers"]),
        ("optimizer.betas = 0.9", ["optimizer.conda.betas = 0.9: must be 2 numbers"]),
        ("output = 2024-01-01", ["output = 2024-01-01: must be a text in quotes"]),
        ("data.path = [12:00:00]", ["data.path = ", "must be a text in quotes"]),
        (f"training.steps = 0x{'f' * 5000}", ["training.steps has a number of too many digits"]),
        ("[training\n", ["not valid TOML"]),
    ],
)
def test_refusals_in_the_file(tmp_path: Path, text: str, words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        options.load(write(tmp_path, text))
    for word in words:
        assert word in str(caught.value)


def test_one_text_is_a_list_of_it_and_an_empty_section_is_none(tmp_path: Path) -> None:
    text = "[training]\n[optimizer.conda]\n[data]\npath = 'a, b.txt'"
    config = options.load(write(tmp_path, text))
    assert options.to_values(config) == options.to_values(Config()) | {"data.path": ("a, b.txt",)}


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"there is no config file .*absent\.toml"):
        options.load(tmp_path / "absent.toml")


def test_the_short_form_sets_the_chosen_optimizer(tmp_path: Path) -> None:
    file = write(tmp_path, "[optimizer]\nname = 'adamw'\nlr = 3e-3\n")
    config = options.load(file)
    assert config.optimizer.adamw.lr == 3e-3
    assert config.optimizer.conda.lr == 1e-2
    # Another optimizer on the command line does not inherit what the file meant for the first.
    config = options.load(file, ["--optimizer.name", "muon"])
    assert config.optimizer.chosen.lr == 1e-3
    config = options.load(file, ["--optimizer.lr", "4e-3", "--optimizer.name", "muon"])
    assert config.optimizer.muon.lr == 4e-3
    assert config.optimizer.adamw.lr == 3e-3


@pytest.mark.parametrize("name", SECTIONS)
def test_two_effective_rates_are_the_axes_of_a_sweep(name: str) -> None:
    chosen = ["--optimizer.name", name]
    keys = options.load(None, chosen).optimizer.keys_for_rates(3e-3, 2e-2)
    assert list(keys) == [f"optimizer.{name}.lr", f"optimizer.{name}.adamw_scale"]
    given = [f"--{key}={value!r}" for key, value in keys.items()]
    assert options.load(None, [*chosen, *given]).optimizer.effective_rates == pytest.approx(
        (3e-3, 2e-2), rel=1e-12
    )
    if name == "conda":  # whose scale multiplies lr
        assert keys[f"optimizer.{name}.lr"] == pytest.approx(1.2e-2)


def test_a_key_of_another_optimizer_is_not_silently_ignored() -> None:
    with pytest.raises(ConfigError, match=r"optimizer\.conda\.scale has no effect"):
        options.load(None, ["--optimizer.name", "adamw", "--optimizer.conda.scale", "1.0"])
    with pytest.raises(ConfigError, match=r"unknown key 'optimizer\.scale'"):
        options.load(None, ["--optimizer.name", "adamw", "--optimizer.scale", "1.0"])


def test_resume_takes_a_path_or_nothing() -> None:
    assert options.load(None, ["--resume"]).resume == "auto"
    assert options.load(None, ["--resume", "--training.steps", "5"]).resume == "auto"
    assert options.load(None, ["--resume", "runs/a/checkpoints/step-00000005"]).resume.endswith("5")


def _values(kind: Any) -> st.SearchStrategy[Any]:
    """Values of a key's type, in and out of its bounds."""
    origin, kinds = get_origin(kind), get_args(kind)
    if kind is bool:
        return st.booleans()
    if kind is int:
        return st.integers(0, 10**6)
    if kind is float:
        return st.floats(0, 1e3, allow_nan=False)
    if kind is str:
        return st.text(max_size=20)
    if origin is tuple:
        size = None if kinds[-1] is ... else len(kinds)
        return st.lists(_values(kinds[0]), min_size=size or 0, max_size=size or 3)
    if type(None) in kinds:
        return st.none() | st.just("none") | _values(kinds[0])
    if kinds and isinstance(kinds[0], str):
        return st.sampled_from(kinds)
    return st.none() | _values(kinds[0])


@given(st.data())
def test_any_config_survives_its_own_toml(data: st.DataObject) -> None:
    names = data.draw(st.lists(st.sampled_from(list(options.SCHEMA)), max_size=8, unique=True))
    values = {name: data.draw(_values(options.SCHEMA[name].type)) for name in names}
    values.pop("resume", None)
    try:
        config = options.build({name: value for name, value in values.items() if value is not None})
    except ConfigError:
        return  # a refusal is as good, as long as it is one
    text = options.to_toml(config)
    assert options.build(options.flatten(tomllib.loads(text))) == config


_WORDS = st.text(max_size=12) | st.sampled_from([f"--{name}" for name in options.SCHEMA])
_WORDS |= st.sampled_from(["adamw", "1", "0.5", "true", "none", "0.9,0.99", "--resume", "--"])


@given(st.lists(_WORDS, max_size=6))
def test_any_command_line_is_understood_or_refused(arguments: list[str]) -> None:
    with contextlib.suppress(ConfigError):
        assert isinstance(options.load(None, arguments), Config)


@given(st.sampled_from(list(options.SCHEMA)), st.text("abcdefghijkl._-", min_size=1, max_size=3))
def test_a_mistyped_key_is_answered_with_a_real_one(name: str, typo: str) -> None:
    wrong = name + typo
    if wrong in options.SCHEMA or wrong.replace("optimizer.", "optimizer.conda.") in options.SCHEMA:
        return
    with pytest.raises(ConfigError, match="Did you mean") as caught:
        options.load(None, [f"--{wrong}", "1"])
    assert any(f"'{known}'" in str(caught.value) for known in options.SCHEMA)


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("*.toml")), ids=lambda file: file.stem)
@pytest.mark.parametrize("optimizer", SECTIONS)
def test_shipped_configs_are_valid(file: Path, optimizer: str) -> None:
    config = options.load(file, ["--optimizer.name", optimizer])
    assert config.output == f"runs/{file.stem}"
    assert config.optimizer.name == optimizer


def test_the_paper_s_settings() -> None:
    conda = options.load(CONFIGS / "llama_60m.toml").optimizer.conda.with_preset()
    assert (conda.lr, conda.betas, conda.eps) == (1e-2, (0.9, 0.99), 1e-8)
    assert (conda.scale, conda.update_proj_gap, conda.weight_decay) == (0.25, 2000, 0.0)
    conda = options.load(CONFIGS / "gpt2_125m.toml").optimizer.conda
    assert (conda.lr, conda.weight_decay, conda.grad_clip) == (6e-3, 0.01, 1.0)


def _tables(text: str) -> list[str]:
    return re.findall(r"^ *\[([a-z_.]+)\]$", text, re.M)


def test_help_lists_every_key(capsys: pytest.CaptureFixture[str]) -> None:
    """With its section, default, help and choices, which are looked up in the JSON schema here."""
    assert pretrain.main(["--help"]) == 0
    listing = capsys.readouterr().out.split("--section.key value):")[1]
    shown = dict(re.findall(r"^    --([a-z0-9_.]+) = (.*\n        .*)$", listing, re.M))
    assert list(shown) == list(options.SCHEMA)
    for name, declared in options.SCHEMA.items():
        default, told = shown[name].split("\n        ")
        value = json.loads(json.dumps(declared.default))
        assert tomllib.loads(f"x = {default}")["x"] == ("none" if value is None else value), name
        schema = TypeAdapter(declared.type).json_schema()
        kinds = schema.get("anyOf", [schema])
        choices = [choice for kind in kinds for choice in kind.get("enum", ())]
        if choices:
            choices += ["none" for kind in kinds if kind.get("type") == "null"]
        given = f" (one of {', '.join(map(repr, choices))})" if choices else ""
        assert told == declared.help + given, name
    # A section's own keys come before those of the sections in it, and none comes twice.
    for text in (listing, options.to_toml(Config())):
        tables = _tables(text)
        assert len(tables) == len({*tables})
        assert tables.index("optimizer") < tables.index("optimizer.conda")


def test_a_config_is_only_checked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [str(CONFIGS / "llama_tiny.toml"), "--output", str(tmp_path / "out"), "--check"]
    assert pretrain.main(words) == 0
    assert pretrain.main([*words, "--training.steps", "0"]) == EXIT_CONFIG
    assert "training.steps" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_output_that_is_a_file_is_said_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    words = [str(CONFIGS / "llama_tiny.toml"), "--output", str(tmp_path / "file"), "--check"]
    assert pretrain.main(words) == EXIT_CONFIG
    err = capsys.readouterr().err
    assert err.count("is a file, where a folder is wanted") == 1
    assert "cannot be a folder" not in err


def test_a_wrong_key_ends_the_job_with_code_2() -> None:
    command = [sys.executable, "-m", "conda_dist.launch.pretrain", "--training.stps", "5"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 2
    assert ended.stderr.startswith("error: unknown key 'training.stps'. Did you mean")
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize(("local_rank", "said"), [("0", "[rank 2] error: "), ("1", "")])
def test_a_config_that_one_host_lacks_is_said_there(
    local_rank: str,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name, value in (("RANK", "2"), ("LOCAL_RANK", local_rank), ("WORLD_SIZE", "4")):
        monkeypatch.setenv(name, value)
    assert pretrain.main(["/no/such/file.toml"]) == EXIT_CONFIG
    err = capsys.readouterr().err
    assert err.startswith(said)
    assert ("/no/such/file.toml" in err) is bool(said)


def test_a_port_that_is_none_is_told_to_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under mpirun the others wait for what rank 0 has found."""
    monkeypatch.setenv("MASTER_PORT", "abc")
    store, (_, _, problem) = mpi._open(0, 2, True, timedelta(seconds=1))
    assert store is None
    assert "rank 0 cannot open port abc" in problem
