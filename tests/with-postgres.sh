#!/usr/bin/env bash
# with-postgres.sh CMD...: runs CMD with a private, throw-away Postgres in WHARFINGER_TEST_POSTGRES_URL.
# Run tests/install.sh first.
set -eu

root=$(cd "$(dirname "$0")/.." && pwd)
export PATH="$PATH:/usr/sbin:/sbin"
bin=$(readlink -f "$root/.tools/postgres-bin") && [ -x "$bin/initdb" ] && [ -x "$root/.tools/node/bin/node" ] || {
    echo "with-postgres: run tests/install.sh first" >&2
    exit 1
}

dir=$(mktemp -d "${TMPDIR:-/tmp}/wharfinger-postgres.XXXXXX")
cleanup() {
    # No data to save: the fastest way to stop.
    [ ! -f "$dir/data/postmaster.pid" ] || as_postgres "$bin/pg_ctl" -D "$dir/data" -m immediate stop >/dev/null || true
    rm -rf "$dir"
}
trap cleanup EXIT
trap 'exit 129' HUP
trap 'exit 130' INT
trap 'exit 143' TERM

# Postgres refuses to run as root.
if [ "$(id -u)" = 0 ]; then
    user=wharfinger-test
    id "$user" >/dev/null 2>&1 || useradd --system --no-create-home --shell /usr/sbin/nologin "$user" 2>/dev/null \
        || id "$user" >/dev/null # another run was quicker
    chown "$user" "$dir"
    as_postgres() { (cd "$dir" && runuser -u "$user" -- "$@"); }
else
    as_postgres() { (cd "$dir" && "$@"); }
fi

as_postgres "$bin/initdb" -D "$dir/data" -U postgres --auth=trust --encoding=UTF8 --no-locale --no-sync >"$dir/initdb.log" 2>&1 || {
    cat "$dir/initdb.log" >&2
    exit 1
}

# Below 32768, where no outgoing connection takes ports; another one if it is taken.
for attempt in 1 2 3 4 5 6 7 8 9 10; do
    port=$((20000 + RANDOM % 12000))
    if as_postgres "$bin/pg_ctl" -D "$dir/data" -w -l "$dir/data/server.log" -o "-p $port \
        -c listen_addresses=127.0.0.1 -c unix_socket_directories='' -c max_connections=300 -c fsync=off" start >/dev/null 2>&1; then
        break
    fi
    if [ "$attempt" = 10 ] || ! grep -q 'could not bind' "$dir/data/server.log"; then
        cat "$dir/data/server.log" >&2
        exit 1
    fi
done

export WHARFINGER_TEST_POSTGRES_URL=postgres://postgres@127.0.0.1:$port
export WHARFINGER_TEST_NODE=$root/.tools/node/bin/node

# In a process group of its own, so that a signal to this script ends everything CMD started, and Postgres after it.
set -m
"$@" &
child=$!
set +m
stop() {
    trap '' HUP INT TERM
    kill -TERM -- "-$child" 2>/dev/null || true
    wait "$child" || true
    exit "$1"
}
trap 'stop 129' HUP
trap 'stop 130' INT
trap 'stop 143' TERM
status=0
wait "$child" || status=$?
exit "$status"
