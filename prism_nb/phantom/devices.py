"""The phantom's devices: pacemaker, lines, tubes, ECG leads, sternal wires, clips and a prosthesis.

Each kind is a map of extra attenuation (mu x t at 60 keV, no unit) on the pixel grid; its mask is
where the map is positive. A kind draws from its own stream and from the healthy body only, so that
it stays where it is whatever finding is set and whatever other device is shown. Lengths are in cm;
x grows to the image's right, which is the patient's left; side -1 is the patient's right.
"""

import numpy as np

from prism_nb.phantom.draw import FIELD_CM, box, curve, disc, segments, smooth, stroke

CAN, RIM, BATTERY, HEADER, PIN = 2.4, 0.9, 1.0, 0.45, 1.3  # RIM, BATTERY, PIN: on top
LEAD, ELECTRODE, COIL, CATHETER = 1.25, 1.1, 1.2, 0.75
WALL, STRIPE, GAP_CM = 0.15, 0.38, 0.9  # a tube's wall, its line of barium and the line's gap
CABLE, STEEL, CLIP, IMPLANT = 0.5, 1.05, 2.0, 3.2
OVER, UNDER, BESIDE = -3.0, FIELD_CM + 9, FIELD_CM / 2 + 7  # outside any film, however placed


def draw_devices(patient, g, b, kinds):
    """Draw the given kinds of device: kind -> extra attenuation (size, size) float32, 0 or more.

    `g` is the grid and `b` the patient's body. Raises ValueError for a kind that is not drawn.
    """
    maps = {}
    for kind in kinds:
        if kind not in DRAW:
            raise ValueError(f"unknown device {kind!r}; use one of {', '.join(DRAW)}")
        maps[kind] = g.empty()
        DRAW[kind](maps[kind], g, b, patient)
    return maps


def part(path, start, end):
    """The stretch of a path between two distances from its tip (its last point), in cm."""
    run = np.r_[0, np.cumsum(np.hypot(*np.diff(path[::-1], axis=0).T))]
    at = np.unique(np.r_[start, run[(run > start) & (run < end)], min(end, run[-1])])
    return np.column_stack([np.interp(at, run, path[::-1, k]) for k in (0, 1)])


def _film(b, side, points):
    """Points given as if for the left side of an unturned patient, where they are on the film."""
    return np.array(points) * (side, 1) + (b.midline, 0)


def _lines(out, g, lines):
    """Thin round lines, all in one go: (path, half-width, attenuation on the middle) each."""
    rows = np.vstack([np.column_stack([path[:-1], np.diff(path, axis=0), len(path[1:]) * [line]])
                      for path, *line in lines])  # fmt: skip
    pieces = np.ceil(np.hypot(rows[:, 2], rows[:, 3]) / 0.5).astype(int)  # short ones are quicker
    rows, share = np.repeat(rows, pieces, axis=0), 1 / np.repeat(pieces, pieces)[:, None]
    turn = np.concatenate([np.arange(n) for n in pieces])[:, None]
    start, step = rows[:, :2] + rows[:, 2:4] * share * turn, rows[:, 2:4] * share
    segments(out, g, start, start + step, rows[:, 4], rows[:, 5])


def _tube(out, g, path, radius, stripe, aside, gap=None):
    """A plastic tube: two faint walls and a stripe, broken `gap` cm from the tip."""
    stroke(out, g, path, radius, WALL, "tube")
    along = np.gradient(path, axis=0)
    line = path + aside * radius * along[:, ::-1] * (-1, 1) / np.hypot(*along.T)[:, None]
    ends = [(0.1, 99.0)] if gap is None else [(0.1, gap), (gap + GAP_CM, 99.0)]
    half = max(0.085, 0.22 * radius)
    _lines(out, g, [(part(line, *end), half, stripe) for end in ends])


