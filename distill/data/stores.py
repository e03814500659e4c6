"""Shards that lie behind http(s), S3 or Google Cloud Storage: their state, their listing, and their bytes, by fsspec.

Only these schemes are ever opened, so that no pattern can run a command (`pipe:`) or reach another file system. A
failure is told apart by whether trying again can help: what is missing or forbidden is reported at once, everything
else is tried again, later and later, and then reported as what it is, never as a damaged shard.
"""

from __future__ import annotations

import errno
import importlib
import random
import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast
from urllib.parse import urlsplit, urlunsplit

import fsspec
from fsspec.callbacks import Callback

from distill.errors import ConfigError, DataError

SCHEMES = ("http", "https", "s3", "gs")
LISTED_SCHEMES = ("s3", "gs")
"""Those whose folders can be listed; a web server has no listing that could be relied on."""

FIRST_DELAY_S = 0.5
MAX_DELAY_S = 30.0

_EXTRAS = {"s3": "s3", "gs": "gcs"}
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.:-]*)://")
_VERSION_FIELDS = ("ETag", "etag", "generation", "LastModified", "Last-Modified", "updated")
_LOCAL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG)
_REFUSED = (errno.EINVAL, errno.EPERM, errno.EACCES, errno.ENOSYS)

# Its own source: the global one belongs to the model and is part of a checkpoint.
_JITTER = random.SystemRandom()

T = TypeVar("T")


@dataclass(frozen=True)
class ObjectState:
    """What tells one state of an object from another.

    Attributes:
        num_bytes: its size.
        version: its ETag, or else its time of change; empty where the server tells neither.
    """

    num_bytes: int
    version: str


def is_remote(location: str) -> bool:
    """Tell whether a location is a URL, of whatever scheme, and not a local path."""
    return location.startswith("pipe:") or _SCHEME.match(location) is not None


def scheme_of(location: str, key: str) -> str:
    """Return the scheme of a URL.

    Raises:
        ConfigError: it is none of those that are allowed.
    """
    found = _SCHEME.match(location)
    scheme = found[1].lower() if found else location.partition(":")[0]
    if scheme not in SCHEMES:
        raise ConfigError(
            f"{key}: {shown(location)!r} has the scheme {scheme!r}; shards are local files or lie behind "
            f"{', '.join(f'{name}://' for name in SCHEMES)}. Copy them to one of these."
        )
    return scheme


def name_of(location: str) -> str:
    """Return the file name of a path or URL."""
    return (urlsplit(location).path if is_remote(location) else location).rstrip("/").rpartition("/")[2]


def shown(location: str) -> str:
    """Return a location as it may be printed: a URL without user, password and query, which may be secrets."""
    if not is_remote(location) or location.startswith("pipe:"):
        return location
    parts = urlsplit(location)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


@dataclass(frozen=True)
class ObjectStores:
    """Access to objects by URL, with bounded time and bounded retries; travels to worker processes.

    Args:
        retries: further tries after a failure that may pass.
        timeout_s: longest wait for a connection, or for the next bytes.
    """

    retries: int = 5
    timeout_s: float = 60.0

    def state(self, location: str) -> ObjectState:
        """Return an object's size and version.

        Raises:
            DataError: it does not exist, may not be read, or the server fails or tells no size.
            ConfigError: the scheme needs a package that is not installed.
        """
        info = self._try(location, lambda: self._filesystem(location).info(location, **_fresh(location)))
        if info.get("size") is None:
            raise DataError(f"The server tells no size of {shown(location)}; serve it with a Content-Length.")
        version = next((str(info[field]) for field in _VERSION_FIELDS if info.get(field)), "")
        return ObjectState(int(info["size"]), version)

    def download(self, location: str, target: Path, num_bytes: int) -> None:
        """Write an object to a file, and have it on the disk.

        Args:
            location: a URL.
            target: the file; what was in it is replaced.
            num_bytes: size the object must have.

        Raises:
            DataError: it does not exist, may not be read, the server fails or gives another size, or the disk is full.
            ConfigError: the scheme needs a package that is not installed.
        """

        def attempt() -> None:
            self._filesystem(location).get_file(location, str(target), callback=_AtMost(num_bytes, location))
            found = target.stat().st_size
            if found != num_bytes:
                raise OSError(f"it gave {found:,} of {num_bytes:,} bytes")

        self._try(location, attempt)

    def list_shards(self, location: str) -> list[str]:
        """Return the URLs of all files that lie directly in a folder, sorted.

        Raises:
            DataError: the folder does not exist, may not be read, or the server fails.
            ConfigError: the scheme needs a package that is not installed.
        """
        fs = self._filesystem(location)
        found = self._try(location, lambda: fs.ls(location, detail=True))
        return sorted(fs.unstrip_protocol(entry["name"]) for entry in found if entry["type"] == "file")

    def glob(self, pattern: str) -> list[str]:
        """Return the URLs that match a pattern, sorted.

        Raises:
            DataError: the store may not be read, or fails.
            ConfigError: the scheme needs a package that is not installed.
        """
        fs = self._filesystem(pattern)
        return sorted(fs.unstrip_protocol(name) for name in self._try(pattern, lambda: fs.glob(pattern)))

    def _try(self, location: str, action: Callable[[], T]) -> T:
        for attempt in range(self.retries + 1):
            try:
                return action()
            except _store_errors() as error:
                reason = _permanent_reason(error)
                if reason is not None:
                    raise DataError(f"The shard {shown(location)} cannot be read: {reason}") from error
                if attempt == self.retries:
                    raise DataError(
                        f"The shard {shown(location)} could not be read in {attempt + 1} tries; the last time: "
                        f"{_described(error)}. The shard itself may be sound: check the network and the server, then "
                        "start again (training resumes from its last checkpoint), or raise data.shard_cache.retries "
                        "or timeout_s."
                    ) from error
                time.sleep(_delay_s(attempt))
        raise AssertionError("the last try returns or raises")

    def _filesystem(self, location: str) -> Any:
        """Return the file system of a URL; fsspec keeps one a process and thread, so that a fork shares none."""
        scheme = scheme_of(location, "shards")
        try:
            fs = cast(Any, fsspec).filesystem(scheme, **self._options(scheme))
        except ImportError as error:
            raise ConfigError(
                f"{shown(location)} needs a package that is not installed ({error}); run "
                f"`pip install 'encoder-distill[{_EXTRAS.get(scheme, scheme)}]'`."
            ) from error
        if scheme == "s3":
            fs.retries = 1  # its own loop of retries would multiply with ours
        return fs

    def _options(self, scheme: str) -> dict[str, Any]:
        if scheme == "s3":
            once = {"mode": "standard", "max_attempts": 1}
            return {
                "config_kwargs": {"connect_timeout": self.timeout_s, "read_timeout": self.timeout_s, "retries": once}
            }
        if scheme == "gs":
            return {"requests_timeout": self.timeout_s}
        import aiohttp

        # By default a whole transfer must end within five minutes, which a large shard may not.
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=self.timeout_s, sock_read=self.timeout_s)
        # Compressed on the way, a shard could grow to any size here.
        return {"client_kwargs": {"timeout": timeout, "headers": {"Accept-Encoding": "identity"}, "trust_env": True}}


