"""Records from files and shards, and what hostile ones are told."""

from __future__ import annotations

import io
import json
import os
import pickle
import tarfile
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from distill.errors import ConfigError, DataError
from distill.vlm.records import Kind, RecordFile, read_records

HUMAN, GPT = {"from": "human", "value": "What is it?"}, {"from": "gpt", "value": "A cat."}


def png(colour: str = "red", size: tuple[int, int] = (6, 4)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, "PNG")
    return buffer.getvalue()


def write(folder: Path, records: list[Any], name: str = "data.jsonl") -> Path:
    path = folder / name
    lines = json.dumps(records) if name.endswith(".json") else "\n".join(json.dumps(record) for record in records)
    path.write_text(lines, encoding="utf-8")
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for colour in ("red", "blue"):
        (tmp_path / f"{colour}.png").write_bytes(png(colour))
    return tmp_path


@pytest.mark.parametrize("name", ["data.json", "data.jsonl"])
def test_llava_records_are_read_from_json_and_jsonl(folder: Path, name: str) -> None:
    asked = {"from": "human", "value": "<image>\nWhat is it?"}
    again = {"from": "human", "value": "Sure?"}
    records = read_records(
        write(folder, [{"id": "a", "image": "red.png", "conversations": [asked, GPT, again, GPT]}], name), "instruction"
    )
    (record,) = records
    assert [(turn.role, turn.text) for turn in record.turns] == [
        ("human", "<image>\nWhat is it?"),
        ("assistant", "A cat."),
        ("human", "Sure?"),
        ("assistant", "A cat."),
    ]
    assert record.id.endswith("record 1 (a)")
    assert record.images[0].size() == (6, 4)
    assert record.images[0].read().getpixel((0, 0)) == (255, 0, 0)


def test_a_single_image_without_a_place_is_put_first(folder: Path) -> None:
    (record,) = read_records(write(folder, [{"image": "red.png", "conversations": [HUMAN, GPT]}]), "instruction")
    assert record.turns[0].text == "<image>\nWhat is it?"


def test_several_images_keep_their_order(folder: Path) -> None:
    asked = {"from": "human", "value": "<image> or <image>?"}
    line = {"image": ["blue.png", "red.png"], "conversations": [asked, GPT]}
    (record,) = read_records(write(folder, [line]), "instruction")
    assert [image.read().getpixel((0, 0)) for image in record.images] == [(0, 0, 255), (255, 0, 0)]


def test_video_frames_are_numbered_as_internvl_does(folder: Path) -> None:
    asked = {"from": "human", "value": "<video>\nWhat happens?"}
    (record,) = read_records(
        write(folder, [{"video": ["red.png", "blue.png"], "conversations": [asked, GPT]}]), "instruction"
    )
    assert record.turns[0].text == "Frame1: <image>\nFrame2: <image>\nWhat happens?"
    assert record.is_video
    assert len(record.images) == 2


def test_a_record_may_have_text_alone_and_a_system_turn(folder: Path) -> None:
    system = {"from": "system", "value": "Be short."}
    (record,) = read_records(write(folder, [{"conversations": [system, HUMAN, GPT]}]), "instruction")
    assert [turn.role for turn in record.turns] == ["system", "human", "assistant"]
    assert record.images == ()


def test_question_and_answer_are_the_parts_before_and_after_the_last_turn(folder: Path) -> None:
    (record,) = read_records(write(folder, [{"image": "red.png", "conversations": [HUMAN, GPT]}]), "instruction")
    assert record.answer == "A cat."
    assert [turn.role for turn in record.question.turns] == ["human"]
    assert record.question.answer == ""
    assert record.question.question == record.question


def test_captions_are_read_from_jsonl_and_from_a_table(folder: Path) -> None:
    (folder / "captions.tsv").write_text("red.png\ta red square\n\nblue.png\tblue\n", encoding="utf-8")
    table = read_records(folder / "captions.tsv", "caption")
    assert [record.turns[1].text for record in table] == ["a red square", "blue"]
    assert table[0].turns[0].text == "<image>"
    lines = read_records(write(folder, [{"image": "red.png", "caption": "red"}]), "caption", caption_prompt="Describe.")
    assert lines[0].turns[0].text == "<image>\nDescribe."


def test_interleaved_documents_are_read_as_text_with_places_and_as_parallel_lists(folder: Path) -> None:
    lines = [
        {"text": "A <image> and <image>.", "images": ["red.png", "blue.png"]},
        {"texts": ["First", None, "then"], "images": [None, "red.png", None]},
        {"text": "no image"},
    ]
    first, second, third = read_records(write(folder, lines), "interleaved")
    assert (first.turns[0].text, len(first.images)) == ("A <image> and <image>.", 2)
    assert (second.turns[0].text, len(second.images)) == ("First\n<image>\nthen", 1)
    assert (third.kind, third.images) == ("interleaved", ())


