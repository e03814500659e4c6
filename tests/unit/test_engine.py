from __future__ import annotations

import time

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from distill import attention_probe, engine
from distill.attention_probe import choose_attention, explicit_attention, measure_attention
from distill.compilation import compile_blocks, repeated_blocks
from distill.engine import Engine, EngineConfig, fastest_micro_batch
from distill.errors import ConfigError
from distill.frozen_teachers import FrozenTeachers
from students import InternViT as Student
from students import TimmStudent
from teachers import InternViT as Teacher
from teachers import InternViTConfig, TimmTeacher

CPU = torch.device("cpu")
WIDE = (4, 257, 64)


@pytest.fixture
def seconds(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """What the probe is told each kernel took."""
    taken = {"sdpa": 1.0, "explicit": 1.0}
    monkeypatch.setattr(attention_probe, "measure_attention", lambda *_: taken)
    return taken


@pytest.mark.parametrize(
    ("sdpa", "explicit", "dtype", "expected"),
    [
        (1.0, 2.0, torch.float32, "sdpa"),
        (2.0, 1.0, torch.float32, "explicit"),
        (1.1, 1.0, torch.float32, "sdpa"),  # within the margin the usual kernel stays
        (1.0, 1.1, torch.bfloat16, "explicit"),
        (1.0, 2.0, torch.bfloat16, "sdpa"),
    ],
)
def test_the_measured_kernel_wins_by_a_margin_only(seconds, sdpa, explicit, dtype, expected) -> None:
    seconds.update(sdpa=sdpa, explicit=explicit)
    assert choose_attention(WIDE, images=2, device=CPU, dtype=dtype, trains=False) == expected


def test_small_attention_and_other_devices_are_not_measured(seconds) -> None:
    seconds.update(sdpa=9.0, explicit=1.0)
    assert choose_attention((2, 5, 16), images=2, device=CPU, dtype=torch.float32, trains=False) == "sdpa"
    gpu = torch.device("cuda")
    assert choose_attention(WIDE, images=2, device=gpu, dtype=torch.float32, trains=False) == "sdpa"


@pytest.mark.parametrize("trains", [False, True])
def test_the_probe_times_both_kernels_once_and_leaves_the_global_generator_alone(trains: bool) -> None:
    measure_attention.cache_clear()
    torch.manual_seed(7)
    state = torch.get_rng_state()
    first = measure_attention(1, 2, 65, 16, torch.float32, trains)
    assert first.keys() == {"sdpa", "explicit"}
    assert all(0 < value < float("inf") for value in first.values())
    assert torch.equal(torch.get_rng_state(), state)
    assert measure_attention(1, 2, 65, 16, torch.float32, trains) is first


def test_both_kernels_of_the_probe_compute_the_same() -> None:
    query, key, value = torch.randn(3, 2, 2, 9, 8)
    expected = F.scaled_dot_product_attention(query, key, value)
    torch.testing.assert_close(explicit_attention(query, key, value), expected)


def small_teacher(attention: str = "auto") -> Teacher:
    config = InternViTConfig(embed_dim=32, depth=2, num_heads=2, mlp_dim=64, img_size=56)
    teacher = Teacher("random", config, dtype="float32", attention=attention)
    teacher.load_weights()
    return teacher


def small_student(attention: str = "auto", seed: int = 0) -> Student:
    return Student("random", img_size=56, embed_dim=24, depth=2, num_heads=2, attention=attention, seed=seed)


@pytest.mark.parametrize(
    ("encoder", "shape"),
    [
        (lambda: small_teacher(), (2, 17, 16)),
        (lambda: small_student(), (2, 17, 12)),
        (lambda: TimmTeacher("test_vit", weights="random"), (2, 17, 32)),
        (lambda: TimmStudent("test_vit", weights="random", img_size=160), (2, 17, 32)),
    ],
    ids=["InternViT teacher", "InternViT student", "timm teacher", "timm student"],
)
def test_encoders_tell_the_shape_of_their_attention_and_take_either_kernel(encoder, shape, monkeypatch) -> None:
    module = encoder()
    module.load_weights()
    patch = module.patch_size
    assert module.attention_shape(4 * patch) == shape
    called = []
    fused = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *a, **k: called.append(1) or fused(*a, **k))
    images = torch.rand(1, 3, 160, 160) if patch == 16 else torch.rand(1, 3, 56, 56)
    states = {}
    for kernel in ("sdpa", "explicit"):
        called.clear()
        module.use_attention(kernel)
        states[kernel] = module.forward_hidden_states(images, 1)[0][1]
        assert bool(called) == (kernel == "sdpa")
    torch.testing.assert_close(states["sdpa"], states["explicit"], rtol=1e-4, atol=1e-5)


