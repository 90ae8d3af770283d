"""The volume renderer equals loops over single rays, in values and gradients, for any batch and ray count."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tests.helpers import twins
from torch_utils import native
from training.config import DecoderConfig, RenderingConfig
from training.representations import make_representation
from training.volumetric_rendering import reference
from training.volumetric_rendering.decoder import OSGDecoder
from training.volumetric_rendering.reference import RenderDraws, inside_crop
from training.volumetric_rendering.renderer import ImportanceRenderer

ROUNDING = {"rtol": 1e-9, "atol": 1e-9}  # float64 through a decoder and two passes
LOOK_UPS = {
    "dual_spherical": (twins.look_up_dual_spherical, 3, (2, 3, 32, 5, 5)),
    "tri_plane": (twins.look_up_tri_plane, 1, (3, 32, 5, 5)),
    "tri_grid": (twins.look_up_tri_grid, 2, (3, 32, 2, 5, 5)),
}
AUTO = {"ray_start": "auto", "ray_end": "auto"}


@pytest.fixture(params=["reference", "fused"], autouse=True)
def choice(request, monkeypatch) -> str:
    """Run every test with both renderers."""
    reason = None if request.param == "reference" else native.reason() or (native.load() is None and "not built")
    if reason:
        pytest.skip(f"no native kernels: {reason}")
    monkeypatch.setattr(Scene, "choice", request.param)
    return request.param


# For tests that change parts of the reference; tests/torch_utils/test_volume_render.py compares gradients of both.
only_reference = pytest.mark.parametrize("choice", ["reference"], indirect=True)


class Scene:
    """Random planes of B scenes, a decoder that makes about half of the volume dense, and the renderer of both."""

    choice = "reference"

    def __init__(self, name: str = "tri_plane", batch: int = 1, dtype: torch.dtype = torch.float64) -> None:
        self.look_up, depth, shape = LOOK_UPS[name]
        generator = torch.Generator().manual_seed(0)
        self.planes = (2 * torch.randn(batch, *shape, generator=generator, dtype=torch.float64)).to(dtype)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.decoder = OSGDecoder(32, 32, DecoderConfig()).to(dtype)
        self.decoder.net[2].weight.data[0] *= 8
        self.representation = make_representation(name, depth)
        self.renderer = ImportanceRenderer(self.representation)
        self.renderer.choose(self.choice)

    def render(self, rays, config: RenderingConfig, draws: RenderDraws | None = None, generator=None):
        return self.renderer(self.planes, self.decoder, *rays, config, draws, generator)

    def field(self, b: int, config: RenderingConfig) -> twins.Field:
        """Return the field of one scene as a function of single points."""
        layers = [
            (layer.weight.detach().numpy() * layer.weight_gain, layer.bias.detach().numpy() * layer.bias_gain)
            for layer in (self.decoder.net[0], self.decoder.net[2])
        ]

        def evaluate(point: np.ndarray) -> tuple[float, np.ndarray]:
            hidden = layers[0][0] @ self.look_up(self.planes[b].numpy(), point * 2 / config.box_warp) + layers[0][1]
            out = layers[1][0] @ np.logaddexp(0, hidden) + layers[1][1]
            return out[0], out[1:]

        return evaluate


def rays_at_the_box(batch: int, num: int, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    """Return rays from a distance of 2.7 to points around the middle of the box."""
    generator = torch.Generator().manual_seed(1)
    origins = 2.7 * F.normalize(torch.randn(batch, 1, 3, generator=generator, dtype=torch.float64), dim=-1)
    targets = 0.6 * torch.rand(batch, num, 3, generator=generator, dtype=torch.float64) - 0.3
    origins = origins.expand(-1, num, -1)
    return origins.to(dtype), F.normalize(targets - origins, dim=-1).to(dtype)


def config(num_coarse: int = 6, num_fine: int = 5, **fields: Any) -> RenderingConfig:
    return RenderingConfig(
        **{
            "depth_resolution": num_coarse,
            "depth_resolution_importance": num_fine,
            "ray_start": 2.2,
            "ray_end": 3.2,
            "crop_margin": None,
            **fields,
        }
    )


def draw(rays, settings: RenderingConfig, seed: int = 0) -> RenderDraws:
    return RenderDraws.draw(rays[0], settings, torch.Generator().manual_seed(seed))


def ray_limits(rays, b: int, r: int, settings: RenderingConfig) -> tuple[float, float]:
    if settings.auto_range:
        return twins.box_limits(rays[0][b, r].tolist(), rays[1][b, r].tolist(), settings.box_warp)
    return settings.ray_start, settings.ray_end


def check_against_loops(scene: Scene, rays, settings: RenderingConfig) -> None:
    draws = draw(rays, settings)
    with torch.no_grad():
        out = scene.render(rays, settings, draws)
    opacities = []
    for b, r in np.ndindex(*rays[0].shape[:2]):
        uniforms = [] if draws.importance is None else draws.importance[b, r].tolist()
        features, depth, opacity = twins.render_ray(
            scene.field(b, settings),
            rays[0][b, r].numpy(),
            rays[1][b, r].numpy(),
            ray_limits(rays, b, r, settings),
            draws.coarse_jitter[b, r].tolist(),
            uniforms,
            box=settings.box_warp,
            crop_margin=settings.crop_margin,
            white_back=settings.white_back,
            disparity=settings.disparity_space_sampling,
        )
        torch.testing.assert_close(out.features[b, r], torch.from_numpy(features), **ROUNDING)
        assert out.accumulation[b, r].item() == pytest.approx(opacity, abs=1e-9)
        assert out.depth[b, r].item() == pytest.approx(depth, abs=1e-9)
        opacities.append(opacity)
    assert max(opacities) > 0.3  # something was there to see


# Against loops.


@pytest.mark.parametrize("name", LOOK_UPS)
@pytest.mark.parametrize("num_fine", [0, 5])
def test_render_every_representation_equals_loops(name, num_fine):
    check_against_loops(Scene(name, batch=2), rays_at_the_box(2, 3), config(num_fine=num_fine))


@pytest.mark.parametrize(
    "fields",
    [
        pytest.param({"num_coarse": 4}, id="fewest coarse"),
        pytest.param({"num_coarse": 2, "num_fine": 0}, id="fewest"),
        pytest.param({"num_fine": 1}, id="one fine"),
        pytest.param({"white_back": True}, id="white back"),
        pytest.param({"disparity_space_sampling": True}, id="disparity"),
        pytest.param({"crop_margin": 0.25}, id="crop"),
        pytest.param({"box_warp": 1.6, "crop_margin": 0.1}, id="large box"),
        pytest.param({**AUTO}, id="auto"),
        pytest.param({**AUTO, "box_warp": 0.8, "crop_margin": 0.1, "white_back": True}, id="auto and all"),
    ],
)
def test_render_every_setting_equals_loops(fields):
    check_against_loops(Scene(), rays_at_the_box(1, 3), config(**fields))


@pytest.mark.parametrize("num_fine", [0, 5])
def test_render_a_single_ray_equals_loops(num_fine):
    check_against_loops(Scene(), rays_at_the_box(1, 1), config(num_fine=num_fine))


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("num_rays", [1, 7])
def test_render_any_count_has_the_promised_shapes(batch, num_rays):
    out = Scene(batch=batch).render(rays_at_the_box(batch, num_rays), config())
    assert out.features.shape == (batch, num_rays, 32)
    assert out.depth.shape == out.accumulation.shape == (batch, num_rays, 1)


def test_render_rays_do_not_depend_on_each_other():
    scene, rays, settings = Scene(batch=2), rays_at_the_box(2, 7), config(depth_clamp="ray", crop_margin=0.2)
    draws = draw(rays, settings)
    whole = scene.render(rays, settings, draws)
    for part in (slice(0, 3), slice(3, 7), slice(2, 3)):
        some = RenderDraws(coarse_jitter=draws.coarse_jitter[:, part], importance=draws.importance[:, part])
        out = scene.render([x[:, part] for x in rays], settings, some)
        for ours, expected in zip(out, whole, strict=True):
            torch.testing.assert_close(ours, expected[:, part], **ROUNDING)


def test_render_float32_is_close_to_float64():
    rays, settings = rays_at_the_box(1, 20), config()
    draws = draw(rays, settings)
    exact = Scene().render(rays, settings, draws)
    single = dataclasses.replace(draws, coarse_jitter=draws.coarse_jitter.float(), importance=draws.importance.float())
    out = Scene(dtype=torch.float32).render([x.float() for x in rays], settings, single)
    for ours, expected in zip(out, exact, strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours.double(), expected, rtol=1e-4, atol=1e-4)  # float32 through two passes


# Cropping, empty rays and the limits of depth.


def test_inside_crop_limits_are_inclusive_and_leave_y_free():
    settings = config(crop_margin=0.25)
    points = torch.tensor([[0.25, 9.0, -0.25], [0.2500001, 0, 0], [0, 0, -0.2500001], [-0.25, -9, 0.25]])
    assert inside_crop(points, settings).tolist() == [True, False, False, True]


def empty_and_full() -> tuple[Scene, tuple[torch.Tensor, torch.Tensor], RenderingConfig]:
    """Return two items, of which the first looks past the crop region."""
    origins, directions = rays_at_the_box(2, 3)
    origins = origins.clone()
    origins[0] = torch.tensor([9.0, 0, 2.7])
    return Scene(batch=2), (origins, directions), config(crop_margin=0.1)


@pytest.mark.parametrize("num_fine", [0, 5])
def test_render_an_empty_ray_sees_nothing(num_fine):
    scene, rays, settings = empty_and_full()
    settings = dataclasses.replace(settings, depth_resolution_importance=num_fine)
    out = scene.render(rays, settings)
    assert (out.accumulation[0] == 0).all() and (out.features[0] == 0).all() and (out.accumulation[1] > 0).all()
    assert out.depth.isfinite().all()
    white = scene.render(rays, dataclasses.replace(settings, white_back=True))
    assert (white.features[0] == 1).all()


def test_render_depth_of_an_empty_ray_depends_on_other_items_only_where_published():
    scene, rays, settings = empty_and_full()
    draws = draw(rays, settings)
    alone_scene = Scene(batch=1)
    alone_scene.planes = scene.planes[:1]
    alone = RenderDraws(coarse_jitter=draws.coarse_jitter[:1], importance=draws.importance[:1])
    depths = {}
    for clamp in ("ray", "batch"):
        fixed = dataclasses.replace(settings, depth_clamp=clamp)
        together = scene.render(rays, fixed, draws).depth[0]
        depths[clamp] = together, alone_scene.render([x[:1] for x in rays], fixed, alone).depth[0]
    assert depths["ray"][0].equal(depths["ray"][1])
    assert not depths["batch"][0].equal(depths["batch"][1])
    assert (depths["batch"][0] == depths["batch"][0][0]).all()  # the far end of the whole batch


def test_render_an_empty_ray_has_finite_gradients():
    scene, rays, settings = empty_and_full()
    rays = [x.clone().requires_grad_() for x in rays]
    scene.planes.requires_grad_()
    out = scene.render(rays, settings)
    (out.depth.sum() + out.features.sum() + out.accumulation.sum()).backward()
    for tensor in (*rays, scene.planes, *scene.decoder.parameters()):
        assert tensor.grad.isfinite().all()


@pytest.mark.parametrize("rule", ["longest", "nearest"])
@pytest.mark.parametrize("num_fine", [0, 5])
def test_render_auto_some_rays_miss_and_all_is_finite(rule, num_fine):
    scene, rays, settings = empty_and_full()
    settings = dataclasses.replace(settings, depth_resolution_importance=num_fine, auto_range_of_misses=rule, **AUTO)
    out = scene.render(rays, settings)
    assert all(x.isfinite().all() for x in out)
    assert (out.accumulation[0] == 0).all() and (out.accumulation[1] > 0).all()


@pytest.mark.parametrize("crop_margin", [None, 0.1])
@pytest.mark.parametrize("num_fine", [0, 5])
def test_render_auto_all_rays_miss_sees_nothing(num_fine, crop_margin):
    scene, (origins, directions), _ = empty_and_full()
    out = scene.render((origins + 9, directions), config(num_fine=num_fine, crop_margin=crop_margin, **AUTO))
    assert (out.features == 0).all() and (out.accumulation == 0).all() and (out.depth == 0).all()


# Random numbers.


SETTINGS_WITH_DRAWS = {
    "plain": {},
    "no importance": {"num_fine": 0},
    "noise": {"density_noise": 0.5},
    "noise without importance": {"density_noise": 0.5, "num_fine": 0},
    "auto": AUTO,
}


@pytest.mark.parametrize("fields", SETTINGS_WITH_DRAWS.values(), ids=SETTINGS_WITH_DRAWS)
def test_render_given_draws_equal_generator_and_global_seed(fields):
    scene, rays, settings = Scene(batch=2), rays_at_the_box(2, 3), config(**fields)
    given = scene.render(rays, settings, draw(rays, settings, seed=7))
    generated = scene.render(rays, settings, generator=torch.Generator().manual_seed(7))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        seeded = scene.render(rays, settings)
    other = scene.render(rays, settings, generator=torch.Generator().manual_seed(8))
    for a, b, c, d in zip(given, generated, seeded, other, strict=True):
        assert a.equal(b) and a.equal(c) and not a.equal(d)


@pytest.mark.parametrize("fields", SETTINGS_WITH_DRAWS.values(), ids=SETTINGS_WITH_DRAWS)
def test_draws_come_in_the_published_order_and_shapes(fields):
    rays, settings = torch.zeros(2, 3, 3), config(**fields, importance_draws="random")
    draws = RenderDraws.draw(rays, settings, torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(0)
    coarse, fine = settings.depth_resolution, settings.depth_resolution_importance
    if settings.auto_range:
        jitter = torch.rand(coarse, 2, 3, 1, generator=generator)[..., 0].permute(1, 2, 0)
    else:
        jitter = torch.rand(2, 3, coarse, 1, generator=generator)[..., 0]
    assert draws.coarse_jitter.equal(jitter)
    if settings.density_noise:
        assert draws.coarse_noise.equal(torch.randn(2, 3 * coarse, 1, generator=generator).reshape(2, 3, coarse))
    if fine:
        assert draws.importance.equal(torch.rand(6, fine, generator=generator).reshape(2, 3, fine))
    if fine and settings.density_noise:
        assert draws.fine_noise.equal(torch.randn(2, 3 * fine, 1, generator=generator).reshape(2, 3, fine))
    assert (draws.importance is None) == (fine == 0)
    assert (draws.coarse_noise is None) == (settings.density_noise == 0)
    assert (draws.fine_noise is None) == (settings.density_noise == 0 or fine == 0)


def test_stratified_draws_have_one_number_in_each_share_and_stay_below_one(monkeypatch):
    rays, settings = torch.zeros(2, 3, 3), config(importance_draws="stratified")
    fine = settings.depth_resolution_importance
    shares = (RenderDraws.draw(rays, settings).importance * fine).floor()
    assert shares.equal(torch.arange(fine).float().expand_as(shares))
    monkeypatch.setattr(torch, "rand", lambda shape, **_: torch.full(shape, 1 - 2**-24))
    assert RenderDraws.draw(rays, settings).importance.max() < 1


@only_reference
def test_stratified_draws_vary_less_between_seeds():
    scene, rays = Scene(batch=2), rays_at_the_box(2, 7)

    def spread(rule: str) -> float:
        settings = config(importance_draws=rule)
        images = [scene.render(rays, settings, generator=torch.Generator().manual_seed(seed))[0] for seed in range(16)]
        return float(torch.stack(images).std(dim=0).mean())

    assert spread("stratified") < 0.9 * spread("random")


def test_draws_of_a_seed_are_the_same_in_every_precision():
    single = RenderDraws.draw(torch.zeros(1, 3, 3), config(), torch.Generator().manual_seed(0))
    double = RenderDraws.draw(torch.zeros(1, 3, 3).double(), config(), torch.Generator().manual_seed(0))
    assert single.coarse_jitter.double().equal(double.coarse_jitter) and double.importance.dtype == torch.float64


def test_query_density_noise_is_added_in_proportion():
    scene, settings, points = Scene(), config(), 0.4 * torch.rand(1, 9, 3, dtype=torch.float64)
    noisy = dataclasses.replace(settings, density_noise=0.5)
    sigma, colors = scene.renderer.query(scene.planes, scene.decoder, points, settings)
    noisy_sigma, same_colors = scene.renderer.query(
        scene.planes, scene.decoder, points, noisy, torch.Generator().manual_seed(3)
    )
    noise = torch.randn(1, 9, 1, generator=torch.Generator().manual_seed(3)).squeeze(-1)
    torch.testing.assert_close(noisy_sigma, sigma + 0.5 * noise, **ROUNDING)
    assert colors.equal(same_colors)


def test_query_is_not_cropped():
    scene, points = Scene(), torch.tensor([[[0.49, 0.0, 0.49]]], dtype=torch.float64)
    sigma, _ = scene.renderer.query(scene.planes, scene.decoder, points, config(crop_margin=0.1))
    assert sigma.item() > -100


# Gradients.


def flat_output(out) -> torch.Tensor:
    """Return one number per ray in which no two outputs cancel."""
    channels = torch.linspace(-1, 1, 32, dtype=torch.float64)
    return (out.features * channels).sum(dim=-1) + 3 * out.depth[..., 0] + 7 * out.accumulation[..., 0]


GRADIENT_CASES = {
    "tri_plane": ("tri_plane", {}),
    "tri_grid": ("tri_grid", {}),
    "dual_spherical": ("dual_spherical", {}),
    "crop and white": ("tri_plane", {"crop_margin": 0.2, "white_back": True}),
    "auto": ("tri_plane", AUTO),
    "disparity": ("tri_plane", {"disparity_space_sampling": True}),
}


@only_reference
@pytest.mark.parametrize("case", GRADIENT_CASES)
@pytest.mark.parametrize("num_fine", [0, 5])
def test_render_gradients_of_planes_decoder_and_rays_are_right(case, num_fine, monkeypatch):
    name, fields = GRADIENT_CASES[case]
    scene, rays, settings = Scene(name), rays_at_the_box(1, 2), config(num_fine=num_fine, **fields)
    draws = draw(rays, settings)
    if num_fine:
        # The depths of the second pass count as constants, so finite differences must hold them fixed.
        fixed = fine_depths_of(scene, rays, settings, draws, monkeypatch)
        monkeypatch.setattr(reference, "importance_depths", lambda *_args: fixed)
    weights = list(scene.decoder.parameters())
    inputs = [x.detach().clone().requires_grad_() for x in (scene.planes, *rays, *weights)]
    names = [n for n, _ in scene.decoder.named_parameters()]

    def render(planes, origins, directions, *weights):
        def decoder(features):
            return torch.func.functional_call(scene.decoder, dict(zip(names, weights, strict=True)), (features,))

        out = reference.render_rays_ref(scene.representation, planes, decoder, origins, directions, settings, draws)
        return flat_output(out)

    assert torch.autograd.gradcheck(render, inputs, eps=1e-7, atol=1e-4, rtol=1e-4, fast_mode=True)


def fine_depths_of(scene: Scene, rays, settings: RenderingConfig, draws: RenderDraws, monkeypatch) -> torch.Tensor:
    """Return the depths of the second pass."""
    kept = []
    original = reference.importance_depths
    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr(reference, "importance_depths", lambda *args: kept.append(original(*args)) or kept[-1])
        scene.render(rays, settings, draws)
    return kept[0]


@only_reference
def test_render_gradients_with_importance_equal_those_with_fixed_depths(monkeypatch):
    scene, rays, settings = Scene("dual_spherical"), rays_at_the_box(1, 3), config()
    draws = draw(rays, settings)
    gradients = []
    for fixed in (None, fine_depths_of(scene, rays, settings, draws, monkeypatch)):
        if fixed is not None:
            monkeypatch.setattr(reference, "importance_depths", lambda *_args, fixed=fixed: fixed)
        leaves = [x.clone().requires_grad_() for x in rays]
        flat_output(scene.render(leaves, settings, draws)).sum().backward()
        gradients.append([x.grad for x in leaves])
    for ours, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, expected, rtol=0, atol=0)  # the same computation


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("axis", range(3))
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_render_a_ray_along_an_axis_through_the_origin_has_finite_gradients(axis, sign, dtype):
    scene = Scene("dual_spherical", dtype=dtype)
    direction = torch.zeros(1, 1, 3, dtype=dtype)
    direction[..., axis] = sign
    rays = [(-2 * direction).requires_grad_(), direction.clone().requires_grad_()]
    # Without jitter the samples are at -0.5, -0.25, 0, ...: on a pole or a seam of a sphere, and at the origin.
    settings = config(5, 4, ray_start=1.5, ray_end=2.5)
    draws = RenderDraws(
        coarse_jitter=torch.zeros(1, 1, 5, dtype=dtype),
        importance=torch.tensor([[[0.0, 0.3, 0.5, 0.9]]], dtype=dtype),
    )
    scene.planes.requires_grad_()
    out = scene.render(rays, settings, draws)
    assert all(x.isfinite().all() for x in out)
    flat_output(type(out)(*(x.double() for x in out))).sum().backward()
    for tensor in (*rays, scene.planes, *scene.decoder.parameters()):
        assert tensor.grad.isfinite().all()
    assert rays[0].grad.abs().sum() > 0


# Refusals.


@pytest.mark.parametrize(
    ("origins", "directions"),
    [((1, 4, 3), (1, 5, 3)), ((4, 3), (4, 3)), ((1, 4, 2), (1, 4, 2)), ((2, 4, 3), (1, 4, 3))],
)
def test_render_other_shapes_raise_value_error(origins, directions):
    with pytest.raises(ValueError, match=r"ray_origins, ray_directions.*\[B, R, 3\]"):
        Scene().render((torch.zeros(origins), torch.zeros(directions)), config())


@pytest.mark.parametrize("num_coarse", [2, 3])
def test_rendering_config_too_few_samples_for_importance_raise_value_error(num_coarse):
    with pytest.raises(ValueError, match=rf"depth_resolution.*at least 4 with importance.*{num_coarse}"):
        config(num_coarse, 5)


def test_renderer_has_no_parameters():
    assert not Scene().renderer.state_dict()


def test_render_opaque_scene_depth_is_that_of_the_surface():
    scene, settings = Scene(), config(96, 96, ray_start=2.0, ray_end=3.4)

    class Ball(torch.nn.Module):
        """Density inside a ball of radius 0.3, from features that are the coordinates."""

        def forward(self, features):
            radius = features[..., :3].norm(dim=-1)
            return 1e4 * (0.3 - radius), features

    representation = lambda _planes, points: F.pad(points / 2, (0, 29))  # noqa: E731
    rays = (torch.tensor([[[0, 0, 2.7], [0.1, 0, 2.7]]]).double(), torch.tensor([[[0, 0, -1.0]] * 2]).double())
    out = reference.render_rays_ref(representation, scene.planes, Ball(), *rays, settings, draw(rays, settings))
    expected = 2.7 - torch.tensor([[[0.3], [math.sqrt(0.3**2 - 0.1**2)]]], dtype=torch.float64)
    torch.testing.assert_close(out.depth, expected, rtol=0, atol=0.015)  # coarse samples are 0.015 apart
    torch.testing.assert_close(out.accumulation, torch.ones(1, 2, 1).double(), rtol=0, atol=1e-6)  # opaque
