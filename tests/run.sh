#!/usr/bin/env bash
# Runs every check of the project. Installs what it needs where that is missing: redis-server, Python with redis-py
# (whose locks must exclude ours), what the TLS features compile against, and a Valkey server of the tests' own.
#     bash tests/run.sh                  on the redis-server that is installed, and on Valkey 9.1
#     bash tests/run.sh --all-servers    then on Redis 6.2 and 7.4, too
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# Most of the time goes into compiling: what only debuggers and the next change would need is left out.
export CARGO_INCREMENTAL=${CARGO_INCREMENTAL:-0} CARGO_PROFILE_DEV_DEBUG=${CARGO_PROFILE_DEV_DEBUG:-line-tables-only}

heading() { printf '\n== %s\n' "$*"; }

# Debian's packages, asked for together. Services that they bring are not started: every test starts its own servers.
install() {
    if [[ $(id -u) -ne 0 ]] || ! command -v apt-get >/dev/null; then
        echo "Please install: $*" >&2
        exit 1
    fi
    export DEBIAN_FRONTEND=noninteractive
    apt-get update -qq
    RUNLEVEL=1 apt-get install -y -qq --no-install-recommends "$@"
}

missing=()
command -v redis-server >/dev/null && command -v redis-cli >/dev/null || missing+=(redis-server)
command -v cc >/dev/null || missing+=(build-essential)
command -v pkg-config >/dev/null || missing+=(pkg-config)
pkg-config --exists openssl 2>/dev/null || missing+=(libssl-dev)
python3 -c 'import venv, ensurepip' 2>/dev/null || missing+=(python3 python3-venv)
if [[ ${#missing[@]} -gt 0 ]]; then
    heading "install ${missing[*]}"
    install "${missing[@]}"
fi

python="${CARGO_TARGET_DIR:-$PWD/target}/redis-py"
redis_py=7.4.1
if ! "$python/bin/python" -c "import redis; assert redis.__version__ == '$redis_py'" 2>/dev/null; then
    heading "redis-py $redis_py"
    python3 -m venv --clear "$python"
    "$python/bin/python" -m pip install --quiet --disable-pip-version-check "redis==$redis_py"
fi
export TENURE_PYTHON="$python/bin/python"

# Runs a command with the tests' servers being these, and all of that version: whoever starts another fails.
on() {
    local name=$1 server=redis-server
    shift
    [[ $name == "$installed" ]] || server=$(bash tests/server.sh "$name")
    TENURE_SERVER=$server TENURE_SERVER_VERSION=${name/-/ } "$@"
}

installed=redis-$(redis-server --version | sed -E 's/.* v=([0-9]+\.[0-9]+)\..*/\1/')
if [[ -n ${CI:-} && $installed != redis-7.0 ]]; then
    echo "README says that every run is on Redis 7.0, and not $installed" >&2
    exit 1
fi
other=valkey-9.1
if [[ $(uname -sm) != "Linux x86_64" ]]; then
    echo "There is no Valkey server for $(uname -sm) here: all tests run on $installed." >&2
    other=$installed
fi

heading "format"
cargo fmt --all --check

heading "clippy"
cargo clippy --workspace --all-targets --all-features -- -D warnings

heading "documentation"
RUSTDOCFLAGS="-D warnings" cargo doc --package tenure --no-deps --all-features

heading "tests, no features, on $other"
# Features concern no server, so this run is also the one on another server. All but those that take longest: the soaks,
# the model, the contest of processes, the random histories, the large numbers, requests that are late by up to 30 s,
# runtimes and connections that fall silent, and the examples in the documentation.
on "$other" cargo test --package tenure --no-default-features --lib --tests -- \
    --skip no_two_hold_a_lock_while_nodes_freeze_die_and_forget \
    --skip no_guard_is_lost_while_nodes_are_away_one_after_another \
    --skip two_hundred_tasks_in_four_processes_never_hold_one_lock_together \
    --skip nothing_breaks:: --skip each_safeguard_is_needed:: --skip each_bound_is_tight:: \
    --skip simulation::no_history --skip simulation::a_server_that_forgets --skip every_history --skip differential:: \
    --skip a_hundred_thousand_waiters_come_and_go --skip ten_thousand_ --skip late:: --skip listening:: --skip larger::

heading "tests, all features, on $installed"
on "$installed" cargo test --package tenure --all-features

# With both TLS features rediss:// uses native-tls; here it uses rustls.
heading "TLS, feature rustls, on $installed"
on "$installed" cargo test --package tenure --features rustls --test tls

scratch=$(mktemp -d)
trap 'kill "${server:-}" 2>/dev/null || true; rm -rf "$scratch"' EXIT
redis-server --port 0 --unixsocket "$scratch/socket" --save "" --dir "$scratch" >"$scratch/log" &
server=$!
for _ in {1..100}; do
    redis-cli -s "$scratch/socket" ping >/dev/null 2>&1 && break
    sleep 0.1
done
for example in quickstart lost_in_select scope hand_over watchdog; do
    heading "example $example"
    env -u REDIS_URL cargo run --quiet --example "$example"
    heading "example $example, on a server"
    REDIS_URL="redis+unix://$scratch/socket" cargo run --quiet --example "$example"
done

if [[ ${1:-} == --all-servers ]]; then
    for name in redis-6.2 redis-7.4; do
        heading "tests on $name"
        on "$name" cargo test --package tenure --all-features --lib --test combined --test it --test quorum \
            --test topologies --test watchdog
    done
fi

heading "all passed in $SECONDS s"
