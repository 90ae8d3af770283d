"""Requests deal seeds out as published, name files as published, and refuse what makes no sense."""

import inspect
import io
import json
import pickle
import zipfile
from pathlib import Path

import click
import numpy as np
import pytest
import torch

import inference.video_request
from dnnlib import cli, cli_video
from inference import Noise, Truncation
from inference.sampling import IMAGE_MODES, seed_ws
from inference.shapes import VIDEO_SHAPE_FORMATS
from inference.video import CAMERA_PATHS, FrameShapes, VideoSettings
from inference.video_request import VideoRequest, load_latent, make_videos


def request(seeds=(0, 1, 2, 3), grid=(1, 1), **changes) -> VideoRequest:
    settings = changes.pop("settings", VideoSettings(grid=grid, frames_per_keyframe=2))
    return VideoRequest(network="init:debug", settings=settings, seeds=seeds, pose_cond_deg=90.0, **changes)


def from_command_line(*arguments: str, **extra) -> VideoRequest:
    """Return the request that options of the video scripts make."""
    received = []

    @click.command()
    @cli_video.video_options(CAMERA_PATHS, IMAGE_MODES, VIDEO_SHAPE_FORMATS, 10.0, 60)
    def command(dry_run, **options):
        received.append(VideoRequest.from_options(**options, **extra))

    command.main(["--network", "a.pkl", *arguments], standalone_mode=False)
    return received[0]


# From options.


def test_from_options_defaults_are_the_published():
    made = from_command_line("--seeds", "0")
    assert made.settings == VideoSettings(camera_path="FFHQ", frames_per_keyframe=240, noise=Noise(), fps=60)
    assert made.truncation == Truncation(psi=1.0, cutoff=14)
    assert made.interpolate and made.shapes is None and made.sample_mult == 1
    assert made.pose_cond_deg == 90 and made.num_keyframes is None and made.shuffle_seed is None


def test_from_options_everything_arrives():
    made = from_command_line(
        *("--seeds", "3-5", "--cfg", "Head", "--w-frames", "7", "--grid", "3x1", "--image-mode", "image_depth"),
        *("--fov-deg", "20.5", "--nrr", "96", "--noise-mode", "random", "--noise-seed", "5", "--fps", "24"),
        *("--trunc", "0.5", "--trunc-cutoff", "6", "--pose-cond", "45", "--shapes", "true", "--shape-res", "64"),
        *("--shape-format", ".GLB", "--num-keyframes", "2", "--shuffle-seed", "9", "--sample-mult", "1.5"),
        *("--outdir", "out", "--output", "a.mp4", "--device", "cpu", "--overwrite"),
        turns=0.5,
        fixed_camera=True,
    )
    assert made == VideoRequest(
        network="a.pkl",
        settings=VideoSettings(
            camera_path="Head",
            fixed_camera=True,
            frames_per_keyframe=7,
            turns=0.5,
            grid=(3, 1),
            image_mode="image_depth",
            fov_deg=20.5,
            neural_rendering_resolution=96,
            noise=Noise(mode="random", seed=5),
            fps=24,
        ),
        seeds=(3, 4, 5),
        num_keyframes=2,
        shuffle_seed=9,
        truncation=Truncation(psi=0.5, cutoff=6),
        pose_cond_deg=45.0,
        sample_mult=1.5,
        shapes=made.shapes,
        outdir=Path("out"),
        output=Path("a.mp4"),
        device="cpu",
        overwrite=True,
    )
    assert (made.shapes.suffix, made.shapes.settings.resolution) == ("glb", 64)


def test_from_options_takes_every_option_of_the_scripts():
    options = cli_video.video_options(CAMERA_PATHS, IMAGE_MODES, VIDEO_SHAPE_FORMATS, 10.0, 60)
    command = click.command()(options(lambda **_: None))
    exposed = {parameter.name for parameter in command.params if parameter.expose_value}
    taken = {*inspect.signature(VideoRequest.from_options).parameters, *inspect.signature(VideoRequest).parameters}
    assert exposed - taken == {"dry_run"}


