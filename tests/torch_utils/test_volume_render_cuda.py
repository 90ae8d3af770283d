"""CUDA kernels of the volume renderer: they compile, and equal the reference when they run on an imitated GPU.

The imitation (tests/native/cuda_emulation.h) runs the kernels themselves as C++ of the host. On a machine with a GPU
the tests marked gpu run as well; run those once under compute-sanitizer, which sees what an imitation cannot:

    compute-sanitizer --tool memcheck python -m pytest tests/torch_utils/test_volume_render_cuda.py -m gpu
    compute-sanitizer --tool racecheck python -m pytest tests/torch_utils/test_volume_render_cuda.py -m gpu
"""

from __future__ import annotations

import ctypes
import hashlib
import itertools
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F

from torch_utils import native
from torch_utils.ops import volume_render_cuda as cuda
from torch_utils.ops import volume_render_ops as ops
from torch_utils.ops.volume_render_native import Options
from training.config import RenderingConfig

SOURCES = sorted(native.SOURCE_DIR.glob("*_cuda.cu"))
SHARED_BYTES, PROCESSORS = 228 << 10, 3
LARGEST = 1e-4  # float32, of the largest value
GRADIENT_L2, GRADIENT_COSINE = 1e-3, 0.99999  # float32
ALL_NEEDED = (True, True, True)
PLANES_SHAPES = {"dual_spherical": (2, 3), "tri_plane": (3,), "tri_grid": (3,)}


# ---- the imitated GPU ----


@pytest.fixture(scope="module")
def emulation(request: pytest.FixtureRequest, repo_root: Path) -> ctypes.CDLL:
    """Build the kernels for the imitated GPU, or take what an earlier session built."""
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("needs g++ or clang++ to build the kernels for the imitated GPU")
    command = [compiler, "-x", "c++", "-std=c++20", "-O1", "-fPIC", "-w", "-I", str(repo_root / "tests" / "native")]
    headers = [
        *native.SOURCE_DIR.glob("*.h"),
        *native.SOURCE_DIR.glob("*.cuh"),
        repo_root / "tests/native/cuda_emulation.h",
    ]
    digest = hashlib.sha256(repr(command).encode())
    for file in (*SOURCES, *sorted(headers)):
        digest.update(file.read_bytes())
    folder = Path(request.config.cache.mkdir("cuda_emulation"))
    library = folder / f"{digest.hexdigest()[:24]}.so"
    if not library.exists():
        for old in folder.iterdir():
            old.unlink(missing_ok=True)
        _build_emulation(command, library)
    return ctypes.CDLL(str(library))


def _build_emulation(command: list[str], library: Path) -> None:
    objects = [library.with_name(f"{source.stem}.{os.getpid()}.o") for source in SOURCES]
    compilations = [
        subprocess.Popen([*command, "-c", str(source), "-o", str(target)])
        for source, target in zip(SOURCES, objects, strict=True)
    ]
    assert [compilation.wait() for compilation in compilations] == [0] * len(SOURCES)
    temp = library.with_suffix(f".{os.getpid()}")
    subprocess.run([command[0], "-shared", *map(str, objects), "-o", str(temp)], check=True)
    temp.rename(library)


@pytest.fixture
def gpu(emulation: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable]:
    """Let the calls of CUDA kernels run on the imitated GPU; gives the function that configures it."""

    def configure(seed: int = 0, shared_bytes: int = SHARED_BYTES, processors: int = PROCESSORS) -> None:
        emulation.cuda_emulation_configure(seed, shared_bytes, processors)

    configure()
    monkeypatch.setattr(cuda, "_launcher", lambda name: emulation[name])
    monkeypatch.setattr(cuda, "_stream", lambda device: None)
    yield configure