def can_place(patient, b):
    """Where the pacemaker's can is: centre (x, y), scale, angle in radians and side."""
    rng = patient.draw("device pacemaker")
    side = 1 if rng.random() < 0.92 else -1
    centre = (b.midline + side * rng.uniform(8.2, 10.6), b.clavicle + rng.uniform(4.6, 7.6))
    return centre, rng.uniform(0.95, 1.08), -side * rng.uniform(-0.2, 0.8), side


def pacemaker(out, g, b, patient):
    """Titanium can, 4.7 x 5.1 cm with its header; rim, battery, circuit and terminals show."""
    (cx, cy), scale, angle, _ = can_place(patient, b)
    chips = patient.draw("device circuit").random((4, 8), np.float32) ** 2
    rows, columns = g.window((cx - 3.8, cy - 3.8), (cx + 3.8, cy + 3.8))
    px, py = g.x[:, columns] - np.float32(cx), g.y[rows] - np.float32(cy)
    cos, sin = float(np.cos(angle)) / scale, float(np.sin(angle)) / scale
    u, v, soft = px * cos + py * sin, py * cos - px * sin, g.pitch / scale  # header: v < 0

    def plate(across, along, half, corner):
        """Depth below the edge of a rounded plate, negative outside."""
        du, dv = np.abs(u - across) - half[0] + corner, np.abs(v - along) - half[1] + corner
        return corner - np.hypot(np.clip(du, 0, None), np.clip(dv, 0, None))

    case = plate(0, 0.5, (2.33, 2.04), np.where(v > 0.5, np.float32(1.95), np.float32(0.5)))
    body, inside, battery = smooth(case, soft), smooth(case - 0.3, soft), smooth(v - 0.75, soft)
    film = (CAN + RIM) * body - RIM * smooth(case - 0.16, soft) + BATTERY * inside * battery
    row, column = (v + 1.35) * 2, (u + 2) * 2  # the circuit: chips on half a centimetre each
    chip = chips[np.clip(row, 0, 3).astype(int), np.clip(column, 0, 7).astype(int)]
    chip = chip * ((np.abs(row % 1 - 0.5) < 0.36) & (np.abs(column % 1 - 0.5) < 0.38))
    film += 0.8 * inside * (1 - battery) * chip
    header = smooth(plate(-0.1, -2.0, (1.75, 0.56), 0.35), soft) * (1 - body)
    pins = sum(smooth(plate(k, -2.05, (0.3, 0.15), 0.05), soft) for k in (-1.0, 0.1, 1.0))
    out[rows, columns] += film + header * (HEADER + PIN * pins)


def lead_paths(patient, b):
    """Paths of the leads from the can to their tips in the heart: name -> (n, 2) cm.

    "ventricle" and "atrium" always, "coronary" for one in five. All lie in the normal-sized heart.
    """
    (cx, cy), scale, angle, side = can_place(patient, b)
    rng, y, level = patient.draw("device pacemaker_leads"), b.clavicle, b.carina[1]
    ratio = patient.severity.get("lead_ratio", b.normal_ratio)  # of another heart where redrawn
    left = ratio * 2 * b.half * 2 / 3  # from the midline to the heart's left border
    header = complex(cx, cy) + scale * complex(-side * 1.3, -2.1) * np.exp(1j * angle)
    start = np.array([header.real, header.imag])
    turn, radius = np.deg2rad(np.arange(80, -281, -60)), rng.uniform(0.7, 1.5)
    wound = radius * np.column_stack([side * 1.15 * np.cos(turn), np.sin(turn) - 1])
    slack = wound - [0, 0.2] if rng.random() < 0.6 else np.array([(-side * 0.9, -0.5)])
    across, fall = 2.35 + left * rng.uniform(0.42, 0.72), b.dome[1] - level - rng.uniform(0.3, 1.4)
    bend, rise, bow = rng.uniform(-0.5, 0.3), rng.uniform(5.0, 5.6), rng.uniform(-0.6, 0.6)
    ends = {  # from the cava at the carina's level
        "ventricle": [(-0.5, 0.3 * fall), (-0.5, 0.58 * fall), (0.5 + bend, 0.82 * fall),
                      (0.45 * across + bend, 0.93 * fall), (across, fall)],
        "atrium": [(-0.3, 4.2), (-0.1, 6.3), (0.7, 7.2), (1.5, 6.5), (1.6, rise)],
        "coronary": [(-0.2, 0.35 * fall), (0.8, 0.58 * fall), (2.3 + 0.25 * left, 0.53 * fall),
                     (2.3 + 0.48 * left, 0.53 * fall), (2.3 + 0.6 * left, 0.68 * fall)],
    }  # fmt: skip
    paths = {}
    for name, end in list(ends.items())[: 2 + (rng.random() < 0.2)]:
        own = start + np.array([0, 0.22 * len(paths)])
        own = np.vstack([own, own + slack + rng.normal(0, 0.12, slack.shape)])
        high = (0.5 * (own[-1, 0] + b.midline + side * 7.9) + side * bow, 0.5 * (cy + y) - 0.2)
        vein = _film(b, side, [(7, y + 1.7), (4.8, y + 1.1), *_veins(b, side)])
        vein += rng.normal(0, 0.16, 2)  # two leads in one vein lie side by side
        heart = [(b.midline - 2.35 + dx, level + dy) for dx, dy in end]
        paths[name] = curve(np.vstack([own, high, vein, heart]), 4)
    return paths


