"""The pyramid distance is its formula, smooth, and leads back from afar; the VGG distance is the published loss."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from torch.nn import functional

from training.perceptual import PyramidDistance, VggDistance, limit_size, load_perceptual_distance


def picture(seed: int, size: int = 64, blur: int = 9) -> torch.Tensor:
    """Return a smooth random picture `[1, 3, size, size]` in [-1, 1]."""
    noise = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(seed))
    smooth = functional.avg_pool2d(noise, blur, 1, blur // 2)
    return (smooth / smooth.std() * 0.4).clamp(-1, 1)


def pyramid(image: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    distance = PyramidDistance()
    return distance.distance(image, distance.features(target))


# The pyramid distance is its formula ----------------------------------------------------------------------------------


def window_means(x: np.ndarray) -> np.ndarray:
    """Return the window W of `[H, W]` by its taps."""
    taps = np.array([1, 1, 2, 2, 1, 1]) / 8
    x = x[: x.shape[0] // 2 * 2, : x.shape[1] // 2 * 2]
    x = np.pad(x, 2, mode="symmetric")
    for _ in range(2):  # along one axis, then along the other
        starts = range(0, len(x) - 5, 2)
        x = np.stack([np.tensordot(taps, x[start : start + 6], 1) for start in starts]).T
    return x


def structure_tensor(luma: np.ndarray) -> np.ndarray:
    """Return `[H // 2, W // 2, 2, 2]`."""
    gradient = [luma[1:, 1:] - luma[:-1, :-1], luma[:-1, 1:] - luma[1:, :-1]]
    return np.moveaxis(np.array([[window_means(a * b) for a in gradient] for b in gradient]), (0, 1), (2, 3))


def written_out(image: np.ndarray, target: np.ndarray, num_levels: int) -> float:
    """Return the distance of `[3, H, W]` by the docstring, one channel and one window at a time."""
    luma_chroma = np.array([[0.299, 0.587, 0.114], [-0.168736, -0.331264, 0.5], [0.5, -0.418688, -0.081312]])
    x, y = (list(np.tensordot(luma_chroma, picture, 1)) for picture in (image, target))
    terms = {"S": [], "E": [], "H": [], "K": []}
    for level in range(num_levels):
        errors = []
        for a, b in zip(x, y):
            var_a, var_b, var_ab = (window_means(v**2) - window_means(v) ** 2 for v in (a, b, a - b))
            errors.append((var_ab / (var_a + var_b + 0.12**2)).mean())
        tensor_x, tensor_y = structure_tensor(x[0]), structure_tensor(y[0])
        norm = [(tensor**2).sum((2, 3)) for tensor in (tensor_x - tensor_y, tensor_x, tensor_y)]
        terms["S"].append(errors[0])
        terms["E"].append((norm[0] / (norm[1] + norm[2] + 2e-4**2)).mean())
        if level > 0:
            square = sum((a - b) ** 2 for a, b in zip(x, y))
            terms["H"].append(np.mean(errors[1:]))
            terms["K"].append((np.sqrt(square + 0.05**2) - 0.05).mean())
        x, y = [window_means(a) for a in x], [window_means(b) for b in y]
    means = {name: np.mean(values) for name, values in terms.items()}
    return 0.65 * means["S"] + 0.2 * means["E"] + 0.25 * means["H"] + 0.4 * means["K"]


@pytest.mark.parametrize(("size", "num_levels"), [((32, 32), 3), ((16, 24), 2), ((37, 50), 3)])
def test_pyramid_distance_is_its_formula(size, num_levels):
    generator = torch.Generator().manual_seed(0)
    image, target = torch.rand(2, 1, 3, *size, generator=generator, dtype=torch.float64) * 2 - 1
    expected = written_out(image[0].numpy(), target[0].numpy(), num_levels)
    # BT.601 is written out with six decimals there.
    assert pyramid(image, target).item() == pytest.approx(expected, rel=2e-6)


@pytest.mark.parametrize(("size", "num_levels"), [(16, 2), (31, 2), (64, 4), (256, 6), (512, 6)])
def test_pyramid_features_have_four_tensors_per_level(size, num_levels):
    features = PyramidDistance().features(torch.zeros(1, 3, size, size))
    assert len(features) == 4 * num_levels
    assert min(min(tensor.shape[2:]) for tensor in features[::4]) >= 8


def test_pyramid_equal_images_are_at_zero_and_stay_there():
    image = picture(0).requires_grad_()
    distance = pyramid(image, image.detach())
    assert distance.item() == 0
    distance.sum().backward()
    assert image.grad.abs().max() == 0


def test_pyramid_is_symmetric_and_each_image_counts_for_itself():
    x, y = torch.cat([picture(0), picture(1)]), torch.cat([picture(2), picture(3)])
    together = pyramid(x, y)
    alone = torch.cat([pyramid(x[:1], y[:1]), pyramid(x[1:], y[1:])])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=0)  # float32 sums in another order
    torch.testing.assert_close(together, pyramid(y, x), rtol=1e-5, atol=0)
    one_target = pyramid(x, y[:1])
    torch.testing.assert_close(one_target, torch.cat([pyramid(x[:1], y[:1]), pyramid(x[1:], y[:1])]), rtol=1e-5, atol=0)


def test_pyramid_gradients_are_those_of_finite_differences():
    generator = torch.Generator().manual_seed(1)
    image, target = torch.rand(2, 2, 3, 16, 16, generator=generator, dtype=torch.float64) * 2 - 1
    distance = PyramidDistance()
    features = distance.features(target)
    image.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: distance.distance(x, features), image, fast_mode=True)
    black = torch.full_like(image, -1, requires_grad=True)  # no structure at all
    assert torch.autograd.gradcheck(lambda x: distance.distance(x, features), black, fast_mode=True)


def test_pyramid_is_the_same_in_float32():
    """Variances are differences of means of squares; float32 must not show in nearly equal images."""
    image = picture(0, 256)
    for change in (1e-3, 1e-2, 0.3):
        other = image + change * picture(1, 256)
        exact = pyramid(other.double(), image.double())
        torch.testing.assert_close(pyramid(other, image).double(), exact, rtol=2e-3, atol=0)  # 1e-7 of rounding in x^2
    half = pyramid(other.half(), image.half())
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, pyramid(other.half().float(), image.half().float()), rtol=0, atol=0)


def test_pyramid_hardly_depends_on_the_size_of_the_same_picture():
    small, other = picture(0, 128, 17), picture(1, 128, 17)
    large, large_other = (functional.interpolate(image, scale_factor=4) for image in (small, other))
    # One level more on the fine side, with little in it.
    torch.testing.assert_close(pyramid(large, large_other), pyramid(small, other), rtol=0.15, atol=0)


# It is a good target for an optimisation ------------------------------------------------------------------------------


def test_pyramid_grows_with_damage():
    image = picture(0)
    noise = torch.randn(image.shape, generator=torch.Generator().manual_seed(5))
    ladders = {
        "blur": [functional.avg_pool2d(image, side, 1, side // 2, count_include_pad=False) for side in (3, 7, 15)],
        "shift": [image.roll(step, 3) for step in (1, 2, 4, 8)],
        "noise": [image + scale * noise for scale in (0.02, 0.1, 0.3)],
        "light": [image + step for step in (0.05, 0.2, 0.5)],
        "tint": [image + step * torch.tensor([1.0, 0.0, -1.0]).view(1, 3, 1, 1) for step in (0.05, 0.2, 0.5)],
        "contrast": [image * factor for factor in (0.9, 0.6, 0.2)],
    }
    unrelated = pyramid(picture(1), image).item()
    for name, steps in ladders.items():
        values = [pyramid(step, image).item() for step in steps]
        assert 0 < values[0] and values == sorted(values) and values[-1] < unrelated, name


def found_back(distance, target: torch.Tensor, num_steps: int = 60) -> float:
    """Return how many pixels off a translated picture is after it was moved by gradients only."""
    offset = torch.tensor([0.3, -0.2], requires_grad=True)  # of half the picture
    optimizer = torch.optim.Adam([offset], lr=0.03)
    for step in range(num_steps):
        optimizer.param_groups[0]["lr"] = 0.03 * (1 - step / num_steps)
        affine = torch.cat([torch.eye(2), offset[:, None]], 1)
        grid = functional.affine_grid(affine[None], list(target.shape), align_corners=False)
        moved = functional.grid_sample(target, grid, padding_mode="border", align_corners=False)
        optimizer.zero_grad()
        distance(moved).sum().backward()
        optimizer.step()
    return offset.detach().norm().item() * target.shape[-1] / 2


def test_pyramid_leads_back_from_where_pixels_do_not():
    """A checked pattern inside a smooth blob: pixelwise, a shift by a period of the pattern looks good."""
    axis = torch.linspace(-1, 1, 64)
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    blob = torch.exp(-(x**2 + y**2) / 0.18)
    pattern = 0.5 * blob + 0.5 * blob * torch.sin(20 * x) * torch.sin(20 * y)
    target = (pattern - 0.2).expand(1, 3, 64, 64)
    features = PyramidDistance().features(target)
    assert found_back(lambda image: (image - target).square().mean(), target) > 5
    assert found_back(lambda image: PyramidDistance().distance(image, features), target) < 0.5


def portraits(shared_dir: Path) -> list[Image.Image]:
    names = ["0/0.jpg", "1/1.jpg", "panohead/img/000134.jpg", "panohead/img/000157.jpg"]
    images = []
    for name in names:
        image = Image.open(shared_dir / "photos" / name).convert("RGB")
        left, top = (image.width - min(image.size)) // 2, (image.height - min(image.size)) // 2
        image = image.crop((left, top, left + min(image.size), top + min(image.size)))
        images.append(image.resize((512, 512), Image.Resampling.LANCZOS))
    return images


def to_tensor(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 127.5 - 1


def test_pyramid_portraits_have_the_documented_distances(shared_dir):
    """The table in docs/inversion.md: the scale of LPIPS for different people, and how far below damage is."""
    images = portraits(shared_dir)
    values: dict[str, list[float]] = {name: [] for name in ("blur", "shift 4", "shift 16", "noise", "other", "mirror")}
    for image in images:
        target = to_tensor(image)
        features = PyramidDistance().features(target)
        noise = torch.randn(target.shape, generator=torch.Generator().manual_seed(0))
        shifted = [image.transform(image.size, Image.Transform.AFFINE, (1, 0, step, 0, 1, 0)) for step in (4, 16)]
        variants = {
            "blur": [to_tensor(image.filter(ImageFilter.GaussianBlur(4)))],
            "shift 4": [to_tensor(shifted[0])],
            "shift 16": [to_tensor(shifted[1])],
            "noise": [(target + 0.1 * noise).clamp(-1, 1)],
            "mirror": [target.flip(3)],
            "other": [to_tensor(other) for other in images if other is not image],
        }
        for name, pictures in variants.items():
            values[name] += [PyramidDistance().distance(shown, features).item() for shown in pictures]
    expected = {"blur": 0.033, "shift 4": 0.055, "shift 16": 0.226, "noise": 0.017, "mirror": 0.44, "other": 0.62}
    for name, mean in expected.items():
        assert np.mean(values[name]) == pytest.approx(mean, rel=0.05), name  # filters differ by version of Pillow
    assert max(values["shift 16"]) < min(values["mirror"]) < min(values["other"]) < 0.8


# What it takes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (torch.zeros(3, 32, 32), r"image: expected \[B, 3, H, W\]"),
        (torch.zeros(1, 1, 32, 32), r"image: expected \[B, 3, H, W\]"),
        (torch.zeros(1, 3, 32, 32, dtype=torch.uint8), r"image: expected floating point in \[-1, 1\]"),
        (torch.zeros(1, 3, 32, 15), "image: expected at least 16 pixels a side"),
        (torch.zeros(3, 3, 32, 32), "image: expected as many as targets, 2, got 3"),
        (torch.zeros(1, 3, 32, 64), r"image: expected the size \[32, 32\] of the target, got \[32, 64\]"),
    ],
)
def test_pyramid_bad_image_raises(image, message):
    features = PyramidDistance().features(torch.zeros(2, 3, 32, 32))
    with pytest.raises(ValueError, match=message):
        PyramidDistance().distance(image, features)


def test_pyramid_nan_passes_through():
    image = picture(0)
    features = PyramidDistance().features(image)
    image[0, 0, 3, 3] = torch.nan
    assert PyramidDistance().distance(image, features).isnan().all()


def test_pyramid_trains_after_a_first_use_in_inference_mode():
    """Matrices are kept from call to call; tensors of the inference mode could not be used in a graph."""
    with torch.inference_mode():
        pyramid(picture(0, 46), picture(1, 46))  # a size of no other test
    image = picture(0, 46).requires_grad_()
    pyramid(image, picture(1, 46)).sum().backward()
    assert image.grad.abs().max() > 0


@pytest.mark.parametrize("size", [(256, 256), (64, 40), (512, 512), (1024, 1024), (300, 300), (384, 512), (512, 256)])
def test_limit_size_is_the_area_average(size):
    image = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = image if max(size) <= 256 else functional.interpolate(image, size=(256, 256), mode="area")
    torch.testing.assert_close(limit_size(image), expected)  # float64: its default


@pytest.mark.gpu
def test_pyramid_on_a_gpu_is_the_same_and_repeatable():
    images, target = torch.cat([picture(0, 512), picture(1, 512)]), picture(2, 512)
    results = []
    for device in ("cpu", "cuda", "cuda"):
        moved = images.to(device).requires_grad_()
        distance = pyramid(moved, target.to(device))
        distance.sum().backward()
        results.append((distance.detach().cpu(), moved.grad.cpu()))
    for cpu, first, second in zip(*results):
        # float32 sums in another order; TF32, which is off unless asked for, would be 100 times worse
        torch.testing.assert_close(first, cpu, rtol=1e-3, atol=1e-3 * cpu.abs().max().item())
        assert torch.equal(first, second)


# Features of a given network ------------------------------------------------------------------------------------------


class TinyFeatures(torch.nn.Module):
    """Stands in for the published VGG16: the same arguments, a strided convolution as features."""

    def __init__(self, scale: float = 0.01) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 4, 5, stride=4)
        self.scale = scale

    def forward(self, x: torch.Tensor, resize_images: bool = True, return_lpips: bool = False) -> torch.Tensor:
        if resize_images or not return_lpips:
            return x.flatten(1) * float("nan")
        return torch.relu(self.conv(x * self.scale)).flatten(1)


class OtherArguments(torch.nn.Module):
    """Takes an image only."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.flatten(1)


