"""From a TOML file and the command line to a checked `Config`, and back to TOML.

The declarations in `config.py` are flattened into `{"training.steps": Declared, ...}`; both sources
set values in that flat space, where an unknown or ill-typed key is easy to name precisely.
"""

from __future__ import annotations

import difflib
import json
import os
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import Strict, TypeAdapter, ValidationError

from conda_dist.launch.job.config import Config, ConfigError, conflicts
from conda_dist.launch.job.section import Section

Values = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Declared:
    """A key as declared in config.py, with its dotted name and its line of help."""

    name: str
    type: Any
    default: Any
    help: str

    @property
    def optional(self) -> bool:
        """Whether it may be None, which a file and the command line write "none"."""
        return self._unwrapped[1]

    @property
    def kind(self) -> Any:
        """The type without its bounds and without None."""
        return self._unwrapped[0]

    @property
    def choices(self) -> tuple[str, ...]:
        """The values there are, if they are listed; "none" among them if it may be None."""
        listed = get_args(self.kind) if get_origin(self.kind) is Literal else ()
        return (*listed, "none") if listed and self.optional else listed

    @property
    def items(self) -> str:
        """What a list is to hold; empty for a key that is no list."""
        if get_origin(self.kind) is not tuple:
            return ""
        kinds = get_args(self.kind)
        return "a list of texts" if kinds[-1] is ... else f"{len(kinds)} numbers"

    @property
    def _unwrapped(self) -> tuple[Any, bool]:
        kind, optional = self.type, False
        while get_origin(kind) is Annotated or type(None) in get_args(kind):
            optional = optional or type(None) in get_args(kind)
            kind = next(each for each in get_args(kind) if each is not type(None))
        return kind, optional


def schema(section: type[Section], prefix: str = "") -> dict[str, Declared]:
    """Every key of a section and of those in it, by its dotted name, in order of declaration.

    A section's own keys come before those of the sections in it, as TOML wants them.
    """
    keys: dict[str, Declared] = {}
    inner: dict[str, Declared] = {}
    for name, field in section.model_fields.items():
        if isinstance(field.default, Section):
            inner |= schema(type(field.default), f"{prefix}{name}.")
        else:
            kind: Any = field.annotation
            for bound in field.metadata:
                kind = Annotated[kind, bound]
            text = (field.description or "").replace("\n", " ")
            keys[prefix + name] = Declared(prefix + name, kind, field.default, text)
    return keys | inner


SCHEMA = schema(Config)
_SECTIONS = {name[:end] for name in SCHEMA for end, letter in enumerate(name) if letter == "."}
"""Dotted names of all sections."""


def load(path: str | os.PathLike[str] | None, arguments: Sequence[str] = ()) -> Config:
    """Reads a config file and applies command-line arguments on top of it.

    Args:
        path: A TOML file, or None for the defaults alone.
        arguments: `--section.key value` or `--section.key=value`; also `--output DIR` and
            `--resume [CHECKPOINT]`, `--engine NAME`.

    Raises:
        ConfigError: An unknown key (the nearest valid one is named), a value of the wrong type
            or out of bounds, or keys that contradict each other.
    """
    from_file = _read_file(Path(path)) if path is not None else {}
    pairs = split_arguments(arguments)
    name = dict(pairs).get("optimizer.name", _optimizer(from_file))
    given = _from_words(pairs, name)
    for key in given:
        parts = key.split(".")
        if parts[0] == "optimizer" and len(parts) == 3 and parts[1] != name:
            raise ConfigError(
                f"--{key} has no effect: the optimizer is {name}. Drop it, or give "
                f"--optimizer.name {parts[1]}"
            )
    config = build(from_file | given)
    unused = [key for key in given if key.startswith("deepspeed.")]
    if unused and config.engine != "deepspeed":
        raise ConfigError(
            f"--{unused[0]} has no effect: the engine is {config.engine}. Drop it, or give "
            "--engine deepspeed"
        )
    return config


def build(values: Values) -> Config:
    """The config in which `values` (dotted name to value) replace the defaults.

    Raises:
        ConfigError: As for `load`.
    """
    config = _typed(_resolved(values, _optimizer(values)))
    for conflict in conflicts(config):
        raise ConfigError(conflict)
    return config


