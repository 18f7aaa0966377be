"""The phantom's chest: path lengths in cm of body, air, bone and fluid along each ray.

Canvas 41 x 41 cm, x to the image's right (the patient's left) from -20.5, y down from 0.
Each function takes the pixel grid and the patient's numbers and returns a (size, size) float32 map.
Edges are compact smoothsteps: a change in one structure leaves every pixel outside it untouched.
"""

import numpy as np

FIELD_CM = 41.0


def grid(size):
    """Pixel centres in cm: x (1, size), y (size, 1), and the pixel pitch."""
    pitch = FIELD_CM / size
    centres = (np.arange(size, dtype=np.float32) + 0.5) * pitch
    return centres[None, :] - FIELD_CM / 2, centres[:, None], pitch


def smooth(distance, width):
    """0 below -width/2, 1 above +width/2, a cubic between: exactly constant outside."""
    t = np.clip(distance / width + 0.5, 0, 1)
    return (t * t * (3 - 2 * t)).astype(np.float32)


def body_numbers(patient):
    """The patient's anatomy in cm, all of it exogenous."""
    rng, male = patient.draw("anatomy"), patient.sex == "Male"
    thorax = np.clip(rng.normal(29.7 if male else 27.1, 1.8), 23, 33.5)
    dome_right = rng.normal(27.0, 1.0) - (1.0 if patient.view == "AP" else 0.0)
    return {
        "half": thorax / 2,
        "apex": np.clip(rng.normal(5.0, 0.5), 3.8, 6.2),
        "dome": {-1: dome_right, 1: dome_right + np.clip(rng.normal(1.6, 0.4), 0.5, 2.8)},
        "depth": rng.normal(22 if male else 20, 1.3),
        "wall": np.clip(rng.normal(2.6, 0.6), 1.4, 4.2),
        "rib_pitch": rng.normal(2.35, 0.08),
        "rib_slope": rng.uniform(0.10, 0.30),
        "rib_start": rng.uniform(0.0, 1.5),
        "breast": 0.0 if male else np.clip(rng.normal(3.0, 0.8), 1.2, 5.0),
        "magnify": 1.06 if patient.view == "AP" else 1.0,  # AP films widen the heart's shadow
        "knob": np.clip(rng.normal(1.5, 0.2) + 0.008 * (patient.age - 61), 1.0, 2.2),
        "tilt": np.deg2rad(rng.uniform(18, 32)),
        "vertebra": rng.normal(2.4, 0.08),
    }


def body_depth(x, y, b):
    """Soft-tissue depth of the trunk, shoulders and neck."""
    shoulder = smooth(y - 5.0 - 0.18 * np.abs(x), 6.0)
    half = (5.5 + b["wall"] * 0.3) + (
        b["half"] + b["wall"] - 4.2 + 2.2 * smooth(12 - y, 8)
    ) * shoulder
    across = np.clip(1 - (np.abs(x) / half) ** 2.6, 0, None) ** (1 / 2.2)
    return (b["depth"] * (0.62 + 0.38 * shoulder) * across).astype(np.float32)


def lung_side(x, y, b, side):
    """One lung (side -1: the image's left): soft mask, lateral position, roundness, in [0, 1]."""
    dome_x = 0.52 * b["half"]
    lateral = np.abs(x)
    floor = b["dome"][side] + 0.055 * (lateral - dome_x) ** 2 * np.where(
        lateral > dome_x, 1.5, 0.55
    )
    s = np.clip((y - b["apex"]) / (b["dome"][side] + 4 - b["apex"]), 1e-4, 1)
    outer = 5.2 + (b["half"] - 5.2) * (1 - (1 - s) ** 2.6) ** 0.5
    inner = 2.7 + 2.5 * (1 - s) ** 6
    here = (x * side > 0).astype(np.float32)
    soft = 0.5
    mask = smooth(outer - lateral, soft) * smooth(lateral - inner, soft) * smooth(floor - y, soft)
    mask = mask * smooth(y - b["apex"], soft) * here
    across = np.clip((lateral - inner) / (outer - inner + 1e-3), 0, 1)
    edge = np.clip((outer - lateral) / 5.0, 0, 1)  # the chest is round: little air near the wall
    return mask, across, (0.35 + 0.65 * np.sqrt(1 - (1 - edge) ** 2)).astype(np.float32)