class _AtMost(Callback):
    """Ends a transfer that goes on beyond the size that was announced."""

    def __init__(self, num_bytes: int, location: str) -> None:
        super().__init__()
        self.left = num_bytes
        self.message = f"The shard {shown(location)} gives more than the {num_bytes:,} bytes it had; "

    def relative_update(self, inc: int = 1) -> None:
        """Count bytes."""
        self.left -= inc
        if self.left < 0:
            raise DataError(f"{self.message}it changed. Run `distill index` again, or restore it.")


def _fresh(location: str) -> dict[str, Any]:
    """Ask for the state itself, not for what an earlier listing told."""
    return {"refresh": True} if location.startswith("s3:") else {}


def _delay_s(attempt: int) -> float:
    """Return a random wait below an exponentially growing bound, so that many readers do not come back at once."""
    return _JITTER.uniform(0.5, 1.0) * min(MAX_DELAY_S, FIRST_DELAY_S * 2**attempt)


def _store_errors() -> tuple[type[Exception], ...]:
    """Return what the clients that are loaded may raise for a request that failed."""
    places = (
        ("aiohttp", "ClientError"),
        ("botocore.exceptions", "BotoCoreError"),
        ("botocore.exceptions", "ClientError"),
        ("gcsfs.retry", "HttpError"),
    )
    loaded = [getattr(importlib.import_module(module), name) for module, name in places if module in sys.modules]
    return (OSError, *loaded)


def _permanent_reason(error: BaseException) -> str | None:
    """Return what is wrong and what to do when trying again cannot help, else None."""
    cause = error.__cause__
    if type(error) is FileNotFoundError and isinstance(cause, _store_errors()) and _is_http(cause):
        # fsspec's HTTP client calls any failure to ask for a state "not found".
        return _permanent_reason(cause)
    status = _status(error)
    number = getattr(error, "errno", None)
    if number in _LOCAL_DISK:
        return f"{_described(error)}; free some space, or set data.shard_cache.dir to another disk."
    if status == 404 or (status is None and isinstance(error, FileNotFoundError)):
        return "it does not exist (404). Check the name, or restore it."
    is_refusal = (
        isinstance(error, PermissionError)
        or number in _REFUSED
        or type(error).__name__.endswith(
            ("NoCredentialsError", "CredentialsError", "PartialCredentialsError", "TokenRetrievalError")
        )
    )
    if is_refusal or (status is not None and 400 <= status < 500 and status not in (408, 429)):
        return (
            f"access is refused ({_described(error)}). Check that the credentials are set, have not expired, and allow "
            "reading it."
        )
    return None


def _is_http(error: BaseException) -> bool:
    return type(error).__module__.startswith("aiohttp") or isinstance(error, TimeoutError | ConnectionError)


def _status(error: BaseException) -> int | None:
    """Return the HTTP status that an error of aiohttp or gcsfs tells, or that of S3 which s3fs translated."""
    for source in (error, error.__cause__):
        response = getattr(source, "response", None)
        if isinstance(response, dict):
            return cast(dict[str, Any], response).get("ResponseMetadata", {}).get("HTTPStatusCode")
    status = getattr(error, "status", None)
    if status is None:
        status = getattr(error, "code", None)
    return status if isinstance(status, int) and status >= 100 else None


def _described(error: BaseException) -> str:
    """Return an error in a line without a URL, whose query may hold a signature."""
    text = re.sub(r"\w+://[^\s'\"<>]+", lambda found: shown(found[0]), str(error))
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
