#!/usr/bin/env bash
# Runs every check of the project. Installs what is missing: redis-server, Python with redis-py (whose locks must
# exclude ours), what the TLS features compile against, PostgreSQL for a recipe, and a Valkey server for the tests
# alone.
#     bash tests/run.sh                  on the installed redis-server, and on Valkey 9.1
#     bash tests/run.sh --all-servers    and then on Redis 6.2 and 7.4
#
# Most tests wait for something, and use about a tenth of the time of two cores. So they run in seven lanes beside each
# other, three tests at a time in each, from when their programs are compiled. Behind them, at the lowest priority, runs
# what needs the processor and measures no time: clippy, and the searches (the models, the simulations). Last come the
# programs that need the machine for themselves, beside what else cargo does.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# Incremental compilation would only help the next change, and line numbers a backtrace.
export CARGO_INCREMENTAL=${CARGO_INCREMENTAL:-0} CARGO_PROFILE_DEV_DEBUG=${CARGO_PROFILE_DEV_DEBUG:-false}
export RUST_TEST_THREADS=${RUST_TEST_THREADS:-3}

# Headings show the seconds since the run, or the lane, began.
heading() { printf '\n== %s (%s s)\n' "$*" "$SECONDS"; }

# install PACKAGES: installs Debian packages, if there are any. Their services are not started, as every test starts its
# own servers.
install() {
    [[ $# -gt 0 ]] || return 0
    if [[ $(id -u) -ne 0 ]] || ! command -v apt-get >/dev/null; then
        echo "Please install: $*" >&2
        exit 1
    fi
    heading "install $*"
    export DEBIAN_FRONTEND=noninteractive
    apt-get update -qq
    RUNLEVEL=1 apt-get install -y -qq --no-install-recommends "$@"
}

scratch=$(mktemp -d)
shopt -s nullglob
lanes=()
cleanup() {
    local lane
    # Each lane is a process group. What has ended by itself can't be killed.
    for lane in "${lanes[@]}"; do
        # apt-get ends what it has begun, or packages would be half installed.
        [[ ${lane#* } != servers ]] || wait "${lane%% *}" || true
        kill -- "-${lane%% *}" 2>/dev/null || true
    done
    [[ -z ${server:-} ]] || kill "$server" 2>/dev/null || true
    rm -rf "$scratch"
}
trap cleanup EXIT

# compile SET ARGUMENTS: compiles tests by `cargo test`, or examples, and remembers where each program is, unless
# another set has it. A warning is an error: clippy sees one set of features.
compile() {
    local set=$1
    shift
    cargo "$@" --message-format json | python3 -c '
import json, sys
known = {line.split()[1] for path in sys.argv[1:] for line in open(path)}
warnings = 0
for line in sys.stdin:
    unit = json.loads(line)
    if unit["reason"] == "compiler-message":
        print(unit["message"]["rendered"], file=sys.stderr)
        warnings += 1
    is_program = unit.get("executable") and (unit["profile"]["test"] or "example" in unit["target"]["kind"])
    if is_program and unit["executable"] not in known:
        print(unit["target"]["name"], unit["executable"])
sys.exit(warnings > 0)
' "$scratch"/*.programs >"$scratch/$set.new"
    mv "$scratch/$set.new" "$scratch/$set.programs"
}

# program SET NAME: prints where it is.
program() {
    awk -v program="$2" '$1 == program { print $2; found = 1 } END { exit !found }' "$scratch/$1.programs" ||
        { echo "there is no program $2" >&2; return 1; }
}

# run SET SERVER PROGRAM ARGUMENTS: runs one of them. It finds only this server, and fails if it starts another version.
run() {
    local set=$1 server=$2 program=$3 path binary=redis-server
    shift 3
    path=$(program "$set" "$program")
    [[ $server == "$installed" ]] || binary=$(bash tests/server.sh "$server")
    printf '\n-- %s, %s, on %s\n' "$program" "$set" "$server"
    TENURE_SERVER=$binary TENURE_SERVER_VERSION=${server/-/ } "$path" "$@"
}

# lane NAME COMMAND: runs it beside the others. join_lanes waits for all, and shows what they have printed.
lane() {
    local name=$1
    shift
    set -m
    (
        set -e
        SECONDS=0
        "$@"
        heading "$name: passed"
    ) >"$scratch/$name.log" 2>&1 </dev/null &
    set +m
    lanes+=("$! $name")
}

join_lanes() {
    local failed=() lane
    for lane in "${lanes[@]}"; do
        wait "${lane%% *}" || failed+=("${lane#* }")
        heading "lane ${lane#* }"
        cat "$scratch/${lane#* }.log"
    done
    lanes=()
    [[ ${#failed[@]} -eq 0 ]] || { echo "failed: ${failed[*]}" >&2; exit 1; }
}

# What compiling needs.
missing=()
command -v cc >/dev/null || missing+=(build-essential)
command -v pkg-config >/dev/null || missing+=(pkg-config)
pkg-config --exists openssl 2>/dev/null || missing+=(libssl-dev)
command -v python3 >/dev/null || missing+=(python3)
install "${missing[@]}"

# What only tests need: it is installed while their programs are compiled.
python="${CARGO_TARGET_DIR:-$PWD/target}/redis-py"
export TENURE_PYTHON="$python/bin/python"
other=valkey-9.1
[[ $(uname -sm) == "Linux x86_64" ]] || other=

servers() {
    local missing=() redis_py=7.4.1
    command -v redis-server >/dev/null && command -v redis-cli >/dev/null || missing+=(redis-server)
    # For a recipe.
    command -v initdb >/dev/null || compgen -G '/usr/lib/postgresql/*/bin/initdb' >/dev/null || missing+=(postgresql)
    python3 -c 'import venv, ensurepip' 2>/dev/null || missing+=(python3-venv)
    install "${missing[@]}"
    if ! "$TENURE_PYTHON" -c "import redis; assert redis.__version__ == '$redis_py'" 2>/dev/null; then
        heading "redis-py $redis_py"
        python3 -m venv --clear "$python"
        "$TENURE_PYTHON" -m pip install --quiet --disable-pip-version-check "redis==$redis_py"
    fi
    [[ -z $other ]] || bash tests/server.sh "$other"
}
lane servers servers

heading "format"
cargo fmt --all --check

heading "mutants"
bash tests/mutants.sh --check

# Many operations at a time: they take the whole machine, and would be late beside others.
many=(--skip a_hundred_thousand_ --skip ten_thousand_ --skip thousands_of_ --skip a_lock_costs_)

# it SET SERVER ARGUMENTS: runs the program `it`, less the conformance suites, and keeps what it reports.
it() {
    local set=$1 server=$2
    shift 2
    TENURE_LOG="$scratch/reported.$set" run "$set" "$server" it --skip conformance:: "${many[@]}" "$@"
}

# conformance SET SERVER: the suites wait for ttls, each on a server of its own: six at a time.
conformance() {
    TENURE_LOG="$scratch/reported.$1.conformance.$2" run "$1" "$2" it conformance:: --test-threads 6
}

promises() {
    it all "$installed"
}

programs() {
    conformance all "$installed"
    run all "$installed" observing
    # By native-tls: with both TLS features, rediss:// uses that.
    run all "$installed" tls
    for program in watchdog permits exclusion; do run all "$installed" "$program" "${many[@]}"; done
}

quorums() {
    conformance all "$other"
    for program in quorum seeds turns properties chaos_checker; do
        run all "$installed" "$program" "${many[@]}"
    done
}

# The crate's own tests that need a server: what tests/internals.rs runs.
internals() {
    run all "$installed" tenure --ignored
    run all "$installed" topologies "${many[@]}"
}

# Left out on the other server, in this lane and the next: programs that say nothing about a server, or no more than
# these do (seeds, turns, soak, exclusion, many, tls, chaos), and the tests that take longest: many operations at a
# time, requests that are late by up to 30 s, runtimes and connections that fall silent.
other_server() {
    it redis "$other" --skip late:: --skip listening::
    run redis "$other" combined "${many[@]}"
    run all "$installed" combined "${many[@]}"
    run redis "$other" watchdog "${many[@]}"
}

other_internals() {
    conformance redis "$other"
    # What differs where there is no TLS.
    run redis "$other" tenure store::redis::
    run redis "$other" tenure --ignored --skip differential::
}

# What the other client does on several servers; the command: its own tests, and those on servers; the recipes.
other_client() {
    for program in topologies quorum; do run redis "$other" "$program" "${many[@]}"; done
    for program in seeds turns; do run redis "$installed" "$program"; done
    for program in tenure run others; do run others "$installed" "$program"; done
    for program in once_per_period leader migrations fenced_write{,_postgresql} orders own_tests prometheus; do
        run others "$installed" "$program"
    done
}

clippy() {
    renice -n 19 "$BASHPID" >/dev/null
    cargo clippy --workspace --all-targets --all-features -- -D warnings
}

# What else cargo does.
builds() {
    renice -n 19 "$BASHPID" >/dev/null
    heading "the command, with no more features than it asks for"
    cargo check --package tenure-cli
    heading "documentation"
    RUSTDOCFLAGS="-D warnings" cargo doc --package tenure --no-deps --all-features
    heading "examples in the documentation"
    cargo test "${packages[@]}" --doc
}

# soak SECONDS ARGUMENTS: runs soaks, each for so long.
soak() {
    TENURE_SOAK_SECONDS=$1 run all "$installed" soak "${@:2}"
}

no_feature() {
    renice -n 19 "$BASHPID" >/dev/null
    # The random histories are the same with all features.
    TENURE_HISTORIES=20 run none "$installed" tenure
}

searches() {
    renice -n 19 "$BASHPID" >/dev/null
    run all "$installed" tenure
    for program in model line_model shared_model several_model; do run all "$installed" "$program"; done
}

# All packages at once, although only some of their programs: then what they depend on has the same features, and is
# compiled once.
packages=(--package tenure --package tenure-cli --package tenure-examples --package tenure-recipes --all-features)
programs=(--lib --test it)
for program in tests/*.rs; do programs+=(--test "$(basename "$program" .rs)"); done
heading "compile, all features"
compile all test --no-run "${packages[@]}" "${programs[@]}"

join_lanes
installed=redis-$(redis-server --version | sed -E 's/.* v=([0-9]+\.[0-9]+)\..*/\1/')
if [[ -n ${CI:-} && $installed != redis-7.0 ]]; then
    echo "README says that every run is on Redis 7.0, and this is $installed" >&2
    exit 1
fi
if [[ -z $other ]]; then
    echo "There is no Valkey server for $(uname -sm) here: all tests run on $installed." >&2
    other=$installed
fi

heading "the first lanes begin"
for name in promises programs quorums internals searches; do lane "$name" "$name"; done
# The run on the other server is the one on redis-rs, which is the client where fred is not enabled.
heading "compile, feature redis, beside the first lanes"
compile redis test --no-run --package tenure --no-default-features --features redis --lib --test it --test quorum \
    --test topologies --test combined --test watchdog --test seeds --test turns
for name in other_server other_internals; do lane "$name" "$name"; done
heading "compile the command, the recipes and the examples"
compile others test --no-run "${packages[@]}" --bins --tests
# As programs, and not as tests of which they have none.
compile examples build "${packages[@]}" --examples
lane other_client other_client
heading "compile, no feature"
compile none test --no-run --package tenure --no-default-features --lib
# Where it is the only TLS feature, rediss:// uses it.
heading "compile, feature rustls"
compile rustls test --no-run --package tenure --features rustls --test tls
heading "all lanes: about four minutes"
for name in no_feature clippy; do lane "$name" "$name"; done
join_lanes

heading "no secret in what was reported"
for reported in "$scratch"/reported.*; do
    echo "$(wc -l <"$reported") lines, of them $(grep -ac obtained "$reported") of locks that were obtained"
    # What tests/it/secrets.rs plants, and what looks like a random token.
    if grep -aE 'planted|(^|[^0-9a-f])[0-9a-f]{32}([^0-9a-f]|$)' "$reported"; then
        exit 1
    fi
done

heading "tests that need the machine for themselves, but for what has the lowest priority"
lane builds builds
for program in it quorum combined watchdog; do
    run all "$installed" "$program" a_hundred_thousand_ ten_thousand_ thousands_of_ a_lock_costs_
done
run all "$installed" many

# The rest waits more than it works, so all of it runs at once. What is rare takes soaks longer to find
# (CONTRIBUTING.md).
lane soak soak 30 --skip tasks_and
lane "soak, tasks and memory" soak 10 tasks_and
lane "tls, feature rustls" run rustls "$installed" tls
# The examples: by themselves, and on a server.
redis-server --port 0 --unixsocket "$scratch/socket" --save "" --dir "$scratch" >"$scratch/log" &
server=$!
for _ in {1..100}; do
    redis-cli -s "$scratch/socket" ping >/dev/null 2>&1 && break
    sleep 0.1
done
for name in minimal quickstart lost_in_select scope hand_over reader_writer permits watchdog; do
    example=$(program examples "$name")
    lane "example $name" env -u REDIS_URL "$example"
    lane "example $name, on a server" env REDIS_URL="redis+unix://$scratch/socket" "$example"
done
join_lanes

if [[ ${1:-} == --all-servers ]]; then
    for name in redis-6.2 redis-7.4; do
        heading "tests on $name"
        run all "$name" tenure --ignored
        for program in combined it quorum topologies watchdog; do
            run all "$name" "$program"
        done
    done
fi

heading "all passed"
