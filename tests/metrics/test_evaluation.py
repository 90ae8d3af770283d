"""Sets of images, and random choices that nothing but the seed determines."""

import numpy as np
import pytest
import torch

import camera_utils
from metrics.evaluation import EvaluationSettings, frontal_label
from metrics.registry import NotApplicable
from metrics.requests import BACK, FRONT, ImageSet, YawRange, yaw_bins
from tests.helpers.stand_ins import RayTracedGenerator
from tests.helpers.tiny_evaluations import tiny_evaluation


@pytest.fixture
def evaluation(tmp_path):
    return tiny_evaluation(tmp_path / "data", RayTracedGenerator(8), count=24)


def test_yaw_bins_cover_every_yaw_once():
    yaw = np.array([-180.0, -90.0, -0.1, 0.0, 44.9, 45.0, 179.9, 180.0])
    inside = np.array([bin_.contains(yaw) for bin_ in yaw_bins(8)])
    assert inside.sum(axis=0).tolist() == [1] * 8
    assert yaw_bins(3)[1] == YawRange(low_deg=-60, high_deg=60)


def test_front_and_back_part_at_90_degrees_of_either_side():
    yaw = np.array([-180.0, -90.0, -89.0, 89.0, 90.0, 180.0])
    assert FRONT.contains(yaw).tolist() == [False, False, True, True, False, False]
    assert (FRONT.contains(yaw) ^ BACK.contains(yaw)).all()


@pytest.mark.parametrize("low, high, absolute", [(10, 10, False), (-10, 10, True), (-190, 0, False), (0, 190, True)])
def test_yaw_range_that_is_none_is_an_error(low, high, absolute):
    with pytest.raises(ValueError, match="yaw range: expected"):
        YawRange(low_deg=low, high_deg=high, absolute=absolute)


def test_items_are_those_in_the_range_in_an_order_of_the_seed(evaluation, tmp_path):
    front = evaluation.items(evaluation.real(yaw=FRONT))
    assert sorted(front) == np.flatnonzero(np.abs(evaluation.yaw_deg) < 90).tolist() and list(front) != sorted(front)
    assert evaluation.items(evaluation.real(3, FRONT)).tolist() == front[:3].tolist()
    assert evaluation.num_real(FRONT) == len(front) == 12
    other = tiny_evaluation(tmp_path / "data", count=24, seed=1)
    assert other.items(other.real()).tolist() != evaluation.items(evaluation.real()).tolist()


def test_latent_depends_on_seed_and_index_alone(evaluation, tmp_path):
    together, alone = evaluation.latents(np.arange(4)), evaluation.latents(np.array([3]))
    torch.testing.assert_close(together[3:], alone, rtol=0, atol=0)  # the same bits
    assert together.shape == (4, 8) and together.unique(dim=0).shape[0] == 4
    other = tiny_evaluation(tmp_path / "data", RayTracedGenerator(8), count=24, seed=1)
    assert not other.latents(np.arange(4)).eq(together).any()


def test_cameras_of_a_longer_set_begin_with_those_of_a_shorter_one(evaluation):
    for cameras in ("matched", "random", "frontal"):
        short = evaluation.cameras(evaluation.generated(5, cameras))
        long = evaluation.cameras(evaluation.generated(50, cameras))
        for few, many in zip(short, long):
            assert few.shape == (5, 25) and (many[:5] == few).all()


def test_cameras_are_those_of_real_images_in_the_range(evaluation):
    behind = evaluation.generated(200, yaw=BACK)
    conditions, rendering = evaluation.cameras(behind)
    assert conditions is rendering
    yaw = camera_utils.yaw_pitch_roll_deg(torch.from_numpy(rendering))[:, 0]
    assert (yaw.abs() >= 90).all() and len(np.unique(rendering, axis=0)) == 12


