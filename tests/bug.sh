#!/usr/bin/env bash
# Shows a bug of BUGS.md: runs a test of a later commit on an old one, where it fails.
#     bash tests/bug.sh OLD NEW PATH... -- ARGUMENTS
# OLD is the commit with the bug; the paths are taken from NEW; the arguments are those of `cargo test`.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

old=$1 new=$2
shift 2
paths=()
while [[ $1 != -- ]]; do
    paths+=("$1")
    shift
done
shift

scratch=$(realpath "${CARGO_TARGET_DIR:-target}")/bugs
mkdir -p "$scratch"
git worktree add --quiet --force --detach "$scratch/source" "$old"
trap 'git worktree remove --force "$scratch/source"' EXIT
git -C "$scratch/source" checkout --quiet "$new" -- "${paths[@]}"
cd "$scratch/source"
# The times of the files say nothing about what was built last.
find . -name '*.rs' -exec touch {} +
export CARGO_TARGET_DIR=$scratch/target
cargo test --no-run "$@"
if cargo test "$@"; then
    echo "it passes: the bug is not there" >&2
    exit 1
fi
echo "it fails, as BUGS.md says"
