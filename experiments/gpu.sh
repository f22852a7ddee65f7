#!/usr/bin/env bash
# Everything that needs a GPU, in one command, without a network and without building anything: see experiments/gpu.py --help.
#
#     bash experiments/gpu.sh --data voc:PATH/VOC2012 --weights vit_small_patch16_224.pth
#     bash experiments/gpu.sh --dry                     # on the CPU, tiny: shows that every step works
#
# PYTHON: the interpreter that has torch (default python3). WHEELS: a folder of wheels of what it lacks, carried there
# beforehand; they are unpacked beside the run and nothing else is installed.
set -euo pipefail
cd "$(dirname "$0")/.."
export HF_HUB_OFFLINE=1 PYTHONWARNINGS=ignore PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
PYTHON="${PYTHON:-python3}"
if [ -n "${WHEELS:-}" ]; then
    LIBS="$(mktemp -d)"
    "$PYTHON" -m pip install --quiet --no-index --no-deps --target "$LIBS" "$WHEELS"/*.whl
    export PYTHONPATH="$PYTHONPATH:$LIBS"
fi
exec "$PYTHON" experiments/gpu.py "$@"