def test_random_cameras_condition_independently_of_what_renders(evaluation):
    conditions, rendering = evaluation.cameras(evaluation.generated(2000, "random", BACK))
    yaw = [camera_utils.yaw_pitch_roll_deg(torch.from_numpy(c))[:, 0] for c in (conditions, rendering)]
    assert (yaw[1].abs() >= 90).all()
    assert 0.4 < (yaw[0].abs() < 90).float().mean() < 0.6  # 12 of 24 images: a share of 0.5, standard deviation 0.011
    same_rendering = evaluation.cameras(evaluation.generated(2000, "matched", BACK))[1]
    assert (rendering == same_rendering).all()  # so that the two differ in the conditions alone


def test_frontal_label_is_that_of_published_scripts():
    label = frontal_label()
    pose, intrinsics = camera_utils.split_label(label)
    assert label.shape == (1, 25) and intrinsics[0, 0, 0] == pytest.approx(4.2647)
    assert pose[0, :3, 3].norm() == pytest.approx(2.7)
    assert camera_utils.yaw_pitch_roll_deg(label)[0].abs().max() < 0.1  # 3.14 for pi: 0.05 degrees


def test_modes_are_those_of_the_published_command(tmp_path):
    for mode, yaw, cameras in (("all", None, "matched"), ("front", FRONT, "matched"), ("back", BACK, "frontal")):
        evaluation = tiny_evaluation(tmp_path / mode, mode=mode)
        assert evaluation.real() == ImageSet(kind="real", yaw=yaw)
        assert evaluation.generated(5) == ImageSet(kind="generated", num_images=5, yaw=yaw, cameras=cameras)
        assert evaluation.generated(5, yaw=FRONT).cameras == "matched"  # metrics with a range of their own


def test_batches_do_not_depend_on_what_is_on_which_rank(tmp_path, monkeypatch):
    evaluation = tiny_evaluation(tmp_path, batch_size=4)
    everything = [batch.tolist() for batch in evaluation.batches(11, "")]
    assert everything == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10]]
    monkeypatch.setattr("torch_utils.distributed.world_size", lambda: 2)
    shares = []
    for rank in range(2):
        monkeypatch.setattr("torch_utils.distributed.rank", lambda rank=rank: rank)
        shares.append([batch.tolist() for batch in evaluation.batches(11, "")])
    assert shares == [everything[::2], everything[1::2]]


def test_gather_orders_rows_by_their_index(evaluation):
    rows = evaluation.gather(np.array([4, 0, 2]), torch.tensor([[4.0, 40.0], [0.0, 1.0], [2.0, 20.0]]))
    assert rows.tolist() == [[0, 1], [2, 20], [4, 40]]


def test_noise_generator_is_a_function_of_its_numbers(evaluation):
    draw = [torch.randn(3, generator=evaluation.noise_generator(*parts)) for parts in ((1, 2), (1, 2), (2, 1))]
    assert draw[0].equal(draw[1]) and not draw[0].equal(draw[2])


def test_data_of_another_resolution_are_refused(tmp_path):
    with pytest.raises(ValueError, match="data: expected images of 16 px, as the network makes, got .*8 px in"):
        tiny_evaluation(tmp_path, RayTracedGenerator(16))


def test_data_without_cameras_are_refused(tmp_path):
    with pytest.raises(ValueError, match="data: expected cameras of the images"):
        tiny_evaluation(tmp_path, data={"conditional": False})


def test_range_without_real_images_is_not_applicable(tmp_path):
    evaluation = tiny_evaluation(tmp_path, RayTracedGenerator(8), count=3, yaw_deg=[0.0, 10.0, 20.0])
    with pytest.raises(NotApplicable, match="no images with an absolute yaw of 90 to 180 degrees"):
        evaluation.cameras(evaluation.generated(5, yaw=BACK))


@pytest.mark.parametrize(
    "field, value",
    [
        ("seed", -1),
        ("batch_size", 0),
        ("truncation_psi", float("nan")),
        ("mode", "side"),
        ("num_yaw_bins", 1),
        ("detector", " "),
    ],
)
def test_settings_that_mean_nothing_are_errors(field, value):
    with pytest.raises(ValueError, match="expected"):
        EvaluationSettings(**{field: value})
