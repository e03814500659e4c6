"""Sample keys that every reader of tars takes."""

from __future__ import annotations

import hashlib

MAX_KEY_BYTES = 80
"""A USTAR name has 100 bytes; the ending and what tells equal keys apart must fit too."""


def safe_key(key: str) -> str:
    """Return a key without what has a meaning in a member's name.

    The key ends at the first dot, so dots become "_", as do control letters, backslashes and lone surrogates; empty
    path parts go. A long key keeps its beginning, and 8 hex digits of its hash.
    """
    parts = ["".join(_letter(letter) for letter in part) for part in key.split("/") if part.strip()]
    name = "/".join(parts) or "_"
    encoded = name.encode()
    if len(encoded) <= MAX_KEY_BYTES:
        return name
    kept = encoded[: MAX_KEY_BYTES - 9].decode("utf-8", "ignore").rstrip("/")
    return f"{kept}-{hashlib.sha256(key.encode('utf-8', 'surrogatepass')).hexdigest()[:8]}"


def _letter(letter: str) -> str:
    return "_" if letter in ".\\" or ord(letter) < 32 or letter == "\x7f" or "\ud800" <= letter <= "\udfff" else letter


class UniqueKeys:
    """Gives each sample a key of its own. Holds 8 bytes of each key's hash, not the key.

    Two hashes that collide make one sample's key longer, and nothing else.
    """

    def __init__(self) -> None:
        self._taken: set[int] = set()

    def claim(self, key: str, sha256: str) -> str:
        """Return the key, or where it is taken, the key with the beginning of the image's hash.

        Args:
            key: a safe key.
            sha256: of the image's bytes, hex; no two samples share it.
        """
        for candidate in (key, f"{key}-{sha256[:8]}", f"{key[:20]}-{sha256[:48]}"):
            number = int.from_bytes(hashlib.blake2b(candidate.encode(), digest_size=8).digest())
            if number not in self._taken:
                self._taken.add(number)
                return candidate
        raise AssertionError(f"the key {key!r} cannot be made unique with {sha256}")
