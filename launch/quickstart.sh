#!/usr/bin/env bash
# Set everything up and run the main job end to end, offline: two ranks, ZeRO-3, MeZO-SVRG, the anchor in host memory,
# on a small pretrained decoder and the standard library's docstrings. Further arguments go to zods.finetune.
. "$(dirname "${BASH_SOURCE[0]}")/setup.sh" report
rm -rf runs/quickstart
bash launch/quickstart/train.sh runs/quickstart --plot "$@"
