"""Small shapes on a film: a grid in centimetres, smooth edges, strokes, discs and boxes.

Every shape touches its own window only and has a compact edge, so that what lies outside a changed
shape keeps its bytes (a logistic edge would reach over the whole film).
"""

from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import numpy as np
from PIL import Image

FIELD_CM = 38.0  # side of the square film
MIN_LINE_PX = 1.2  # a lead of 2 mm would vanish on a small film: lines are never drawn thinner


@dataclass(frozen=True)
class Grid:
    """Pixel centres in cm: x (1, size) to the right, y (size, 1) down from the top middle."""

    size: int
    pitch: float
    left: float  # x and y of the film's corner
    top: float
    x: np.ndarray
    y: np.ndarray

    def empty(self):
        """A film of zeros (size, size) float32."""
        return np.zeros((self.size, self.size), np.float32)

    def window(self, low, high):
        """Rows and columns of the box from `low` to `high`, each (x, y) in cm."""
        columns, rows = (
            slice(
                max(int((first - start) / self.pitch - 0.5), 0),
                min(max(int((last - start) / self.pitch + 1.5), 0), self.size),
            )
            for first, last, start in zip(low, high, (self.left, self.top), strict=True)
        )
        return rows, columns


@lru_cache(maxsize=8)
def grid(size, field=FIELD_CM, aside=0.0, down=0.0):
    """The pixel grid of a square film of `size` pixels and `field` cm a side, its middle moved."""
    pitch, left = field / size, aside - field / 2
    centres = (np.arange(size, dtype=np.float32) + np.float32(0.5)) * np.float32(pitch)
    x, y = centres[None, :] + np.float32(left), centres[:, None] + np.float32(down)
    return Grid(size, pitch, left, down, x, y)


def smooth(distance, width):
    """0 below -width/2, 1 above +width/2, a cubic between: exactly constant outside."""
    t = np.clip(distance * np.float32(1 / width) + np.float32(0.5), 0, 1)
    return t * t * (3 - 2 * t)


def curve(points, per_span=6):
    """Catmull-Rom points through the given ones: (n, 2) -> ((n - 1) * per_span + 1, 2)."""
    points = np.asarray(points, np.float32)
    p = np.vstack([2 * points[:1] - points[1:2], points, 2 * points[-1:] - points[-2:-1]])
    t = np.linspace(0, 1, per_span, endpoint=False, dtype=np.float32)[:, None]
    a, b, c, d = (p[i : len(p) - 3 + i, None] for i in range(4))
    spans = (
        2 * b + (c - a) * t + (2 * a - 5 * b + 4 * c - d) * t**2 + (3 * b - a - 3 * c + d) * t**3
    )
    return np.vstack([0.5 * spans.reshape(-1, 2), points[-1:]])


def stroke(out, g, points, half, value, profile="rod"):
    """Add a line of half-width `half` cm (one number, or one a point) through `points` (n, 2).

    `value` is the attenuation added on the line's middle: "rod" is a solid cylinder, "tube" a
    hollow one with two brighter walls, "bone" marrow between two cortices, "flat" a band.
    Where the line crosses itself it counts once.
    """
    points = np.asarray(points, np.float32)
    least = np.float32(MIN_LINE_PX / 2 * g.pitch)
    halves = np.maximum(np.broadcast_to(np.asarray(half, np.float32), len(points)), least)
    reach = float(halves.max()) + g.pitch
    rows, columns = g.window(points.min(0) - reach, points.max(0) + reach)
    if rows.start >= rows.stop or columns.start >= columns.stop:
        return
    ratio = np.full((rows.stop - rows.start, columns.stop - columns.start), 9.0, np.float32)
    for (start, end), (h0, h1) in zip(pairwise(points), pairwise(halves), strict=True):
        reach = max(h0, h1) + g.pitch
        r, c = g.window(np.minimum(start, end) - reach, np.maximum(start, end) + reach)
        if r.start >= r.stop or c.start >= c.stop:
            continue
        px, py = g.x[:, c] - start[0], g.y[r] - start[1]
        dx, dy = end - start
        along = np.clip((px * dx + py * dy) * np.float32(1 / max(dx * dx + dy * dy, 1e-9)), 0, 1)
        px, py = px - along * dx, py - along * dy
        here = np.sqrt(px * px + py * py)
        here /= h0 + (h1 - h0) * along if h0 != h1 else h0
        view = ratio[r.start - rows.start : r.stop - rows.start,
                     c.start - columns.start : c.stop - columns.start]  # fmt: skip
        np.minimum(view, here, out=view)
    limit = g.pitch / float(halves.max())
    near = ratio < 1 + limit  # a long line leaves most of its window empty
    ratio = ratio[near]
    view = out[rows, columns]
    view[near] += np.float32(value) * smooth(1 - ratio, limit) * PROFILES[profile](ratio)


