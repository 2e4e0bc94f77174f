#!/usr/bin/env bash
# What wants a GPU, in stages that can be run apart: no network, and at most ten minutes each.
#
#     benchmarks/gpu.sh tests|sanitize|sweep|bench|plots OUT_DIR [arguments of that stage's program]
#
# tests     the test suite on the GPU
# sanitize  compute-sanitizer's memcheck and racecheck over a few of the tests
# sweep     the candidates for the launch table
# bench     the benchmark suite
# plots     tables and plots from what the stages before left in OUT_DIR
#
# Without a GPU every stage runs dry, in Triton's interpreter on a few numbers: that tests this script and measures
# nothing. PYTHON names the interpreter (default: python3).
set -euo pipefail

if [ $# -lt 2 ]; then
    sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "$0"
    exit 2
fi
stage=$1
mkdir -p "$2"
out=$(cd "$2" && pwd)
shift 2
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1

dry=
if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "no GPU: dry run"
    dry=1
    export TRITON_INTERPRET=1 DEFT_KERNELS_BENCH_TINY=1
fi

# Seconds, then the command. pytest stops on the interrupt and writes what it has; ten seconds later it is ended.
limited() { timeout --signal=INT --kill-after=10 "$@"; }

few="test_rows_off_a_boundary and 3-False-False or test_split_rows and deft-plain-2"

case $stage in
tests)
    if [ -n "$dry" ]; then
        set -- tests/test_launch.py -k "$few" "$@"
    elif "$python" -c 'import xdist' 2>/dev/null; then
        set -- -n 8 "$@" # most of the time goes into compiling
    fi
    limited 570 "$python" -m pytest -q --ignore=tests/test_compiled.py "$@" 2>&1 | tee "$out/tests.log"
    ;;
sanitize)
    for tool in memcheck racecheck; do
        if [ -n "$dry" ]; then
            echo "skipped $tool: no GPU"
        elif ! command -v compute-sanitizer >/dev/null; then
            echo "skipped $tool: compute-sanitizer is not installed"
        else
            # Without the caching allocator every tensor ends where its memory ends.
            PYTORCH_NO_CUDA_MEMORY_CACHING=1 limited 280 compute-sanitizer --tool "$tool" \
                --target-processes application-only --error-exitcode 9 \
                "$python" -m pytest -q tests/test_launch.py -k "$few" "$@" 2>&1 | tee "$out/$tool.log"
        fi
    done
    ;;
sweep)
    limited 570 "$python" benchmarks/sweep.py --out "$out/sweep.json" "$@" 2>&1 | tee "$out/sweep.log"
    ;;
bench)
    limited 570 "$python" -m pytest -q benchmarks/test_losses.py --records "$out/losses.json" "$@" 2>&1 |
        tee "$out/bench.log"
    ;;
plots)
    "$python" benchmarks/report.py --results "$out" --out "$out/benchmarks.md" "$@"
    ;;
*)
    echo "$0: no stage named '$stage'" >&2
    exit 2
    ;;
esac
