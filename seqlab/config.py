"""Strict YAML <-> dataclasses; knows no other module of the library.

A YAML holds values only. `base: NAME` (at most one, no chains of more than one file) is read first and the file's
own values replace it leaf by leaf. Every value is checked against the dataclass's annotation: an unknown key, a wrong
type or an impossible choice is one line that names the file, the path of the key, what was seen and what is allowed.
"""

import dataclasses
import difflib
import types
import typing
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

import yaml

from seqlab.errors import UserError

T = TypeVar("T")


def from_dict(cls: type[T], data: Any, source: str = "config", path: str = "") -> T:
    """Build the dataclass `cls` from a mapping of plain values, checking every key and type.

    `source` and `path` only serve the messages. Raises UserError.
    """
    if not isinstance(data, dict):
        raise UserError(f"{source}: {path or 'top level'}: expected keys and values, got {_show(data)}")
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}
    hints = typing.get_type_hints(cls)
    values = {}
    for key, value in data.items():
        where = f"{path}.{_show(key)}" if path else _show(key)
        if key not in fields:
            raise UserError(f"{source}: {where}: unknown; {_nearest(str(key), fields)}")
        values[key] = _convert(hints[key], value, source, where)
    missing = [
        name
        for name, f in fields.items()
        if name not in values
        and f.default is dataclasses.MISSING
        and f.default_factory is dataclasses.MISSING
    ]
    if missing:
        where = f"{path}.{missing[0]}" if path else missing[0]
        raise UserError(f"{source}: {where}: missing; it has no default")
    try:
        return cls(**values)
    except UserError:
        raise
    except ValueError as error:  # impossible combinations, found by __post_init__
        raise UserError(f"{source}: {path + '.' if path else ''}{error}") from None


def to_dict(config: Any) -> dict[str, Any]:
    """The plain values of a dataclass, nested; `from_dict(type(config), to_dict(config)) == config`."""
    return {
        f.name: _plain(getattr(config, f.name)) for f in dataclasses.fields(config) if f.init
    }


def load_yaml(path: Path, allow_base: bool = True) -> dict[str, Any]:
    """Read one YAML file, and the file its `base:` names (relative to it), into one dictionary of plain values."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); give a YAML file or a preset's name") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: not a text file; a config is YAML") from None
    try:
        data = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or " ".join(str(error).split())[:120] or "nested too deeply"
        raise UserError(f"{path}:{line} not valid YAML: {problem}") from None
    data = {} if data is None else data
    if not isinstance(data, dict):
        raise UserError(f"{path}: expected keys and values, got {_show(data)}")
    base = data.pop("base", None)
    if base is None:
        return data
    if not isinstance(base, str):
        raise UserError(f"{path}: base: expected the name of one YAML file, got {_show(base)}")
    if not allow_base:
        raise UserError(f"{path}: base: a base cannot have a base; copy the values instead")
    base_path = path.parent / (base if base.endswith((".yaml", ".yml")) else base + ".yaml")
    return merge(load_yaml(base_path, allow_base=False), data)


def dump_yaml(config: Any) -> str:
    """YAML text of a dataclass that `load_yaml` + `from_dict` read back to an equal one."""
    return yaml.safe_dump(to_dict(config), sort_keys=False, width=100)


def merge(base: dict[str, Any], top: dict[str, Any]) -> dict[str, Any]:
    """`top` laid over `base`, nested dictionaries leaf by leaf; neither is changed."""
    merged = dict(base)
    for key, value in top.items():
        if isinstance(value, dict) and isinstance(merged.get(key), dict):
            merged[key] = merge(merged[key], value)
        else:
            merged[key] = value
    return merged


def parse_override(text: str) -> dict[str, Any]:
    """`model.d_model=256` -> {"model": {"d_model": 256}}; the value is read as YAML."""
    key, equals, value = text.partition("=")
    if not equals or not key.strip() or not all(part.isidentifier() for part in key.strip().split(".")):
        raise UserError(f"--set {text}: expected KEY=VALUE with a dotted key, for example --set model.d_model=256")
    try:
        parsed = yaml.safe_load(value) if value.strip() else None
    except yaml.YAMLError:
        raise UserError(f"--set {text}: the value is not valid YAML") from None
    for part in reversed(key.strip().split(".")):
        parsed = {part: parsed}
    return parsed


def _convert(hint: Any, value: Any, source: str, where: str) -> Any:
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        options = get_args(hint)
        if value is None and type(None) in options:
            return None
        inner = [option for option in options if option is not type(None)]
        if len(inner) > 1:
            for option in inner:
                try:
                    return _convert(option, value, source, where)
                except UserError:
                    continue
            raise _wrong(hint, value, source, where)
        return _convert(inner[0], value, source, where)
    if origin is Literal:
        # `type(...) is` keeps True apart from 1
        if any(type(value) is type(choice) and value == choice for choice in get_args(hint)):
            return value
        raise _wrong(hint, value, source, where)
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise _wrong(hint, value, source, where)
        item = get_args(hint)
        if len(item) == 2 and item[1] is Ellipsis:
            return tuple(_convert(item[0], v, source, f"{where}[{i}]") for i, v in enumerate(value))
        if len(item) != len(value):
            raise _wrong(hint, value, source, where)
        return tuple(_convert(h, v, source, f"{where}[{i}]") for i, (h, v) in enumerate(zip(item, value)))
    if dataclasses.is_dataclass(hint):
        return value if isinstance(value, hint) else from_dict(hint, value, source, where)
    number = _number(value)
    if hint is int and number is not None and float(number).is_integer():
        return int(number)
    if hint is float and number is not None:
        return float(number)
    if hint is bool and isinstance(value, bool):
        return value
    if hint is str and isinstance(value, str):
        return value
    raise _wrong(hint, value, source, where)


def _number(value: Any) -> int | float | None:
    """The number a YAML scalar means: YAML 1.1 reads `8e-3` as text, which no one who writes it means."""
    if isinstance(value, bool):
        return None
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            return None
    if isinstance(value, int):
        return value
    if isinstance(value, float) and value == value and abs(value) != float("inf"):
        return value
    return None


def _wrong(hint: Any, value: Any, source: str, where: str) -> UserError:
    return UserError(f"{source}: {where}: expected {_describe(hint)}, got {_show(value)}")


def _describe(hint: Any) -> str:
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "null"}
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(_describe(option) for option in get_args(hint))
    if origin is Literal:
        return "one of " + ", ".join(_show(choice) for choice in get_args(hint))
    if origin is tuple:
        items = get_args(hint)
        if len(items) == 2 and items[1] is Ellipsis:
            return f"a list, each {_describe(items[0])}"
        return f"a list of {len(items)}: " + ", ".join(_describe(item) for item in items)
    return names.get(hint, getattr(hint, "__name__", str(hint)))


def _show(value: Any) -> str:
    text = {True: "true", False: "false", None: "null"}.get(value) if isinstance(value, (bool, type(None))) else None
    text = text or (value if isinstance(value, str) and value.isidentifier() else repr(value))
    return text if len(text) <= 60 else text[:57] + "..."


def _nearest(key: str, allowed: Any) -> str:
    close = difflib.get_close_matches(key, list(allowed), n=1, cutoff=0.5)
    return f"did you mean {close[0]}?" if close else "allowed: " + ", ".join(allowed)


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return to_dict(value)
    if isinstance(value, (tuple, list)):
        return [_plain(v) for v in value]
    return value
