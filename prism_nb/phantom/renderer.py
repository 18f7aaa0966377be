"""From path lengths to a film: Beer-Lambert, scatter, detector noise, one fixed look-up table.

Order: tissue -> air of the lungs less heart, vessels and disease -> bone -> devices -> transmitted
intensity -> scatter -> noise -> -log -> look-up table -> collimation and text -> 8 bits. Scatter is
that of the patient's baseline anatomy (no disease, no device), and noise, look-up table and text
do not depend on findings either. So a counterfactual differs from its film only where a path
length changed: every other pixel keeps its bytes. The processor's is the canonical path: sums in
a fixed order, float32, no FFT.
"""

from collections import OrderedDict
from dataclasses import dataclass, field
from numbers import Integral

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from scipy.ndimage import gaussian_filter

from prism_nb.findings import FINDINGS
from prism_nb.phantom import anatomy, disease
from prism_nb.phantom.devices import draw_devices
from prism_nb.phantom.draw import FIELD_CM, grid, smooth
from prism_nb.phantom.graph import SEVERITIES, intervene

VERSION = 2  # of what a patient's film looks like: a cohort on disk names it
MIN_SIZE, MAX_SIZE = 64, 4096
SCATTER, SCATTER_CM = {"PA": 0.22, "AP": 0.36}, 2.6  # scatter after the grid / blurred primary
PHOTONS = 40_000.0  # of a square millimetre in air
SHADOW = 0.7  # a device also stops this share (of its attenuation) of the scatter behind it
SCATTER_STEP_CM = 0.64  # scatter is smooth: it is computed on squares of this side
CACHED, KEPT = 3, 24  # patients whose exogenous fields are kept, and layers of each

DRAWN = tuple(label for label in FINDINGS if label != "No Finding")  # what films show

_cache = OrderedDict()


@dataclass(frozen=True)
class Film:
    """One rendered film: image (H, W) uint8, the 14 labels, and layer masks (H, W) bool."""

    image: np.ndarray
    labels: dict
    masks: dict


@dataclass(frozen=True)
class _Base:
    """What no intervention changes; and, by name and value, layers that were drawn before."""

    patient: object
    g: object
    b: object
    fixed: np.ndarray
    lungs: np.ndarray
    vessels: np.ndarray
    noise: np.ndarray
    table: tuple
    frame: np.ndarray
    text: np.ndarray
    drawn: dict = field(default_factory=dict)

    def once(self, name, value, make):
        """The layer of that name and value, made at most once."""
        key = (name, value)
        if key not in self.drawn:
            self.drawn[key] = make()
            old = [k for k in self.drawn if k[0] != "scatter"]
            if len(old) > KEPT:  # a sweep over a dial would fill the memory
                del self.drawn[old[0]]
        return self.drawn[key]


def render(patient, size=512, do=None, effect="direct", full_scatter=False, shift=True, noise=True):
    """Render the patient's film, as it is or under an intervention `do`.

    `do` maps labels, severities and devices to values (graph.intervene says which), `effect` is
    "direct" or "total". With `full_scatter` the scatter follows the disease too: more physical,
    but then an edit changes pixels all over the film. `shift=False` keeps a large effusion from
    pushing the heart; `noise=False` leaves out the detector's noise. Raises ValueError for an
    impossible `do` and a size not within 64 to 4096.
    """
    if not isinstance(size, Integral) or not MIN_SIZE <= size <= MAX_SIZE:
        needed = f"a whole number of pixels a side from {MIN_SIZE} to {MAX_SIZE:,}"
        raise ValueError(f"size is {size!r}; it must be {needed}")
    world = intervene(patient, do, effect)
    base = _base(patient, size)
    attenuation, metal, masks = _attenuation(base, world, shift)
    healthy = base.once("scatter", None, lambda: _scatter(base, _healthy(base)))
    scatter = _scatter(base, attenuation) if full_scatter else healthy
    if metal is not None:
        attenuation, scatter = attenuation + metal, scatter * np.exp(-SHADOW * metal)
    masks = {name: mask.copy() for name, mask in masks.items()}  # the cache keeps its own
    return Film(_develop(base, attenuation, scatter, noise), world.labels, masks)


def counterfactual(patient, do, size=512, effect="direct", **options):
    """The true counterfactual under `do`, a Film, and the mask of the pixels that it changes.

    options: `full_scatter`, `shift` and `noise`, as in `render`; they hold for both films.
    """
    other = render(patient, size, do, effect, **options)
    return other, render(patient, size, **options).image != other.image


