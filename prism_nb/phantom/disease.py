"""The phantom's findings: what each of them adds to the path of a ray.

A finding is a `Layer`: `water`, the share in [0, 1] of the lung's air that it replaces; `extra`,
attenuation that it adds (or, for a broken rib, takes away); `clear`, the share of a lung that is
free air. Places are exogenous: they come from the patient's own streams, present or not, and the
dial of a severity changes the amount alone. A layer is exactly zero outside its mask.
"""

from dataclasses import dataclass

import numpy as np

from prism_nb.phantom.anatomy import MU_SOFT, RIB_BACK, SIDES, rib_path, wall_x
from prism_nb.phantom.draw import curve, smooth, stroke, texture
from prism_nb.phantom.graph import VISIBLE_ML

FLUID_ML = (0, VISIBLE_ML, 200, 500, 1000, 2000, 2500)  # volume and height over the angle's floor:
FLUID_CM = (0, 0, 1.9, 6.0, 9.6, 17.0, 20.5)  # 200 ml blunt it, 500 hide the dome, 2,000 fill 2/3
SHIFT_ML, SHIFT_CM = (1200, 2500), (0.0, 1.6)  # a large effusion pushes the heart away


@dataclass(frozen=True)
class Layer:
    """What a finding changes: maps (size, size) float32, or None."""

    water: np.ndarray | None = None
    extra: np.ndarray | None = None
    clear: np.ndarray | None = None
    outside: bool = False  # it reaches beyond the lungs: a rib does

    @property
    def mask(self):
        """Where the finding may change the film."""
        maps = [m != 0 for m in (self.water, self.extra, self.clear) if m is not None]
        return np.logical_or.reduce(maps)


def sides(name):
    """The sides of "right", "left" or "both": -1 is the patient's right, the image's left."""
    return {"right": (-1,), "left": (1,), "both": SIDES}[name]


def effusion(patient, g, b, ml):
    """Pleural fluid: a meniscus, concave and higher at the wall; a veil too on supine films.

    `ml` is the volume of the side, or of the fuller one of two: the other has 60 % of it.
    """
    water = g.empty()
    veil = 0.0
    if patient.supine:
        veil = np.float32(min(ml / 3000, 0.5)) * smooth(g.y - b.apex - 4, 14.0)
        ml = 0.6 * ml
    for side, share in zip(sides(patient.severity["effusion_side"]), (1.0, 0.6), strict=False):
        height = np.interp(share * ml, FLUID_ML, FLUID_CM)
        lateral = side * (g.x - b.midline)
        across = np.clip(lateral / b.half, 0, 1)
        level = b.floor[side] - height * (0.62 + 0.38 * across * across)
        here = smooth(g.y - level, 0.6 + 0.16 * height) if height else g.empty()
        here = 1 - (1 - here) * (1 - veil)
        water += here * (lateral > 0) * (lateral < b.half + 0.6) * (g.y < b.floor[side] + 3)
    return Layer(water=np.minimum(water, 0.97))


def fluid_shift(patient, ml):
    """How far in cm a one-sided effusion pushes the heart to the other side."""
    where = sides(patient.severity["effusion_side"])
    return float(-where[0] * np.interp(ml, SHIFT_ML, SHIFT_CM)) if len(where) == 1 else 0.0


def edema(patient, g, b, amount):
    """Water around the hila, bat-wing when severe, and Kerley B lines at the bases."""
    rng, water, lines = patient.draw("edema place"), g.empty(), g.empty()
    rough = 0.8 + 0.25 * texture(rng, 34, g.size)
    for side in SIDES:
        cx, cy = b.carina[0] + side * 5.6, b.carina[1] + 4.4
        r2 = ((g.x - cx) / 6.6) ** 2 + ((g.y - cy) / 9.0) ** 2
        water += np.clip(1 - r2, 0, None)
        for y in np.linspace(-5.5, -0.5, 7) + rng.normal(0, 0.15, 7):
            y = b.floor[side] - 2 + y
            x = side * (float(wall_x(b, np.float64(y))) - 0.2)
            inward = side * rng.uniform(0.8, 1.5)
            stroke(lines, g, [(x, y), (x - inward, y + rng.normal(0, 0.1))], 0.06, 0.06 * amount)
    return Layer(water=np.clip(0.62 * amount * water * rough, 0, 0.85), extra=lines)