def _typed(values: Values) -> Config:
    """A config of these values, each of which is checked by itself."""
    tree: Values = {}
    for name, value in values.items():
        try:
            json.dumps(value)
        except TypeError:
            raise ConfigError(
                f"{name} = {value}: must be a text in quotes, a number, true, false or a list"
            ) from None
        except ValueError:  # Python writes no number of thousands of digits
            raise ConfigError(f"{name} has a number of too many digits") from None
        *tables, leaf = name.split(".")
        table = tree
        for each in tables:
            table = table.setdefault(each, {})
        table[leaf] = value
    try:
        # JSON has lists alone, like TOML: pydantic makes tuples of them even where it is strict.
        return Config.model_validate_json(json.dumps(tree))
    except ValidationError as error:
        raise ConfigError(_reasons(error)) from None


def _reasons(error: ValidationError, key: str = "") -> str:
    """What pydantic found wrong, as "key = value: reason", or "key has item: reason"."""
    reasons = []
    for found in error.errors():
        name = key or ".".join(part for part in found["loc"] if isinstance(part, str))
        declared = SCHEMA.get(name)
        reason = found["msg"].replace("Input should be", "must be")
        item = any(isinstance(part, int) for part in found["loc"])
        if declared and declared.items and found["type"] in ("missing", "too_long", "tuple_type"):
            reason, item = f"must be {declared.items}", False
        elif declared and declared.optional:
            reason += ", or 'none'"
        value = list(found["input"]) if isinstance(found["input"], tuple) else found["input"]
        reasons.append(f"{name} {'has' if item else '='} {value!r}: {reason}")
    return "; ".join(dict.fromkeys(reasons))  # each number that is missing is found by itself


def replaced(config: Config, values: Values) -> Config:
    """The config with these values of keys by their full names; raises ConfigError as `load`."""
    return build(to_values(config) | values)


def _optimizer(values: Values) -> Any:
    return values.get("optimizer.name", SCHEMA["optimizer.name"].default)


def _resolved(values: Values, optimizer: str) -> Values:
    """The values by their full names: `optimizer.KEY` is short for a key of the chosen optimizer.

    Raises:
        ConfigError: Keys are unknown (the nearest that there are, are named), or given twice.
    """
    _typed({"optimizer.name": optimizer})
    full: Values = {}
    unknown = []
    for name, value in values.items():
        long = name.replace("optimizer.", f"optimizer.{optimizer}.", 1)
        key = name if name in SCHEMA or long not in SCHEMA else long
        if key in full:
            raise ConfigError(f"{name} and {key} are the same key: give one of them")
        if key not in SCHEMA:
            unknown.append(_unknown(name, optimizer))
        full[key] = value
    if unknown:
        raise ConfigError("\n".join(unknown))
    return full


def _unknown(name: str, optimizer: str) -> str:
    own = f"optimizer.{optimizer}."
    short = [key.replace(own, "optimizer.") for key in SCHEMA if key.startswith(own)]
    known = [*(key for key in SCHEMA if key.count(".") < 2), *short]
    known = [*SCHEMA] if name.count(".") > 1 else known
    nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
    siblings = [key for key in known if key.rpartition(".")[0] == name.rpartition(".")[0]]
    listed = f" The keys there are: {', '.join(siblings)}." if siblings else ""
    return f"unknown key {name!r}. Did you mean {nearest!r}?{listed}"


def parse_arguments(arguments: Sequence[str]) -> Values:
    """Command-line arguments as dotted names and values, converted to the keys' types."""
    pairs = split_arguments(arguments)
    return _from_words(pairs, dict(pairs).get("optimizer.name", _optimizer({})))


def _from_words(pairs: Sequence[tuple[str, str]], optimizer: str) -> Values:
    words = _resolved(dict(pairs), optimizer)
    return {name: _from_text(SCHEMA[name], text) for name, text in words.items()}