def _veins(b, side):
    """From under the clavicle to the cava, as `_film` takes them; the left vein crosses over."""
    y, level = b.clavicle, b.carina[1]
    if side > 0:
        return [(2.0, y + 2.2), (-0.7, 0.4 * y + 0.6 * level - 0.4), (-2.4, level - 1)]
    return [(2.7, y + 2.8), (2.4, level - 1)]


def pacemaker_leads(out, g, b, patient):
    """Leads through the subclavian vein to the right heart, ring and tip electrodes brighter."""
    for path in lead_paths(patient, b).values():
        _lines(out, g, [(path, 0.085, LEAD), (part(path, 0.0, 0.35), 0.13, ELECTRODE),
                        (part(path, 1.1, 1.5), 0.13, ELECTRODE)])  # fmt: skip


def icd_coils(out, g, b, patient):
    """Shock coils on the ventricle's lead: in the ventricle, and for most also in the cava."""
    path, rng = lead_paths(patient, b)["ventricle"], patient.draw("device icd_coils")
    starts = (rng.uniform(1.8, 2.3), rng.uniform(16.0, 17.5))[: 1 + (rng.random() < 0.7)]
    _lines(out, g, [(part(path, k, k + 6.0), 0.165, COIL) for k in starts])


def central_line_path(patient, b):
    """Path of the central venous catheter down to its tip, (n, 2) cm, and its radius."""
    rng, y = patient.draw("device central_line"), b.clavicle
    route, side, sway = rng.random(), 1 if rng.random() < 0.3 else -1, rng.normal(0, 0.25, 3)
    if route < 0.5:  # internal jugular vein
        points = [(4.6 + sway[1], OVER), (3.9 + sway[2], 3.2), (3.2, y + 1.4)]
    elif route < 0.7:  # subclavian vein: in under the clavicle
        points = [(9.6 + sway[1], y + 4.6), (7.6, y + 2.3), (4.6, y + 0.9)]
    else:  # from the arm
        points = [(BESIDE, 19 + 4 * sway[1]), (b.half + 3.0, 12.5 + sway[2]), (11.2, y + 3.0),
                  (7.4, y + 1.4), (4.4, y + 1.2)]  # fmt: skip
    tip = (-side * 2.3, b.carina[1] + rng.uniform(0.5, 4.0))
    return curve(_film(b, side, [*points, *_veins(b, side), tip]), 6), 0.08 + 0.035 * (route < 0.7)


def central_line(out, g, b, patient):
    """Catheter of 4 to 7 French by neck, clavicle or arm into the lower superior vena cava."""
    path, radius = central_line_path(patient, b)
    _lines(out, g, [(path, radius, CATHETER), (2 * path[:1] - path[[2, 0]], 0.2, 0.5)])


