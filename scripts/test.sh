#!/usr/bin/env bash
# Runs the tests on the CPU, in .venv (made on the first call), three at a time: many wait for processes that they start.
# Arguments go to pytest:
#   scripts/test.sh -m "not slow"
#   scripts/test.sh -m long          # those that take minutes, and are left out otherwise
# Older transformers, OpenVINO and ExecuTorch, which some exports are tested with, are installed beside it under .consumers.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh
make_environment "${VENV:-.venv}" demo,dev,export,report,onnx,gguf,s3,pack,ray,vlm
PYTHON=python bash scripts/consumers.sh
# One thread a process: the models are tiny, and a file's tests share what they have made.
export OMP_NUM_THREADS=1
case " $* " in *" -m "*) ;; *) set -- -m "not long" "$@" ;; esac
# In the order of tests/conftest.py, longest files first, so that none is begun last and leaves the others waiting.
exec python -m pytest --numprocesses 3 --dist loadfile --no-loadscope-reorder --durations 30 --durations-min 10 "$@"
