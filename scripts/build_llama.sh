#!/usr/bin/env bash
# Builds llama.cpp's libmtmd with its Python binding into .consumers/llama-cpp, where `distill export --format gguf`
# finds the consumer that verifies an mmproj file, and where the tests of that target find it.
#   bash scripts/build_llama.sh
# Needs cmake and a C++ compiler; about 6 minutes on 2 cores. The release is pinned: its llama.cpp reads the position
# rows in the order that distill/export/mmproj.py writes. After a change of the release, run the tests of the target:
#   .venv/bin/python -m pytest tests/unit/test_export_gguf.py tests/e2e/test_export_runtimes.py
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-${VENV:-.venv}/bin/python}
WANTED="llama-cpp-python==0.3.36 diskcache==5.6.3"
FOLDER=.consumers/llama-cpp
PARTIAL=.consumers/.llama-cpp.partial

if [ "$(cat "$FOLDER/.installed" 2>/dev/null)" = "$WANTED" ]; then
    echo "llama-cpp: there"
    exit
fi
echo "llama-cpp: building $WANTED"
rm -rf "$PARTIAL"
mkdir -p .consumers
# --no-deps: numpy, jinja2 and typing_extensions come from the main environment, and would shadow it here.
# shellcheck disable=SC2086 - the requirements are words
"$PYTHON" -m pip install --quiet --disable-pip-version-check --no-deps --target "$PARTIAL" $WANTED
echo "$WANTED" >"$PARTIAL/.installed"
rm -rf "$FOLDER"
mv "$PARTIAL" "$FOLDER"
PYTHONPATH=$FOLDER "$PYTHON" -c "import llama_cpp.mtmd_cpp; print('llama-cpp:', llama_cpp.__version__)"