def heart(x, y, b, ratio):
    """Share of the chest's depth that the heart fills, its width = ratio x thorax."""
    width = ratio * 2 * b["half"] * b["magnify"]
    flat = 0.74
    a = (width / 2) / np.hypot(np.cos(b["tilt"]), flat * np.sin(b["tilt"]))
    centre_x, bottom = width / 6, b["dome"][1] + 0.8  # a third to the right, two thirds to the left
    centre_y = bottom - np.hypot(a * np.sin(b["tilt"]), flat * a * np.cos(b["tilt"]))
    u = (x - centre_x) * np.cos(b["tilt"]) + (y - centre_y) * np.sin(b["tilt"])
    v = -(x - centre_x) * np.sin(b["tilt"]) + (y - centre_y) * np.cos(b["tilt"])
    inside = 1 - np.sqrt((u / a) ** 2 + (v / (flat * a)) ** 2)
    return (0.92 * smooth(inside * a, 0.6) * (0.72 + 0.28 * np.sqrt(np.clip(inside, 0, 1)))).astype(
        np.float32
    )


def great_vessels(x, y, b):
    """Aortic knob, descending aorta, superior vena cava and hila, as shares of the depth."""
    knob = smooth(b["knob"] - np.hypot(x - 2.9, y - 11.6), 0.5) * 0.75
    descending = (
        smooth(1.2 - np.abs(x - 3.0), 0.6) * smooth(y - 11.6, 1.0) * smooth(26 - y, 3.0) * 0.30
    )
    cava = smooth(0.9 - np.abs(x + 2.7), 0.6) * smooth(y - 8, 1.5) * smooth(17 - y, 2.0) * 0.35
    hila = smooth(1.7 - np.hypot((x + 4.4) / 0.9, y - 16.2), 1.4) + smooth(
        1.6 - np.hypot((x - 4.6) / 0.9, y - 15.2), 1.4
    )
    return np.clip(np.maximum.reduce([knob, descending, cava]) + 0.38 * hila, 0, 1).astype(
        np.float32
    )


def fluid(y, across, b, side, millilitres):
    """Share of a hemithorax' air replaced by fluid: a meniscus, concave and higher at the wall."""
    height = (
        1.2 + 0.0068 * millilitres
    )  # cm over the dome: 500 ml hides it, 2,000 ml fills two thirds
    level = b["dome"][side] + 1.0 - height * (0.55 + 0.45 * across**2)
    return smooth(y - level, 2.2)


def trachea(x, y):
    """Air column and main bronchi, in cm of air."""
    column = smooth(0.85 - np.abs(x), 0.4) * smooth(13.4 - y, 0.8)
    fork = np.abs(np.abs(x) - 0.62 * (y - 12.6))
    bronchi = smooth(0.6 - fork, 0.4) * smooth(y - 13.0, 0.6) * smooth(16.5 - y, 0.8)
    return (1.6 * np.maximum(column, bronchi)).astype(np.float32)


