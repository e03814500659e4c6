"""The shard cache is bounded, holds only what was checked, and downloads each shard once; the look-ahead fills it."""

from __future__ import annotations

import hashlib
import io
import multiprocessing
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import webdataset as wds
from PIL import Image

from distill.data.fetch import PlannedDataset, RowDataset
from distill.data.image_header import ImageError
from distill.data.index import DatasetIndex, build_index
from distill.data.loader import StartMethod, build_loader
from distill.data.look_ahead import LookAhead
from distill.data.plan import SamplePlan
from distill.data.samplers import PlanSampler
from distill.data.shard_cache import ShardCache
from distill.data.shard_cache_config import ShardCacheConfig
from distill.data.shard_reader import ShardReader
from distill.errors import ConfigError, DataError
from distill.trainer_view import TrainerView

SHARD_BYTES = 100_000
WAIT_S = 60

MakeCache = Callable[..., ShardCache]


def content_of(number: int) -> bytes:
    return bytes([number]) * SHARD_BYTES


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def config_of(folder: Path, shards: float = 100, **settings: Any) -> ShardCacheConfig:
    """Return a configuration whose limit is so many shards."""
    limit = shards * SHARD_BYTES / 2**30
    return ShardCacheConfig(folder, limit, **{"retries": 2, "timeout_s": 20, **settings})


def read(cache: ShardCache, url: str, content: bytes) -> bytes:
    with os.fdopen(cache.open(url, len(content), digest(content)), "rb") as file:
        return file.read()


def kept(folder: Path) -> set[str]:
    return {path.stem for path in folder.glob("*.tar")}


def test_a_shard_is_downloaded_once_and_kept_under_its_sha256(fault_server: Any, tmp_path: Path) -> None:
    cache = ShardCache(config_of(tmp_path / "cache"))
    url = fault_server.add("/x-0.tar", content_of(0))
    for _ in range(3):
        assert read(cache, url, content_of(0)) == content_of(0)
    assert fault_server.gets["/x-0.tar"] == 1
    assert kept(tmp_path / "cache") == {digest(content_of(0))}
    assert not list((tmp_path / "cache").glob("*.partial"))


def test_the_folder_is_private(tmp_path: Path) -> None:
    ShardCache(config_of(tmp_path / "a" / "cache"))
    assert (tmp_path / "a" / "cache").stat().st_mode & 0o777 == 0o700
    (tmp_path / "open").mkdir(mode=0o755)
    with pytest.raises(ConfigError, match=r"open to other users \(mode 755\)"):
        ShardCache(config_of(tmp_path / "open"))
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"data\.shard_cache\.dir .* cannot be made"):
        ShardCache(config_of(tmp_path / "file" / "below"))


def test_the_default_folder_is_in_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert ShardCache().folder == tmp_path / ".cache" / "encoder-distill" / "shards"


@pytest.mark.parametrize("name", ["limit_gib", "timeout_s", "retries", "look_ahead_samples"])
def test_settings_that_cannot_work_name_their_key(name: str) -> None:
    with pytest.raises(ConfigError, match=f"data.shard_cache.{name} is -1"):
        ShardCacheConfig(**{name: -1})


def test_wrong_bytes_are_downloaded_again(fault_server: Any, tmp_path: Path) -> None:
    cache = ShardCache(config_of(tmp_path / "cache"))
    url = fault_server.add("/x-0.tar", content_of(0), "wrong")
    assert read(cache, url, content_of(0)) == content_of(0)
    assert fault_server.gets["/x-0.tar"] == 2


def test_bytes_that_stay_wrong_are_an_error_and_are_not_kept(fault_server: Any, tmp_path: Path) -> None:
    cache = ShardCache(config_of(tmp_path / "cache"))
    url = fault_server.add("/x-0.tar", content_of(0), *["wrong"] * 9)
    with pytest.raises(DataError, match=r"x-0\.tar has another SHA-256 than when it was indexed") as caught:
        read(cache, url, content_of(0))
    assert not isinstance(caught.value, ImageError)
    assert fault_server.gets["/x-0.tar"] == 2
    assert not [path for path in (tmp_path / "cache").iterdir() if path.is_file()]


@pytest.mark.parametrize("fault", ["503", "404", "hang"])
def test_a_download_that_fails_leaves_nothing_behind(fault_server: Any, tmp_path: Path, fault: str) -> None:
    cache = ShardCache(config_of(tmp_path / "cache", retries=0, timeout_s=1))
    url = fault_server.add("/x-0.tar", content_of(0), fault)
    with pytest.raises(DataError, match=r"x-0\.tar"):
        read(cache, url, content_of(0))
    assert not [path for path in (tmp_path / "cache").iterdir() if path.is_file()]
    assert read(cache, url, content_of(0)) == content_of(0)


