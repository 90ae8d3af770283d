"""Fetch files over http(s) and from the Hugging Face hub into a cache that is verified at every use."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import re
import sys
import tempfile
import time
import urllib.parse
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any, BinaryIO

from dnnlib.atomic import atomic_write
from dnnlib.extras import import_extra

try:
    import fcntl
except ImportError:  # no advisory locks on Windows: simultaneous downloads are then merely wasteful
    fcntl = None

CHUNK_BYTES = 1 << 20
CONNECT_TIMEOUT_S, READ_TIMEOUT_S = 10, 60
FIRST_RETRY_DELAY_S, MAX_RETRY_DELAY_S = 0.5, 8.0
HTML_STARTS = (b"<!doctype html", b"<html", b"<head")


class DownloadError(OSError):
    """A remote file could not be fetched; the message names the URL and the reason."""


class _Transient(Exception):
    """A failure that another attempt may cure."""


def file_sha256(file: str | os.PathLike | BinaryIO) -> str:
    """Return the SHA-256 of a file, or of the rest of an open binary file, as lower-case hex."""
    if isinstance(file, (str, os.PathLike)):
        with open(file, "rb") as opened:
            return file_sha256(opened)
    digest = hashlib.sha256()
    while chunk := file.read(CHUNK_BYTES):
        digest.update(chunk)
    return digest.hexdigest()


def check_sha256(shown: str, came: str, expected: str | None) -> None:
    """Raise ValueError naming ``shown`` where ``expected`` is given and ``came`` is another digest."""
    if expected is not None and came != expected.lower():
        raise ValueError(f"{shown}: expected sha256 {expected.lower()}, came {came}")


def _notice(text: str, verbose: bool) -> None:
    if verbose:
        print(text, file=sys.stderr, flush=True)


def fetch_hf(url: str, cache_dir: str | os.PathLike | None, sha256: str | None, fetch: bool = True) -> Path:
    """Fetch hf://org/repo/path/in/repo[@revision] through huggingface_hub, which keeps a cache of its own.

    Args:
        url: the revision may also stand after the repository, as in hf://org/repo@revision/path.
        cache_dir: None is the cache of huggingface_hub.
        sha256: hex digest that the bytes must have, or None.
        fetch: False takes only what the cache has.

    Returns:
        The path of the local file.

    Raises:
        ValueError: another form of URL, or other bytes than asked for.
        DownloadError: huggingface_hub finds no such file.
        FileNotFoundError: it may not fetch, and the file is not in its cache.
        MissingExtraError: huggingface_hub is not installed.
    """
    match = re.fullmatch(r"hf://([^/@]+/[^/@]+)(?:@([^/]+))?/([^@]+)(?:@(.+))?", url)
    if match is None:
        raise ValueError(f"{url}: expected hf://org/repo/path/in/repo[@revision]")
    repo, early_revision, filename, late_revision = match.groups()
    hub = import_extra("huggingface_hub", "hub")
    options = {"revision": late_revision or early_revision, "cache_dir": cache_dir}
    if not fetch:
        options["local_files_only"] = True
    try:
        path = Path(hub.hf_hub_download(repo, filename, **options))
    except Exception as error:  # its exceptions differ between versions; all mean that there is no file
        if not fetch:
            raise FileNotFoundError(f"{url}: not in the cache of huggingface_hub") from error
        raise DownloadError(f"{url}: {' '.join(str(error).split())}") from error
    if sha256 is not None and (came := file_sha256(path)) != sha256.lower():
        if fetch:  # else nobody wants to replace what is there
            for stale in (path.resolve(), path):  # the blob and the link to it
                stale.unlink(missing_ok=True)
        check_sha256(url, came, sha256)
    return path


def open_http(url: str, cache_root: Path | None, *, num_attempts: int, verbose: bool, sha256: str | None) -> IO[bytes]:
    """Open an http(s) URL, from the cache where its bytes are the recorded ones, and else after fetching it.

    Args:
        url: without a fragment.
        cache_root: directory of the cache, created if absent; None fetches into an anonymous temporary file.
        num_attempts: how often to try, at least 1.
        verbose: show progress and notices on stderr.
        sha256: hex digest that the bytes must have, or None.

    Raises:
        ValueError: no attempts, or other bytes than asked for; those are not kept.
        DownloadError: no complete file could be had.
    """
    if num_attempts < 1:
        raise ValueError(f"num_attempts: expected at least 1, came {num_attempts}")
    fetch = _Fetch(url=url, num_attempts=num_attempts, verbose=verbose, sha256=sha256)
    if cache_root is None:
        return fetch.into_temporary_file()
    entry = _CacheEntry.of(url, cache_root)
    if file := entry.open_verified(sha256):
        return file
    with _locked(entry.lock, url, verbose):
        if file := entry.open_verified(sha256):  # fetched by another process meanwhile
            return file
        if entry.data.exists():
            entry.remove()
            _notice(f"The cached copy of {url} does not match its sha256; fetching it again", verbose)
        fetch.into_cache(entry)
        return open(entry.data, "rb")


def open_cached(url: str, cache_root: Path, sha256: str | None) -> BinaryIO:
    """Open what the cache has of an http(s) URL, fetching nothing; arguments as `open_http`.

    Raises:
        FileNotFoundError: the cache has no such file, or its bytes are not the recorded ones or those asked for.
    """
    file = _CacheEntry.of(url, cache_root).open_verified(sha256)
    if file is None:
        raise FileNotFoundError(f"{url}: not in the cache")
    return file


@dataclasses.dataclass(frozen=True, kw_only=True)
class _CacheEntry:
    """The files that belong to one URL in the cache."""

    url: str
    data: Path
    record: Path
    lock: Path

    @staticmethod
    def of(url: str, root: Path) -> _CacheEntry:
        basename = urllib.parse.unquote(urllib.parse.urlsplit(url).path).rsplit("/", 1)[-1]
        name = f"{hashlib.sha256(url.encode()).hexdigest()[:16]}_{re.sub(r'[^A-Za-z0-9.+-]', '_', basename)[-80:]}"
        return _CacheEntry(url=url, data=root / name, record=root / f"{name}.json", lock=root / f".{name}.lock")

    def open_verified(self, sha256: str | None) -> BinaryIO | None:
        """Open the cached file if its bytes are the recorded ones, and those asked for; otherwise return None."""
        try:
            record = json.loads(self.record.read_text(encoding="utf-8"))
            expected = record["sha256"] if record["url"] == self.url else None
            file = open(self.data, "rb")
        except (OSError, ValueError, KeyError, TypeError):  # absent, or not a record that we wrote
            return None
        came = file_sha256(file)
        if came != expected or (sha256 is not None and came != sha256.lower()):
            file.close()
            return None
        file.seek(0)
        return file

    def remove(self) -> None:
        self.data.unlink(missing_ok=True)
        self.record.unlink(missing_ok=True)


@contextlib.contextmanager
def _locked(path: Path, url: str, verbose: bool) -> Iterator[None]:
    """Let one process at a time fetch a URL, so that the ranks of a distributed run download it once.

    Correctness does not rest on the lock: files appear by rename, so a file system without locks costs only traffic.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab") as file:
        if fcntl is not None:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                _notice(f"Waiting for another process that fetches {url}", verbose)
                fcntl.flock(file, fcntl.LOCK_EX)
            except OSError:
                pass
        yield


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Fetch:
    """One download: what to fetch, how patiently, and what the bytes must be."""

    url: str
    num_attempts: int
    verbose: bool
    sha256: str | None

    def into_cache(self, entry: _CacheEntry) -> None:
        with atomic_write(entry.data) as file:
            record = self.into(file)
        with atomic_write(entry.record, "w", encoding="utf-8") as file:
            json.dump(record, file, indent=1)

    def into_temporary_file(self) -> IO[bytes]:
        file = tempfile.TemporaryFile()
        try:
            self.into(file)
        except BaseException:
            file.close()
            raise
        file.seek(0)
        return file

    def into(self, file: IO[bytes]) -> dict[str, Any]:
        """Download into ``file``, trying again after transient failures; return the cache record."""
        delay_s = FIRST_RETRY_DELAY_S
        for attempt in range(1, self.num_attempts + 1):
            try:
                record = self._once(file)
                break
            except _Transient as error:
                if attempt == self.num_attempts:
                    raise DownloadError(f"{self.url}: {error} (attempt {attempt} of {attempt})") from error
                _notice(f"{self.url}: {error}; trying again", self.verbose)
                time.sleep(delay_s)
                delay_s = min(2 * delay_s, MAX_RETRY_DELAY_S)
        check_sha256(self.url, record["sha256"], self.sha256)
        return record

    def _once(self, file: IO[bytes]) -> dict[str, Any]:
        """Make one request; return the cache record of what came."""
        import requests  # only downloads need it, and importing it takes longer than opening a local file

        file.seek(0)
        file.truncate()
        headers = {"Accept-Encoding": "identity"}  # so that Content-Length counts the bytes of the file
        timeouts_s = (CONNECT_TIMEOUT_S, READ_TIMEOUT_S)
        try:
            with requests.get(self.url, stream=True, headers=headers, timeout=timeouts_s) as response:
                self._check_answer(response.status_code, response.reason, response.headers)
                announced = _announced_bytes(response.headers)
                size, digest = self._copy(response.iter_content(CHUNK_BYTES), file, announced)
                etag = response.headers.get("ETag")
        except (requests.exceptions.InvalidURL, requests.TooManyRedirects) as error:
            raise DownloadError(f"{self.url}: {error}") from error
        except requests.RequestException as error:
            raise _Transient(f"{type(error).__name__}: {error}") from error
        if announced is not None and size != announced:
            raise _Transient(f"truncated download: expected {announced} bytes, came {size}")
        return {"url": self.url, "size": size, "sha256": digest, "etag": etag}

    def _check_answer(self, status: int, reason: str, headers: Mapping[str, str]) -> None:
        shown = f"expected status 200, came {status} {reason}"
        if status >= 500 or status in (408, 429):
            raise _Transient(shown)
        if status != 200:
            raise DownloadError(f"{self.url}: {shown}")
        if headers.get("Content-Type", "").split(";")[0].strip().lower() == "text/html":
            raise self._web_page()

    def _web_page(self) -> DownloadError:
        return DownloadError(f"{self.url}: expected a file, came a web page (HTML); see it in a browser")

    def _copy(self, chunks: Iterator[bytes], file: IO[bytes], announced: int | None) -> tuple[int, str]:
        """Write the chunks to ``file`` with a progress bar; return (size, SHA-256)."""
        from tqdm import tqdm

        size, digest = 0, hashlib.sha256()
        label = urllib.parse.urlsplit(self.url).path.rsplit("/", 1)[-1]
        with tqdm(total=announced, desc=label, unit="B", unit_scale=True, disable=not self.verbose) as progress:
            for chunk in chunks:
                if size == 0 and chunk.lstrip(b"\xef\xbb\xbf \t\r\n")[:20].lower().startswith(HTML_STARTS):
                    raise self._web_page()
                file.write(chunk)
                digest.update(chunk)
                size += len(chunk)
                progress.update(len(chunk))
        return size, digest.hexdigest()


def _announced_bytes(headers: Mapping[str, str]) -> int | None:
    """Return Content-Length, or None where it is absent or counts compressed bytes."""
    length = headers.get("Content-Length", "")
    return int(length) if length.isdigit() and "Content-Encoding" not in headers else None