def _place(rng, b, low, high):
    """A side and a point inside that lung, between the shares `low` and `high` of its height."""
    side, share, across = SIDES[rng.integers(2)], rng.uniform(low, high), rng.uniform(0.35, 0.72)
    y = b.apex + share * (b.dome[side] - b.apex)
    return side, np.array([b.midline + side * (2.5 + across * (float(wall_x(b, y)) - 2.5)), y])


def _cloud(rng, g, centre, radius, ragged=0.34):
    """A cloud with a ragged edge, in [0, 1], exactly zero beyond 1.9 radii."""
    r = np.sqrt((g.x - centre[0]) ** 2 + ((g.y - centre[1]) / 1.15) ** 2) / radius
    rough = 0.6 * texture(rng, 13, g.size) + 0.4 * texture(rng, 34, g.size)
    return smooth(1 - r + ragged * np.clip(rough, -2, 2), 1.1) * (r < 1.9)


def consolidation(patient, g, b, amount):
    """A lobar opacity with air bronchograms."""
    rng = patient.draw("consolidation place")
    side, centre = _place(rng, b, 0.30, 0.85)
    water, air = _cloud(rng, g, centre, rng.uniform(2.8, 4.6)), g.empty()
    root = np.array([b.carina[0] + side * 3.5, b.carina[1] + 3])
    away = centre - root
    for turn in (-0.35, 0.0, 0.35):
        turned = np.array([away[0] * np.cos(turn) - away[1] * np.sin(turn),
                           away[0] * np.sin(turn) + away[1] * np.cos(turn)])  # fmt: skip
        bent = turned + rng.normal(0, 0.6, 2)
        path = curve([root + 0.4 * turned, root + 0.8 * bent, root + 1.25 * turned], 4)
        stroke(air, g, path, np.linspace(0.16, 0.06, len(path)), 0.3)
    return Layer(water=(0.35 + 0.5 * amount) * water * np.clip(1 - air, 0.4, 1))


def pneumonia(patient, g, b, amount):
    """Several patchy opacities, mostly low in one lung."""
    rng, keep = patient.draw("pneumonia place"), 1.0
    side, _ = _place(rng, b, 0.5, 0.9)
    for _ in range(4):
        _, centre = _place(rng, b, 0.45, 0.95)
        centre[0] = b.midline + side * abs(centre[0] - b.midline)
        cloud = _cloud(rng, g, centre, rng.uniform(1.2, 2.4), 0.4)
        keep = keep * (1 - (0.22 + 0.38 * amount) * cloud)
    return Layer(water=1 - keep)


def opacity(patient, g, b, amount):
    """A large faint haze of no particular kind."""
    rng = patient.draw("opacity place")
    _, centre = _place(rng, b, 0.25, 0.85)
    cloud = _cloud(rng, g, centre, rng.uniform(3.6, 5.6), 0.3)
    return Layer(water=(0.12 + 0.28 * amount) * cloud)


def atelectasis(patient, g, b, amount):
    """Plate-like bands above a diaphragm that has risen: see `raised`."""
    rng, bands = patient.draw("atelectasis place"), g.empty()
    side = SIDES[rng.integers(2)]
    for k in range(3):
        y, x = b.dome[side] - 1.2 - 1.5 * k - rng.uniform(0, 1.2), rng.uniform(3.5, 6.5)
        length, fall = rng.uniform(3.5, 7.0), rng.normal(0, 0.8)
        points = curve([(x, y), (x + length / 2, y - 0.3 + fall / 2), (x + length, y + fall)])
        points = np.column_stack([b.midline + side * points[:, 0], points[:, 1]])
        half = rng.uniform(0.14, 0.42) * (0.6 + 0.6 * amount)
        stroke(bands, g, points, half, 0.20 * (0.4 + 0.6 * amount) if amount > 0.3 * k else 0)
    return Layer(extra=bands)


