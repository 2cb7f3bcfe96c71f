#!/usr/bin/env bash
# Does a known vulnerability concern what we use? Asks nothing of the network, but a clone of
# https://github.com/rustsec/advisory-db: at WHARFINGER_ADVISORY_DB, or at .tools/advisory-db if there is one.
set -eu
cd "$(dirname "$0")/.."

db=${WHARFINGER_ADVISORY_DB:-.tools/advisory-db}
if ! [ -d "$db/crates" ]; then
    if [ -n "${WHARFINGER_ADVISORY_DB:-}" ]; then
        echo "WHARFINGER_ADVISORY_DB is no clone of the advisory database: $db" >&2
        exit 1
    fi
    echo 'Advisories were not looked up: no database at WHARFINGER_ADVISORY_DB, see CONTRIBUTING.md.'
    exit
fi
# The name that cargo-deny looks for, made of the database's URL.
mkdir -p .tools/advisory-dbs
ln -sfn "$(realpath "$db")" .tools/advisory-dbs/advisory-db-3157b0e258782691
.tools/cargo/bin/cargo-deny --frozen check advisories
