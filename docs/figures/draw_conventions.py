"""Draw docs/figures/two_spheres.png and docs/figures/cameras.png, the pictures of docs/conventions.md.

    pip install matplotlib        # or the extra `docs`
    python docs/figures/draw_conventions.py

All is drawn from the formulas that docs/conventions.md states, in NumPy, independently of the code it describes.
"""

from __future__ import annotations

import io
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Colormap, LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Arc, Circle, Ellipse, Polygon, Rectangle
from matplotlib.patheffects import Normal, Stroke
from PIL import Image

FOLDER = Path(__file__).resolve().parent
INK, FAINT, SKIN = "#22303c", "#8996a3", "#e8c4a2"
ORANGE, BLUE = "#d9660b", "#1f6fb4"  # sphere A, sphere B
AXES = {
    "+x, left ear": ((1, 0, 0), "#c0392b"),
    "+y, up": ((0, 1, 0), "#2e8b57"),
    "+z, face": ((0, 0, 1), "#3457b1"),
}
MAP_A = LinearSegmentedColormap.from_list("a", ["#fbf7f2", "#f9b572", ORANGE])
MAP_B = LinearSegmentedColormap.from_list("b", ["#f3f6fa", "#86b6de", BLUE])
MAP_SHARE = LinearSegmentedColormap.from_list("share", [BLUE, "#86b6de", "#f6f3ef", "#f9b572", ORANGE])

OUTLINE = [Stroke(linewidth=4.4, foreground=INK), Normal()]

plt.rcParams.update({"font.family": "DejaVu Sans", "font.size": 12, "text.color": INK, "axes.titlecolor": INK})


# The formulas ---------------------------------------------------------------------------------------------------------


def rotate_to_sphere(points: np.ndarray, sphere: str) -> np.ndarray:
    """Return V_A = (z, y, -x) or V_B = (-z, -x, y) of world points [..., 3]."""
    x, y, z = np.moveaxis(points, -1, 0)
    return np.stack([z, y, -x] if sphere == "A" else [-z, -x, y], axis=-1)


def rotate_from_sphere(v: np.ndarray, sphere: str) -> np.ndarray:
    """Undo :func:`rotate_to_sphere`."""
    a, b, c = np.moveaxis(v, -1, 0)
    return np.stack([-c, b, a] if sphere == "A" else [-b, c, -a], axis=-1)


def weight(points: np.ndarray, sphere: str) -> np.ndarray:
    """Return w = rho (rho + x) / (2 |V|^2) [...] of world points [..., 3]."""
    v = rotate_to_sphere(points, sphere)
    rho = np.hypot(v[..., 0], v[..., 1])
    return rho * (rho + v[..., 0]) / (2 * (v**2).sum(-1))


def share_of_a(points: np.ndarray) -> np.ndarray:
    """Return w_A / (w_A + w_B)."""
    return weight(points, "A") / (weight(points, "A") + weight(points, "B"))


def on_sphere(theta: np.ndarray | float, phi: np.ndarray | float, sphere: str) -> np.ndarray:
    """Return the world points [..., 3] at plane coordinates theta and phi in [-1, 1] on the unit sphere."""
    polar, azimuth = np.broadcast_arrays((np.asarray(theta) + 1) * np.pi / 2, np.asarray(phi) * np.pi)
    v = [np.sin(polar) * np.cos(azimuth), np.sin(polar) * np.sin(azimuth), np.cos(polar)]
    return rotate_from_sphere(np.stack(v, axis=-1), sphere)


def viewer(yaw_deg: float, pitch_deg: float) -> np.ndarray:
    """Return the viewer's right, up and back directions as rows [3, 3]."""
    yaw, pitch = np.radians([yaw_deg, pitch_deg])
    back = np.array([np.cos(pitch) * np.sin(yaw), np.sin(pitch), np.cos(pitch) * np.cos(yaw)])
    right = np.array([np.cos(yaw), 0.0, -np.sin(yaw)])
    return np.stack([right, np.cross(back, right), back])


# The two spheres ------------------------------------------------------------------------------------------------------


def pixel_grid(num_pixels: int = 560, extent: float = 1.02) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return u, v [num_pixels, num_pixels] of an orthographic picture, and the extent for imshow."""
    line = np.linspace(-extent, extent, num_pixels)
    u, v = np.meshgrid(line, line)
    return u, v, np.array([-extent, extent, -extent, extent])


def shade(normals: np.ndarray, view: np.ndarray, ambient: float) -> np.ndarray:
    """Return brightness [..., 1] under a lamp above the viewer's left shoulder."""
    lamp = np.array([-0.45, 0.6, 0.66]) @ view
    return ambient + (1 - ambient) * np.clip(normals @ lamp, 0, 1)[..., None]


