"""What tests of the sandbox need: a machine that can isolate, or a skip that says why it cannot."""

import os

import pytest

from sateen.errors import BackendUnavailable
from sateen.rewards.sandbox import isolation


@pytest.fixture(scope="session")
def sandbox() -> None:
    """Nothing; skips the test where isolation is missing, and fails it where SATEEN_REQUIRE_SANDBOX is 1."""
    try:
        isolation()
    except BackendUnavailable as error:
        if os.environ.get("SATEEN_REQUIRE_SANDBOX") == "1":
            pytest.fail(f"SATEEN_REQUIRE_SANDBOX=1, and {error}")
        pytest.skip(str(error))
