"""EasyDict, local files and names of sources; downloads are in test_download.py."""

import copy
import hashlib
import pickle
import subprocess
import sys

import pytest

import dnnlib
from dnnlib.util import open_url, source_name


def test_easy_dict_attributes_are_items():
    easy = dnnlib.EasyDict(a=1)
    easy.b = 2
    del easy.a
    assert easy == {"b": 2}
    assert easy.b == 2


@pytest.mark.parametrize("action", [lambda d: d.missing, lambda d: delattr(d, "missing")])
def test_easy_dict_missing_attribute_raises_and_names_it(action):
    with pytest.raises(AttributeError, match="'missing'"):
        action(dnnlib.EasyDict(a=1))


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, lambda d: pickle.loads(pickle.dumps(d))])
def test_easy_dict_copies_equal_the_original(duplicate):
    original = dnnlib.EasyDict(a=dnnlib.EasyDict(b=[1]))
    assert duplicate(original) == original
    assert duplicate(original).a.b == [1]


def test_dnnlib_import_loads_neither_torch_nor_requests(repo_root):
    code = "import sys, dnnlib.cli, dnnlib.serialize; print({'torch', 'requests'} & set(sys.modules))"
    command = [sys.executable, "-c", code]
    shown = subprocess.run(command, capture_output=True, text=True, check=True, cwd=repo_root).stdout
    assert shown.strip() == "set()"


@pytest.fixture
def local(tmp_path):
    path = tmp_path / "a file.pkl"
    path.write_bytes(b"weights")
    return path


@pytest.mark.parametrize("form", [str, lambda p: p, lambda p: p.as_uri()], ids=["str", "Path", "file://"])
def test_open_url_local_reads_the_file(local, form):
    with open_url(form(local)) as file:
        assert file.read() == b"weights"
    assert open_url(form(local), return_filename=True) == str(local)


def test_open_url_directory_raises_and_names_it(tmp_path):
    with pytest.raises(IsADirectoryError, match=f"{tmp_path}: expected a file, came a directory"):
        open_url(tmp_path)


@pytest.mark.parametrize("form", [str, lambda p: p.as_uri()], ids=["str", "file://"])
def test_open_url_absent_file_raises_and_names_it(tmp_path, form):
    url = form(tmp_path / "absent.pkl")
    with pytest.raises(FileNotFoundError, match=f"{url}: no such file"):
        open_url(url)


def test_open_url_local_wrong_sha256_raises(local):
    right = hashlib.sha256(b"weights").hexdigest()
    open_url(f"{local.as_uri()}#sha256={right.upper()}").close()
    with pytest.raises(ValueError, match=f"expected sha256 {'0' * 64}, came {right}"):
        open_url(local, sha256="0" * 64)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("ftp://host/file", "came the scheme 'ftp'"),
        ("http://host/file#sha256=12", "expected 64 hexadecimal digits, came '12'"),
        ("hf://org", "expected hf://org/repo/path"),
        ("hf://org/repo", "expected hf://org/repo/path"),
    ],
)
def test_open_url_malformed_raises_value_error(url, message):
    with pytest.raises(ValueError, match=message):
        open_url(url)


def test_open_url_two_different_digests_raises_value_error():
    with pytest.raises(ValueError, match="by the argument, came"):
        open_url(f"http://host/file#sha256={'0' * 64}", sha256="1" * 64)


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("out/network-snapshot-000100.pkl", "network-snapshot-000100"),
        ("https://example.org/a/head%20one.pkl?download=1#sha256=00", "head_one"),
        ("hf://org/repo/heads/large.safetensors@v2", "large"),
        ("hf://org/repo@v2/heads/large.safetensors", "large"),
        ("hf://org/repo/heads/large.safetensors@refs/pr/1", "large"),
        ("file:///a/b%20c.pkl", "b_c"),
        ("init:debug", "debug"),
        ("demo", "demo"),
        ("https://example.org/", "network"),
    ],
)
def test_source_name_gives_the_stem(source, name):
    assert source_name(source) == name
