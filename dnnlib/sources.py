"""What `--network` may name: files, URLs, the bundled network, and presets."""

from __future__ import annotations

import os
import re
import urllib.parse
import urllib.request
from pathlib import Path

DEMO_NAME = "demo"
DEMO_PATH = Path(__file__).resolve().parents[1] / "models" / "demo.safetensors"
UNTRAINED_PREFIX = "init:"
_HF_FILE = re.compile(r"(hf://[^/@]+/[^/@]+(?:@[^/]+)?/)([^@#]+)(@[^#]+)?(?:#.*)?")  # repository, path, revision


def is_untrained(source: str | os.PathLike) -> bool:
    """Whether a source names a preset, whose weights are random."""
    return os.fspath(source).startswith(UNTRAINED_PREFIX)


def is_demo(source: str | os.PathLike) -> bool:
    """Whether a source is the name of the bundled network; a file of that name is `./demo`."""
    return os.fspath(source) == DEMO_NAME


def resolve_demo(source: str | os.PathLike) -> str:
    """Return a source, with the name of the bundled network replaced by its path.

    Raises:
        FileNotFoundError: the bundled network is not there.
    """
    if not is_demo(source):
        return os.fspath(source)
    if not DEMO_PATH.is_file():
        raise FileNotFoundError(
            f"{DEMO_NAME}: expected the bundled network at {DEMO_PATH}, but no such file is there; name another "
            "network: a file, a URL or init:PRESET"
        )
    return str(DEMO_PATH)


def url_scheme(source: str | os.PathLike) -> str:
    """Return the lower-case URL scheme, or "" for a path."""
    match = re.match(r"([A-Za-z][A-Za-z0-9+.-]*)://", os.fspath(source))
    return match.group(1).lower() if match else ""


def local_path(source: str | os.PathLike) -> Path | None:
    """Return the path that a source is, or that its file:// URL means; None for names, presets and remote files."""
    text = os.fspath(source)
    if is_demo(text) or is_untrained(text):
        return None
    scheme = url_scheme(text)
    if scheme == "file":
        return Path(urllib.request.url2pathname(urllib.parse.urlsplit(text).path))
    return None if scheme else Path(text)


def file_name(source: str | os.PathLike) -> str:
    """Return the name of the file that a path or URL leads to, without folders; "" for names and presets.

    >>> file_name("https://example.org/a/my%20head.pkl?download=1"), file_name("hf://org/repo/b/large.pkl@v2")
    ('my head.pkl', 'large.pkl')
    """
    path = local_path(source)
    if path is not None:
        return path.name
    if match := _HF_FILE.fullmatch(os.fspath(source)):
        return match[2].rpartition("/")[2]
    if not url_scheme(source):
        return ""
    return urllib.parse.unquote(urllib.parse.urlsplit(os.fspath(source)).path).rpartition("/")[2]


def url_beside(url: str, name: str) -> str | None:
    """Return the URL of another file in the same folder; None where there is no such URL.

    Args:
        url: http(s):// or hf:// URL of a file; its query and fragment are dropped, its revision is kept.
        name: of the other file. It cannot lead out of the folder: one with a separator gives None.

    >>> url_beside("https://example.org/a/tuned.safetensors#sha256=00", "my head.pkl")
    'https://example.org/a/my%20head.pkl'
    >>> url_beside("hf://org/repo/a/tuned.safetensors@v2", "large.pkl")
    'hf://org/repo/a/large.pkl@v2'
    """
    if not name or name in (".", "..") or re.search(r"[/\\@\x00-\x1f]", name):
        return None
    if match := _HF_FILE.fullmatch(url):
        repository, path, revision = match.groups(default="")
        folder, slash, _ = path.rpartition("/")
        return f"{repository}{folder}{slash}{name}{revision}"
    if url_scheme(url) not in ("http", "https"):
        return None
    parts = urllib.parse.urlsplit(url)
    path = f"{parts.path.rpartition('/')[0]}/{urllib.parse.quote(name)}"
    return urllib.parse.urlunsplit((parts.scheme, parts.netloc, path, "", ""))


def without_credentials(url: str) -> str:
    """Return a URL without user name and password.

    >>> without_credentials("https://me:secret@example.org:8000/a.pkl")
    'https://example.org:8000/a.pkl'
    """
    return re.sub(r"^([A-Za-z]+://)[^/?#]*@", r"\1", url) if url_scheme(url) in ("http", "https") else url
