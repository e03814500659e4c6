"""LoRA from end to end, as MobileVLM and TinyGPT-V set it: what is trained, kept, resumed, merged and exported."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor

from distill.checkpoint import read_checkpoint
from distill.errors import ConfigError, ExportError
from distill.probe.encoders import load_encoder
from distill.vlm.batch import VLMBatch, collate
from distill.vlm.build import BuiltVLM, build_vlm, load_trained
from distill.vlm.export import export_vlm
from distill.vlm.language import merge_lora
from distill.vlm.parameters import count_parameters
from distill.vlm.practice import write_practice
from distill.vlm.recipe import build_recipe
from distill.vlm.records import read_records
from distill.vlm.runs import VLMRun
from distill.vlm.stages.run import run_recipe
from distill.vlm.stages.task import VLMTask

pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers")
QUIET = Console(quiet=True)
ENCODER = """\
class_path: students.InternViT
init_args: {weights: random, img_size: 32, patch_size: 8, embed_dim: 32, depth: 2, num_heads: 2, init: mimetic}
"""
PHI_LINEARS = ["q_proj", "k_proj", "v_proj", "dense"]
LLAMA_LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LANGUAGES: dict[str, dict[str, Any]] = {
    "MobileVLM": {"path": "language/llama", "lora_rank": 128, "lora_alpha": 256},
    "TinyGPT-V": {
        "path": "language/phi",
        "lora_rank": 64,
        "lora_alpha": 16,
        "lora_targets": PHI_LINEARS,
        "train_norms": True,
        "qk_norm": True,
        "post_norm": True,
    },
}
"""`configs/vlm/mobilevlm_v1.yaml`'s LoRA variant and `configs/vlm/tinygptv.yaml`."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Practice data of 32 px, an encoder, and toy language models with weights of their own."""
    from transformers import AutoConfig, AutoModelForCausalLM

    path = tmp_path_factory.mktemp("vlm_lora")
    write_practice(path, train=6, heldout=2, img_size_px=32, seed=0, language=("llama", "phi"))
    for name in ("llama", "phi"):
        torch.manual_seed(1)
        config = AutoConfig.from_pretrained(path / "language" / name)
        AutoModelForCausalLM.from_config(config).save_pretrained(path / "language" / name)
    (path / "encoder.yaml").write_text(ENCODER)
    return path


def content(folder: Path, run: Path, model: str) -> dict[str, Any]:
    """Return a recipe of a stage that trains no adapter (norms, where there are any), and one that does."""
    language = {**LANGUAGES[model], "tune": "lora", "path": str(folder / LANGUAGES[model]["path"])}
    first = {"connector": 1e-3, **({"norms": 1e-2} if model == "TinyGPT-V" else {})}
    rates = {"warm_up": first, "tune": {"connector": 1e-3, "language": 1e-2, "vision": 1e-3}}
    data = {"questions": {"path": str(folder / "train.jsonl")}}
    shared = {"data": data, "steps": 3, "global_batch_size": 4, "max_length": 192}
    return {
        "run_dir": str(run),
        "vision": {"path": str(folder / "encoder.yaml"), "tune": "full"},
        "connector": {"name": "pixel_shuffle_mlp"},
        "language": language,
        "template": "phi2",
        "tiling": {"tile_size": 32, "max_tiles": 1},
        "trainer": {"accelerator": "cpu", "precision": "32-true", "progress": False, "checkpoint_every": 1},
        "stages": {name: {"lr": lr, **shared} for name, lr in rates.items()},
    }


class Trained:
    """A run that was made in one go, and the model as it stood in memory when it ended."""

    def __init__(self, folder: Path, run: Path, model: str) -> None:
        self.given = content(folder, run, model)
        self.base = load_file(Path(self.given["language"]["path"]) / "model.safetensors")
        found: list[BuiltVLM] = []

        def keeping(*args: Any) -> BuiltVLM:
            found.append(build_vlm(*args))
            return found[-1]

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("distill.vlm.stages.run.build_vlm", keeping)
            printed = io.StringIO()
            console = Console(file=printed, width=200)
            self.run = run_recipe(build_recipe(self.given), self.given, resume="no", console=console)
        self.printed = printed.getvalue()
        self.built = found[0]
        self.built.model.eval()
        builder = self.built.prompt_builder()
        samples = [builder.build(record) for record in read_records(folder / "train.jsonl", "instruction")[:3]]
        self.batch: VLMBatch = collate(samples, self.built.pad_id, 192, pack=False)


