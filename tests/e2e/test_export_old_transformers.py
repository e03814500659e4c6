"""Exports in the releases of transformers that InternVL, LLaVA and MobileVLM are pinned to, and in today's.

The older releases lie in folders that `scripts/consumers.sh` makes. A process in which one stands first on the search
path loads each export as its users do, with no code of this project, and says what came out.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

from distill.export.golden import Preprocessing, draw_image
from distill.export.run import as_timm_layout
from distill.export.targets import find_target
from students import CLIPViT, InternViT

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
SIZES = {"img_size": 56, "embed_dim": 32, "depth": 3, "num_heads": 2}
OLD, LAST_4, TODAY = "transformers-4.37.2", "transformers-4.57.6", "today"
RELEASES = (OLD, LAST_4, TODAY)
STUDENTS: dict[str, type[nn.Module]] = {"internvl": InternViT, "dinov2-hf": InternViT, "clip-hf": CLIPViT}
TOLERANCE = 1e-5  # the bound that an export is held to, float32
LEGACY_RESIZE = 1e-5  # transformers 4 resizes by Pillow as the student's own preprocessing does
RESIZE_LEVELS = 4.0  # torchvision, which transformers 5 uses, rounds bicubic otherwise

# What a consumer does, in the words of its own code: no line imports this project.
CONSUMER = """
import json, sys
from pathlib import Path
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoConfig, AutoImageProcessor, AutoModel, CLIPImageProcessor, CLIPVisionModel
from transformers import Dinov2Backbone, Dinov2Model, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

root, report = Path(sys.argv[1]), {"version": transformers.__version__}
golden = {path.name: load_file(path / "expected") for path in root.iterdir() if path.is_dir()}


def load(name, model_class, folder, **options):
    model, info = model_class.from_pretrained(folder, output_loading_info=True, **options)
    report[name] = {"missing": sorted(info["missing_keys"]), "unexpected": sorted(info["unexpected_keys"])}
    return model.eval()


def far(got, expected):
    return float((got - expected).abs().max())


def tower(name, model_class, folder, **options):
    model, expected = load(name, model_class, root / folder, **options), golden[folder]
    with torch.no_grad():
        states = model(expected["pixels"], output_hidden_states=True).hidden_states
    report[name]["difference"] = max(far(states[layer], expected[str(layer)]) for layer in (-2, -1))
    return model


def llava(name, folder, depth_index):
    expected = golden[folder]
    config = LlavaConfig(
        vision_config=AutoConfig.from_pretrained(root / folder),
        text_config=LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
                                num_key_value_heads=2, vocab_size=64, pad_token_id=0),
        image_token_index=63, pad_token_id=0, vision_feature_layer=depth_index, image_seq_length=16,
    )
    model = LlavaForConditionalGeneration(config).eval()
    inside = model.vision_tower if hasattr(model, "vision_tower") else model.model.vision_tower
    stand_alone = AutoModel.from_pretrained(root / folder)
    inside.load_state_dict(stand_alone.state_dict(), strict=True)
    seen = []
    inside.register_forward_hook(lambda module, args, output: seen.append(output.hidden_states[depth_index]))
    # transformers 4.37 makes room for the patches itself; later ones want a token for each.
    count = 1 if transformers.__version__.startswith("4.37") else 16
    ids = torch.tensor([[1] + [63] * count + [5, 6]])
    # 4.37's generation does not know the cache classes of later ones; the features are what is asked here.
    text = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=expected["pixels"],
                          max_new_tokens=4, min_new_tokens=4, do_sample=False)
    report[name] = {"difference": far(seen[0], expected[str(depth_index)]), "ids": text[0, -4:].tolist()}


tower("internvl", AutoModel, "internvl", trust_remote_code=True)
tower("internvl eager", AutoModel, "internvl", trust_remote_code=True, attn_implementation="eager")
tower("dinov2-hf", Dinov2Model, "dinov2-hf")
tower("clip-hf", CLIPVisionModel, "clip-hf")
tower("exchanged blocks", CLIPVisionModel, "exchanged")

backbone, expected = load("backbone", Dinov2Backbone, root / "dinov2-hf"), golden["dinov2-hf"]
with torch.no_grad():
    maps = backbone(expected["pixels"]).feature_maps[-1]
report["backbone"]["difference"] = far(maps.flatten(2).transpose(1, 2), expected["-1"][:, 1:])

# LLaVA's CLIPVisionTower, step by step.
processor = CLIPImageProcessor.from_pretrained(root / "clip-hf")
clip = CLIPVisionModel.from_pretrained(root / "clip-hf")
picture, wanted = Image.open(root / "photo.png"), golden["clip-hf"]
pixels = processor.preprocess(picture, return_tensors="pt")["pixel_values"][0]
with torch.no_grad():
    features = clip(pixels[None].to(dtype=clip.dtype), output_hidden_states=True).hidden_states[-2][:, 1:]
