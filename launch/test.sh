#!/usr/bin/env bash
# Set everything up and pass the tests: lint, formatting, types, then pytest. Further arguments go to pytest.
. "$(dirname "${BASH_SOURCE[0]}")/setup.sh" test
ruff check . >&2
ruff format --check . >&2
mypy >&2
python -m pytest "$@"