def _rod(ratio):
    return np.sqrt(np.clip(1.12 - ratio * ratio, 0, 1))


def _tube(ratio):
    return 0.25 + 0.75 * smooth(ratio - 0.68, 0.2)


def _bone(ratio):
    return 0.55 + 0.45 * smooth(ratio - 0.74, 0.35)


def _band(ratio):
    return np.float32(1)


PROFILES = {"rod": _rod, "tube": _tube, "bone": _bone, "flat": _band}


def segments(out, g, starts, ends, halves, values):
    """Add many short straight lines at once: starts, ends (n, 2) cm, halves and values (n,).

    Their ends are cut square, so that consecutive ones join without a blob. Quicker than `stroke`
    for hundreds of lines of about the same length.
    """
    halves = np.maximum(halves, MIN_LINE_PX / 2 * g.pitch).astype(np.float32)
    step = (ends - starts).astype(np.float32)
    length = np.maximum(np.hypot(step[:, 0], step[:, 1]), 1e-6)
    reach = int(np.ceil((length.max() / 2 + halves.max()) / g.pitch)) + 1
    middle = (starts + ends) / 2
    corner = np.floor((middle - (g.left, g.top)) / g.pitch).astype(int) - reach
    offset = np.arange(2 * reach + 1)
    columns, rows = corner[:, :1] + offset, corner[:, 1:] + offset  # (n, k)
    px = ((columns + 0.5) * g.pitch + g.left - middle[:, :1]).astype(np.float32)[:, None, :]
    py = ((rows + 0.5) * g.pitch + g.top - middle[:, 1:]).astype(np.float32)[:, :, None]
    ux, uy = (step / length[:, None]).T[:, :, None, None]
    half, pitch = halves[:, None, None], np.float32(1 / g.pitch)
    across = np.abs(py * ux - px * uy)
    along = length[:, None, None] / 2 - np.abs(px * ux + py * uy)
    cover = np.clip(along * pitch + np.float32(0.5), 0, 1)
    cover *= np.clip((half - across) * pitch + np.float32(0.5), 0, 1)
    across /= half
    cover *= np.sqrt(np.clip(np.float32(1.12) - across * across, 0, 1))
    cover *= np.asarray(values, np.float32)[:, None, None]
    seen = (rows >= 0) & (rows < g.size)
    keep = seen[:, :, None] & ((columns >= 0) & (columns < g.size))[:, None, :] & (cover > 0)
    at = (rows[:, :, None] * g.size + columns[:, None, :])[keep]
    np.add.at(out.reshape(-1), at, cover[keep])  # a view: `out` is contiguous


def disc(out, g, centre, radius, value, edge=None):
    """Add a filled disc; `edge` is the width of its soft rim in cm, one pixel unless given."""
    edge = max(edge or 0.0, g.pitch)
    reach = max(radius, MIN_LINE_PX / 2 * g.pitch) + edge
    rows, columns = g.window(np.subtract(centre, reach), np.add(centre, reach))
    away = np.hypot(g.x[:, columns] - np.float32(centre[0]), g.y[rows] - np.float32(centre[1]))
    out[rows, columns] += np.float32(value) * smooth(reach - edge - away, edge)


def box(out, g, centre, half, corner, angle, value):
    """Add a rounded rectangle: half sides (a, b) cm, corner radius, angle in radians."""
    reach = float(np.hypot(*half)) + g.pitch
    rows, columns = g.window(np.subtract(centre, reach), np.add(centre, reach))
    px, py = g.x[:, columns] - np.float32(centre[0]), g.y[rows] - np.float32(centre[1])
    u, v = px * np.cos(angle) + py * np.sin(angle), py * np.cos(angle) - px * np.sin(angle)
    outside = np.hypot(
        np.clip(np.abs(u) - half[0] + corner, 0, None),
        np.clip(np.abs(v) - half[1] + corner, 0, None),
    )
    out[rows, columns] += np.float32(value) * smooth(corner - outside, g.pitch).astype(np.float32)


def texture(rng, cells, size):
    """A smooth random field (size, size) of unit spread with about `cells` bumps a side."""
    coarse = rng.standard_normal((cells, cells), np.float32)
    return np.asarray(Image.fromarray(coarse).resize((size, size), Image.Resampling.BICUBIC))
