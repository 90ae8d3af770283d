"""Files have the published names, and appear whole or not at all."""

from pathlib import Path

import imageio
import numpy as np
import pytest
from PIL import Image

from inference.output import VIDEO_FPS, open_video, output_folder, prepare_outputs, save_png


def smooth_frames(num_frames: int, height: int, width: int) -> list[np.ndarray]:
    """Return colour gradients that move, which 4:2:0 video keeps well."""
    y, x = np.mgrid[:height, :width]
    return [
        np.stack([x * 255 / width, y * 255 / height, np.full(x.shape, 40.0 * number)], axis=-1).astype(np.uint8)
        for number in range(num_frames)
    ]


def write_frames(path: Path, frames: list[np.ndarray], **settings) -> None:
    with open_video(path, **settings) as video:
        for frame in frames:
            video.append_data(frame)


@pytest.mark.parametrize(
    ("network", "outdir", "expected"),
    [
        ("models/head.pkl", "out", "out/head_90"),
        ("models/head.pkl", None, "models/samples_head"),
        ("head.safetensors", None, "samples_head"),
        ("https://example.org/x/head.pkl#sha256=00", "out", "out/head_90"),
        ("https://example.org/x/head.pkl", None, "samples_head"),
        ("hf://org/repo/sub/head.pkl@v1", None, "samples_head"),
        ("init:debug", "out", "out/debug_90"),
        ("init:debug", None, "samples_debug"),
        ("demo", "out", "out/demo_90"),
        ("demo", None, "samples_demo"),
        ("./demo", None, "samples_demo"),
        ("out/a photo/tuned.safetensors", None, "out/a photo/samples_tuned"),
    ],
)
def test_output_folder_is_the_published_one(network, outdir, expected):
    assert output_folder(network, None if outdir is None else Path(outdir), 90.0) == Path(expected)


@pytest.mark.parametrize(("pose_cond", "name"), [(0.0, "a_0"), (-45.0, "a_-45"), (22.5, "a_22.5")])
def test_output_folder_names_the_conditioning_pose(pose_cond, name):
    assert output_folder("a.pkl", Path("out"), pose_cond) == Path("out") / name


def test_prepare_outputs_names_the_first_and_counts_the_others(tmp_path):
    paths = [tmp_path / name for name in ("a", "b", "c")]
    prepare_outputs(paths, overwrite=False)
    for path in paths[1:]:
        path.touch()
    prepare_outputs(paths, overwrite=True)
    with pytest.raises(FileExistsError, match=r"b \(and 1 more\) is there already; give --overwrite"):
        prepare_outputs(paths, overwrite=False)


def test_prepare_outputs_makes_the_folders(tmp_path):
    prepare_outputs([tmp_path / "a" / "b" / "c.png", tmp_path / "d" / "e.png"], overwrite=False)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a", "b", "d"]


def test_prepare_outputs_read_only_folder_raises_and_names_it(tmp_path, monkeypatch):
    monkeypatch.setattr("os.access", lambda path, mode: path != tmp_path)  # for users whom permissions do not bind
    with pytest.raises(PermissionError, match=f"{tmp_path.name}: expected a folder to write to"):
        prepare_outputs([tmp_path / "a.png"], overwrite=True)


def test_save_png_is_lossless_and_makes_folders(tmp_path):
    image = np.random.RandomState(0).randint(0, 256, (5, 7, 3), dtype=np.uint8)
    save_png(tmp_path / "new" / "a.png", image)
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "new" / "a.png")), image)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a.png"]


def test_save_png_that_fails_keeps_the_older_file(tmp_path):
    (tmp_path / "a.png").write_bytes(b"old")
    with pytest.raises((TypeError, ValueError)):
        save_png(tmp_path / "a.png", np.zeros((2, 2, 7)))
    assert (tmp_path / "a.png").read_bytes() == b"old"
    assert len(list(tmp_path.iterdir())) == 1


