"""The phantom's healthy chest: how much tissue, air and bone each ray passes, in cm.

Sizes, levels and angles follow the sources that the README beside this file lists. A `Body` holds
one patient's numbers, all of them exogenous: no finding and no device changes one. The functions
turn them into (size, size) float32 maps. x grows to the image's right, which is the patient's
left; side -1 is the patient's right.
"""

from dataclasses import dataclass

import numpy as np

from prism_nb.phantom.draw import curve, disc, segments, smooth, stroke, texture

SIDES = (-1, 1)
MU_SOFT = 0.217  # attenuation of soft tissue per cm at 60 keV
MU_BONE = 0.388  # what a cm of cortical bone adds to it
AERATED = 0.78  # share of a lung that is air
RIBS, ROOTS = 10, 9  # ribs that a film shows, vessels that leave a hilum
RIB_BACK, RIB_FRONT = 0.27, 0.17  # attenuation of the flat back and the thinner front of a rib
WIDEST = 0.84  # from here down, as a share of its height, the inner thorax is `half` wide
RIB_TURN = 12  # point of a rib's path where it turns from the back to the front
HEART_LEFT = ((0, 0.42), (0.2, 0.66), (0.45, 0.90), (0.66, 0.99), (0.74, 1), (0.9, 0.93), (1, 0.76))
HEART_RIGHT = ((0, 0.56), (0.25, 0.85), (0.48, 0.99), (0.55, 1), (0.8, 0.90), (1, 0.60))


@dataclass(frozen=True)
class Body:
    """One patient's anatomy in cm: where things are and how large."""

    male: bool
    age: int
    ap: bool
    half: float  # half of the inner thorax at its widest
    apex: float  # y of the lungs' tops
    dome: dict  # side -> y of the diaphragm's top
    floor: dict  # side -> y of the costophrenic angle
    midline: float  # x of spine and trachea: a slightly turned patient
    carina: tuple  # (x, y)
    fork: float  # angle below the carina, radians
    knob: float  # radius of the aortic knob
    wall: float  # soft tissue outside the ribs
    depth: float  # front to back
    normal_ratio: float  # heart / inner thorax without cardiomegaly
    magnify: float  # AP films show the heart wider
    rib_pitch: float
    rib_drop: float  # how far a rib falls from the spine to its side
    rib_start: float
    clavicle: float  # y of the clavicles' middle
    turned_out: float  # how far the scapulae are turned off the lungs
    breast: tuple  # (thickness, x, y, radius); thickness 0 for men
    arm: float
    vertebra: float

    @property
    def bone(self):
        """Strength of the bones, 1 at 60 years: they thin with age."""
        return 1 - 0.004 * (self.age - 60)


def body(patient):
    """The patient's numbers, drawn from the patient's and the study's own streams."""
    rng, study = patient.draw_patient("anatomy"), patient.draw("position")
    male, ap = patient.sex == "Male", patient.view == "AP"
    half = float(np.clip(rng.normal(29.7 if male else 27.1, 2.2), 23.5, 33.0)) / 2
    fat = float(np.clip(rng.normal(2.9, 1.1), 1.2, 6.0))
    apex = float(np.clip(rng.normal(5.2, 0.5), 4.0, 6.5))
    knob = float(np.clip(rng.normal(1.55, 0.15) + 0.0095 * (patient.age - 61), 1.0, 2.1))
    higher_left = rng.random() < 0.03  # the left dome is rarely the higher one
    difference = float(np.clip(rng.normal(1.6, 0.4), 0.5, 2.8)) * (-1 if higher_left else 1)
    pitch, slope = float(rng.normal(2.28, 0.06)), float(rng.uniform(1.7, 3.0))
    rib_start = float(rng.normal(0.0, 0.25))
    fork, vertebra = float(np.deg2rad(np.clip(rng.normal(60, 7.8), 42, 80))), rng.normal(2.4, 0.07)
    thickness, bx, by = rng.normal(3.6, 1.1), rng.normal(9.6, 0.7), rng.normal(21.5, 1.3)
    br = float(np.clip(rng.normal(6.3, 0.7), 4.8, 8.0))
    breath = float(study.normal(0, 0.8)) - (1.6 if ap else 0.0)  # portable films: less inspiration
    right = 26.6 + breath
    turn = float(study.normal(0, 0.25))
    return Body(
        male=male,
        age=patient.age,
        ap=ap,
        half=half,
        apex=apex,
        dome={-1: right, 1: right + difference},
        floor={-1: right + 4.2, 1: right + difference + 3.2},
        midline=turn,
        carina=(turn + 0.25, float(np.clip(study.normal(13.4, 0.4), 12.4, 14.4))),
        fork=fork,
        knob=knob,
        wall=fat,
        depth=float(rng.normal(21.5 if male else 19.5, 1.2)) + 0.7 * (fat - 2.9),
        normal_ratio=float(patient.severity["normal_ratio"]),
        magnify=1.09 if ap else 1.0,  # 1.125 for the heart, less 3 % of the thorax, at 100 cm
        rib_pitch=pitch,
        rib_drop=slope,
        rib_start=rib_start,
        clavicle=float(study.normal(7.2 if not ap else 5.9, 0.5)),
        turned_out=float(study.uniform(0.0, 1.5) if ap else study.uniform(1.5, 3.5)),
        breast=(0.0 if male else float(np.clip(thickness, 1.0, 6.0)), float(bx), float(by), br),
        arm=float(study.uniform(0, 1)),
        vertebra=float(vertebra),
    )


