"""Downloads from a server on this machine that misbehaves on request."""

import hashlib
import http.server
import json
import subprocess
import sys
import threading
import types
from pathlib import Path

import pytest

from dnnlib import download
from dnnlib.extras import MissingExtraError
from dnnlib.util import DownloadError, open_url

BODY = bytes(range(256)) * 8192  # 2 MiB: more than one chunk
DIGEST = hashlib.sha256(BODY).hexdigest()


class Handler(http.server.BaseHTTPRequestHandler):
    """Answer by the path; ``server.requests`` counts."""

    def do_GET(self):
        with self.server.counting:
            self.server.requests += 1
            count = self.server.requests
        getattr(self, "answer_" + self.path.strip("/").split("/")[0].split(".")[0])(count)

    def send(self, body, status=200, length=None, **headers):
        self.send_response(status)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def answer_file(self, count):
        self.send(BODY, ETag='"v1"')

    def answer_truncated(self, count):
        self.send(BODY[:100_000], length=len(BODY))

    def answer_recovering(self, count):
        self.send(BODY[:100_000], length=len(BODY)) if count == 1 else self.send(BODY)

    def answer_shrinking(self, count):
        self.send(BODY[:100_000], length=len(BODY)) if count == 1 else self.send(b"short")

    def answer_busy(self, count):
        self.send(b"later", status=500) if count < 3 else self.send(BODY)

    def answer_missing(self, count):
        self.send(b"", status=404)

    def answer_page(self, count):
        self.send(b"<p>Sign in</p>", Content_Type="text/html; charset=utf-8")

    def answer_disguised(self, count):
        self.send(b"\n <!DOCTYPE html><p>Sign in</p>", Content_Type="application/octet-stream")

    def log_message(self, *arguments):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(download, "FIRST_RETRY_DELAY_S", 0.01)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.requests, server.counting = 0, threading.Lock()
        server.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SPHEREHEAD_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def stored(cache):
    """Return the names of the files in the cache, except the locks."""
    return sorted(path.name for path in cache.iterdir() if not path.name.endswith(".lock"))


def read(url, **options):
    with open_url(url, verbose=False, **options) as file:
        return file.read()


def test_open_url_http_twice_fetches_once_and_records(server, cache):
    url = f"{server.url}/file.pkl"
    assert read(url) == BODY
    assert read(url) == BODY
    assert server.requests == 1
    data, record = stored(cache)
    assert data.endswith("_file.pkl")
    expected = {"url": url, "size": len(BODY), "sha256": DIGEST, "etag": '"v1"'}
    assert json.loads((cache / record).read_text()) == expected


def test_open_url_http_cache_dir_argument_beats_the_variable(server, cache, tmp_path):
    name = open_url(f"{server.url}/file", cache_dir=tmp_path / "other", verbose=False, return_filename=True)
    assert Path(name).parent == tmp_path / "other"
    assert Path(name).read_bytes() == BODY
    assert not cache.exists()


def test_open_url_http_without_cache_keeps_nothing(server, cache):
    assert read(f"{server.url}/file", cache=False) == BODY
    assert not cache.exists()
    with pytest.raises(ValueError, match="expected cache=True"):
        open_url(f"{server.url}/file", cache=False, return_filename=True)


@pytest.mark.parametrize(
    "damage", [lambda b: b[:-1], lambda b: b[:-1] + b"x", lambda b: b""], ids=["cut", "bit", "empty"]
)
def test_open_url_http_corrupted_cache_fetches_again_with_a_notice(server, cache, capsys, damage):
    url = f"{server.url}/file"
    name = Path(open_url(url, verbose=False, return_filename=True))
    name.write_bytes(damage(BODY))
    with open_url(url) as file:
        assert file.read() == BODY
    notices = [line for line in capsys.readouterr().err.splitlines() if "does not match its sha256" in line]
    assert len(notices) == 1
    assert server.requests == 2


