#!/usr/bin/env bash
# The GPU check, from a plain checkout: nothing is installed, no network is used, under ten minutes on an H100.
# Needs Python 3.12, torch 2.11, triton 3.6, transformers 5.17, a C compiler (Triton's), and of pyproject.toml's packages
# all but gguf; pytest. pytest-xdist, pytest-timeout and matplotlib are used where they are there.
#   benchmarks/gpu.sh                                   on a GPU: every step, the most telling first, 560 s together
#   RESUME=1 benchmarks/gpu.sh                          once more: the steps that did not end well, of these what is left
#   STEPS="kernels latency" benchmarks/gpu.sh           some of the steps; the time is theirs
#   STEPS=batch BATCH="1 16" PEERS="plain" SHAPES=1b benchmarks/gpu.sh
#   STEPS=tests TESTS=tests/kernels/test_norm.py benchmarks/gpu.sh
#   RESULTS=/tmp/out benchmarks/gpu.sh                  tables, logs and pictures elsewhere than benchmarks/results
#   DEVICE=cpu SHAPES=tiny SMALL=1 benchmarks/gpu.sh    to see that it runs; kernels through Triton's interpreter
# Every result is written as it comes. A step that fails or overruns its share does not keep the next from running; the
# end of the output sums up all of them, and the exit status says whether all went well.
set -uo pipefail
cd "$(dirname "$0")/.."
STEPS=${STEPS:-answers latency batch throughput prefill tests kernels sampling pdl load}
PYTHON=${PYTHON:-python3} DEVICE=${DEVICE:-cuda} SMALL=${SMALL:-} RESUME=${RESUME:-} SHAPES=${SHAPES:-}
RESULTS=${RESULTS:-benchmarks/results} SECONDS_IN_ALL=${SECONDS_IN_ALL:-560} JOBS=${JOBS:-$(nproc)}
BATCH=${BATCH:-$([ -n "$SMALL" ] && echo 1 3 || echo 1 16 64 4 256)} PEERS=${PEERS-plain static dynamic torch continuous}
DTYPE=${DTYPE:-$([ "$DEVICE" = cpu ] && echo float32 || echo bfloat16)}
BACKEND=${BACKEND:-$([ "$DEVICE" = cpu ] && echo reference || echo triton)}
export PYTHONPATH=src:kernels/torch-ext:tests${PYTHONPATH:+:$PYTHONPATH} HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1
[ "$DEVICE" = cpu ] && export TRITON_INTERPRET=1
mkdir -p "$RESULTS"
status=0 summary=$RESULTS/summary.txt revision=$(git rev-parse HEAD 2>/dev/null || echo unknown)
: >"$summary"
if [ -n "$RESUME" ]; then
    for step in $STEPS; do
        grep -qsx "$step $revision" "$RESULTS/done" || rest="${rest:-} $step"
    done
    STEPS=${rest:-}
fi

# limited SECONDS COMMAND...: interrupted then, so that it can say how far it came, and killed 20 s later
limited() { timeout --signal=INT --kill-after=20 "$@"; }
has() { "$PYTHON" -c "import $1" 2>/dev/null; }
# budget STEP LEFT: seconds for a step: a share of those that are left, all of them for the last
budget() {
    local percent=100
    [ "$2" -gt 1 ] && case $1 in
    answers) percent=16 ;;  # of 560 s: 90
    latency) percent=34 ;;  # of 470 s: 160
    batch) percent=26 ;;    # of 310 s: 80
    throughput) percent=40 ;; # of 230 s: 90
    prefill) percent=20 ;;
    tests) percent=60 ;;
    kernels) percent=60 ;;
    *) percent=50 ;;
    esac
    local seconds=$(((SECONDS_IN_ALL - SECONDS) * percent / 100))
    echo $((seconds > 1 ? seconds : 1))
}
# check SECONDS NAME PATHS...: pytest
check() {
    local seconds=$1 name=$2 plugins=() result verdicts
    shift 2
    has xdist && plugins+=(-p xdist.plugin -n "$JOBS" --dist worksteal)
    has pytest_timeout && plugins+=(-p pytest_timeout --timeout 100)
    PYTEST_DISABLE_PLUGIN_AUTOLOAD=1 limited "$seconds" "$PYTHON" -m pytest -v --tb=short -p no:cacheprovider \
        "${plugins[@]}" "$@" >"$RESULTS/$name.log" 2>&1
    result=$?
    verdicts=$(grep -aE '(::.* |\] )(PASSED|FAILED|ERROR|SKIPPED)( |$)' "$RESULTS/$name.log")
    {
        grep -oE '(PASSED|FAILED|ERROR|SKIPPED)' <<<"$verdicts" | sort | uniq -c | tr -s ' \n' ' '
        echo "(status $result; all in $name.log)"
        grep -E '(::.* |\] )(FAILED|ERROR)' <<<"$verdicts" | cut -c1-140 | head -n 15
        grep -aE '^(E  |!!)' "$RESULTS/$name.log" | cut -c1-140 | uniq | head -n 10
    } >>"$summary"
    return $result
}
# suite SECONDS NAME SHAPES...: of gpu.py
suite() {
    local seconds=$1 name=$2 result
    shift 2
    # shellcheck disable=SC2086  # lists of words
    limited $((seconds + 5)) "$PYTHON" benchmarks/gpu.py "$name" --device "$DEVICE" --dtype "$DTYPE" \
        --backend "$BACKEND" --shapes ${SHAPES:-$@} --batch $BATCH --peers $PEERS --seconds "$seconds" \
        ${SMALL:+--small --rounds 2} ${RESUME:+--resume} --output "$RESULTS/gpu.jsonl" \
        2>"$RESULTS/$name.log" >"$RESULTS/$name.md"
    result=$?
    sed -n '/^In short/,$p' "$RESULTS/$name.md" | sed 1d | cut -c1-320 | head -n 24 >>"$summary"
    [ $result = 0 ] || tail -n 5 "$RESULTS/$name.log" | cut -c1-240 >>"$summary"
    return $result
}

