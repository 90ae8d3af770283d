"""Every super-resolution variant has the published size, names and parameters, and resizes what does not fit."""

from __future__ import annotations

import pytest
import torch

from tests.helpers.published import fill_weights
from training.config import SuperresolutionConfig
from training.networks_stylegan2 import SynthesisOptions
from training.superresolution import VARIANTS, Superresolution, resize_bilinear

SILENT = SynthesisOptions(noise_mode="none")
# Variant -> input and output size, channels and upsampling of the first block, channels of the second, parameters,
# and whether there is a filter buffer, as published.
PUBLISHED = {
    "SuperresolutionHybrid8XDC": (128, 512, 256, 2, 128, 1_649_578, False),
    "SuperresolutionHybrid8X": (128, 512, 128, 2, 64, 574_954, True),
    "SuperresolutionHybrid4X": (128, 256, 128, 1, 64, 574_954, True),
    "SuperresolutionHybrid2X": (64, 128, 128, 1, 64, 574_954, True),
    "SuperresolutionHybridDeepfp32": (128, 256, 128, 1, 64, 574_954, True),
}


def build(variant: str, **config) -> Superresolution:
    module = Superresolution(VARIANTS[variant].output_resolution, SuperresolutionConfig(variant=variant, **config))
    fill_weights(module)
    return module.eval()


@pytest.fixture(scope="module")
def double_size() -> Superresolution:
    return build("SuperresolutionHybrid2X")


