# Sourced by the other scripts of this folder. It makes a virtual environment in .venv with the pinned packages, and builds
# the native parts once. It changes nothing outside the project, except that as root on Debian or Ubuntu it installs missing
# system packages with apt.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# Usage: . launch/setup.sh EXTRAS [--async_io]    (--async_io builds DeepSpeed's operator for NVMe, too)
extras="${1:?extras of the package to install, such as report}"

say() { echo "zods: $*" >&2; }

# Images of containers set this variable. With it every process compiles torch, DeepSpeed and transformers anew, which takes
# more than half of the time of a start.
unset PYTHONDONTWRITEBYTECODE

python="${PYTHON:-python3}"
command -v "$python" >/dev/null || { say "there is no $python. Install Python 3.11 or newer, or set PYTHON to its command."; exit 1; }
version="$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
  { say "$python is Python $version; 3.11 or newer is needed. Set PYTHON to its command."; exit 1; }

# A compiler and Python's headers for the kernels and DeepSpeed's operators, libaio for NVMe offload.
has_libaio() { g++ -x c++ - -laio -o /dev/null 2>/dev/null <<<$'#include <libaio.h>\nint main() { return io_setup(0, nullptr); }'; }
has_headers() { "$python" -c 'import os, sysconfig, sys; sys.exit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))'; }
has_venv() { "$python" -c 'import ensurepip, venv' 2>/dev/null; }
find_missing() {
  missing=()
  command -v g++ >/dev/null || missing+=(g++)
  has_libaio || missing+=(libaio-dev)
  has_headers || missing+=("python$version-dev")
  has_venv || missing+=("python$version-venv")
}
find_missing
if [ ${#missing[@]} -gt 0 ]; then
  if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    say "installing ${missing[*]}"
    # The lock serialises two clones that are set up at the same time: apt-get does not wait for another's lists.
    DEBIAN_FRONTEND=noninteractive flock /var/lib/apt sh -c 'apt-get update -qq && apt-get install -y -qq "$@"' - "${missing[@]}" >/dev/null ||
      { say "apt-get could not install ${missing[*]}. Install them, then run this again."; exit 1; }
    find_missing
    if [ ${#missing[@]} -gt 0 ]; then
      say "$python still does not find ${missing[*]}. Set PYTHON to a Python with headers and ensurepip, such as /usr/bin/python3."
      exit 1
    fi
  else
    say "system packages are missing. Debian, Ubuntu: sudo apt-get install -y ${missing[*]}   (elsewhere: the corresponding packages). Then run this again."
    exit 1
  fi
fi

# The file .venv/zods-installing exists while packages are installed. It marks an interrupted installation, which is not used.
unfinished=.venv/zods-installing
if [ -e "$unfinished" ]; then
  say "making .venv anew: its installation was interrupted"
  rm -rf .venv
elif [ -e .venv ] && ! .venv/bin/python -c 'import pip, sys; sys.exit(sys.prefix == sys.base_prefix or sys.version_info < (3, 11))' 2>/dev/null; then
  say "making .venv anew: its Python does not run, has no pip, or is older than 3.11"
  rm -rf .venv
fi
if [ ! -e .venv ]; then
  mkdir .venv
  touch "$unfinished"
  "$python" -m venv .venv
fi

# .venv/zods-installed holds a digest of the pins, and then the installed extras, one per line.
install() {
  # Bytecode is compiled and kept when a module is first imported: compiling all of torch takes longer than installing it.
  .venv/bin/python -m pip install -q --disable-pip-version-check --no-compile "$@" || {
    say "installing failed, see above. Remove the cause, and run this again."
    exit 1
  }
}
pins="$(cat constraints.txt pyproject.toml launch/lock.txt | sha256sum | cut -d' ' -f1)"
installed="$(cat .venv/zods-installed 2>/dev/null || true)"
if [ "$(head -n1 <<<"$installed")" != "$pins" ]; then installed="$pins"; fi
if ! grep -qx "$extras" <<<"$installed"; then
  say "installing the pinned packages into .venv (a few minutes)"
  .venv/bin/python launch/lock.py select "$extras" >.venv/requirements.txt
  touch "$unfinished"
  install --require-hashes --no-deps -r .venv/requirements.txt
  install -c constraints.txt torch # see launch/lock.py
  install --no-deps --no-build-isolation -e .
  printf '%s\n%s\n' "$installed" "$extras" >.venv/zods-installed
fi
rm -f "$unfinished"
# What the tests on several hosts need, in network namespaces, and numactl for ranks that are bound to cores. Without it, or
# without root, they are skipped.
add_hosts() {
  local path="$PATH:/usr/sbin:/sbin" wanted=()
  PATH="$path" command -v ip >/dev/null || wanted+=(iproute2)
  command -v ssh >/dev/null || wanted+=(openssh-client)
  command -v pdsh >/dev/null || wanted+=(pdsh)
  command -v numactl >/dev/null || wanted+=(numactl)
  PATH="$path:.venv/openssh/usr/sbin" sshd -V >/dev/null 2>&1 || [ $? -eq 1 ] || wanted+=(libwrap0) # sshd's own library
  if [ ${#wanted[@]} -gt 0 ]; then
    DEBIAN_FRONTEND=noninteractive flock /var/lib/apt sh -c 'apt-get update -qq && apt-get install -y -qq "$@"' - "${wanted[@]}"
  fi
  # the program alone, in .venv: its package would start a server on this machine
  if [ ! -e .venv/openssh ] && ! PATH="$path" command -v sshd >/dev/null; then
    mkdir .venv/openssh
    (cd .venv/openssh && { apt-get download openssh-server || { apt-get update && apt-get download openssh-server; }; } &&
      dpkg -x openssh-server_*.deb . && rm openssh-server_*.deb)
  fi
}
if [ "$extras" = test ] && [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
  add_hosts >/dev/null 2>&1 || say "the tests on several hosts are skipped: pdsh, sshd or numactl could not be had"
fi
. .venv/bin/activate

export DS_ACCELERATOR="${DS_ACCELERATOR:-cpu}"
export TORCH_EXTENSIONS_DIR="$PWD/.venv/torch_extensions"
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
python launch/build_ops.py ${2:+"$2"}
