"""Videos are rendered frame by frame, each frame from the camera and the latent of its time."""

import gc
import math
import weakref
from contextlib import contextmanager

import imageio
import numpy as np
import pytest
import torch

import camera_utils
import inference.video
from inference import Head, Noise, Truncation
from inference.interpolation import LatentLoop
from inference.sampling import seed_ws, to_uint8
from inference.shapes import ShapeSettings
from inference.video import CAMERA_PATHS, FrameShapes, VideoSettings, path_labels, render_frames, write_video


@pytest.fixture(scope="module")
def ws(generator) -> torch.Tensor:
    """W-layers `[4, L, 512]` of four seeds."""
    return seed_ws(generator, range(4), Truncation())


@pytest.fixture
def rendered(monkeypatch):
    """Count renderings, without computing them: every image is black but for the number of the rendering."""
    calls = []

    def render(self, label, view=0, neural_rendering_resolution=None):
        calls.append((self, label, view, neural_rendering_resolution))
        return {"image": torch.full((1, 3, 6, 4), len(calls) / 100)}

    monkeypatch.setattr(Head, "render", render)
    return calls


def yaw_and_pitch_deg(labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    yaw, pitch, _ = camera_utils.yaw_pitch_roll_deg(labels).T
    return yaw, pitch


# Cameras.


def test_path_labels_head_turns_once_and_swings(generator):
    yaw, pitch = yaw_and_pitch_deg(path_labels(generator, 8, VideoSettings(camera_path="Head")))
    # Degrees of float32 poses.
    torch.testing.assert_close(yaw % 360, torch.arange(8) * 45.0, rtol=0, atol=1e-3)
    swing = [math.pi / 2 - 0.05 + 0.5 * math.sin(2 * math.pi * frame / 8) for frame in range(8)]
    expected = torch.tensor([math.degrees(camera_utils.pitch_from_vertical(v)) for v in swing])
    torch.testing.assert_close(pitch, expected, rtol=0, atol=1e-3)


def test_path_labels_fixed_head_camera_stays_in_front(generator):
    labels = path_labels(generator, 5, VideoSettings(camera_path="Head", fixed_camera=True))
    assert labels.shape == (5, 25)
    assert (labels == labels[0]).all()
    yaw, pitch = yaw_and_pitch_deg(labels)
    assert yaw[0].item() == pytest.approx(0, abs=1e-3)
    assert pitch[0].item() == pytest.approx(
        math.degrees(camera_utils.pitch_from_vertical(math.pi / 2 - 0.05)), abs=1e-3
    )


@pytest.mark.parametrize(
    ("camera_path", "target"),
    [("FFHQ", (0, 0, 0.2)), ("Cats", (0, 0, 0)), ("AFHQ", (0, 0, 0)), ("Shapenet", (0, 0, 0))],
)
@pytest.mark.parametrize("fixed", [False, True])
def test_path_labels_others_swing_by_the_published_amounts_about_a_target(generator, camera_path, target, fixed):
    settings = VideoSettings(camera_path=camera_path, fixed_camera=fixed)
    poses, _ = camera_utils.split_label(path_labels(generator, 4, settings))
    yaw_rad = torch.tensor([0, 1.5, 0, -1.5])
    vertical = math.pi / 2 - 0.05 + 0.25 * torch.tensor([1.0, 0, -1, 0])
    expected = camera_utils.look_at_pose(yaw_rad, camera_utils.pitch_from_vertical(vertical), 2.7, target)
    torch.testing.assert_close(poses, expected, rtol=0, atol=1e-5)  # float32 poses


def test_path_labels_eg3d_swings_less_and_about_its_pivot(frontal_generator):
    poses, _ = camera_utils.split_label(path_labels(frontal_generator, 4, VideoSettings(camera_path="AFHQ")))
    yaw_rad = torch.tensor([0, 0.35, 0, -0.35])
    vertical = math.pi / 2 - 0.05 + 0.25 * torch.tensor([1.0, 0, -1, 0])
    expected = camera_utils.look_at_pose(yaw_rad, camera_utils.pitch_from_vertical(vertical), 2.7, (0, 0, 0.2))
    torch.testing.assert_close(poses, expected, rtol=0, atol=1e-5)  # float32 poses


@pytest.mark.parametrize(("camera_path", "focal"), [("Head", 4.2627), ("FFHQ", 4.2627), ("Shapenet", 1.7074)])
def test_path_labels_focal_length_is_that_of_the_data_set_or_as_asked(generator, camera_path, focal):
    by_default = path_labels(generator, 2, VideoSettings(camera_path=camera_path))
    assert by_default[:, 16].tolist() == pytest.approx([focal] * 2, abs=1e-4)
    asked = path_labels(generator, 2, VideoSettings(camera_path=camera_path, fov_deg=40.0))
    assert asked[:, 16].tolist() == pytest.approx([camera_utils.focal_from_fov(40.0)] * 2)


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("camera_path", "Dogs", "camera path: expected one of FFHQ, Cats, Head, AFHQ, Shapenet, got 'Dogs'"),
        ("frames_per_keyframe", 0, "frames per keyframe: expected at least 1, got 0"),
    ],
)
def test_video_settings_out_of_range_raise_and_name_the_field(field, value, expected):
    with pytest.raises(ValueError, match=expected):
        VideoSettings(**{field: value})