def draw_ball(ax: Axes, view: np.ndarray, value, colours: Colormap) -> None:
    """Draw the unit sphere coloured by ``value(points)``."""
    u, v, extent = pixel_grid()
    radius = np.hypot(u, v)
    inside = np.minimum(radius, 0.9999)
    scale = inside / np.maximum(radius, 1e-9)
    points = np.stack([u * scale, v * scale, np.sqrt(1 - inside**2)], axis=-1) @ view
    rgb = colours(value(points))[..., :3] * shade(points, view, 0.8)
    alpha = np.clip((1 - radius) / (u[0, 1] - u[0, 0]) + 0.5, 0, 1)
    ax.imshow(np.dstack([rgb, alpha]), extent=extent, origin="lower", zorder=2, interpolation="bilinear")
    ax.add_patch(Circle((0, 0), 1, fill=False, ec=INK, lw=0.8, zorder=2.5))


def draw_curve(ax: Axes, view: np.ndarray, points: np.ndarray, **style) -> None:
    """Draw a curve [N, 3] on the unit sphere; what lies behind is left out."""
    u, v, depth = (points @ view.T).T
    ax.plot(np.where(depth > 0, u, np.nan), np.where(depth > 0, v, np.nan), solid_capstyle="round", **style)


def draw_world_axes(ax: Axes, view: np.ndarray, start: float = 1.0, names: bool = False) -> None:
    """Draw the axes from the surface outwards; those that point away start behind the ball."""
    for name, (direction, colour) in AXES.items():
        u, v, depth = view @ direction
        across = np.hypot(u, v)  # how much of the axis is seen
        tip = max(1.5 * across, across + 0.38, 0.0 if depth > 0 else 1.42) * np.array([u, v]) / across
        begin = start * np.array([u, v]) if depth > 0 else 0.5 * tip
        arrow = {"arrowstyle": "-|>", "mutation_scale": 16, "color": colour, "lw": 2.4, "shrinkA": 0, "shrinkB": 0}
        ax.annotate("", tip, begin, arrowprops=arrow, zorder=6 if depth > 0 else 1)
        place = tip + np.array([u * 0.46, v * 0.25] if names else [u * 0.2, v * 0.18]) / across
        text = name.replace(", ", "\n") if names else name[:2]
        ax.text(*place, text, color=colour, ha="center", va="center", weight="bold", zorder=7)


def draw_sphere(ax: Axes, view: np.ndarray, sphere: str) -> None:
    """Draw sphere A or B with its weight, graticule, seam, zero meridian and poles."""
    draw_ball(ax, view, lambda points: weight(points, sphere), MAP_A if sphere == "A" else MAP_B)
    along = np.linspace(-1, 1, 400)
    for phi in np.arange(-0.75, 1, 0.25):
        draw_curve(ax, view, on_sphere(along * 0.98, phi, sphere), color=INK, lw=0.5, alpha=0.35, zorder=3)
    for theta in (-0.5, 0.0, 0.5):
        draw_curve(ax, view, on_sphere(theta, along, sphere), color=INK, lw=0.5, alpha=0.35, zorder=3)
    draw_curve(ax, view, on_sphere(along, 0.0, sphere), color="white", lw=3, path_effects=OUTLINE, zorder=4)
    draw_curve(ax, view, on_sphere(along, 1.0, sphere), color=INK, lw=3.0, ls=(0, (2.2, 1.4)), zorder=4)
    draw_world_axes(ax, view)
    for theta in (-1, 1):
        u, v, depth = view @ on_sphere(theta, 0.0, sphere)
        if depth > 0:
            ax.plot(u, v, "o", ms=9, mfc=INK, mec="white", mew=1.6, zorder=8)