def inputs(resolution: int, batch: int = 1, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    rgb = torch.randn(batch, 3, resolution, resolution, generator=generator)
    features = torch.randn(batch, 32, resolution, resolution, generator=generator)
    return rgb, features, torch.randn(batch, 4, 512, generator=generator)


def test_published_rows_cover_every_variant_but_our_own():
    assert set(VARIANTS) - set(PUBLISHED) == {"Superresolution2XSmall"}


@pytest.mark.parametrize("variant", PUBLISHED)
def test_superresolution_has_the_published_shapes_and_parameters(variant):
    input_size, output_size, wide, up, narrow, num_parameters, has_filter = PUBLISHED[variant]
    with torch.device("meta"):
        module = Superresolution(output_size, SuperresolutionConfig(variant=variant))
    state = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    assert sum(parameter.numel() for parameter in module.parameters()) == num_parameters
    assert ("resample_filter" in state) == has_filter
    assert (module.input_resolution, VARIANTS[variant].first_block_up) == (input_size, up)
    assert state["block0.conv0.weight"] == (wide, 32, 3, 3) and state["block1.conv0.weight"] == (narrow, wide, 3, 3)
    assert state["block0.conv0.noise_const"] == (input_size * up,) * 2
    assert state["block1.conv1.noise_const"] == (output_size,) * 2
    assert state["block0.torgb.weight"] == (3, wide, 1, 1) and state["block0.torgb.affine.weight"] == (wide, 512)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("resolution", [8, 64, 128])
def test_superresolution_output_has_its_size(variant, resolution):
    row = VARIANTS[variant]
    input_size, size, up = row.input_resolution, row.output_resolution, row.first_block_up
    with torch.device("meta"):  # shapes alone; the numbers of full sizes are a matter of the parity tests
        module = Superresolution(size, SuperresolutionConfig(variant=variant))
        ws = torch.empty(2, 4, 512)
        rgb, features = torch.empty(2, 3, resolution, resolution), torch.empty(2, 32, resolution, resolution)
        image, first_rgb = module(rgb, features, ws, SILENT)
    assert image.shape == (2, 3, size, size)
    # There is a first image only where neither a resize nor the first block comes between.
    assert (first_rgb is None) == (resolution != input_size or up == 2)


@torch.no_grad()
def test_superresolution_of_256_pixels_equals_its_blocks():
    module = build("SuperresolutionHybrid4X")
    rgb, features, ws = inputs(16)
    image, first_rgb = module(rgb, features, ws, SILENT)
    ws = ws[:, -1:].expand(-1, 3, -1)
    x, expected = module.block0(resize_bilinear(features, 128), resize_bilinear(rgb, 128), ws, SILENT)
    assert first_rgb is None and image.equal(module.block1(x, expected, ws, SILENT)[1])


@torch.no_grad()
@pytest.mark.parametrize("resolution", [1, 63, 64, 65, 100])
def test_superresolution_any_input_size_gives_the_same_output_size(double_size, resolution):
    image, first_rgb = double_size(*inputs(resolution), SILENT)
    assert image.shape == (1, 3, 128, 128)
    assert (first_rgb is None) == (resolution != 64)


@torch.no_grad()
def test_superresolution_first_rgb_is_the_raw_image_and_what_the_first_block_adds(double_size):
    rgb, features, ws = inputs(64)
    before = rgb.clone(), features.clone()
    image, first_rgb = double_size(rgb, features, ws, SILENT)
    x, expected = double_size.block0(features, rgb.clone(), ws[:, -1:].expand(-1, 3, -1), SILENT)
    assert first_rgb.equal(expected) and not torch.allclose(first_rgb, rgb)
    assert image.equal(double_size.block1(x, expected, ws[:, -1:].expand(-1, 3, -1), SILENT)[1])
    assert rgb.equal(before[0]) and features.equal(before[1])  # nothing is added in place


@torch.no_grad()
def test_superresolution_uses_only_the_last_w(double_size):
    rgb, features, ws = inputs(16)
    expected = double_size(rgb, features, ws, SILENT).image
    other = ws.clone()
    other[:, :-1] += 1
    assert double_size(rgb, features, other, SILENT).image.equal(expected)
    other[:, -1] += 1
    assert not torch.allclose(double_size(rgb, features, other, SILENT).image, expected)


@torch.no_grad()
@pytest.mark.parametrize(("num_fp16_res", "clamp"), [(4, 256), (0, None)])
def test_superresolution_half_precision_blocks_clamp_on_a_cpu_too(num_fp16_res, clamp):
    module = build("SuperresolutionHybrid2X", num_fp16_res=num_fp16_res)
    clamps = {layer.conv_clamp for layer in module.modules() if hasattr(layer, "conv_clamp")}
    assert clamps == {clamp}
    assert {module.block0.use_fp16, module.block1.use_fp16} == {num_fp16_res > 0}


@torch.no_grad()
def test_superresolution_without_antialiasing_differs_only_where_it_shrinks():
    smooth, rough = build("SuperresolutionHybrid2X"), build("SuperresolutionHybrid2X", antialias=False)
    assert not torch.allclose(smooth(*inputs(128), SILENT).image, rough(*inputs(128), SILENT).image)
    larger = smooth(*inputs(32), SILENT).image
    torch.testing.assert_close(rough(*inputs(32), SILENT).image, larger, rtol=1e-4, atol=1e-4)  # two float32 kernels


@torch.no_grad()
def test_superresolution_random_noise_follows_its_generator(double_size):
    images = [
        double_size(*inputs(16), SynthesisOptions(generator=torch.Generator().manual_seed(seed))).image
        for seed in (0, 0, 1)
    ]
    assert images[0].equal(images[1]) and not images[0].equal(images[2])


@torch.no_grad()
def test_resize_bilinear_same_size_is_the_same_tensor():
    x = torch.randn(1, 2, 5, 5)
    assert resize_bilinear(x, 5) is x
    assert resize_bilinear(x, 3).shape == (1, 2, 3, 3)
    assert resize_bilinear(torch.ones(1, 1, 7, 4), 4).shape == (1, 1, 4, 4)


def test_superresolution_unknown_variant_raises_value_error_with_the_known_ones():
    with pytest.raises(ValueError, match=r"superresolution\.variant.*Hybrid8XDC.*'Hybrid16X'"):
        Superresolution(128, SuperresolutionConfig(variant="Hybrid16X"))


def test_superresolution_other_output_size_raises_value_error():
    with pytest.raises(ValueError, match=r"output resolution 256.*128"):
        Superresolution(256, SuperresolutionConfig(variant="SuperresolutionHybrid2X"))
