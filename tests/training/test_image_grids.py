"""Grids show the same heads from the same views at every tick, and leave everything else as it was."""

import copy
import math

import numpy as np
import pytest
import torch
from PIL import Image

from camera_utils import camera_label, intrinsics_from_focal, look_at_pose, yaw_pitch_roll_deg
from tests.helpers.tiny import tiny_network
from training.image_grids import GridSpec, make_grid, render_cells, save_fakes, save_reals
from training.networks_stylegan2 import SynthesisOptions

GRID = GridSpec(seeds=(3, 0, 1), yaws_deg=(0.0, 180.0))


@pytest.fixture(scope="module")
def generator():
    return tiny_network(parsing_classes=20)


@pytest.fixture(scope="module")
def cells(generator):
    return render_cells(generator, GRID)


def picture(path):
    return np.asarray(Image.open(path))


# What the generator makes.


def test_render_cells_has_every_kind_for_every_head_and_view(cells):
    assert list(cells) == ["image", "raw", "depth", "mask", "parsing"]
    assert {kind: len(images) for kind, images in cells.items()} == dict.fromkeys(cells, 6)
    assert {image.shape for image in cells["image"]} == {(128, 128, 3)}
    assert {image.shape for kind in ("raw", "depth", "mask", "parsing") for image in cells[kind]} == {(8, 8, 3)}


@torch.no_grad()
def test_render_cells_are_those_of_the_seed_and_the_view(generator, cells):
    z = torch.from_numpy(np.random.RandomState(1).randn(1, generator.z_dim)).float()
    frontal, back = (camera_label(look_at_pose(yaw), intrinsics_from_focal(4.2647)) for yaw in (0.0, math.pi))
    ws = generator.mapping(z, frontal)
    random = torch.Generator().manual_seed(0)
    field = generator.radiance_field(ws, options=SynthesisOptions(noise_mode="const", generator=random))
    expected = (generator.render(field, back)["image"][0] * 127.5 + 128).clamp(0, 255).permute(1, 2, 0).numpy()
    ours = cells["image"][2 * GRID.seeds.index(1) + 1].astype(np.float32)
    np.testing.assert_array_equal(ours, np.floor(expected))


def test_render_cells_repeats_itself_and_leaves_random_numbers_and_modes_alone(generator, cells):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    generator.train()
    try:
        again = render_cells(generator, GRID)
        assert generator.training and all(module.training for module in generator.modules())
    finally:
        generator.eval()
    assert torch.equal(torch.get_rng_state(), before)
    assert all(np.array_equal(a, b) for kind in cells for a, b in zip(cells[kind], again[kind]))
    assert not generator.training


def test_render_cells_does_not_depend_on_which_others_there_are(generator, cells):
    alone = render_cells(generator, GridSpec(seeds=(0,), yaws_deg=(180.0,)))
    assert all(np.array_equal(alone[kind][0], cells[kind][3]) for kind in cells)


def test_depth_has_the_same_scale_in_all_cells(generator, monkeypatch):
    def render(field, labels):
        depth = torch.full((len(labels), 1, 2, 2), 2.25)
        depth[:, :, 0] = 2.7 if labels[0, 11] > 0 else 3.3  # from the front; from behind
        return {"image": torch.zeros(len(labels), 3, 2, 2), "image_depth": depth}

    monkeypatch.setattr(generator, "render", render)
    front, back = render_cells(generator, GRID)["depth"][:2]
    assert front[:, 0, 0].tolist() == [146, 255] and back[:, 0, 0].tolist() == [0, 255]


def test_depth_scale_of_automatic_ray_limits_is_the_ball_around_the_box():
    generator = tiny_network(ray_start="auto", ray_end="auto")
    (depth,) = render_cells(generator, GridSpec(seeds=(0,), yaws_deg=(0.0,)))["depth"]
    assert 0 < depth.min() and depth.max() < 255  # all rays end within it


def test_save_fakes_writes_a_file_for_each_kind_and_an_overview(generator, cells, tmp_path):
    paths = save_fakes(tmp_path / "run", generator, 1_234_567, GRID)
    assert {kind: path.name for kind, path in paths.items()} == {
        "image": "fakes001234.png",
        **{kind: f"fakes001234_{kind}.png" for kind in ("raw", "depth", "mask", "parsing", "overview")},
    }
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == sorted(path.name for path in paths.values())
    image = picture(paths["image"])
    assert image.shape == (3 * 128, 2 * 128, 3)
    np.testing.assert_array_equal(image[128:256, 128:], cells["image"][3])  # second row, second column
    assert picture(paths["overview"]).shape == (2 * 5 * 128, 2 * 128, 3)
    np.testing.assert_array_equal(picture(paths["overview"])[4 * 128 : 5 * 128 : 16, 8:128:16], cells["parsing"][0])


def test_save_fakes_shows_that_weights_changed_and_nothing_else(generator, cells):
    changed = copy.deepcopy(generator)
    with torch.no_grad():
        changed.torgb.bias += 0.5
    other = render_cells(changed, GRID)
    assert all(np.array_equal(a, b) for a, b in zip(other["depth"], cells["depth"]))
    assert not np.array_equal(other["raw"][0], cells["raw"][0])


