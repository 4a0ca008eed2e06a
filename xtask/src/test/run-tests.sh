# Runs modules of tests one after the other, each with the time of the first argument, and marks where
# each begins and ends. For each: module, program, number of tests, paths of the tests.
deadline=$1; shift
while [ $# -gt 0 ]; do
    name=$1 program=$2 count=$3; tests=("${@:4:count}"); shift $((3 + count))
    printf '==> %s\n' "$name"
    SECONDS=0
    timeout --kill-after=5 "$deadline" "$program" "${tests[@]}" --exact --show-output --test-threads 1 </dev/null
    printf '\n<== %s %s %s\n' "$name" "$?" "$SECONDS"
done
