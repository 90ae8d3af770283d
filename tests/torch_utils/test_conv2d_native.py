"""The 3x3 convolution in one pass equals its steps in float64, notices changed weights, and bounds what it keeps."""

from __future__ import annotations

import gc

import pytest
import torch
import torch.nn.functional as F

from torch_utils import native
from torch_utils.ops import conv2d_native
from torch_utils.ops.bias_act import bias_act
from torch_utils.ops.conv2d_native import modulated_conv3x3, supported
from torch_utils.ops.conv2d_resample import conv2d_resample
from torch_utils.ops.upfirdn2d import setup_filter

FIR = setup_filter((1, 3, 3, 1))
# Relative to the largest result. Rounding of the transforms, 2-4e-6 measured with 512 channels.
TOLERANCE = 1e-5


@pytest.fixture(autouse=True)
def fresh_cache():
    """Keep nothing from test to test."""
    conv2d_native.clear_cache()
    yield
    conv2d_native.clear_cache()


@pytest.fixture
def kernel(monkeypatch):
    """Take the kernel for every size, or skip the test where there is none."""
    if native.load() is None:
        pytest.skip(f"native kernels are not available: {native.reason()}")
    monkeypatch.setattr(conv2d_native, "_pays", lambda *_: True)


@pytest.fixture
def inference():
    """Record no gradients."""
    with torch.no_grad():
        yield


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def convolved(x, weight, fir):
    """Convolve one image; where there is a filter, transposed with stride 2, then filtered channel by channel."""
    if fir is None:
        return F.conv2d(x, weight, padding=1)
    y = F.conv_transpose2d(x, weight.transpose(0, 1), stride=2)
    return F.conv2d(y.transpose(0, 1), 4 * fir.flip(0, 1)[None, None], padding=1).transpose(0, 1)


def expected_layer(x, weight, styles, demodulate=True, up=1, fir=None, noise=None, bias=None, **tail):
    """Convolve with the weights of each sample, as the paper writes it, in float64."""
    x, weight, styles, fir, noise, bias = (
        None if tensor is None else tensor.detach().double() for tensor in (x, weight, styles, fir, noise, bias)
    )
    images = []
    for n in range(len(x)):
        kernel = weight
        if styles is not None:
            kernel = weight * styles[n][None, :, None, None]
            if demodulate:
                kernel = kernel / (kernel.square().sum(dim=(1, 2, 3), keepdim=True) + 1e-8).sqrt()
        images.append(convolved(x[n : n + 1], kernel, fir))
    y = torch.cat(images)
    return bias_act(y if noise is None else y + noise, bias, **tail)


def assert_near(ours: torch.Tensor, *arguments, **options) -> None:
    """Compare with the layer of these arguments, relative to its largest value before the clamp."""
    expected = expected_layer(*arguments, **options)
    assert ours.shape == expected.shape
    assert ours.dtype == torch.float32 and ours.is_contiguous(memory_format=torch.channels_last)
    largest = expected_layer(*arguments, **options | {"clamp": None}).abs().max()
    error = (ours - expected).abs().max() / largest
    assert error <= TOLERANCE, f"error {error:.1e} of the largest value"


SHAPES = [  # B, I, O, H, W
    (1, 8, 8, 4, 4),
    (1, 16, 24, 1, 1),
    (2, 8, 40, 1, 7),
    (1, 32, 16, 13, 9),
    (2, 24, 56, 17, 23),
    (3, 64, 8, 6, 30),
    (1, 512, 32, 12, 12),
    (1, 40, 136, 31, 34),
]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("up", [1, 2])
@pytest.mark.parametrize("modulated", [False, True])
def test_modulated_conv3x3_any_shape_equals_the_float64_layer(kernel, inference, shape, up, modulated):
    batch, inputs, outputs, height, width = shape
    x, weight = random(batch, inputs, height, width), random(outputs, inputs, 3, 3, seed=1)
    fir = FIR if up == 2 else None
    if not modulated:
        assert_near(modulated_conv3x3(x, weight, None, up=up, fir=fir), x, weight, None, up=up, fir=fir)
        return
    styles, bias = random(batch, inputs, seed=2) + 1, random(outputs, seed=3)
    noise = random(batch, 1, up * height, up * width, seed=4)
    options = {"up": up, "fir": fir, "noise": noise, "bias": bias, "activation": "lrelu", "gain": 0.7, "clamp": 1.5}
    ours = modulated_conv3x3(x, weight, styles, **options)
    assert_near(ours, x, weight, styles, **options)


@pytest.mark.parametrize("demodulate", [False, True])
@pytest.mark.parametrize("noise_shape", [None, (10, 14), (1, 1, 10, 14), (2, 1, 10, 14)])
@pytest.mark.parametrize("tail", [{}, {"activation": "lrelu"}, {"gain": 3.0, "clamp": 0.5}])
def test_modulated_conv3x3_options_equal_the_float64_layer(kernel, inference, demodulate, noise_shape, tail):
    x, weight, styles = random(2, 16, 10, 14), random(8, 16, 3, 3, seed=1), random(2, 16, seed=2)
    noise = None if noise_shape is None else random(*noise_shape, seed=3)
    ours = modulated_conv3x3(x, weight, styles, demodulate=demodulate, noise=noise, **tail)
    assert_near(ours, x, weight, styles, demodulate=demodulate, noise=noise, **tail)


