"""The joined model: images in their places, packed rows apart, answers as step by step, and the noise control."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch.nn import functional as F

from distill.errors import ConfigError, DataError
from distill.vlm.batch import VLMSample, collate
from distill.vlm.building import build_small_vlm
from distill.vlm.connectors import ConnectorConfig, build_connector
from distill.vlm.language import LanguageConfig
from distill.vlm.model import SmallVLM, segment_mask
from distill.vlm.parameters import count_parameters
from distill.vlm.vision import VisionConfig, load_vision, patch_grid, select_layer

IMAGE, PAD, END = 5, 0, 2
TILE = 28  # 4 x 4 patches of 7 px, which the pixel shuffle makes 4 tokens
WIDTH = 32
KINDS = ("Llama", "Qwen2", "Phi", "Phi3")
ABSOLUTE = "GPT2"
"""Has an embedding for each position: in a packed row rotary ones are right wherever a sample begins."""


@pytest.fixture(scope="module")
def encoder_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An InternViT export as transformers reads it, with random weights that move its features well apart."""
    from transformers import InternVLVisionConfig, InternVLVisionModel

    torch.manual_seed(0)
    config = InternVLVisionConfig(
        hidden_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=TILE,
        patch_size=7,
        attention_bias=True,
        layer_scale_init_value=1.0,
        initializer_range=0.3,
    )
    directory = tmp_path_factory.mktemp("encoder")
    InternVLVisionModel(config).save_pretrained(directory)
    (directory / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.5] * 3, "image_std": [0.25] * 3}))
    return directory


@pytest.fixture(scope="module")
def language_directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    import transformers

    made: dict[str, Path] = {}
    for kind in (*KINDS, ABSOLUTE):
        torch.manual_seed(0)
        config = getattr(transformers, f"{kind}Config")(
            vocab_size=40,
            hidden_size=WIDTH,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            initializer_range=0.3,  # scores far enough apart for one likeliest token
            bos_token_id=1,
            eos_token_id=END,
            pad_token_id=PAD,
        )
        made[kind] = tmp_path_factory.mktemp(kind)
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(made[kind])
    return made


def build(
    encoder: Path, language: Path, *, vision: dict[str, Any] | None = None, noise: bool = False, **options: Any
) -> SmallVLM:
    torch.manual_seed(3)
    return build_small_vlm(
        VisionConfig(encoder, **(vision or {})),
        ConnectorConfig("pixel_shuffle_mlp"),
        LanguageConfig(language, **options),
        tile_size=TILE,
        image_token_id=IMAGE,
        noise_features=noise,
    ).eval()


@pytest.fixture(scope="module")
def model(encoder_directory: Path, language_directories: dict[str, Path]) -> SmallVLM:
    return build(encoder_directory, language_directories["Llama"])


def sample(number: int, tiles: int, answer: int) -> VLMSample:
    """A question with images before and inside it, and an answer that alone is labelled."""
    generator = torch.Generator().manual_seed(number)
    ids = [10 + number, *[IMAGE] * (4 * tiles), 20 + number]
    words = torch.randint(24, 40, (answer,), generator=generator).tolist()
    pixels = torch.randint(0, 256, (tiles, 3, TILE, TILE), dtype=torch.uint8, generator=generator)
    return VLMSample([*ids, *words], [*[-100] * len(ids), *words], pixels, f"sample {number}")


SAMPLES = [sample(0, 1, 4), sample(1, 0, 6), sample(2, 2, 3), sample(3, 1, 2)]


def one(item: VLMSample) -> Any:
    return collate([item], PAD, 64, pack=False)


@pytest.mark.parametrize("kind", [*KINDS, ABSOLUTE])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_a_packed_row_gives_each_sample_the_scores_it_has_alone(
    encoder_directory: Path, language_directories: dict[str, Path], kind: str, attention: str
) -> None:
    vlm = build(encoder_directory, language_directories[kind], attention=attention)
    packed = collate(SAMPLES, PAD, 30, pack=True)
    assert packed.segment_ids.max() >= 2
    assert len(packed.input_ids) < len(SAMPLES)
    scores = vlm.logits(packed)
    alone = {tuple(item.input_ids): vlm.logits(one(item))[0] for item in SAMPLES}
    for row in range(len(scores)):
        for number in range(1, int(packed.segment_ids[row].max()) + 1):
            here = packed.segment_ids[row] == number
            expected = alone.pop(tuple(packed.input_ids[row][here].tolist()))
            assert (scores[row][here] - expected).abs().max() <= 2e-5
    assert not alone


@torch.no_grad()
def test_the_loss_is_the_mean_cross_entropy_of_the_labels_packed_or_not(model: SmallVLM) -> None:
    losses, count = 0.0, 0
    for item in SAMPLES:
        scores = model.logits(one(item))[0]
        for place, label in enumerate(item.labels):
            if label != -100:
                losses -= float(scores[place - 1].log_softmax(-1)[label])
                count += 1
    for pack in (False, True):
        assert float(model(collate(SAMPLES, PAD, 40, pack=pack))) == pytest.approx(losses / count, rel=1e-5)