def _base(patient, size):
    key = (patient.seed, patient.number, patient.study, patient.sex, patient.age, size)
    key += (patient.view, patient.supine, tuple(patient.severity.values()), patient.devices_of)
    if key not in _cache:
        _cache[key] = _make_base(patient, size)
        while len(_cache) > CACHED:
            _cache.popitem(last=False)
    _cache.move_to_end(key)
    return _cache[key]


def film_grid(patient, size):
    """How the patient stood before the detector: a little off its middle, nearer or farther."""
    placed = patient.draw("placing")
    field = FIELD_CM * float(np.exp(np.clip(placed.normal(0, 0.045), -0.09, 0.09)))
    aside, down = np.clip(placed.normal(0, (0.7, 1.0)), -1.8, 1.8)
    return grid(size, field, float(aside), float(down))


def _make_base(patient, size):
    g, b, exposure = film_grid(patient, size), anatomy.body(patient), patient.draw("exposure")
    gas = np.minimum(anatomy.airway(g, b) + anatomy.belly_gas(patient, g, b), 6)
    tissue = anatomy.trunk(g, b)
    muscle = 1 + 0.012 * anatomy.texture(patient.draw_patient("muscle"), 40, size)
    fixed = anatomy.MU_SOFT * np.maximum(tissue * muscle - gas, 0)
    fixed += anatomy.bones(g, b) * np.minimum(tissue, 1)
    lungs = sum(anatomy.lung(g, b, side)[1] for side in anatomy.SIDES) > 0
    large = b.depth - 20.5  # automatic exposure: a larger patient gets more
    low, high = (
        exposure.normal(0.85, 0.08) + 0.05 * large,
        exposure.normal(4.5, 0.2) + 0.15 * large,
    )
    table = (low, high + 0.2 * (patient.view == "AP"), exposure.uniform(0.85, 1.1))
    noise = patient.draw("noise").standard_normal((size, size), np.float32)
    return _Base(
        patient=patient,
        g=g,
        b=b,
        fixed=fixed.astype(np.float32),
        lungs=lungs,
        vessels=anatomy.vessels(patient, g, b, lungs),
        noise=noise / np.float32(np.sqrt(PHOTONS) * 10 * g.pitch),
        table=table,
        frame=_collimation(exposure, g),
        text=burnt_in_text(patient, size),
    )


def _healthy(base):
    """Line integrals of the patient without disease and devices."""
    world = intervene(base.patient, dict.fromkeys(DRAWN, 0))
    return _attenuation(base, world, False)[0]


def _attenuation(base, world, shift):
    """Line integrals (size, size) of the chest and of its devices, and the masks of the layers."""
    patient, g, b, severity = base.patient, base.g, base.b, world.severity
    pushed = disease.fluid_shift(patient, severity["effusion_ml"]) if shift else 0.0
    lift = disease.raised(patient, severity["atelectasis"]) if severity["atelectasis"] else {}
    ratio, wider = severity["heart_ratio"], severity["mediastinum_cm"]
    plain = _extent(base, {})
    extent = _extent(base, lift) if lift else plain
    within = (plain > 0) | (extent > 0)
    heart, heart_mask = base.once(
        "heart", (ratio, pushed), lambda: anatomy.heart(g, b, ratio, pushed)
    )
    middle = base.once(
        "middle", (wider, pushed), lambda: anatomy.mediastinum(g, b, wider, 0.7 * pushed)
    )
    kept, clear, extra, masks = 1 - np.maximum(heart, middle), None, None, {}
    for name, draw in disease.LAYERS.items():
        if not severity[name]:
            continue
        layer = base.once(
            name, severity[name], lambda n=name, d=draw: d(patient, g, b, severity[n])
        )
        masks[SEVERITIES[name].label] = layer.mask if layer.outside else layer.mask & within
        if layer.water is not None:
            kept *= 1 - layer.water
        if layer.extra is not None:
            inside = layer.extra if layer.outside else layer.extra * base.lungs
            extra = inside if extra is None else extra + inside
        clear = layer.clear if layer.clear is not None else clear
    if lift:
        masks["Atelectasis"] |= extent != plain
    aerated = kept * np.float32(anatomy.AERATED)
    blood = base.vessels * kept
    if clear is not None:
        aerated += clear * (kept - aerated)
        blood *= 1 - clear
    attenuation = base.fixed - np.float32(anatomy.MU_SOFT) * extent * aerated + blood
    if extra is not None:
        attenuation += extra
    devices = base.once(
        "devices", world.devices, lambda: draw_devices(patient, g, b, world.devices)
    )
    metal = sum(devices.values()) if devices else None
    masks |= {kind: more > 0 for kind, more in devices.items()}
    none = np.zeros_like(base.lungs)
    masks["devices"] = np.logical_or.reduce([masks[k] for k in devices]) if devices else none
    masks |= {"lungs": base.lungs, "heart": heart_mask, "mediastinum": middle > 0.3}
    masks["fluid"] = masks.get("Pleural Effusion", none)
    if world.labels["Cardiomegaly"]:
        masks["Cardiomegaly"] = heart > 0
    if wider:
        masks["Enlarged Cardiomediastinum"] = middle > 0
    return attenuation, metal, masks


