#!/usr/bin/env bash
# The evidence study: real weights, real images, against LightlyTrain at equal images seen. See docs/results.md.
#   bash scripts/evidence.sh          the main comparison, small
#   bash scripts/evidence.sh full     the whole study, 224 px: hours
#   bash scripts/evidence.sh controls other beginnings, other teachers, LightlyTrain at a higher rate: an hour
#   bash scripts/evidence.sh large    the main comparison at 448 px: hours
#   bash scripts/evidence.sh ablation each choice of the recipe changed by itself: hours
#   bash scripts/evidence.sh ablation_more heads, layer weights, whitening, freezing, likewise: hours
# Images and weights: ../shared/assets, or the folder in ASSETS; results: runs/evidence, or the folder in WORK. Stopped by
# whatever, the same command goes on. As many steps as there are cores are done at a time; JOBS=1 says otherwise.
# LIGHTLY=no leaves LightlyTrain out; LIGHTLY_VENV names an environment that has it.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh
assets=${ASSETS:-../shared/assets}
if [ ! -f "$assets/manifest.jsonl" ]; then
    echo "No manifest.jsonl in $assets: set ASSETS to the folder with the study's images and weights." >&2
    exit 1
fi
make_environment "${VENV:-.venv}" report
export HF_HUB_OFFLINE=1 LIGHTLY_TRAIN_EVENTS_DISABLED=1
# The recipes name classes of this folder.
export PYTHONPATH=$PWD/scripts/evidence${PYTHONPATH:+:$PYTHONPATH}

setting=${1:-quick}
work=${WORK:-runs/evidence}
mkdir -p "$work"
lightly=()
if [ "${LIGHTLY:-yes}" = yes ]; then
    peer=${LIGHTLY_VENV:-$work/lightly}
    if [ -z "${LIGHTLY_VENV:-}" ] && ! cmp -s scripts/evidence/lightly_train.txt "$peer/.installed"; then
        echo "Installing LightlyTrain into $peer (an environment of its own) ..."
        python -m venv "$peer"
        "$peer/bin/python" -m pip install --quiet --disable-pip-version-check -r scripts/evidence/lightly_train.txt
        cp scripts/evidence/lightly_train.txt "$peer/.installed"
    fi
    lightly=(--lightly_python "$peer/bin/python")
fi

python scripts/evidence/study.py "$setting" --assets "$assets" --work "$work" ${JOBS:+--jobs "$JOBS"} "${lightly[@]}"
