#!/usr/bin/env bash
# SPDX-License-Identifier: MIT OR Apache-2.0
# Breaks the checksum code in one way after another, in a copy, and runs the tests that must see it.
# Prints which did; fails if a mutant lives.
set -eu
cd "$(dirname "$0")/.."

copy=${CARGO_TARGET_DIR:-target}/mutants
mkdir -p "$copy"
copy=$(cd "$copy" && pwd)
export CARGO_TARGET_DIR="$copy/target"
lived=0

fresh() {
    git ls-files -z | xargs -0 cp --parents -pt "$copy/"
}

# mutant NAME FILE FROM TO TARGET FILTER...: FROM, a line's part, becomes TO; tests of TARGET run.
mutant() {
    name=$1 file=$2 from=$3 to=$4 target=$5
    shift 5
    fresh
    FROM=$from TO=$to perl -0pi -e '
        s/\Q$ENV{FROM}\E/$ENV{TO}/ == 1 or die "not there: $ENV{FROM}\n"' "$copy/$file"
    (cd "$copy" && cargo test --quiet --test "$target" --no-run)
    if (cd "$copy" && cargo test --test "$target" -- "$@") >"$copy/log" 2>&1; then
        echo "LIVES   $name"
        lived=1
    else
        echo "caught  $name, by $(sed -n 's/^test \(.*\) \.\.\. FAILED$/\1/p' "$copy/log" | tr '\n' ' ')"
    fi
}

csum=src/bpf/csum.h
entry=src/bpf/entry.bpf.c
rows='checksums options'

# shellcheck disable=SC2086
mutant "the pseudo-header's length is skipped" $csum \
    'csum_apply(check, csum_fold((__u64)bytes + length));' \
    'csum_apply(check, csum_fold(bytes));' packets $rows
# shellcheck disable=SC2086
mutant "bytes at odd offsets are not swapped" $csum \
    'offset & 1 ? __builtin_bswap16(folded) : folded' 'folded' packets $rows
# shellcheck disable=SC2086
mutant "the carry is forgotten" $csum \
    'sum = (sum & 0xffffffff) + (sum >> 32);' 'return sum;' packets $rows
# shellcheck disable=SC2086
mutant "XDP: partial is taken for complete" $csum \
    'return CHECKSUM_PARTIAL;' 'return CHECKSUM_COMPLETE;' packets $rows
# shellcheck disable=SC2086
mutant "XDP: complete is taken for partial" $csum \
    'if (csum_fold(pseudo) != check)
		return CHECKSUM_COMPLETE;' \
    'if (csum_fold(pseudo) != check)
		return CHECKSUM_PARTIAL;' packets $rows
mutant "TC: partial is taken for complete" $entry \
    'CHECKSUM_PARTIAL :' 'CHECKSUM_COMPLETE :' netns actions
# shellcheck disable=SC2086
mutant "TC: complete is taken for partial" $entry \
    'CHECKSUM_COMPLETE;
}' 'CHECKSUM_PARTIAL;
}' packets $rows
exit $lived