@pytest.mark.parametrize("up", [1, 2])
def test_modulated_conv3x3_reference_equals_the_float64_layer(inference, up):
    options = {"up": up, "fir": FIR if up == 2 else None, "bias": random(5, seed=3)}
    x, weight, styles = random(2, 6, 5, 7), random(5, 6, 3, 3, seed=1), random(2, 6, seed=2)
    assert not supported(x, weight, up)
    assert_near(modulated_conv3x3(x, weight, styles, **options), x, weight, styles, **options)


def test_modulated_conv3x3_any_layout_gives_the_same_bits(kernel, inference):
    x, weight = random(2, 16, 9, 12), random(16, 16, 3, 3, seed=1)
    plain = modulated_conv3x3(x, weight, None)
    channels_last = x.contiguous(memory_format=torch.channels_last)
    view = torch.cat([x, x], dim=3)[..., :12]
    strided_weight = weight.permute(2, 3, 0, 1).contiguous().permute(2, 3, 0, 1)
    for image, filters in ((channels_last, weight), (view, weight), (x, strided_weight)):
        assert torch.equal(modulated_conv3x3(image, filters, None), plain)


@pytest.mark.parametrize("up", [1, 2])
@pytest.mark.parametrize("shape", [(24, 32, 66, 51), (16, 264, 9, 10)])  # shared out by rows, by output channels
def test_modulated_conv3x3_any_thread_count_gives_the_same_bits(kernel, inference, shape, up):
    inputs, outputs, height, width = shape
    x, weight = random(1, inputs, height, width), random(outputs, inputs, 3, 3, seed=1)
    options = {"up": up, "fir": FIR if up == 2 else None}
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            conv2d_native.clear_cache()
            results.append(modulated_conv3x3(x, weight, random(1, inputs, seed=2), **options))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_modulated_conv3x3_nan_stays_in_its_tiles_and_survives_the_clamp(kernel, inference):
    x, weight = random(1, 8, 24, 24), random(8, 8, 3, 3, seed=1)
    x[0, 3, 9, 9] = float("nan")
    y = modulated_conv3x3(x, weight, None, activation="lrelu", clamp=1.0)
    assert y[0, :, 8:11, 8:11].isnan().all()  # every output that the pixel reaches
    assert not y[0, :, :4].isnan().any() and not y[0, :, 16:].isnan().any()  # tiles of 4, windows of 6


def test_modulated_conv3x3_with_gradients_takes_the_reference(kernel):
    x, weight = random(1, 8, 6, 6), random(8, 8, 3, 3, seed=1).requires_grad_()
    styles = random(1, 8, seed=2).requires_grad_()
    modulated_conv3x3(x, weight, styles).sum().backward()
    assert weight.grad is not None and styles.grad.abs().sum() > 0
    assert not supported(x, weight)
    with torch.no_grad():
        assert supported(x, weight)


def test_supported_unsuited_tensors_is_false(kernel, inference):
    x, weight = random(1, 16, 8, 8), random(8, 16, 3, 3)
    assert supported(x, weight) and supported(x, weight, 2)
    assert not supported(x.double(), weight.double())
    assert not supported(x, weight[:, :, :1, :1])
    assert not supported(x[:, :12], weight[:, :12])
    assert not supported(x, weight[:7])
    assert not supported(x.to("meta"), weight.to("meta"))


def test_supported_small_work_is_false(inference):
    if native.load() is None:
        pytest.skip(f"native kernels are not available: {native.reason()}")
    assert supported(random(1, 128, 4, 4), random(128, 128, 3, 3))
    assert not supported(random(1, 32, 8, 8), random(32, 32, 3, 3))


def test_supported_without_native_kernels_is_false_and_results_remain(inference, monkeypatch):
    monkeypatch.setattr(conv2d_native, "_pays", lambda *_: True)
    x, weight = random(1, 8, 8, 8), random(8, 8, 3, 3, seed=1)
    with native.disabled():
        assert not supported(x, weight)
        torch.testing.assert_close(
            modulated_conv3x3(x, weight, None),
            F.conv2d(x, weight, padding=1),
            rtol=1e-5,  # another order of sums in another memory order
            atol=1e-5,
        )


def test_modulated_conv3x3_lopsided_filter_equals_the_resampling_convolution(kernel, inference):
    x, weight, fir = random(1, 8, 9, 6), random(16, 8, 3, 3, seed=1), random(4, 4, seed=2)  # to see a flip
    expected = conv2d_resample(x.double(), weight.double(), fir.double(), up=2, padding=1)
    error = (modulated_conv3x3(x, weight, None, up=2, fir=fir) - expected).abs().max() / expected.abs().max()
    assert error <= TOLERANCE