def test_what_was_used_least_recently_is_removed_first(fault_server: Any, tmp_path: Path) -> None:
    cache = ShardCache(config_of(tmp_path / "cache", shards=3))
    urls = [fault_server.add(f"/x-{number}.tar", content_of(number)) for number in range(5)]
    for number in (0, 1, 2, 0, 3):
        read(cache, urls[number], content_of(number))
        time.sleep(0.02)  # two uses within a tick of the file system's clock have no order
        assert sum(path.stat().st_size for path in (tmp_path / "cache").glob("*.tar")) <= 3 * SHARD_BYTES
    assert kept(tmp_path / "cache") == {digest(content_of(number)) for number in (0, 2, 3)}


def test_a_shard_larger_than_the_limit_names_the_limit(fault_server: Any, tmp_path: Path) -> None:
    cache = ShardCache(config_of(tmp_path / "cache", shards=0.5))
    with pytest.raises(ConfigError, match=r"x-0\.tar has 100,000 bytes, more than data\.shard_cache\.limit_gib"):
        read(cache, fault_server.add("/x-0.tar", content_of(0)), content_of(0))


def test_a_full_disk_is_named_with_the_way_out(
    fault_server: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = ShardCache(config_of(tmp_path / "cache"))
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("distill.data.shard_cache.shutil.disk_usage", lambda folder: usage)
    with pytest.raises(DataError, match=r"has 1,000 bytes left.*set data\.shard_cache\.dir"):
        read(cache, fault_server.add("/x-0.tar", content_of(0)), content_of(0))


def test_other_files_in_the_folder_are_never_removed(fault_server: Any, tmp_path: Path) -> None:
    cache = ShardCache(config_of(tmp_path / "cache", shards=1))
    mine = tmp_path / "cache" / "natural-000000.tar"
    mine.write_bytes(content_of(9))
    for number in range(3):
        read(cache, fault_server.add(f"/x-{number}.tar", content_of(number)), content_of(number))
    assert mine.exists()


def test_a_kept_file_of_another_size_is_replaced(fault_server: Any, tmp_path: Path) -> None:
    cache = ShardCache(config_of(tmp_path / "cache"))
    url = fault_server.add("/x-0.tar", content_of(0))
    (tmp_path / "cache" / f"{digest(content_of(0))}.tar").write_bytes(b"short")
    assert read(cache, url, content_of(0)) == content_of(0)


def test_a_download_of_a_killed_process_is_swept(fault_server: Any, tmp_path: Path) -> None:
    cache = ShardCache(config_of(tmp_path / "cache", shards=2))
    left = tmp_path / "cache" / f"{'f' * 64}.{2 * SHARD_BYTES}.partial"
    left.write_bytes(b"half of it")
    assert read(cache, fault_server.add("/x-0.tar", content_of(0)), content_of(0)) == content_of(0)
    assert not left.exists()


def test_a_restart_is_not_in_the_way_of_its_own_killed_download(fault_server: Any, tmp_path: Path) -> None:
    cache = ShardCache(config_of(tmp_path / "cache", shards=1))
    url = fault_server.add("/x-0.tar", content_of(0))
    left = tmp_path / "cache" / f"{digest(content_of(0))}.{SHARD_BYTES}.partial"
    left.write_bytes(b"half of it")
    assert read(cache, url, content_of(0)) == content_of(0)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_processes_that_want_the_same_shard_download_it_once(fault_server: Any, tmp_path: Path, method: str) -> None:
    context, cache = multiprocessing.get_context(method), ShardCache(config_of(tmp_path / "cache"))
    url = fault_server.add("/x-0.tar", content_of(0))
    # This process has a client with a running thread, which a fork must not use.
    read(cache, fault_server.add("/x-1.tar", content_of(1)), content_of(1))
    fault_server.gate = threading.Event()
    fault_server.arrived.clear()
    wanted = (url, SHARD_BYTES, digest(content_of(0)))
    processes = [context.Process(target=cache.ensure, args=wanted) for _ in range(3)]
    for process in processes:
        process.start()
    assert fault_server.arrived.wait(WAIT_S)
    time.sleep(0.5)  # time in which the others could ask as well
    fault_server.gate.set()
    for process in processes:
        process.join(WAIT_S)
    assert [process.exitcode for process in processes] == [0] * 3
    assert fault_server.gets["/x-0.tar"] == 1


@pytest.mark.slow
def test_a_download_goes_on_in_another_process_when_its_own_is_killed(fault_server: Any, tmp_path: Path) -> None:
    cache = ShardCache(config_of(tmp_path / "cache", shards=1.5))
    url = fault_server.add("/x-0.tar", content_of(0))
    fault_server.gate = threading.Event()
    wanted = (url, SHARD_BYTES, digest(content_of(0)))
    process = multiprocessing.get_context("spawn").Process(target=cache.ensure, args=wanted)
    process.start()
    assert fault_server.arrived.wait(WAIT_S)
    process.kill()
    process.join(WAIT_S)
    fault_server.gate.set()
    assert list((tmp_path / "cache").glob("*.partial"))
    other = fault_server.add("/x-1.tar", content_of(1))
    assert read(cache, other, content_of(1)) == content_of(1)
    assert read(cache, url, content_of(0)) == content_of(0)
    assert not list((tmp_path / "cache").glob("*.partial"))


def test_a_process_that_holds_a_shard_without_progress_is_named(fault_server: Any, tmp_path: Path) -> None:
    cache = ShardCache(config_of(tmp_path / "cache"))
    cache.__class__ = type("Hurried", (ShardCache,), {"_patience_s": 0.2})
    url = fault_server.add("/x-0.tar", content_of(0))
    with cache.incoming(url, SHARD_BYTES, digest(content_of(0))), pytest.raises(DataError, match="makes no progress"):
        threading_result(lambda: read(cache, url, content_of(0)))


def threading_result(action: Callable[[], Any]) -> Any:
    """Run an action in another thread, and return or raise what it did."""
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(1) as pool:
        return pool.submit(action).result(WAIT_S)


# Shards of images behind a URL, as training reads them.


@pytest.fixture
def remote_index(fault_server: Any, tmp_path: Path) -> Callable[..., DatasetIndex]:
    """Return a function that serves shards of four images each and indexes them by URL."""

    def make(count: int = 6, **settings: Any) -> DatasetIndex:
        for number in range(count):
            path = tmp_path / f"x-{number}.tar"
            with wds.TarWriter(str(path)) as writer:
                for sample in range(4):
                    buffer = io.BytesIO()
                    Image.new("RGB", (20, 12), (number * 20, sample * 20, 9)).save(buffer, "PNG")
                    writer.write({"__key__": f"{sample:06d}", "png": buffer.getvalue()})
            fault_server.add(f"/{path.name}", path.read_bytes())
        config = config_of(tmp_path / "cache", **settings)
        pattern = fault_server.url("/x-{0.." + str(count - 1) + "}.tar")
        return build_index(pattern, index_dir=tmp_path / "index", shard_cache=config)

    return make


def empty(folder: Path) -> None:
    for path in folder.glob("*.tar"):
        path.unlink()


def test_shards_behind_urls_give_the_samples_of_local_ones(
    remote_index: Callable[..., DatasetIndex], tmp_path: Path
) -> None:
    index = remote_index()
    local = build_index(tmp_path / "x-{0..5}.tar")
    assert index.fingerprint == local.fingerprint
    remote_items, local_items = RowDataset(index, 16), RowDataset(local, 16)
    for row in range(len(local)):
        assert (remote_items[row]["image"] == local_items[row]["image"]).all()


def test_an_index_is_taken_from_its_file_while_size_and_etag_are_the_same(
    remote_index: Callable[..., DatasetIndex], fault_server: Any
) -> None:
    remote_index()
    remote_index()
    assert fault_server.gets["/x-0.tar"] == 1
    fault_server.etags["/x-0.tar"] = '"2"'
    remote_index()
    assert (fault_server.gets["/x-0.tar"], fault_server.gets["/x-1.tar"]) == (2, 1)


def test_eviction_does_not_break_a_reader_that_has_the_shard_open(
    remote_index: Callable[..., DatasetIndex], tmp_path: Path, fault_server: Any
) -> None:
    index = remote_index()
    reader = ShardReader(index.shards, shard_cache=index.shard_cache)
    before = reader.read(0, 512, 50)
    empty(tmp_path / "cache")
    assert reader.read(0, 512, 50) == before
    assert fault_server.gets["/x-0.tar"] == 1


def test_a_reader_lets_go_of_removed_shards_when_it_opens_another(
    remote_index: Callable[..., DatasetIndex], tmp_path: Path
) -> None:
    index = remote_index()
    reader = ShardReader(index.shards, shard_cache=index.shard_cache)
    for shard in range(5):
        reader.read(shard, 512, 50)
    empty(tmp_path / "cache")
    reader.read(5, 512, 50)
    held = [str(entry.readlink()) for entry in Path("/proc/self/fd").iterdir() if entry.is_symlink()]
    assert not [name for name in held if name.startswith(str(tmp_path / "cache")) and "(deleted)" in name]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_workers_share_a_cache_that_is_smaller_than_the_data(
    remote_index: Callable[..., DatasetIndex], tmp_path: Path, method: StartMethod
) -> None:
    index = remote_index(shards=0.25)  # about two shards of these
    size = index.shards[0].num_bytes
    plan = SamplePlan(index)
    expected = [PlannedDataset(plan, 16)[place]["row"] for place in range(48)]
    loader = build_loader(PlannedDataset(plan, 16), PlanSampler(48, 4), num_workers=2, start_method=method)
    assert [row for batch in loader for row in batch["row"].tolist()] == expected
    assert sum(path.stat().st_size for path in (tmp_path / "cache").glob("*.tar")) <= 0.25 * SHARD_BYTES
    assert size * 2 <= 0.25 * SHARD_BYTES < size * 6


def test_look_ahead_fetches_what_the_plan_needs_next_and_no_more(
    remote_index: Callable[..., DatasetIndex], tmp_path: Path, fault_server: Any
) -> None:
    index = remote_index(count=12, look_ahead_samples=4)
    plan = SamplePlan(index)
    empty(tmp_path / "cache")
    look_ahead = LookAhead(plan, 0)
    for position in (0, 4, 9):
        look_ahead.advance(position)
        assert look_ahead.wait_until_idle(WAIT_S)
        needed = {index.shards[index.shard_ids[plan[place]]].sha256 for place in range(position, position + 4)}
        assert needed <= kept(tmp_path / "cache")
    seen = {index.shards[index.shard_ids[plan[place]]].name for place in range(13)}
    fetched = {shard.name for shard in index.shards if fault_server.gets[f"/{shard.name}"] == 2}
    assert fetched <= seen
    assert len(fetched) < 12
    look_ahead.stop()
    assert not look_ahead.is_running


def test_look_ahead_never_fetches_more_than_the_cache_holds(
    remote_index: Callable[..., DatasetIndex], tmp_path: Path, fault_server: Any
) -> None:
    index = remote_index(count=8, shards=0.3, look_ahead_samples=1000)
    plan = SamplePlan(index)
    empty(tmp_path / "cache")
    before = fault_server.gets.total()
    look_ahead = LookAhead(plan, 0)
    assert look_ahead.wait_until_idle(WAIT_S)
    fitting = int(0.8 * 0.3 * SHARD_BYTES // index.shards[0].num_bytes)
    order = list(dict.fromkeys(int(index.shard_ids[plan[place]]) for place in range(100)))
    assert fault_server.gets.total() - before == fitting < 8
    assert kept(tmp_path / "cache") == {index.shards[shard].sha256 for shard in order[:fitting]}
    look_ahead.stop()


@pytest.mark.parametrize(("local_rank", "ranks"), [(0, range(4, 8)), (1, None)])
def test_one_process_a_machine_looks_ahead_for_all_its_ranks(local_rank: int, ranks: range | None) -> None:
    trainer: Any = SimpleNamespace(local_rank=local_rank, global_rank=4 + local_rank, world_size=8, num_devices=4)
    assert TrainerView(trainer).ranks_to_look_ahead_for == ranks


def test_look_ahead_fetches_for_the_ranks_of_its_machine_only(
    remote_index: Callable[..., DatasetIndex], tmp_path: Path
) -> None:
    index = remote_index(count=12, look_ahead_samples=8)
    plan = SamplePlan(index)
    empty(tmp_path / "cache")
    look_ahead = LookAhead(plan, 0, world_size=4, ranks=range(2, 4))
    assert look_ahead.wait_until_idle(WAIT_S)
    places = [place for place in range(8) if place % 4 >= 2]
    assert kept(tmp_path / "cache") == {index.shards[index.shard_ids[plan[place]]].sha256 for place in places}
    look_ahead.stop()


def test_what_look_ahead_cannot_fetch_is_raised_in_training(
    remote_index: Callable[..., DatasetIndex], tmp_path: Path, fault_server: Any
) -> None:
    index = remote_index(look_ahead_samples=100)
    empty(tmp_path / "cache")
    del fault_server.files["/x-3.tar"]
    look_ahead = LookAhead(SamplePlan(index), 0)
    assert look_ahead.wait_until_idle(WAIT_S)
    with pytest.raises(DataError, match=r"x-3\.tar cannot be read: it does not exist"):
        look_ahead.advance(1)
    look_ahead.stop()
    assert not look_ahead.is_running


def test_look_ahead_stops_while_it_waits_and_has_no_thread_for_local_shards(
    remote_index: Callable[..., DatasetIndex], tmp_path: Path
) -> None:
    index = remote_index()
    look_ahead = LookAhead(SamplePlan(index), 0)
    assert look_ahead.is_running
    look_ahead.stop()
    assert not look_ahead.is_running
    assert not LookAhead(SamplePlan(build_index(tmp_path / "x-{0..5}.tar")), 0).is_running
