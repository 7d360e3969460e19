#!/usr/bin/env bash
# Start a run by Open MPI's `mpirun`. The ranks find each other through mpi4py.
# Usage: mpirun.sh [options of mpirun] -- [run.yaml] [options of zods.finetune]
#   bash launch/mpirun.sh -n 16 --host node1:8,node2:8 -- run.yaml
# Start it on the first of the hosts. Environment and exit status: see environment.sh.
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

passed=()
for name in "${forwarded[@]}"; do passed+=(-x "$name"); done
run mpirun --bind-to none "${passed[@]}" "${launcher[@]}" "$(command -v python)" -m zods.finetune "${options[@]}"
finish "$status"
