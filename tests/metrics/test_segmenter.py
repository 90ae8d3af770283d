"""Segmenters learn the masks of the data, or are TorchScript files with masks or logits of classes."""

import pytest
import torch

from metrics.segmenter import MaskTask, load_mask_segmenter, load_segmenter
from metrics.training_examples import Examples
from tests.helpers.toy_views import QUICK, ball, toy_context, toy_dataset


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return toy_dataset(tmp_path_factory.mktemp("data"), 128)


@pytest.fixture(scope="module")
def segmenter(dataset):
    return load_mask_segmenter(toy_context(dataset), QUICK)


def test_masks_are_learnt(segmenter):
    pixels, mask = ball(37.0)
    images = torch.from_numpy(pixels).permute(2, 0, 1)[None]
    found = segmenter(images)
    assert found.shape == (1, 1, 32, 32) and found.dtype == torch.float32 and 0 <= found.min() <= found.max() <= 1
    inside, expected = found[0, 0] > 0.5, torch.from_numpy(mask) > 127
    assert (inside & expected).sum() / (inside | expected).sum() > 0.7
    assert segmenter.info.held_out["iou"] > 0.7 and segmenter.info.held_out["num_images"] == 16
    assert segmenter.info.name == "masks (trained on this data: 112 images)"


def test_masks_have_the_size_of_the_images(segmenter):
    images = torch.from_numpy(ball(37.0)[0]).permute(2, 0, 1)[None].repeat_interleave(3, 2).repeat_interleave(3, 3)
    masks = segmenter(images)
    assert masks.shape == (1, 1, 96, 96)
    small = segmenter(torch.from_numpy(ball(37.0)[0]).permute(2, 0, 1)[None])
    torch.testing.assert_close(masks[..., 1::3, 1::3], small, rtol=0, atol=1e-5)  # bilinear keeps the centres


def test_data_without_masks_are_an_error(tmp_path):
    dataset = toy_dataset(tmp_path, masks=())
    with pytest.raises(ValueError, match="expected masks to learn from, or a segmentation network, got 'none'"):
        load_segmenter(None, toy_context(dataset))


def test_iou_is_counted_over_all_images():
    class Fixed(torch.nn.Module):
        def forward(self, images):
            logits = torch.full((2, 1, 4, 4), -1.0)
            logits[0, :, :2] = 1
            return logits

    masks = torch.zeros(2, 1, 4, 4, dtype=torch.uint8)
    masks[:, :, :1] = 255
    examples = Examples(images=torch.zeros(2, 3, 4, 4, dtype=torch.uint8), directions=torch.zeros(2, 3), masks=masks)
    assert MaskTask().evaluate(Fixed(), examples) == {"iou": 4 / 12}


class Bright(torch.nn.Module):
    """The mask of what is bright."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return [B, 1, H, W]."""
        return (x.mean(1, keepdim=True) > 128).float()


class Classes(torch.nn.Module):
    """Logits of class 15 where it is bright, at half the size, as DeepLab has them."""

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return {"out": [B, 21, H / 2, W / 2]}."""
        person = (torch.nn.functional.avg_pool2d(x.mean(1, keepdim=True), 2) > 0).float()
        logits = torch.zeros(x.shape[0], 21, x.shape[2] // 2, x.shape[3] // 2)
        logits[:, 15:16] = 10 * person - 5
        return {"out": logits}


class Wrong(torch.nn.Module):
    """Numbers that are no masks."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return them."""
        return x[:, :1]


class Rows(torch.nn.Module):
    """Features."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return [B, 3]."""
        return x.mean((2, 3))


def scripted(module, path):
    torch.jit.script(module).save(str(path))
    return str(path)


@pytest.fixture
def half_bright():
    images = torch.zeros(2, 3, 32, 32, dtype=torch.uint8)
    images[0, :, :, :16] = 255
    return images


@pytest.mark.filterwarnings("ignore:.*torch.jit")
@pytest.mark.parametrize(("module", "suffix"), [(Bright(), ""), (Classes(), "?input=imagenet")])
def test_file_gives_masks(dataset, tmp_path, half_bright, module, suffix):
    segmenter = load_segmenter(scripted(module, tmp_path / "s.pt") + suffix, toy_context(dataset))
    masks = segmenter(half_bright)
    assert masks.shape == (2, 1, 32, 32)
    assert (masks[0, 0, :, :15] == 1).all() and (masks[0, 0, :, 17:] == 0).all() and (masks[1] == 0).all()
    assert len(segmenter.info.sha256) == 64 and segmenter.info.name == "s.pt" and len(segmenter.key) == 64


@pytest.mark.filterwarnings("ignore:.*torch.jit")
@pytest.mark.parametrize(
    ("module", "message"), [(Wrong(), "expected numbers from 0 to 1"), (Rows(), r"expected masks \[B, 1, H, W\]|masks")]
)
def test_file_that_gives_no_masks_is_an_error(dataset, tmp_path, module, message):
    with pytest.raises(ValueError, match=message):
        load_segmenter(scripted(module, tmp_path / "s.pt"), toy_context(dataset))


def test_absent_file_is_an_error(dataset):
    with pytest.raises(FileNotFoundError, match="segmenter absent/s.pt: no such file"):
        load_segmenter("absent/s.pt", toy_context(dataset))
