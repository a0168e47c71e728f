#!/usr/bin/env bash
# Tests and the latency suite on a machine with a GPU, from a plain checkout: nothing is installed, no network is used.
# Needs Python 3.12, torch 2.11, transformers 5.17 and the other packages of pyproject.toml (with pytest, hypothesis).
#   benchmarks/gpu.sh                                   on a GPU
#   DEVICE=cpu SHAPES=tiny SMALL=1 benchmarks/gpu.sh    to see that it runs
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3} DEVICE=${DEVICE:-cuda} SHAPES=${SHAPES:-135m 1b} SMALL=${SMALL:-}
DTYPE=${DTYPE:-$([ "$DEVICE" = cpu ] && echo float32 || echo bfloat16)}
export PYTHONPATH=src:kernels/torch-ext${PYTHONPATH:+:$PYTHONPATH} HF_HUB_OFFLINE=1

"$PYTHON" -c 'import sys, torch, transformers; print(sys.version.split()[0], torch.__version__, transformers.__version__)'
# ops against their reference, tiny models of every family against transformers: what other versions could break
"$PYTHON" -m pytest -q -p no:cacheprovider tests/kernels tests/parity --ignore tests/parity/test_real_checkpoints.py
# shellcheck disable=SC2086  # SHAPES is a list of words
"$PYTHON" benchmarks/gpu_latency.py --device "$DEVICE" --dtype "$DTYPE" --shapes $SHAPES ${SMALL:+--small} "$@"
