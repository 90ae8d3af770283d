"""The first command: a picture, a video and a mesh of heads from all sides."""

import imageio_ffmpeg
import numpy as np
import pytest
import trimesh
from PIL import Image

from demo import enlarge
from tests.cli.running import contents, fail, succeed

SCRIPT = "demo.py"
FAST = ("--network", "init:debug", "--seeds", "0-1", "--views", 3, "--frames", 4, "--shape-res", 12)
SIDE = 128  # pixels of a view, twice those of init:debug


@pytest.fixture(scope="module")
def outdir(tmp_path_factory):
    """Return a folder that the script has written."""
    folder = tmp_path_factory.mktemp("demo") / "new"
    result = succeed(SCRIPT, *FAST, "--outdir", folder)
    assert "untrained: expect fog" in result.stderr and f"wrote {folder / 'heads.png'}" in result.stdout
    return folder


def test_writes_picture_video_and_mesh_and_nothing_else(outdir):
    assert set(contents(outdir)) == {"heads.png", "orbit.mp4", "head.glb"}
    with Image.open(outdir / "heads.png") as image:
        assert (image.size, image.mode) == ((3 * SIDE, 2 * SIDE), "RGB")
    num_frames, seconds = imageio_ffmpeg.count_frames_and_secs(str(outdir / "orbit.mp4"))
    assert num_frames == 4 and seconds == pytest.approx(4 / 24, abs=0.02)
    mesh = trimesh.load(outdir / "head.glb", force="mesh")
    assert mesh.is_watertight and len(np.unique(mesh.visual.vertex_colors, axis=0)) > 1


def test_rows_are_heads_and_columns_views(outdir):
    picture = np.asarray(Image.open(outdir / "heads.png")).reshape(2, SIDE, 3, SIDE, 3).swapaxes(1, 2)
    assert not np.array_equal(picture[0, 0], picture[1, 0]) and not np.array_equal(picture[0, 0], picture[0, 1])


def test_same_command_writes_the_same_bytes(outdir, tmp_path):
    succeed(SCRIPT, *FAST, "--outdir", tmp_path)
    assert contents(tmp_path) == contents(outdir)


def test_files_that_are_there_are_not_replaced_unless_asked_to(outdir, tmp_path):
    (tmp_path / "orbit.mp4").write_text("mine")
    line = fail(SCRIPT, *FAST, "--outdir", tmp_path)
    assert "orbit.mp4 is there already; give --overwrite" in line
    assert set(contents(tmp_path)) == {"orbit.mp4"}
    succeed(SCRIPT, *FAST, "--outdir", tmp_path, "--overwrite")
    assert contents(tmp_path) == contents(outdir)


@pytest.mark.parametrize(("width", "enlarged"), [(64, 128), (48, 144), (128, 128), (200, 200)])
def test_enlarge_takes_the_smallest_whole_factor(width, enlarged):
    image = np.full((width, width, 3), 7, np.uint8)
    result = enlarge(image)
    assert result.shape == (enlarged, enlarged, 3) and (result == 7).all()
