"""YAML → checked dataclasses: composition of config files, and every problem of a config reported at once.

In: a YAML file, `key=value` overrides, a dataclass. Out: an instance of it, or one `UserError` that lists all problems. Next:
`settings` defines the dataclasses of runs, `probes.tasks` those of probe tasks. Merging and interpolation are OmegaConf's.

A config may name another that it `extends`, and `defaults` that pick one file of a group each: `defaults: {decoder: whisper}`
reads `decoder/whisper.yaml` beside the config and puts it under the key `decoder`. On the command line `decoder=NAME`
picks another file of the group, and `decoder.key=value` changes one value. A file of a group may extend another, or have
`defaults`: their choices come under its own keys, and a list of choices is merged.
"""

import types
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from whisper_aut.errors import UserError, nearest

T = TypeVar("T")
MAX_EXTENDS = 8
LOCAL = Path("conf")  # in the working directory
SHIPPED = Path(__file__).parent / "conf"  # part of the package, in a checkout too


def find_config(name: str | Path, near: Path = Path(), kind: str = "") -> Path:
    """Return the file of a config, which may be given by its path or by its name.

    Args:
        name: any path, or a name such as `aut`; `.yaml` may be left out.
        near: the folder that is searched first. `conf/` of the working directory and then the configs of the package follow.
        kind: the folder within those two, such as `experiments` or `probe_tasks`.

    Returns:
        The first file found; where there is none, the first path that was tried, for the reader's error.
    """
    given = Path(name)
    paths = [near / given, LOCAL / kind / given, SHIPPED / kind / given]
    if given.parts[:1] == LOCAL.parts:  # conf/aut.yaml, as the docs write it, away from a checkout
        paths.append(SHIPPED / given.relative_to(LOCAL))
    files = (file for path in paths for file in (path, path.with_name(f"{path.name}.yaml")))
    return next((file for file in files if file.is_file()), near / given)


def compose(path: str | Path, overrides: Sequence[str] = (), kind: str = "") -> dict[str, Any]:
    """Merge a config with what it extends, its groups and the overrides, and resolve interpolations.

    Args:
        path: of the config, or its name: see `find_config`.
        overrides: `key=value`, or `group=choice`.
        kind: the folder of `conf/` that holds configs like this one, such as `experiments`.

    Raises:
        UserError: a file is missing or not YAML, a group has no such choice, an override is not `key=value`.
    """
    path = find_config(path, kind=kind)
    layers = _layers(path, kind)
    shelves = [LOCAL / kind, SHIPPED / kind]
    groups = _groups(shelves if path.parent in shelves else [path.parent, *shelves])
    choices = {
        name: choice for layer in layers for name, choice in layer.pop("defaults", {}).items()
    }
    picked, values = _split_overrides(overrides, groups)
    choices |= picked
    merged = OmegaConf.create({})
    for group, choice in choices.items():
        merged[group] = _read_group(group, choice, groups, f"{kind}/{group}")
    try:
        result = OmegaConf.merge(merged, *layers, OmegaConf.from_dotlist(values))
        container = OmegaConf.to_container(result, resolve=True)
    except TypeError:  # OmegaConf's word for a mapping on top of a list
        raise UserError(
            f"{path}: an override reaches inside a list, or puts keys where there are none. Give the list whole, as in data.train=[…]."
        ) from None
    except (OmegaConfBaseException, ValueError, yaml.YAMLError) as error:
        raise UserError(f"{path}: {str(error).splitlines()[0]}") from None
    return container  # pyright: ignore[reportReturnType]


def build(schema: type[T], values: Mapping[str, Any], where: str) -> T:
    """Check a mapping against a dataclass, recursively, and build it.

    Args:
        schema: a dataclass whose fields are plain types, literals, dataclasses, or lists, dicts and options of those.
        values: the mapping, fully resolved.
        where: what the error message calls the origin of the values.

    Raises:
        UserError: listing every unknown key (with the nearest known one), wrong type and missing value.
    """
    problems: list[str] = []
    result = _convert(schema, values, "", problems)
    if problems:
        listed = "\n".join(f"  - {problem}" for problem in problems)
        raise UserError(
            f"{where} has {len(problems)} problem{'s' * (len(problems) > 1)}:\n{listed}"
        )
    return result


def _layers(path: Path, kind: str) -> list[DictConfig]:
    """Return the config and all it extends, the farthest first."""
    layers: list[DictConfig] = []
    current: Path | None = path
    while current is not None:
        if len(layers) == MAX_EXTENDS:
            raise UserError(
                f"{path} extends more than {MAX_EXTENDS} configs in a row; is there a circle?"
            )
        layer = _read_yaml(current)
        parent = layer.pop("extends", None)
        layers.insert(0, layer)
        current = find_config(str(parent), current.parent, kind) if parent else None
    return layers


def _read_yaml(path: Path) -> DictConfig:
    if not path.is_file():
        folder = path.parent if any(path.parent.glob("[!.]*.yaml")) else SHIPPED
        known = sorted(file.name for file in folder.glob("[!.]*.yaml"))
        raise UserError(
            f"There is no config {path}.{nearest(path.name, known) or nearest(path.stem, known)} "
            f"{folder} has: {', '.join(known)}."
        )
    try:
        loaded = OmegaConf.load(path)
    except (yaml.YAMLError, OmegaConfBaseException, UnicodeDecodeError, OSError) as error:
        raise UserError(f"{path} is not readable as YAML: {error}") from None
    if not isinstance(loaded, DictConfig):
        raise UserError(f"{path} must hold keys and values, not a list.")
    return loaded


