"""Draw docs/figures/architecture.png, the picture of docs/architecture.md.

    pip install matplotlib        # or the extra `docs`
    python docs/figures/draw_architecture.py

The head in it is a few ellipsoids; nothing comes from a network.
"""

from __future__ import annotations

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from draw_conventions import BLUE, FAINT, INK, ORANGE, SKIN, draw_arrow, head_distance, save, shade, viewer
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Circle, FancyBboxPatch, Polygon, Rectangle

LATENT, VIEW = "#23804f", "#6a4bb0"  # once per latent, once per view
LATENT_TINT, VIEW_TINT = "#e9f5ee", "#f1edfa"
HAIR, LIPS, EYES = "#6b4a35", "#b0524a", "#26303a"
WIDTH, HEIGHT = 156, 96  # of the drawing, in units of 10 pixels

Point = tuple[float, float]


# The head -------------------------------------------------------------------------------------------------------------


def trace_head(num_pixels: int = 560) -> dict[str, np.ndarray]:
    """Trace the head; return its pictures [N, N, 3], all but the sharp one at the resolution of a rendering."""
    line = np.linspace(-1.3, 1.3, num_pixels)
    u, v = np.meshgrid(line, -line)
    view = viewer(28, 8)
    position = np.stack([u, v, np.full_like(u, 2.0)], axis=-1) @ view
    for _ in range(80):
        position = position - np.minimum(head_distance(position), 0.2)[..., None] * view[2]
    mask = np.clip(1 - np.abs(head_distance(position)) / 0.02, 0, 1)[..., None]
    step = 1e-3 * np.eye(3)
    normals = np.stack([head_distance(position + s) - head_distance(position - s) for s in step], axis=-1)
    normals /= np.linalg.norm(normals, axis=-1, keepdims=True) + 1e-12
    depth = position @ view[2]

    labels = label_parts(position)
    light = shade(normals, view, 0.62)
    background = np.array(to_rgb("#a9c6d8")) * (1 - 0.25 * (v[..., None] + 1.3) / 2.6) + 0.1
    far, close = np.quantile(depth[mask[..., 0] > 0.5], (0.02, 0.99))
    near = np.clip((depth[..., None] - far) / (close - far), 0, 1) * 0.85 + 0.15
    picture = np.clip(paint(labels, [SKIN, HAIR, EYES, LIPS]) * light * mask + background * (1 - mask), 0, 1)
    classes = paint(labels, ["#d9a066", "#4b2e1e", "#5b6ee1", "#c0392b"]) * (mask > 0.5)
    return {
        "image": pixelate(picture, num_pixels // 2),
        "image_raw": pixelate(picture),
        "image_parsing": pixelate(classes),
        "image_depth": pixelate(np.repeat(near * mask, 3, axis=-1)),
        "image_mask": pixelate(np.repeat(mask, 3, axis=-1)),
        "shape": pixelate(np.clip(np.array(to_rgb("#c9cdd2")) * light * mask + 1 - mask, 0, 1), num_pixels // 2),
    }


def label_parts(position: np.ndarray) -> np.ndarray:
    """Return 0 skin, 1 hair, 2 eyes, 3 mouth at surface points [..., 3]."""
    x, y, z = np.moveaxis(position, -1, 0)
    hair = (y > 0.42 + 0.55 * z) | ((z < 0.05) & (y > -0.55) & (np.abs(x) < 0.66))
    eyes = (np.hypot(np.abs(x) - 0.26, (y - 0.12) * 1.5) < 0.085) & (z > 0.3)
    mouth = (np.hypot(x / 0.22, (y + 0.42) / 0.045) < 1) & (z > 0.3)
    return np.select([eyes, mouth, hair], [2, 3, 1], 0)


def paint(labels: np.ndarray, colours: list[str]) -> np.ndarray:
    """Return labels [...] as colours [..., 3]."""
    return np.array([to_rgb(colour) for colour in colours])[labels]


def pixelate(image: np.ndarray, size: int = 28) -> np.ndarray:
    """Average an image [N, N, 3] down to [size, size, 3]."""
    block = len(image) // size
    return image.reshape(size, block, size, block, 3).mean(axis=(1, 3))


# Parts of the drawing -------------------------------------------------------------------------------------------------


def draw_band(ax: Axes, bottom: float, top: float, colour: str, tint: str, title: str, text: str) -> None:
    """Draw the ground on which everything that is computed equally often stands."""
    style = "round,pad=0,rounding_size=1.6"
    ax.add_patch(FancyBboxPatch((1, bottom), WIDTH - 2, top - bottom, boxstyle=style, fc=tint, ec="none", zorder=0))
    ax.text(3, top - 3.4, title, color=colour, fontsize=17, weight="bold", va="center")
    ax.text(3, top - 6.8, text, color=FAINT, fontsize=11.5, va="center")


def draw_box(ax: Axes, corner: Point, size: Point, title: str, text: str = "", colour: str = INK) -> None:
    """Draw something that computes: its lower left corner, its size, its name and what it does."""
    style = "round,pad=0,rounding_size=0.8"
    ax.add_patch(FancyBboxPatch(corner, *size, boxstyle=style, fc="white", ec=colour, lw=1.8, zorder=3))
    x, y = corner[0] + size[0] / 2, corner[1] + size[1] / 2
    shift = 0.8 * text.count("\n") + 1.25 if text else 0.0
    ax.text(x, y + shift, title, ha="center", va="center", fontsize=11.5, weight="bold", color=colour, zorder=4)
    if text:
        below = 0.95 * title.count("\n") + 1.15
        ax.text(x, y - below, text, ha="center", va="center", fontsize=9.8, color=INK, zorder=4, linespacing=1.25)


def draw_data(ax: Axes, centre: Point, name: str, shape: str, width: float = 12) -> None:
    """Draw a tensor: its name over its shape."""
    ax.add_patch(Rectangle((centre[0] - width / 2, centre[1] - 2.5), width, 5, fc="white", ec=FAINT, lw=1, zorder=3))
    ax.text(centre[0], centre[1] + 1.0, name, ha="center", va="center", fontsize=11, zorder=4)
    ax.text(centre[0], centre[1] - 1.2, shape, ha="center", va="center", fontsize=9.5, color=FAINT, zorder=4)


def connect(ax: Axes, *points: Point, colour: str = INK, dashed: bool = False) -> None:
    """Draw a line through points, an arrow at its end."""
    xs, ys = zip(*points)
    style = {"color": colour, "lw": 1.6, "ls": (0, (3, 2)) if dashed else "-"}
    ax.plot(xs, ys, solid_joinstyle="round", zorder=2, **style)
    before, end = np.array(points[-2], float), np.array(points[-1], float)
    draw_arrow(ax, end - (end - before) / np.linalg.norm(end - before) * 0.1, end, colour, lw=1.6)


def draw_badge(ax: Axes, centre: Point, text: str = "w") -> None:
    """Mark what is steered by the latent."""
    ax.add_patch(Circle(centre, 1.25, fc=LATENT, ec="white", lw=1.2, zorder=6))
    ax.text(*centre, text, color="white", ha="center", va="center", fontsize=9.5, weight="bold", zorder=7)


def draw_picture(ax: Axes, image: np.ndarray, corner: Point, size: float, name: str, shape: str) -> None:
    """Draw an output with its name and shape below."""
    x, y = corner
    ax.imshow(image, extent=(x, x + size, y, y + size), interpolation="nearest", zorder=3, aspect="auto")
    ax.add_patch(Rectangle(corner, size, size, fill=False, ec=INK, lw=1.2, zorder=4))
    ax.text(x + size / 2, y - 1.3, name, ha="center", va="center", fontsize=10.5, family="DejaVu Sans Mono")
    ax.text(x + size / 2, y - 3.2, shape, ha="center", va="center", fontsize=9.3, color=FAINT)


def draw_planes(ax: Axes, corner: Point, size: float = 8.6) -> None:
    """Draw the three planes of both spheres, filled with something like features."""
    rng = np.random.default_rng(7)
    frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(48), np.fft.fftfreq(48)))
    for row, (name, colour) in enumerate((("A", ORANGE), ("B", BLUE))):
        colours = LinearSegmentedColormap.from_list(name, ["white", colour, INK])
        y = corner[1] + (1 - row) * (size + 1.6)
        ax.text(corner[0] - 3.2, y + size / 2, name, color=colour, weight="bold", fontsize=14, va="center", ha="center")
        for column, axes in enumerate((("θ", "φ"), ("θ", "r"), ("φ", "r"))):
            x = corner[0] + column * (size + 2.4)
            noise = np.fft.ifft2(np.fft.fft2(rng.normal(size=(48, 48))) * np.exp(-((frequency / 0.06) ** 2))).real
            noise = (noise - noise.min()) / np.ptp(noise) * 0.75
            extent = (x, x + size, y, y + size)
            ax.imshow(colours(noise), extent=extent, interpolation="bilinear", aspect="auto", zorder=3)
            ax.add_patch(Rectangle((x, y), size, size, fill=False, ec=INK, lw=1, zorder=4))
            ax.text(x + size / 2, y - 0.85, axes[0], ha="center", va="center", fontsize=9.5)
            ax.text(x - 0.8, y + size / 2, axes[1], ha="center", va="center", fontsize=9.5)