report["llava tower"] = {
    "num_patches": (clip.config.image_size // clip.config.patch_size) ** 2,
    "crop": processor.crop_size["height"],
    "shape": list(features.shape),
}
for folder in ("internvl", "dinov2-hf", "clip-hf"):
    pixels = AutoImageProcessor.from_pretrained(root / folder)(picture, return_tensors="pt")["pixel_values"]
    report["pixels " + folder] = far(pixels, golden[folder]["photo"])

llava("llava dinov2-hf", "dinov2-hf", -1)
llava("llava clip-hf", "clip-hf", -2)
print("REPORT" + json.dumps(report))
"""


def make_student(format: str) -> Any:
    torch.manual_seed(0)
    student: Any = STUDENTS[format](weights="random", **SIZES)
    student.load_weights()
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.normal_(0.0, 0.1)
    return student.eval()


def write_expected(directory: Path, student: Any) -> None:
    """Write the encoder's own hidden states -2 and -1 of a fixed image, and its own preprocessing of a photo."""
    image = torch.from_numpy(draw_image(56, 56)).permute(2, 0, 1).contiguous()
    preprocessing = Preprocessing(56, student.image_mean, student.image_std)
    with torch.no_grad():
        layers = student.forward_hidden_states(image[None], num_layers=2)
    tokens = [torch.cat([prefix, patches.flatten(1, 2)], dim=1) for prefix, patches in layers]
    photo = preprocessing.prepare(Image.fromarray(draw_image(90, 131))).contiguous()
    # No `.safetensors`: transformers must not take it for weights.
    save_file(
        {"pixels": preprocessing.normalise(image).contiguous(), "photo": photo, "-2": tokens[0], "-1": tokens[1]},
        directory / "expected",
    )


def exchange_blocks(directory: Path) -> None:
    path, other = directory / "model.safetensors", {"0": "1", "1": "0"}
    weights = {
        re.sub(r"(?<=encoder\.layers\.)[01]", lambda match: other[match[0]], key): value
        for key, value in load_file(path).items()
    }
    save_file(weights, path, metadata={"format": "pt"})


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("exports")
    Image.fromarray(draw_image(90, 131)).save(root / "photo.png")
    for folder, format in [*((name, name) for name in STUDENTS), ("exchanged", "clip-hf")]:
        student = make_student(format)
        (root / folder).mkdir()
        find_target(format).write(as_timm_layout(student), root / folder)
        write_expected(root / folder, student)
    exchange_blocks(root / "exchanged")
    return root


@pytest.fixture(scope="module")
def reports(exports: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What each release made of each export; asked for once a release."""
    return {}


@pytest.fixture(params=RELEASES)
def report(
    request: pytest.FixtureRequest,
    exports: Path,
    reports: dict[str, dict[str, Any]],
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Any]:
    release: str = request.param
    folder = ROOT / ".consumers" / release
    if release != TODAY and not folder.is_dir():
        pytest.skip(f"{release} is not installed beside: run `bash scripts/consumers.sh {release}`")
    if release not in reports:
        path = str(folder) if release != TODAY else ""
        cache = tmp_path_factory.mktemp("modules")
        environment = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(cache)}
        done = subprocess.run(
            [sys.executable, "-c", CONSUMER, str(exports)],
            env=environment,
            cwd=cache,
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        reports[release] = json.loads(done.stdout.rpartition("REPORT")[2])
    answer = reports[release]
    assert release == TODAY or answer["version"] == release.partition("-")[2]
    return answer


@pytest.mark.parametrize("name", ["internvl", "internvl eager", "dinov2-hf", "clip-hf", "backbone"])
def test_the_consumers_class_misses_nothing_and_gives_the_students_features(report: dict[str, Any], name: str) -> None:
    assert (report[name]["missing"], report[name]["unexpected"]) == ([], [])
    assert report[name]["difference"] <= TOLERANCE


def test_exchanged_blocks_are_seen_by_the_number_though_every_key_fits(report: dict[str, Any]) -> None:
    assert (report["exchanged blocks"]["missing"], report["exchanged blocks"]["unexpected"]) == ([], [])
    assert report["exchanged blocks"]["difference"] > 100 * TOLERANCE


def test_llavas_tower_reads_the_layer_before_the_last_and_the_number_of_patches(report: dict[str, Any]) -> None:
    assert report["llava tower"] == {"num_patches": 16, "crop": 56, "shape": [1, 16, 32]}


@pytest.mark.parametrize("format", list(STUDENTS))
def test_the_consumers_preprocessing_is_the_students_own(report: dict[str, Any], format: str) -> None:
    is_torchvision = report["version"].startswith("5")
    levels_per_unit = 255 * min(make_student(format).image_std)
    bound = RESIZE_LEVELS / levels_per_unit if is_torchvision else LEGACY_RESIZE
    assert report[f"pixels {format}"] <= bound


@pytest.mark.parametrize("name", ["llava dinov2-hf", "llava clip-hf"])
def test_inside_a_tiny_llava_the_features_are_the_same_and_text_comes_out(report: dict[str, Any], name: str) -> None:
    assert report[name]["difference"] <= TOLERANCE
    assert len(report[name]["ids"]) == 4