def draw_head(ax: Axes, view: np.ndarray) -> None:
    """Draw a simple head by sphere tracing, for orientation."""
    u, v, extent = pixel_grid(extent=1.15)
    position = np.stack([u, v, np.full_like(u, 2.0)], axis=-1) @ view
    for _ in range(70):
        position = position - np.minimum(head_distance(position), 0.2)[..., None] * view[2]
    step = 1e-3
    offsets = np.eye(3) * step
    normals = np.stack([head_distance(position + o) - head_distance(position - o) for o in offsets], axis=-1)
    normals /= np.linalg.norm(normals, axis=-1, keepdims=True) + 1e-12
    x, y, z = np.moveaxis(position, -1, 0)
    rgb = np.full([*u.shape, 3], matplotlib.colors.to_rgb(SKIN))
    rgb[(y > 0.42 + 0.55 * z) | ((z < 0.05) & (y > -0.55) & (np.abs(x) < 0.66))] = matplotlib.colors.to_rgb("#6b4a35")
    eyes = (np.hypot(np.abs(x) - 0.26, (y - 0.12) * 1.5) < 0.085) & (z > 0.3)
    mouth = (np.hypot(x / 0.22, (y + 0.42) / 0.045) < 1) & (z > 0.3)
    rgb[eyes], rgb[mouth] = matplotlib.colors.to_rgb("#26303a"), matplotlib.colors.to_rgb("#b0524a")
    alpha = np.clip(1 - np.abs(head_distance(position)) / 0.012, 0, 1)
    ax.imshow(
        np.dstack([np.clip(rgb * shade(normals, view, 0.55), 0, 1), alpha]), extent=extent, origin="lower", zorder=2
    )
    draw_world_axes(ax, view, start=0.95, names=True)


def head_distance(points: np.ndarray) -> np.ndarray:
    """Return about the signed distance [...] of points [..., 3] to skull, jaw, nose, ears and neck."""
    mirrored = points * [1, 1, 1]
    mirrored[..., 0] = np.abs(mirrored[..., 0])
    parts = [  # centre, radii
        ((0, 0.18, -0.08), (0.66, 0.72, 0.78)),
        ((0, -0.28, 0.12), (0.52, 0.58, 0.56)),
        ((0, -0.1, 0.7), (0.12, 0.2, 0.2)),
        ((0.66, 0.02, -0.1), (0.09, 0.22, 0.15)),
        ((0, -0.9, -0.18), (0.32, 0.5, 0.34)),
    ]
    distance = np.full(points.shape[:-1], np.inf)
    for centre, radii in parts:
        scaled = np.linalg.norm((mirrored - centre) / np.array(radii), axis=-1)
        part = (scaled - 1) * min(radii)
        blend = np.clip(0.5 + 0.5 * (distance - part) / 0.06, 0, 1) if np.isfinite(distance).all() else 1.0
        distance = part if np.isscalar(blend) else distance * (1 - blend) + part * blend - 0.06 * blend * (1 - blend)
    return distance


def draw_two_spheres() -> Figure:
    """Draw the head, sphere A, sphere B and the share of A, from the front and from behind."""
    figure = plt.figure(figsize=(15.6, 8.2))
    columns = [(0.01, 0.285)] + [(0.3 + 0.232 * i, 0.232) for i in range(3)]  # left edge, width
    axes = np.array([[figure.add_axes((x, y, w, 0.4)) for x, w in columns] for y in (0.505, 0.11)])
    views = {"seen from the front": viewer(40, 20), "seen from behind": viewer(220, 20)}
    for row, (title, view) in zip(axes, views.items()):
        draw_head(row[0], view)
        draw_sphere(row[1], view, "A")
        draw_sphere(row[2], view, "B")
        draw_ball(row[3], view, share_of_a, MAP_SHARE)
        draw_world_axes(row[3], view)
        row[0].text(-2.3, 0, title, rotation=90, va="center", ha="center", color=FAINT, fontsize=13)
    for ax in axes.flat:
        ax.set(xlim=(-1.7, 1.7), ylim=(-1.2, 1.8), aspect="equal")
        ax.axis("off")
    for ax in axes[:, 0]:
        ax.set(xlim=(-2.4, 1.95))
    titles = {
        "The head": "world axes",
        "Sphere A": "poles at the ears, seam behind",
        "Sphere B": "poles at crown and neck, seam in front",
        "Who decides": "share of A, $w_A\\,/\\,(w_A+w_B)$",
    }
    for (x, w), (title, text) in zip(columns, titles.items()):
        figure.text(x + w / 2 + (0.015 if x < 0.1 else 0), 0.95, title, ha="center", fontsize=17, weight="bold")
        figure.text(x + w / 2 + (0.015 if x < 0.1 else 0), 0.917, text, ha="center", fontsize=12, color=FAINT)
    bars = [(MAP_A, "weight $w_A$", "01"), (MAP_B, "weight $w_B$", "01"), (MAP_SHARE, "", ("only B", "only A"))]
    for i, (colours, label, ends) in enumerate(bars):
        draw_bar(figure.add_axes((0.341 + 0.232 * i, 0.08, 0.15, 0.022)), colours, label, ends)
    handles = [
        Line2D([], [], marker="o", ls="", ms=9, mfc=INK, mec="white", label="pole"),
        Line2D([], [], color=INK, lw=3, ls=(0, (2.2, 1.4)), label="seam, $\\varphi=\\pm1$"),
        Line2D([], [], color="white", lw=3, path_effects=OUTLINE, label="zero meridian, $\\varphi=0$"),
    ]
    figure.legend(handles=handles, loc="center", bbox_to_anchor=(0.168, 0.065), frameon=False, handlelength=2.6)
    return figure


