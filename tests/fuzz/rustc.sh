#!/bin/sh
# Compiles as rustc does, for `cargo xtask fuzz` (cargo's RUSTC_WRAPPER). Of the crates whose branches are
# worth to be counted, it has them counted: libFuzzer looks at all counters after each input, so that those
# of a whole TLS library would cost more than most inputs do. What is built for build scripts is not told that
# it is for fuzzing, and is left alone.
set -eu
compiler=$1
shift
crate=
fuzzing=
previous=
for argument; do
    case "$previous $argument" in
    "--crate-name "*) crate=$argument ;;
    "--cfg fuzzing") fuzzing=yes ;;
    esac
    previous=$argument
done
case $fuzzing:$crate in
yes:common | yes:roamcast | yes:migkick | \
    yes:minicbor | yes:roxmltree | yes:serde_json | yes:toml | yes:toml_parser)
    # As `cargo fuzz` has it, without a sanitizer: all of it is safe Rust.
    set -- "$@" \
        -Cpasses=sancov-module \
        -Cllvm-args=-sanitizer-coverage-level=4 \
        -Cllvm-args=-sanitizer-coverage-inline-8bit-counters \
        -Cllvm-args=-sanitizer-coverage-pc-table \
        -Cllvm-args=-sanitizer-coverage-trace-compares \
        -Cllvm-args=-simplifycfg-branch-fold-threshold=0
    ;;
esac
exec "$compiler" "$@"
