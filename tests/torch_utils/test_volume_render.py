"""The fused renderer and field query equal their references, in value and gradient, for every setting and layout."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F

from torch_utils import native
from torch_utils.ops import volume_render as fused
from torch_utils.ops.volume_render import query_field, unsupported, volume_render
from training.config import DecoderConfig, RenderingConfig
from training.representations import Representation, make_representation
from training.volumetric_rendering.decoder import OSGDecoder
from training.volumetric_rendering.reference import RenderDraws, query_field_ref, render_rays_ref
from training.volumetric_rendering.renderer import ImportanceRenderer

pytestmark = pytest.mark.skipif(native.load() is None, reason=f"no native kernels: {native.reason()}")

SHAPES = {"dual_spherical": (3, (2, 3)), "tri_plane": (1, (3,)), "tri_grid": (2, (3,))}
AUTO = {"ray_start": "auto", "ray_end": "auto"}
EXACT = {"rtol": 1e-10, "atol": 1e-10}  # float64, the same formulas in another order
LARGEST = 1e-4  # float32, of the largest value
GRADIENT_L2, GRADIENT_COSINE = 1e-3, 0.99999  # float32


class Case(NamedTuple):
    """A field, rays through it and random numbers."""

    representation: Representation
    planes: torch.Tensor
    decoder: OSGDecoder
    origins: torch.Tensor
    directions: torch.Tensor
    config: RenderingConfig
    draws: RenderDraws

    def to(self, dtype: torch.dtype) -> Case:
        draws = {k: None if v is None else v.to(dtype) for k, v in vars(self.draws).items()}
        tensors = (x.to(dtype) for x in (self.origins, self.directions))
        decoder = OSGDecoder(*self.widths(), DecoderConfig(activation=self.decoder.activation)).to(dtype)
        decoder.load_state_dict(self.decoder.state_dict())
        return Case(self.representation, self.planes.to(dtype), decoder, *tensors, self.config, RenderDraws(**draws))

    def widths(self) -> tuple[int, int]:
        return self.decoder.net[0].weight.shape[1], self.decoder.net[2].weight.shape[0] - 1


def make_case(
    name: str = "dual_spherical",
    activation: str = "none",
    *,
    batch: int = 2,
    rays: int = 19,
    size: int = 9,
    channels: int = 32,
    outputs: int = 32,
    samples: tuple[int, int] = (9, 7),
    **rendering: Any,
) -> Case:
    """Return a case in float64 in which about half of the volume is dense."""
    generator = torch.Generator().manual_seed(0)
    depth, stack = SHAPES[name]
    inner = (depth, size, size + 1) if name == "tri_grid" else (size, size + 1)
    planes = 1.5 * torch.randn(batch, *stack, channels, *inner, generator=generator, dtype=torch.float64)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        decoder = OSGDecoder(channels, outputs, DecoderConfig(activation=activation)).double()
    for layer in (decoder.net[0], decoder.net[2]):
        layer.bias.data = torch.randn(layer.bias.shape, generator=generator, dtype=torch.float64)
    decoder.net[2].weight.data[0] *= 16
    origins = F.normalize(torch.randn(batch, 1, 3, generator=generator, dtype=torch.float64), dim=-1) * 2.7
    targets = 0.8 * torch.rand(batch, rays, 3, generator=generator, dtype=torch.float64) - 0.4
    config = RenderingConfig(depth_resolution=samples[0], depth_resolution_importance=samples[1], **rendering)
    directions = F.normalize(targets - origins, dim=-1)
    draws = RenderDraws.draw(directions, config, generator)
    origins = origins.expand_as(directions)
    return Case(make_representation(name, depth), planes, decoder, origins, directions, config, draws)


def values_and_gradients(render: Callable, case: Case) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Return the outputs, and the gradients of a random combination of them: planes, rays, decoder."""
    leaves = [x.detach().clone().requires_grad_() for x in (case.planes, case.origins, case.directions)]
    planes, *rays = leaves
    out = render(case.representation, planes, case.decoder, *rays, case.config, case.draws)
    return list(out), gradients_of_mixture(out, [*leaves, *case.decoder.parameters()])