def test_labels_are_the_views_of_the_columns():
    grid = GridSpec(yaws_deg=(0.0, 90.0, 180.0, -90.0), pitch_deg=10.0, radius=3.0, focal=4.0)
    labels = grid.labels()
    angles = yaw_pitch_roll_deg(labels)
    torch.testing.assert_close(angles[:, 0].abs(), torch.tensor([0.0, 90.0, 180.0, 90.0]), rtol=0, atol=1e-3)  # float32
    assert angles[1, 0] > 0 > angles[3, 0]
    torch.testing.assert_close(angles[:, 1], torch.full((4,), 10.0), rtol=0, atol=1e-3)  # float32
    assert labels[0, 16] == 4.0 and torch.linalg.vector_norm(labels[0, [3, 7, 11]]) == pytest.approx(3.0)
    assert yaw_pitch_roll_deg(grid.conditioning_label())[0].abs().max() < 1e-3


@pytest.mark.parametrize(("field", "value"), [("seeds", ()), ("yaws_deg", ())])
def test_grid_without_cells_raises(field, value):
    with pytest.raises(ValueError, match=f"grid.{field}: expected at least"):
        GridSpec(**{field: value})


@pytest.mark.parametrize(
    ("resolution", "device", "heads"),
    [(64, "cpu", 4), (256, "cpu", 3), (512, "cpu", 2), (128, "cuda", 8), (512, "cuda", 4)],
)
def test_make_grid_shows_fewer_heads_where_they_take_longer(resolution, device, heads):
    assert len(make_grid(resolution, device).seeds) == heads


def test_make_grid_takes_the_cameras_of_the_data():
    labels = camera_label(look_at_pose(torch.arange(5.0), 0.3, 4.0), intrinsics_from_focal(2.5)).numpy()
    grid = make_grid(128, labels=labels)
    assert (grid.radius, grid.focal) == (pytest.approx(4.0), 2.5)
    assert make_grid(128, labels=np.zeros((3, 25))) == make_grid(128)


# Real images.


class Dataset:
    """Images whose value is their index, taken all around in a shuffled order; item 4 cannot be read."""

    def __init__(self, count=40, broken=(4,), **extras):
        yaw_rad = torch.from_numpy(np.random.RandomState(0).permutation(count) / count * 2 * math.pi - math.pi + 0.01)
        self.labels = camera_label(look_at_pose(yaw_rad), intrinsics_from_focal(4.0)).numpy()
        self.broken, self.extras = broken, extras

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        if index in self.broken:
            raise ValueError("broken")
        item = {"image": np.full((3, 2, 2), index, np.uint8), "label": self.labels[index], "index": index}
        return {**item, **{name: np.full((1, 2, 2), value, np.uint8) for name, value in self.extras.items()}}


def test_save_reals_shows_images_in_order_of_yaw(tmp_path):
    dataset = Dataset(broken=())
    assert list(save_reals(tmp_path, dataset, GridSpec(seeds=(0, 1)))) == ["image"]
    shown = picture(tmp_path / "reals.png")[::2, ::2, 0].reshape(-1)
    assert shown.shape == (12,)
    yaw_deg = yaw_pitch_roll_deg(torch.from_numpy(dataset.labels))[:, 0].numpy()[shown]
    assert np.all(np.diff(yaw_deg) > 0) and yaw_deg[0] < -170 and yaw_deg[-1] > 165


def test_save_reals_with_masks_and_parsing_writes_them_too(tmp_path):
    paths = save_reals(
        tmp_path, Dataset(3, (), mask=255, parsing=1), GridSpec(seeds=(0,), yaws_deg=(0.0, 1.0, 2.0, 3.0))
    )
    assert {kind: path.name for kind, path in paths.items()} == {
        "image": "reals.png",
        "mask": "reals_mask.png",
        "parsing": "reals_parsing.png",
    }
    assert picture(paths["mask"])[0, :, 0].tolist() == [255] * 6 + [0] * 2
    assert picture(paths["parsing"])[0, 0].tolist() == [0xD9, 0xA0, 0x66]


def test_save_reals_leaves_out_what_cannot_be_read(tmp_path):
    save_reals(tmp_path, Dataset(6), GridSpec(seeds=(0,)))
    assert sorted(picture(tmp_path / "reals.png")[0, ::2, 0].tolist()) == [0, 0, 1, 2, 3, 5]  # the last place is black
    with pytest.raises(ValueError, match="images for a grid: expected at least one that can be read"):
        save_reals(tmp_path, Dataset(3, (0, 1, 2)), GridSpec(seeds=(0,)))


def test_save_reals_without_camera_labels_spreads_over_the_data_set(tmp_path):
    dataset = Dataset(12, ())
    dataset.labels = np.zeros_like(dataset.labels)
    save_reals(tmp_path, dataset, GridSpec(seeds=(0,), yaws_deg=(0.0, 1.0, 2.0)))
    assert picture(tmp_path / "reals.png")[0, ::2, 0].tolist() == [0, 6, 11]
