"""Training on the data at hand: how examples are drawn and disturbed, how long it takes, and what is kept."""

import sys

import numpy as np
import pytest
import torch

from metrics import data_training
from metrics.data_training import TrainingPlan, balanced_order, disturb, trained_network
from metrics.registry import NotApplicable
from metrics.training_examples import Examples
from metrics.view_regressor import ViewTask
from tests.helpers.ranks import Launch
from tests.helpers.toy_views import QUICK, toy_context, toy_dataset

TWO_STEPS = TrainingPlan(min_seen=1, max_seen=64)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return toy_dataset(tmp_path_factory.mktemp("data"))


def test_balanced_order_of_equal_weights_has_everything_once():
    order = balanced_order(torch.full((101,), 0.3, dtype=torch.float64), torch.Generator().manual_seed(0))
    assert sorted(order.tolist()) == list(range(101)) and order.tolist() != sorted(order.tolist())


def test_balanced_order_draws_in_proportion():
    weights = torch.tensor([1.0, 1, 4, 0.5, 3.5], dtype=torch.float64).repeat(20)
    counts = torch.bincount(balanced_order(weights, torch.Generator().manual_seed(0)), minlength=100)
    share = weights / weights.mean()
    assert ((counts >= share.floor()) & (counts <= share.ceil())).all() and counts.sum() == 100


def test_disturb_flips_image_mask_and_direction_together():
    images = torch.zeros(256, 3, 32, 32, dtype=torch.uint8)
    images[..., :16] = 200  # bright on the left
    batch = Examples(images=images, directions=torch.tensor([[0.6, 0.0, 0.8]]).repeat(256, 1), masks=images[:, :1])
    moved, floats = disturb(batch, torch.Generator().manual_seed(0))
    flipped = moved.directions[:, 0] < 0
    assert 90 < flipped.sum() < 166  # half, within 4.7 standard deviations
    assert (moved.directions[:, 1:] == batch.directions[:, 1:]).all()
    for layers in (moved.images.float(), moved.masks.float(), floats):
        left_is_brighter = layers[..., 4:12].mean((1, 2, 3)) > layers[..., 20:28].mean((1, 2, 3))
        assert (left_is_brighter == ~flipped).all()
    assert floats.shape == images.shape and floats.dtype == torch.float32


def test_trained_network_is_determined_by_data_and_seed(dataset):
    first = trained_network(ViewTask(TWO_STEPS), toy_context(dataset))
    assert trained_network(ViewTask(TWO_STEPS), toy_context(dataset)).key == first.key
    assert trained_network(ViewTask(TWO_STEPS), toy_context(dataset, seed=1)).key != first.key
    assert first.num_images + first.held_out["num_images"] == len(dataset)
    assert not first.network.training and not any(p.requires_grad for p in first.network.parameters())


def test_training_leaves_the_global_random_state_alone(dataset):
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    trained_network(ViewTask(TWO_STEPS), toy_context(dataset))
    torch.testing.assert_close(torch.rand(4), expected, rtol=0, atol=0)  # the same bits


def test_cache_saves_training(dataset, tmp_path, monkeypatch):
    context = toy_context(dataset, tmp_path)
    first = trained_network(ViewTask(TWO_STEPS), context)
    (path,) = (tmp_path / "detectors").iterdir()
    with monkeypatch.context() as patch:
        patch.setattr(data_training, "train", None)
        again = trained_network(ViewTask(TWO_STEPS), context)
        assert (again.key, again.held_out, again.num_images) == (first.key, first.held_out, first.num_images)
        with pytest.raises(TypeError):  # it would train
            trained_network(ViewTask(TWO_STEPS), toy_context(dataset, tmp_path, seed=1))
    path.write_bytes(path.read_bytes()[:-100])
    assert trained_network(ViewTask(TWO_STEPS), context).key == first.key
    assert len(path.read_bytes()) > 100_000  # written over


def test_cache_of_other_identities_is_not_taken(dataset, tmp_path):
    context = toy_context(dataset, tmp_path)
    trained_network(ViewTask(TWO_STEPS), context)
    dataset.identities = np.arange(len(dataset)) // 2  # in place of what the files say
    try:
        trained_network(ViewTask(TWO_STEPS), context)
    finally:
        del dataset.identities
    assert len(list((tmp_path / "detectors").iterdir())) == 2


def test_cache_that_cannot_be_written_is_a_warning(dataset, tmp_path, capsys):
    (tmp_path / "detectors").touch()  # where a folder should be made
    first = trained_network(ViewTask(TWO_STEPS), toy_context(dataset, tmp_path))
    assert first.key == trained_network(ViewTask(TWO_STEPS), toy_context(dataset)).key
    (line,) = capsys.readouterr().err.splitlines()
    assert "cannot be kept for the next time (File exists); see --cache-dir" in line


def test_too_few_images_are_not_applicable(tmp_path):
    few = toy_dataset(tmp_path, count=63)
    with pytest.raises(NotApplicable, match="detector view needs at least 64 images to train on, and the data have 63"):
        trained_network(ViewTask(TWO_STEPS), toy_context(few))


def test_loss_that_is_not_finite_is_an_error(dataset):
    class Broken(ViewTask):
        def loss(self, network, batch, images):
            return super().loss(network, batch, images) * float("nan")

    with pytest.raises(ValueError, match="expected a finite loss, got nan"):
        trained_network(Broken(TWO_STEPS), toy_context(dataset))


RANKS = """
import sys
from pathlib import Path
from metrics import data_training
from metrics.view_regressor import ViewTask
from tests.helpers.toy_views import toy_context
from tests.metrics.test_data_training import TWO_STEPS
from torch_utils import distributed
from training.dataset import HeadDataset
from training.train_config import DataConfig
if not distributed.is_main():
    data_training.train = None
with distributed.session("cpu"):
    data = HeadDataset(DataConfig(images=(sys.argv[1],), masks=(sys.argv[2],), resolution=32))
    key = data_training.trained_network(ViewTask(TWO_STEPS), toy_context(data)).key
    Path(sys.argv[3], str(distributed.rank())).write_text(key)
"""


@pytest.mark.slow
def test_two_ranks_have_the_network_of_rank_0(dataset, tmp_path):
    command = [sys.executable, "-c", RANKS, dataset.config.images[0], dataset.config.masks[0], str(tmp_path)]
    outcome = Launch(command, environment={"OMP_NUM_THREADS": "1"}).finish(120)
    assert outcome.status == 0, outcome.err
    keys = [path.read_text() for path in tmp_path.iterdir()]
    assert keys == 2 * [trained_network(ViewTask(TWO_STEPS), toy_context(dataset)).key]


def test_plan_bounds_the_time():
    plan = TrainingPlan()
    assert plan.num_steps(64) * 32 == pytest.approx(5_000, abs=32)
    assert plan.num_steps(400) * 32 == pytest.approx(10_000, abs=32)
    assert plan.num_steps(6_000) * 32 == pytest.approx(42_000, abs=32)
    assert QUICK.num_steps(96) == 75
    assert [plan.most_images(side) for side in (64, 512, 1 << 14)] == [8192, 4096, 64]