def gradients_of_mixture(outputs, leaves) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    total = sum((x * torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.dtype)).sum() for x in outputs)
    return list(torch.autograd.grad(total, leaves))


def assert_equal_in_float64(ours, expected) -> None:
    for a, b in zip(itertools.chain(*ours), itertools.chain(*expected), strict=True):
        scale = b.abs().max().clamp(min=1)
        torch.testing.assert_close(a / scale, b / scale, **EXACT)


def assert_close_in_float32(ours, expected) -> None:
    for a, b in zip(ours[0], expected[0], strict=True):
        assert a.dtype == torch.float32
        assert ((a - b).abs().max() <= LARGEST * b.abs().max()).item()
    for a, b in zip(ours[1], expected[1], strict=True):
        assert (a - b).norm() <= GRADIENT_L2 * b.norm()
        assert F.cosine_similarity(a.flatten().double(), b.flatten().double(), dim=0) >= GRADIENT_COSINE


SETTINGS = {
    "plain": {},
    "no importance": {"samples": (9, 0)},
    "fewest": {"samples": (4, 1)},
    "more than a block of points": {"samples": (70, 71), "rays": 3},
    "no crop": {"crop_margin": None},
    "white": {"white_back": True},
    "noise": {"density_noise": 0.7},
    "auto": {**AUTO, "crop_margin": None},
    "auto without importance": {**AUTO, "samples": (9, 0)},
    "disparity": {"disparity_space_sampling": True},
    "large box": {"box_warp": 1.7},
    "depth of the batch": {"depth_clamp": "batch"},
    "one ray": {"rays": 1, "batch": 1},
    "many rays": {"rays": 300, "samples": (5, 4)},
    "8 channels": {"channels": 8, "outputs": 3},
    "40 channels": {"channels": 40, "outputs": 17},
}


@pytest.mark.parametrize("activation", ["none", "sigmoid", "lrelu"])
@pytest.mark.parametrize("name", SHAPES)
def test_volume_render_every_field_equals_the_reference(name, activation):
    case = make_case(name, activation)
    expected = values_and_gradients(render_rays_ref, case)
    assert expected[0][2].max() > 0.3  # something is there to see
    assert_equal_in_float64(values_and_gradients(volume_render, case), expected)
    single = case.to(torch.float32)
    assert_close_in_float32(values_and_gradients(volume_render, single), values_and_gradients(render_rays_ref, single))


@pytest.mark.parametrize("fields", SETTINGS.values(), ids=SETTINGS)
def test_volume_render_every_setting_equals_the_reference(fields):
    for activation in ("none", "sigmoid"):
        case = make_case(activation=activation, **fields)
        assert_equal_in_float64(values_and_gradients(volume_render, case), values_and_gradients(render_rays_ref, case))


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("activation", ["none", "sigmoid", "lrelu"])
def test_query_field_equals_the_reference(name, activation):
    case = make_case(name, activation)
    generator = torch.Generator().manual_seed(3)
    points = 0.6 * (2 * torch.rand(2, 333, 3, generator=generator, dtype=torch.float64) - 1)  # some outside the box
    noise = torch.randn(2, 333, generator=generator, dtype=torch.float64)

    def run(query: Callable, dtype: torch.dtype):
        cast = case.to(dtype)
        cast = cast._replace(config=dataclasses.replace(case.config, density_noise=0.3))
        leaves = [x.detach().to(dtype).requires_grad_() for x in (cast.planes, points)]
        out = query(cast.representation, leaves[0], cast.decoder, leaves[1], cast.config, noise.to(dtype))
        return list(out), gradients_of_mixture(out, [*leaves, *cast.decoder.parameters()])

    assert_equal_in_float64(run(query_field, torch.float64), run(query_field_ref, torch.float64))
    assert_close_in_float32(run(query_field, torch.float32), run(query_field_ref, torch.float32))


