#!/usr/bin/env bash
# Removes one safeguard after the other, each by a patch in tests/mutants, and shows which test notices.
#     bash tests/mutants.sh             all of them; half an hour on two cores
#     bash tests/mutants.sh fence 07    those whose names contain one of these
#     bash tests/mutants.sh --check     only whether the patches still apply
#
# The first line of a patch is `# caught by: ` and what `cargo test` needs to run the test. That test must pass on the
# sources as they are, and fail with the patch. Everything happens in a copy of the sources, with one build directory.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# How long a test may take. A test that hangs without a safeguard notices as well.
limit=${TENURE_MUTANT_SECONDS:-240}
# Much as in tests/run.sh, but here each change is small and each program is linked again and again.
export CARGO_INCREMENTAL=1 CARGO_PROFILE_DEV_DEBUG=0 CARGO_TERM_COLOR=never
# For what the random histories find.
export TENURE_HISTORIES=${TENURE_HISTORIES:-2000}

if [[ ${1:-} == --check ]]; then
    for patch in tests/mutants/*.patch; do
        git apply --check "$patch" || { echo "$patch no longer applies: CONTRIBUTING.md, Safeguards" >&2; exit 1; }
        head -1 "$patch" | grep -q '^# caught by: --' || { echo "$patch names no test" >&2; exit 1; }
    done
    echo "$(find tests/mutants -name '*.patch' | wc -l) mutants apply"
    exit 0
fi

patches=()
for patch in tests/mutants/*.patch; do
    [[ $# -eq 0 ]] && patches+=("$PWD/$patch")
    for name in "$@"; do
        if [[ $patch == *"$name"* ]]; then
            patches+=("$PWD/$patch")
            break
        fi
    done
done

scratch=$(realpath "${CARGO_TARGET_DIR:-target}")/mutants
export CARGO_TARGET_DIR=$scratch/target
mkdir -p "$scratch/source"
find "$scratch/source" -mindepth 1 -delete
git ls-files -z --cached --others --exclude-standard | tar --null --files-from - --create --ignore-failed-read |
    tar --directory "$scratch/source" --extract
cd "$scratch/source"
# The patches are for this directory, even if it lies within a repository.
export GIT_CEILING_DIRECTORIES=$scratch

# The arguments of `cargo test` before and after `--`.
arguments() {
    local line
    line=$(head -1 "$1")
    read -ra before <<<"${line#\# caught by: }"
    after=()
    for i in "${!before[@]}"; do
        if [[ ${before[i]} == -- ]]; then
            after=("${before[@]:i+1}")
            before=("${before[@]:0:i}")
            break
        fi
    done
}

# try: builds and runs the test of a patch, and sets `outcome`.
try() {
    # Cargo compares times, and what was mutated may have the time that it had before.
    touch src/lib.rs
    if ! cargo test --quiet --package tenure --no-run "${before[@]}" >"$scratch/log" 2>&1; then
        outcome="does not compile"
    elif cargo test --config "target.'cfg(all())'.runner = ['timeout', '--kill-after', '10', '$limit']" \
        --package tenure "${before[@]}" -- "${after[@]}" >"$scratch/log" 2>&1; then
        outcome="does not exist"
        grep -qE '^test result: ok\. [1-9]' "$scratch/log" && outcome="passes"
    elif grep -qE 'exit status: (124|137)|signal: 9' "$scratch/log"; then
        outcome="hangs"
    else
        outcome="fails"
    fi
}

wrong=0
declare -A passes
printf '%-58s %-8s %s\n' "without this safeguard" "the test" "test"
for patch in "${patches[@]}"; do
    arguments "$patch"
    name=$(basename "$patch" .patch)
    what="${before[*]}${after[*]:+ -- ${after[*]}}"
    if [[ -z ${passes[$what]:-} ]]; then
        try
        if [[ $outcome != passes ]]; then
            printf '%-58s %-8s %s\n' "(none is missing)" "$outcome" "$what"
            cp "$scratch/log" "$scratch/$name.log"
            wrong=$((wrong + 1))
            continue
        fi
        passes[$what]=yes
    fi
    git apply "$patch"
    try
    git apply --reverse "$patch"
    printf '%-58s %-8s %s\n' "$name" "$outcome" "$what"
    cp "$scratch/log" "$scratch/$name.log"
    [[ $outcome == fails || $outcome == hangs ]] || wrong=$((wrong + 1))
done
if [[ $wrong -gt 0 ]]; then
    echo "$wrong of ${#patches[@]} were not noticed; what the tests have printed is in $scratch" >&2
    exit 1
fi
echo "all ${#patches[@]} were noticed"
