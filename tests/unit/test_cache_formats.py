"""Records, compressions and units of a cache of teacher states."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from distill.cache.compression import encode, fit_basis
from distill.cache.errors_measured import measure_errors, token_errors
from distill.cache.record import RecordLayout, decode_records, encode_records, lay_out
from distill.cache.units import UnitPlan, fault_of, write_unit
from distill.errors import DataError
from distill.standardise import FeatureStatistics

WIDTH = 24


def make_states(count: int = 3, dtype: torch.dtype = torch.bfloat16, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)

    def layer(prefix: int, side: int, width: int):
        shapes = (count, prefix, width), (count, side, side, width)
        # Unequal channels, as encoders have them: a few are large.
        scale = torch.logspace(1, -2, width)
        return tuple((torch.randn(shape, generator=generator) * scale + 0.5).to(dtype) for shape in shapes)

    return {"vit": [layer(1, 4, WIDTH), layer(1, 4, WIDTH)], "cnn": [layer(0, 2, 2 * WIDTH)]}


def bases_of(states, dims: int):
    bases = {}
    for name, layers in states.items():
        for number, layer in enumerate(layers):
            statistics = FeatureStatistics(layer[1].shape[-1])
            for part in layer:
                statistics.update(part)
            bases[name, number - len(layers)] = fit_basis(statistics, dims)
    return bases


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_uncompressed_states_come_back_bit_for_bit_in_their_own_dtype(dtype: torch.dtype) -> None:
    states = make_states(dtype=dtype)
    layout = RecordLayout.from_json(lay_out(states, "none", 8).as_json())
    back = decode_records(encode_records(states, layout, {}), layout, {}, {"vit": 2, "cnn": 1})
    for name, layers in states.items():
        for ours, theirs in zip(back[name], layers, strict=True):
            assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_fewer_layers_than_are_stored_are_the_last_ones() -> None:
    states = make_states()
    layout = lay_out(states, "none", 8)
    back = decode_records(encode_records(states, layout, {}), layout, {}, {"vit": 1})
    assert back.keys() == {"vit"}
    assert torch.equal(back["vit"][0][1], states["vit"][1][1])


def test_int8_errs_by_at_most_half_a_step_of_each_token() -> None:
    states = make_states(dtype=torch.float32)
    layout = lay_out(states, "int8", 8)
    back = decode_records(encode_records(states, layout, {}), layout, {}, {"vit": 2})
    true, stored = states["vit"][0][1], back["vit"][0][1]
    steps = true.abs().amax(-1, keepdim=True) / 127
    assert bool(((true - stored).abs() <= 0.501 * steps).all())
    assert not torch.equal(true, stored)


def test_a_whole_rotated_basis_loses_less_than_plain_int8_and_fewer_directions_lose_more() -> None:
    states = make_states(64, dtype=torch.float32)
    plain = measure_errors([states], "int8", 0, {})
    whole = measure_errors([states], "pca", 2 * WIDTH, bases_of(states, 2 * WIDTH))
    part = measure_errors([states], "pca", 6, bases_of(states, 6))
    for a, b, c in zip(plain, whole, part, strict=True):
        assert b["mean"] < a["mean"] < 1e-3
        assert c["mean"] > b["mean"]
        assert a["mean"] < a["worst_percentile"] < 0.01


def test_token_errors_are_one_minus_cosine() -> None:
    a, b = torch.randn(50, 7), torch.randn(50, 7)
    assert torch.allclose(token_errors(a, b), 1 - torch.cosine_similarity(a.double(), b.double()), atol=1e-12)


def test_a_token_that_is_not_finite_comes_back_not_finite_and_leaves_the_others_alone() -> None:
    states = make_states(dtype=torch.float32)
    states["vit"][0][1][0, 0, 0, 0] = float("nan")
    for compression in ("none", "fp16", "int8"):
        layout = lay_out(states, compression, 8)
        back = decode_records(encode_records(states, layout, {}), layout, {}, {"vit": 2})["vit"][0][1]
        assert not back[0, 0, 0].isfinite().all()
        assert back[1:].isfinite().all()


def test_values_beyond_half_precision_are_refused_by_name() -> None:
    with pytest.raises(DataError, match="float16 ends at 65504"):
        encode(torch.full((1, 1, 2), 1e5), "fp16", None)


def test_states_of_another_dtype_than_the_layout_are_refused() -> None:
    layout = lay_out(make_states(), "none", 8)
    with pytest.raises(DataError, match="begun with"):
        encode_records(make_states(dtype=torch.float32), layout, {})


def unit(folder: Path, **changes) -> UnitPlan:
    settings = {"cache": "c" * 64, "shard": "ocr/ocr-0.tar", "shard_sha256": "5" * 64, "rows": 3, "views": 2}
    return UnitPlan(folder / "train" / "ocr-0.safetensors", **(settings | {"record_bytes": 32} | changes))


def batches():
    records = torch.arange(6 * 32, dtype=torch.int64).reshape(6, 32).to(torch.uint8)
    usable = torch.tensor([True, True, True, False, True, True])
    return [(records[:4], usable[:4]), (records[4:], usable[4:])]


def test_a_unit_is_a_safetensors_file_of_the_size_told_before(tmp_path: Path) -> None:
    plan = unit(tmp_path)
    facts = write_unit(plan, batches())
    assert plan.path.stat().st_size == plan.num_bytes == facts.bytes
    assert facts.unusable == 1
    with safe_open(plan.path, "pt") as file:
        assert file.get_tensor("records").shape == (3, 2, 32)
        assert torch.equal(file.get_tensor("records").flatten(0, 1), torch.cat([records for records, _ in batches()]))
        assert file.get_tensor("usable").tolist() == [[1, 1], [1, 0], [1, 1]]
    assert sorted(path.name for path in plan.path.parent.iterdir()) == ["ocr-0.json", "ocr-0.safetensors"]


@pytest.mark.parametrize(
    "changes", [{"cache": "d" * 64}, {"shard_sha256": "6" * 64}, {"rows": 4}, {"views": 1}, {"record_bytes": 16}]
)
def test_a_unit_of_another_cache_shard_or_layout_counts_as_not_finished(tmp_path: Path, changes) -> None:
    write_unit(unit(tmp_path), batches())
    assert fault_of(unit(tmp_path), "sha256") is None
    assert fault_of(unit(tmp_path, **changes), "size") == "is not finished"


def test_a_flipped_bit_is_found_by_checksum_and_a_cut_file_by_size(tmp_path: Path) -> None:
    plan = unit(tmp_path)
    write_unit(plan, batches())
    content = bytearray(plan.path.read_bytes())
    content[len(plan.header) + 5] ^= 1
    plan.path.write_bytes(content)
    assert fault_of(plan, "size") is None
    assert "SHA-256" in (fault_of(plan, "sha256") or "")
    plan.path.write_bytes(content[:-1])
    assert "bytes" in (fault_of(plan, "size") or "")


def test_a_write_that_fails_leaves_nothing_but_what_is_whole(tmp_path: Path) -> None:
    plan = unit(tmp_path)

    def failing():
        yield batches()[0]
        raise DataError("the shard is gone")

    with pytest.raises(DataError, match="the shard is gone"):
        write_unit(plan, failing())
    assert list(plan.path.parent.iterdir()) == []
    (plan.path.parent / f".{plan.path.name}.99999999.tmp").write_bytes(b"of a killed process")
    write_unit(plan, batches())
    assert len(list(plan.path.parent.iterdir())) == 2
