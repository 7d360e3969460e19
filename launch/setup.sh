# Sourced by the scripts beside it: a virtual environment in .venv with the pinned packages, and the native parts built once.
# Sets nothing outside the project, except that as root on Debian or Ubuntu it installs missing system packages with apt.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
extras="${1:?extras of the package to install, such as report}"

say() { echo "zods: $*" >&2; }

python="${PYTHON:-python3}"
"$python" - <<'CHECK' || { say "Python 3.11 or newer is needed; set PYTHON to its command."; exit 1; }
import sys
sys.exit(sys.version_info < (3, 11))
CHECK

# A compiler and Python's headers for the kernels and DeepSpeed's operators, libaio for NVMe offload.
packages=""
command -v g++ >/dev/null || packages+=" g++"
[ -e /usr/include/libaio.h ] || packages+=" libaio-dev"
"$python" -c 'import os, sysconfig, sys; sys.exit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))' || packages+=" python3-dev"
"$python" -c 'import ensurepip, venv' 2>/dev/null || packages+=" python3-venv"
if [ -n "$packages" ]; then
  if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    say "installing$packages"
    { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq $packages; } >/dev/null
  else
    say "system packages are missing. Debian, Ubuntu: sudo apt-get install -y$packages   (then run this again)"
    exit 1
  fi
fi

[ -x .venv/bin/python ] || "$python" -m venv .venv
wanted="$(cat constraints.txt pyproject.toml | sha256sum | cut -d' ' -f1) $extras"
if [ "$(cat .venv/zods-installed 2>/dev/null)" != "$wanted" ]; then
  say "installing the pinned packages into .venv (a few minutes)"
  # torch first: what is then asked of it by the others is already there
  .venv/bin/python -m pip install -q --disable-pip-version-check -c constraints.txt torch
  .venv/bin/python -m pip install -q --disable-pip-version-check -c constraints.txt -e ".[$extras]"
  echo "$wanted" >.venv/zods-installed
fi
. .venv/bin/activate

export DS_ACCELERATOR="${DS_ACCELERATOR:-cpu}"
export TORCH_EXTENSIONS_DIR="$PWD/.venv/torch_extensions"
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
python launch/build_ops.py