@pytest.fixture(scope="module", params=list(LANGUAGES))
def trained(request: pytest.FixtureRequest, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return Trained(folder, tmp_path_factory.mktemp("run"), request.param)


def state_of(run: VLMRun, stage: int) -> dict[str, Tensor]:
    return read_checkpoint(run.stage_dirs()[stage] / "checkpoints" / "last.ckpt")["state_dict"]


def is_added(name: str) -> bool:
    """Whether a language model's tensor is of LoRA, or a norm."""
    return "lora_" in name or "norm" in name


def plain_name(name: str) -> str:
    """Return the name that a tensor has in the language model's own file."""
    for wrapping in ("base_model.model.", "base_layer.", "attention."):
        name = name.replace(wrapping, "")
    return name


def test_a_stage_with_lora_leaves_every_weight_of_the_language_model_bit_for_bit(trained: Trained) -> None:
    now = trained.built.model.language.state_dict()
    shared = {plain_name(name): value for name, value in now.items() if not is_added(name)}
    expected = {name: value for name, value in trained.base.items() if "norm" not in name}
    assert set(expected) <= set(shared)
    for name, value in expected.items():
        assert torch.equal(shared[name][: len(value)], value), name  # rows behind them are the template's tokens
    adapters = {name: value for name, value in now.items() if "lora_B" in name}
    assert adapters
    assert all(bool(value.any()) for value in adapters.values()), "each begins at zero, and each has learned"


def test_checkpoints_hold_adapters_and_norms_and_nothing_else_of_the_language_model(trained: Trained) -> None:
    has_norms = trained.given["language"].get("train_norms", False)
    first, second = ({n for n in state_of(trained.run, at) if n.startswith("model.language.")} for at in (0, 1))
    assert all("norm" in name for name in first)
    assert bool(first) == has_norms
    assert all(is_added(name) for name in second)
    assert any("norm" in name for name in second) == has_norms
    linears = {name.split(".lora_")[0].split(".")[-1] for name in second if ".lora_" in name}
    assert linears == set(PHI_LINEARS if has_norms else LLAMA_LINEARS)


@torch.no_grad()
def test_a_trained_model_with_adapters_comes_back_and_answers_as_it_did(trained: Trained) -> None:
    again = load_trained(trained.run).model
    logits = trained.built.model.logits(trained.batch)
    assert torch.equal(again.logits(trained.batch), logits)
    untrained = build_vlm(trained.run.recipe()).model.eval()
    assert (untrained.logits(trained.batch) - logits).abs().max() > 1e-2


@torch.no_grad()
def test_merged_weights_answer_as_adapters_do(trained: Trained) -> None:
    model = load_trained(trained.run).model
    before = model.logits(trained.batch)
    model.language = merge_lora(model.language)
    assert not [name for name, _ in model.language.named_parameters() if "lora" in name]
    assert (model.logits(trained.batch) - before).abs().max() <= 1e-4 * before.abs().max()


def test_training_begins_by_telling_each_parts_parameters(trained: Trained) -> None:
    counts = count_parameters(trained.built.model)
    added = sum(value.numel() for name, value in trained.built.model.named_parameters() if "lora_" in name)
    assert counts.lora == added > 0
    assert trained.printed.startswith(f"{counts}\n")
    assert f"(LoRA {added / 1e6:.2f} M, {counts.lora_percent:.2f} %)" in trained.printed


class KilledError(Exception):
    """What ends a process without asking."""


def test_a_run_with_lora_that_was_cut_goes_on_to_the_same_adapters(
    trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[int] = []
    step = VLMTask.training_step

    def cut(self: VLMTask, batch: dict[str, Any], batch_idx: int) -> Tensor:
        if len(taken) == 5:
            raise KilledError
        taken.append(batch_idx)
        return step(self, batch, batch_idx)

    given = {**trained.given, "run_dir": str(tmp_path)}
    with monkeypatch.context() as patch:
        patch.setattr(VLMTask, "training_step", cut)
        with pytest.raises(KilledError):
            run_recipe(build_recipe(given), given, resume="no", console=QUIET)
    went_on = run_recipe(build_recipe(given), given, resume="auto", console=QUIET)
    expected, found = state_of(trained.run, 1), state_of(went_on, 1)
    assert set(found) == set(expected)
    assert all(torch.equal(found[name], value) for name, value in expected.items())


@torch.no_grad()
def test_an_export_is_loaded_by_transformers_alone_and_answers_as_the_run_does(
    trained: Trained, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out = tmp_path / "parts"
    if trained.given["language"].get("post_norm"):
        with pytest.raises(ConfigError, match="post_norm puts norms into Phi"):
            export_vlm(trained.run.path, out, QUIET)
        assert not out.exists()
        return
    export_vlm(trained.run.path, out, QUIET)
    model, batch = trained.built.model, trained.batch
    language = AutoModelForCausalLM.from_pretrained(out / "language", local_files_only=True).eval()
    lengths = (batch.segment_ids > 0).long()
    found = language(inputs_embeds=model.embed(batch), attention_mask=lengths).logits
    expected = model.logits(batch)
    is_token = lengths.bool()
    assert (found[is_token] - expected[is_token]).abs().max() <= 1e-4 * expected.abs().max()
    assert not list(out.rglob("adapter*")), "transformers would look for the weights below the adapters elsewhere"
    assert set(load_file(out / "language" / "model.safetensors")) == set(trained.base)
    facts = json.loads((out / "vlm.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(out / "language")
    assert tokenizer.convert_tokens_to_ids(facts["image_token"]) == facts["image_token_id"] == model.image_token_id
    assert facts["language"]["lora_merged"]
    connector = load_file(out / "connector.safetensors")
    assert all(torch.equal(connector[name], value) for name, value in model.connector.state_dict().items())
    encoder: Any = load_encoder(out / "vision")
    states = [part.forward_hidden_states(batch.tiles, 1)[0][1] for part in (encoder, model.vision)]  # type: ignore[operator]
    assert (states[0] - states[1]).abs().max() <= 1e-4
    with pytest.raises(ExportError, match="parts"):
        export_vlm(trained.run.path, out, QUIET)