def _change_in_place(weight):
    weight.mul_(2)


def _change_through_data(weight):
    weight.data.mul_(2)


def _change_storage(weight):
    weight.data = weight.data * 2


@pytest.mark.parametrize("change", [_change_in_place, _change_through_data, _change_storage])
def test_modulated_conv3x3_changed_weights_are_noticed(kernel, inference, change):
    x, weight = random(1, 8, 6, 6), torch.nn.Parameter(random(8, 8, 3, 3, seed=1))
    before = modulated_conv3x3(x, weight, None)
    change(weight)
    torch.testing.assert_close(
        modulated_conv3x3(x, weight, None), 2 * before, rtol=0, atol=0
    )  # a power of two is exact


def test_modulated_conv3x3_repeated_call_transforms_weights_once(kernel, inference, monkeypatch):
    x, layer = random(1, 8, 6, 6), torch.nn.Conv2d(8, 8, 3)
    packs = []
    pack = conv2d_native._pack
    monkeypatch.setattr(conv2d_native, "_pack", lambda *args: packs.append(1) or pack(*args))
    first = modulated_conv3x3(x, layer.weight, None)
    assert torch.equal(modulated_conv3x3(x, layer.weight, None), first)
    assert len(packs) == 1
    assert conv2d_native.cached_bytes() >= layer.weight.nbytes * 4
    del layer
    gc.collect()
    assert conv2d_native.cached_bytes() == 0  # they die with their weights


def test_modulated_conv3x3_many_weights_stay_within_the_bound(kernel, inference, monkeypatch):
    x = random(1, 16, 6, 6)
    weights = [random(16, 16, 3, 3, seed=seed) for seed in range(5)]
    modulated_conv3x3(x, weights[0], None)
    one = conv2d_native.cached_bytes()
    monkeypatch.setattr(conv2d_native, "_CACHE_LIMIT_BYTES", 2 * one)
    results = [modulated_conv3x3(x, weight, None) for weight in weights]
    assert conv2d_native.cached_bytes() == 2 * one
    for weight, result in zip(weights, results, strict=True):
        assert torch.equal(modulated_conv3x3(x, weight, None), result)
    monkeypatch.setattr(conv2d_native, "_CACHE_LIMIT_BYTES", one - 1)
    assert torch.equal(modulated_conv3x3(x, weights[0], None), results[0])
    assert conv2d_native.cached_bytes() == 0


def test_modulated_conv3x3_inference_tensors_are_never_kept(kernel):
    with torch.inference_mode():
        x, weight = random(1, 8, 6, 6), random(8, 8, 3, 3, seed=1)
        before = modulated_conv3x3(x, weight, None)
        weight.mul_(2)
        assert torch.equal(modulated_conv3x3(x, weight, None), 2 * before)
    assert conv2d_native.cached_bytes() == 0


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"x": random(8, 6, 6)}, "x"),
        ({"weight": random(8, 16, 3, 3)}, "weight"),
        ({"weight": random(8, 8, 1, 1)}, "weight"),
        ({"styles": random(2, 8)}, "styles"),
        ({"up": 3}, "up"),
        ({"up": 2}, "fir"),
        ({"up": 2, "fir": random(3, 3)}, "fir"),
        ({"noise": random(6, 7)}, "noise"),
        ({"noise": random(2, 1, 6, 6)}, "noise"),
        ({"bias": random(7)}, "bias"),
        ({"activation": "step"}, "activation"),
        ({"clamp": -1.0}, "clamp"),
        ({"clamp": float("nan")}, "clamp"),
    ],
)
def test_modulated_conv3x3_wrong_argument_is_named(change, name):
    arguments = {"x": random(1, 8, 6, 6), "weight": random(8, 8, 3, 3), "styles": random(1, 8)} | change
    with pytest.raises(ValueError, match=f"^{name}: expected"):
        modulated_conv3x3(**arguments)


@pytest.mark.parametrize("up", [1, 2])
def test_modulated_conv3x3_registration_passes_opcheck(kernel, inference, up):
    arguments = (random(2, 8, 6, 5), random(16, 8, 3, 3), random(2, 8), FIR if up == 2 else None, None, random(16))
    torch.library.opcheck(
        torch.ops.spherehead.modulated_conv3x3.default,
        (*arguments, True, up, "lrelu", 1.0, 256.0),
        test_utils=("test_schema", "test_faketensor"),  # no autograd by design
    )


def test_modulated_conv3x3_compiled_graph_is_whole_and_gives_the_same_bits(kernel, inference):
    x, weight, styles = random(1, 8, 6, 6), random(8, 8, 3, 3, seed=1), random(1, 8, seed=2)
    compiled = torch.compile(modulated_conv3x3, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x, weight, styles), modulated_conv3x3(x, weight, styles))
