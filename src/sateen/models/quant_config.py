"""`quantization_config` of a config.json, read into a `QuantSpec` and written back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sateen.errors import ConfigError, nearest, unknown_name
from sateen.nn.spec import QuantSpec

KEY = "quantization_config"
METHODS = ("phase", "fairy2i", "ternary", "int2")
ACTIVATIONS = ("int8", "float")
# Our word -> the dictionary's.
WORDS = {
    "method": "quant_method",
    "stages": "stages",
    "act": "activations",
    "packed": "packed",
    "skip": "modules_to_not_convert",
    "int2_ratio": "int2_ratio",
}


def default_spec(method: str) -> QuantSpec:
    """What a method does when its dictionary says no more.

    Activations are int8, but floats for `fairy2i`, which has two stages then: its papers' settings.

    Raises:
        ConfigError: an unknown method.
    """
    if method not in METHODS:
        raise ConfigError(f"quant_method {method!r} is not supported; accepted: {', '.join(METHODS)}, none")
    if method == "fairy2i":
        return QuantSpec("fairy2i", stages=2, act="float")
    return QuantSpec(method)  # type: ignore[arg-type]


def read_quant(table: Any, origin: str) -> QuantSpec | None:
    """The spec of a `quantization_config`, None for null or the method `none`, the word a recipe can write.

    Raises:
        ConfigError: not a table, an unknown method or key, or a value that is not accepted.
    """
    if table is None or table == {"quant_method": "none"}:
        return None
    place = f"{origin}: {KEY}"
    if not isinstance(table, Mapping):
        raise ConfigError(f"{place} is {table!r}; a table with quant_method is expected")
    if "quant_method" not in table:
        raise ConfigError(f"{place} has no quant_method; accepted: {', '.join(METHODS)}, none")
    try:
        spec = default_spec(str(table["quant_method"]))
    except ConfigError as error:
        raise ConfigError(f"{place}.{error}") from None
    for key in table:
        if key not in WORDS.values():
            raise ConfigError(f"{place}: {unknown_name('key', key, WORDS.values())}")
    values = {ours: table[word] for ours, word in WORDS.items() if word in table and ours != "method"}
    if "skip" in values:
        names = values["skip"] or ()
        if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
            raise ConfigError(f"{place}.{WORDS['skip']} is {names!r}; a list of module names is expected")
        values["skip"] = tuple(names)
    spec = QuantSpec(**({field: getattr(spec, field) for field in WORDS} | values))
    _check(spec, place)
    return spec


def _check(spec: QuantSpec, place: str) -> None:
    if spec.act not in ACTIVATIONS:
        hint = nearest(str(spec.act), ACTIVATIONS)
        raise ConfigError(f"{place}.activations {spec.act!r} is not accepted{hint}; accepted: int8, float")
    if not isinstance(spec.packed, bool):
        raise ConfigError(f"{place}.packed is {spec.packed!r}; true or false is expected")
    most = 8 if spec.method == "fairy2i" else 1
    if isinstance(spec.stages, bool) or not isinstance(spec.stages, int) or not 1 <= spec.stages <= most:
        raise ConfigError(f"{place}.stages is {spec.stages!r}; accepted for {spec.method}: 1 to {most}")
    if not isinstance(spec.int2_ratio, int | float) or not 0 < spec.int2_ratio < float("inf"):
        raise ConfigError(f"{place}.int2_ratio is {spec.int2_ratio!r}; a number above 0 is expected")


def write_quant(spec: QuantSpec) -> dict[str, Any]:
    """The `quantization_config` that reads back as this spec."""
    table = {word: getattr(spec, ours) for ours, word in WORDS.items()}
    table["modules_to_not_convert"] = list(spec.skip)
    if spec.method != "int2":
        del table["int2_ratio"]
    return table
