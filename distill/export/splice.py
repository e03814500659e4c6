"""`distill export RUN --into DIR --out NEW`: the encoder in place of the tower of an existing VLM.

NEW holds what DIR holds, byte for byte, but for the tower's tensors and the tower's part of config.json. Nothing is
published unless the VLM's own class, in a fresh process, gives the encoder's features out of it.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from distill.encoder import TimmLayoutEncoder
from distill.errors import ExportError
from distill.export.contract import CONFIG_FILE, WEIGHTS_FILE
from distill.export.files import staged, write_json
from distill.export.golden import compute_golden
from distill.export.internvl import CODE_FILES
from distill.export.splice_files import copy_files, write_weights
from distill.export.splice_verify import TowerProof, verify_tower
from distill.export.splice_vlm import CHAT, Vlm, check_fit, read_vlm, tower_dtype

RECORD_FILE = "splice.json"
RECORD_VERSION = "distill-splice/1"

# Keys of a vision configuration that say nothing of the function at inference: the directory's own are kept.
_DIRECTORY_KEYS = frozenset(
    {"architectures", "auto_map", "torch_dtype", "dtype", "drop_path_rate", "dropout", "attention_dropout"}
    | {"hidden_dropout_prob", "attention_probs_dropout_prob", "projection_dropout", "use_flash_attn"}
    | {"initializer_factor", "initializer_range", "layer_scale_init_value", "layerscale_value", "projection_dim"}
)

# Names of a backbone's stages: transformers makes them of the depth, and refuses those of another depth.
_STAGE_KEYS = frozenset({"out_features", "out_indices", "stage_names"})


@dataclass(frozen=True)
class Spliced:
    """One VLM with the encoder in it: where, and what its verification proved.

    Attributes:
        directory: the new directory.
        kind: `model_type` of the VLM.
        replaced: how many tensors the new tower has.
        dtype: the precision that the VLM's files keep it in.
        select_layer: the hidden state the VLM reads, from the end.
        proof: what the fresh process proved.
    """

    directory: Path
    kind: str
    replaced: int
    dtype: str
    select_layer: int
    proof: TowerProof


def splice(
    encoder: TimmLayoutEncoder,
    into: Path,
    out: Path,
    *,
    trained_layers: int = 1,
    trust_remote_code: bool = False,
    timeout_s: float = 1800.0,
) -> Spliced:
    """Write a copy of a VLM directory with the encoder as its vision tower, verified, all at once or not at all.

    Args:
        encoder: a `torch.nn.Module` on the CPU, in eval mode, float32.
        into: the VLM: InternVL in OpenGVLab's layout or transformers', LLaVA or LLaVA-NeXT in transformers'. It is only
            read.
        out: the new directory; it must not exist.
        trained_layers: how many of the encoder's last hidden states were trained (`num_layers` of its alignment): the
            VLM must read one of them.
        trust_remote_code: OpenGVLab's layout brings its own Python, which the verification runs.
        timeout_s: longest time the fresh process may take.

    Returns:
        What was written and what was proved.

    Raises:
        ExportError: the encoder does not fit (the message has both numbers), a file cannot be read or written, or the
            VLM's class gave other features. Nothing is at `out` then.
    """
    vlm = read_vlm(into)
    select_layer, dtype = check_fit(vlm, encoder, trained_layers), tower_dtype(vlm)
    if vlm.kind == CHAT:
        _check_code(vlm, trust_remote_code=trust_remote_code)
    golden = compute_golden(encoder, f"spliced {vlm.kind}", max(2, -select_layer))
    out = out.resolve()
    if out.is_relative_to(into.resolve()):
        raise ExportError(f"--out {out} lies inside --into {into}, which is copied; give a place outside it.")
    with staged(out, overwrite=False) as directory:
        tower, vision_config = _written_tower(vlm, encoder, dtype)
        copy_files(vlm, directory)
        kept = {key: value for key, value in vlm.vision_config.items() if key not in _STAGE_KEYS}
        config = {**vlm.config, "vision_config": {**kept, **vision_config}}
        write_json(directory / CONFIG_FILE, config)
        write_weights(vlm, tower, directory)
        proof = verify_tower(vlm.kind, directory, encoder, golden, dtype, timeout_s)
        name = str(dtype).removeprefix("torch.")
        record = {"kind": vlm.kind, "replaced": len(tower), "dtype": name, "select_layer": select_layer}
        write_json(directory / RECORD_FILE, {"format": RECORD_VERSION, **record, **asdict(proof)})
    return Spliced(out, vlm.kind, len(tower), name, select_layer, proof)


def _check_code(vlm: Vlm, *, trust_remote_code: bool) -> None:
    missing = [name for name in CODE_FILES if not (vlm.directory / name).is_file()]
    if missing:
        raise ExportError(
            f"--into {vlm.directory}: {', '.join(missing)} is not there, so its tower cannot be run as its users do. "
            "Fetch the directory with its code."
        )
    if not trust_remote_code:
        raise ExportError(
            f"--into {vlm.directory}: its tower is defined by its own {CODE_FILES[1]}, which the verification runs. "
            "Read that file, then give --trust_remote_code true."
        )


def _written_tower(
    vlm: Vlm, encoder: TimmLayoutEncoder, dtype: torch.dtype
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tower's tensors under the VLM's keys, and its configuration, as an export of its kind has them."""
    with tempfile.TemporaryDirectory(prefix="distill-splice-") as work:
        vlm.tower.write(encoder, Path(work))
        weights = load_file(Path(work, WEIGHTS_FILE))
        config: dict[str, Any] = json.loads(Path(work, CONFIG_FILE).read_text(encoding="utf-8"))
    tower = {vlm.tower_prefix + key.removeprefix("vision_model."): value.to(dtype) for key, value in weights.items()}
    for key, value in tower.items():
        if not torch.isfinite(value).all():
            raise ExportError(f"{key} has values beyond {dtype}, in which {vlm.directory} keeps its tower.")
    return tower, {key: value for key, value in config.items() if key not in _DIRECTORY_KEYS}
