#!/usr/bin/env bash
# The GPU check, from a plain checkout: nothing is installed, no network is used, under ten minutes on an H100.
# Needs Python 3.12, torch 2.11, triton 3.6, transformers 5.17 and the other packages of pyproject.toml (with pytest,
# hypothesis; pytest-xdist and matplotlib are used where they are there).
#   benchmarks/gpu.sh                                   on a GPU: tests, kernels, latency
#   STEPS="tests kernels" benchmarks/gpu.sh             some of the steps
#   RESULTS=/tmp/out benchmarks/gpu.sh                  tables and pictures elsewhere than benchmarks/results
#   DEVICE=cpu SHAPES=tiny SMALL=1 benchmarks/gpu.sh    to see that it runs; kernels through Triton's interpreter
# A step that fails does not keep the next from running; the exit status says whether all went well.
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3} DEVICE=${DEVICE:-cuda} SHAPES=${SHAPES:-135m 1b} SMALL=${SMALL:-}
STEPS=${STEPS:-tests kernels latency} RESULTS=${RESULTS:-benchmarks/results} JOBS=${JOBS:-8}
DTYPE=${DTYPE:-$([ "$DEVICE" = cpu ] && echo float32 || echo bfloat16)}
export PYTHONPATH=src:kernels/torch-ext:tests${PYTHONPATH:+:$PYTHONPATH} HF_HUB_OFFLINE=1
[ "$DEVICE" = cpu ] && export TRITON_INTERPRET=1
status=0

"$PYTHON" -c 'import sys, torch, triton, transformers as t; print(sys.version.split()[0], torch.__version__, triton.__version__, t.__version__)' || exit
for step in $STEPS; do
    started=$SECONDS
    case $step in
    # every kernel on the device against its reference, tiny models of every family against transformers
    tests)
        parallel=$("$PYTHON" -c 'import xdist' 2>/dev/null && echo "-n $JOBS")
        # shellcheck disable=SC2086
        "$PYTHON" -m pytest -q -p no:cacheprovider $parallel tests/kernels tests/parity \
            --ignore tests/parity/test_real_checkpoints.py --ignore tests/kernels/test_ahead_of_time.py || status=1
        ;;
    kernels)
        "$PYTHON" benchmarks/kernels.py --device "$DEVICE" --dtype "$DTYPE" ${SMALL:+--small} \
            --output "$RESULTS/kernels.csv" --pictures "$RESULTS/kernels" || status=1
        ;;
    latency)
        # shellcheck disable=SC2086  # SHAPES is a list of words
        "$PYTHON" benchmarks/gpu_latency.py --device "$DEVICE" --dtype "$DTYPE" --shapes $SHAPES --backends torch triton \
            ${SMALL:+--small} --output "$RESULTS/gpu_latency.jsonl" "$@" || status=1
        ;;
    *)
        echo "no step is called $step; there are tests, kernels, latency" >&2
        status=2
        ;;
    esac
    echo "$step: $((SECONDS - started)) s"
done
exit $status