def wall_x(b, y):
    """Distance of the inner chest wall from the midline at height `y` (any array)."""
    s = np.clip((y - b.apex) / (WIDEST * (b.floor[-1] - b.apex)), 1e-3, 1.0)
    return 4.2 + (b.half - 4.2) * (1 - (1 - s) ** 2.5) ** 0.62


def _deep(g, b):
    """Depth of the trunk by height: shallow at the shoulders, deepest at the diaphragm."""
    return b.depth * (0.56 + 0.44 * smooth(g.y - 12.5, 19.0))


def trunk(g, b):
    """Soft-tissue depth of neck, shoulders, trunk and arms, breasts included, in cm."""
    y, across = g.y, np.abs(g.x - b.midline * 0.5)
    half = (b.half + b.wall) * (1 + 0.05 * smooth(y - 27, 12)) + 6.5 * (1 - smooth(y - 12.5, 9.0))
    u = np.clip(across / half, 0, 1)
    u *= u
    depth = _deep(g, b) * np.sqrt(1 - u * u)
    slope = np.clip(across - 4.5, 0, None)
    line = 0.6 + 0.52 * slope - 0.008 * slope * slope
    depth = depth * smooth(y - line, 3.4)  # the trapezius' slope
    neck = 11.5 * np.sqrt(np.clip(1 - (across / (6.0 + 0.25 * b.wall)) ** 2, 0, None))
    depth = np.maximum(depth, neck * smooth(9.0 - y, 6.0))
    thickness, bx, by, radius = b.breast
    if thickness:
        for side in SIDES:
            r2 = ((g.x - side * bx) / (1.15 * radius)) ** 2 + ((y - by) / radius) ** 2
            hangs = smooth(y - by + 1.5, 2.2 * radius)  # flat on top, full below
            depth += thickness * hangs * np.clip(1 - r2, 0, None) ** np.float32(0.5)
    return depth.astype(np.float32)


def lung(g, b, side, raised=0.0):
    """One lung's extent from front to back in cm, and the mask of its cavity (size, size).

    `raised` lifts the dome by so many cm (volume loss).
    """
    lateral = side * (g.x - b.midline)
    outer, y = wall_x(b, g.y), g.y
    inner = 2.1 + 1.5 * np.clip(1 - (y - b.apex) / 5.0, 0, 1) ** 2
    top = b.apex + 0.10 * (lateral - 5.3) ** 2
    dome, dome_x = b.dome[side] - raised, 0.46 * b.half
    away = lateral - dome_x
    steep = (b.floor[side] - b.dome[side]) / (b.half - dome_x) ** 3
    base = dome + np.where(away > 0, steep * away, 0.024) * away * away
    inside = smooth(outer - lateral, 0.3) * smooth(lateral - inner, 0.5) * smooth(y - top, 0.5)
    inside *= lateral > 0
    near = np.clip((outer - lateral) * (1 / 4.6), 0, 1)
    near_top = np.clip((y - top) * (1 / 5.5), 0, 1)
    round_ = np.sqrt(near * (2 - near)) * (0.45 + 0.55 * np.sqrt(near_top * (2 - near_top)))
    above = smooth(base - y, 0.35)
    recess = 0.13 * smooth(base + 3.0 - y, 6.0)  # the lung reaches down behind the diaphragm
    extent = (0.97 * _deep(g, b) - 4.6) * inside * round_ * (above * (1 - recess) + recess)
    return extent.astype(np.float32), (inside * above > 0.5)


