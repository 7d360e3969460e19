#!/usr/bin/env bash
# The quickstart's job, in an environment that is set up. Usage: train.sh OUTPUT_DIR [options of zods.finetune]
set -euo pipefail
here="$(dirname "${BASH_SOURCE[0]}")"
out="$1"
shift
python "$here/make_data.py" runs/data
export DS_ACCELERATOR=cpu OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 HF_DATASETS_CACHE="$PWD/runs/cache"
port="$(python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')"
deepspeed --num_gpus 2 --master_port "$port" --module zods.finetune \
  --deepspeed_config "$here/config.json" --model "$here/model" --output_dir "$out" \
  --task prompted --template '{text}\nKind: {label}' \
  --train_file runs/data/train.jsonl --validation_file runs/data/validation.jsonl \
  --max_length 64 --max_steps 400 --eval_interval 80 "$@"
