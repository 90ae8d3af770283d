"""The generator composes its parts as promised: folding, caching, cameras, outputs and the published surface."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch

from tests.helpers.parity import relative_error
from tests.helpers.tiny import labels, latents, tiny_config, tiny_network
from training.config import ConditioningConfig, SuperresolutionConfig, SynthesisConfig
from training.networks_stylegan2 import SynthesisOptions
from training.presets import GENERATOR_PRESETS
from training.representations import DualSphericalTriPlane, make_representation
from training.triplane import TriPlaneGenerator

SYSTEMS = ("dual_spherical", "tri_grid", "tri_plane")
CONST = {"noise_mode": "const"}
REORDERED = {"rtol": 1e-5, "atol": 1e-5}  # float32, the same products summed in another order
SEED = 11


def render(generator: TriPlaneGenerator, ws: torch.Tensor, c: torch.Tensor, **kwargs) -> dict[str, torch.Tensor]:
    """Synthesise with fixed layer noise and fixed samples along the rays."""
    torch.manual_seed(SEED)
    return generator.synthesis(ws, c, **{**CONST, **kwargs})


def same_images(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], **tolerance: float) -> None:
    assert a.keys() == b.keys()
    for key in a:
        torch.testing.assert_close(
            a[key], b[key], **(tolerance or {"rtol": 0, "atol": 0}), msg=lambda m, k=key: f"{k}: {m}"
        )


@pytest.fixture(scope="module", params=SYSTEMS)
def system(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def shared_generator(system) -> TriPlaneGenerator:
    """Return a generator that tests must not change."""
    return tiny_network(system, parsing_classes=5)


@pytest.fixture
def generator() -> TriPlaneGenerator:
    return tiny_network()


@pytest.fixture
def ws(generator) -> torch.Tensor:
    with torch.no_grad():
        return generator.mapping(latents(), labels())


# Outputs.


@torch.no_grad()
def test_synthesis_outputs_have_the_promised_shapes_and_ranges(shared_generator, system):
    ws = shared_generator.mapping(latents(), labels())
    assert ws.shape == (2, shared_generator.backbone.num_ws, 512)
    out = render(shared_generator, ws, labels())
    shapes = {key: tuple(value.shape) for key, value in out.items()}
    assert shapes == {
        "image": (2, 3, 128, 128),
        "image_raw": (2, 3, 8, 8),
        "image_depth": (2, 1, 8, 8),
        "image_mask": (2, 1, 8, 8),
        "image_parsing": (2, 5, 8, 8),
    }
    assert all(value.isfinite().all() for value in out.values())
    assert out["image_mask"].min() >= -0.001 and out["image_mask"].max() <= 1.001
    assert out["image_depth"].min() >= 2.25 and out["image_depth"].max() <= 3.3 * 1.07  # jitter may overshoot
    parsing = out["image_parsing"]
    assert parsing.min() >= 0
    torch.testing.assert_close(parsing.sum(dim=1), torch.ones(2, 8, 8), rtol=0, atol=1e-5)  # float32 softmax
    assert shared_generator.parsing_flag


@torch.no_grad()
def test_query_items_do_not_depend_on_each_other(shared_generator):
    ws = shared_generator.mapping(latents(), labels())
    field = shared_generator.radiance_field(ws, options=SynthesisOptions(**CONST))
    alone = shared_generator.radiance_field(ws[1:], options=SynthesisOptions(**CONST))
    points = 0.4 * latents(2 * 7)[:, :3].reshape(2, 7, 3).clamp(-1, 1)
    for ours, expected in zip(
        shared_generator.query(alone, points[1:]), shared_generator.query(field, points), strict=True
    ):
        torch.testing.assert_close(ours, expected[1:], **REORDERED)


@torch.no_grad()
def test_forward_equals_mapping_offset_and_synthesis(shared_generator):
    z, c = latents(), labels()
    torch.manual_seed(SEED)
    out = shared_generator(z, c, truncation_psi=0.6, truncation_cutoff=3, **CONST)
    ws = shared_generator.mapping(z, c, 0.6, 3)
    if shared_generator.config.pose_offset:
        c, offset = shared_generator.apply_delta_c(z, c, 0.6, 3)
        assert offset.abs().min() > 0
    same_images(out, render(shared_generator, ws, c))


@torch.no_grad()
def test_sample_equals_sample_mixed_of_the_mapping(shared_generator):
    z, c, points = latents(), labels(), 0.3 * latents(8)[:, :15].reshape(2, 20, 3)
    out = shared_generator.sample(points, None, z, c, truncation_psi=0.6, **CONST)
    expected = shared_generator.sample_mixed(
        points, torch.zeros_like(points), shared_generator.mapping(z, c, 0.6), **CONST
    )
    same_images(out, expected)
    assert out["rgb"].shape == (2, 20, 32) and out["sigma"].shape == (2, 20, 1) and out["xyz"] is points


@torch.no_grad()
@pytest.mark.parametrize("resolution", [1, 3, 64])
def test_synthesis_any_rendering_resolution(generator, ws, resolution):
    out = render(generator, ws, labels(), neural_rendering_resolution=resolution)
    assert out["image_raw"].shape == (2, 3, resolution, resolution) and out["image"].shape == (2, 3, 128, 128)
    assert all(value.isfinite().all() for value in out.values())


# Folding of the plane projections.


def projected(generator: TriPlaneGenerator, ws: torch.Tensor, fold: bool) -> torch.Tensor:
    generator.fold_projections = fold
    return generator.radiance_field(ws, options=SynthesisOptions(**CONST)).planes


def test_fold_projections_planes_and_gradients_equal_the_unfolded_ones(generator, ws):
    names = [
        *[f"{conv}.{i}.weight" for conv in ("ConvA", "ConvB") for i in range(2)],
        "backbone.synthesis.b4.torgb.weight",
        "backbone.synthesis.b16.torgb.bias",
        "backbone.synthesis.b8.torgb.affine.weight",
        "backbone.synthesis.b8.conv0.weight",
    ]
    weights = torch.randn(2, 2, 3, 32, 16, 16, generator=torch.Generator().manual_seed(3))
    results = []
    for fold in (True, False):
        generator.zero_grad()
        planes = projected(generator, ws, fold)
        (planes * weights).sum().backward()
        results.append([planes.detach(), *(generator.get_parameter(name).grad.clone() for name in names)])
    for name, ours, expected in zip(["planes", *names], *results, strict=True):
        assert expected.abs().max() > 0, name
        # Relative to the largest: float32 sums over 512 channels in another order.
        assert ((ours - expected).abs().max() / expected.abs().max()).item() <= 1e-5, name


def test_fold_projections_gradients_in_float64_agree_to_rounding(generator, ws):
    generator.double()
    for fold in (True, False):
        generator.zero_grad()
        projected(generator, ws, fold).square().sum().backward()
        gradients = [p.grad.clone() for n, p in generator.named_parameters() if n.startswith(("Conv", "backbone.syn"))]
        expected = gradients if fold else expected  # noqa: F821 (bound in the first round)
    for ours, theirs in zip(gradients, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9 * theirs.abs().max().item())  # float64


@torch.no_grad()
def test_fold_projections_changes_no_entry_of_the_state_dict(generator, ws):
    before = {name: (tensor.data_ptr(), tensor.clone()) for name, tensor in generator.state_dict().items()}
    projected(generator, ws, True)
    projected(generator, ws, False)
    after = generator.state_dict()
    assert list(after) == list(before)
    for name, (pointer, value) in before.items():
        assert after[name].data_ptr() == pointer and after[name].equal(value), name


@torch.no_grad()
def test_fold_projections_is_off_where_a_clamp_stands_between():
    synthesis = SynthesisConfig(channel_base=1024, channel_max=32, conv_clamp=0.5)
    generator = tiny_network(synthesis=synthesis)
    ws = generator.mapping(latents(), labels())
    assert projected(generator, ws, True).equal(projected(generator, ws, False))


# Reuse.


@torch.no_grad()
def test_radiance_field_rendered_from_two_cameras_equals_two_syntheses(shared_generator):
    ws = shared_generator.mapping(latents(), labels())
    field = shared_generator.radiance_field(ws, options=SynthesisOptions(**CONST))
    for yaw_rad in (0.0, 2.0):
        c = labels(yaw_rad=yaw_rad)
        torch.manual_seed(SEED)
        same_images(shared_generator.render(field, c), render(shared_generator, ws, c))


@torch.no_grad()
def test_radiance_field_computes_backbone_and_background_once(generator, ws):
    calls = []
    for name in ("backbone.synthesis", "bcg_synthesis"):
        generator.get_submodule(name).register_forward_hook(lambda *_args, name=name: calls.append(name))
    field = generator.radiance_field(ws, options=SynthesisOptions(**CONST))
    for yaw_rad in (0.0, 1.0, 2.0):
        generator.render(field, labels(yaw_rad=yaw_rad))
        generator.query(field, torch.zeros(2, 5, 3))
    assert calls == ["backbone.synthesis", "bcg_synthesis"]


def count_backbone_calls(generator: TriPlaneGenerator) -> list[int]:
    calls = []
    generator.backbone.synthesis.register_forward_hook(lambda *_args: calls.append(1))
    return calls


@torch.no_grad()
def test_cached_backbone_same_latents_are_reused_for_other_cameras(generator, ws):
    calls = count_backbone_calls(generator)
    render(generator, ws, labels(), cache_backbone=True)
    ours = render(generator, ws.clone(), labels(yaw_rad=1.5), use_cached_backbone=True)
    assert len(calls) == 1
    same_images(ours, render(generator, ws, labels(yaw_rad=1.5)))


@torch.no_grad()
def test_cached_backbone_is_recomputed_for_anything_else(generator, ws):
    render(generator, ws, labels(), cache_backbone=True)
    others = {
        "other latents": (generator.mapping(latents(seed=1), labels()), {}),
        "another batch": (ws[:1], {}),
        "other noise": (ws, {"noise_mode": "none"}),
        "another background": (ws, {"ws_bcg": generator.mapping(latents(seed=1), labels())}),
    }
    for name, (other, kwargs) in others.items():
        c = labels(len(other))
        ours = render(generator, other, c, use_cached_backbone=True, **kwargs)
        expected = render(generator, other, c, **kwargs)
        assert ours["image"].equal(expected["image"]), name


@torch.no_grad()
def test_cached_backbone_latents_changed_in_place_are_recomputed(generator, ws):
    ws = ws.clone()
    render(generator, ws, labels(), cache_backbone=True)
    ws += 1
    same_images(render(generator, ws, labels(), use_cached_backbone=True), render(generator, ws, labels()))


@torch.no_grad()
def test_cached_backbone_is_not_kept_unless_asked(generator, ws):
    render(generator, ws, labels())
    calls = count_backbone_calls(generator)
    render(generator, ws, labels(), use_cached_backbone=True)
    assert len(calls) == 1


def test_cached_backbone_with_gradients_does_not_hinder_copying(generator, ws):
    render(generator, ws.requires_grad_(), labels(), cache_backbone=True)
    twin = copy.deepcopy(generator)
    calls = count_backbone_calls(twin)
    with torch.no_grad():
        same_images(render(twin, ws, labels(), use_cached_backbone=True), render(generator, ws, labels()))
    assert len(calls) == 1  # the cache is not copied


@torch.no_grad()
def test_ws_bcg_changes_only_the_background(generator, ws):
    other = generator.mapping(latents(seed=1), labels())
    ours, expected = render(generator, ws, labels(), ws_bcg=other), render(generator, ws, labels())
    for key in ("image_depth", "image_mask"):
        assert ours[key].equal(expected[key])
    assert not torch.allclose(ours["image_raw"], expected["image_raw"])
    same_images(render(generator, ws, labels(), ws_bcg=ws), expected)
    # One w is repeated for every layer of the background network.
    same_images(render(generator, ws, labels(), ws_bcg=other[:, :1]), render(generator, ws, labels(), ws_bcg=other))


@torch.no_grad()
def test_background_is_seen_where_the_volume_is_not(generator, ws):
    away = labels()
    away[:, [3, 11]] += 9  # translate the cameras far to the side
    field = generator.radiance_field(ws, options=SynthesisOptions(**CONST))
    out = generator.render(field, away, neural_rendering_resolution=64)
    torch.testing.assert_close(out["image_mask"], torch.full_like(out["image_mask"], -0.001), rtol=0, atol=1e-6)
    expected = generator.torgb(field.background, ws[:, -1], fused=False)
    first_rgb = generator.superresolution(expected, field.background, ws, SynthesisOptions(noise_mode="none"))[1]
    assert not generator.config.superresolution.first_rgb_replaces_raw and first_rgb is not None
    torch.testing.assert_close(out["image_raw"], expected, **REORDERED)


@torch.no_grad()
def test_background_is_composited_behind_the_volume():
    with_background, without = (tiny_network(raw_torgb=False, background=both) for both in (True, False))
    ws = with_background.mapping(latents(), labels())
    out, front = (render(generator, ws, labels()) for generator in (with_background, without))
    field = with_background.radiance_field(ws, options=SynthesisOptions(**CONST))
    behind = torch.nn.functional.interpolate(
        field.background[:, :3], size=(8, 8), mode="bilinear", align_corners=False, antialias=True
    )
    opacity = (out["image_mask"] + 0.001) / 1.002
    assert 0.05 < opacity.mean() < 0.95  # something of both is seen
    torch.testing.assert_close(out["image_raw"], front["image_raw"] + (1 - opacity) * behind, **REORDERED)


@torch.no_grad()
def test_first_rgb_replaces_raw_only_where_asked_and_without_resizing():
    replacing = SuperresolutionConfig(variant="SuperresolutionHybrid2X", first_rgb_replaces_raw=True)
    plain, other = tiny_network(), tiny_network(superresolution=replacing)
    ws = plain.mapping(latents(), labels())
    for resolution, differs in ((8, False), (64, True)):
        a = render(plain, ws, labels(), neural_rendering_resolution=resolution)
        b = render(other, ws, labels(), neural_rendering_resolution=resolution)
        assert a["image"].equal(b["image"])
        assert a["image_raw"].equal(b["image_raw"]) != differs


# Cameras and conditioning.


@torch.no_grad()
def test_neural_rendering_resolution_of_a_call_does_not_stay(generator, ws):
    assert render(generator, ws, labels(), neural_rendering_resolution=4)["image_raw"].shape[-1] == 4
    assert generator.neural_rendering_resolution == 8
    assert render(generator, ws, labels())["image_raw"].shape[-1] == 8
    generator.neural_rendering_resolution = 5
    assert (
        render(generator, ws, labels())["image_raw"].shape[-1] == 5
        and generator.config.neural_rendering_resolution == 5
    )


def test_neural_rendering_resolution_below_one_raises_value_error(generator):
    with pytest.raises(ValueError, match="neural_rendering_resolution"):
        generator.neural_rendering_resolution = 0


@torch.no_grad()
def test_apply_delta_c_zero_conditioning_keeps_the_camera():
    generator = tiny_network(conditioning=ConditioningConfig(zero=True))
    z, c = latents(), labels()
    before = c.clone()
    shifted, offset = generator.apply_delta_c(z, c)
    assert c.equal(before)
    moved = torch.zeros(2, 25)
    moved[:, [3, 7, 11]] = offset
    torch.testing.assert_close(shifted, c + moved, rtol=0, atol=0)  # the same sum
    torch.manual_seed(SEED)
    out = generator(z, c, **CONST)
    assert all(value.isfinite().all() for value in out.values())
    assert out["image_mask"].max() > 0.01  # the volume is in view
    assert generator.mapping(z, c).equal(generator.mapping(z, labels(yaw_rad=2.0)))


@torch.no_grad()
def test_conditioning_scale_multiplies_the_label():
    halved = tiny_network(conditioning=ConditioningConfig(scale=0.5))
    z, c = latents(), labels()
    assert halved.mapping(z, c).equal(tiny_network().mapping(z, c * 0.5))


def test_apply_delta_c_without_pose_offset_raises_value_error():
    with pytest.raises(ValueError, match="apply_delta_c"):
        tiny_network("tri_plane").apply_delta_c(latents(), labels())


def test_pose_offset_receives_gradients_from_the_images(generator):
    torch.manual_seed(SEED)
    out = generator(latents(), labels(), **CONST)
    (out["image_raw"].sum() + out["image_depth"].sum()).backward()
    gradients = [parameter.grad for parameter in generator.t_mapping.parameters()]
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert max(gradient.abs().max() for gradient in gradients) > 0


def test_every_parameter_receives_a_finite_gradient(system):
    generator = tiny_network(system, parsing_classes=3).train()
    torch.manual_seed(SEED)
    out = generator(latents(), labels())
    sum((value * torch.linspace(-1, 1, value.shape[-1])).sum() for value in out.values()).backward()
    # Layer noise of the super-resolution is off, so that its strengths stay without gradient.
    idle = {n for n, p in generator.named_parameters() if p.grad is None}
    assert {name.split(".")[0] for name in idle} <= {"superresolution"}
    assert all(name.endswith("noise_strength") for name in idle)
    for name, parameter in generator.named_parameters():
        assert name in idle or parameter.grad.isfinite().all(), name


# The published surface.


@pytest.mark.parametrize("preset", GENERATOR_PRESETS)
def test_init_kwargs_construct_an_equal_generator(preset):
    config = dataclasses.replace(GENERATOR_PRESETS[preset], parsing_classes=20)
    with torch.device("meta"):
        generator = TriPlaneGenerator.from_config(config)
        twin = TriPlaneGenerator(*generator.init_args, **generator.init_kwargs)
    assert generator.config == twin.config == config
    assert list(generator.state_dict()) == list(twin.state_dict())


@pytest.mark.parametrize(
    "fields",
    [
        {"parsing_classes": 5},
        {"conditioning": ConditioningConfig(zero=True, scale=0.5)},
        {"extras": {}},
        {"extras": {"avg_camera_radius": 1.7, "my_note": [1, 2]}},
        {"ray_start": "auto", "ray_end": "auto", "white_back": True, "depth_clamp": "batch", "density_noise": 0.25},
        {
            "superresolution": SuperresolutionConfig(
                variant="SuperresolutionHybrid2X", noise_mode="random", antialias=False
            )
        },
        {"synthesis": SynthesisConfig(channel_base=256, channel_max=4, architecture="resnet", fused_modconv=True)},
        {"neural_rendering_resolution": 17, "z_dim": 3},
    ],
)
def test_from_config_keeps_every_field(fields):
    config = tiny_config(**fields)
    with torch.device("meta"):
        generator = TriPlaneGenerator.from_config(config)
        assert generator.config == config
        assert TriPlaneGenerator(**generator.init_kwargs).config == config
    if config.parsing_classes:
        assert generator.toparsing.weight.shape[0] == config.parsing_classes


def test_published_attributes_are_there(shared_generator):
    generator = shared_generator
    assert (generator.z_dim, generator.c_dim, generator.w_dim) == (64, 25, 512)
    assert (generator.img_resolution, generator.img_channels) == (128, 3)
    assert generator.backbone.mapping.num_ws == generator.backbone.num_ws == generator.backbone.synthesis.num_ws
    noise = {name: buffer for name, buffer in generator.backbone.synthesis.named_buffers() if "noise_const" in name}
    assert noise["b16.conv1.noise_const"].shape == (16, 16)


@torch.no_grad()
def test_rendering_kwargs_changes_take_effect(generator, ws):
    before = render(generator, ws, labels())
    generator.rendering_kwargs["density_noise"] = 2.0
    assert generator.config.rendering.density_noise == 2.0
    assert not torch.allclose(render(generator, ws, labels())["image_mask"], before["image_mask"])
    generator.rendering_kwargs["density_noise"] = 0
    same_images(render(generator, ws, labels()), before)


def test_deepcopy_has_its_own_rendering_kwargs(generator):
    twin = copy.deepcopy(generator)
    twin.rendering_kwargs["ray_start"] = 2.0
    twin.rendering_kwargs["mine"] = 1
    twin.rendering_kwargs["avg_camera_pivot"][0] = 9
    assert generator.rendering_kwargs["ray_start"] == 2.25 and "mine" not in generator.rendering_kwargs
    assert generator.rendering_kwargs["avg_camera_pivot"] == [0, 0, 0.2]


def test_extras_changed_in_place_stay_out_of_the_preset():
    generator = TriPlaneGenerator.from_config(tiny_config())
    generator.rendering_kwargs["avg_camera_pivot"][0] = 9
    assert GENERATOR_PRESETS["debug"].extras["avg_camera_pivot"] == [0, 0, 0.2]
    assert generator.init_kwargs["rendering_kwargs"]["avg_camera_pivot"] == [9, 0, 0.2]


def test_train_and_eval_mode_agree(generator, ws):
    with torch.no_grad():
        evaluated, trained = render(generator, ws, labels()), render(generator.train(), ws, labels())
    for key, value in trained.items():
        assert relative_error(value, evaluated[key]) <= 1e-4, key  # float32, fused and un-fused modulation


@torch.no_grad()
def test_double_renders_in_float64_close_to_float32(system):
    single = tiny_network(system, parsing_classes=3)
    double = copy.deepcopy(single).double()
    z, c = latents(), labels()
    ws = double.mapping(z, c)
    assert ws.dtype == torch.float64
    torch.manual_seed(SEED)
    out = double(z, c, **CONST)
    torch.manual_seed(SEED)
    expected = single(z, c, **CONST)
    for key, value in out.items():
        assert value.dtype == torch.float64
        assert relative_error(value, expected[key]) <= 1e-3, key  # float32, with sampling that follows the densities
    torch.testing.assert_close(render(single, ws, c)["image"], render(single, ws.float(), c)["image"], rtol=0, atol=0)


@torch.no_grad()
def test_synthesis_unknown_option_raises_type_error(generator, ws):
    with pytest.raises(TypeError, match="noise_modes"):
        generator.synthesis(ws, labels(), noise_modes="const")


@torch.no_grad()
def test_synthesis_ws_of_another_shape_raise_value_error(generator, ws):
    with pytest.raises(ValueError, match=r"^ws: expected shape"):
        generator.synthesis(ws[:, :-1], labels(), **CONST)


@torch.no_grad()
def test_point_colors_equal_the_raw_image_of_an_opaque_point(generator, ws):
    field = generator.radiance_field(ws, options=SynthesisOptions(**CONST))
    points = 0.3 * torch.randn(2, 6, 3, generator=torch.Generator().manual_seed(0))
    _, features = generator.query(field, points)
    expected = generator.torgb(features.transpose(1, 2)[..., None], ws[:, -1], fused=False)[..., 0].transpose(1, 2)
    torch.testing.assert_close(generator.point_colors(field, points), expected, **REORDERED)


def test_generator_of_another_output_size_than_its_superresolution_raises_value_error():
    with pytest.raises(ValueError, match=r"superresolution\.variant.*256.*128"):
        TriPlaneGenerator.from_config(tiny_config(img_resolution=256))


def test_representation_is_that_of_the_configuration(shared_generator, system):
    ours = shared_generator.renderer.representation
    assert type(ours) is type(make_representation(system, shared_generator.config.plane_depth))


@pytest.mark.parametrize("num_cameras", [1, 3])
def test_render_with_another_number_of_cameras_names_both(generator, ws, num_cameras):
    with pytest.raises(ValueError, match=rf"camera labels: expected one for each of the {len(ws)} latents"):
        render(generator, ws, labels(num_cameras))


@pytest.mark.parametrize("resolution", [0, -4])
def test_render_with_an_impossible_resolution_names_it(generator, ws, resolution):
    with pytest.raises(ValueError, match=f"neural_rendering_resolution: expected at least 1, got {resolution}"):
        render(generator, ws, labels(len(ws)), neural_rendering_resolution=resolution)


def test_cached_backbone_without_gradients_is_not_reused_where_they_are_wanted(generator, ws):
    c = labels(len(ws))
    with torch.no_grad():
        render(generator, ws, c, cache_backbone=True)
    wanted = ws.clone().requires_grad_()
    assert render(generator, wanted, c, use_cached_backbone=True)["image"].requires_grad


def test_projection_with_a_bias_is_refused(monkeypatch):
    biased = {"ConvA": torch.nn.Conv2d(512, 96, 1), "ConvB": torch.nn.Conv2d(512, 96, 1, bias=False)}
    monkeypatch.setattr(DualSphericalTriPlane, "projections", lambda self: biased)
    with pytest.raises(ValueError, match="projection 'ConvA': expected layers without bias"):
        TriPlaneGenerator.from_config(tiny_config())


def test_fold_projections_of_any_linear_layers_equals_the_unfolded_ones(monkeypatch, ws):
    plain = {name: torch.nn.Conv2d(512, 96, 1, bias=False) for name in ("ConvA", "ConvB")}
    monkeypatch.setattr(DualSphericalTriPlane, "projections", lambda self: plain)
    generator = TriPlaneGenerator.from_config(tiny_config()).eval()
    torch.testing.assert_close(projected(generator, ws, True), projected(generator, ws, False), **REORDERED)