def heart_outline(b, ratio):
    """The heart's box for a ratio: left_x, right_x, top_y, bottom_y; a third lies to the right."""
    width = ratio * 2 * b.half * b.magnify
    middle = b.midline * 0.6
    top = b.carina[1] + 3.6 - 7.0 * (ratio - 0.45)
    return middle + width * 2 / 3, middle - width / 3, top, b.dome[1] + 1.2


def heart(g, b, ratio, shift=0.0):
    """Share of the chest's air that the heart replaces, in [0, 1], and its mask."""
    left, right, top, bottom = heart_outline(b, ratio)
    s = np.clip((g.y - top) / (bottom - top), 0, 1)
    middle = b.midline * 0.6
    left_x = middle + (left - middle) * _border(HEART_LEFT, s) + shift
    right_x = middle + (right - middle) * _border(HEART_RIGHT, s) + shift
    rows = smooth(g.y - top + 0.5, 2.6) * smooth(bottom + 0.4 - g.y, 2.0)
    covered = smooth(left_x - g.x, 0.5) * smooth(g.x - right_x, 0.5)
    u = np.clip((2 * g.x - left_x - right_x) / (left_x - right_x), -1, 1)
    share = (rows * covered * (0.60 + 0.34 * np.sqrt(1 - u * u))).astype(np.float32)
    return share, (covered > 0.5) & (g.y > top) & (g.y < bottom)


def _border(points, s):
    """A smooth border through (height, width) pairs at heights `s` (size, 1); never beyond 1."""
    fine = curve(points)
    return np.interp(s, fine[:, 0], np.minimum(fine[:, 1], 1)).astype(np.float32)


def mediastinum(g, b, wider=0.0, shift=0.0):
    """Share of air replaced by great vessels, oesophagus and fat above and behind the heart."""
    y, m, level = g.y, b.midline, b.carina[1]
    knob = (b.knob - 0.15) * np.clip(1 - ((y - level + 2.2) / (b.knob + 0.9)) ** 2, 0, 1) ** 0.8
    artery = 1.05 * np.clip(1 - ((y - level - 2.3) / 3.2) ** 2, 0, 1)
    bulge = wider * smooth(y - 5.5, 4.0) * smooth(level + 5.5 - y, 5.0)
    left = 2.0 + knob + artery + 0.5 * bulge
    right = 2.45 + 0.35 * smooth(y - level + 4, 5.0) + 0.5 * bulge
    wide = smooth(m + left + shift - g.x, 0.75) * smooth(g.x - m + right - shift, 0.8)
    share = 0.84 - 0.22 * smooth(np.abs(g.x - m - shift) - 2.2, 2.0)  # vessels alone at the rim
    return (wide * share * smooth(y - 3.5, 3.0)).astype(np.float32)


def airway(g, b):
    """Air of the trachea and the main bronchi, in cm."""
    out, (cx, cy) = g.empty(), b.carina
    m = b.midline
    stroke(out, g, curve([(m, -1), (m, 5), (m + 0.1, 9), (cx, cy)]), 0.85, 1.6)
    for side, share, length in ((-1, 0.43, 3.4), (1, 0.57, 5.0)):
        angle = share * b.fork
        end = (cx + side * length * np.sin(angle), cy - 0.3 + length * np.cos(angle))
        stroke(out, g, [(cx, cy - 0.3), end], [0.7, 0.5], 1.1)
    return np.minimum(out, 1.6)