def port(out, g, b, patient):
    """Port chamber under the skin: plastic body, metal ring round the septum, thin catheter."""
    rng, up = patient.draw("device port"), b.clavicle
    side = 1 if rng.random() < 0.25 else -1
    x, y, top = rng.uniform(6.6, 9.4), up + rng.uniform(4.4, 7.2), up - rng.uniform(0.2, 1.4)
    points = [(x, y), (x, y - 1), (x - 0.2, y - 2.6), (0.4 * x + 3.4, up + 0.8), (4.9, top),
              (3.8, top), (3.1, up + 0.9), *_veins(b, side),
              (-side * 2.3, b.carina[1] + rng.uniform(1.0, 4.0))]  # fmt: skip
    path = curve(_film(b, side, points), 4)
    _lines(out, g, [(path[4:], 0.09, CATHETER), (path[4:7], 0.2, 0.6)])
    disc(out, g, path[0], 1.35, 0.22)
    disc(out, g, path[0], 0.98, 1.4)
    disc(out, g, path[0], 0.58, -0.8)  # the septum inside the ring


def et_tube(out, g, b, patient):
    """Endotracheal tube, 1 cm wide, with its stripe; its tip is 3 to 7 cm above the carina."""
    rng = patient.draw("device et_tube")
    end = b.carina[1] - np.clip(rng.normal(5, 1), 3, 7) - 0.5  # less the radius of its round end
    x, y = [*rng.normal((0.35, 0.15), 0.15), 0.08], [OVER, 0.5 * (end + OVER), end]
    _tube(out, g, curve(_film(b, 1, np.column_stack([x, y])), 4), 0.5, 0.42, 0.6)


def ng_tube(out, g, b, patient):
    """Nasogastric tube behind the heart into the stomach; some are thin with a weighted tip."""
    rng, level, y = patient.draw("device ng_tube"), b.carina[1], b.dome[1]
    sway, far = rng.normal(0, 0.2, 3), rng.uniform(5.0, 7.0)
    tip = min(rng.uniform(8.4, 10.0), FIELD_CM - 1 - y)  # not below the film
    points = [(-0.4 + sway[0], OVER), (-0.1 + sway[1], 5.0), (0.6, level - 1.5),
              (0.5 + sway[2], level + 4), (1.0, y - 3), (2.0, y + 0.8), (0.7 * far, y + 3),
              (far, y + 0.6 * tip), (far - 0.8, y + 0.84 * tip), (far - 3.5, y + tip)]  # fmt: skip
    path, hole = curve(_film(b, 1, points), 4), rng.uniform(5, 7)
    if rng.random() < 0.3:  # feeding tube
        _lines(out, g, [(path, 0.14, 0.36), (part(path, 0, 2.2), 0.2, 1.3)])
    else:
        _tube(out, g, path, 0.26, STRIPE, 0.1, hole)


def chest_tube_path(patient, b):
    """Path of the chest tube to its tip, (n, 2) cm, and how far from the tip its side hole is."""
    rng = patient.draw("device chest_tube")
    side, apical = 1 if rng.random() < 0.5 else -1, rng.random() < 0.55
    y = b.apex + rng.uniform(0.52, 0.64) * (b.floor[side] - b.apex)  # the 4th or 5th space
    inner, dome, sway = 0.9 * b.half, b.dome[side], rng.uniform(-1, 1, 2)
    points = [(b.half + b.wall + 1.6 + sway[0], UNDER), (b.half + b.wall + 1.4, y + 9.5),
              (b.half + 0.7 * b.wall, y + 3.4), (b.half - 0.1, y + 0.4)]  # fmt: skip
    if apical:  # for air
        points += [(inner - 0.6, y - 3.2), (0.68 * inner + sway[0], 0.5 * (y + b.apex) - 0.8),
                   (0.42 * inner + 0.5 * sway[1], b.apex + 2.4)]  # fmt: skip
    else:  # for fluid
        points += [(inner - 2.2, y - 0.7), (0.55 * inner + sway[0], 0.4 * y + 0.6 * dome - 1.6),
                   (0.42 * inner - 0.5, dome - 1.2 + 0.6 * sway[1])]  # fmt: skip
    return curve(_film(b, side, points), 4), rng.uniform(4.0, 5.5)


