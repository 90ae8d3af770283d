"""Open local and remote files, and read dicts by attribute."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any, BinaryIO

from dnnlib.atomic import atomic_path, atomic_write
from dnnlib.download import DownloadError, check_sha256, fetch_hf, file_sha256, open_cached, open_http
from dnnlib.sources import UNTRAINED_PREFIX, file_name, is_demo, is_untrained, local_path, url_scheme

__all__ = ["DownloadError", "EasyDict", "atomic_path", "atomic_write", "file_sha256", "open_url", "source_name"]


class EasyDict(dict):
    """A dict whose keys can also be read, assigned and deleted as attributes.

    >>> EasyDict(a=1).a
    1
    """

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"EasyDict has no attribute {name!r}") from None

    def __setattr__(self, name: str, value: Any) -> None:
        self[name] = value

    def __delattr__(self, name: str) -> None:
        try:
            del self[name]
        except KeyError:
            raise AttributeError(f"EasyDict has no attribute {name!r}") from None


def open_url(
    url: str | os.PathLike,
    cache_dir: str | os.PathLike | None = None,
    num_attempts: int = 10,
    verbose: bool = True,
    return_filename: bool = False,
    cache: bool = True,
    sha256: str | None = None,
    fetch: bool = True,
) -> Any:
    """Open a local or remote file for reading.

    Remote files are kept in a cache, beside a JSON record {url, size, sha256, etag}. At every later use the cached
    bytes are checked against the recorded SHA-256; a file that does not match is fetched again. A cached file does
    not expire.

    Args:
        url: a path, ``file://``, ``http://``, ``https://``, or ``hf://org/repo/path/in/repo[@revision]``. A URL may
            end in ``#sha256=<hex>``, which does what the argument does.
        cache_dir: None is ``$SPHEREHEAD_CACHE_DIR``, or else ``~/.cache/spherehead``; for hf:// None is the cache of
            huggingface_hub.
        num_attempts: how often an http(s) download is tried; a refusal (status 4xx) is not tried again.
        verbose: show progress and notices on stderr.
        return_filename: return the name of the local file instead of a file object.
        cache: False fetches http(s) into a temporary file that vanishes when it is closed.
        sha256: hex digest that the bytes must have, or None for no such check.
        fetch: False uses the network for nothing: a remote file that is not in the cache is a FileNotFoundError.

    Returns:
        A binary file object, or with ``return_filename`` a str.

    Raises:
        FileNotFoundError, IsADirectoryError: the local path is absent or a directory.
        ValueError: an unknown scheme, or bytes whose SHA-256 is not the one asked for; those do not stay in the cache.
        DownloadError: the file could not be fetched whole, or the server sent a web page instead.

    Differs from the published code: the cache is verified, downloads are streamed to disk and complete or absent, and
    hf:// is new. A Google Drive page that asks for confirmation is an error instead of being followed.
    """
    text = os.fspath(url)
    scheme = url_scheme(text)
    if not scheme:
        return _open_local(Path(text), text, sha256, return_filename)
    text, sha256 = _split_fragment(text, sha256)
    if scheme == "file":
        return _open_local(local_path(text), text, sha256, return_filename)
    if scheme == "hf":
        return _open_local(fetch_hf(text, cache_dir, sha256, fetch), text, None, return_filename)
    if scheme not in ("http", "https"):
        raise ValueError(f"{text}: expected a path, file://, http(s):// or hf://, came the scheme {scheme!r}")
    if return_filename and not cache:
        raise ValueError(f"{text}: return_filename: expected cache=True with it, came cache=False")
    root = Path(cache_dir or os.environ.get("SPHEREHEAD_CACHE_DIR") or "~/.cache/spherehead").expanduser()
    if fetch:
        file = open_http(text, root if cache else None, num_attempts=num_attempts, verbose=verbose, sha256=sha256)
    else:
        file = open_cached(text, root, sha256)
    if not return_filename:
        return file
    file.close()
    return file.name


def source_name(url: str | os.PathLike) -> str:
    """Return a short name for where a network comes from, fit for a file name.

    >>> source_name("https://example.org/a/head.pkl?download=1#sha256=00")
    'head'
    >>> source_name("hf://org/repo/heads/large.safetensors@v2"), source_name("init:debug"), source_name("demo")
    ('large', 'debug', 'demo')
    """
    text = os.fspath(url)
    if is_untrained(text):
        stem = text.removeprefix(UNTRAINED_PREFIX)
    else:
        stem = text if is_demo(text) else Path(file_name(text)).stem
    return re.sub(r"[^\w.+-]", "_", stem)[-80:] or "network"


def _open_local(path: Path, shown: str, sha256: str | None, return_filename: bool) -> BinaryIO | str:
    if path.is_dir():
        raise IsADirectoryError(f"{shown}: expected a file, came a directory")
    if not path.exists():
        raise FileNotFoundError(f"{shown}: no such file")
    if sha256 is not None:
        check_sha256(shown, file_sha256(path), sha256)
    return str(path) if return_filename else open(path, "rb")


def _split_fragment(url: str, sha256: str | None) -> tuple[str, str | None]:
    """Split ``#sha256=<hex>`` off a URL; other fragments mean nothing to a server and are dropped."""
    url, _, fragment = url.partition("#")
    if fragment.startswith("sha256="):
        in_url = fragment[len("sha256=") :]
        if sha256 is not None and sha256.lower() != in_url.lower():
            raise ValueError(f"{url}: expected sha256 {sha256} by the argument, came {in_url} in the URL")
        sha256 = in_url
    if sha256 is not None and not re.fullmatch(r"[0-9a-fA-F]{64}", sha256):
        raise ValueError(f"{url}: sha256: expected 64 hexadecimal digits, came {sha256!r}")
    return url, sha256
