"""From a TOML file and the command line to a checked `Config`, and back to TOML.

The declarations in `config.py` are flattened into `{"training.steps": Key, ...}`; both sources
set values in that flat space, where an unknown or ill-typed key is easy to name precisely.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import operator
import os
import sys
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast, get_args, get_origin, get_type_hints

from conda_dist.launch.job.config import Config, ConfigError
from conda_dist.launch.job.key import Key

Values = dict[str, Any]

_BOUNDS = {
    "ge": (">=", operator.ge),
    "gt": (">", operator.gt),
    "le": ("<=", operator.le),
    "lt": ("<", operator.lt),
}


@dataclass(frozen=True, slots=True)
class Declared:
    """A key as declared in config.py, with its dotted name."""

    name: str
    type: Any
    default: Any
    key: Key


def schema(cls: type = Config, prefix: str = "") -> dict[str, Declared]:
    """Every key below a config dataclass, by its dotted name, in order of declaration."""
    hints = get_type_hints(cls, include_extras=True)
    keys: dict[str, Declared] = {}
    for field in dataclasses.fields(cls):
        name, hint = prefix + field.name, hints[field.name]
        if dataclasses.is_dataclass(hint):
            keys |= schema(cast(type, hint), name + ".")
        else:
            kind, key = get_args(hint)
            keys[name] = Declared(name, kind, field.default, key)
    return keys


SCHEMA = schema()
_OPTIMIZERS = get_args(SCHEMA["optimizer.name"].type)


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
    name = from_file.get("optimizer.name", SCHEMA["optimizer.name"].default)
    from_file = _expand_optimizer(from_file, name)
    given = parse_arguments(arguments)
    name = given.get("optimizer.name", name)
    given = _expand_optimizer(given, name)
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
    checked = {name: check(lookup(name), value) for name, value in values.items()}
    return cast(Config, _construct(Config, "", checked))


def replaced(config: Config, values: Values) -> Config:
    """The config with these values of keys by their full names; raises ConfigError as `load`."""
    return build(to_values(config) | values)


def lookup(name: str) -> Declared:
    """The key of that dotted name; raises ConfigError with the nearest name there is."""
    if name in SCHEMA:
        return SCHEMA[name]
    # Keys of the chosen optimizer have a short form, which a key of that length is meant to be.
    short = {f"optimizer.{key.rpartition('.')[2]}" for key in SCHEMA if key.count(".") == 2}
    known = [*SCHEMA, *sorted(short)] if name.count(".") == 1 else SCHEMA
    nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
    siblings = [key for key in SCHEMA if key.rpartition(".")[0] == name.rpartition(".")[0]]
    listed = f" The keys there are: {', '.join(siblings)}." if siblings else ""
    raise ConfigError(f"unknown key {name!r}. Did you mean {nearest!r}?{listed}")


def check(key: Declared, value: Any) -> Any:
    """`value` in the key's own type; raises ConfigError if it is of another or out of bounds."""
    typed = _typed(key, key.type, value)
    for item in typed if isinstance(typed, tuple) else (typed,):
        for name, (sign, holds) in _BOUNDS.items():
            bound = getattr(key.key, name)
            if item is not None and bound is not None and not holds(item, bound):
                raise ConfigError(f"{key.name} = {value!r}: must be {sign} {bound:.10g}")
    return typed


def parse_arguments(arguments: Sequence[str]) -> Values:
    """Command-line arguments as dotted names and values, converted to the keys' types.

    `optimizer.KEY`, short for a key of the chosen optimizer, is kept as it is.
    """
    pairs = split_arguments(arguments)
    keys = _known(name for name, _ in pairs)
    return {name: _from_text(keys[name], keys[name].type, text) for name, text in pairs}


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
                _ = _optimizer_key(name) or lookup(name)
                raise ConfigError(f"--{name} needs a value")
            text = rest.pop(0) if given else "auto"
        pairs.append((name, text))
    return pairs


def _optimizer_key(name: str) -> Declared | None:
    """For the short form `optimizer.KEY`: the first optimizer's key of that name, if any."""
    parts = name.split(".")
    if len(parts) != 2 or parts[0] != "optimizer":
        return None
    found = (SCHEMA.get(f"optimizer.{optimizer}.{parts[1]}") for optimizer in _OPTIMIZERS)
    return next((key for key in found if key), None)


def _expand_optimizer(values: Values, name: str) -> Values:
    """Rewrites the short `optimizer.KEY` to `optimizer.NAME.KEY`."""
    expanded = dict(values)
    for short in values:
        if short in SCHEMA or _optimizer_key(short) is None:
            continue
        full = f"optimizer.{name}.{short.removeprefix('optimizer.')}"
        if full not in SCHEMA:
            own = [key.rpartition(".")[2] for key in SCHEMA if key.startswith(f"optimizer.{name}.")]
            raise ConfigError(f"{short}: {name} has no such key; it has {', '.join(own)}")
        if full in values:
            raise ConfigError(f"{short} and {full} are the same key: give one of them")
        expanded[full] = expanded.pop(short)
    return expanded


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
        keys = _known(values)
        for name, value in values.items():
            check(keys[name], value)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    return values