def chest_tube(out, g, b, patient):
    """Chest tube of 24 to 32 French, its stripe broken at the last side hole."""
    path, hole = chest_tube_path(patient, b)
    _tube(out, g, path, patient.draw("device bore").uniform(0.38, 0.5), 0.55, 0.45, hole)


def ecg(out, g, b, patient):
    """Three to five electrodes with snaps or grabbers, and the loose wires that leave the film."""
    rng, lines = patient.draw("device ecg"), []
    spots = np.array([(-0.68 * b.half, b.clavicle + 2.6), (0.68 * b.half, b.clavicle + 2.4),
                      (0.85 * b.half, b.dome[1] + 0.8), (-0.85 * b.half, b.dome[-1] + 1.2),
                      (0.22 * b.half, b.carina[1] + 5.0)])  # fmt: skip
    spots += rng.normal((b.midline, 0), 1.1, (5, 2))
    snap, away = rng.random() < 0.5, 1 if rng.random() < 0.6 else -1
    leave = ((away * BESIDE, rng.uniform(22, 34)), (away * rng.uniform(2, 11), UNDER),
             (away * BESIDE, rng.uniform(4, 14)))[rng.choice(3, p=(0.4, 0.35, 0.25))]  # fmt: skip
    for spot in spots[rng.permutation(5)[: rng.integers(3, 6)]]:
        to = leave + rng.normal(0, 1.3, 2) - spot
        reach, slack = np.hypot(*to), rng.uniform(0.3, 0.7)
        t = np.unique(np.r_[np.linspace(0, 1, 24), np.linspace(slack, slack + 0.2, 16)])[:, None]
        sway = rng.normal(0, 1, (4, 2)) * reach * np.array([[0.09], [0.07], [0.03], [0.015]])
        sway[0, 1] += rng.uniform(0, 0.2) * reach  # it sags
        path = spot + to * t + np.sin(np.pi * t * np.arange(1, 5)) @ sway
        turn = 2 * np.pi * smooth(t - slack - 0.1, 0.2)  # some have a loop
        loop = rng.uniform(1.5, 2.8) * (rng.random() < 0.4) / reach
        aside = to[::-1] * (-1, 1) * rng.choice((-1, 1))
        path += loop * (np.sin(turn) * to + (1 - np.cos(turn)) * aside)
        lines.append((path, 0.07, CABLE))
        lines += _electrode(out, g, spot, (path[1] - spot) / np.hypot(*(path[1] - spot)), snap)
    _lines(out, g, lines)


def _electrode(out, g, spot, along, snap):
    """Draw a sticker with its stud or clamp; the thin lines that belong to it are returned."""
    disc(out, g, spot, 1.5, 0.06, 0.2)
    disc(out, g, spot, 0.55 if snap else 0.32, 0.5 if snap else 1.2)
    if snap:
        disc(out, g, spot, 0.24, 1.3)
        return [(spot + np.outer((0.5, 1.0), along), 0.14, 0.6)]
    box(out, g, spot + along * 0.7, (0.4, 0.32), 0.1, np.arctan2(along[1], along[0]), 0.7)
    aside = np.outer((0.36, 0.25), along[::-1] * (-1, 1))
    jaws = spot + np.outer((0.6, -0.4), along)
    return [(jaws + aside, 0.085, 1.3), (jaws - aside, 0.085, 1.3)]