@torch.no_grad()
def test_a_batch_without_labels_has_loss_zero(model: SmallVLM) -> None:
    prompt = VLMSample([10, 11], [-100, -100], torch.zeros(0, 3, TILE, TILE, dtype=torch.uint8), "prompt")
    assert float(model(one(prompt))) == 0.0


@torch.no_grad()
def test_image_embeddings_stand_in_the_places_of_image_tokens_in_order(model: SmallVLM) -> None:
    batch = collate([SAMPLES[2], SAMPLES[0]], PAD, 64, pack=False)
    embeddings = model.embed(batch)
    images = model.image_embeddings(batch.tiles)
    assert images.shape == (12, WIDTH)
    places = batch.input_ids == IMAGE
    assert torch.equal(embeddings[places], images)
    language: Any = model.language
    assert torch.equal(embeddings[~places], language.get_input_embeddings()(batch.input_ids)[~places])
    assert not torch.equal(images[:4], images[4:8])
    prefix, patches = cast(Any, model.vision).forward_hidden_states(batch.tiles, 1)[0]
    assert torch.equal(model.connector(prefix, patches).flatten(0, 1), images)


def test_too_few_or_too_many_image_tokens_are_an_error_with_both_counts(model: SmallVLM) -> None:
    item = SAMPLES[0]
    for ids, wanted in (([10, *[IMAGE] * 3, 20], 3), ([10, *[IMAGE] * 5, 20], 5), ([10, 20], 0)):
        with pytest.raises(DataError, match=rf"{wanted} image tokens .* and 1 tiles, which make 4 embeddings"):
            model.logits(one(VLMSample(ids, [-100] * len(ids), item.tiles, "x")))
    with pytest.raises(DataError, match=r"4 image tokens .* and 0 tiles, which make 0"):
        model.logits(one(VLMSample([IMAGE] * 4, [-100] * 4, item.tiles[:0], "x")))


@pytest.mark.parametrize("kind", KINDS)
def test_answers_to_prompts_of_several_lengths_are_those_of_one_step_at_a_time(
    encoder_directory: Path, language_directories: dict[str, Path], kind: str
) -> None:
    vlm = build(encoder_directory, language_directories[kind])
    prompts = []
    for item in SAMPLES:
        ids = item.input_ids[: item.labels.index(next(label for label in item.labels if label != -100))]
        prompts.append(VLMSample(ids, [-100] * len(ids), item.tiles, item.record_id))
    ends = [END, 7, 11, 13]
    # What a chat model's directory says of sampling must not change an answer that is scored.
    settings = cast(Any, vlm.language).generation_config
    settings.update(do_sample=True, temperature=0.7, top_p=0.8, top_k=20, repetition_penalty=3.0)
    answers = vlm.generate(collate(prompts, PAD, 64, pack=False), 6, ends)
    assert len(set(map(tuple, answers))) > 1
    for item, answer in zip(prompts, answers, strict=True):
        ids = list(item.input_ids)
        for _ in range(6):
            with torch.no_grad():
                scores = vlm.logits(one(VLMSample(ids, [-100] * len(ids), item.tiles, "x")))[0, -1]
            scores[IMAGE] = -torch.inf  # an answer cannot hold an image
            token = int(scores.argmax())
            if token in ends:
                break
            ids.append(token)
        assert answer == ids[len(item.input_ids) :]


def test_an_answer_holds_no_image_token_however_likely(
    encoder_directory: Path, language_directories: dict[str, Path]
) -> None:
    vlm = build(encoder_directory, language_directories["Phi"])
    with torch.no_grad():
        cast(Any, vlm.language).get_output_embeddings().bias[IMAGE] = 1e4
    (answer,) = vlm.generate(one(SAMPLES[1]), 5, [END])
    assert answer
    assert IMAGE not in answer


def test_generating_from_a_packed_batch_is_refused(model: SmallVLM) -> None:
    with pytest.raises(DataError, match="pack=False"):
        model.generate(collate(SAMPLES, PAD, 64, pack=True), 3)


def test_generating_leaves_the_mode_as_it_was(encoder_directory: Path, language_directories: dict[str, Path]) -> None:
    vlm = build(encoder_directory, language_directories["Llama"])
    vlm.train()
    vlm.generate(one(SAMPLES[1]), 2)
    assert vlm.training
    assert vlm.language.training
    assert not vlm.vision.training  # frozen


