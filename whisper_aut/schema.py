"""Builds dataclasses from the mappings of YAML files with pydantic, and explains what is wrong.

Schemas are dataclasses of pydantic (`@dataclass(config=STRICT)`), with ranges next to the fields:
`batch_clips: PositiveInt = 16`. Rules over several fields are `model_validator`s. They raise a
`ValueError` with one line for each problem, which may begin with a field: `min_seconds: must …`.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import is_dataclass
from functools import cache
from itertools import chain, groupby
from typing import Annotated, Any, TypeVar, get_args, get_type_hints

import yaml
from pydantic import BeforeValidator, ConfigDict, TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from whisper_aut.errors import UserError, nearest

T = TypeVar("T")
STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
MAX_YAML_VALUES = 100_000
_adapter = cache(TypeAdapter)
PLAIN_WORDS = {"Input should be": "must be", " or must be": " or", " array": " list"}
PLAIN_WORDS |= {"a valid boolean": "true or false", "a valid string": "text"}
PLAIN_WORDS |= {"a valid integer": "a whole number", "an object": "keys and values"}
PLAIN_WORDS |= {"List should": "must", " after validation": ""}


def _to_text(value: Any) -> Any:
    if value is None:  # `key=` on a command line
        return ""
    return str(value) if type(value) in (int, float) else value  # a name that is a number


# A string that may be written as a number, or be empty: `name=2026`, `model.after=`.
Text = Annotated[str, BeforeValidator(_to_text)]


def build(schema: type[T], values: Mapping[str, Any], where: str) -> T:
    """Build a dataclass from a mapping and check types, ranges and keys.

    Args:
        schema: a dataclass, of pydantic or the standard library, with pydantic's annotations.
        values: the resolved mapping.
        where: the origin of the values, for the error message.

    Raises:
        UserError: lists all problems, each with its dotted path.
    """
    # As JSON, because in strict mode pydantic accepts only JSON objects for nested dataclasses.
    try:
        text = json.dumps(values)
    except TypeError as error:  # a YAML tag such as !!binary
        raise UserError(f"{where}: {error}.") from None
    try:
        return _adapter(schema).validate_json(text, strict=True, extra="forbid")
    except ValidationError as error:
        problems = list(_describe(schema, json.loads(text), error.errors(include_url=False)))
    listed = "\n".join(f"  - {problem}" for problem in problems)
    plural = "s" if len(problems) > 1 else ""
    raise UserError(f"{where} has {len(problems)} problem{plural}:\n{listed}")


def _describe(schema: type, values: Any, errors: Sequence[ErrorDetails]) -> Iterator[str]:
    """Describe pydantic's errors in plain words, one line for each problem."""
    # Errors with the same path are those of the members of a union.
    for keys, group in groupby(errors, lambda error: _path_in(values, error)):
        alternatives = list(group)
        path, given = ".".join(keys), alternatives[0]["input"]
        match alternatives[0]["type"]:
            case "unexpected_keyword_argument":
                known = _fields_at(schema, keys[:-1])
                hint = nearest(keys[-1], known) or f" Known keys: {', '.join(known)}."
                yield f"{path}: unknown key.{hint}"
            case "missing":
                yield f"{path}: missing"
            case "value_error":  # raised by a validator, perhaps about a field inside `path`
                for line in str(alternatives[0].get("ctx", {})["error"]).splitlines():
                    inside = re.split("[.:]", line)[0] in _fields_at(schema, keys)
                    yield (f"{path}." if inside else f"{path}: ") + line if path else line
            case _:
                expected = " or ".join(error["msg"] for error in alternatives)
                for words, plain in PLAIN_WORDS.items():
                    expected = expected.replace(words, plain)
                hint = nearest(str(given), re.findall(r"'(.*?)'", expected))
                yield f"{path}: {expected}, got {given!r}{'.' if hint else ''}{hint}"


def _path_in(values: Any, error: ErrorDetails) -> list[str]:
    """Return the keys and indices that lead to an error, without pydantic's names of types."""
    location = list(error["loc"])
    missing = [str(location.pop())] if error["type"] == "missing" else []
    path: list[str] = []
    for key in location:
        if key in values if isinstance(values, dict) else isinstance(key, int):
            values = values[key]
            path.append(str(key))
    return path + missing


def _fields_at(kind: Any, path: Sequence[str]) -> list[str]:
    """Return the fields of the dataclass at a dotted path of a schema."""
    for name in path:
        for owner in _dataclasses_in(kind):
            hints = get_type_hints(owner, include_extras=True)
            kind = hints.get(name, kind)  # indices of lists and keys of mappings have no field
    return [name for owner in _dataclasses_in(kind) for name in get_type_hints(owner)]


def _dataclasses_in(kind: Any) -> Iterator[type]:
    """Yield the dataclasses of a type such as `X | None` or `dict[str, list[X]]`."""
    if isinstance(kind, type) and is_dataclass(kind):
        yield kind
    for argument in get_args(kind):
        yield from _dataclasses_in(argument)


def check_yaml(text: str) -> None:
    """Raise a `YAMLError` if the aliases of YAML multiply its content, perhaps without end."""
    count, nodes = 0, [yaml.compose(text, Loader=yaml.SafeLoader)]
    while nodes:
        node = nodes.pop()
        count += 1
        if isinstance(node, yaml.MappingNode):
            nodes += chain.from_iterable(node.value)
        elif isinstance(node, yaml.SequenceNode):
            nodes += node.value
        if count + len(nodes) > MAX_YAML_VALUES:
            raise yaml.YAMLError(f"it has more than {MAX_YAML_VALUES} values")
