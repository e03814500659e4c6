#!/usr/bin/env bash
# Makes the environment that scripts/bench/step.py runs other tools in, apart from this project's: .venv-peers, about 6 GB.
set -euo pipefail
cd "$(dirname "$0")/../.."
folder=${PEERS:-.venv-peers}
"${PYTHON:-python3}" -m venv "$folder"
# The versions of torch, timm and transformers that this project is measured with, so that kernels are the same.
pins=$(grep -E '^(torch|torchvision|timm|transformers)==' constraints.txt)
# shellcheck disable=SC2086  # one word a package
"$folder/bin/python" -m pip install --quiet --disable-pip-version-check $pins lightly-train==0.18.0
echo "$folder is ready: python scripts/bench/step.py --peers $folder/bin/python"