def _known(names: Iterable[str]) -> dict[str, Declared]:
    """The keys of these names; raises ConfigError that lists every name that is unknown."""
    keys, unknown = dict[str, Declared](), list[str]()
    for name in names:
        try:
            keys[name] = _optimizer_key(name) or lookup(name)
        except ConfigError as error:
            unknown.append(str(error))
    if unknown:
        raise ConfigError("\n".join(unknown))
    return keys


def flatten(tree: Mapping[str, Any], prefix: str = "") -> Values:
    """Values of nested tables by their dotted names."""
    values: Values = {}
    for name, value in tree.items():
        if isinstance(value, Mapping) and value:
            values |= flatten(value, f"{prefix}{name}.")
        else:
            values[prefix + name] = value
    return values


def _construct(cls: type, prefix: str, values: Values) -> Any:
    hints = get_type_hints(cls)
    arguments: Values = {}
    for field in dataclasses.fields(cls):
        name, hint = prefix + field.name, hints[field.name]
        if dataclasses.is_dataclass(hint):
            arguments[field.name] = _construct(cast(type, hint), name + ".", values)
        elif name in values:
            arguments[field.name] = values[name]
    return cls(**arguments)


def _typed(key: Declared, hint: Any, value: Any) -> Any:
    """`value` (of a TOML type) as `hint`, without guessing: 1 may be a float, True may not."""
    origin, options = get_origin(hint), get_args(hint)
    if type(None) in options:
        return None if value in (None, "none") else _typed(key, options[0], value)
    if origin is Literal:
        if value in options:
            return value
    elif origin is tuple:
        items = [value] if isinstance(value, str) else value
        if isinstance(items, list | tuple) and (options[-1] is ... or len(items) == len(options)):
            return tuple(_typed(key, options[0], item) for item in items)
    elif hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        if abs(value) <= sys.float_info.max:  # NaN is not
            return float(value)
    elif type(value) is hint and (hint is not int or abs(value) < 2**63):  # as TOML has them
        return value
    raise ConfigError(f"{key.name} = {value!r}: {_wanted(key.type)} is wanted")


def _from_text(key: Declared, hint: Any, text: str) -> Any:
    """`text` from the command line as `hint`."""
    origin, options = get_origin(hint), get_args(hint)
    if type(None) in options:
        return None if text == "none" else _from_text(key, options[0], text)
    if origin is tuple:
        inner = text.strip()
        if (inner[:1], inner[-1:]) in (("[", "]"), ("(", ")")) and len(inner) > 1:
            inner = inner[1:-1]  # of a list; those of a glob stand further in
        items = [item.strip().strip("\"'") for item in inner.split(",")]
        if inner and not any(items):
            raise ConfigError(f"--{key.name} {text}: {_wanted(key.type)} is wanted")
        return tuple(_from_text(key, options[0], item) for item in items if item)
    try:
        if hint is bool:
            return {"true": True, "false": False}[text.lower()]
        return hint(text) if hint in (int, float) else text
    except (ValueError, KeyError):
        raise ConfigError(f"--{key.name} {text}: {_wanted(key.type)} is wanted") from None


def _wanted(hint: Any) -> str:
    """A type in words, for messages and for the help."""
    origin, options = get_origin(hint), get_args(hint)
    if type(None) in options:
        return f"{_wanted(options[0])}, or 'none'"
    if origin is Literal:
        return "one of " + ", ".join(repr(option) for option in options)
    if origin is tuple:
        length = "a list" if options[-1] is ... else f"a list of {len(options)}"
        return f"{length} ({options[0].__name__})"
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}
    return names[hint]


def to_values(config: Any, prefix: str = "") -> Values:
    """The flat form of a config: dotted name to value."""
    values: Values = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            values |= to_values(value, f"{prefix}{field.name}.")
        else:
            values[prefix + field.name] = value
    return values


def to_toml(config: Config) -> str:
    """The config as a TOML file that `load` reads back to an equal config.

    `resume` is left out, which belongs to one start of a job rather than to the job. TOML has no
    null, so None is written "none", and left out where it is the default.
    """
    lines, section = [], ""
    for name, value in sorted(to_values(config).items(), key=lambda item: item[0].count(".") > 0):
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
    """All keys with their types, defaults and help lines, grouped by section."""
    lines, section = ["keys (in the file under [section], or as --section.key value):"], None
    for key in SCHEMA.values():
        table = key.name.rpartition(".")[0]
        if table != section:
            lines.append(f"\n  [{table}]" if table else "")
            section = table
        default = "" if key.default is None else f" = {_toml_value(key.default)}"
        kind = _wanted(key.type)
        kind = kind if kind.startswith("one of ") else ""
        lines.append(f"    --{key.name}{default}")
        lines.append(f"        {key.key.help}" + (f" ({kind})" if kind else ""))
    return "\n".join(lines)
