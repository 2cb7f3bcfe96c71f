#!/usr/bin/env bash
# run.sh [TARGET…]: fuzzes each target, or all, for FUZZ_SECONDS seconds. Ends with 1 if one of them finds something;
# the input is then in artifacts/<target>/, and `run.sh <target> <file>` runs it again.
# What is found on the way stays in corpus/<target>/, so the next run goes on from there.
set -eu
[ ! -f "${2:-}" ] || set -- "$1" "$(realpath "$2")"
cd "$(dirname "$0")"
seconds=${FUZZ_SECONDS:-60}

# The product's versions of everything.
[ Cargo.lock -nt ../Cargo.lock ] || cp ../Cargo.lock Cargo.lock
# The environment's flags would take the place of those in .cargo/config.toml.
env -u RUSTFLAGS cargo build --release --target-dir target
bin=target/$(rustc -vV | sed -n 's/^host: //p')/release

if [ -f "${2:-}" ]; then
    exec "$bin/$1" "$2"
fi

# Inputs to begin with: what stands between quotes in the parser's own tests, and the lines of seeds/<target>.
seed() {
    local target=$1 line
    shift
    mkdir -p "corpus/$target" "artifacts/$target"
    {
        [ $# = 0 ] || grep -ohP '"\K(?:[^"\\]|\\.)+(?=")' "$@" || true
        cat "seeds/$target" 2>/dev/null || true
    } | sed 's/\\u{\([0-9a-f]*\)}/\\U\1/g' | sort -u | while IFS= read -r line; do
        printf '%b' "$line" 2>/dev/null >"corpus/$target/seed-$(printf %s "$line" | sha1sum | cut -c-12)"
    done
}
seed block_list ../src/api/block_list.rs
seed client ../src/api/client.rs
seed content_range ../src/api/content_range.rs
seed item_path ../src/api/item_path.rs
seed key_set ../src/papers/key_sets/tests.rs
seed link ../src/papers/links.rs
seed range ../src/api/range.rs
seed token ../src/papers/tokens/tests.rs
seed twirp_json ../src/api/twirp.rs
seed twirp_protobuf

[ $# != 0 ] || set -- $(cd fuzz_targets && ls | sed 's/\.rs$//')
failed=
for target; do
    log=artifacts/$target/log
    # Slow is a finding, too: no request may keep a thread for seconds.
    if nice "$bin/$target" -max_total_time="$seconds" -timeout=5 -print_final_stats=1 -artifact_prefix="artifacts/$target/" \
        "corpus/$target" 2>"$log" >/dev/null; then
        runs=$(sed -n 's/^stat::number_of_executed_units: *//p' "$log")
        echo "$target: ok, $runs runs in $seconds s, $(sed -n 's/.*\(cov: [0-9]* ft: [0-9]*\).*/\1/p' "$log" | tail -1)"
    else
        failed=yes
        grep -av '^#' "$log" | tail -20
        echo "$target: FOUND SOMETHING, see fuzz/artifacts/$target"
    fi
done
[ -z "$failed" ]