def draw_growing_squares(ax: Axes, left: float, bottom: float) -> None:
    """Draw the resolutions of a synthesis network."""
    x = left
    for i, size in enumerate((0.7, 1.0, 1.4, 2.0, 2.8, 3.8, 5.0)):
        ax.add_patch(Rectangle((x, bottom), size, size, fc=LATENT_TINT, ec=LATENT, lw=1.1, zorder=4))
        x += size + 0.45
        if i in (0, 6):
            ax.text(x - size / 2 - 0.45, bottom - 1, "4²" if i == 0 else "256²", ha="center", va="center", fontsize=8.5)


def draw_rays(ax: Axes, place: Point) -> None:
    """Draw a camera and three rays with samples, dense in the middle where the head is."""
    x, y = place
    ax.add_patch(Rectangle((x - 2.6, y - 0.9), 2.0, 1.8, fc=INK, zorder=4))
    ax.add_patch(Polygon([(x - 0.8, y), (x + 0.3, y + 0.9), (x + 0.3, y - 0.9)], fc=INK, alpha=0.6, zorder=4))
    for slope in (-0.22, 0.0, 0.22):
        ax.plot([x + 0.3, x + 10.5], [y, y + 10.2 * slope], color=VIEW, lw=0.9, zorder=3)
        for t in np.r_[4.2:10.3:6j]:
            ax.plot(x + 0.3 + t, y + t * slope, "o", ms=3.2, mfc="white", mec=VIEW, mew=1, zorder=4)
        for t in (6.3, 6.7, 7.1, 7.5) if slope <= 0.1 else ():
            ax.plot(x + 0.3 + t, y + t * slope, "o", ms=2.4, color=VIEW, zorder=5)


