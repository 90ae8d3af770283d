"""Data sets under their published names."""

import numpy as np
import pytest
import torch

import training.dataset
from camera_utils import mirror_label
from tests.helpers.head_data import SIDE, HeadFiles, head_labels
from training.dataset import CameraLabeledDataset, ImageFolderDataset, MaskLabeledDataset

YAW = [0.0, 90.5, 120.0, -30.0]


@pytest.fixture
def config(tmp_path):
    return HeadFiles(4, YAW).write(tmp_path)


def test_masks_come_between_image_and_label(config):
    dataset = MaskLabeledDataset(img_path=config.images[0], seg_path=config.masks[0], use_labels=True, back_repeat=2)
    image, mask, label = dataset[1]
    assert (image.shape, mask.shape, label.shape) == ((3, SIDE, SIDE), (1, SIDE, SIDE), (25,))
    assert (dataset.image_shape, dataset.label_dim, dataset.has_labels) == ([3, SIDE, SIDE], 25, True)
    shown = [int(dataset[i][0][0, 0, 0]) for i in range(len(dataset))]
    assert shown == [0, 3, 2, 2], "the published formula drops the level view at 90.5 degrees"


def test_folder_of_images_is_not_filtered(config):
    dataset = ImageFolderDataset(config.images[0], use_labels=True)
    assert len(dataset) == 4 and len(dataset[0]) == 2
    assert ImageFolderDataset(config.images[0]).label_dim == 0


def test_label_of_a_flipped_item_is_flipped(config):
    dataset = CameraLabeledDataset(config.images[0], resolution=SIDE, use_labels=True, xflip=True, max_yaw=60)
    expected = mirror_label(torch.from_numpy(head_labels(YAW)[3])).numpy()
    assert np.array_equal(dataset.get_label(3), expected) and np.array_equal(dataset[3][1], expected)


def test_folder_without_images_is_named(tmp_path):
    with pytest.raises(ValueError, match="path: expected images in .*, came none"):
        ImageFolderDataset(str(tmp_path))


def test_other_names_are_no_attributes():
    with pytest.raises(AttributeError, match="no attribute 'Nonsense'"):
        training.dataset.Nonsense  # noqa: B018
