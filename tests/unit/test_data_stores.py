"""Objects behind URLs: found, read, and retried only where that can help; nothing else is ever opened."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
from moto.server import ThreadedMotoServer
from s3fs import S3FileSystem

from distill.data.image_header import ImageError
from distill.data.shards import find_shards
from distill.data.stores import ObjectStores, name_of, shown
from distill.errors import ConfigError, DataError

CONTENT = bytes(range(256)) * 4000
STORES = ObjectStores(retries=3, timeout_s=20)


@pytest.fixture(scope="module")
def bucket() -> Iterator[Any]:
    """Give a client of a real S3 server in this process, and a bucket called shards."""
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        patch.setenv("AWS_ACCESS_KEY_ID", "key")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setenv("NO_PROXY", "127.0.0.1")
        # Clients keep the address of the server that was there when they were made.
        S3FileSystem.clear_instance_cache()
        client = boto3.client("s3")
        client.create_bucket(Bucket="shards")
        for name in ("a/ocr-0.tar", "a/ocr-1.tar", "a/chart-0.tar", "a/notes.txt", "a/b/ocr-2.tar"):
            client.put_object(Bucket="shards", Key=name, Body=CONTENT)
        client.put_object(Bucket="shards", Key="packed/ocr-0.tar.gz", Body=b"")
        client.put_object(Bucket="shards", Key="empty/readme", Body=b"")
        yield client
    server.stop()


@pytest.mark.parametrize("fault", ["503", "500", "429", "408", "short", "half", "reset"])
def test_a_failure_that_may_pass_is_tried_again(fault_server: Any, tmp_path: Path, fault: str) -> None:
    url = fault_server.add("/x-0.tar", CONTENT, fault, fault)
    STORES.download(url, tmp_path / "x", len(CONTENT))
    assert (tmp_path / "x").read_bytes() == CONTENT
    assert fault_server.gets["/x-0.tar"] == 3


def test_a_server_that_hangs_is_given_up_and_tried_again(fault_server: Any, tmp_path: Path) -> None:
    url = fault_server.add("/x-0.tar", CONTENT, "hang")
    ObjectStores(retries=1, timeout_s=1).download(url, tmp_path / "x", len(CONTENT))
    assert fault_server.gets["/x-0.tar"] == 2


@pytest.mark.parametrize("fault", ["503", "short", "half", "reset"])
def test_a_failure_that_does_not_pass_is_named_with_its_url_and_is_no_bad_image(
    fault_server: Any, tmp_path: Path, fault: str
) -> None:
    url = fault_server.add("/x-0.tar", CONTENT, *[fault] * 40)
    with pytest.raises(DataError, match=r"x-0\.tar could not be read in 4 tries.*check the network") as caught:
        STORES.download(url, tmp_path / "x", len(CONTENT))
    assert not isinstance(caught.value, ImageError)
    assert "damaged" not in str(caught.value)


@pytest.mark.parametrize(
    ("fault", "message"), [("404", "does not exist"), ("403", "access is refused"), ("401", "credentials")]
)
def test_what_is_missing_or_forbidden_is_reported_at_once(
    fault_server: Any, tmp_path: Path, fault: str, message: str
) -> None:
    url = fault_server.add("/x-0.tar", CONTENT, fault)
    with pytest.raises(DataError, match=message):
        STORES.download(url, tmp_path / "x", len(CONTENT))
    assert fault_server.gets["/x-0.tar"] == 1


def test_more_bytes_than_there_were_are_not_stored(fault_server: Any, tmp_path: Path) -> None:
    url = fault_server.add("/x-0.tar", CONTENT, "long")
    with pytest.raises(DataError, match="gives more than the 1,024,000 bytes"):
        STORES.download(url, tmp_path / "x", len(CONTENT))


def test_waits_between_tries_grow(fault_server: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr("distill.data.stores.FIRST_DELAY_S", 1.0)
    monkeypatch.setattr("distill.data.stores.time", type("Clock", (), {"sleep": staticmethod(waits.append)}))
    url = fault_server.add("/x-0.tar", CONTENT, *["503"] * 8)
    with pytest.raises(DataError):
        ObjectStores(retries=7).download(url, tmp_path / "x", len(CONTENT))
    bounds = [1, 2, 4, 8, 16, 30, 30]
    assert all(bound / 2 <= wait <= bound for wait, bound in zip(waits, bounds, strict=True))
    assert len(set(waits)) == 7


def test_retries_leave_the_global_random_numbers_alone(fault_server: Any, tmp_path: Path) -> None:
    import random

    before = random.getstate()
    STORES.download(fault_server.add("/x-0.tar", CONTENT, "503"), tmp_path / "x", len(CONTENT))
    assert random.getstate() == before


def test_the_state_is_size_and_etag(fault_server: Any) -> None:
    url = fault_server.add("/x-0.tar", CONTENT)
    state = STORES.state(url)
    assert state.num_bytes == len(CONTENT)
    fault_server.etags["/x-0.tar"] = '"2"'
    assert STORES.state(url) != state


@pytest.mark.parametrize(("fault", "message"), [("503", "could not be read in 2 tries"), ("403", "access is refused")])
def test_a_server_that_fails_is_not_called_a_missing_shard(fault_server: Any, fault: str, message: str) -> None:
    url = fault_server.add("/x-0.tar", CONTENT, *[fault] * 9)
    fault_server.head_faults["/x-0.tar"].extend([fault] * 9)
    with pytest.raises(DataError, match=message):
        ObjectStores(retries=1, timeout_s=20).state(url)


def test_a_full_disk_is_no_failure_of_the_network(fault_server: Any) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    url = fault_server.add("/x-0.tar", CONTENT)
    with pytest.raises(DataError, match="free some space"):
        STORES.download(url, Path("/dev/full"), len(CONTENT))
    assert fault_server.gets["/x-0.tar"] == 1


def test_a_folder_a_glob_and_braces_name_objects_in_s3(bucket: Any) -> None:
    found = find_shards("s3://shards/a")
    assert found == {"chart": ["s3://shards/a/chart-0.tar"], "ocr": [f"s3://shards/a/ocr-{n}.tar" for n in (0, 1)]}
    assert find_shards("s3://shards/a/ocr-*.tar") == {"ocr": found["ocr"]}
    assert find_shards("s3://shards/a/ocr-{0..1}.tar") == {"ocr": found["ocr"]}
    assert find_shards({"text": ["s3://shards/a/ocr-0.tar"]}) == {"text": ["s3://shards/a/ocr-0.tar"]}


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("s3://shards/a/none-*.tar", "no shard matches"),
        ("s3://shards/nothing/", "does not exist"),
        ("s3://shards/empty", r"has no \*\.tar file"),
        ("s3://shards/packed", "looks compressed"),
        ("s3://no-such-bucket/a", "does not exist"),
    ],
)
def test_objects_that_are_not_there_are_named(bucket: Any, spec: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        find_shards(spec)


def test_an_object_in_s3_is_read_whole(bucket: Any, tmp_path: Path) -> None:
    url = "s3://shards/a/ocr-0.tar"
    state = STORES.state(url)
    assert state.num_bytes == len(CONTENT)
    assert state.version
    STORES.download(url, tmp_path / "x", state.num_bytes)
    assert (tmp_path / "x").read_bytes() == CONTENT
    with pytest.raises(DataError, match="does not exist"):
        STORES.state("s3://shards/a/none-0.tar")


def test_a_change_in_s3_is_seen_although_the_folder_was_listed(bucket: Any) -> None:
    url = "s3://shards/a/b/ocr-2.tar"
    find_shards("s3://shards/a/b", stores=STORES)
    before = STORES.state(url)
    bucket.put_object(Bucket="shards", Key="a/b/ocr-2.tar", Body=CONTENT[::-1])
    assert STORES.state(url) != before


def test_missing_credentials_are_named_at_once(bucket: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("HOME", str(tmp_path))
    started = time.monotonic()
    with pytest.raises(DataError, match="credentials"):
        # Another timeout is another client, which looks for credentials itself.
        ObjectStores(retries=50, timeout_s=21).state("s3://shards/a/ocr-0.tar")
    assert time.monotonic() - started < 60


@pytest.mark.parametrize(
    "location",
    [
        "pipe:cat x.tar",
        "file:///etc/x-0.tar",
        "ftp://host/x-0.tar",
        "sftp://host/x-0.tar",
        "simplecache::s3://bucket/x-0.tar",
        "zip://x-0.tar::https://host/a.zip",
        "github://a:b@c/x-0.tar",
        "memory://x-0.tar",
    ],
)
def test_every_other_scheme_is_refused(location: str) -> None:
    with pytest.raises(ConfigError, match="data.train: .* has the scheme"):
        find_shards(location, key="data.train")
    with pytest.raises(ConfigError, match="has the scheme"):
        STORES.state(location)


@pytest.mark.parametrize("location", ["https://host/shards/", "https://host/x-*.tar", "http://host/x-[01].tar"])
def test_web_servers_take_exact_names_only(location: str) -> None:
    with pytest.raises(ConfigError, match="has no listing: name the shards exactly or by a brace pattern"):
        find_shards(location)


def test_web_addresses_expand_by_braces_and_keep_their_query() -> None:
    found = find_shards("https://host/ocr-{000000..000002}.tar?signature=a*b")
    assert found["ocr"][2] == "https://host/ocr-000002.tar?signature=a*b"
    assert name_of(found["ocr"][2]) == "ocr-000002.tar"


def test_what_is_printed_holds_no_secret(fault_server: Any, tmp_path: Path) -> None:
    assert shown("https://user:word@host:80/a/x-0.tar?X-Amz-Signature=abc#d") == "https://host:80/a/x-0.tar"
    url = fault_server.url("/x-0.tar?signature=abc")
    for fault in ("403", "503", "short"):
        fault_server.add("/x-0.tar", CONTENT, fault)
        with pytest.raises(DataError) as caught:
            ObjectStores(retries=0, timeout_s=20).download(url, tmp_path / "x", len(CONTENT))
        assert "signature" not in str(caught.value)


@pytest.mark.parametrize(
    ("url", "package", "extra"), [("s3://b/x-0.tar", "s3fs", "s3"), ("gs://b/x-0.tar", "gcsfs", "gcs")]
)
def test_a_missing_package_is_named_with_its_extra(
    monkeypatch: pytest.MonkeyPatch, url: str, package: str, extra: str
) -> None:
    import fsspec  # noqa: F401 - so that its registry is there

    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, url[:2], raising=False)
    with pytest.raises(ConfigError, match=rf"pip install 'encoder-distill\[{extra}\]'"):
        STORES.state(url)
