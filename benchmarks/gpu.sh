#!/usr/bin/env bash
# The GPU check, from a plain checkout: nothing is installed, no network is used, under ten minutes on an H100.
# Needs Python 3.12, torch 2.11, triton 3.6, transformers 5.17, a C compiler (Triton's), and of pyproject.toml's packages
# all but gguf; pytest. pytest-xdist, pytest-timeout and matplotlib are used where they are there.
#   benchmarks/gpu.sh                                   on a GPU: tests, kernels, latency, decode, 560 s together
#   STEPS="kernels latency" benchmarks/gpu.sh           some of the steps; the time is theirs
#   STEPS=decode BATCH="1 16" benchmarks/gpu.sh         also against gpt-fast's recipe; DECODE_PEERS="static dynamic" …
#   STEPS=kernels RESUME=1 benchmarks/gpu.sh            what the table lacks, or has as failed
#   STEPS=tests TESTS=tests/kernels/test_norm.py benchmarks/gpu.sh
#   RESULTS=/tmp/out benchmarks/gpu.sh                  tables, logs and pictures elsewhere than benchmarks/results
#   DEVICE=cpu SHAPES=tiny SMALL=1 benchmarks/gpu.sh    to see that it runs; kernels through Triton's interpreter
# Every result is written as it comes. A step that fails or overruns its share does not keep the next from running; the
# end of the output sums up all of them, and the exit status says whether all went well.
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3} DEVICE=${DEVICE:-cuda} SHAPES=${SHAPES:-135m 1b} SMALL=${SMALL:-} RESUME=${RESUME:-}
DECODE_SHAPES=${DECODE_SHAPES:-$([ "$DEVICE" = cpu ] && echo tiny || echo 1b 0.6b 8b)} BATCH=${BATCH:-$([ -n "$SMALL" ] && echo 1 3 || echo 1 4 16 64 256)}
STEPS=${STEPS:-tests kernels latency decode} RESULTS=${RESULTS:-benchmarks/results} SECONDS_IN_ALL=${SECONDS_IN_ALL:-560}
JOBS=${JOBS:-$(nproc)}
DECODE_PEERS=${DECODE_PEERS-$([ "$STEPS" = decode ] && echo plain)} # it compiles for a minute per batch size
DTYPE=${DTYPE:-$([ "$DEVICE" = cpu ] && echo float32 || echo bfloat16)}
export PYTHONPATH=src:kernels/torch-ext:tests${PYTHONPATH:+:$PYTHONPATH} HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1
[ "$DEVICE" = cpu ] && export TRITON_INTERPRET=1
mkdir -p "$RESULTS"
status=0 summary=$RESULTS/summary.txt
: >"$summary"

# share PERCENT: seconds, of those that are left
share() {
    local seconds=$(((SECONDS_IN_ALL - SECONDS) * $1 / 100))
    echo $((seconds > 1 ? seconds : 1))
}
# limited SECONDS COMMAND...: interrupted then, so that it can say how far it came, and killed 20 s later
limited() { timeout --signal=INT --kill-after=20 "$@"; }
has() { "$PYTHON" -c "import $1" 2>/dev/null; }

"$PYTHON" - "$DEVICE" <<'PYTHON' || exit
import sys, torch, triton, transformers
print(sys.version.split()[0], "torch", torch.__version__, "triton", triton.__version__, "transformers", transformers.__version__)
if sys.argv[1] == "cuda":
    print(torch.cuda.get_device_name(), f"{torch.cuda.mem_get_info()[0] / 2**30:.0f} GiB free")
PYTHON

left=$(wc -w <<<"$STEPS")
for step in $STEPS; do
    started=$SECONDS
    case $step$left in # the tests leave most of the time to what comes after
    tests1) seconds=$(share 100) ;;
    tests*) seconds=$(share 40) ;;
    kernels1) seconds=$(share 95) ;;
    kernels*) seconds=$(share 50) ;;
    latency1) seconds=$(share 100) ;;
    latency*) seconds=$(share 50) ;;
    *) seconds=$(share 100) ;;
    esac
    case $step in
    # every kernel on the device against its reference, tiny models of every family against transformers
    tests)
        plugins=()
        has xdist && plugins+=(-p xdist.plugin -n "$JOBS" --dist worksteal)
        has pytest_timeout && plugins+=(-p pytest_timeout --timeout 100)
        PYTEST_DISABLE_PLUGIN_AUTOLOAD=1 limited "$seconds" "$PYTHON" -m pytest -v --tb=short -p no:cacheprovider \
            "${plugins[@]}" ${TESTS:-tests/kernels tests/parity} --ignore tests/parity/test_real_checkpoints.py \
            --ignore tests/kernels/test_ahead_of_time.py >"$RESULTS/tests.log" 2>&1
        result=$?
        verdicts=$(grep -aE '(::.* |\] )(PASSED|FAILED|ERROR|SKIPPED)( |$)' "$RESULTS/tests.log")
        {
            grep -oE '(PASSED|FAILED|ERROR|SKIPPED)' <<<"$verdicts" | sort | uniq -c | tr -s ' \n' ' '
            echo "(status $result; all in tests.log)"
            grep -E '(::.* |\] )(FAILED|ERROR)' <<<"$verdicts" | cut -c1-140 | head -n 15
            grep -aE '^(E  |!!)' "$RESULTS/tests.log" | cut -c1-140 | uniq | head -n 10
        } >>"$summary"
        ;;
    kernels)
        # many processes compile side by side, each in one thread
        OMP_NUM_THREADS=1 TORCHINDUCTOR_COMPILE_THREADS=1 \
            limited $((seconds + 10)) "$PYTHON" benchmarks/kernels.py --device "$DEVICE" --dtype "$DTYPE" --jobs $(((JOBS + 1) / 2)) \
            ${SMALL:+--small} ${RESUME:+--resume} --seconds "$seconds" --output "$RESULTS/kernels.csv" \
            --pictures "$RESULTS/kernels" 2>"$RESULTS/kernels.log" >>"$summary"
        result=$?
        ;;
    latency)
        # shellcheck disable=SC2086  # SHAPES is a list of words
        limited "$seconds" "$PYTHON" benchmarks/gpu_latency.py --device "$DEVICE" --dtype "$DTYPE" --shapes $SHAPES \
            --backends torch triton --rounds 3 ${SMALL:+--small} --output "$RESULTS/gpu_latency.jsonl" "$@" \
            2>"$RESULTS/latency.log" >>"$summary"
        result=$?
        [ $result = 0 ] || tail -n 8 "$RESULTS/latency.log" | cut -c1-300 >>"$summary"
        ;;
    decode)
        # shellcheck disable=SC2086  # lists of words
        limited "$seconds" "$PYTHON" benchmarks/gpu_decode.py --device "$DEVICE" --dtype "$DTYPE" --shapes $DECODE_SHAPES \
            ${SMALL:+--prompt 8 --new 6 --rounds 2 --backend reference} --batch $BATCH --peers $DECODE_PEERS \
            --output "$RESULTS/gpu_decode.jsonl" 2>"$RESULTS/decode.log" >>"$summary"
        result=$?
        [ $result = 0 ] || tail -n 8 "$RESULTS/decode.log" | cut -c1-300 >>"$summary"
        ;;
    *)
        echo "no step is called $step; there are tests, kernels, latency, decode" >&2
        exit 2
        ;;
    esac
    [ $result = 0 ] || status=1
    left=$((left - 1))
    echo "== $step: $((SECONDS - started)) s, status $result" | tee -a "$summary"
done
head -c 11000 "$summary"
exit $status