def test_camera_paths_begin_with_the_published_default():
    assert CAMERA_PATHS[0] == "FFHQ"


# Frames.


def test_render_frames_are_the_views_of_the_latent_at_their_time(generator, ws):
    settings = VideoSettings(camera_path="Head", frames_per_keyframe=2, image_mode="image_raw", noise=Noise(seed=3))
    frames = [frame for frame, _ in render_frames(generator, ws[None, :2], settings)]
    labels, loop = path_labels(generator, 4, settings), LatentLoop(ws[:2])
    assert len(frames) == 4
    for number in (1, 2):
        head = Head(generator, loop(number / 4), Noise(seed=3))
        np.testing.assert_array_equal(frames[number], to_uint8(head.render(labels[number]), "image_raw")[0])


@pytest.mark.parametrize("turns", [1.0, 0.5])
def test_render_frames_cover_the_given_share_of_the_loop(generator, ws, rendered, turns):
    settings = VideoSettings(frames_per_keyframe=4, turns=turns)
    list(render_frames(generator, ws[None, :3], settings))
    loop = LatentLoop(ws[:3])
    for number, (head, _, view, _) in enumerate(rendered):
        assert torch.equal(head.ws[0], loop(turns * number / 12)) and view == number


def test_render_frames_grid_cells_stand_row_by_row(generator, ws, rendered):
    settings = VideoSettings(frames_per_keyframe=1, grid=(3, 2))
    cells = ws[:1].repeat(6, 1, 1)[:, None]  # [6, 1, L, 512]
    ((frame, heads),) = render_frames(generator, cells, settings)
    assert frame.shape == (12, 12, 3) and len(heads) == 6
    expected = [[int((number / 100) * 127.5 + 128) for number in row] for row in ([1, 2, 3], [4, 5, 6])]
    assert frame[::6, ::4, 0].tolist() == expected


def test_render_frames_wrong_number_of_cells_raises(generator, ws):
    with pytest.raises(ValueError, match="keyframes: expected 6 cells for the grid, got 4"):
        next(render_frames(generator, ws[:, None], VideoSettings(grid=(3, 2))))


def test_render_frames_a_head_that_does_not_change_keeps_its_planes(generator, ws):
    calls = []
    handle = generator.backbone.synthesis.register_forward_hook(lambda *_: calls.append(1))
    settings = VideoSettings(frames_per_keyframe=3, image_mode="image_raw")
    heads = [heads[0] for _, heads in render_frames(generator, ws[None, :1], settings)]
    handle.remove()
    assert len(calls) == 1
    assert heads[0] is heads[1] is heads[2]


