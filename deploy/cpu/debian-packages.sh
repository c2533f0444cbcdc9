#!/usr/bin/env bash
# Installs the Debian packages that are missing here: what `make install` needs and what the tests use.
#
#   deploy/cpu/debian-packages.sh            needs root and apt-get; installs only what is missing
#   deploy/cpu/debian-packages.sh --print    prints the command instead
set -euo pipefail

python_will_do() {
    local candidate
    for candidate in python3.11 python3.12 python3.13 python3.14 python3; do
        "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 14))' 2>/dev/null || continue
        "$candidate" -c "$1" 2>/dev/null
        return
    done
    return 1
}

packages=()
python_will_do 'import ensurepip, venv' || packages+=(python3 python3-venv)
python_will_do 'import os, sysconfig; os.stat(os.path.join(sysconfig.get_paths()["include"], "Python.h"))' \
    || packages+=(python3-dev)
command -v g++ > /dev/null || packages+=(g++)
command -v make > /dev/null || packages+=(make)
ldconfig -p | grep -q 'libnuma\.so\.1' || packages+=(libnuma1)
command -v prometheus > /dev/null && command -v promtool > /dev/null || packages+=(prometheus)
command -v prometheus-alertmanager > /dev/null || packages+=(prometheus-alertmanager)
command -v npm > /dev/null || packages+=(nodejs npm)
command -v shellcheck > /dev/null || packages+=(shellcheck)
command -v chromium > /dev/null || packages+=(chromium)
[ -n "$(find /usr/share/fonts -name '*.ttf' -print -quit 2>/dev/null)" ] || packages+=(fonts-dejavu-core)

[ ${#packages[@]} -gt 0 ] || exit 0
if [ "${1:-}" = --print ]; then
    echo "apt-get install --no-install-recommends ${packages[*]}"
    exit 0
fi
if [ "$(id -u)" -ne 0 ] || ! command -v apt-get > /dev/null; then
    echo "missing: ${packages[*]}; as root on Debian: apt-get install --no-install-recommends ${packages[*]}" >&2
    exit 1
fi

# Debian starts services of Prometheus and Alertmanager as soon as they are installed; the tests start their own.
policy=/usr/sbin/policy-rc.d
if [ ! -e $policy ]; then
    printf '#!/bin/sh\nexit 101\n' > $policy
    chmod +x $policy
    trap 'rm -f $policy' EXIT
fi
echo "installing Debian packages: ${packages[*]}"
export DEBIAN_FRONTEND=noninteractive
apt-get -qq update
apt-get -qq install -y --no-install-recommends "${packages[@]}" > /dev/null
case " ${packages[*]} " in
    *" prometheus"*) if [ -d /run/systemd/system ]; then
        systemctl disable --now prometheus prometheus-alertmanager 2> /dev/null || true
    fi ;;
esac