def test_from_options_truncation_cutoff_0_truncates_nothing():
    assert from_command_line("--seeds", "0", "--trunc", "0.5", "--trunc-cutoff", "0").truncation.psi == 1
    assert from_command_line("--seeds", "0", "--trunc", "0.5", "--trunc-cutoff", "1").truncation.psi == 0.5


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"seeds": ()}, "--seeds, --latent: expected one of the two"),
        ({"latent": Path("a.npz")}, "--seeds, --latent: expected one of the two"),
        ({"sample_mult": 0.0}, "--sample-mult: expected a positive factor"),
        (
            {"seeds": (0, 1, 2), "grid": (2, 1)},
            "number of seeds: expected a multiple of 2, the cells of the grid, got 3",
        ),
        ({"interpolate": False, "grid": (2, 1)}, "--grid: expected 1x1 with --interpolate false"),
        ({"interpolate": False, "output": Path("a.mp4")}, "--output: expected --outdir with --interpolate false"),
        ({"interpolate": False, "seeds": (), "latent": Path("a.npz")}, "--latent: expected --seeds with --interpolate"),
        ({"output": Path("a.avi")}, r"--output: expected a name that ends in \.mp4, got 'a\.avi'"),
        ({"seeds": (), "latent": Path("a.npz"), "num_keyframes": 2}, "--num-keyframes: expected nothing with --latent"),
        ({"seeds": (), "latent": Path("a.npz"), "shuffle_seed": 0}, "--shuffle-seed: expected nothing with --latent"),
    ],
)
def test_video_request_that_makes_no_sense_raises_and_names_the_option(changes, expected):
    with pytest.raises(ValueError, match=expected):
        request(**changes)


# Seeds and names.


@pytest.mark.parametrize("shuffle_seed", [None, 0, 11])
@pytest.mark.parametrize(
    ("seeds", "grid", "num_keyframes"), [((5, 6, 7, 8), (2, 1), None), ((5, 6, 7), (2, 2), 2), ((5,), (1, 1), 3)]
)
def test_keyframe_seeds_are_dealt_out_as_published(seeds, grid, num_keyframes, shuffle_seed):
    """Seeds are cycled over all keyframes of all cells, shuffled, and cut into cells."""
    cells = grid[0] * grid[1]
    keyframes = num_keyframes or len(seeds) // cells
    published = np.zeros(cells * keyframes, dtype=np.int64)
    for index in range(cells * keyframes):
        published[index] = seeds[index % len(seeds)]
    if shuffle_seed is not None:
        np.random.RandomState(seed=shuffle_seed).shuffle(published)
    made = request(seeds, grid, num_keyframes=num_keyframes, shuffle_seed=shuffle_seed)
    np.testing.assert_array_equal(made.keyframe_seeds(seeds), published.reshape(cells, keyframes))


def test_keyframe_seeds_of_separate_videos_are_one_each():
    assert request(interpolate=False).keyframe_seeds((3,)).tolist() == [[3]]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"outdir": Path("out")}, {"out/debug_90.mp4": (0, 1, 2, 3)}),
        ({}, {"samples_debug/debug_90.mp4": (0, 1, 2, 3)}),
        ({"output": Path("x/turn.mp4")}, {"x/turn.mp4": (0, 1, 2, 3)}),
        ({"seeds": (), "latent": Path("in/face.npz"), "outdir": Path("out")}, {"out/face.mp4": ()}),
        (
            {"seeds": (4, 12), "interpolate": False, "outdir": Path("out")},
            {"out/debug_90/seed0004.mp4": (4,), "out/debug_90/seed0012.mp4": (12,)},
        ),
    ],
)
def test_videos_are_named_as_published(changes, expected):
    assert {str(path): seeds for path, seeds in request(**changes).videos().items()} == expected


def test_plan_is_json_and_counts_the_frames(capsys):
    cli.print_dry_run(request(grid=(2, 1), outdir=Path("out")).plan())
    (video,) = json.loads(capsys.readouterr().out)["videos"]
    assert video == {"file": "out/debug_90.mp4", "seeds": [0, 1, 2, 3], "frames": 4}
    from_latent = request(seeds=(), latent=Path("a.npz")).plan()
    assert from_latent["videos"][0]["frames"] is None  # the file knows


# Making videos.


@pytest.fixture
def written(monkeypatch):
    """Record what is asked for instead of rendering it."""
    calls = []

    def write_video(path, generator, keyframes, settings, shapes):
        calls.append((path, generator, keyframes, shapes))

    monkeypatch.setattr(inference.video_request, "write_video", write_video)
    return calls


