#!/usr/bin/env bash
# Set everything up and run the main job end to end, offline: MeZO with a direction per example, on two ranks with ZeRO-3. It
# trains a small pretrained decoder on docstrings and code of Python's standard library. Further arguments
# go to zods.finetune.
. "$(dirname "${BASH_SOURCE[0]}")/setup.sh" report
rm -rf runs/quickstart
bash launch/quickstart/train.sh runs/quickstart --plot "$@"
