#!/usr/bin/env bash
# The GPU check, from a plain checkout: nothing is installed, no network is used, under ten minutes on an H100.
# Needs Python 3.12, torch 2.11, triton 3.6, transformers 5.17, a C compiler (Triton's), and of pyproject.toml's packages
# all but gguf and llguidance; pytest. pytest-xdist and pytest-timeout are used where they are there.
#   benchmarks/gpu.sh                                   on a GPU: every step, the most telling first, 560 s together
#   RESUME=1 benchmarks/gpu.sh                          once more: the steps that did not end well, of these what is left
#   RESUME=FOLDER RESULTS=OTHER benchmarks/gpu.sh       the same, going on from the results in another folder
#   STEPS="kernels latency" benchmarks/gpu.sh           some of the steps; the time is theirs
#   STEPS=batch BATCH="1 16" PEERS="plain" SHAPES=1b benchmarks/gpu.sh
#   STEPS=tests TESTS=tests/kernels/test_norm.py benchmarks/gpu.sh
#   DEVICE=cpu SHAPES=tiny SMALL=1 benchmarks/gpu.sh    to see that it runs; kernels through Triton's interpreter
# Every result is written as it comes, into five files in RESULTS: gpu.jsonl (all rows), gpu.md (their tables), log.txt
# (what everybody said), summary.txt, done (the steps that ended well). A step that fails or overruns its share does not
# keep the next from running. The end of the output says what became of each step, and what was wrong first; the exit
# status says whether all went well. Pictures: python -m benchmarks.report RESULTS/gpu.jsonl --pictures FOLDER
set -uo pipefail
cd "$(dirname "$0")/.."
STEPS=${STEPS:-answers latency batch throughput prefill tests kernels sampling pdl load}
PYTHON=${PYTHON:-python3} DEVICE=${DEVICE:-cuda} SMALL=${SMALL:-} RESUME=${RESUME:-} SHAPES=${SHAPES:-}
RESULTS=${RESULTS:-benchmarks/results} SECONDS_IN_ALL=${SECONDS_IN_ALL:-560} JOBS=${JOBS:-$(nproc)}
BATCH=${BATCH:-$([ -n "$SMALL" ] && echo 1 3 || echo 1 16 64 4 256)} PEERS=${PEERS-plain static dynamic torch continuous}
DTYPE=${DTYPE:-$([ "$DEVICE" = cpu ] && echo float32 || echo bfloat16)}
BACKEND=${BACKEND:-$([ "$DEVICE" = cpu ] && echo reference || echo triton)}
export PYTHONPATH=src:kernels/torch-ext:tests${PYTHONPATH:+:$PYTHONPATH} HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1
export HANDLOOM_TEST_DEVICE=$DEVICE
[ "$DEVICE" = cpu ] && export TRITON_INTERPRET=1
MOST_LOGGED=${MOST_LOGGED:-4000000} # bytes of a step
mkdir -p "$RESULTS"
log=$RESULTS/log.txt summary=$RESULTS/summary.txt verdicts=()
revision=$(git rev-parse HEAD 2>/dev/null || echo unknown)
[ -d "$RESUME" ] && ! [ "$RESUME" -ef "$RESULTS" ] && cp "$RESUME"/gpu.jsonl "$RESUME"/done "$RESULTS"
: >"$summary"
[ -n "$RESUME" ] || : >"$log"
for step in $STEPS; do
    case $step in
    answers | latency | batch | throughput | prefill | tests | kernels | sampling | pdl | load) ;;
    *)
        echo "no step is called $step; there are answers, latency, batch, throughput, prefill, tests, kernels, sampling, pdl, load" >&2
        exit 2
        ;;
    esac
    [ -n "$RESUME" ] && grep -qsx "$step $revision" "$RESULTS/done" || rest="${rest:-} $step"
done
STEPS=${rest:-}