"$PYTHON" - "$DEVICE" <<'PYTHON' || exit
import sys, torch, triton, transformers
print(sys.version.split()[0], "torch", torch.__version__, "triton", triton.__version__, "transformers", transformers.__version__)
if sys.argv[1] == "cuda":
    print(torch.cuda.get_device_name(), f"{torch.cuda.mem_get_info()[0] / 2**30:.0f} GiB free")
PYTHON

left=$(wc -w <<<"$STEPS")
for step in $STEPS; do
    started=$SECONDS seconds=$(budget "$step" "$left")
    case $step in
    # tiny models of every family on the device, beside transformers there
    answers) check "$seconds" answers tests/parity/test_same_answers.py tests/parity/test_captured_steps.py ;;
    latency) suite "$seconds" latency 8b 0.6b 1b ;;
    batch) suite "$seconds" batch 1b 0.6b 8b ;;
    throughput) suite "$seconds" throughput 0.6b ;;
    prefill) suite "$seconds" prefill 1b 8b ;;
    # every kernel on the device against its reference, and a model of them op by op
    tests)
        # shellcheck disable=SC2086
        check "$seconds" tests ${TESTS:-tests/kernels tests/parity/test_triton_backend.py} \
            --ignore tests/kernels/test_ahead_of_time.py
        ;;
    kernels)
        # many processes compile side by side, each in one thread
        OMP_NUM_THREADS=1 TORCHINDUCTOR_COMPILE_THREADS=1 \
            limited $((seconds + 10)) "$PYTHON" benchmarks/kernels.py --device "$DEVICE" --dtype "$DTYPE" --jobs $(((JOBS + 1) / 2)) \
            ${SMALL:+--small} ${RESUME:+--resume} --seconds "$seconds" --output "$RESULTS/kernels.csv" \
            --pictures "$RESULTS/kernels" 2>"$RESULTS/kernels.log" >>"$summary"
        ;;
    sampling) suite "$seconds" sampling 1b ;;
    pdl)
        limited "$seconds" "$PYTHON" benchmarks/pdl.py --device "$DEVICE" --dtype "$DTYPE" ${SMALL:+--small} \
            --output "$RESULTS/gpu.jsonl" 2>"$RESULTS/pdl.log" | tail -n +6 >>"$summary"
        ;;
    load) suite "$seconds" load 1b ;;
    *)
        echo "no step is called $step; there are answers, tests, kernels, latency, batch, throughput, prefill, sampling, pdl, load" >&2
        exit 2
        ;;
    esac
    result=$?
    if [ $result = 0 ]; then
        echo "$step $revision" >>"$RESULTS/done"
    else
        status=1
    fi
    left=$((left - 1))
    echo "== $step: $((SECONDS - started)) s, status $result" | tee -a "$summary"
done
if [ -f "$RESULTS/gpu.jsonl" ]; then
    drawing=$(has matplotlib && echo "--pictures $RESULTS/gpu")
    # shellcheck disable=SC2086
    "$PYTHON" -m benchmarks.report "$RESULTS/gpu.jsonl" $drawing >"$RESULTS/gpu.md" || status=1
fi
head -c 11000 "$summary"
exit $status