# The drawing ----------------------------------------------------------------------------------------------------------


def draw_latent_part(ax: Axes) -> None:
    """Draw what latents determine before any camera is chosen."""
    text = "a RadianceField: made once, then used for every view, every frame and every point of a shape"
    draw_band(ax, 53, HEIGHT - 1, LATENT, LATENT_TINT, "Once per latent", text)
    draw_data(ax, (10, 76), "latent z", "[B, 512]")
    draw_data(ax, (10, 68), "conditioning label", "[B, 25]", width=14.5)
    draw_box(ax, (23, 67), (14, 10), "mapping", "2 layers,\ntruncation", LATENT)
    connect(ax, (16, 76), (20, 76), (20, 73.5), (23, 73.5))
    connect(ax, (17.25, 68), (20, 68), (20, 70.5), (23, 70.5))
    draw_data(ax, (46.5, 72), "w-layers w", "[B, 14, 512]", width=11)
    connect(ax, (37, 72), (41, 72))
    draw_box(ax, (57, 60), (24, 24), "", "", LATENT)
    ax.text(69, 81.8, "backbone", ha="center", va="center", fontsize=11.5, weight="bold", color=LATENT, zorder=4)
    ax.text(69, 79.4, "StyleGAN2 synthesis", ha="center", va="center", fontsize=9.8, zorder=4)
    draw_growing_squares(ax, 59.3, 71.5)
    fold = {"boxstyle": "round,pad=0,rounding_size=0.6", "fc": LATENT_TINT, "ec": LATENT, "lw": 1.1, "zorder": 4}
    ax.add_patch(FancyBboxPatch((58.6, 61.2), 20.8, 6.6, ls=(0, (3, 2)), **fold))
    ax.text(69, 65.9, "ConvA, ConvB", ha="center", va="center", fontsize=10, weight="bold", color=LATENT, zorder=5)
    ax.text(
        69,
        63.2,
        "1×1 to 2 × 96 channels, folded\ninto the ToRGB layers",
        ha="center",
        va="center",
        fontsize=8.8,
        zorder=5,
    )
    connect(ax, (52, 72), (57, 72))
    connect(ax, (81, 72), (84.8, 72))
    draw_planes(ax, (90.5, 62.4))
    ax.text(104.5, 84.6, "dual spherical tri-plane", ha="center", va="center", fontsize=11.5, weight="bold")
    ax.text(104.5, 59.4, "planes  [B, 2, 3, 32, 256, 256]", ha="center", va="center", fontsize=9.8, color=FAINT)
    draw_box(ax, (130, 70), (18, 10), "background", "StyleGAN2 synthesis,\nhalf as wide", LATENT)
    draw_badge(ax, (130, 80))
    draw_data(ax, (139, 61.5), "background", "[B, 32, 128, 128]", width=16)
    connect(ax, (139, 70), (139, 64))