# limited SECONDS COMMAND...: interrupted then, so that it can say how far it came, and killed 15 s later
limited() { timeout --signal=INT --kill-after=15 "$@"; }
has() { "$PYTHON" -c "import $1" 2>/dev/null; }
# budget STEP LEFT: seconds for a step: a share of those that are left, all of them for the last
budget() {
    local percent=100
    [ "$2" -gt 1 ] && case $1 in
    answers) percent=20 ;;  # of 560 s: 112
    latency) percent=34 ;;  # of 450 s: 150
    batch) percent=26 ;;    # of 300 s: 78
    throughput) percent=40 ;; # of 220 s: 88
    prefill) percent=20 ;;
    tests) percent=60 ;;
    kernels) percent=60 ;;
    *) percent=50 ;;
    esac
    echo $(((SECONDS_IN_ALL - SECONDS) * percent / 100))
}
# logged COMMAND...: what it says to the end of the log, the middle left out of very much
logged() {
    local result size
    "$@" >"$log.step" 2>&1
    result=$?
    size=$(wc -c <"$log.step")
    if [ "$size" -gt $MOST_LOGGED ]; then
        { head -c $((MOST_LOGGED / 2)) && echo && echo "[of $size bytes the middle is left out]"; } <"$log.step"
        tail -c $((MOST_LOGGED / 2)) "$log.step"
    else
        cat "$log.step"
    fi >>"$log"
    return $result
}
# check SECONDS PATHS...: pytest
check() {
    local seconds=$1 plugins=() result
    shift
    has xdist && plugins+=(-p xdist.plugin -n "$JOBS" --dist worksteal)
    has pytest_timeout && plugins+=(-p pytest_timeout --timeout 100)
    PYTEST_DISABLE_PLUGIN_AUTOLOAD=1 logged limited "$seconds" "$PYTHON" -m pytest -v --tb=short -p no:cacheprovider \
        --maxfail 100 "${plugins[@]}" "$@"
    result=$?
    grep -aE '(::.* |\] )(PASSED|FAILED|ERROR|SKIPPED)( |$)' "$log.step" >"$log.verdicts"
    {
        grep -oE '(PASSED|FAILED|ERROR|SKIPPED)' "$log.verdicts" | sort | uniq -c | tr -s ' \n' ' '
        echo
        grep -E '(::.* |\] )(FAILED|ERROR)' "$log.verdicts" | cut -c1-140 | head -n 15
    } >>"$summary"
    [ $result = 0 ] || {
        grep -E '(::.* |\] )(FAILED|ERROR)' "$log.verdicts"
        grep -aE '^(E  |!!|ERROR)' "$log.step"
    } | uniq | head -n 8 >"$log.wrong"
    return $result
}
# suite SECONDS NAMES SHAPES...: of gpu.py
suite() {
    local seconds=$1 name=$2 result
    shift 2
    # shellcheck disable=SC2086  # lists of words
    logged limited $((seconds + 5)) "$PYTHON" benchmarks/gpu.py $name --device "$DEVICE" --dtype "$DTYPE" \
        --backend "$BACKEND" --shapes ${SHAPES:-$@} --batch $BATCH --peers $PEERS --seconds "$seconds" \
        ${SMALL:+--small --rounds 2} ${RESUME:+--resume} --output "$RESULTS/gpu.jsonl"
    result=$?
    sed -n '/^In short/,$p' "$log.step" | sed 1d | grep -aE '^[a-z]+: |^failed|^no time' | cut -c1-260 | head -n 24 >>"$summary"
    [ $result = 0 ] || grep -aE '^(failed|no time)' "$log.step" >"$log.wrong"
    return $result
}
# script SECONDS NAME ARGUMENTS...: another of benchmarks/
script() {
    local seconds=$1 name=$2 result
    shift 2
    logged limited "$seconds" "$PYTHON" "benchmarks/$name.py" --device "$DEVICE" --dtype "$DTYPE" ${SMALL:+--small} \
        --output "$RESULTS/gpu.jsonl" "$@"
    result=$?
    sed -n '/^kernel  \|^| case/,$p' "$log.step" | cut -c1-180 | head -n 40 >>"$summary"
    [ $result = 0 ] || sed -n '/^kernel  /,$p' "$log.step" | grep -aE ': handloom: |did not suffice' >"$log.wrong"
    return $result
}
# tell STEP SECONDS STATUS: what became of it
tell() {
    local verdict="$1: ok, $2 s"
    case $3 in
    0) ;;
    none) verdict="$1: NOT BEGUN, the time is over" ;;
    124 | 137) verdict="$1: OUT OF TIME after $2 s, what was done is kept" ;;
    *) verdict="$1: FAILED after $2 s, status $3" ;;
    esac
    if [ "$3" != 0 ] && [ "$3" != none ]; then
        [ -s "$log.wrong" ] || grep -av '^ *$' "$log.step" | tail -n 4 >"$log.wrong"
        verdict+=$'\n'$(cut -c1-180 "$log.wrong" | head -n 5 | sed 's/^/    /')
    fi
    verdicts+=("$verdict")
    echo "== $verdict"
    echo "== $1: $2 s, status $3" >>"$summary"
}