def draw_bar(ax: Axes, colours: Colormap, label: str, ends: tuple[str, str] | str) -> None:
    """Draw a horizontal colour bar from 0 to 1."""
    ax.imshow(np.linspace(0, 1, 200)[None], cmap=colours, aspect="auto", extent=(0, 1, 0, 1))
    ax.set(yticks=[], xticks=[0, 1], xticklabels=list(ends), xlabel=label)
    ax.tick_params(length=0, colors=INK)
    ax.xaxis.labelpad = -12


# The cameras ----------------------------------------------------------------------------------------------------------


def draw_camera(ax: Axes, place: np.ndarray, forward: np.ndarray, colour: str = INK) -> None:
    """Draw a camera as the wedge that it sees, from its position into its viewing direction."""
    side = np.array([-forward[1], forward[0]])
    body = [place - 0.16 * forward + s * 0.13 * side for s in (-1, 1)]
    lens = [place + 0.14 * forward + s * 0.16 * side for s in (1, -1)]
    ax.add_patch(Polygon([place, lens[0], lens[1]], fc=colour, ec=colour, alpha=0.55, zorder=4))
    ax.add_patch(Polygon([body[0], body[1], place + 0.13 * side, place - 0.13 * side], fc=colour, ec=colour, zorder=5))


def draw_arrow(ax: Axes, start: np.ndarray, end: np.ndarray, colour: str, style: str = "-|>", lw: float = 2.0) -> None:
    """Draw an arrow from start to end."""
    arrow = {"arrowstyle": style, "color": colour, "lw": lw, "shrinkA": 0, "shrinkB": 0, "mutation_scale": 14}
    ax.annotate("", end, start, arrowprops=arrow, zorder=6)


def draw_axis(ax: Axes, name: str, direction: tuple[float, float], text: tuple[float, float]) -> None:
    """Draw a world axis from the middle of the head."""
    colour = next(c for label, (_, c) in AXES.items() if label.startswith(name))
    draw_arrow(ax, np.zeros(2), 1.05 * np.array(direction), colour)
    ax.text(*text, name, color=colour, weight="bold", ha="center", va="center", zorder=7)


def draw_top_view(ax: Axes) -> None:
    """Draw cameras at several yaws, seen from above: +x to the right, +z down."""
    head = {"fc": SKIN, "ec": INK, "lw": 1.2}
    ax.add_patch(Polygon([(-0.07, 0), (0.07, 0), (0, -0.46)], **head, zorder=2))  # nose
    for x in (-0.3, 0.3):
        ax.add_patch(Ellipse((x, 0.03), 0.1, 0.16, **head, zorder=2))
    ax.add_patch(Ellipse((0, 0.02), 0.6, 0.76, **head, zorder=3))
    ax.add_patch(Rectangle((-0.5, -0.5), 1, 1, fill=False, ec=FAINT, lw=1.4, zorder=1))
    ax.add_patch(Rectangle((-0.4, -0.4), 0.8, 0.8, fill=False, ec=FAINT, lw=1.2, ls=":", zorder=1))
    notes = "solid: box, side 1\ndotted: crop, ±0.4"
    ax.text(0.2, 0.92, notes, color=FAINT, va="center", fontsize=10.5)
    ax.add_patch(Circle((0, 0), 2.7, fill=False, ec=FAINT, lw=1, ls="--", zorder=1))
    draw_axis(ax, "+x", (1, 0), (1.1, 0.2))
    draw_axis(ax, "+z", (0, -1), (-0.24, -1.05))
    for yaw_deg in (0, 45, 90, 135, 180, -135, -90, -45):
        place = 2.7 * np.array([np.sin(np.radians(yaw_deg)), -np.cos(np.radians(yaw_deg))])
        draw_camera(ax, place, -place / 2.7, ORANGE if yaw_deg == 45 else INK)
        label = {0: "0°  front", 180: "±180°  back"}.get(yaw_deg, f"{yaw_deg:+d}°".replace("-", "−"))
        ax.text(*(place * 1.2), label, ha="center", va="center", weight="bold" if yaw_deg == 45 else "normal")
    ax.plot([0, 1.75], [0, -1.75], color=ORANGE, lw=1.2, zorder=2)
    ax.plot([0, 0], [-1.05, -2.5], color=ORANGE, lw=1.2, zorder=2)
    ax.add_patch(Arc((0, 0), 3.2, 3.2, theta1=270, theta2=315, color=ORANGE, lw=2.4))
    ax.text(0.78, -1.85, "yaw", color=ORANGE, weight="bold", ha="center", va="center")
    ax.annotate("", (-1.87, 1.87), (0, 0), arrowprops={"arrowstyle": "<->", "color": FAINT, "shrinkA": 0, "shrinkB": 0})
    ax.text(-1.12, 1.5, "radius 2.7", color=FAINT, ha="center", va="center", rotation=-45, fontsize=10.5)