def split_arguments(arguments: Sequence[str]) -> list[tuple[str, str]]:
    """Splits `--name value` and `--name=value` into pairs; `--resume` alone means auto."""
    pairs: list[tuple[str, str]] = []
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        if not argument.startswith("--"):
            raise ConfigError(f"found {argument!r} where an option like --training.steps belongs")
        name, equals, text = argument[2:].partition("=")
        if not equals:
            # No value begins with two dashes; a negative number begins with one.
            given = rest and not rest[0].startswith("--")
            if not given and name != "resume":
                _resolved({name: None}, _optimizer({}))
                raise ConfigError(f"--{name} needs a value")
            text = rest.pop(0) if given else "auto"
        pairs.append((name, text))
    return pairs


def _from_text(key: Declared, text: str) -> Any:
    """A word of the command line as the key's type."""
    words: Any = text
    if key.items and not (key.optional and text == "none"):
        inner = text.strip()
        if (inner[:1], inner[-1:]) in (("[", "]"), ("(", ")")) and len(inner) > 1:
            inner = inner[1:-1]  # of a list; those of a glob stand further in
        items = [item.strip().strip("\"'") for item in inner.split(",")]
        words = [item for item in items if item]
        if inner and not words:
            raise ConfigError(f"--{key.name} {text}: a list is wanted")
    try:
        return TypeAdapter(key.type).validate_python(words)
    except ValidationError as error:
        raise ConfigError(_reasons(error, key.name)) from None


def check(name: str, value: Any) -> None:
    """Raises ConfigError if that is no value of the key, by its full name."""
    kind: Any = Annotated[SCHEMA[name].type, Strict()]
    try:
        TypeAdapter(kind).validate_python(value)
    except ValidationError as error:
        raise ConfigError(_reasons(error, name)) from None


def _read_file(path: Path) -> Values:
    try:
        with path.open("rb") as file:
            values = flatten(tomllib.load(file))
    except FileNotFoundError:
        raise ConfigError(f"there is no config file {path}") from None
    except OSError as error:
        raise ConfigError(f"cannot read the config file {path}: {error.strerror}") from None
    # Besides its own error: text that is not UTF-8, numbers of thousands of digits, deep nesting.
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{str(path)!r} is not valid TOML: {error}") from None
    try:
        values = _resolved(values, _optimizer(values))
        _typed(values)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    return values


def flatten(tree: Mapping[str, Any], prefix: str = "") -> Values:
    """Values of nested tables by their dotted names; an empty section has none."""
    values: Values = {}
    for name, value in tree.items():
        if isinstance(value, Mapping) and (value or prefix + name in _SECTIONS):
            values |= flatten(value, f"{prefix}{name}.")
        else:
            values[prefix + name] = value
    return values


def to_values(config: Config) -> Values:
    """The flat form of a config: dotted name to value."""
    return flatten(config.model_dump())


def to_json(config: Config) -> Values:
    """The same as JSON has it, with lists for tuples."""
    return flatten(config.model_dump(mode="json"))


def to_toml(config: Config) -> str:
    """The config as a TOML file that `load` reads back to an equal config.

    `resume` is left out, which belongs to one start of a job rather than to the job. TOML has no
    null, so None is written "none", and left out where it is the default.
    """
    lines, section = [], ""
    values = to_values(config)
    for name in SCHEMA:
        value = values[name]
        if name == "resume" or (value is None and SCHEMA[name].default is None):
            continue
        table, _, leaf = name.rpartition(".")
        if table != section:
            lines += ["", f"[{table}]"]
            section = table
        lines.append(f"{leaf} = {_toml_value(value)}")
    return "\n".join(lines) + "\n"


def _toml_value(value: Any) -> str:
    value = "none" if value is None else value
    if isinstance(value, tuple):
        return "[" + ", ".join(map(_toml_value, value)) + "]"
    if isinstance(value, str):
        # JSON escapes are TOML escapes, except that JSON lets DEL through unescaped.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return str(value).lower() if isinstance(value, bool) else repr(value)


def help_text() -> str:
    """All keys with their defaults and help lines, grouped by section."""
    lines, section = ["keys (in the file under [section], or as --section.key value):"], None
    for key in SCHEMA.values():
        table = key.name.rpartition(".")[0]
        if table != section:
            lines.append(f"\n  [{table}]" if table else "")
            section = table
        listed = f" (one of {', '.join(map(repr, key.choices))})" if key.choices else ""
        lines += [f"    --{key.name} = {_toml_value(key.default)}", f"        {key.help}{listed}"]
    return "\n".join(lines)
