#!/usr/bin/env bash
# with-seaweedfs.sh CMD...: runs CMD with a private, throw-away SeaweedFS in WHARFINGER_TEST_S3_ENDPOINT, _BUCKET,
# _ACCESS_KEY_ID and _SECRET_ACCESS_KEY. Run `tests/install.sh seaweedfs` first.
set -eu

root=$(cd "$(dirname "$0")/.." && pwd)
weed=$root/.tools/seaweedfs/bin/weed
[ -x "$weed" ] && command -v rclone >/dev/null || {
    echo "with-seaweedfs: run tests/install.sh seaweedfs first" >&2
    exit 1
}

dir=$(mktemp -d "${TMPDIR:-/tmp}/wharfinger-seaweedfs.XXXXXX")
server=
port=0
# It makes sockets in /tmp, wherever it is told to be, and leaves them there.
remove_sockets() {
    local number
    for number in $(seq "$port" $((port + 7))); do
        rm -f "/tmp/seaweedfs-"*"-$number.sock"
    done
}
cleanup() {
    # No data to save: the fastest way to stop.
    [ -z "$server" ] || { kill -KILL "$server" && wait "$server"; } 2>/dev/null || true
    rm -rf "$dir"
    remove_sockets
}
trap cleanup EXIT
trap 'exit 129' HUP
trap 'exit 130' INT
trap 'exit 143' TERM

export WHARFINGER_TEST_S3_BUCKET=wharf
export WHARFINGER_TEST_S3_ACCESS_KEY_ID=test-access-key
export WHARFINGER_TEST_S3_SECRET_ACCESS_KEY=test-secret-key
cat >"$dir/s3.json" <<END
{"identities": [{
    "name": "wharfinger",
    "credentials": [{"accessKey": "$WHARFINGER_TEST_S3_ACCESS_KEY_ID", "secretKey": "$WHARFINGER_TEST_S3_SECRET_ACCESS_KEY"}],
    "actions": ["Admin", "Read", "Write", "List", "Tagging"]
}]}
END
mkdir "$dir/data"

make_bucket() {
    # rclone cannot do with a bundle of authorities that the environment names for others.
    env -u AWS_CA_BUNDLE RCLONE_CONFIG=/dev/null RCLONE_CONFIG_TEST_TYPE=s3 RCLONE_CONFIG_TEST_PROVIDER=Other \
        RCLONE_CONFIG_TEST_ENDPOINT=$WHARFINGER_TEST_S3_ENDPOINT \
        RCLONE_CONFIG_TEST_ACCESS_KEY_ID=$WHARFINGER_TEST_S3_ACCESS_KEY_ID \
        RCLONE_CONFIG_TEST_SECRET_ACCESS_KEY=$WHARFINGER_TEST_S3_SECRET_ACCESS_KEY \
        rclone mkdir --retries 1 --low-level-retries 1 --timeout 5s --contimeout 5s "test:$WHARFINGER_TEST_S3_BUCKET" >"$dir/rclone.log" 2>&1
}

# Eight ports below 32768, where no outgoing connection takes them; others if one is taken.
for attempt in 1 2 3 4 5; do
    port=$((20000 + RANDOM % 12000))
    export WHARFINGER_TEST_S3_ENDPOINT=http://127.0.0.1:$port
    "$weed" -logtostderr=true server -dir="$dir/data" -ip=127.0.0.1 -ip.bind=127.0.0.1 \
        -s3 -s3.port=$port -s3.port.grpc=$((port + 1)) -s3.config="$dir/s3.json" -s3.port.iceberg=0 -s3.port.lance=0 \
        -master.port=$((port + 2)) -master.port.grpc=$((port + 3)) -master.telemetry=false -master.volumeSizeLimitMB=1024 \
        -volume.port=$((port + 4)) -volume.port.grpc=$((port + 5)) -volume.max=50 \
        -filer -filer.port=$((port + 6)) -filer.port.grpc=$((port + 7)) >"$dir/server.log" 2>&1 &
    server=$!
    deadline=$((SECONDS + 60))
    until make_bucket; do
        # It has ended, or will not be ready any more.
        if ! kill -0 "$server" 2>/dev/null || [ "$SECONDS" -ge "$deadline" ]; then
            kill -KILL "$server" 2>/dev/null || true
            wait "$server" 2>/dev/null || true
            server=
            remove_sockets
            break
        fi
        sleep 0.1
    done
    [ -z "$server" ] || break
    if [ "$attempt" = 5 ]; then
        tail -n 50 "$dir/server.log" "$dir/rclone.log" >&2
        exit 1
    fi
done

# In a process group of its own, so that a signal to this script ends everything CMD started, and SeaweedFS after it.
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