def rib_path(b, side, n):
    """Middle line of rib n (0 to RIBS - 1) from the spine round to the front, (k, 2) cm."""
    first = n == 0
    y0 = 4.9 + b.rib_start + b.rib_pitch * n + 0.02 * n * n
    drop = b.rib_drop * (0.8 + 0.05 * n) + (0.4 if first else 0.9)
    reach = float(wall_x(b, np.float64(y0 + drop))) + 0.35 if not first else 7.0
    front = 3.1 * b.rib_pitch * (0.55 if first else 1.0)
    points = [
        (1.3, y0 - 0.1),
        (0.42 * reach, y0 - 0.35 + 0.06 * n),
        (0.74 * reach, y0 + 0.22 * drop),
        (0.95 * reach, y0 + 0.68 * drop),
        (1.005 * reach, y0 + drop + 0.6),
        (0.93 * reach, y0 + drop + 0.32 * (front - drop) + 1.0),
        (0.74 * reach, y0 + drop + 0.72 * (front - drop) + 1.0),
        (max(0.50 * reach, 5.0), y0 + front + 1.0),
    ]
    points = curve(points, 3)
    return np.column_stack([b.midline * 0.7 + side * points[:, 0], points[:, 1]])


def clavicle_path(b, side):
    """Middle line of a clavicle from the sternum to the shoulder, (k, 2) cm."""
    y = b.clavicle
    points = [(2.3, y + 1.5), (5.0, y + 0.9), (8.5, y - 0.1), (12.0, y - 1.3), (15.8, y - 1.9)]
    points = curve(points, 4)
    return np.column_stack([b.midline * 0.8 + side * points[:, 0], points[:, 1]])


def bones(g, b):
    """Attenuation of ribs, clavicles, scapulae, humeri and spine above that of soft tissue."""
    out = g.empty()
    for side in SIDES:
        for n in range(RIBS):
            path = rib_path(b, side, n)
            width = 0.56 if n else 0.48
            back = RIB_BACK * b.bone * (1 if n < 9 else 0.6)
            stroke(out, g, path[: RIB_TURN + 1], width, back, "bone")
            if n < 8:
                stroke(out, g, path[RIB_TURN : RIB_TURN + 8], width, RIB_FRONT * b.bone, "bone")
                stroke(out, g, path[RIB_TURN + 7 :], width + 0.06, 0.5 * RIB_FRONT * b.bone, "bone")
        stroke(out, g, clavicle_path(b, side), 0.62, 0.36 * b.bone, "bone")
        _shoulder(out, g, b, side)
    out += _spine(g, b) * b.bone
    return out


def _shoulder(out, g, b, side):
    x, y, m = 16.4 + 0.25 * b.turned_out, b.clavicle + 1.4, b.midline * 0.5

    def at(points):
        return np.array([(m + side * px, py) for px, py in points])

    disc(out, g, (m + side * (x + 1.3), y + 0.9), 2.3, 0.5 * b.bone, 0.5)
    swing = 3.5 * b.arm
    stroke(
        out,
        g,
        at([(x + 1.6, y + 1.6), (x + 2.4 + swing, y + 12)]),
        [1.6, 1.1],
        0.55 * b.bone,
        "bone",
    )
    stroke(out, g, at([(x - 3.2, y - 1.4), (x + 1.6, y - 1.7)]), 0.65, 0.26 * b.bone, "bone")
    edge = 11.6 + b.turned_out
    medial = curve(at([(edge - 0.8, y - 0.8), (edge - 0.4, y + 4), (edge + 1.6, y + 10.5)]), 5)
    lateral = curve(at([(x - 0.8, y + 1.4), (edge + 2.6, y + 6), (edge + 1.6, y + 10.5)]), 5)
    stroke(out, g, medial, 0.30, 0.16 * b.bone)
    stroke(out, g, lateral, 0.50, 0.30 * b.bone)
    blade = (medial + lateral) / 2
    stroke(out, g, blade, np.linalg.norm(medial - lateral, axis=1) / 2 + 0.1, 0.11 * b.bone, "flat")
    disc(out, g, (m + side * (x - 2.6), y + 0.1), 0.8, 0.2 * b.bone, 0.4)