def test_query_field_without_colors_gives_the_same_density_and_gradients():
    case, points = make_case(), torch.rand(2, 50, 3, dtype=torch.float64) - 0.5
    found = []
    for need_colors in (True, False):
        leaves = [x.detach().clone().requires_grad_() for x in (case.planes, points)]
        sigma, colors = query_field(
            case.representation, leaves[0], case.decoder, leaves[1], case.config, need_colors=need_colors
        )
        assert (colors is not None) == need_colors
        found.append([sigma, *torch.autograd.grad(sigma.square().sum(), [*leaves, *case.decoder.parameters()])])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)  # the same kernel


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_query_field_at_poles_seams_and_origin_is_near_the_reference_with_finite_gradients(dtype):
    case = make_case(batch=1).to(dtype)
    near = 10.0 ** -torch.arange(1, 44, 6, dtype=torch.float64)
    axes = torch.cat([sign * unit * near[:, None] for sign in (1, -1) for unit in torch.eye(3, dtype=torch.float64)])
    on_axes = torch.cat([torch.eye(3), -torch.eye(3), torch.zeros(1, 3)]).double() * 0.3
    beside = torch.cat([on_axes + 1e-6 * unit for unit in torch.eye(3, dtype=torch.float64)])
    points = torch.cat([axes, on_axes, beside])[None].to(dtype).requires_grad_()
    sigma, colors = query_field(case.representation, case.planes, case.decoder, points, case.config)
    (sigma.sum() + colors.sum()).backward()
    assert points.grad.isfinite().all()
    expected, _ = query_field_ref(case.representation, case.planes, case.decoder, points, case.config)
    # Angles beside a pole move by the rounding of the position over its distance: the band is wide in float32.
    torch.testing.assert_close(sigma, expected, rtol=0, atol=2e-3 if dtype == torch.float32 else 1e-8)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_volume_render_half_planes_are_computed_with_in_float32(dtype):
    case = make_case().to(torch.float32)
    rounded = case.planes.to(dtype)
    exact = values_and_gradients(volume_render, case._replace(planes=rounded.float()))
    ours = values_and_gradients(volume_render, case._replace(planes=rounded))
    for a, b in zip(ours[0], exact[0], strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)  # the same computation
    assert ours[1][0].dtype == dtype
    torch.testing.assert_close(ours[1][0], exact[1][0].to(dtype), rtol=0, atol=0)


@pytest.mark.parametrize("name", SHAPES)
def test_volume_render_memory_order_of_planes_does_not_matter(name):
    case = make_case(name)
    expected = values_and_gradients(volume_render, case)
    image = case.planes.flatten(1, -3 if name != "tri_grid" else -3)  # as the backbone makes it
    layouts = [image.contiguous(memory_format=torch.channels_last), image.transpose(2, 3).contiguous().transpose(2, 3)]
    for layout in layouts:
        planes = (
            layout.reshape(case.planes.shape) if name == "tri_grid" else layout.unflatten(1, case.planes.shape[1:-2])
        )
        ours = values_and_gradients(volume_render, case._replace(planes=planes))
        for a, b in zip(itertools.chain(*ours), itertools.chain(*expected), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0)  # the same numbers from other addresses


def test_prepare_planes_puts_channels_last_once():
    case = make_case()
    planes = fused.prepare_planes(case.representation, case.planes)
    assert planes.equal(case.planes) and planes.stride(3) == 1 and case.planes.stride(3) != 1
    assert fused.prepare_planes(case.representation, planes) is planes