def test_make_videos_keyframes_are_the_dealt_seeds(written, generator, tmp_path):
    made = request((5, 6, 7), (2, 1), num_keyframes=2, shuffle_seed=1, outdir=tmp_path, truncation=Truncation(psi=0.5))
    assert list(make_videos(made)) == [tmp_path / "debug_90.mp4"]
    ((_, _, keyframes, _),) = written
    dealt = made.keyframe_seeds((5, 6, 7))
    assert keyframes.shape == (2, 2, 10, 512)
    expected = seed_ws(generator, dealt.flatten().tolist(), Truncation(psi=0.5))
    assert torch.equal(keyframes.flatten(0, 1), expected)


@pytest.mark.parametrize(("factor", "samples"), [(1.0, 16), (2.0, 32), (0.7, 11)])
def test_make_videos_sample_mult_multiplies_both_depth_resolutions(written, tmp_path, factor, samples):
    list(make_videos(request(sample_mult=factor, outdir=tmp_path)))
    rendering = written[0][1].config.rendering
    assert (rendering.depth_resolution, rendering.depth_resolution_importance) == (samples, samples)


def test_make_videos_existing_files_are_refused_before_anything_is_loaded(written, tmp_path, monkeypatch):
    made = request(outdir=tmp_path, shapes=FrameShapes())
    (tmp_path / "debug_90.mp4").touch()
    with monkeypatch.context() as patch, pytest.raises(FileExistsError, match="debug_90.mp4 is there already"):
        patch.setattr(inference.video_request, "load_generator", lambda *_: pytest.fail("loaded"))
        list(make_videos(made))
    (tmp_path / "debug_90.mp4").unlink()
    (tmp_path / "debug_90_shapes").mkdir()
    (tmp_path / "debug_90_shapes" / "trajectory.npy").touch()
    with pytest.raises(FileExistsError, match="trajectory.npy is there already"):
        list(make_videos(made))
    assert not written
    list(make_videos(request(outdir=tmp_path, shapes=FrameShapes(), overwrite=True)))
    assert written[0][3].folder == tmp_path / "debug_90_shapes"


def test_make_videos_separate_videos_are_shared_between_processes(written, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    names = []
    for rank in range(3):
        monkeypatch.setenv("RANK", str(rank))
        names.append([path.name for path in make_videos(request(interpolate=False, outdir=tmp_path))])
    assert names == [["seed0000.mp4", "seed0003.mp4"], ["seed0001.mp4"], ["seed0002.mp4"]]


def test_make_videos_without_a_share_loads_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(inference.video_request, "load_generator", lambda *_: pytest.fail("loaded"))
    assert list(make_videos(request(outdir=tmp_path))) == []


# Saved latents.


def save_latent(path: Path, w: np.ndarray, save=np.savez) -> Path:
    save(path, w=w)
    return path


def test_make_videos_latents_fill_the_cells_in_order(written, generator, tmp_path):
    w = np.random.RandomState(0).randn(4, 10, 512)  # float64, as the projector may write
    latent = save_latent(tmp_path / "face.npz", w)
    made = request(seeds=(), latent=latent, outdir=tmp_path, grid=(2, 1), shapes=FrameShapes())
    assert list(make_videos(made)) == [tmp_path / "face.mp4"]
    ((_, _, keyframes, shapes),) = written
    assert torch.equal(keyframes, torch.from_numpy(w.astype(np.float32)).reshape(2, 2, 10, 512))
    assert shapes.folder == tmp_path / "face_shapes"


def test_make_videos_latents_that_do_not_fill_the_grid_raise(written, tmp_path):
    latent = save_latent(tmp_path / "face.npz", np.zeros((3, 10, 512)))
    with pytest.raises(ValueError, match=r"face\.npz: w: expected a multiple of 2 latents, got 3"):
        list(make_videos(request(seeds=(), latent=latent, outdir=tmp_path, grid=(2, 1))))


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, np.int32])
def test_load_latent_numbers_become_float32(generator, tmp_path, save, dtype):
    w = np.arange(10 * 512).reshape(1, 10, 512).astype(dtype)
    loaded = load_latent(save_latent(tmp_path / "a.npz", w, save), generator)
    assert loaded.dtype == torch.float32
    np.testing.assert_array_equal(loaded.numpy(), w.astype(np.float32))


