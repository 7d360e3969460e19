#!/usr/bin/env bash
# Set everything up and pass the tests: lint, formatting, types, then pytest.
#   --fast  the unit tests only, without the tests marked launched, which start processes or compile
#   --all   every test, also the tests marked slow or zoo
# Further arguments go to pytest.
. "$(dirname "${BASH_SOURCE[0]}")/setup.sh" test --async_io
tier=()
case "${1:-}" in
  --fast) shift && tier=(tests/unit -m 'not slow and not zoo and not launched') ;;
  --all) shift && tier=(-m "") ;;
esac
ruff check . >&2
ruff format --check . >&2
mypy >&2
# Three processes: many tests wait, for a timeout or a rank. The order of the files puts the many short
# unit tests last, so that the processes end together.
python -m pytest -n 3 --dist loadfile --no-loadscope-reorder "${tier[@]}" "$@"