def draw_view_part(ax: Axes, pictures: dict[str, np.ndarray]) -> None:
    """Draw what depends on the camera."""
    draw_band(ax, 1, 51, VIEW, VIEW_TINT, "Once per view", "TriPlaneGenerator.render")
    draw_data(ax, (10, 34), "camera label c", "[B, 25]", width=13)
    draw_box(ax, (23, 27), (17, 14), "", "", VIEW)
    draw_rays(ax, (27.2, 37.2))
    ax.text(31.5, 32.6, "rays", ha="center", va="center", fontsize=11.5, weight="bold", color=VIEW, zorder=4)
    ax.text(31.5, 29.6, "64² of them,\n48 + 48 samples each", ha="center", va="center", fontsize=9.3, zorder=4)
    connect(ax, (16.5, 34), (23, 34))
    draw_box(ax, (47, 27), (17, 14), "look-up", "both spheres,\nmean of 3 planes,\nfused by weight", VIEW)
    connect(ax, (40, 34), (47, 34))
    ax.text(43.5, 35.4, "points", ha="center", va="center", fontsize=9.3, color=FAINT)
    connect(ax, (104.5, 58), (104.5, 48.4), (55.5, 48.4), (55.5, 41), colour=LATENT)
    draw_box(ax, (71, 27), (13, 14), "decoder", "32 → 64 → 33:\ndensity and\n32 features", VIEW)
    connect(ax, (64, 34), (71, 34))
    draw_box(ax, (91, 27), (15, 14), "composite", "crop, sort,\nmarch along\neach ray", VIEW)
    connect(ax, (84, 34), (91, 34))
    connect(ax, (93.5, 27), (93.5, 23.4), (31.5, 23.4), (31.5, 27), colour=VIEW)
    text = "weights of the first pass\nplace the samples of the second"
    ax.text(63.8, 21, text, ha="center", va="center", fontsize=9.6, color=VIEW)
    text = "in G(z, c) moved by\nthe offset t_mapping(z, c)"
    ax.text(10, 29.2, text, ha="center", va="center", fontsize=8.8, color=FAINT)
    draw_heads(ax)
    draw_outputs(ax, pictures)
    draw_shape_branch(ax, pictures)