def test_plain_text_is_one_document_a_file_or_a_line(folder: Path) -> None:
    texts = folder / "texts"
    texts.mkdir()
    (texts / "b.txt").write_text("second\n", encoding="utf-8")
    (texts / "a.txt").write_text("first\n\nstill first", encoding="utf-8")
    assert [record.turns[0].text for record in read_records(texts, "text")] == ["first\n\nstill first", "second"]
    assert [record.turns[0].text for record in read_records(write(folder, [{"text": "one"}]), "text")] == ["one"]


def tar(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def test_shards_hold_the_same_records(tmp_path: Path) -> None:
    talk = json.dumps({"conversations": [HUMAN, GPT]}).encode()
    named = json.dumps({"image": "b", "conversations": [HUMAN, GPT]}).encode()
    path = tar(tmp_path / "s.tar", {"a.json": talk, "a.png": png("red"), "c.json": named, "b.png": png("blue")})
    own, other = read_records(path, "instruction")
    assert own.images[0].read().getpixel((0, 0)) == (255, 0, 0)
    assert other.images[0].read().getpixel((0, 0)) == (0, 0, 255)
    captions = read_records(tar(tmp_path / "t.tar", {"a.txt": b"a caption", "a.png": png()}), "caption")
    assert captions[0].turns[1].text == "a caption"
    document = json.dumps({"text": "<image> and <image>", "images": ["x", "y"]}).encode()
    shard = tar(tmp_path / "u.tar", {"d.json": document, "x.png": png(), "y.png": png()})
    assert len(read_records(shard, "interleaved")[0].images) == 2


def test_a_folder_of_shards_is_read_in_order_and_travels_to_a_worker(tmp_path: Path) -> None:
    for name in ("s-1", "s-0"):
        tar(tmp_path / f"{name}.tar", {"a.txt": name.encode(), "a.png": png()})
    records = pickle.loads(pickle.dumps(read_records(tmp_path, "caption")))
    assert [record.turns[1].text for record in records] == ["s-0", "s-1"]
    assert records[1].images[0].size() == (6, 4)


def test_records_are_a_sequence(folder: Path) -> None:
    records = read_records(write(folder, [{"text": str(number)} for number in range(5)]), "text")
    assert [record.turns[0].text for record in records[1:4:2]] == ["1", "3"]
    assert records[-1].turns[0].text == "4"
    with pytest.raises(IndexError):
        records[5]


def test_a_jsonl_file_is_read_by_place_and_not_held_in_memory(folder: Path) -> None:
    records = read_records(write(folder, [{"text": "x" * 10_000}] * 200), "text")
    assert isinstance(records, RecordFile)
    assert len(pickle.dumps(records)) < 10_000


BAD: list[tuple[Kind, Any, str]] = [
    ("instruction", [], "is a list; a record is a JSON object"),
    ("instruction", {"conversations": []}, "'conversations' is \\[\\]"),
    ("instruction", {"conversations": ["hello"]}, "a turn is 'hello'"),
    ("instruction", {"conversations": [{"from": "bot", "value": "x"}]}, "from 'bot'; the roles are human"),
    ("instruction", {"conversations": [{"from": ["gpt"], "value": "x"}]}, "from \\['gpt'\\]"),
    ("instruction", {"conversations": [{"from": "human", "value": 3}]}, "'value' is 3"),
    ("instruction", {"conversations": [GPT, HUMAN]}, "human first"),
    ("instruction", {"image": ["red.png", "blue.png"], "conversations": [HUMAN, GPT]}, "0 place"),
    ("instruction", {"image": 5, "conversations": [HUMAN, GPT]}, "'image' holds 5"),
    ("instruction", {"image": "../red.png", "conversations": [HUMAN, GPT]}, "'../red.png' is unsafe"),
    ("instruction", {"image": "/etc/passwd", "conversations": [HUMAN, GPT]}, "unsafe"),
    ("instruction", {"video": [], "conversations": [HUMAN, GPT]}, "0 frame"),
    ("instruction", {"video": ["red.png"], "conversations": [HUMAN, GPT]}, "0 place\\(s\\) <video>"),
    ("caption", {"image": "red.png"}, "'caption' is None"),
    ("caption", {"image": "red.png", "caption": "<image>"}, "a caption is text alone"),
    ("interleaved", {"texts": ["a"], "images": []}, "'images' is \\[\\]"),
    ("interleaved", {"texts": ["a"], "images": [None, "red.png"]}, "go in pairs"),
    ("interleaved", {"texts": ["a"], "images": ["red.png"]}, "either text or an image's name"),
    ("interleaved", {"texts": [None], "images": [None]}, "either text or an image's name"),
    ("interleaved", {"text": "<image>", "images": [None]}, "'images' holds None"),
    ("text", {"text": ""}, "'text' is ''"),
    ("text", {"text": "an <image>"}, "1 place"),
]


@pytest.mark.parametrize(("kind", "record", "message"), BAD)
def test_a_bad_record_is_named_when_the_file_is_opened(folder: Path, kind: Kind, record: Any, message: str) -> None:
    fine = {
        "instruction": {"conversations": [HUMAN, GPT]},
        "caption": {"image": "red.png", "caption": "red"},
        "interleaved": {"text": "fine"},
        "text": {"text": "fine"},
    }
    with pytest.raises(DataError, match=message) as raised:
        read_records(write(folder, [fine[kind], record]), kind)
    assert "data.jsonl: record 2" in str(raised.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "fine"}\n{"text": ', "record 2 is no valid JSON"),
        ("a.jsonl", b'{"text": "fine"}\n' + b"[" * 100_000, "record 2 is no valid JSON"),
        ("a.jsonl", b'\xff\xfe{"text": "x"}', "record 1 is no valid JSON"),
        ("a.jsonl", b"x" * ((4 << 20) + 2), "line 1 is longer than"),
        ("a.jsonl", b"\n\n", "holds no record"),
        ("a.json", b'{"text": "x"}', "holds a dict; a .json file holds one list"),
        ("a.json", b"[" * 100_000, "no valid JSON"),
        ("a.json", b"[]", "holds no record"),
    ],
)
def test_a_damaged_file_is_refused(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_records(tmp_path / name, "text")


def test_a_path_that_is_not_what_it_is_given_as_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        read_records(tmp_path / "absent.jsonl", "text")
    with pytest.raises(ConfigError, match="ending '.csv'"):
        read_records(tmp_path / "a.csv", "caption")
    with pytest.raises(ConfigError, match="Unknown kind of records 'video'"):
        read_records(tmp_path / "a.jsonl", "video")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="has kind text"):
        read_records(tmp_path, "caption")
    with pytest.raises(DataError, match=r"no \*.txt"):
        read_records(tmp_path, "text")