@pytest.mark.parametrize("text", ["", "{", "[]", '{"url": "http://else", "sha256": "00"}'])
def test_open_url_http_unusable_record_fetches_again(server, cache, text):
    url = f"{server.url}/file"
    read(url)
    (cache / stored(cache)[1]).write_text(text)
    assert read(url) == BODY
    assert server.requests == 2


def test_open_url_http_truncated_always_raises_after_the_attempts(server, cache):
    with pytest.raises(DownloadError, match="/truncated.*attempt 3 of 3"):
        read(f"{server.url}/truncated", num_attempts=3)
    assert server.requests == 3
    assert stored(cache) == []


def test_open_url_http_truncated_once_tries_again(server, cache):
    assert read(f"{server.url}/recovering") == BODY
    assert server.requests == 2


def test_open_url_http_second_attempt_is_shorter_leaves_nothing_of_the_first(server, cache):
    assert read(f"{server.url}/shrinking") == b"short"
    assert read(f"{server.url}/shrinking") == b"short"
    assert server.requests == 2


def test_fetch_short_body_unnoticed_by_the_client_is_transient(tmp_path, monkeypatch):
    class Response:
        """What an HTTP library that trusts the connection's end makes of a truncated answer."""

        status_code, reason, headers = 200, "OK", {"Content-Length": "10"}

        def __enter__(self):
            return self

        def __exit__(self, *details):
            pass

        def iter_content(self, size):
            yield b"123"

    monkeypatch.setattr("requests.get", lambda *arguments, **keywords: Response())
    with pytest.raises(DownloadError, match="truncated download: expected 10 bytes, came 3"):
        read("http://host/file", cache_dir=tmp_path, num_attempts=1)


def test_open_url_http_server_error_then_ok_succeeds(server, cache, capsys):
    with open_url(f"{server.url}/busy") as file:
        assert file.read() == BODY
    assert server.requests == 3
    assert capsys.readouterr().err.count("came 500 Internal Server Error; trying again") == 2


def test_open_url_http_404_raises_at_once(server, cache):
    with pytest.raises(DownloadError, match="/missing: expected status 200, came 404 Not Found"):
        read(f"{server.url}/missing")
    assert server.requests == 1
    assert stored(cache) == []


@pytest.mark.parametrize("path", ["page", "disguised"])
def test_open_url_http_web_page_raises_at_once(server, cache, path):
    with pytest.raises(DownloadError, match=f"/{path}: expected a file, came a web page"):
        read(f"{server.url}/{path}")
    assert server.requests == 1
    assert stored(cache) == []


def test_open_url_http_nobody_listens_raises_and_names_the_url(server, cache):
    server.server_close()
    with pytest.raises(DownloadError, match=f"{server.url}/file: ConnectionError"):
        read(f"{server.url}/file", num_attempts=2)


def test_open_url_http_right_sha256_in_the_fragment_is_accepted(server, cache):
    url = f"{server.url}/file"
    assert read(f"{url}#sha256={DIGEST}") == BODY
    assert read(url, sha256=DIGEST.upper()) == BODY
    assert server.requests == 1


@pytest.mark.parametrize("cached", [False, True])
def test_open_url_http_wrong_sha256_raises_and_keeps_nothing(server, cache, cached):
    url = f"{server.url}/file"
    if cached:
        read(url)
    with pytest.raises(ValueError, match=f"/file: expected sha256 {'0' * 64}, came {DIGEST}"):
        read(f"{url}#sha256={'0' * 64}")
    assert stored(cache) == []


def test_open_url_http_no_attempts_raises_value_error(cache):
    with pytest.raises(ValueError, match="num_attempts: expected at least 1, came 0"):
        read("http://host/file", num_attempts=0)


def test_open_url_http_two_processes_fetch_once_and_agree(server, cache, repo_root):
    code = (
        "import hashlib, sys; from dnnlib.util import open_url\n"
        "with open_url(sys.argv[1], verbose=False) as f: print(hashlib.sha256(f.read()).hexdigest())"
    )
    command = [sys.executable, "-c", code, f"{server.url}/file"]
    runs = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=repo_root) for _ in range(2)]
    assert [run.communicate(timeout=30)[0].strip() for run in runs] == [DIGEST, DIGEST]
    assert server.requests == 1 or download.fcntl is None
    assert len(stored(cache)) == 2