@pytest.mark.parametrize("wanted", ["planes", "rays", "decoder"])
def test_volume_render_gradients_one_alone_equals_that_of_all(wanted):
    case = make_case()
    _, gradients = values_and_gradients(volume_render, case)
    groups = {"planes": gradients[:1], "rays": gradients[1:3], "decoder": gradients[3:]}
    leaves = {
        "planes": [case.planes.clone()],
        "rays": [case.origins.clone(), case.directions.clone()],
        "decoder": list(case.decoder.parameters()),
    }
    for group, tensors in leaves.items():
        for tensor in tensors:
            tensor.requires_grad_(group == wanted)
    out = volume_render(case.representation, *leaves["planes"], case.decoder, *leaves["rays"], case.config, case.draws)
    for a, b in zip(gradients_of_mixture(out, leaves[wanted]), groups[wanted], strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)  # the same computation


def test_volume_render_result_is_the_same_for_every_number_of_threads():
    case = make_case(rays=400, samples=(6, 5), activation="sigmoid").to(torch.float32)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            with torch.random.fork_rng(devices=[]):
                torch.use_deterministic_algorithms(True)
                results.append(values_and_gradients(volume_render, case))
    finally:
        torch.use_deterministic_algorithms(False)
        torch.set_num_threads(before)
    for other in results[1:]:
        for a, b in zip(itertools.chain(*results[0]), itertools.chain(*other), strict=True):
            assert a.equal(b)


def test_volume_render_keeps_nothing_for_the_backward_pass_but_its_arguments():
    case, kept = make_case(), []
    planes = case.planes.clone().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        volume_render(case.representation, planes, case.decoder, case.origins, case.directions, case.config, case.draws)
    samples = case.directions.shape[0] * case.directions.shape[1] * 16
    assert len(kept) > 5 and sum(kept) < planes.numel() + 30 * samples  # samples x channels would be 32 x samples each


def test_volume_render_nan_stays_in_its_scene():
    case = make_case().to(torch.float32)
    planes = case.planes.clone()
    planes[0] = torch.nan
    case = case._replace(planes=planes)
    (features, depth, opacity), gradients = values_and_gradients(volume_render, case)
    assert features[0].isnan().any() and features[1].isfinite().all() and opacity[1].isfinite().all()
    assert gradients[1][1].isfinite().all()  # origins of the other scene
    directions = case.directions.clone()
    directions[1, 0] = torch.nan
    (features, *_), _ = values_and_gradients(volume_render, case._replace(directions=directions))
    assert features[1, 1:].isfinite().all()


def test_volume_render_no_rays_give_empty_results():
    case = make_case(rays=0)
    (features, depth, opacity), gradients = values_and_gradients(volume_render, case)
    assert features.shape == (2, 0, 32) and depth.shape == opacity.shape == (2, 0, 1)
    assert all((g == 0).all() for g in gradients)


def op_arguments(case: Case) -> tuple:
    """Return what the registered op is called with."""
    caught = []

    class Catch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function is torch.ops.spherehead.volume_render.default:
                caught.append(args)
            return function(*args, **(kwargs or {}))

    with Catch(), torch.no_grad():
        volume_render(case.representation, *case[1:])
    return caught[0]


def test_registered_op_passes_opcheck():
    arguments = op_arguments(make_case(rays=2, samples=(5, 4), size=4, density_noise=0.1))
    arguments = tuple(x.detach().requires_grad_() if isinstance(x, torch.Tensor) else x for x in arguments[:9])
    arguments += op_arguments(make_case(rays=2, samples=(5, 4), size=4, density_noise=0.1))[9:]
    torch.library.opcheck(torch.ops.spherehead.volume_render.default, arguments)


def test_registered_ops_without_kernels_are_the_reference():
    case = make_case(rays=3)
    arguments = op_arguments(case)
    leaves = [x.detach().clone().requires_grad_() for x in arguments[:9]]
    found = []
    for context in (native.disabled(), torch.enable_grad()):
        with context:
            out = torch.ops.spherehead.volume_render(*leaves, *arguments[9:])
            found.append([*out, *gradients_of_mixture(out[:3], leaves)])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)  # float64, two implementations


