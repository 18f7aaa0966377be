"""From path lengths to a film: Beer-Lambert, scatter, detector noise, one fixed look-up table.

Order: body depth -> air of the lungs less heart, vessels and fluid -> bone -> devices ->
transmitted intensity -> scatter of the baseline anatomy (no disease, no device) -> one fixed
noise field -> -log -> window -> 8 bits. Scatter, noise and window do not depend on labels, so a
counterfactual differs from its film only where a path length changed: every other pixel is bit-
identical.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from scipy.ndimage import gaussian_filter

from prism_nb.phantom import anatomy
from prism_nb.phantom.devices import draw_devices
from prism_nb.phantom.graph import intervene

MU_SOFT, MU_BONE = 0.217, 0.388  # per cm at 60 keV: soft tissue, and what cortical bone adds to it
AERATED = 0.62  # share of the chest's depth that is air in a lung at the hilum's level
SCATTER, SCATTER_CM = 0.16, 3.0  # scatter after the grid, as a share of the blurred primary beam
PHOTONS = 40_000.0  # per pixel in air
WINDOW = (0.85, 4.75)  # -log intensity shown as black and as white


@dataclass(frozen=True)
class Film:
    """One rendered film: image (H, W) uint8, labels, and boolean layer masks (H, W)."""

    image: np.ndarray
    labels: dict
    masks: dict


@dataclass(frozen=True)
class _Base:
    """What no intervention changes: grid, numbers, depth, lungs, bones, scatter, noise."""

    b: dict
    x: np.ndarray
    y: np.ndarray
    pitch: float
    depth: np.ndarray
    lungs: dict
    vessels: np.ndarray
    fixed: np.ndarray
    scatter: np.ndarray
    noise: np.ndarray
    marker: np.ndarray


def render(patient, size=512, do=None):
    """Render the patient's film, as it is or under an intervention {finding: 0 or 1}."""
    labels = intervene(patient, do or {})
    base = _base(patient, size)
    attenuation, masks = _attenuation(patient, base, labels)
    primary = np.exp(-attenuation)
    intensity = primary + base.scatter
    intensity = intensity + np.sqrt(np.clip(intensity, 1e-6, None) / PHOTONS) * base.noise
    density = -np.log(np.clip(intensity, 1e-4, None))
    shown = np.clip((density - WINDOW[0]) / (WINDOW[1] - WINDOW[0]), 0, 1)
    shown = np.maximum(shown, base.marker)
    return Film((shown * 255 + 0.5).astype(np.uint8), labels, masks)


def counterfactual(patient, do, size=512):
    """The true counterfactual under `do` and the mask of the pixels that it changes."""
    factual, other = render(patient, size), render(patient, size, do)
    return other, factual.image != other.image


def _attenuation(patient, base, labels):
    """Line integrals of the labelled anatomy, and the layer masks."""
    severity, b = patient.severity, base.b
    ratio = severity["large_ratio" if labels["Cardiomegaly"] else "small_ratio"]
    heart = anatomy.heart(base.x, base.y, b, ratio)
    filled = np.maximum(heart, anatomy.great_vessels(base.x, base.y, b))
    air, lungs, wet = (
        np.zeros_like(base.depth),
        np.zeros_like(base.depth),
        np.zeros_like(base.depth),
    )
    for side, (mask, across, round_) in base.lungs.items():
        level = np.zeros_like(mask)
        if labels["Pleural Effusion"] and severity["effusion_side"] in (
            "both",
            "right" if side < 0 else "left",
        ):
            level = anatomy.fluid(base.y, across, b, side, severity["effusion_ml"])
        air += AERATED * base.depth * mask * round_ * (1 - level)
        lungs, wet = np.maximum(lungs, mask), np.maximum(wet, level * (mask > 0))
    air = np.clip(air * (1 - filled) - base.vessels * (lungs > 0.5) * (1 - wet), 0, None)
    attenuation = base.fixed - MU_SOFT * air
    masks = {"lungs": lungs > 0.5, "heart": heart > 0.3, "fluid": wet > 0.02}
    devices = (
        draw_devices(patient, base.x, base.y, base.pitch, b) if labels["Support Devices"] else {}
    )
    for kind, extra in devices.items():
        attenuation = attenuation + extra
        masks[kind] = extra > 0
    masks["devices"] = (
        np.any([masks[k] for k in devices], axis=0) if devices else np.zeros_like(masks["lungs"])
    )
    return attenuation, masks


@lru_cache(maxsize=4)
def _cached_base(key, size):
    return _make_base(key.patient, size)


class _Key:
    """Patients hold dicts and do not hash: their seed and number identify their anatomy."""

    def __init__(self, patient):
        self.patient, self.id = (
            patient,
            (patient.seed, patient.number, patient.sex, patient.age, patient.view),
        )

    def __hash__(self):
        return hash(self.id)

    def __eq__(self, other):
        return self.id == other.id


def _base(patient, size):
    return _cached_base(_Key(patient), size)


def _make_base(patient, size):
    x, y, pitch = anatomy.grid(size)
    b = anatomy.body_numbers(patient)
    depth = anatomy.body_depth(x, y, b)
    tissue, gas = anatomy.breast_and_stomach(x, y, b)
    fixed = MU_SOFT * (depth + tissue * (depth > 0) - gas - anatomy.trachea(x, y))
    fixed = np.clip(fixed, 0, None) + MU_BONE * anatomy.bones(x, y, b) * (depth > 1)
    base = _Base(
        b=b,
        x=x,
        y=y,
        pitch=pitch,
        depth=depth,
        lungs={side: anatomy.lung_side(x, y, b, side) for side in (-1, 1)},
        vessels=anatomy.vessel_texture(patient, x, y, b),
        fixed=fixed.astype(np.float32),
        scatter=np.zeros_like(depth),
        noise=patient.draw("detector noise").normal(size=(size, size)).astype(np.float32),
        marker=_marker(patient, size),
    )
    healthy = dict.fromkeys(patient.labels, 0)
    primary = np.exp(-_attenuation(patient, base, healthy)[0])
    base.scatter[:] = SCATTER * gaussian_filter(primary, SCATTER_CM / pitch, mode="nearest")
    return base


def _marker(patient, size):
    """Burnt-in text: the side letter, and PORTABLE on AP films; tied to the view only."""
    canvas = Image.new("L", (size, size))
    pen, font = ImageDraw.Draw(canvas), ImageFont.load_default(size=max(9, round(size * 0.05)))
    pen.text((size * 0.93, size * 0.03), "L", fill=235, font=font, anchor="ra")
    if patient.view == "AP":
        small = ImageFont.load_default(size=max(8, round(size * 0.035)))
        pen.text((size * 0.03, size * 0.03), "PORTABLE", fill=205, font=small)
    return np.asarray(canvas, np.float32) / 255