def test_open_url_http_many_threads_without_locks_agree(server, cache, monkeypatch):
    monkeypatch.setattr(download, "fcntl", None)
    results = []
    threads = [threading.Thread(target=lambda: results.append(read(f"{server.url}/file"))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [BODY] * 4
    assert len(stored(cache)) == 2


def test_open_url_without_fetching_takes_only_what_is_cached(server, cache):
    url = f"{server.url}/file.pkl"
    with pytest.raises(FileNotFoundError, match="file.pkl: not in the cache"):
        open_url(url, fetch=False)
    assert server.requests == 0 and not cache.exists()
    read(url)
    assert read(url, fetch=False) == read(f"{url}#sha256={DIGEST}", fetch=False) == BODY
    with pytest.raises(FileNotFoundError, match="not in the cache"):
        open_url(f"{url}#sha256={'0' * 64}", fetch=False)
    assert read(url, fetch=False) == BODY  # still there
    assert server.requests == 1


def test_open_url_hf_not_installed_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(MissingExtraError, match=r"pip install -e '\.\[hub\]'"):
        open_url("hf://org/repo/file.pkl")


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """Stand in for huggingface_hub: one file, given as a link to a blob, as the hub's cache has it."""
    blob, link = tmp_path / "blob", tmp_path / "file.pkl"
    blob.write_bytes(BODY)
    link.symlink_to(blob)
    calls = []

    def hf_hub_download(repo_id, filename, *, revision, cache_dir, local_files_only=False):
        calls.append((repo_id, filename, revision, cache_dir))
        if "absent" in filename or (local_files_only and "cached" not in filename):
            raise RuntimeError("404:\nno such entry")
        return str(link)

    monkeypatch.setitem(sys.modules, "huggingface_hub", types.SimpleNamespace(hf_hub_download=hf_hub_download))
    return types.SimpleNamespace(calls=calls, blob=blob, link=link)


@pytest.mark.parametrize(
    ("url", "call"),
    [
        ("hf://org/repo/file.pkl", ("org/repo", "file.pkl", None, None)),
        ("hf://org/repo/a/b/file.pkl@refs/pr/1", ("org/repo", "a/b/file.pkl", "refs/pr/1", None)),
        ("hf://org/repo@v2/a/file.pkl", ("org/repo", "a/file.pkl", "v2", None)),
        (f"hf://org/repo/file.pkl@v2#sha256={DIGEST}", ("org/repo", "file.pkl", "v2", None)),
    ],
)
def test_open_url_hf_asks_the_hub_for_the_file(hub, url, call):
    assert read(url) == BODY
    assert hub.calls == [call]


def test_open_url_hf_absent_raises_on_one_line(hub):
    with pytest.raises(DownloadError, match="^hf://org/repo/absent: 404: no such entry$"):
        open_url("hf://org/repo/absent")


def test_open_url_hf_wrong_sha256_raises_and_keeps_nothing(hub):
    with pytest.raises(ValueError, match="expected sha256 0000"):
        open_url("hf://org/repo/file.pkl", sha256="0" * 64)
    assert not hub.blob.exists()
    assert not hub.link.is_symlink()


def test_open_url_hf_without_fetching_asks_the_cache_of_the_hub_and_removes_nothing(hub):
    with pytest.raises(FileNotFoundError, match="^hf://org/repo/file.pkl: not in the cache"):
        open_url("hf://org/repo/file.pkl", fetch=False)
    assert read("hf://org/repo/cached.pkl", fetch=False) == BODY
    with pytest.raises(ValueError, match="expected sha256 0000"):
        open_url("hf://org/repo/cached.pkl", sha256="0" * 64, fetch=False)
    assert hub.blob.exists()