def test_open_video_is_h264_and_gives_the_frames_back(tmp_path):
    frames = smooth_frames(5, 48, 64)
    write_frames(tmp_path / "a.mp4", frames)
    with imageio.get_reader(tmp_path / "a.mp4", format="FFMPEG") as reader:
        described = reader.get_meta_data()
        read = [np.asarray(frame) for frame in reader]
    assert described["codec"] == "h264" and described["fps"] == VIDEO_FPS and described["size"] == (64, 48)
    assert described["pix_fmt"].startswith("yuv420p")  # what every player can show
    assert len(read) == len(frames)
    for frame, original in zip(read, frames):
        # Lossy, and colours are stored at half the resolution in both directions.
        assert np.abs(frame.astype(int) - original).mean() < 4


def test_open_video_writes_the_given_rate(tmp_path):
    write_frames(tmp_path / "a.mp4", smooth_frames(2, 16, 16), fps=24)
    with imageio.get_reader(tmp_path / "a.mp4", format="FFMPEG") as reader:
        assert reader.get_meta_data()["fps"] == 24


def test_open_video_same_frames_give_the_same_bytes(tmp_path):
    frames = smooth_frames(3, 32, 32)
    for name in ("a.mp4", "b.mp4"):
        write_frames(tmp_path / name, frames)
    first, second = ((tmp_path / name).read_bytes() for name in ("a.mp4", "b.mp4"))
    assert first == second
    assert b"Lavf" not in first  # the version of FFmpeg, which another build would not write


@pytest.mark.parametrize(("height", "width"), [(15, 20), (16, 21), (17, 19)])
def test_open_video_odd_sides_are_padded_by_repeating(tmp_path, height, width):
    frames = smooth_frames(2, height, width)
    write_frames(tmp_path / "a.mp4", frames)
    with imageio.get_reader(tmp_path / "a.mp4", format="FFMPEG") as reader:
        read = [np.asarray(frame) for frame in reader]
    assert [frame.shape for frame in read] == [(height + height % 2, width + width % 2, 3)] * 2
    # Lossy: the mean alone is compared, also along the repeated edges.
    assert np.abs(read[0][:height, :width].astype(int) - frames[0]).mean() < 6
    assert np.abs(read[0][-1, :width].astype(int) - frames[0][-1]).mean() < 12


@pytest.mark.parametrize("after_frames", [0, 2])
def test_open_video_failure_leaves_nothing_and_keeps_the_older_file(tmp_path, after_frames):
    frames = smooth_frames(after_frames, 16, 16)
    (tmp_path / "old.mp4").write_bytes(b"old")
    for name in ("new.mp4", "old.mp4"):
        with pytest.raises(KeyboardInterrupt), open_video(tmp_path / name) as video:
            for frame in frames:
                video.append_data(frame)
            raise KeyboardInterrupt
    assert [path.name for path in tmp_path.iterdir()] == ["old.mp4"]
    assert (tmp_path / "old.mp4").read_bytes() == b"old"


def test_open_video_frames_of_different_sizes_raise(tmp_path):
    with pytest.raises(ValueError, match="size"):
        write_frames(tmp_path / "a.mp4", smooth_frames(1, 16, 16) + smooth_frames(1, 32, 32))
    assert not list(tmp_path.iterdir())


def test_open_video_other_suffix_raises(tmp_path):
    with pytest.raises(ValueError, match=r"video: expected a name that ends in \.mp4, got .*a\.avi"):
        write_frames(tmp_path / "a.avi", [])


def test_open_video_with_an_encoder_that_fails_leaves_no_file(tmp_path, monkeypatch):
    encoder = tmp_path / "ffmpeg"
    # The reader of the finished file asks for output to `-`, which is no file to leave in the working directory.
    only_videos = 'case "$last" in *.mp4) cat >/dev/null; printf partial >"$last" ;; esac'
    encoder.write_text(f"#!/bin/sh\nfor last; do :; done\n{only_videos}\nexit 1\n")
    encoder.chmod(0o755)
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(encoder))
    folder = tmp_path / "out"
    with pytest.raises(OSError, match="expected 2 encoded frames"), open_video(folder / "a.mp4") as video:
        for _ in range(2):
            video.append_data(np.zeros((16, 16, 3), np.uint8))
    assert list(folder.iterdir()) == []


def test_prepare_outputs_under_a_file_fails_before_anything_is_computed(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError):
        prepare_outputs([tmp_path / "file" / "a.png"], overwrite=False)
