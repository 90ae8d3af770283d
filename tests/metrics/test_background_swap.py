"""Background swap: heads that are painted on the background are caught, heads of their own are not."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from metrics import background_swap
from metrics.detector_interface import DetectorInfo
from metrics.registry import NotApplicable, parse_metric
from tests.helpers.stand_ins import RayTracedGenerator
from tests.helpers.tiny import latents, tiny_network
from tests.helpers.tiny_evaluations import tiny_evaluation


class Painter(RayTracedGenerator):
    """A head that is red, half of the picture, before a background whose blue is its latent.

    With `leak`, backgrounds of latents above 0 paint the rest of the picture red too.
    """

    def __init__(self, leak=False):
        super().__init__(8)
        self.leak = leak
        self.conditions, self.psi = [], []

    def mapping(self, z, c, truncation_psi=1.0, truncation_cutoff=None, update_emas=False):
        self.conditions.append(c)
        self.psi.append((truncation_psi, truncation_cutoff))
        return z[:, None]

    def radiance_field(self, ws, ws_bcg=None, options=None):
        return SimpleNamespace(background=(ws if ws_bcg is None else ws_bcg)[:, 0, 0], options=options)

    def render(self, field, c, neural_rendering_resolution=None):
        image = -torch.ones(len(c), 3, 8, 8)
        image[:, 0, :, :4] = 1
        image[:, 2] = torch.tanh(field.background)[:, None, None]
        if self.leak:
            image[:, 0, :, 4:] = torch.where(field.background > 0, 1.0, -1.0)[:, None, None]
        return {"image": image}


class RedIsHead:
    """The segmentation that finds red."""

    info = DetectorInfo(name="red", resize="none", sha256=None, source="tests")

    def __call__(self, images):
        assert images.dtype == torch.uint8
        return (images[:, :1] > 127).float()


@pytest.fixture(autouse=True)
def _segment_by_red(monkeypatch):
    monkeypatch.setattr(background_swap, "load_segmenter", lambda spec, context: RedIsHead())


def computed(folder, generator, num=16, **settings):
    return parse_metric(f"background_swap{num}").compute(tiny_evaluation(folder, generator, **settings), {})


def test_compute_of_a_head_of_its_own_finds_no_difference(tmp_path):
    found = computed(tmp_path, Painter())
    assert dict(found.values) == {"background_swap16": 0.0, "mask_share": 0.5}
    assert found.details["num_pairs"] == 16 and found.details["segmenter"]["name"] == "red"


def test_compute_of_a_leaking_background_finds_the_share_of_pixels_that_change(tmp_path):
    evaluation = tiny_evaluation(tmp_path, Painter(leak=True))
    painted = evaluation.latents(np.arange(32))[:, 0] > 0
    expected = (painted[:16] != painted[16:]).float().mean().item() / 2  # half of the picture
    found = parse_metric("background_swap16").compute(evaluation, {})
    assert 0 < expected == pytest.approx(found.values["background_swap16"])


def test_compute_conditions_on_the_frontal_camera_and_truncates_as_published(tmp_path):
    generator = Painter()
    computed(tmp_path, generator, num=2, truncation_psi=1.0, truncation_cutoff=3)
    assert set(generator.psi) == {(0.7, None)}
    position = torch.cat(generator.conditions)[:, [3, 7, 11]]
    # The published pi/2 is 1.57.
    torch.testing.assert_close(position, torch.tensor([[0.0, 0.0, 2.7]]).expand(4, 3), atol=5e-3, rtol=0)


def test_compute_without_background_network_is_not_applicable(tmp_path):
    generator = Painter()
    generator.config.background = False
    with pytest.raises(NotApplicable, match="background_swap16: the network has no background network"):
        computed(tmp_path, generator)


def test_compute_without_masks_takes_a_given_segmenter_or_is_not_applicable(tmp_path):
    data = {"masks": (), "parsing": (), "parsing_classes": 0}
    with pytest.raises(NotApplicable, match="background_swap2: the data have no masks"):
        computed(tmp_path / "none", Painter(), num=2, data=data)
    assert computed(tmp_path / "given", Painter(), num=2, data=data, segmenter="red.pt").values["mask_share"] == 0.5


def test_compute_of_a_broken_network_is_an_error_and_not_perfect(tmp_path):
    class Broken(Painter):
        def render(self, *args, **kwargs):
            out = super().render(*args, **kwargs)
            return {**out, "image": out["image"] * float("nan")}

    with pytest.raises(ValueError, match="expected finite pixel values, came NaN or infinity in sample 0 of seed 0"):
        computed(tmp_path, Broken(), num=2)


def test_swap_backgrounds_of_a_network_changes_the_picture_but_not_its_opacity(tmp_path):
    network = tiny_network("dual_spherical", img_resolution=128)
    evaluation = tiny_evaluation(tmp_path, network, count=4, side=128)
    seen = []

    def segment(images):
        seen.append(images)
        return images[:, :1].float() / 255

    numbers = background_swap.swap_backgrounds(evaluation, segment, np.arange(1), np.arange(1, 2))
    assert numbers.shape == (1, 2) and numbers[0, 0] > 0
    assert not seen[0].equal(seen[1])
    label = background_swap.frontal_label()
    ws, other = (network.mapping(latents(1, seed=seed), label) for seed in (0, 1))
    with torch.no_grad():
        masks = []
        for background in (None, other):
            options = background_swap.SynthesisOptions(noise_mode="const", generator=torch.Generator().manual_seed(0))
            masks.append(network.render(network.radiance_field(ws, background, options), label)["image_mask"])
    assert masks[0].equal(masks[1])
