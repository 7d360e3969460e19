#!/usr/bin/env bash
# Start a run by `deepspeed`, on this host or on the hosts of a hostfile (by pdsh over ssh).
# Usage: deepspeed.sh [--hostfile FILE] [options of deepspeed] -- [run.yaml] [options of zods.finetune]
#   bash launch/deepspeed.sh --num_gpus 8 -- run.yaml
#   bash launch/deepspeed.sh --hostfile hosts -- run.yaml --lr 1e-3     (hosts: lines "NAME slots=8")
# Environment and exit status: see environment.sh.
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

hostfile="" first=""
for k in "${!launcher[@]}"; do
  case "${launcher[k]}" in
    --hostfile=* | -H=*) hostfile="${launcher[k]#*=}" ;;
    --hostfile | -H) hostfile="${launcher[k + 1]:-}" ;;
  esac
done
if [ -n "$hostfile" ]; then
  # deepspeed itself runs on this host alone where the file does not exist
  first="$(python -m zods.cli.hosts "$hostfile" --cwd "$PWD")" || exit $?
  if [[ " ${launcher[*]}" != *" --master_addr"* ]] && read -r address _ < <(getent ahostsv4 "$first"); then
    launcher+=(--master_addr "$address") # deepspeed would ask the first host for `hostname -I`, whose first address may be another
  fi
fi
# pdsh forwards few variables; deepspeed reads further ones from this file
DS_ENV_FILE="$(mktemp)"
export DS_ENV_FILE
trap 'rm -f "$DS_ENV_FILE"' EXIT
for name in "${forwarded[@]}"; do printf '%s=%s\n' "$name" "${!name}"; done >"$DS_ENV_FILE"
# without this pdsh waits for hours for a host that is gone, after the ranks of the others have ended
export PDSH_SSH_ARGS_APPEND="${PDSH_SSH_ARGS_APPEND:-} -o ServerAliveInterval=30 -o ServerAliveCountMax=4"

run deepspeed "${launcher[@]}" --module zods.finetune "${options[@]}"
finish "$status" "$first"
