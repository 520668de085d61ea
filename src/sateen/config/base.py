"""The base of every settings class, and how its problems become one-line errors.

Settings are frozen pydantic classes. People type the keys of a recipe, so unknown ones are refused with the
nearest known one; numbers are never made of strings; a table given in part keeps the rest of its default.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)
from pydantic_core import InitErrorDetails, PydanticCustomError

from sateen.errors import nearest, unknown_name

Loc = tuple[int | str, ...]


def problem(message: str, *loc: int | str, value: Any = None) -> ValidationError:
    """An error to raise inside a validator; `loc` is the path from the class that is being checked."""
    kind = PydanticCustomError("sateen", "{message}", {"message": message})
    return ValidationError.from_exception_data(
        "settings", [InitErrorDetails(type=kind, loc=loc, input=value)]
    )


class Config(BaseModel):
    """A group of settings. Compare with `==`; change with `model_copy(update=...)`.

    Attributes:
        choice: the field that names the class in a recipe (`name = "muon"`), for groups that have several.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, validate_default=False)
    choice: ClassVar[str | None] = None

    @model_validator(mode="before")
    @classmethod
    def _check_keys(cls, data: Any) -> Any:
        if not isinstance(data, Mapping):
            return data
        unknown = [key for key in data if key not in cls.model_fields]
        if unknown:
            raise ValidationError.from_exception_data(
                cls.__name__, [_unknown_key(key, data[key], cls) for key in unknown]
            )
        return {key: _completed(cls.model_fields[key].default, value) for key, value in data.items()}


def _unknown_key(key: str, value: Any, cls: type[Config]) -> InitErrorDetails:
    near = nearest(key, cls.model_fields).removeprefix("; did you mean ").removesuffix("?")
    kind = PydanticCustomError("unknown_key", "", {"near": near, "known": ", ".join(cls.model_fields)})
    return InitErrorDetails(type=kind, loc=(key,), input=value)


def _completed(default: Any, given: Any) -> Any:
    """A given table plus what the field's default sets; as given when it chooses another class."""
    if not (isinstance(default, Config) and isinstance(given, Mapping)):
        return given
    keep = {name: getattr(default, name) for name in default.model_fields_set}
    if default.choice is not None:
        keep[default.choice] = getattr(default, default.choice)
        if given.get(default.choice, keep[default.choice]) != keep[default.choice]:
            return given
    return {**keep, **given}


def one_of(what: str, table: Callable[[], Mapping[str, type[Config]]]) -> BeforeValidator:
    """A validator that picks the class by the key its classes call `choice`.

    Args:
        what: noun for messages, for example `optimizer`.
        table: returns name -> class; a function, so that later rooms may add rows.
    """

    def pick(value: Any) -> Any:
        if isinstance(value, Config):
            return value
        if not isinstance(value, Mapping):
            raise problem(f"= {value!r} should be a table")
        classes = table()
        key = next(iter(classes.values())).choice
        assert key is not None, f"the classes of {what} do not say which key names them"
        name = value.get(key)
        if name is None:
            raise problem(f"is missing; choose one of {', '.join(sorted(classes))}", key)
        if not isinstance(name, str) or name not in classes:
            raise problem(f"= {name!r}: {unknown_name(what, str(name), classes)}", key)
        return classes[name].model_validate(value)

    return BeforeValidator(pick)


def _whole(value: Any) -> Any:
    # TOML's 2e6 is a float; a count of tokens may be written that way as long as it is whole.
    return int(value) if isinstance(value, float) and value.is_integer() else value


Count = Annotated[int, Field(ge=0), BeforeValidator(_whole)]
Positive = Annotated[int, Field(ge=1), BeforeValidator(_whole)]
Fraction = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]
FilePath = Annotated[Path, Field(strict=False)]


def explain(error: ValidationError, origin: Callable[[Loc], str]) -> str:
    """One line per problem of a recipe: where it came from, the key, what was given, what is accepted.

    Args:
        error: what pydantic raised.
        origin: names the file or flag that set a path.
    """
    errors = error.errors(include_url=False)
    # A list that loses its bad items is then too short as well; the items' own problems say what is wrong.
    inner = {e["loc"][:depth] for e in errors for depth in range(len(e["loc"]))}
    errors = [e for e in errors if e["type"] != "too_short" or e["loc"] not in inner]
    return "\n".join(f"{origin(e['loc'])}: {_sentence(dict(e))}" for e in errors)


def _sentence(error: dict[str, Any]) -> str:
    path = ".".join(str(part) for part in error["loc"])
    context: dict[str, Any] = error.get("ctx") or {}
    match error["type"]:
        case "unknown_key":
            near = context["near"]
            parent = path[: len(path) - len(str(error["loc"][-1]))]
            hint = f"; did you mean {parent}{near}?" if near else f" (known: {context['known']})"
            return f"{path} is not a setting{hint}"
        case "sateen":
            return f"{path} {context['message']}".lstrip()
        case "missing":
            return f"{path} is missing; set it in the recipe or with --set {path}=VALUE"
        case "model_type" | "dict_type" | "model_attributes_type":
            return f"{path} = {error['input']!r} should be a table"
        case "string_pattern_mismatch":
            return f"{path} = {error['input']!r} should match {context['pattern']}"
    accepted = error["msg"].removeprefix("Input ").replace("tuple", "list")
    return f"{path} = {error['input']!r} {accepted[:1].lower()}{accepted[1:]}"