def draw_side_view(ax: Axes) -> None:
    """Draw cameras at several pitches, seen from the head's left: +z to the left, +y up."""
    head = {"fc": SKIN, "ec": INK, "lw": 1.2}
    ax.add_patch(Polygon([(-0.12, -0.2), (0.22, -0.05), (0.24, -0.5), (-0.1, -0.5)], **head, zorder=2))  # neck
    ax.add_patch(Polygon([(-0.3, 0.1), (-0.3, -0.06), (-0.46, -0.05)], **head, zorder=2))  # nose
    ax.add_patch(Ellipse((0.02, 0.04), 0.76, 0.8, **head, zorder=3))
    ax.add_patch(Ellipse((0.06, 0.0), 0.12, 0.19, **head, zorder=4))  # ear
    ax.plot([-0.24], [0.09], "o", ms=4, color=INK, zorder=5)
    ax.add_patch(Rectangle((-0.5, -0.5), 1, 1, fill=False, ec=FAINT, lw=1.4, zorder=1))
    draw_axis(ax, "+z", (-1, 0), (-1.02, 0.2))
    draw_axis(ax, "+y", (0, 1), (0.26, 1.05))
    ax.add_patch(Arc((0, 0), 5.4, 5.4, theta1=140, theta2=220, color=FAINT, lw=1, ls="--"))
    for pitch_deg in (30, 0, -30):
        place = 2.7 * np.array([-np.cos(np.radians(pitch_deg)), np.sin(np.radians(pitch_deg))])
        draw_camera(ax, place, -place / 2.7, ORANGE if pitch_deg == 30 else INK)
        label = f"{pitch_deg:+d}°".replace("-", "−") if pitch_deg else "0°"
        ax.text(*(place * 1.17), label, ha="center", va="center", weight="bold" if pitch_deg == 30 else "normal")
    ax.plot([0, -2.2], [0, 1.27], color=ORANGE, lw=1.2, zorder=2)
    ax.add_patch(Arc((0, 0), 3.2, 3.2, theta1=150, theta2=180, color=ORANGE, lw=2.4))
    ax.text(-1.9, 0.5, "pitch", color=ORANGE, weight="bold", ha="center", va="center")
    place = 2.7 * np.array([-np.cos(np.pi / 6), -0.5])
    near, far = place * (1 - 2.25 / 2.7), place * (1 - 3.3 / 2.7)
    ax.plot(*np.stack([place, far], axis=1), color=BLUE, lw=1.1, zorder=3.5)
    ax.plot(*np.stack([near, far], axis=1), color=BLUE, lw=5, alpha=0.55, solid_capstyle="butt", zorder=3.5)
    ax.annotate("near\n2.25", near, (-0.42, -1.12), color=BLUE, ha="center", va="center", arrowprops=POINTER)
    ax.annotate("far\n3.3", far, (0.98, 0.62), color=BLUE, ha="center", va="center", arrowprops=POINTER)
    middle = place * 0.62
    ax.text(
        middle[0] + 0.18, middle[1] - 0.3, "depth, along the ray", color=BLUE, rotation=30, ha="center", va="center"
    )


