"""Reads recipes: TOML files merged in order, then `--set` flags, checked against the settings classes.

Precedence: class default, recipe, overlays in order, flags. A table in an overlay changes the keys it names;
where the recipe has a list, as `stages`, a table addresses its items by index or by stage name.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from sateen.config.base import Loc, explain
from sateen.config.run import RunConfig
from sateen.config.toml import as_table, to_toml
from sateen.errors import ConfigError, nearest

_REMOVE = object()


class _Whole(dict[str, Any]):
    """A table from `--set key={...}`: it replaces what was there, as an assignment reads."""


# A word or path may stand without TOML's quotes: shells eat them. The classes still check its type.
_BARE_WORD = re.compile(r"[A-Za-z_./~][\w./~:+-]*")


def load_recipe(paths: Sequence[str | Path], sets: Sequence[str] = ()) -> RunConfig:
    """The checked settings of a run.

    Args:
        paths: a recipe and any overlays, each a path or the name of a file in `recipes/`.
        sets: `a.b=VALUE` flags in TOML's value syntax; a table replaces the one there, and `a.b=` takes a
            setting away.

    Raises:
        ConfigError: a file is missing or not TOML, a key unknown or a value not accepted; one line each.
    """
    assert paths, "a run needs a recipe"
    merged = _Merged()
    for path in paths:
        file = find_recipe(path)
        merged.add(_read(file), str(file))
    for text in sets:
        merged.add(_parse_set(text), f"--set {text}")
    try:
        return RunConfig.model_validate(merged.table)
    except ValidationError as error:
        raise ConfigError(explain(error, merged.origin)) from None


def resolved_toml(config: RunConfig) -> str:
    """The run as one TOML recipe with every default written out; `load_recipe` reads it back equal."""
    return to_toml(as_table(config))


def recipe_folders() -> list[Path]:
    """Where recipes are looked for by name: `recipes/` here, then in the checkout or wheel that runs."""
    package = Path(__file__).parents[1]
    folders = [Path("recipes"), package.parents[1] / "recipes", package / "recipes"]
    return [folder for folder in folders if folder.is_dir()]


def find_recipe(name: str | Path) -> Path:
    """The file of a recipe given as a path or by name.

    Raises:
        ConfigError: there is no such file; the message lists the known names.
    """
    candidates = [Path(name)]
    if Path(name).name == str(name):
        candidates += [folder / f"{Path(name).stem}.toml" for folder in recipe_folders()]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    known = sorted({file.stem for folder in recipe_folders() for file in folder.glob("*.toml")})
    raise ConfigError(
        f"there is no recipe {str(name)!r}{nearest(Path(name).stem, known)} "
        f"(known: {', '.join(known) or 'none'}; or give the path of a .toml file)"
    )


def _read(file: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: not valid TOML: {error}") from None


def _parse_set(text: str) -> dict[str, Any]:
    """`a.b=3` as `{"a": {"b": 3}}`."""
    key, equals, value = text.partition("=")
    parts = [part.strip() for part in key.split(".")]
    if not equals or not all(parts):
        raise ConfigError(f"--set {text}: expected KEY=VALUE, for example --set seed=1")
    tree: Any = _parse_value(value.strip(), text)
    for part in reversed(parts):
        tree = {part: tree}
    assert isinstance(tree, dict)
    return tree


def _parse_value(value: str, text: str) -> Any:
    if not value:
        return _REMOVE
    try:
        parsed = tomllib.loads(f"value = {value}")
    except tomllib.TOMLDecodeError:
        parsed = {}
    if list(parsed) == ["value"]:
        given = parsed["value"]
        return _Whole(given) if isinstance(given, dict) else given
    if _BARE_WORD.fullmatch(value):
        return value
    raise ConfigError(f'--set {text}: {value!r} is not a TOML value; numbers, true, "text" and [1, 2] are')


class _Merged:
    """Recipes merged so far, and which file or flag set each path."""

    def __init__(self) -> None:
        self.table: dict[str, Any] = {}
        self._origins: dict[Loc, str] = {}

    def add(self, extra: dict[str, Any], origin: str) -> None:
        self._origins.setdefault((), origin)
        self.table = self._merge(self.table, extra, (), origin)

    def origin(self, loc: Loc) -> str:
        """What set `loc`, or the nearest table around it."""
        while loc not in self._origins:
            loc = loc[:-1]
        return self._origins[loc]

    def _merge(self, base: Any, extra: Any, path: Loc, origin: str) -> Any:
        if isinstance(extra, dict) and isinstance(base, list):
            for key, value in extra.items():
                index = _position(base, key, path, origin)
                base[index] = self._merge(base[index], value, (*path, index), origin)
            return [item for item in base if item is not _REMOVE]
        if not isinstance(extra, dict):
            self._origins = {p: o for p, o in self._origins.items() if p[: len(path)] != path}
            self._origins[path] = origin
            return extra
        self._origins.setdefault(path, origin)
        table = base if isinstance(base, dict) and not isinstance(extra, _Whole) else {}
        for key, value in extra.items():
            table[key] = self._merge(table.get(key), value, (*path, key), origin)
        return {key: value for key, value in table.items() if value is not _REMOVE}


def _position(items: list[Any], key: str, path: Loc, origin: str) -> int:
    """Which item of a list a table key addresses: an index, a stage's name, or a stage that occurs once."""
    own = [item.get("name") if isinstance(item, dict) else None for item in items]
    if own.count(key) == 1:
        return own.index(key)
    names = [item.get("stage") if isinstance(item, dict) else None for item in items]
    where = ".".join(map(str, path))
    if key.isdecimal() and int(key) < len(items):
        return int(key)
    if names.count(key) == 1:
        return names.index(key)
    if key in names:
        raise ConfigError(f"{origin}: {where} has {names.count(key)} items called {key!r}; use an index")
    known = ", ".join(f"{i} ({name})" if name else str(i) for i, name in enumerate(names))
    raise ConfigError(f"{origin}: {where} has no item {key!r} (known: {known or 'none'})")
