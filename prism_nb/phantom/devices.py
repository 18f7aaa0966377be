"""The phantom's devices: pacemaker, central line, tubes, ECG leads and sternal wires.

Each device is a map of extra attenuation (mu x t, dimensionless) on the pixel grid; its mask is
where the map is positive. Positions are exogenous: they are drawn for every patient, device or
not.
"""

from itertools import pairwise

import numpy as np

from prism_nb.phantom.anatomy import smooth

MIN_LINE_PX = 1.2  # a lead of 2 mm would vanish on a small film: lines are never drawn thinner


def line(x, y, pitch, points, width, opacity):
    """A smooth polyline of `width` cm, anti-aliased, at least MIN_LINE_PX pixels wide."""
    points = curve(np.asarray(points, np.float32))
    half = max(width, MIN_LINE_PX * pitch) / 2
    nearest = np.full(np.broadcast_shapes(x.shape, y.shape), np.inf, np.float32)
    reach = half + 2 * pitch
    for start, end in pairwise(points):
        columns, rows = _window(x, y, start, end, reach)
        if columns.start >= columns.stop or rows.start >= rows.stop:
            continue
        px, py, step = x[:, columns] - start[0], y[rows] - start[1], end - start
        along = np.clip((px * step[0] + py * step[1]) / max(step @ step, 1e-6), 0, 1)
        distance = np.hypot(px - along * step[0], py - along * step[1])
        nearest[rows, columns] = np.minimum(nearest[rows, columns], distance)
    return opacity * smooth(half - nearest, pitch)


def _window(x, y, start, end, reach):
    """Columns and rows that a segment can touch: drawing all of the film for each would be slow."""
    low, high = np.minimum(start, end) - reach, np.maximum(start, end) + reach
    columns = slice(*np.searchsorted(x[0], [low[0], high[0]]))
    return columns, slice(*np.searchsorted(y[:, 0], [low[1], high[1]]))


def curve(points, per_span=8):
    """Catmull-Rom points through the given ones: (n, 2) -> ((n - 1) * per_span + 1, 2)."""
    p = np.vstack([2 * points[0] - points[1], points, 2 * points[-1] - points[-2]])
    t = np.linspace(0, 1, per_span, endpoint=False, dtype=np.float32)[:, None]
    spans = [
        0.5
        * (
            2 * b
            + (c - a) * t
            + (2 * a - 5 * b + 4 * c - d) * t**2
            + (3 * b - a - 3 * c + d) * t**3
        )
        for a, b, c, d in zip(p[:-3], p[1:-2], p[2:-1], p[3:], strict=True)
    ]
    return np.vstack([*spans, points[-1:]])


def disc(x, y, pitch, centre, radius, opacity):
    """A filled disc."""
    return opacity * smooth(radius - np.hypot(x - centre[0], y - centre[1]), pitch)


def pacemaker(x, y, pitch, b, rng):
    """Can below the left clavicle, leads by the cava to the right heart."""
    cx, cy = rng.uniform(8.5, 10.5), rng.uniform(9.0, 11.0)
    tilt, half = rng.uniform(-0.35, 0.35), (2.33, 2.54)
    u = (x - cx) * np.cos(tilt) + (y - cy) * np.sin(tilt)
    v = -(x - cx) * np.sin(tilt) + (y - cy) * np.cos(tilt)
    corner = np.hypot(
        np.clip(np.abs(u) - half[0] + 1, 0, None), np.clip(np.abs(v) - half[1] + 1, 0, None)
    )
    can = 2.4 * smooth(1 - corner, pitch)
    floor = b["dome"][1]
    ventricle = [
        (cx - 2, cy - 1.4),
        (5.0, 7.6),
        (0.5, 8.6),
        (-2.4, 11.5),
        (-2.6, 17),
        (0.2, floor - 2.6),
    ]
    ventricle.append((rng.uniform(4.0, 6.0), floor - rng.uniform(0.6, 1.6)))
    leads = line(x, y, pitch, ventricle, 0.22, 1.6) + disc(x, y, pitch, ventricle[-1], 0.28, 1.0)
    if rng.random() < 0.6:
        atrium = [
            (cx - 2, cy - 1.0),
            (5.0, 8.1),
            (0.5, 9.1),
            (-2.2, 12),
            (-2.9, 17.2),
            (-1.6, 18.6),
            (-0.6, 17.2),
        ]
        leads += line(x, y, pitch, atrium, 0.22, 1.6)
    return can + leads