Groups = Mapping[str, Mapping[str, Path]]


def _groups(folders: Sequence[Path]) -> dict[str, dict[str, Path]]:
    """Return group → choice → file. A file of an earlier folder hides one of the same name in a later one."""
    groups: dict[str, dict[str, Path]] = {}
    for folder in reversed(folders):
        for file in sorted(folder.glob("*/*.yaml")):
            groups.setdefault(file.parent.name, {})[file.stem] = file
    return groups


def _read_group(group: str, choice: str, groups: Groups, kind: str) -> DictConfig:
    """Read one file of a group, what it extends, and the files of other groups that its `defaults` pick."""
    layers = _layers(_group_file(group, choice, groups), kind.lstrip("/"))
    values = cast(DictConfig, OmegaConf.merge(*layers))
    within = OmegaConf.create({})
    for inner, choices in values.pop("defaults", {}).items():
        names = [choices] if isinstance(choices, str) else list(choices)
        within[inner] = OmegaConf.merge(
            *(_read_yaml(_group_file(inner, name, groups)) for name in names)
        )
    return OmegaConf.merge(within, values)  # pyright: ignore[reportReturnType]


def _group_file(group: str, choice: str, groups: Groups) -> Path:
    if group not in groups:
        raise UserError(
            f"There is no config group {group!r}.{nearest(group, groups)} Groups: {', '.join(sorted(groups))}."
        )
    if choice not in groups[group]:
        raise UserError(
            f"{group}={choice}: no such choice.{nearest(str(choice), groups[group])} There are: {', '.join(groups[group])}."
        )
    return groups[group][choice]


def _split_overrides(overrides: Sequence[str], groups: Groups) -> tuple[dict[str, str], list[str]]:
    bad = [item for item in overrides if "=" not in item or item.startswith(("=", "-"))]
    if bad:
        raise UserError(f"Overrides are written key=value; not understood: {', '.join(bad)}.")
    pairs = [(item, *item.split("=", 1)) for item in overrides]
    picked = {key: value for _, key, value in pairs if key in groups}
    return picked, [item for item, key, _ in pairs if key not in groups]


def _convert(kind: Any, value: Any, path: str, problems: list[str]) -> Any:
    origin, arguments = get_origin(kind), get_args(kind)
    if kind is Any:
        return value
    if origin in (Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        return _convert_union([a for a in arguments if a is not type(None)], value, path, problems)
    if is_dataclass(kind):
        return _convert_dataclass(kind, value, path, problems)
    if origin is Literal:
        if value not in arguments:
            suggestion = nearest(str(value), map(str, arguments))
            problems.append(
                f"{path}: {value!r} is not one of {', '.join(map(repr, arguments))}.{suggestion}"
            )
        return value
    if origin in (list, Sequence, tuple):
        if not isinstance(value, (list, tuple)):
            problems.append(f"{path}: expected a list, got {value!r}")
            return value
        return [
            _convert(arguments[0], item, f"{path}[{i}]", problems) for i, item in enumerate(value)
        ]
    if origin in (dict, Mapping):
        if not isinstance(value, Mapping):
            problems.append(f"{path}: expected keys and values, got {value!r}")
            return value
        return {
            str(key): _convert(arguments[1], item, f"{path}.{key}", problems)
            for key, item in value.items()
        }
    return _convert_scalar(kind, value, path, problems)


def _convert_union(kinds: Sequence[Any], value: Any, path: str, problems: list[str]) -> Any:
    """Take the first kind that the value fits as it is; the last one's problems are those reported."""
    for kind in kinds[:-1]:
        found: list[str] = []
        converted = _convert(kind, value, path, found)
        if not found:
            return converted
    return _convert(kinds[-1], value, path, problems)


def _convert_dataclass(kind: Any, value: Any, path: str, problems: list[str]) -> Any:
    if is_dataclass(value) and isinstance(value, kind):
        return value
    if not isinstance(value, Mapping):
        problems.append(f"{path}: expected keys and values, got {value!r}")
        return None
    hints = get_type_hints(kind)
    known = {field.name: field for field in fields(kind)}
    prefix = f"{path}." if path else ""
    for key in value:
        if key not in known:
            hint = nearest(str(key), known) or f" Known here: {', '.join(known)}."
            problems.append(f"{prefix}{key}: unknown key.{hint}")
    converted = {}
    before = len(problems)
    for name, field in known.items():
        if name in value:
            converted[name] = _convert(hints[name], value[name], prefix + name, problems)
        elif field.default is MISSING and field.default_factory is MISSING:
            problems.append(f"{prefix}{name}: missing")
    return kind(**converted) if len(problems) == before else None


def _convert_scalar(kind: type, value: Any, path: str, problems: list[str]) -> Any:
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if kind is float and isinstance(value, str):  # YAML 1.1 reads 1e-4 as text
        try:
            return float(value)
        except ValueError:
            pass
    if kind is str and value is None:  # `key=` on a command line
        return ""
    if kind is str and isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)  # a name or a class that happens to be a number
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        names = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
        problems.append(f"{path}: expected {names.get(kind, kind.__name__)}, got {value!r}")
    return value