def draw_heads(ax: Axes) -> None:
    """Draw the way from composited features to images."""
    connect(ax, (106, 36.5), (110.5, 36.5), (110.5, 43.5))
    ax.add_patch(Circle((110.5, 45), 1.5, fc="white", ec=VIEW, lw=1.8, zorder=5))
    ax.text(110.5, 44.95, "+", ha="center", va="center", fontsize=14, weight="bold", color=VIEW, zorder=6)
    connect(ax, (139, 59), (139, 55.6), (110.5, 55.6), (110.5, 46.5), colour=LATENT)
    ax.text(111.6, 48.2, "× (1 − opacity)", fontsize=9.6, va="center", color=LATENT)
    ax.plot([112, 146.75], [45, 45], color=INK, lw=1.6, zorder=2)
    for x, width, title, text in (
        (113.5, 11, "parsing", "20 classes,\noptional"),
        (127.5, 10, "ToRGB", "1×1"),
        (141, 11.5, "super-\nresolution", "resize, ×2, ×2"),
    ):
        draw_box(ax, (x, 31), (width, 9), title, text, VIEW)
        connect(ax, (x + width / 2, 45), (x + width / 2, 40))
        draw_badge(ax, (x, 40))
    connect(ax, (137.5, 35.5), (141, 35.5))
    ax.text(125.8, 46.3, "features  [B, 32, 64, 64]", ha="center", va="center", fontsize=9.5, color=FAINT)


def draw_outputs(ax: Axes, pictures: dict[str, np.ndarray]) -> None:
    """Draw the five images."""
    for name, x, size, shape, source in (
        ("image_depth", 87, 9.6, "[B, 1, 64, 64]", 97.5),
        ("image_mask", 100, 9.6, "[B, 1, 64, 64]", 101.5),
        ("image_parsing", 114.2, 9.6, "[B, 20, 64, 64]", 119),
        ("image_raw", 127.7, 9.6, "[B, 3, 64, 64]", 132.5),
        ("image", 140, 13.6, "[B, 3, 512, 512]", 146.8),
    ):
        draw_picture(ax, pictures[name], (x, 7), size, name, shape)
        top, start = 7 + size, 27 if source < 110 else 31
        if source < 110:
            middle = x + size / 2
            connect(ax, (source, start), (source, 20), (middle, 20), (middle, top))
        else:
            connect(ax, (source, start), (source, top))


def draw_shape_branch(ax: Axes, pictures: dict[str, np.ndarray]) -> None:
    """Draw how shapes come from the same field."""
    draw_data(ax, (43, 12), "voxel grid, or any points", "[B, M, 3]", width=21)
    connect(ax, (50, 14.5), (50, 27), colour=FAINT, dashed=True)
    connect(ax, (77.5, 27), (77.5, 17.1), colour=FAINT, dashed=True)
    ax.imshow(pictures["shape"], extent=(72.7, 82.3, 7.4, 17), zorder=3, aspect="auto")
    ax.add_patch(Rectangle((72.7, 7.4), 9.6, 9.6, fill=False, ec=FAINT, lw=1.2, zorder=4))
    ax.text(77.5, 5.7, "density, mesh", ha="center", va="center", fontsize=10.5)
    ax.text(77.5, 3.8, "marching cubes", ha="center", va="center", fontsize=9.3, color=FAINT)
    draw_badge(ax, (4.6, 8))
    ax.text(
        6.8, 8, "steered by w (heads and super-\nresolution: by its last layer)", fontsize=9.6, va="center", color=INK
    )


def draw_architecture() -> Figure:
    """Draw the flow of data through the generator."""
    figure = plt.figure(figsize=(WIDTH / 10, HEIGHT / 10))
    ax = figure.add_axes((0, 0, 1, 1))
    draw_latent_part(ax)
    draw_view_part(ax, trace_head())
    ax.set(xlim=(0, WIDTH), ylim=(0, HEIGHT))
    ax.axis("off")
    return figure


if __name__ == "__main__":
    save(draw_architecture(), "architecture.png")