def draw_image_view(ax: Axes) -> None:
    """Draw the camera's own axes over the image that it takes."""
    ax.add_patch(Rectangle((0, 0), 1, 1, fc="#f4f1ec", ec=INK, lw=1.6))
    face = {"fc": SKIN, "ec": INK, "lw": 1.2}
    ax.add_patch(Polygon([(0.39, 0.7), (0.61, 0.7), (0.66, 1), (0.34, 1)], **face))
    for u in (0.24, 0.76):
        ax.add_patch(Ellipse((u, 0.5), 0.07, 0.15, **face))
    ax.add_patch(Ellipse((0.5, 0.47), 0.52, 0.68, **face))
    ax.plot([0.39, 0.61], [0.42, 0.42], "o", ms=6, color=INK)
    ax.plot([0.43, 0.5, 0.57], [0.66, 0.675, 0.66], color="#b0524a", lw=3)
    centre = np.array([0.5, 0.5])
    draw_arrow(ax, centre, centre + [0.4, 0], "#c0392b", lw=2.4)
    draw_arrow(ax, centre, centre + [0, 0.42], "#2e8b57", lw=2.4)
    ax.plot(*centre, "o", ms=15, mfc="white", mec="#3457b1", mew=2.2, zorder=8)
    ax.plot(*centre, "x", ms=7, mew=2.2, color="#3457b1", zorder=9)
    ax.text(0.9, 0.45, "x", color="#c0392b", weight="bold", fontsize=14, ha="center", va="center")
    ax.text(0.55, 0.9, "y", color="#2e8b57", weight="bold", fontsize=14, ha="center", va="center")
    ax.text(0.44, 0.56, "z", color="#3457b1", weight="bold", fontsize=14, ha="center", va="center")
    ax.text(0.04, 0.06, "the head's\nright", color=FAINT, va="center", fontsize=10.5)
    ax.text(0.96, 0.06, "the head's\nleft", color=FAINT, va="center", ha="right", fontsize=10.5)
    draw_arrow(ax, np.array([0, -0.06]), np.array([1, -0.06]), INK, lw=1.4)
    draw_arrow(ax, np.array([-0.06, 0]), np.array([-0.06, 1]), INK, lw=1.4)
    ax.text(0.5, -0.11, "u, from 0 to 1", ha="center", va="center")
    ax.text(-0.11, 0.5, "v, from 0 to 1", ha="center", va="center", rotation=90)
    ax.text(0.5, 1.06, "principal point (0.5, 0.5), focal length 4.2647", ha="center", va="center", fontsize=11)
    ax.set(xlim=(-0.17, 1.06), ylim=(1.1, -0.16), aspect="equal")


POINTER = {"arrowstyle": "-", "color": BLUE, "lw": 0.9}


def draw_cameras() -> Figure:
    """Draw the top view, the side view and the image."""
    figure = plt.figure(figsize=(15.6, 6.4))
    panels = {  # left edge, width, what
        "Yaw, seen from above": (0.0, 0.36, "azimuth of the camera: 0 in front, positive towards +x"),
        "Pitch, seen from the head's left": (0.36, 0.31, "elevation of the camera: positive above"),
        "The image": (0.67, 0.33, "camera axes: x right, y down, z into the scene"),
    }
    axes = []
    for title, (left, width, text) in panels.items():
        axes.append(figure.add_axes((left, 0.01, width, 0.86)))
        figure.text(left + width / 2, 0.94, title, ha="center", fontsize=17, weight="bold")
        figure.text(left + width / 2, 0.893, text, ha="center", fontsize=12, color=FAINT)
    top, side, image = axes
    draw_top_view(top)
    draw_side_view(side)
    draw_image_view(image)
    top.set(xlim=(-3.75, 3.75), ylim=(-3.5, 3.5), aspect="equal")
    side.set(xlim=(-3.6, 1.4), ylim=(-2.6, 2.6), aspect="equal")
    for ax in axes:
        ax.axis("off")
    return figure


def save(figure: Figure, name: str) -> None:
    """Write a picture with a palette of 256 colours, dithered, which keeps it small."""
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=100, facecolor="white")
    plt.close(figure)
    picture = Image.open(buffer).convert("RGB")
    picture = picture.quantize(palette=picture.quantize(256, kmeans=6), dither=Image.Dither.FLOYDSTEINBERG)
    colours = np.array(picture.getpalette()).reshape(-1, 3)
    colours[np.asarray(picture)[0, 0]] = 255  # the background: the palette holds a mean of nearly white pixels
    picture.putpalette(colours.flatten().tolist())
    picture.save(FOLDER / name, optimize=True)
    print(f"{FOLDER / name}: {(FOLDER / name).stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    save(draw_two_spheres(), "two_spheres.png")
    save(draw_cameras(), "cameras.png")