def _extent(base, lift):
    """Both lungs' extent, the domes raised by `lift` {side: cm}."""

    def one(side):
        return anatomy.lung(base.g, base.b, side, lift.get(side, 0.0))[0]

    return base.once("lungs", tuple(lift.items()), lambda: sum(one(s) for s in anatomy.SIDES))


def _scatter(base, attenuation):
    """Scattered intensity: the primary beam, blurred on a coarse grid and interpolated."""
    size = base.g.size
    coarse = Image.fromarray(np.exp(-np.maximum(attenuation, 0)))
    cells = round(base.g.pitch * size / SCATTER_STEP_CM)
    coarse = np.asarray(coarse.resize((cells, cells), Image.Resampling.BOX))
    blurred = gaussian_filter(coarse, SCATTER_CM / SCATTER_STEP_CM, mode="nearest", truncate=3)
    wide = Image.fromarray(blurred).resize((size, size), Image.Resampling.BILINEAR)
    return np.float32(SCATTER[base.patient.view]) * np.asarray(wide)


def _develop(base, attenuation, scatter, noise):
    """Line integrals -> 8 bits; pointwise, so that an edit stays where it is."""
    intensity = np.exp(-np.maximum(attenuation, 0))
    intensity += scatter
    if noise:
        intensity += np.sqrt(intensity) * base.noise
    low, high, gamma = base.table
    shown = -np.log(np.maximum(intensity, 1e-4))
    shown -= np.float32(low)
    shown *= np.float32(1 / (high - low))
    np.clip(shown, 0, 1, out=shown)
    shown **= np.float32(gamma)
    shown *= base.frame
    np.maximum(shown, base.text, out=shown)
    return (shown * 255 + np.float32(0.5)).astype(np.uint8)


def _collimation(rng, g):
    """The exposed field: 1 inside, 0 beyond the shutters, which may be a little turned."""
    if rng.random() < 0.65:
        return np.float32(1)
    angle, field = np.float32(np.deg2rad(rng.normal(0, 0.6))), g.pitch * g.size
    edges = field * (0.5 - rng.uniform(-0.02, 0.03, 4)).astype(np.float32)
    x, y = g.x - np.float32(g.left + field / 2), g.y - np.float32(g.top + field / 2)
    u, v = x + y * angle, y - x * angle
    inside = np.minimum(
        np.minimum(u + edges[0], edges[1] - u), np.minimum(v + edges[2], edges[3] - v)
    )
    return smooth(inside, 2 * g.pitch)


def burnt_in_text(patient, size):
    """Burnt-in letters: the side, and on portable films how it was taken; tied to the view only.

    float32 (size, size) in [0, 1], 0 where there are none.
    """
    rng, canvas = patient.draw("text"), Image.new("L", (size, size))
    pen, grey = ImageDraw.Draw(canvas), int(rng.integers(190, 256))
    large = ImageFont.load_default(size=max(9, round(size * rng.uniform(0.035, 0.06))))
    small = ImageFont.load_default(size=max(8, round(size * rng.uniform(0.022, 0.034))))
    y, x = size * rng.uniform(0.02, 0.10), size * rng.uniform(0.03, 0.08)
    letter_right = rng.random() < 0.75
    at = (size - x, y) if letter_right else (x, y)
    pen.text(at, "L" if letter_right else "R", grey, large, anchor="ra" if letter_right else "la")
    if patient.view == "AP":
        words = ["PORTABLE", "AP SUPINE" if patient.supine else "AP ERECT"]
        words = words[: 1 + int(rng.random() < 0.6)]
        at = (x, size * rng.uniform(0.02, 0.08)) if letter_right else (size * 0.74, y)
        pen.text(at, "\n".join(words), grey, small)
    return np.asarray(canvas, np.float32) / 255