def test_a_caption_table_needs_tabs(tmp_path: Path) -> None:
    (tmp_path / "c.tsv").write_text("red.png a red square\n", encoding="utf-8")
    with pytest.raises(DataError, match="record 1 has no tab"):
        read_records(tmp_path / "c.tsv", "caption")


def test_images_that_cannot_be_used_are_named_with_their_record(tmp_path: Path) -> None:
    (tmp_path / "damaged.png").write_bytes(png(size=(64, 64))[:80])
    bomb = io.BytesIO()
    Image.new("1", (9000, 9000)).save(bomb, "PNG")
    (tmp_path / "bomb.png").write_bytes(bomb.getvalue())
    (tmp_path / "folder.png").mkdir()
    os.mkfifo(tmp_path / "pipe.png")
    names = ("absent.png", "damaged.png", "bomb.png", "pipe.png", "folder.png")
    records = read_records(write(tmp_path, [{"image": name, "caption": "x"} for name in names]), "caption")
    reasons = ("No such file", "does not decode", "at most 64,000,000 pixels", "no regular file", "no regular file")
    for number, (record, reason) in enumerate(zip(records, reasons, strict=True), start=1):
        with pytest.raises(DataError, match=reason) as raised:
            record.images[0].read()
        assert f"record {number}" in str(raised.value)


def test_a_shard_record_that_names_an_image_of_no_key_is_refused(tmp_path: Path) -> None:
    named = json.dumps({"image": "z", "conversations": [HUMAN, GPT]}).encode()
    with pytest.raises(DataError, match=r"a.json: the shard has no image of the key 'z'"):
        read_records(tar(tmp_path / "s.tar", {"a.json": named, "a.png": png()}), "instruction")
    with pytest.raises(DataError, match="no valid JSON"):
        read_records(tar(tmp_path / "t.tar", {"a.json": b"{", "a.png": png()}), "instruction")
    with pytest.raises(DataError, match="no record"):
        read_records(tar(tmp_path / "u.tar", {"a.png": png()}), "instruction")