@pytest.fixture
def deterministic() -> Iterator[None]:
    """Ask for deterministic algorithms."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


# ---- calls ----


class Call(NamedTuple):
    """Arguments of an op, and gradients of its results."""

    arguments: tuple[torch.Tensor | None, ...]
    gradients: tuple[torch.Tensor, ...]
    options: Options

    def replaced(self, index: int, tensor: torch.Tensor) -> Call:
        arguments = list(self.arguments)
        arguments[index] = tensor
        return self._replace(arguments=tuple(arguments))

    def to(self, device: str) -> Call:
        arguments = tuple(None if x is None else x.to(device) for x in self.arguments)
        return self._replace(arguments=arguments, gradients=tuple(x.to(device) for x in self.gradients))


def make_field(
    name: str, generator: torch.Generator, channels: int, hidden: int, outputs: int, size: tuple[int, ...], batch: int
) -> list[torch.Tensor]:
    """Return smooth planes, channels last, and decoder weights that make about half of the volume dense."""

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    size = size if name == "tri_grid" else size[1:]
    planes = 1.5 * randn(batch, *PLANES_SHAPES[name], *size, channels).movedim(-1, -1 - len(size))
    hidden_weight, output_weight = randn(hidden, channels) * channels**-0.5, randn(1 + outputs, hidden) * hidden**-0.5
    output_weight[0] *= 8
    return [planes, hidden_weight, randn(hidden), output_weight, randn(1 + outputs)]


def make_render(
    name: str = "dual_spherical",
    activation: str = "none",
    *,
    rays: int = 3,
    batch: int = 2,
    samples: tuple[int, int] = (9, 7),
    channels: int = 32,
    hidden: int = 64,
    outputs: int = 32,
    size: tuple[int, int, int] = (2, 9, 10),
    backwards: bool = False,
    **rendering: Any,
) -> Call:
    """Return a call of the renderer."""
    generator = torch.Generator().manual_seed(0)
    field = make_field(name, generator, channels, hidden, outputs, size, batch)
    config = RenderingConfig(depth_resolution=samples[0], depth_resolution_importance=samples[1], **rendering)

    def draw(kind: Callable, count: int) -> torch.Tensor | None:
        return kind(batch, rays, count, generator=generator) if count else None

    origins = F.normalize(torch.randn(batch, 1, 3, generator=generator), dim=-1).repeat(1, rays, 1) * 2.7
    directions = F.normalize(0.8 * torch.rand(batch, rays, 3, generator=generator) - 0.4 - origins, dim=-1)
    limits = [torch.full((batch, rays), limit) for limit in ((3.3, 2.2) if backwards else (2.2, 3.3))]
    draws = [draw(torch.rand, samples[0]), draw(torch.rand, samples[1])]
    draws += [draw(torch.randn, count) if config.density_noise else None for count in samples]
    gradients = [torch.randn(batch, rays, *width, generator=generator) for width in ((outputs,), (), ())]
    options = Options.of(name, activation, config)
    return Call((*field, origins, directions, *limits, *draws), tuple(gradients), options)


def make_query(name: str = "dual_spherical", activation: str = "none", *, points: int = 150, **widths: int) -> Call:
    """Return a call of the field query, with points inside and outside the box, on axes and at the origin."""
    generator = torch.Generator().manual_seed(1)
    shape = {"channels": 32, "hidden": 64, "outputs": 32} | widths
    field = make_field(name, generator, **shape, size=(2, 9, 10), batch=2)
    at = 1.2 * (torch.rand(2, points, 3, generator=generator) - 0.5)
    at[:, :7] = torch.cat([torch.eye(3), -torch.eye(3), torch.zeros(1, 3)]) * 0.3
    noise = torch.randn(2, points, generator=generator)
    gradients = (
        torch.randn(2, points, generator=generator),
        torch.randn(2, points, shape["outputs"], generator=generator),
    )
    options = Options.of(name, activation, RenderingConfig(density_noise=0.3))
    return Call((*field, at, noise), gradients, options)


def render(call: Call, module: Any = cuda, needed: tuple[bool, ...] = ALL_NEEDED) -> tuple[list, list]:
    """Return results and gradients of the kernels, or of the reference."""
    forward, backward = (
        (ops._march, ops._march_backward) if module is ops else (module.volume_render, module.volume_render_backward)
    )
    return list(forward(*call.arguments, *call.options)), backward(
        call.gradients, call.arguments, needed, *call.options
    )


def query(call: Call, module: Any = cuda, need_colors: bool = True) -> tuple[list, list]:
    """Return results and gradients of the kernels, or of the reference."""
    forward, backward = (
        (ops._query, ops._query_backward) if module is ops else (module.query_field, module.query_field_backward)
    )
    gradients = call.gradients if need_colors else (call.gradients[0], None)
    found = backward(gradients, call.arguments[:6], ALL_NEEDED, *call.options)
    return list(forward(*call.arguments, need_colors, *call.options)), found


def assert_close(ours: tuple[list, list], expected: tuple[list, list]) -> None:
    for a, b in zip(ours[0], expected[0], strict=True):
        assert ((a - b).abs().max() <= LARGEST * b.abs().max()).item()
    for a, b in zip(ours[1], expected[1], strict=True):
        assert a.shape == b.shape and (a - b).norm() <= GRADIENT_L2 * b.norm()
        assert F.cosine_similarity(a.flatten().double(), b.flatten().double(), dim=0) >= GRADIENT_COSINE


def assert_renders_like_the_reference(call: Call) -> None:
    ours, expected = render(call), render(call, ops)
    if call.options.disparity_space_sampling:  # limits are constants then
        ours, expected = (ours[0], ours[1][:7]), (expected[0], expected[1][:7])
    assert_close(ours, expected)


def assert_queries_like_the_reference(call: Call) -> None:
    ours, expected = query(call), query(call, ops)
    # On axes and at the origin the gradient has no limit: it is finite, and compared elsewhere.
    assert ours[1][5].isfinite().all()
    for found in (ours, expected):
        found[1][5] = found[1][5][:, 7:]
    assert_close(ours, expected)


def assert_same(ours: tuple[list, list], expected: tuple[list, list]) -> None:
    for a, b in zip(itertools.chain(*ours), itertools.chain(*expected), strict=True):
        assert a.equal(b)


# ---- compiling ----


def compile_with_nvcc(nvcc: str, source: Path, architectures: list[int], folder: Path, *flags: str) -> str:
    """Compile a file for GPUs that are not there, and return what the compiler said."""
    code = [f"-gencode=arch=compute_{number},code=sm_{number}" for number in architectures]
    command = [
        nvcc,
        "-std=c++20",
        "-Xcompiler=-fPIC,-Wall",
        *flags,
        *code,
        "-c",
        str(source),
        "-o",
        str(folder / "x.o"),
    ]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.fixture
def nvcc() -> str:
    """Return the path of nvcc."""
    found = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    if found is None:
        pytest.skip("needs nvcc to compile CUDA kernels")
    return found


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.stem)
def test_kernels_compile_for_one_architecture_without_warnings_or_double_precision(nvcc, source, tmp_path):
    quickly = ("-Xcicc", "-O1", "-Xptxas", "-O1")  # a third of the time
    said = compile_with_nvcc(nvcc, source, [90], tmp_path, *quickly, "--keep", f"--keep-dir={tmp_path}")
    assert "warning" not in said
    (intermediate,) = tmp_path.glob("*.ptx")
    assert ".f32" in (code := intermediate.read_text()) and ".f64" not in code


@pytest.mark.slow
@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.stem)
def test_kernels_compile_for_every_architecture(nvcc, source, tmp_path):
    listed = subprocess.run([nvcc, "--list-gpu-arch"], stdout=subprocess.PIPE, text=True, check=True).stdout
    known = {int(word.removeprefix("compute_")) for word in listed.split()}
    wanted = sorted(known & {70, 75, 80, 86, 89, 90, 100, 120})
    assert "warning" not in compile_with_nvcc(nvcc, source, wanted, tmp_path, "-O3", "--threads=0")


# ---- rendering ----

SETTINGS = {
    "no importance": {"samples": (9, 0)},
    "backwards": {"backwards": True},
    "fewest": {"samples": (4, 1)},
    "several warps of samples": {"samples": (37, 35), "rays": 2},
    "more samples than threads": {"samples": (150, 120), "rays": 1, "batch": 1},
    "no crop": {"crop_margin": None},
    "everything cropped": {"crop_margin": 0.5, "expect_nothing": True},
    "noise": {"density_noise": 0.7},
    "disparity": {"disparity_space_sampling": True},
    "large box": {"box_warp": 1.7},
    "fewer rays than blocks": {"rays": 1, "batch": 1},
    "more rays than blocks": {"rays": 9, "samples": (5, 4)},
    "8 channels": {"channels": 8, "outputs": 3, "hidden": 16},
    "40 channels": {"channels": 40, "outputs": 33, "hidden": 70},
    "256 channels": {"channels": 256, "outputs": 256, "hidden": 256, "rays": 1, "samples": (4, 3), "size": (1, 3, 4)},
}


@pytest.mark.parametrize("activation", ["none", "sigmoid", "lrelu"])
@pytest.mark.parametrize("name", PLANES_SHAPES)
def test_volume_render_every_field_equals_the_reference(gpu, name, activation):
    call = make_render(name, activation)
    expected = render(call, ops)
    assert expected[0][2].max() > 0.3  # something is there to see
    assert_close(render(call), expected)


@pytest.mark.parametrize("fields", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("activation", ["none", "sigmoid"])
def test_volume_render_every_setting_equals_the_reference(gpu, activation, fields):
    fields = dict(fields)
    if fields.pop("expect_nothing", False):
        (features, depth, opacity, _), gradients = render(make_render(activation=activation, **fields))
        assert not features.any() and not depth.any() and not opacity.any()
        assert all((g.abs() < 1e-30).all() for g in gradients)  # the density that is left is exp(-87)
        return
    assert_renders_like_the_reference(make_render(activation=activation, **fields))


@pytest.mark.parametrize("name", PLANES_SHAPES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_volume_render_half_planes_equal_float_planes_of_the_same_values(gpu, deterministic, name, dtype):
    call = make_render(name, rays=3)
    rounded = call.arguments[0].to(dtype)
    (ours, gradients), (exact, of_exact) = render(call.replaced(0, rounded)), render(call.replaced(0, rounded.float()))
    assert gradients[0].dtype == dtype
    assert_same((ours, gradients[:1]), (exact, [of_exact[0].to(dtype)]))
    # Sums over channels are divided among other numbers of lanes.
    assert_close(([], gradients[1:]), ([], of_exact[1:]))


def test_volume_render_deterministic_mode_repeats_every_bit(gpu, deterministic):
    call = make_render(activation="sigmoid", rays=6)
    results = []
    for seed in range(3):
        gpu(seed=seed)  # the order of threads
        results.append(render(call))
    assert_close(results[0], render(call, ops))
    for other in results[1:]:
        assert_same(other, results[0])


def test_volume_render_order_of_threads_changes_only_the_rounding_of_plane_gradients(gpu):
    results = []
    for seed in range(3):
        gpu(seed=seed)
        results.append(render(make_render(rays=6)))
    for outputs, (of_planes, *others) in results[1:]:
        assert_same((outputs, others), (results[0][0], results[0][1][1:]))
        torch.testing.assert_close(of_planes, results[0][1][0], rtol=1e-4, atol=1e-5)  # the order of float sums


@pytest.mark.parametrize("gradient", [torch.inf, torch.nan])
def test_volume_render_deterministic_mode_passes_infinities_and_nan(gpu, deterministic, gradient):
    call = make_render()
    features = call.gradients[0].clone()
    features[0, 0, 0] = gradient
    _, (of_planes, *_) = render(call._replace(gradients=(features, *call.gradients[1:])))
    assert not of_planes[0].isfinite().all() and of_planes[1].isfinite().all()


@pytest.mark.parametrize("scale", [1e-30, 1e20])
def test_volume_render_deterministic_mode_follows_the_scale_of_gradients(gpu, deterministic, scale):
    call = make_render()
    _, (plain, *_) = render(call)
    _, (scaled, *_) = render(call._replace(gradients=tuple(g * scale for g in call.gradients)))
    torch.testing.assert_close(scaled / scale, plain, rtol=1e-4, atol=1e-6 * plain.abs().max().item())  # float32


@pytest.mark.parametrize("shared_bytes", [16 << 10, 64 << 10])
@pytest.mark.parametrize("activation", ["none", "sigmoid"])
def test_volume_render_little_shared_memory_changes_nothing(gpu, deterministic, activation, shared_bytes):
    call = make_render(activation=activation, samples=(37, 35), rays=2)
    expected = render(call)
    gpu(shared_bytes=shared_bytes)
    assert_same(render(call), expected)


@pytest.mark.parametrize("alone", range(3), ids=["planes", "decoder", "rays"])
def test_volume_render_gradients_one_alone_equals_that_of_all(gpu, deterministic, alone):
    call = make_render()
    needed = tuple(i == alone for i in range(3))
    groups = slice(0, 1), slice(1, 5), slice(5, 9)
    _, ours = render(call, needed=needed)
    _, everything = render(call)
    assert_same(([], ours[groups[alone]]), ([], everything[groups[alone]]))
    assert all(g.numel() == 0 for i, group in enumerate(groups) if i != alone for g in ours[group])


def test_volume_render_planes_at_odd_addresses_are_read(gpu, deterministic):
    call = make_render()
    planes = call.arguments[0]
    expected = render(call)
    wider = torch.full((*planes.shape[:3], *planes.shape[4:], 35), torch.nan).movedim(-1, 3)
    odd = wider[:, :, :, 3:]
    odd.copy_(planes)
    shifted = torch.empty(planes.numel() + 1)[1:].view(*planes.shape[:3], *planes.shape[4:], 32).movedim(-1, 3)
    shifted.copy_(planes)
    for other in (odd, shifted):
        assert_same(render(call.replaced(0, other)), expected)


def test_volume_render_backward_workspace_does_not_grow_with_rays(gpu, monkeypatch):
    sizes = []

    def note(name: str, *arguments: Any) -> int:
        sizes.append(count(name, *arguments))
        raise InterruptedError  # before anything runs

    count = cuda._workspace_bytes
    monkeypatch.setattr(cuda, "_workspace_bytes", note)
    for rays in (10, 1000):
        call = make_render(rays=rays)
        with pytest.raises(InterruptedError):
            cuda.volume_render_backward(call.gradients, call.arguments, ALL_NEEDED, *call.options)
    assert sizes[0] == sizes[1] < 1 << 20


def test_volume_render_nan_stays_in_its_scene(gpu):
    call = make_render()
    planes = call.arguments[0].clone()
    planes[0] = torch.nan
    (features, *_), (of_planes, *_) = render(call.replaced(0, planes))
    assert features[0].isnan().any() and features[1].isfinite().all() and of_planes[1].isfinite().all()
    directions = call.arguments[6].clone()
    directions[1, 0] = torch.nan
    (features, *_), _ = render(call.replaced(6, directions))
    assert features[1, 1:].isfinite().all()


def test_volume_render_no_rays_give_empty_results(gpu):
    (features, depth, opacity, depth_range), gradients = render(make_render(rays=0))
    assert features.shape == (2, 0, 32) and depth.shape == opacity.shape == (2, 0) and depth_range.shape == (2, 0, 2)
    assert not any(g.any() for g in gradients)


def test_kernels_too_wide_or_of_other_dtypes_are_left_to_the_reference(gpu):
    assert cuda.volume_render(*(wide := make_render(hidden=257)).arguments, *wide.options) is None
    double = make_render().replaced(1, make_render().arguments[1].double())
    assert cuda.volume_render(*double.arguments, *double.options) is None
    assert not cuda.is_available(torch.float64)


# ---- queries ----


@pytest.mark.parametrize("activation", ["none", "sigmoid", "lrelu"])
@pytest.mark.parametrize("name", PLANES_SHAPES)
def test_query_field_equals_the_reference(gpu, name, activation):
    assert_queries_like_the_reference(make_query(name, activation))


@pytest.mark.parametrize(
    "widths", [{"channels": 8, "hidden": 16, "outputs": 3}, {"channels": 40, "hidden": 70, "outputs": 33}]
)
def test_query_field_other_widths_equal_the_reference(gpu, deterministic, widths):
    call = make_query("tri_plane", "sigmoid", **widths)
    assert_close(query(call), query(call, ops))


def test_query_field_without_colors_equals_the_reference(gpu):
    call = make_query("tri_grid")
    (sigma, colors), gradients = query(call, need_colors=False)
    (expected, _), expected_gradients = query(call, ops, need_colors=False)
    assert colors.numel() == 0
    assert_close(([sigma], gradients[:3]), ([expected], expected_gradients[:3]))
    assert_close(([], gradients[5:]), ([], expected_gradients[5:]))
    assert_close(([], [gradients[3][0], gradients[4][:1]]), ([], [expected_gradients[3][0], expected_gradients[4][:1]]))
    assert not gradients[3][1:].any() and not gradients[4][1:].any()


# ---- a real GPU ----


@pytest.mark.gpu
@pytest.mark.parametrize("activation", ["none", "sigmoid", "lrelu"])
@pytest.mark.parametrize("name", PLANES_SHAPES)
def test_volume_render_on_a_gpu_equals_the_reference(name, activation):
    call = make_render(name, activation, rays=300, samples=(48, 48), size=(3, 64, 64)).to("cuda")
    assert_close(render(call), render(call, ops))


@pytest.mark.gpu
@pytest.mark.parametrize("fields", [fields for fields in SETTINGS.values() if "expect_nothing" not in fields])
def test_volume_render_on_a_gpu_every_setting_equals_the_reference(fields):
    assert_renders_like_the_reference(make_render(activation="sigmoid", **fields).to("cuda"))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_volume_render_on_a_gpu_half_planes_equal_float_planes_of_the_same_values(deterministic, dtype):
    call = make_render(rays=300, samples=(48, 48)).to("cuda")
    rounded = call.arguments[0].to(dtype)
    (ours, _), (exact, _) = render(call.replaced(0, rounded)), render(call.replaced(0, rounded.float()))
    assert_same((ours, []), (exact, []))


@pytest.mark.gpu
def test_volume_render_on_a_gpu_deterministic_mode_repeats_every_bit(deterministic):
    call = make_render(rays=2000, samples=(48, 48)).to("cuda")
    first = render(call)
    for _ in range(3):
        assert_same(render(call), first)


@pytest.mark.gpu
@pytest.mark.parametrize("name", PLANES_SHAPES)
def test_query_field_on_a_gpu_equals_the_reference(name):
    assert_queries_like_the_reference(make_query(name, "sigmoid", points=5000).to("cuda"))
