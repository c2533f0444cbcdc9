#!/usr/bin/env bash
# Load the dashboards into a real Grafana and ask it for them: for machines with Docker, curl and jq.
#
#   grafana/smoke.sh [GRAFANA_VERSION]          with a Grafana and a Prometheus of its own in containers
#   GRAFANA_URL=http://HOST:3000 grafana/smoke.sh   against a Grafana that has the dashboards already
#
# GRAFANA_AUTH=user:password where anonymous viewers may not read.
set -euo pipefail
cd "$(dirname "$0")"

version=${1:-13.2.1}
work=

main() {
    for program in curl jq; do
        command -v "$program" > /dev/null || fail "$program is not installed"
    done
    [[ -n ${GRAFANA_URL:-} ]] || start
    await_health
    echo "Grafana $(ask /api/health | jq -r .version) at $GRAFANA_URL"
    local file
    for file in dashboards/*.json; do
        check_board "$file"
    done
    check_data_source
    echo "all there"
}

start() {
    command -v docker > /dev/null || fail "neither GRAFANA_URL nor docker"
    work=$(mktemp -d)
    trap stop EXIT
    write_provisioning
    docker network create "$(name net)" > /dev/null
    docker run --detach --name "$(name prometheus)" --network "$(name net)" --network-alias prometheus \
        prom/prometheus:v3.5.0 > /dev/null
    docker run --detach --name "$(name grafana)" --network "$(name net)" --publish 127.0.0.1::3000 \
        --env GF_AUTH_ANONYMOUS_ENABLED=true --env GF_AUTH_ANONYMOUS_ORG_ROLE=Viewer \
        --volume "$work/provisioning:/etc/grafana/provisioning:ro" \
        --volume "$PWD/dashboards:/var/lib/grafana/dashboards:ro" "grafana/grafana:$version" > /dev/null
    GRAFANA_URL=http://$(docker port "$(name grafana)" 3000/tcp | head -n 1)
}

stop() {
    docker rm --force "$(name grafana)" "$(name prometheus)" > /dev/null 2>&1 || true
    docker network rm "$(name net)" > /dev/null 2>&1 || true
    rm -rf "$work"
}

name() {
    echo "sluice-smoke-$$-$1"
}

write_provisioning() {
    mkdir -p "$work"/provisioning/{datasources,dashboards}
    cat > "$work/provisioning/datasources/prometheus.yml" << 'YAML'
apiVersion: 1
datasources:
  - {name: Prometheus, uid: prometheus, type: prometheus, access: proxy, url: "http://prometheus:9090", isDefault: true}
YAML
    cat > "$work/provisioning/dashboards/sluice.yml" << 'YAML'
apiVersion: 1
providers:
  - {name: sluice, folder: Sluice, type: file, options: {path: /var/lib/grafana/dashboards}}
YAML
    chmod -R a+rX "$work"
}

await_health() {
    local tried
    for tried in {1..60}; do
        if [[ $(ask /api/health 2> /dev/null | jq -r .database) == ok ]]; then
            return
        fi
        sleep 1
    done
    fail "$GRAFANA_URL/api/health is not ok after $tried s"
}

# A board is found by its uid, has all panels after Grafana migrated it, and is listed under its tag.
check_board() {
    local uid wanted found
    uid=$(jq -r .uid "$1")
    wanted=$(jq '[.panels[] | (.panels // [])[], .] | map(select(.type != "row")) | length' "$1")
    found=$(ask "/api/dashboards/uid/$uid" |
        jq '[.dashboard.panels[] | (.panels // [])[], .] | map(select(.type != "row")) | length')
    [[ $found == "$wanted" ]] || fail "$uid: $found panels instead of $wanted"
    ask "/api/search?tag=sluice" | jq -e --arg uid "$uid" 'any(.[]; .uid == $uid)' > /dev/null ||
        fail "$uid is not found by the tag sluice"
    echo "$uid: $found panels"
}

# The first data source of type prometheus answers a query through Grafana.
check_data_source() {
    local uid body
    uid=$(data_source)
    body=$(jq -n --arg uid "$uid" '{from: "now-5m", to: "now", queries: [{refId: "A", expr: "vector(1)", instant: true,
        intervalMs: 15000, maxDataPoints: 100, datasource: {type: "prometheus", uid: $uid}}]}')
    ask /api/ds/query --header 'Content-Type: application/json' --data "$body" |
        jq -e '.results.A.frames | length > 0' > /dev/null || fail "data source $uid does not answer vector(1)"
    echo "data source $uid answers"
}

data_source() {
    # A viewer may not list data sources; the provisioned one has a known uid.
    ask /api/datasources 2> /dev/null | jq -er 'map(select(.type == "prometheus"))[0].uid' 2> /dev/null ||
        echo prometheus
}

ask() {
    local path=$1
    shift
    curl --silent --show-error --fail --noproxy '*' --max-time 20 ${GRAFANA_AUTH:+--user "$GRAFANA_AUTH"} "$@" \
        "$GRAFANA_URL$path"
}

fail() {
    echo "$1" >&2
    exit 1
}

main
