#!/usr/bin/env bash
# What wants a GPU, in stages that can be run apart: no network, and at most ten minutes each.
#
#     benchmarks/gpu.sh hour|tests|sanitize|sweep|bench|linear|plots OUT_DIR [arguments of that stage's program]
#     benchmarks/gpu.sh carry FOLDER
#
# hour      what matters most first, each part bounded, in less than ten minutes: some tests, the losses and the
#           linear call at three shapes, the candidates, what only a device can show. A part that has finished
#           is not run again: call it with the same OUT_DIR to go on.
# tests     the test suite on the GPU
# sanitize  compute-sanitizer's memcheck and racecheck over a few of the tests
# sweep     the candidates for the launch table
# bench     the benchmark suite
# linear    the linear call beside its bare products
# plots     tables and plots from what the stages before left in OUT_DIR
# carry     other packages to compare with, as wheels in FOLDER, for a machine without a network
#
# Without a GPU every stage runs dry, in Triton's interpreter on a few numbers: that tests this script and measures
# nothing. PYTHON names the interpreter (default: python3).
set -euo pipefail

if [ $# -lt 2 ]; then
    sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "$0"
    exit 2
fi
stage=$1
if [ "$stage" = carry ]; then
    # Pure Python, a few megabytes: what they need besides is on such machines or is not needed.
    "${PYTHON:-python3}" -m pip download -q --no-deps --only-binary=:all: --python-version 3.12 -d "$2" \
        liger-kernel trl datasets dill multiprocess
    ls -l "$2"
    exit
fi
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

# The shapes that decide: Llama 2 or Mistral, Llama 3, Gemma.
shapes="4096x32000 8192x128256 4096x262144"

# A part of the hour: its name, its seconds, its command. Finished ones leave a mark; others may be cut short.
part() {
    local name=$1 seconds=$2
    shift 2
    if [ -e "$out/$name.done" ]; then
        return
    fi
    echo "== $name: $(date +%T), at most $seconds s"
    if limited "$seconds" "$@" >>"$out/hour.log" 2>&1; then
        touch "$out/$name.done"
    else
        status=$?
        echo "== $name: status $status" # 124: cut short, what it wrote so far is kept
        failed=1
    fi
    tail -n 25 "$out/hour.log"
}

case $stage in
hour)
    cases="both-bfloat16-4096x32000 or both-bfloat16-8192x128256 or both-bfloat16-4096x262144"
    workers=() only="not torch and not integrations"
    if [ -n "$dry" ]; then
        cases="both and 4x300 and deft" only=$few shapes=
    elif "$python" -c 'import xdist' 2>/dev/null; then
        workers=(-n 14 --benchmark-disable)
    fi
    part tests "${TESTS:-110}" "$python" -m pytest -q --everything --tb=short "${workers[@]}" tests/test_launch.py \
        tests/test_accuracy.py tests/test_accuracy_options.py tests/test_eager.py tests/test_predicted.py \
        tests/test_traps.py -k "$only"
    part bench "${BENCH:-100}" "$python" -m pytest -q benchmarks/test_losses.py --records "$out/losses.json" \
        -k "$cases"
    part linear "${LINEAR:-40}" "$python" benchmarks/linear.py --out "$out/linear.json"
    # shellcheck disable=SC2086  # one word a shape
    part sweep "${SWEEP:-150}" "$python" benchmarks/sweep.py --out "$out/sweep.json" ${shapes:+--shapes $shapes}
    part device "${DEVICE:-60}" "$python" -m pytest -q --tb=short tests/test_device.py
    exit "${failed:-0}"
    ;;
linear)
    limited 570 "$python" benchmarks/linear.py --out "$out/linear.json" "$@" 2>&1 | tee "$out/linear.log"
    ;;
tests)
    if [ -n "$dry" ]; then
        set -- tests/test_launch.py -k "$few" "$@"
    elif "$python" -c 'import xdist' 2>/dev/null; then
        set -- -n 8 --benchmark-disable "$@" # most of the time goes into compiling
    fi
    limited 570 "$python" -m pytest -q --everything --ignore=tests/test_machine_code.py "$@" 2>&1 | tee "$out/tests.log"
    ;;
sanitize)
    for tool in memcheck racecheck; do
        if [ -n "$dry" ]; then
            echo "skipped $tool: no GPU"
        elif ! command -v compute-sanitizer >/dev/null; then
            echo "skipped $tool: compute-sanitizer is not installed"
        else
            # Without the caching allocator every tensor ends where its memory ends.
            PYTORCH_NO_CUDA_MEMORY_CACHING=1 limited "${SANITIZE:-280}" compute-sanitizer --tool "$tool" \
                --target-processes application-only --error-exitcode 9 \
                "$python" -m pytest -q --everything tests/test_launch.py -k "$few" "$@" 2>&1 | tee "$out/$tool.log"
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
