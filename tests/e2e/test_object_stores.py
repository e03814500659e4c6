"""Training and indexing on shards in an object store: the same batches and losses as from local shards."""

from __future__ import annotations

import csv
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
from moto.server import ThreadedMotoServer
from s3fs import S3FileSystem

from distill.cli import main
from distill.data.datamodule import ShardDataModule
from distill.data.look_ahead import LookAhead
from distill.errors import DataError
from distill.training_cli import run

pytestmark = pytest.mark.slow


@pytest.fixture
def demo_bucket(demo_images: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    """Give an S3 server in this process that holds the demo's shards in the bucket demo."""
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    # Clients keep the address of the server that was there when they were made.
    S3FileSystem.clear_instance_cache()
    client = boto3.client("s3")
    client.create_bucket(Bucket="demo")
    for shard in demo_images.rglob("*.tar"):
        client.upload_file(str(shard), "demo", f"{shard.parent.name}/{shard.name}")
    yield client
    server.stop()


def read_losses(run_dir: Path) -> list[dict[str, str]]:
    """Return the rows of metrics.csv without what tells the time."""
    with (run_dir / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    return [{name: value for name, value in row.items() if name.startswith(("loss/", "val/", "step"))} for row in rows]


def read_samples(run_dir: Path) -> str:
    return "".join(file.read_text() for file in sorted((run_dir / "ledger").glob("samples-*.csv")))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_shards_in_s3_give_the_losses_of_local_shards(
    demo_recipe: Any, demo_bucket: Any, tmp_path: Path, num_workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    common = ("--trainer.max_steps=12", f"--data.num_workers={num_workers}", "--data.record_samples=true")
    run(demo_recipe.words(tmp_path / "local", *common))
    advanced: list[int] = []
    real = LookAhead.advance

    def advance(look_ahead: LookAhead, position: int) -> None:
        assert look_ahead.is_running
        advanced.append(position)
        real(look_ahead, position)

    monkeypatch.setattr(LookAhead, "advance", advance)
    remote = ("--data.train=s3://demo/train", "--data.val=s3://demo/heldout/*.tar")
    cache = (f"--data.shard_cache.dir={tmp_path / 'cache'}", "--data.shard_cache.limit_gib=0.01")
    run(demo_recipe.words(tmp_path / "remote", *common, *remote, *cache))
    losses = read_losses(tmp_path / "local")
    assert any(row.get("loss/total") for row in losses)
    assert read_losses(tmp_path / "remote") == losses
    assert read_samples(tmp_path / "remote") == read_samples(tmp_path / "local")
    assert len(read_samples(tmp_path / "local").splitlines()) >= 96
    assert list((tmp_path / "cache").glob("*.tar"))
    assert advanced == list(range(0, 96, 8))
    assert not [thread for thread in threading.enumerate() if thread.name == "shard look-ahead"]


def test_training_stops_with_the_name_of_a_shard_that_is_gone(
    demo_recipe: Any, demo_bucket: Any, tmp_path: Path
) -> None:
    cache = (f"--data.shard_cache.dir={tmp_path / 'cache'}", "--data.shard_cache.retries=1")
    words = demo_recipe.words(tmp_path / "run", "--data.train=s3://demo/train", "--data.val=null", *cache)
    run([*words, "--trainer.max_steps=2"])
    name = next(item["Key"] for item in demo_bucket.list_objects_v2(Bucket="demo", Prefix="train/")["Contents"])
    for kept in (tmp_path / "cache").glob("*.tar"):
        kept.unlink()

    def vanish(*arguments: Any) -> None:
        demo_bucket.delete_object(Bucket="demo", Key=name)

    with pytest.MonkeyPatch.context() as patch:
        # After the index is read and before the first batch is.
        real = ShardDataModule.train_dataloader
        patch.setattr(ShardDataModule, "train_dataloader", lambda module: (vanish(), real(module))[1])
        with pytest.raises(DataError, match=f"s3://demo/{name}.* does not exist"):
            run([*words, "--trainer.max_steps=12"])
    assert not [thread for thread in threading.enumerate() if thread.name == "shard look-ahead"]


def test_the_index_verb_summarises_shards_in_s3(
    demo_bucket: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["index", "s3://demo/train", f"--shard_cache.dir={tmp_path / 'cache'}", f"--json={tmp_path / 'a.json'}"]
    main(words)
    assert "fingerprint" in capsys.readouterr().out
    assert '"samples": 96' in (tmp_path / "a.json").read_text()
    assert list((tmp_path / "home" / ".cache" / "encoder-distill" / "index").glob("*.npz"))
