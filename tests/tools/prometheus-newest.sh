#!/usr/bin/env bash
# Unpacks the newest Prometheus and promtool that Debian has into a folder, without installing anything.
#
#   tests/tools/prometheus-newest.sh FOLDER
#
# Downloads once, 7 s; leaves FOLDER/usr/bin/prometheus and FOLDER/usr/bin/promtool. apt is run with lists, cache and
# sources of its own, so that the machine's are not touched. The mirror is the one that the machine's own sources name.
# Debian's unstable comes first; where its programs do not run (they may need a newer C library), Debian 13's.
set -euo pipefail

[ $# -ge 1 ] || { sed -n '2,4s/^# \{0,1\}//p' "$0" >&2; exit 2; }
mkdir -p "$1"
folder=$(cd "$1" && pwd)

if [ -x "$folder/usr/bin/prometheus" ] && [ -x "$folder/usr/bin/promtool" ]; then
    echo "$folder/usr/bin"
    exit 0
fi
for program in apt-get dpkg; do
    command -v $program > /dev/null || { echo "prometheus-newest: $program is missing; this needs Debian" >&2; exit 1; }
done

mirror=$(find /etc/apt/sources.list /etc/apt/sources.list.d -type f -exec cat {} + 2> /dev/null \
    | sed -nE 's/^(URIs:|deb( \[[^]]*\])?) *(https?:[^ ]*\/debian\/?)( .*)?$/\3/p' | sed -n 1p) || true
mirror=${mirror:-http://deb.debian.org/debian}

work=$(mktemp -d -t prometheus-newest.XXXXXX)
trap 'rm -rf "$work"' EXIT

unpack() {  # SUITE
    local area=$work/$1 package
    mkdir -p "$area"/{lists/partial,cache/archives/partial,parts,debs,root}
    echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $mirror $1 main" > "$area/sources.list"
    : > "$area/status"
    local options=(
        -o "Dir::Etc::SourceList=$area/sources.list" -o "Dir::Etc::SourceParts=$area/parts"
        -o "Dir::State::Lists=$area/lists" -o "Dir::Cache=$area/cache" -o "Dir::State::status=$area/status"
        -o APT::Sandbox::User=root -o Acquire::Retries=3 -o Acquire::Languages=none
    )
    apt-get -qq "${options[@]}" update || return
    cd "$area/debs"
    apt-get -qq "${options[@]}" download prometheus || return
    # From Debian 13 on promtool is a package of its own.
    apt-get -qq "${options[@]}" download promtool 2> /dev/null || true
    for package in ./*.deb; do
        dpkg -x "$package" "$area/root" || return
    done
    "$area/root/usr/bin/promtool" --version > /dev/null && "$area/root/usr/bin/prometheus" --version > /dev/null
}

for suite in sid trixie; do
    if unpack "$suite"; then
        mkdir -p "$folder/usr/bin"
        mv "$work/$suite"/root/usr/bin/prom* "$folder/usr/bin/"
        echo "$folder/usr/bin"
        exit 0
    fi
done
echo "prometheus-newest: no Prometheus of Debian's sid or trixie could be had and runs here" >&2
exit 1