def bones(x, y, b):
    """Cortical bone in cm: posterior and anterior ribs, clavicles, spine with pedicles."""
    total = np.zeros(np.broadcast_shapes(x.shape, y.shape), np.float32)
    lateral = np.abs(x)
    reach = smooth(b["half"] + 0.7 - lateral, 0.6)
    arch = np.sqrt(np.clip(1 - (lateral / (b["half"] + 1.0)) ** 2, 0, 1))
    for n in range(10):
        slope = b["rib_slope"] * (0.6 + 0.08 * n)
        middle = (
            5.2 + b["rib_start"] * 0.5 + b["rib_pitch"] * n + slope * lateral - 2.4 * arch + 2.0
        )
        total += _rib(y - middle, 0.62) * reach * smooth(lateral - 2.0, 0.6) * 0.42
    for n in range(6):
        front = 8.8 + b["rib_start"] * 0.5 + b["rib_pitch"] * 1.05 * n
        middle = front + 0.75 * (b["half"] - lateral) * (0.75 + 0.04 * n)
        total += _rib(y - middle, 0.55) * reach * smooth(lateral - 5.5, 1.5) * 0.26
    clavicle = 7.6 - 0.16 * lateral + 0.5 * np.sin(lateral / 2.4)
    total += (
        _rib(y - clavicle, 0.65) * smooth(lateral - 1.6, 0.6) * smooth(16.5 - lateral, 1.0) * 0.5
    )
    wave = 0.5 + 0.5 * np.cos(2 * np.pi * (y - 4) / b["vertebra"])
    total += smooth(1.7 - lateral, 0.7) * (0.10 + 0.22 * wave.astype(np.float32))
    return total


def _rib(offset, half):
    """A rib across its width: a marrow plateau and two brighter cortical edges."""
    inside = smooth(half - np.abs(offset), 0.35)
    return inside * (0.55 + 0.9 * smooth(np.abs(offset) - 0.55 * half, 0.4))


def vessel_texture(patient, x, y, b):
    """Branching vessels from the hila and fine lung markings, in cm of soft tissue."""
    rng = patient.draw("vessels")
    total = np.zeros(np.broadcast_shapes(x.shape, y.shape), np.float32)
    for side, hilum_y in ((-1, 16.2), (1, 15.2)):
        for angle in np.linspace(-1.25, 1.25, 9) + rng.normal(0, 0.07, 9):
            length, bend, wave = rng.uniform(5, 9), rng.normal(0, 0.14), rng.normal(0, 0.22)
            along = (x * side - 4.4) * np.cos(angle) + (y - hilum_y) * np.sin(angle)
            off = -(x * side - 4.4) * np.sin(angle) + (y - hilum_y) * np.cos(angle)
            off = off - bend * along - wave * np.sin(along / 1.7)
            radius = np.clip(0.55 * (1 - along / length), 0.05, None)
            total += (
                smooth(radius - np.abs(off), 0.35)
                * smooth(along - 0.5, 1.0)
                * smooth(length - along, 2.0)
                * 0.8
            )
    coarse = rng.normal(size=(28, 28)).astype(np.float32)
    return total + 0.30 * _upsample(coarse, total.shape[0])


def _upsample(field, size):
    """Bilinear resize of a square field: the same texture at every film size."""
    at = np.clip((np.arange(size) + 0.5) / size * len(field) - 0.5, 0, len(field) - 1.001)
    low, part = at.astype(int), (at % 1).astype(np.float32)
    rows = field[low] * (1 - part)[:, None] + field[low + 1] * part[:, None]
    return rows[:, low] * (1 - part) + rows[:, low + 1] * part


def breast_and_stomach(x, y, b):
    """Extra soft tissue of the breasts, and the gas under the left dome (negative)."""
    tissue = np.zeros(np.broadcast_shapes(x.shape, y.shape), np.float32)
    if b["breast"]:
        for side in (-1, 1):
            r = np.hypot((x - side * 0.62 * b["half"]) / 1.0, (y - 23.5) / 0.95)
            tissue += b["breast"] * np.sqrt(np.clip(1 - (r / 6.2) ** 2, 0, 1))
    gas = smooth(1 - np.hypot((x - 6.0) / 3.0, (y - b["dome"][1] - 2.4) / 1.5), 0.5)
    return tissue.astype(np.float32), 5.0 * gas
