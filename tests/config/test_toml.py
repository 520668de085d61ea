"""The TOML writer against the standard library's reader."""

import json
import math
import tomllib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sateen.config.toml import to_toml

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
SCALARS = st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False) | TEXT
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=12,
)


@given(st.dictionaries(TEXT, VALUES, max_size=4))
def test_tomllib_reads_back_what_was_written(table: dict[str, object]) -> None:
    again = tomllib.loads(to_toml(table))
    assert again == table
    # 1, 1.0 and True are equal and still differ.
    assert json.dumps(again, sort_keys=True) == json.dumps(table, sort_keys=True)


def test_scalars_come_before_tables_and_lists_of_tables_get_headers() -> None:
    table = {"stages": [{"a": {"b": 1}}, {}], "deep": {"er": {"x": [1, 2.0]}}, "top": "é\n"}
    assert to_toml(table) == (
        'top = "é\\n"\n\n[[stages]]\n\n[stages.a]\nb = 1\n\n[[stages]]\n\n[deep.er]\nx = [1, 2.0]\n'
    )


def test_nan_survives() -> None:
    assert math.isnan(tomllib.loads(to_toml({"x": math.nan}))["x"])


def test_a_value_without_a_place_in_toml_is_refused() -> None:
    with pytest.raises(TypeError, match="NoneType None"):
        to_toml({"x": [None]})