def test_a_kernel_that_the_recipe_fixed_is_not_chosen() -> None:
    assert small_teacher("explicit").attention_shape(56) is None
    assert small_student("sdpa").attention_shape(56) is None
    assert TimmTeacher("resnet18", weights="random").attention_shape(64) is None


class Data:
    def __init__(self, size: int) -> None:
        self.img_size_px, self.global_batch_size = size, 4


class Trainer:
    world_size = accumulate_grad_batches = 1
    precision = "32-true"

    def __init__(self, size: int = 56) -> None:
        self.datamodule = Data(size)


def started(config: EngineConfig, micro_batch=None, choices=None) -> tuple[Engine, FrozenTeachers, nn.ModuleDict]:
    own = Engine(config, micro_batch, remembers_states=False)
    own.choices = dict(choices or {})
    teachers, students = (
        FrozenTeachers({"big": small_teacher()}, own.micro_batch),
        nn.ModuleDict({"s": small_student()}),
    )
    students["s"].load_weights()
    own.start(Trainer(), teachers, students, CPU)
    return own, teachers, students


def test_choices_are_kept_and_a_resumed_run_takes_them_without_measuring(monkeypatch) -> None:
    monkeypatch.setattr(engine, "choose_attention", lambda *_, **__: "explicit")
    monkeypatch.setattr(engine, "fastest_micro_batch", lambda *_: 2)
    first, teachers, _ = started(EngineConfig(), "auto")
    assert set(first.choices.values()) == {"explicit", 2}
    assert teachers.micro_batch == 2
    assert teachers["big"].encoder.layers[0].attn.kernel == "explicit"
    monkeypatch.setattr(engine, "choose_attention", lambda *_, **__: "sdpa")
    monkeypatch.setattr(engine, "fastest_micro_batch", lambda *_: 1)
    second, teachers, _ = started(EngineConfig(), "auto", first.choices)
    assert second.choices == first.choices
    assert teachers.micro_batch == 2


def test_nothing_is_measured_where_the_recipe_says_so(monkeypatch) -> None:
    monkeypatch.setattr(engine, "choose_attention", lambda *_, **__: pytest.fail("measured"))
    own, teachers, _ = started(EngineConfig(measure_attention=False), 3)
    assert own.choices == {}
    assert teachers.micro_batch == 3


def burn(cpu_seconds: float) -> None:
    until = time.process_time() + cpu_seconds
    while time.process_time() < until:
        pass


@pytest.mark.parametrize(
    ("cost", "expected"),
    [(lambda count: 0.001 * count**2, 1), (lambda count: 0.004, 8), (lambda count: 0.001 * count, 1)],
    ids=["single images are fastest", "a whole batch is", "all are equal"],
)
def test_the_micro_batch_is_the_one_that_takes_the_least_cpu_time(cost, expected) -> None:
    assert fastest_micro_batch(lambda part: burn(cost(len(part))), torch.zeros(8, 3, 2, 2)) == expected


def test_teachers_that_take_long_see_single_images_without_further_measuring(monkeypatch) -> None:
    monkeypatch.setattr(engine, "MICRO_BATCH_PROBE_S", 0.001)
    seen = []

    def forward(part) -> None:
        seen.append(len(part))
        burn(0.01)

    assert fastest_micro_batch(forward, torch.zeros(8, 3, 2, 2)) == 1
    assert seen == [1, 1]


def test_sharded_teachers_refuse_what_would_make_ranks_differ() -> None:
    config = EngineConfig(teacher_sharding="blocks")
    with pytest.raises(ConfigError, match="model.teacher_cache_gib"):
        Engine(config, None, remembers_states=True)
    with pytest.raises(ConfigError, match="model.teacher_micro_batch is auto"):
        Engine(config, "auto", remembers_states=False)
    teachers = FrozenTeachers({"net": TimmTeacher("resnet18", weights="random")})
    with pytest.raises(ConfigError, match="TimmTeacher, the teacher 'net', has no method `shard`"):
        Engine(config, None, remembers_states=False).shard(teachers)


def test_one_process_keeps_its_teachers_whole() -> None:
    teachers = FrozenTeachers({"big": small_teacher()})
    Engine(EngineConfig(teacher_sharding="blocks"), None, remembers_states=False).shard(teachers)
    assert not teachers.is_sharded


def test_the_repeated_blocks_of_an_encoder_are_found_and_compiled_without_renaming_weights() -> None:
    student = small_student()
    student.load_weights()
    names = list(student.state_dict())
    assert repeated_blocks(student) == list(student.model.blocks)
    assert compile_blocks(student, "off") == 0
    assert compile_blocks(student, "aot_eager") == 2
    assert list(student.state_dict()) == names
