#!/usr/bin/env bash
# Start a run by `torchrun`: on one host, or the same command on each host with its --node_rank.
# Usage: torchrun.sh [options of torchrun] -- [run.yaml] [options of zods.finetune]
#   bash launch/torchrun.sh --nproc_per_node 8 -- run.yaml
#   bash launch/torchrun.sh --nnodes 2 --node_rank 0 --master_addr node1 --nproc_per_node 8 -- run.yaml
# Environment and exit status: see environment.sh. On hosts without rank 0 the status is torchrun's own.
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

run torchrun "${launcher[@]}" --module zods.finetune "${options[@]}"
if [ ! -e "$ZODS_EXIT_FILE" ] && [[ " --node_rank=${PET_NODE_RANK:-0} ${launcher[*]} " =~ \ --node[_-]rank[\ =]([1-9]) ]]; then
  exit "$status"
fi
finish "$status"