def nan_in(shape: tuple[int, ...], value: float = np.nan) -> np.ndarray:
    w = np.zeros(shape, np.float32)
    w.flat[7] = value
    return w


@pytest.mark.parametrize(
    ("w", "expected"),
    [
        (np.zeros((10, 512)), r"w: expected shape \[K, 10, 512\] for this network, got \(10, 512\)"),
        (np.zeros((1, 9, 512)), r"w: expected shape \[K, 10, 512\] for this network, got \(1, 9, 512\)"),
        (np.zeros((1, 10, 256)), "w: expected shape"),
        (np.zeros((0, 10, 512)), "w: expected shape"),
        (np.float32(3), "w: expected shape"),
        (nan_in((1, 10, 512)), "w: expected finite numbers, got 'NaN or infinity'"),
        (nan_in((1, 10, 512), -np.inf), "w: expected finite numbers"),
        (np.full((1, 10, 512), 1e39), "w: expected finite numbers"),
        (np.zeros((1, 10, 512), np.complex64), "w: expected an array of real numbers, got 'complex64'"),
        (np.full((1, 10, 512), "a"), "w: expected an array of real numbers"),
    ],
)
def test_load_latent_unfit_array_raises_and_says_why(generator, tmp_path, w, expected):
    path = save_latent(tmp_path / "face.npz", w)
    with pytest.raises(ValueError, match=expected) as raised:
        load_latent(path, generator)
    assert str(path) in str(raised.value)


def npy_bytes() -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.zeros((1, 10, 512)))
    return buffer.getvalue()


class Touches:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize(
    "content", [b"", b"\xff\xd8\xff\xe0 a JPEG", npy_bytes(), pickle.dumps({"w": 1}), b"PK\x03\x04"], ids=range(5)
)
def test_load_latent_other_file_raises_and_names_it(generator, tmp_path, content):
    path = tmp_path / "face.npz"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"face\.npz: expected an \.npz file with an array 'w'"):
        load_latent(path, generator)


def test_load_latent_without_w_raises(generator, tmp_path):
    np.savez(tmp_path / "face.npz", ws=np.zeros((1, 10, 512)))
    with pytest.raises(ValueError, match=r"face\.npz: expected an \.npz file with an array 'w'.*w is not"):
        load_latent(tmp_path / "face.npz", generator)


def test_load_latent_pickled_array_raises_and_runs_nothing(generator, tmp_path):
    sentinel = tmp_path / "created"
    path = save_latent(tmp_path / "face.npz", np.array([Touches(sentinel)], dtype=object))
    with pytest.raises(ValueError, match=r"face\.npz: expected an \.npz file with an array 'w'"):
        load_latent(path, generator)
    assert not sentinel.exists()
    np.load(path, allow_pickle=True)["w"]  # a careless reader would have created it
    assert sentinel.exists()


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_load_latent_damaged_anywhere_raises_or_still_reads(generator, tmp_path, save):
    """Whatever bytes change, nothing but a ValueError comes out."""
    path = save_latent(tmp_path / "face.npz", np.ones((1, 10, 512), np.float16), save)
    whole, random, refused = path.read_bytes(), np.random.RandomState(0), 0
    for trial in range(60):
        damaged = bytearray(whole)
        if trial % 2:
            del damaged[random.randint(len(damaged)) :]
        for position in random.randint(0, max(1, len(damaged)), 8 if damaged else 0):
            damaged[position] ^= 1 << random.randint(8)
        path.write_bytes(damaged)
        try:
            load_latent(path, generator)
        except ValueError as error:
            refused += 1
            assert "face.npz" in str(error)
    assert refused > 50


def test_load_latent_encrypted_member_raises(generator, tmp_path):
    path = tmp_path / "face.npz"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("w.npy", npy_bytes())
    raw = bytearray(path.read_bytes())
    for header, flags_at in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        raw[raw.index(header) + flags_at] |= 1
    path.write_bytes(raw)
    with pytest.raises(ValueError, match=r"face\.npz: expected an \.npz file with an array 'w'.*encrypted"):
        load_latent(path, generator)


def test_load_latent_absent_file_raises(generator, tmp_path):
    with pytest.raises(FileNotFoundError, match="face.npz"):
        load_latent(tmp_path / "face.npz", generator)
