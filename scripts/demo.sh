#!/usr/bin/env bash
# The main job on the embedded default: draw images, distil, export, probe, report. CPU only; after installing, nothing
# comes from the network. Everything lands in runs/demo (or the folder given as first argument).
set -euo pipefail
run=${1:+$(realpath -m "$1")}
cd "$(dirname "$0")/.."
source scripts/environment.sh
make_environment .venv demo,export,report
export HF_HUB_OFFLINE=1

run=${run:-runs/demo}
images=$run/images
start=$SECONDS
step() { printf '\n[%4d s] %s\n' "$((SECONDS - start))" "$1"; }

step "Drawing labelled images of four domains"
distill synthesize "$images/train" --split train --images_per_domain 200
distill synthesize "$images/val" --split heldout --images_per_domain 40 --seed 1
distill synthesize "$images/heldout" --split heldout --images_per_domain 150

step "Distilling EfficientNet-Lite0 into a small ViT at 448 px"
distill fit --config configs/demo.yaml --trainer.default_root_dir "$run" \
    --data.train "$images/train" --data.val "$images/val"

step "Exporting the student; each export is loaded by its consumer in a fresh process and compared"
distill export "$run" --format [internvl-hf,timm] --overwrite true

step "Probing the student beside its initialisation and its teacher, on the held-out images"
distill probe "$run" --data "$images/heldout" --precision auto --rungs [linear,knn,fidelity]

step "Writing the report"
distill report "$run"

step "Done. Open $run/report.html, or use the export:"
cat <<EOF

    import timm
    encoder = timm.create_model("local-dir:$run/exports/timm", pretrained=True)

Next: validate the run again, climb the whole ladder of probes, or distil longer with the same recipe.

    .venv/bin/distill probe $run --data $images/heldout --out $run/ladder.json
    .venv/bin/distill validate --config $run/config.yaml --ckpt_path $run/checkpoints/last.ckpt
    .venv/bin/distill fit --config $run/config.yaml --trainer.max_epochs 20 --trainer.default_root_dir runs/longer
EOF