def central_line(x, y, pitch, b, rng):
    """Right jugular catheter with its tip in the lower superior vena cava."""
    tip = (-2.6 + rng.normal(0, 0.15), rng.uniform(13.5, 16.5))
    points = [(rng.uniform(-6.5, -4.5), -0.5), (-4.2, 4.0), (-3.1, 8.0), (-2.7, 11.0), tip]
    return line(x, y, pitch, points, 0.24, 0.75)


def tubes(x, y, pitch, b, rng):
    """Endotracheal tube above the carina and a nasogastric tube to the stomach."""
    sway, tip = rng.normal(0, 0.2), 13.4 - np.clip(rng.normal(5, 1), 2.5, 7)
    trachea = [(sway + 0.3, -0.5), (sway, 3.0), (0.0, tip)]
    out = line(x, y, pitch, trachea, 0.95, 0.28) + line(
        x, y, pitch, [(p[0] + 0.35, p[1]) for p in trachea], 0.14, 0.6
    )
    stomach = [
        (-0.7, -0.5),
        (-0.5, 10),
        (0.6, 19),
        (1.6, b["dome"][1]),
        (5.0, b["dome"][1] + rng.uniform(3, 5.5)),
    ]
    return out + line(x, y, pitch, stomach, 0.45, 0.55)


def ecg(x, y, pitch, b, rng):
    """Adhesive electrodes with snaps, their wires leaving over the shoulders or the flank."""
    out = np.zeros(np.broadcast_shapes(x.shape, y.shape), np.float32)
    for side, level in ((-1, 8.0), (1, 8.5), (1, 22.0), (-1, 23.0))[: rng.integers(2, 5)]:
        spot = np.array([side * rng.uniform(7.5, 12.5), level + rng.uniform(-1.5, 2.5)])
        leave = (
            np.array([side * rng.uniform(2, 15), -0.5])
            if rng.random() < 0.7
            else np.array([side * 21, rng.uniform(14, 30)])
        )
        middle = (spot + leave) / 2 + rng.normal(0, 1.8, 2)
        out += disc(x, y, pitch, spot, 0.95, 0.22) + disc(x, y, pitch, spot, 0.38, 1.6)
        out += line(x, y, pitch, [spot, middle, leave], 0.14, 0.9)
    return out


def sternal_wires(x, y, pitch, b, rng):
    """Five to seven wire loops down the midline."""
    out = np.zeros(np.broadcast_shapes(x.shape, y.shape), np.float32)
    count, turn = rng.integers(5, 8), np.linspace(0, 2 * np.pi, 9)
    for level in np.linspace(10.0, 23.5, count) + rng.normal(0, 0.2, count):
        cx, rx, ry = rng.normal(0, 0.2), rng.uniform(0.6, 0.95), rng.uniform(0.35, 0.6)
        loop = np.stack([cx + rx * np.cos(turn), level + ry * np.sin(turn)], axis=1)
        out += line(x, y, pitch, loop, 0.12, 1.5)
    return out


DRAW = {f.__name__: f for f in (pacemaker, central_line, tubes, ecg, sternal_wires)}


def draw_devices(patient, x, y, pitch, b):
    """Every device that the patient has or would have: kind -> extra attenuation (size, size)."""
    return {
        k: DRAW[k](x, y, pitch, b, patient.draw(f"device {k}")) for k in patient.severity["kinds"]
    }
