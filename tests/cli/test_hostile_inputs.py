"""Whatever is wrong with what the scripts are given, they say so in one line, run nothing and write nothing."""

import os
import pickle

import numpy as np
import pytest

from tests.cli.running import contents, fail, invoke, start
from tests.torch_utils import fake_snapshot as fake
from torch_utils import native

GENERATORS = ["gen_samples.py", "gen_videos.py", "gen_videos_interp.py"]
FAST = ("--network", "init:debug", "--nrr", 8)


class RunsCommand:
    """Runs a shell command when it is unpickled."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def with_network(script, network, outdir) -> tuple:
    """Return the command line that gives a script a network."""
    if script == "convert_checkpoint.py":
        return network, f"{outdir}/a.safetensors"
    return "--network", network, "--seeds", 0, "--outdir", outdir


NETWORKS = {
    "absent": (None, "no such file"),
    "folder": ("folder", "expected a file, came a directory"),
    "empty": (b"", "network"),
    "jpeg": (b"\xff\xd8\xff\xe0\x00\x10JFIF\x00" + bytes(500), "network"),
    "web-page": (b"<!DOCTYPE html><html><body>Not found</body></html>", "network"),
    "zip": (b"PK\x03\x04" + bytes(100), "network"),
    "safetensors-of-others": (b"\x02" + bytes(7) + b"{}", "spherehead-checkpoint"),
    "safetensors-cut": (b"\xff\xff\x00\x00\x00\x00\x00\x00{", "header"),
    "plain-pickle": (pickle.dumps([1, 2, 3]), "expected a dict with G, D, G_ema, got list"),
    "no-networks": (pickle.dumps({"weights": 1}), "expected a dict with G, D, G_ema"),
    "number-as-network": (fake.dump({"G_ema": 1.5}), "G_ema"),
}


@pytest.mark.parametrize("script", ["gen_samples.py", "gen_videos.py", "convert_checkpoint.py"])
@pytest.mark.parametrize("kind", NETWORKS)
def test_network_of_another_kind_is_one_line_that_names_it(tmp_path, script, kind):
    content, culprit = NETWORKS[kind]
    network = tmp_path / "network.pkl"
    if content == "folder":
        network.mkdir()
    elif content is not None:
        network.write_bytes(content)
    message = fail(script, *with_network(script, network, tmp_path / "out"))
    assert "network.pkl" in message
    assert culprit in message
    assert not contents(tmp_path / "out")


@pytest.mark.parametrize("script", ["gen_samples.py", "gen_videos.py", "gen_videos_interp.py", "convert_checkpoint.py"])
def test_network_that_would_run_a_command_does_not(tmp_path, script):
    sentinel, network = tmp_path / "created", tmp_path / "network.pkl"
    network.write_bytes(pickle.dumps({"G_ema": RunsCommand(f"touch {sentinel}")}))
    message = fail(script, *with_network(script, network, tmp_path / "out"))
    assert "network.pkl" in message
    assert "system" in message
    assert not sentinel.exists()
    assert not contents(tmp_path / "out")
    pickle.loads(network.read_bytes())  # a careless reader would have run it
    assert sentinel.exists()


@pytest.mark.parametrize("share", [0.001, 0.3, 0.6, 0.999])
@pytest.mark.parametrize("script", ["gen_samples.py", "convert_checkpoint.py"])
def test_truncated_network_is_one_line_that_names_it(sphere_pickle, tmp_path, script, share):
    whole = sphere_pickle.read_bytes()
    network = tmp_path / "network.pkl"
    network.write_bytes(whole[: int(len(whole) * share)])
    assert "network.pkl" in fail(script, *with_network(script, network, tmp_path / "out"))
    assert not contents(tmp_path / "out")


@pytest.mark.parametrize("script", GENERATORS)
@pytest.mark.parametrize(
    ("changed", "culprit"),
    [
        (("--seeds", "3-1"), "'3-1'"),
        (("--seeds", "a"), "'a'"),
        (("--seeds", "0,"), "''"),
        (("--seeds", "-1"), "'-1'"),
        (("--seeds", "4294967296"), "4294967296"),
        (("--device", "gpu"), "'gpu'"),
        (("--device", "cuda:98"), "cuda:98"),
        (("--renderer", "fast"), "'fast'"),
        (("--network", ""), "--network"),
        (("--network", "init:nope"), "'nope'"),
        (("--network", "ftp://example.org/a.pkl"), "ftp"),
        (("--network", "hf://a/b"), "hf://a/b"),
        (("--trunc", "nan"), "--trunc"),
        (("--fov-deg", "0"), "--fov-deg"),
        (("--fov-deg", "wide"), "--fov-deg"),
        (("--nrr", "0"), "--nrr"),
        (("--image-mode", "image_color"), "--image-mode"),
        (("--noise-mode", "fresh"), "--noise-mode"),
        (("--noise-seed", "-1"), "--noise-seed"),
        (("--shape-format", "stl"), "--shape-format"),
        (("--shape-res", "4"), "--shape-res"),
        (("--shapes", "perhaps"), "--shapes"),
        (("--pose-cond", "front"), "--pose-cond"),
        (("--no-such-option",), "--no-such-option"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_bad_option_is_one_line_that_names_it(tmp_path, script, changed, culprit):
    assert culprit in fail(script, *FAST, "--seeds", 0, "--outdir", tmp_path / "out", *changed)
    assert not contents(tmp_path / "out")


def test_native_kernels_that_are_insisted_on_and_cannot_be_built_are_one_line(tmp_path, monkeypatch):
    for name, value in {"SPHEREHEAD_NATIVE": "1", "CXX": "false", "SPHEREHEAD_CACHE_DIR": tmp_path / "cache"}.items():
        monkeypatch.setenv(name, str(value))
    process = start(["gen_samples.py", *FAST, "--seeds", 0, "--outdir", tmp_path / "out"])
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "Traceback" not in errors
    assert errors.splitlines()[-1].startswith("Error: SPHEREHEAD_NATIVE=1, but there are no native kernels: ")


@pytest.mark.parametrize("script", GENERATORS)
def test_fused_renderer_without_kernels_is_one_line_that_says_why(tmp_path, script):
    with native.disabled():
        line = fail(script, *FAST, "--seeds", 0, "--outdir", tmp_path / "out", "--renderer", "fused")
    assert "renderer" in line and "'fused' cannot run here" in line
    assert not contents(tmp_path / "out")


@pytest.mark.parametrize("script", GENERATORS)
@pytest.mark.parametrize(
    ("changed", "culprit"), [(("--fov-deg", "180"), "fov_deg"), (("--image-mode", "image_parsing"), "'image_parsing'")]
)
def test_option_that_the_network_refuses_is_one_line_at_the_end(tmp_path, script, changed, culprit):
    """After the notice that the network is untrained, or a progress bar."""
    result = invoke(script, *FAST, "--seeds", 0, "--outdir", tmp_path / "out", *changed)
    assert result.exit_code == 1
    assert "Traceback" not in result.stderr
    last = result.stderr.splitlines()[-1]
    assert last.startswith("Error: ")
    assert culprit in last
    assert not contents(tmp_path)


@pytest.mark.parametrize("script", GENERATORS[1:])
@pytest.mark.parametrize(
    ("changed", "culprit"),
    [
        (("--grid", "2x2"), "a multiple of 4, the cells of the grid, got 3"),
        (("--grid", "2x"), "--grid"),
        (("--grid", "0x1"), "--grid"),
        (("--num-keyframes", "0"), "--num-keyframes"),
        (("--sample-mult", "0"), "--sample-mult"),
        (("--sample-mult", "0.01"), "depth_resolution"),
        (("--w-frames", "0"), "--w-frames"),
        (("--cfg", "Dogs"), "--cfg"),
        (("--output", "a.avi"), "a.avi"),
        (("--interpolate", "false", "--grid", "3x1"), "--grid"),
        (("--interpolate", "false", "--output", "a.mp4"), "--output"),
        (("--latent", "a.npz"), "--latent"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_bad_video_option_is_one_line_that_names_it(tmp_path, monkeypatch, script, changed, culprit):
    monkeypatch.chdir(tmp_path)
    assert culprit in fail(script, *FAST, "--seeds", "0-2", "--outdir", tmp_path / "out", *changed)
    assert not contents(tmp_path)


def test_video_without_seeds_or_latent_is_one_line(tmp_path):
    assert "--seeds, --latent" in fail("gen_videos.py", *FAST, "--outdir", tmp_path)


@pytest.mark.parametrize("script", GENERATORS[1:])
@pytest.mark.parametrize(
    ("w", "culprit"),
    [
        (np.full((1, 10, 512), np.nan), "finite numbers"),
        (np.zeros((1, 4, 512)), "(1, 4, 512)"),
        (np.zeros((10, 512)), "(10, 512)"),
        (np.array([{}], dtype=object), "array 'w'"),
        (None, "No such file"),
        (b"\xff\xd8\xff\xe0 a JPEG", "expected an .npz file"),
    ],
    ids=["nan", "layers", "axes", "objects", "absent", "jpeg"],
)
def test_bad_latent_is_one_line_that_names_it(tmp_path, script, w, culprit):
    latent = tmp_path / "face.npz"
    if isinstance(w, bytes):
        latent.write_bytes(w)
    elif w is not None:
        np.savez(latent, w=w)
    message = fail(script, *FAST, "--latent", latent, "--outdir", tmp_path / "out")
    assert "face.npz" in message
    assert culprit in message
    assert not contents(tmp_path / "out")


@pytest.mark.parametrize("script", GENERATORS)
def test_output_folder_that_is_a_file_is_one_line_that_names_it(tmp_path, script):
    (tmp_path / "out").write_bytes(b"precious")
    assert str(tmp_path / "out") in fail(script, *FAST, "--seeds", 0, "--outdir", tmp_path / "out")
    assert contents(tmp_path) == {"out": b"precious"}


def unwritable(kind, tmp_path):
    """Return a folder in which nothing can be made."""
    if kind == "below a file":
        (tmp_path / "file").write_bytes(b"precious")
        return tmp_path / "file" / "out"
    if kind == "read-only":
        if os.name != "posix" or os.geteuid() == 0:
            pytest.skip("needs a user whom permissions bind")
        (tmp_path / "out").mkdir(mode=0o500)
        return tmp_path / "out"
    if not os.path.isdir("/proc/self"):
        pytest.skip("needs /proc")
    return "/proc/spherehead"


@pytest.mark.parametrize("script", [*GENERATORS, "convert_checkpoint.py"])
@pytest.mark.parametrize("kind", ["below a file", "read-only", "virtual"])
def test_unwritable_output_is_one_line_that_names_it_before_anything_is_read(tmp_path, script, kind):
    outdir = unwritable(kind, tmp_path)
    before = contents(tmp_path)
    assert str(outdir) in fail(script, *with_network(script, "absent.pkl", outdir))
    assert contents(tmp_path) == before