class ImageOut(torch.nn.Module):
    """Returns an image instead of features."""

    def forward(self, x: torch.Tensor, resize_images: bool = True, return_lpips: bool = False) -> torch.Tensor:
        return x


class PairOut(torch.nn.Module):
    """Returns two tensors."""

    def forward(
        self, x: torch.Tensor, resize_images: bool = True, return_lpips: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return x, x


def save_script(module: torch.nn.Module, path: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # as in training/perceptual.py
        torch.jit.script(module).save(str(path))
    return path


@pytest.fixture(scope="module")
def tiny_features() -> TinyFeatures:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return TinyFeatures()


@pytest.fixture(scope="module")
def vgg_path(tmp_path_factory, tiny_features) -> Path:
    return save_script(tiny_features, tmp_path_factory.mktemp("vgg") / "a vgg é.pt")


@pytest.mark.parametrize("size", [64, 512])
def test_vgg_distance_is_the_published_loss(vgg_path, tiny_features, size):
    distance = VggDistance(vgg_path)
    images, target = torch.cat([picture(0, size), picture(1, size)]).requires_grad_(), picture(2, size)

    def published(image: torch.Tensor) -> torch.Tensor:
        x = (image + 1) * (255 / 2)
        if x.shape[2] > 256:
            x = functional.interpolate(x, size=(256, 256), mode="area")
        return tiny_features(x, resize_images=False, return_lpips=True)

    ours = distance.distance(images, distance.features(target))
    expected = (published(images) - published(target)).square().sum(1)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=0)  # float32, up to 1e5 terms
    gradients = [torch.autograd.grad(loss.sum(), images)[0] for loss in (ours, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-4 * gradients[1].abs().max().item())
    assert all(parameter.grad is None for parameter in tiny_features.parameters())


def test_vgg_distance_has_the_same_bits_at_every_call(vgg_path):
    """A run that is resumed starts with a fresh network; it is to go on as if it had not stopped."""
    distance = VggDistance(vgg_path)
    image = picture(0).requires_grad_()
    target = distance.features(picture(1))
    results = []
    for _ in range(4):
        loss = distance.distance(image, target)
        results.append((loss.detach(), *torch.autograd.grad(loss.sum(), image)))
    assert all(torch.equal(a, b) for result in results[1:] for a, b in zip(result, results[0]))


def test_load_perceptual_distance_says_which_one_it_is(vgg_path):
    assert load_perceptual_distance(None, "cpu").name == "pyramid"
    assert load_perceptual_distance(str(vgg_path), "cpu").name == "vgg16 (a vgg é.pt)"
    assert load_perceptual_distance(vgg_path.as_uri(), "cpu").name == "vgg16 (a vgg é.pt)"


def test_load_perceptual_distance_warns_of_nothing(vgg_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_perceptual_distance(str(vgg_path))


@pytest.mark.parametrize("content", ["text", "empty", "state dict", "cut off"])
def test_vgg_distance_other_file_raises_and_names_it(tmp_path, vgg_path, content):
    path = tmp_path / "vgg.pt"
    if content == "state dict":
        torch.save({"weight": torch.zeros(3)}, path)
    else:
        path.write_bytes({"text": b"hello", "empty": b"", "cut off": vgg_path.read_bytes()[:-100]}[content])
    with pytest.raises(ValueError, match=r"vgg\.pt: expected a TorchScript file, got another one: .") as caught:
        load_perceptual_distance(str(path))
    assert "\n" not in str(caught.value) and "bug" not in str(caught.value)


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (OtherArguments(), r"expected a network that takes \(x, resize_images, return_lpips\), got an error: ."),
        (ImageOut(), r"expected features \[2, F\] of 2 images, got \[2, 3, 64, 64\]"),
        (PairOut(), r"expected features \[2, F\] of 2 images, got 'tuple'"),
        (torch.nn.Conv2d(1, 1, 3), "expected a network that takes"),
    ],
)
def test_vgg_distance_other_network_raises_and_names_the_file(tmp_path, module, message):
    with pytest.raises(ValueError, match=r"net\.pt: " + message) as caught:
        VggDistance(save_script(module, tmp_path / "net.pt"))
    assert "\n" not in str(caught.value)


def test_vgg_distance_features_that_are_not_finite_raise(tmp_path):
    distance = VggDistance(save_script(TinyFeatures(scale=float("inf")), tmp_path / "net.pt"))
    with pytest.raises(ValueError, match=r"net\.pt, features: expected finite numbers"):
        distance.features(picture(0))


def test_vgg_distance_image_of_another_size_raises(vgg_path):
    distance = VggDistance(vgg_path)
    with pytest.raises(ValueError, match="image: expected a size that gives 900 features, as the target"):
        distance.distance(picture(0, 32), distance.features(picture(0, 64)))


def test_vgg_distance_absent_file_raises(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.pt: no such file"):
        load_perceptual_distance(str(tmp_path / "none.pt"))
    with pytest.raises(IsADirectoryError):
        load_perceptual_distance(str(tmp_path))


def test_vgg_distance_blank_name_is_no_folder_and_raises():
    with pytest.raises(ValueError, match="vgg: expected the path or URL of a TorchScript file, got 'nothing'"):
        load_perceptual_distance("")