def test_render_frames_are_rendered_when_they_are_asked_for_and_not_kept(generator, ws, rendered):
    frames = render_frames(generator, ws[None, :2], VideoSettings(frames_per_keyframe=10**4))
    assert not rendered
    earlier = []
    for _ in range(3):
        frame, _ = next(frames)
        earlier.append(weakref.ref(frame))
    assert len(rendered) == 3
    frame = None
    gc.collect()
    assert [reference() for reference in earlier[:2]] == [None, None]


def test_render_frames_pass_the_neural_resolution_and_the_view_on(generator, ws, rendered):
    list(render_frames(generator, ws[None, :1], VideoSettings(frames_per_keyframe=2, neural_rendering_resolution=24)))
    assert [(view, resolution) for _, _, view, resolution in rendered] == [(0, 24), (1, 24)]


# Files.


def test_write_video_stores_every_frame_before_the_next_is_rendered(generator, ws, rendered, tmp_path, monkeypatch):
    stored = []

    @contextmanager
    def open_video(path, fps):
        class Writer:
            def append_data(self, frame):
                stored.append(len(rendered))

        yield Writer()

    monkeypatch.setattr(inference.video, "open_video", open_video)
    settings = VideoSettings(frames_per_keyframe=3)
    write_video(tmp_path / "a.mp4", generator, ws[None, :2], settings, progress=False)
    assert stored == [1, 2, 3, 4, 5, 6]


def test_write_video_has_the_frames_the_size_and_the_rate(generator, ws, rendered, tmp_path):
    settings = VideoSettings(frames_per_keyframe=2, grid=(2, 1), fps=30)
    write_video(tmp_path / "a.mp4", generator, ws[:, None][:2], settings, progress=False)
    with imageio.get_reader(tmp_path / "a.mp4", format="FFMPEG") as reader:
        assert reader.get_meta_data()["size"] == (8, 6) and reader.get_meta_data()["fps"] == 30
        assert sum(1 for _ in reader) == 2


def test_write_video_that_breaks_off_leaves_nothing(generator, ws, rendered, tmp_path, monkeypatch):
    counted = Head.render

    def break_off(self, *args):
        if len(rendered) == 2:
            raise RuntimeError("broken")
        return counted(self, *args)

    monkeypatch.setattr(Head, "render", break_off)
    with pytest.raises(RuntimeError, match="broken"):
        write_video(tmp_path / "a.mp4", generator, ws[None, :1], VideoSettings(frames_per_keyframe=5), progress=False)
    assert not list(tmp_path.iterdir())


def test_write_video_shapes_accompany_the_frames_that_change(generator, ws, rendered, tmp_path):
    shapes = FrameShapes(folder=tmp_path / "shapes", suffix="obj", settings=ShapeSettings(resolution=8))
    still, moving = VideoSettings(frames_per_keyframe=3), VideoSettings(frames_per_keyframe=1, camera_path="Head")
    write_video(tmp_path / "still.mp4", generator, ws[None, :1], still, shapes, progress=False)
    assert sorted(path.name for path in shapes.folder.iterdir()) == ["0000_shape.obj", "trajectory.npy"]
    write_video(tmp_path / "moving.mp4", generator, ws[None, :2], moving, shapes, progress=False)
    names = ["0000_shape.obj", "0001_shape.obj", "trajectory.npy"]
    assert sorted(path.name for path in shapes.folder.iterdir()) == names
    poses, _ = camera_utils.split_label(path_labels(generator, 2, moving))
    np.testing.assert_array_equal(np.load(shapes.trajectory), poses.numpy())


def test_write_video_a_level_that_had_to_change_is_kept_for_all_shapes(generator, ws, rendered, tmp_path, monkeypatch):
    """A surface that takes another level in every frame would pulsate."""
    wanted = []

    def save_shape(path, head, settings):
        wanted.append(settings.level)
        return 3.5 if settings.level == 10 else settings.level

    monkeypatch.setattr(inference.video, "save_shape", save_shape)
    shapes = FrameShapes(folder=tmp_path, settings=ShapeSettings(resolution=8))
    settings = VideoSettings(frames_per_keyframe=1)
    write_video(tmp_path / "a.mp4", generator, ws[None, :3], settings, shapes, progress=False)
    assert wanted == [10, 3.5, 3.5]
