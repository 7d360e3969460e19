#!/usr/bin/env bash
# Set everything up and check on this machine's GPU what the tests cannot show without one: see benchmarks/gpu_check.py.
# After the set-up it takes less than 8 minutes. Writes runs/gpu_check.json. Further arguments go to gpu_check.py.
. "$(dirname "${BASH_SOURCE[0]}")/setup.sh" test --async_io
python benchmarks/gpu_check.py --output runs/gpu_check.json "$@"