def raised(patient, amount):
    """By how many cm atelectasis lifts the dome of its side: {side: cm}."""
    side = SIDES[patient.draw("atelectasis place").integers(2)]
    return {side: 1.6 * amount, -side: 0.0}


def pneumothorax(patient, g, b, gap):
    """Free air between the wall and a thin pleural line, with no vessel in it; widest on top."""
    side = SIDES[patient.draw("pneumothorax place").integers(2)]
    lateral = side * (g.x - b.midline)
    share = np.clip((g.y - b.apex) / (b.dome[side] - b.apex), 0, 1)
    width = gap * (1.1 - 0.85 * share)
    from_wall = np.minimum(wall_x(b, g.y) - lateral, g.y - b.apex - 0.1 * (lateral - 5.3) ** 2)
    clear = smooth(width - from_wall, 0.25) * (lateral > 1.5)
    line = smooth(0.09 - np.abs(from_wall - width - 0.06), max(0.12, g.pitch))
    inside = (lateral > 2.2) & (from_wall > 0.2) & (g.y < b.dome[side] + 1)
    return Layer(clear=clear, extra=0.10 * line * inside)


def lesion(patient, g, b, diameter):
    """A round nodule or mass of soft tissue."""
    rng = patient.draw("lesion place")
    _, centre = _place(rng, b, 0.12, 0.80)
    radius, lobes = diameter / 2, rng.uniform(0, 2 * np.pi, 3)
    dx, dy = g.x - centre[0], g.y - centre[1]
    angle = np.arctan2(dy, dx)
    edge = radius * (1 + sum(0.05 * np.sin((k + 2) * angle + a) for k, a in enumerate(lobes)))
    r2 = (dx * dx + dy * dy) / (edge * edge)
    return Layer(extra=2 * MU_SOFT * radius * np.sqrt(np.clip(1 - r2, 0, None)))


def pleural_other(patient, g, b, thickness):
    """A lateral rind of pleural thickening of uneven width."""
    rng = patient.draw("pleural place")
    side, top = SIDES[rng.integers(2)], rng.uniform(0.2, 0.5)
    lateral = side * (g.x - b.midline)
    share = (g.y - b.apex) / (b.floor[side] - b.apex)
    uneven = np.interp(share, np.linspace(0, 1, 9), rng.uniform(0.35, 1.0, 9)).astype(np.float32)
    uneven = uneven * smooth(share - top, 0.15)
    rind = smooth(thickness * uneven - (wall_x(b, g.y) - lateral), 0.25) * (lateral > 2)
    return Layer(water=0.9 * rind * (uneven > 0))


def fracture(patient, g, b, step):
    """A displaced posterolateral rib: its two ends no longer meet."""
    rng, out = patient.draw("fracture place"), g.empty()
    path = rib_path(b, SIDES[rng.integers(2)], int(rng.integers(3, 8)))
    at = int(rng.integers(5, 9))  # at the back, where the rib is drawn at full strength
    piece, strong = path[at - 4 : at + 5], RIB_BACK * b.bone
    stroke(out, g, piece, 0.56, -strong, "bone")
    offset, ends = np.array([0.0, step / 2]), np.linspace(0, 1, 5)[:, None]
    for end in (piece[:5] - offset * ends, piece[4:] + offset * ends[::-1]):
        stroke(out, g, end, 0.56, 1.1 * strong, "bone")
    return Layer(extra=out, outside=True)


LAYERS = {
    "effusion_ml": effusion,
    "edema": edema,
    "consolidation": consolidation,
    "pneumonia": pneumonia,
    "opacity": opacity,
    "atelectasis": atelectasis,
    "pneumothorax_cm": pneumothorax,
    "lesion_cm": lesion,
    "pleural_cm": pleural_other,
    "fracture_cm": fracture,
}
