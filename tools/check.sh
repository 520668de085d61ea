#!/bin/sh
# Everything a change must pass, the same for people and CI; `check.sh lint` leaves the tests out.
set -eu
cd "$(dirname "$0")/.."
ruff check .
ruff format --check .
mypy
lint-imports --no-cache
[ "${1:-}" = lint ] || exec pytest