def _spine(g, b):
    turn = 2 * np.pi / b.vertebra * (g.y - b.rib_start - 4.9)
    disc_space = smooth(-np.cos(turn) - 0.72, 0.5)
    aside = np.abs(g.x - b.midline)
    waist = 1.62 + 0.010 * g.y - 0.14 * np.cos(turn + np.pi)
    column = smooth(waist - aside, 0.45)
    plates = smooth(0.28 - np.abs(np.cos(turn) + 0.50), 0.3)
    rims = smooth(0.22 - np.abs(aside - waist + 0.2), 0.25)
    strong = 0.20 - 0.0022 * g.y
    out = column * strong * (1 - 0.45 * disc_space + 0.3 * plates + 0.3 * rims * (1 - disc_space))
    for n in range(int(41 / b.vertebra)):
        y = 4.9 + b.rib_start + b.vertebra * (n - 0.12)
        for side in SIDES:
            disc(out, g, (b.midline + side * 0.95, y), 0.34, 0.07, 0.25)
        stroke(out, g, [(b.midline, y + 0.5), (b.midline, y + 1.3)], 0.26, 0.09)
    return out


def vessels(patient, g, b, mask):
    """Attenuation of the branching pulmonary vessels and of the lungs' fine markings."""
    rng, out = patient.draw_patient("vessels"), g.empty()
    cx, cy = b.carina
    roots = []
    for side in SIDES:
        hx, hy = cx + side * 3.6, cy + (2.9 if side < 0 else 2.0)  # the left hilum is higher
        path = [(hx - side * 2.1, hy - 0.6), (hx, hy), (hx + side * 0.8, hy + 2)]
        path = curve([*path, (hx + side * 1.6, hy + 4.6)])
        stroke(out, g, path, [0.85] * 8 + [0.75] * 6 + [0.5] * 5, 0.26)
        for angle in np.linspace(-1.45, 1.5, ROOTS):
            roots.append((side, hx - side * 0.5, hy + 1.2 * np.clip(angle, -0.8, 1.2), angle))
    side, x, y, heading = np.array(roots).T
    heading = heading + rng.normal(0, 0.16, len(side))
    radius, length = rng.uniform(0.32, 0.48, len(side)), rng.uniform(2.6, 4.2, len(side))
    for _ in range(5):
        bend = rng.normal(0, 0.15, len(side))
        for part in range(3):  # a vessel is three straight pieces
            x1 = x + side * np.cos(heading) * length / 3
            y1 = y + np.sin(heading) * length / 3
            thick = radius * (1 - 0.1 * part)
            segments(out, g, np.column_stack([x, y]), np.column_stack([x1, y1]), thick,
                     0.10 + 2.4 * MU_SOFT * thick)  # fmt: skip
            x, y, heading = x1, y1, heading + bend
        # Each ends in two thinner ones that leave it at narrow angles.
        x, y, side = np.tile(x, 2), np.tile(y, 2), np.tile(side, 2)
        turn = rng.uniform(0.1, 0.6, len(x)) * np.repeat([1, -1], len(heading))
        heading = np.tile(heading, 2) + turn
        radius = np.tile(radius, 2) * rng.uniform(0.6, 0.75, len(x))
        length = np.tile(length, 2) * rng.uniform(0.66, 0.86, len(x))
    fine = texture(rng, 90, g.size) * 0.6 + texture(rng, 180, g.size) * 0.5
    return (out + 0.035 * fine + 0.06 * texture(rng, 26, g.size)) * mask


def belly_gas(patient, g, b):
    """Gas below the diaphragm, in cm: the gastric bubble and some bowel."""
    rng, out = patient.draw("gas"), g.empty()
    x, y = rng.uniform(4.5, 8.5), b.dome[1] + rng.uniform(2.2, 3.4)
    wide, high = rng.uniform(1.4, 3.2), rng.uniform(0.7, 1.6)
    r2 = ((g.x - x) / wide) ** 2 + ((g.y - y) / high) ** 2
    out += 4.5 * np.sqrt(np.clip(1 - r2, 0, None)) * smooth(g.y - b.dome[1] - 0.9, 0.5)
    for _ in range(rng.integers(0, 6)):
        spot = (rng.uniform(-9, 11), b.dome[1] + rng.uniform(6, 13))
        disc(out, g, spot, rng.uniform(0.5, 1.4), rng.uniform(0.8, 2.2), 0.8)
    return out
