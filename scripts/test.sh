#!/usr/bin/env bash
# Runs the tests on the CPU, in .venv (made on the first call). Arguments go to pytest: scripts/test.sh -m "not slow"
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh
make_environment "${VENV:-.venv}" demo,dev,export,report,onnx,gguf,s3,pack,ray
exec python -m pytest "$@"
