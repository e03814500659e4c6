#!/usr/bin/env bash
# Installs consumers of exports that cannot live in the main environment, each into a folder of its own under .consumers.
#   bash scripts/consumers.sh            all of them
#   bash scripts/consumers.sh NAME ...   transformers-4.37.2, transformers-4.57.6, openvino, executorch
# A fresh process finds one when its folder stands first on PYTHONPATH; torch, numpy and the rest come from the main
# environment. That is why nothing here brings its dependencies by itself: they would shadow the main ones.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-${VENV:-.venv}/bin/python}
FOLDER=.consumers

requirements() {
    case $1 in
    # The release InternVL's, LLaVA's and many others' code is pinned to.
    transformers-4.37.2) echo transformers==4.37.2 tokenizers==0.15.2 huggingface_hub==0.36.0 ;;
    # The last of the 4 series.
    transformers-4.57.6) echo transformers==4.57.6 tokenizers==0.22.1 huggingface_hub==0.36.0 ;;
    openvino) echo openvino==2026.4.1 ;;
    executorch) echo executorch==1.5.1 torchao==0.18.0 ruamel.yaml==0.18.15 tabulate==0.9.0 expecttest==0.3.0 \
        parameterized==0.9.0 pytorch_tokenizers==1.0.1 ;;
    *)
        echo "$1 is no consumer; choose from transformers-4.37.2, transformers-4.57.6, openvino, executorch." >&2
        return 2
        ;;
    esac
}

# The stamp holds what was installed: another version in this file, or an installation cut short, installs anew.
install_consumer() {
    local name=$1 wanted folder=$FOLDER/$1 partial=$FOLDER/.$1.partial
    wanted=$(requirements "$name")
    if [ "$(cat "$folder/.installed" 2>/dev/null)" = "$wanted" ]; then
        echo "$name: there"
        return
    fi
    echo "$name: installing $wanted"
    rm -rf "$partial" "$folder"
    mkdir -p "$FOLDER"
    # shellcheck disable=SC2086 - the requirements are words
    "$PYTHON" -m pip install --quiet --disable-pip-version-check --no-compile --no-deps --target "$partial" $wanted
    echo "$wanted" >"$partial/.installed"
    mv "$partial" "$folder"
}

if [ $# = 0 ]; then
    set -- transformers-4.37.2 transformers-4.57.6 openvino executorch
fi
for name in "$@"; do
    install_consumer "$name"
done