def test_what_is_frozen_gets_no_gradient_and_what_is_trained_does(
    encoder_directory: Path, language_directories: dict[str, Path]
) -> None:
    def groups(vlm: SmallVLM) -> dict[str, bool]:
        vlm.train()(collate(SAMPLES, PAD, 40, pack=True)).backward()
        return {
            part: any(value.grad is not None and bool(value.grad.any()) for value in getattr(vlm, part).parameters())
            for part in ("vision", "connector", "language")
        }

    def make(vision: str, language: str) -> SmallVLM:
        directory = language_directories["Phi"]
        return build(encoder_directory, directory, vision={"tune": vision}, tune=language, lora_rank=2)

    assert groups(make("frozen", "frozen")) == {"vision": False, "connector": True, "language": False}
    assert groups(make("full", "lora")) == {"vision": True, "connector": True, "language": True}
    vlm = make("frozen", "frozen").train()
    assert (vlm.vision.training, vlm.connector.training, vlm.language.training) == (False, True, False)
    counts = count_parameters(vlm)
    assert counts.trained == counts.connector == sum(value.numel() for value in vlm.connector.parameters())
    assert counts.total == sum(value.numel() for value in vlm.parameters())
    assert "0.00 M may be trained" in str(counts)


@torch.no_grad()
def test_noise_features_leave_nothing_of_the_image_but_their_mean_and_spread(
    encoder_directory: Path, language_directories: dict[str, Path], model: SmallVLM
) -> None:
    other = VLMSample(SAMPLES[0].input_ids, SAMPLES[0].labels, 255 - SAMPLES[0].tiles, "other")
    assert (model.logits(one(other)) - model.logits(one(SAMPLES[0]))).abs().max() > 1e-2
    noisy = build(encoder_directory, language_directories["Llama"], noise=True)
    first = noisy.logits(one(SAMPLES[0]))
    assert torch.equal(noisy.logits(one(other)), first)
    black = VLMSample(SAMPLES[0].input_ids, SAMPLES[0].labels, torch.zeros_like(SAMPLES[0].tiles), "black")
    assert torch.equal(noisy.logits(one(black)), first)
    real = model.features(SAMPLES[0].tiles)[1].flatten(0, 2)
    noise = noisy.noise
    assert noise is not None
    assert torch.allclose(noise.mean, real.mean(0))
    drawn = noise(1, (64, 64))[1].flatten(0, 2)
    assert torch.allclose(drawn.mean(0), real.mean(0), atol=0.1 * float(real.std()))
    assert torch.allclose(drawn.std(0), real.std(0, correction=0), rtol=0.1)
    again = build(encoder_directory, language_directories["Llama"], noise=True)
    again.load_state_dict(noisy.state_dict())
    assert torch.equal(again.logits(one(other)), first)  # what was calibrated is saved


def test_padding_attends_to_itself_and_samples_to_their_own_past() -> None:
    mask = segment_mask(torch.tensor([[1, 1, 2, 2, 0]]), torch.float32)[0, 0] == 0
    expected = [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 1, 1, 0], [0, 0, 0, 0, 1]]
    assert mask.int().tolist() == expected


@torch.no_grad()
def test_the_layer_is_the_one_configured_or_the_manifests(
    encoder_directory: Path, language_directories: dict[str, Path], tmp_path: Path
) -> None:
    config = VisionConfig(encoder_directory)
    assert select_layer(config) == -1
    assert select_layer(VisionConfig(encoder_directory, layer=-3)) == -3
    vlm = build(encoder_directory, language_directories["Llama"], vision={"layer": -2})
    tiles = SAMPLES[0].tiles
    states = cast(Any, vlm.vision).forward_hidden_states(tiles, 2)
    assert torch.equal(vlm.features(tiles)[1], states[0][1])
    assert not torch.equal(states[0][1], states[1][1])
    (tmp_path / "manifest.json").write_text(json.dumps({"features": {"select_layer": -2}}))
    assert select_layer(VisionConfig(tmp_path)) == -2
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(ConfigError, match=r"manifest\.json"):
        select_layer(VisionConfig(tmp_path))


def test_what_does_not_fit_is_refused_with_a_way_out(
    encoder_directory: Path, language_directories: dict[str, Path], model: SmallVLM
) -> None:
    with pytest.raises(ConfigError, match=r"widths 16 and 48, but the encoder's layer -1 is 16 wide .* 32"):
        SmallVLM(model.vision, build_connector(ConnectorConfig(), 16, 48, (4, 4)), model.language, IMAGE)
    with pytest.raises(ConfigError, match="3 layers; take one from -3"):
        load_vision(VisionConfig(encoder_directory, layer=-4))
    with pytest.raises(ConfigError, match="counted from the end"):
        VisionConfig(encoder_directory, layer=2)
    with pytest.raises(ConfigError, match="is no run directory"):
        VisionConfig(encoder_directory, which="initial")
    with pytest.raises(ConfigError, match="use 28 or 35"):
        patch_grid(cast(Any, model.vision), 30)
    assert model.tokens_per_tile(TILE) == 4
    assert model.tokens_per_tile(56) == 16


def test_gradients_reach_the_image_through_a_frozen_language_model(model: SmallVLM) -> None:
    batch = one(SAMPLES[0])
    images = torch.zeros(4, WIDTH, requires_grad=True)
    scores = cast(Any, model.language)(inputs_embeds=model.place(batch, images), use_cache=False).logits
    F.cross_entropy(scores[0, 5:9], batch.labels[0, 6:10]).backward()
    assert images.grad is not None
    assert bool(images.grad.abs().sum(1).all())