def test_volume_render_compiles_without_graph_breaks():
    case = make_case(rays=3)

    def loss(planes: torch.Tensor) -> torch.Tensor:
        return volume_render(case.representation, planes, *case[2:]).features.square().sum()

    planes = [case.planes.clone().requires_grad_() for _ in range(2)]
    loss(planes[0]).backward()
    torch.compile(loss, backend="aot_eager", fullgraph=True)(planes[1]).backward()
    torch.testing.assert_close(planes[0].grad, planes[1].grad, **EXACT)


# What has no kernel, and what is wrong.


class Unknown(Representation):
    """A representation that no kernel knows."""


def test_unsupported_gives_the_reason():
    case = make_case()

    def reason(**changes: Any) -> str | None:
        changed = case._replace(**changes)
        return unsupported(changed.representation, changed.planes, changed.decoder, changed.config)

    assert reason() is None
    assert "Unknown" in reason(representation=Unknown(1))
    assert "12 channels" in reason(planes=case.planes[:, :, :, :12])
    assert "Identity" in reason(decoder=torch.nn.Identity())
    assert "samples" in reason(config=dataclasses.replace(case.config, depth_resolution=2**15))
    assert "empty" in reason(planes=case.planes[:0])
    assert "int64" in reason(planes=case.planes.long())
    with native.disabled():
        assert reason() is not None


def test_renderer_auto_takes_the_reference_where_there_is_no_kernel_and_fused_refuses():
    case = make_case()
    renderer = ImportanceRenderer(case.representation)
    with_kernel = renderer(*case[1:])
    with native.disabled():
        without = renderer(*case[1:])
        with pytest.raises(ValueError, match="renderer.*'fused' cannot run here"):
            renderer.choose("fused")
    assert_equal_in_float64([with_kernel], [without])
    with pytest.raises(ValueError, match="renderer.*auto or fused or reference.*fast"):
        renderer.choose("fast")
    renderer.choose("fused")
    with pytest.raises(ValueError, match="renderer.*12 channels"):
        renderer(case.planes[:, :, :, :12], *case[2:])


@pytest.mark.parametrize(
    ("field", "change", "message"),
    [
        ("origins", lambda x: x[:, 1:], r"ray_origins, ray_directions.*\(2, R, 3\)"),
        ("directions", lambda x: x[..., :2], r"ray_origins, ray_directions.*\(2, R, 3\)"),
        ("origins", lambda x: x[:1], r"ray_origins, ray_directions.*\(2, R, 3\)"),
        ("planes", lambda x: x.float(), r"rays.*float32.*float64"),
        ("draws", lambda x: dataclasses.replace(x, importance=None), r"importance.*\(2, 19, 7\).*None"),
        (
            "draws",
            lambda x: dataclasses.replace(x, coarse_jitter=x.coarse_jitter[:, :4]),
            r"coarse_jitter.*\(2, 4, 9\)",
        ),
    ],
)
def test_volume_render_arguments_that_do_not_fit_raise_value_error(field, change, message):
    case = make_case()
    with pytest.raises(ValueError, match=message):
        volume_render(*case._replace(**{field: change(getattr(case, field))}))


def test_query_field_arguments_that_do_not_fit_raise_value_error():
    case = make_case()
    for points in (torch.zeros(2, 3), torch.zeros(1, 4, 3), torch.zeros(2, 4, 2)):
        with pytest.raises(ValueError, match="points.*'M', 3"):
            query_field(case.representation, case.planes, case.decoder, points.double(), case.config)
    with pytest.raises(ValueError, match=r"noise.*\(2, 4\).*\(2, 5\)"):
        points, noise = torch.zeros(2, 4, 3).double(), torch.zeros(2, 5).double()
        query_field(case.representation, case.planes, case.decoder, points, case.config, noise)
