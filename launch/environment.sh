# Sourced by the launchers of this folder. It divides their arguments, sets the environment of all ranks, and passes the
# outcome of a run to the scheduler.
#
# Arguments: [options of the launcher] -- [options of zods.finetune]
# Environment, all optional:
#   ZODS_INTERFACE        network interface between the hosts, such as eth0 or ib0, for NCCL and gloo
#   TORCH_EXTENSIONS_DIR  where DeepSpeed's operators are built; give each host a folder of its own
#   ZODS_ENV              names of further variables that ranks on other hosts need, separated by spaces
# Exit status: 0 the run is finished; 75 it was stopped, and the same command with --resume auto continues it; any other
# one: it failed.
set -euo pipefail

launcher=() options=()
usage() { sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0" >&2; exit 2; }
while [ $# -gt 0 ] && [ "$1" != -- ]; do launcher+=("$1"); shift; done
[ $# -gt 1 ] || usage
shift
options=("$@")

if [ -n "${ZODS_INTERFACE:-}" ]; then
  export GLOO_SOCKET_IFNAME="$ZODS_INTERFACE" NCCL_SOCKET_IFNAME="$ZODS_INTERFACE"
fi
# Rank 0 writes the exit status there. Not every launcher passes it on: `deepspeed` returns 0 when its launch.py was killed,
# torchrun returns 1 for any failure.
export ZODS_EXIT_FILE="${TMPDIR:-/tmp}/zods-exit-$(id -u)-$(hostname)-$$-$RANDOM$RANDOM"
forwarded=(ZODS_EXIT_FILE)
for name in GLOO_SOCKET_IFNAME NCCL_SOCKET_IFNAME TORCH_EXTENSIONS_DIR DS_ACCELERATOR OMP_NUM_THREADS PYTHONPATH \
  HF_HOME HF_HUB_OFFLINE HF_DATASETS_CACHE TOKENIZERS_PARALLELISM CUDA_VISIBLE_DEVICES ${ZODS_ENV:-}; do
  if [ -n "${!name:-}" ]; then forwarded+=("$name"); fi
done

python -m zods.comm.build_locks # removes old locks that killed builds left on this host

# run COMMAND...: run it, set `status`, and pass SIGTERM on to it. Bash itself would end and leave it running.
status=0
run() {
  local child
  "$@" &
  child=$!
  trap 'kill -TERM "$child" 2>/dev/null || true' TERM INT
  wait "$child" || status=$?
  while kill -0 "$child" 2>/dev/null; do # the signal ended `wait`
    status=0
    wait "$child" || status=$?
  done
  trap - TERM INT
}

# finish STATUS [HOST]: exit with the status that rank 0 wrote on HOST (default: here), else with the launcher's own.
finish() {
  local said
  if [ -n "${2:-}" ]; then
    said="$(ssh -o BatchMode=yes -o ConnectTimeout=10 "$2" "cat '$ZODS_EXIT_FILE'; rm -f '$ZODS_EXIT_FILE'" 2>/dev/null || true)"
  else
    said="$(cat "$ZODS_EXIT_FILE" 2>/dev/null || true)"
    rm -f "$ZODS_EXIT_FILE"
  fi
  if [ -z "$said" ]; then # rank 0 was killed
    echo "zods: rank 0 ended without a report, see above. If the run had begun, --resume auto continues it." >&2
    said=$(($1 == 0 ? 1 : $1))
  fi
  exit "$said"
}