"$PYTHON" - "$DEVICE" <<'PYTHON' || exit
import sys, torch, triton, transformers
print(sys.version.split()[0], "torch", torch.__version__, "triton", triton.__version__, "transformers", transformers.__version__)
if sys.argv[1] == "cuda":
    print(torch.cuda.get_device_name(), f"{torch.cuda.mem_get_info()[0] / 2**30:.0f} GiB free")
PYTHON

status=0 left=$(wc -w <<<"$STEPS")
for step in $STEPS; do
    started=$SECONDS seconds=$(budget "$step" "$left") left=$((left - 1))
    if [ "$seconds" -lt 8 ]; then
        tell "$step" 0 none
        status=1
        continue
    fi
    echo "== $step, $seconds s" >>"$log"
    : >"$log.wrong"
    case $step in
    # tiny models of every family on the device, beside transformers there
    answers) check "$seconds" tests/parity/test_same_answers.py tests/parity/test_captured_steps.py ;;
    latency) suite "$seconds" latency 8b 0.6b 1b ;;
    batch) suite "$seconds" batch 1b 0.6b 8b ;;
    throughput) suite "$seconds" throughput 0.6b ;;
    prefill) suite "$seconds" prefill 1b 8b ;;
    # every kernel on the device against its reference, and a model of them op by op; what is of the CPU is not
    tests)
        # shellcheck disable=SC2086
        check "$seconds" ${TESTS:-tests/parity/test_triton_backend.py tests/kernels --ignore-glob tests/kernels/test_cpu_*
            --ignore-glob tests/kernels/test_torch_ops.py --ignore-glob tests/kernels/test_reference_ops.py
            --ignore-glob tests/kernels/test_few_rows.py --ignore-glob tests/kernels/test_compiled_step.py
            --ignore-glob tests/kernels/test_ahead_of_time.py}
        ;;
    # many processes compile side by side, each in one thread
    kernels)
        OMP_NUM_THREADS=1 TORCHINDUCTOR_COMPILE_THREADS=1 script $((seconds + 5)) kernels \
            --jobs $(((JOBS + 1) / 2)) --seconds "$seconds" ${RESUME:+--resume}
        ;;
    sampling) suite "$seconds" sampling 1b ;;
    pdl) script "$seconds" pdl ;;
    load) suite "$seconds" "load memory" 1b ;;
    esac
    result=$?
    [ $result = 0 ] && echo "$step $revision" >>"$RESULTS/done" || status=1
    tell "$step" $((SECONDS - started)) $result
done
rm -f "$log.step" "$log.wrong" "$log.verdicts"
if [ -f "$RESULTS/gpu.jsonl" ]; then
    "$PYTHON" -m benchmarks.report "$RESULTS/gpu.jsonl" >"$RESULTS/gpu.md" || status=1
fi
verdict=$(printf '%s\n' "${verdicts[@]:-nothing was left to do}")
head -c $((11000 - ${#verdict})) "$summary"
printf '\n== In %s s:\n%s\n' "$SECONDS" "$verdict"
exit $status