def sternal_wires(out, g, b, patient):
    """Five to seven loops of steel wire down the sternum, each with its twisted knot."""
    rng, lines = patient.draw("device sternal_wires"), []
    count, turn = rng.integers(5, 8), np.linspace(0, 2 * np.pi, 8, endpoint=False)
    for level in np.linspace(b.clavicle + 3.0, b.carina[1] + 10.0, count):
        wide, high, crossed = rng.uniform(0.65, 1.15), rng.uniform(0.15, 0.5), rng.random() < 0.2
        tilt, knot, tail = rng.normal(0, 0.16), rng.uniform(-0.5, 0.5), rng.uniform(-0.3, 0.3)
        loop = np.column_stack([wide * np.cos(turn), high * np.sin((1 + crossed) * turn)])
        loop += rng.normal(0, 0.05, (8, 2))
        twist = np.array([(knot * wide, 0.8 * high), (knot * wide + tail, high + 0.4)])
        centre = rng.normal((b.midline * 0.8, level), 0.2)
        turned = np.array([[np.cos(tilt), np.sin(tilt)], [-np.sin(tilt), np.cos(tilt)]])
        lines.append((centre + curve(np.vstack([loop, loop[:1]]), 2) @ turned, 0.055, STEEL))
        lines.append((centre + twist @ turned, 0.085, STEEL))
    _lines(out, g, lines)


def clips(out, g, b, patient):
    """Six to ten surgical clips of 3 to 8 mm in one bed: axilla, hilum, mediastinum or breast."""
    rng, lines = patient.draw("device clips"), []
    x, below, *spread = ((13.0, 1.5, 1.6, 2.4), (4.6, 2.5, 1.0, 1.4), (1.8, 5.0, 0.9, 3.0),
                         (9.5, 9.5, 1.1, 1.3))[rng.integers(4)]  # fmt: skip
    bed = _film(b, 1 if rng.random() < 0.5 else -1, [(x, b.carina[1] + below)])
    heading = rng.uniform(0, np.pi)
    for spot in bed + rng.normal(0, spread, (rng.integers(6, 11), 2)):
        turn, half = heading + rng.normal(0, 0.5), rng.uniform(0.15, 0.4)
        along = np.array([np.cos(turn), np.sin(turn)])
        leg = spot + np.outer((-half, half), along)
        aside = np.outer((0.2, 0.08), along[::-1] * (-1, 1))  # from the side both legs show
        lines += [(leg + k * aside, 0.055, CLIP) for k in range(rng.integers(1, 3))]
    _lines(out, g, lines)


def prosthesis(out, g, b, patient):
    """Shoulder prosthesis: a metal half-sphere facing the socket, and a stem down the humerus."""
    rng = patient.draw("device prosthesis")
    middle = g.left + 0.5 * g.size * g.pitch  # the shoulder that more of the film shows
    side, radius, low = 1 if rng.normal(0, 0.2) < middle else -1, *rng.uniform((2, 8), (2.35, 10))
    x, y = 16.4 + 0.25 * b.turned_out, b.clavicle + 1.4  # the shoulder joint, as in anatomy
    head = np.array([0.5 * b.midline + side * (x + 0.9), y + 0.9])
    neck = np.array([side * 0.75, 0.66])  # from the socket out and down into the shaft
    rows, columns = g.window(head - radius - 1, head + radius + 1)
    px, py = g.x[:, columns] - np.float32(head[0]), g.y[rows] - np.float32(head[1])
    ball = smooth(0.4 - px * float(neck[0]) - py * float(neck[1]), g.pitch)
    out[rows, columns] += IMPLANT * ball * smooth(radius - np.hypot(px, py), g.pitch)
    shaft = np.array([head[0] + side * (1.0 + 2.6 * b.arm), y + low])
    stem = curve([head + 0.2 * neck, head + 1.2 * neck, head + 2.6 * neck + [0, 1.5], shaft], 4)
    stroke(out, g, stem, np.linspace(0.9, 0.45, len(stem)), IMPLANT, "flat")


KINDS = (pacemaker, pacemaker_leads, icd_coils, central_line, port, et_tube, ng_tube, chest_tube,
         ecg, sternal_wires, clips, prosthesis)  # fmt: skip
DRAW = {kind.__name__: kind for kind in KINDS}
