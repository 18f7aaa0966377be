"""The phantom's causal graph: who has which finding, how severe, and which devices.

Age and acuity lead to heart failure, these to the findings, and some findings to others. Every
exogenous draw is a standard normal of a stream keyed by (seed, patient, study, name), and all are
made whether or not a finding is present: `do` is defined for every patient. Devices go with
effusion in one of two ways, at the same prevalences and the same P(device | effusion): `confounded`
by a hidden cause, so that do(effusion) touches no device (the paper's spurious correlation), or by
`treatment`, a chest tube that drains it. So do pacemaker and cardiomegaly.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import reduce
from itertools import accumulate, pairwise
from numbers import Integral, Real
from typing import NamedTuple
from zlib import crc32

import numpy as np
from scipy.special import expit, ndtr, ndtri

from prism_nb.findings import FINDINGS, PATHOLOGIES, nearest

HEALTHY, HEART, DEVICES = "No Finding", "Cardiomegaly", "Support Devices"
EFFUSION, AIR = "Pleural Effusion", "Pneumothorax"

# In causal order: prevalence, intercept, parents with their log-odds before SCALE. "lung" is any
# of LUNG. Prevalences are shares of CheXpert's films, uncertain counted as present: effusion,
# cardiomegaly, no finding and devices from the paper's Table 1, the others from CheXpert's own.
# Intercepts, SCALE (it sets P(No Finding)), AP_VIEW and LINKS are printed by calibrate.py.
GRAPH = {
    "Pleural Effusion": (0.4527, -0.360, {"failure": 0.9, "acuity": 0.4}),
    "Cardiomegaly": (0.1578, -2.019, {"failure": 1.4, "age": 0.2}),
    "Edema": (0.322, -1.039, {"failure": 1.3, "acuity": 0.5}),
    "Consolidation": (0.196, -1.437, {"acuity": 0.4}),
    "Pneumonia": (0.108, -2.350, {"Consolidation": 1.2, "acuity": 0.2}),
    "Atelectasis": (0.313, -1.080, {"Pleural Effusion": 0.8, "acuity": 0.3}),
    "Pneumothorax": (0.107, -2.140, {"acuity": 0.2, "age": -0.2}),
    "Lung Lesion": (0.042, -3.144, {"age": 0.3}),
    "Pleural Other": (0.022, -3.812, {"age": 0.3}),
    "Fracture": (0.041, -3.169, {"age": 0.3}),
    "Enlarged Cardiomediastinum": (0.102, -2.261, {"Cardiomegaly": 0.5, "acuity": 0.3}),
    "Lung Opacity": (0.517, -0.518, {"lung": 1.2, "acuity": 0.2}),
}
SCALE = 0.735
LUNG = ("Edema", "Consolidation", "Pneumonia", "Atelectasis", "Lung Lesion")
PREVALENCE = {HEALTHY: 0.0889, DEVICES: 0.5658} | {k: share for k, (share, *_) in GRAPH.items()}
PREVALENCE = {label: PREVALENCE[label] for label in FINDINGS}
FAILURE = (-1.327, 0.9, 0.6)  # log-odds of heart failure: intercept, age, acuity; 25 % have it
AP_VIEW, SUPINE = (2.168, 1.2), (-0.35, 0.8)  # 85 % AP; of these, lying (ours): intercept, acuity
MALE, PACEMAKER, ICD = 0.59, 0.08, 0.35  # shares: of patients, of films, of pacemakers (ours)


class Severity(NamedTuple):
    """A dial of `do`: its label, range and unit; drawn: the mildest, the worst and a skewness."""

    label: str
    low: float
    high: float
    unit: str
    drawn: tuple


VISIBLE_ML = 175  # less fluid than this blunts no angle: it is there, and not seen
ENLARGED = 0.50  # a heart wider than this share of the inner thorax is Cardiomegaly
SEVERITIES = {  # what is drawn is never so mild that a present finding could not be seen (ours)
    "effusion_ml": Severity("Pleural Effusion", 0, 2500, "ml", (200, 450, 0.8)),  # + lognormal
    "heart_ratio": Severity("Cardiomegaly", 0.36, 0.70, "of the thorax", (0.53, 0.68, 1.4)),
    "edema": Severity("Edema", 0, 1, "of the worst", (0.35, 1, 1.2)),
    "consolidation": Severity("Consolidation", 0, 1, "of the worst", (0.4, 1, 1)),
    "pneumonia": Severity("Pneumonia", 0, 1, "of the worst", (0.4, 1, 1)),
    "atelectasis": Severity("Atelectasis", 0, 1, "of the worst", (0.35, 1, 1.2)),
    "opacity": Severity("Lung Opacity", 0, 1, "of the worst", (0.35, 1, 1.2)),
    "pneumothorax_cm": Severity("Pneumothorax", 0, 6, "cm", (1, 4.5, 1.5)),
    "lesion_cm": Severity("Lung Lesion", 0, 5, "cm", (1, 4, 1.3)),
    "pleural_cm": Severity("Pleural Other", 0, 2, "cm", (0.4, 1.6, 1.2)),
    "fracture_cm": Severity("Fracture", 0, 1.2, "cm", (0.3, 1, 1)),
    "mediastinum_cm": Severity("Enlarged Cardiomediastinum", 0, 4, "cm", (1, 3.5, 1.3)),
}
DIALS = {severity.label: name for name, severity in SEVERITIES.items()}

# How often a kind is the main device, and how often it is there beside another. CheXpert publishes
# no count of kinds: the mix is ours, a plausible one of a hospital's inpatients.
MIX = {
    "central_line": (0.29, 0.30),
    "port": (0.06, 0.03),
    "et_tube": (0.10, 0.12),
    "ng_tube": (0.10, 0.20),
    "chest_tube": (0.09, 0.08),
    "ecg": (0.24, 0.45),
    "sternal_wires": (0.08, 0.10),
    "clips": (0.03, 0.08),
    "prosthesis": (0.01, 0.01),
}
PACED = ("pacemaker", "pacemaker_leads", "icd_coils")
DEVICE_KINDS = (*PACED, *MIX)
REQUIRES = {"pacemaker_leads": "pacemaker", "icd_coils": "pacemaker_leads"}  # part -> its whole
IMPLANTS = ("port", "sternal_wires", "clips", "prosthesis")

MODES = ("confounded", "treatment")
LINKS = {  # one dial for both: the shares wanted (the second are ours) and what leads to them
    "device | effusion": (0.5658, 0.60, 0.65, 0.70, 0.75, 0.80, 0.85, 0.90, 0.95, 0.97),
    "pacemaker | cardiomegaly": (0.080, 0.102, 0.135, 0.167, 0.2, 0.233, 0.267, 0.3, 0.4, 0.42),
    # confounded: share of variance in common of effusion and devices, cardiomegaly and pacemaker
    "care": (0.000, 0.103, 0.252, 0.397, 0.534, 0.661, 0.775, 0.875, 0.961, 0.994),
    "rhythm": (0.000, 0.112, 0.261, 0.389, 0.505, 0.609, 0.703, 0.784, 0.961, 0.984),
    # treatment: P(device) but for treatment, P(chest tube as such | effusion or pneumothorax)
    "base": (0.528, 0.489, 0.433, 0.377, 0.321, 0.264, 0.208, 0.152, 0.097, 0.075),
    "drain": (0.000, 0.148, 0.328, 0.476, 0.599, 0.704, 0.793, 0.871, 0.939, 0.965),
}
LEAST, *_, MOST = LINKS["device | effusion"]

NORMALS = {  # stream -> its draws in order; the first two streams are the same in every study
    "person": ("sex", "age", "acuity", "failure", "normal_ratio", "heart_ratio", HEART),
    "care": ("care", DEVICES, "rhythm", "pacemaker", "icd_coils", "main", *IMPLANTS),
    "visit": ("view", "supine", "drain"),
    "findings": tuple(label for label in GRAPH if label != HEART),
    "severity": ("effusion_side", *(name for name in SEVERITIES if name != "heart_ratio")),
    "lines": tuple(kind for kind in MIX if kind not in IMPLANTS),
}


def stream(seed, number, study, name):
    """A random generator of its own for one named draw of one patient's study."""
    key = np.random.SeedSequence([seed, number, study, crc32(name.encode())])
    return np.random.Generator(np.random.Philox(key))


def exogenous(seed, number, study=1):
    """All standard normals behind one study of one patient: name -> number."""
    normals = {}
    for name, draws in NORMALS.items():
        rng = stream(seed, number, 0 if name in ("person", "care") else study, name)
        normals.update(zip(draws, rng.standard_normal(len(draws)).tolist(), strict=True))
    return normals


def background(normals):
    """What causes the findings: years, age and acuity in standard deviations, heart failure."""
    years = np.clip(np.rint(61 + 17 * normals["age"]), 18, 90)
    age, acuity = (years - 61) / 17, normals["acuity"]
    failure = ndtr(normals["failure"]) < expit(FAILURE[0] + FAILURE[1] * age + FAILURE[2] * acuity)
    return {"years": years, "age": age, "acuity": acuity, "failure": failure}


def score(label, values):
    """The log-odds before SCALE that a finding's parents in `values` add to its intercept."""
    return sum(weight * values[parent] for parent, weight in GRAPH[label][2].items())


def any_of(values, names):
    """Whether any of the named values is true; numbers or arrays."""
    return reduce(np.logical_or, [values[name] for name in names])


def mechanism(normals, confounding=0.75, mode="confounded", do=None):
    """All labels and devices that follow from the draws, which are numbers or arrays.

    do: findings held at 0 or 1. Returns labels (name -> bool), the devices in place, and those
    that would be if the patient had any (kind -> bool).
    Raises ValueError for an unknown mode, and for a dial that the prevalences do not allow.
    """
    if mode not in MODES:
        raise ValueError(f"mode is {mode!r}; it must be {' or '.join(MODES)}")
    if not isinstance(confounding, Real) or not LEAST <= confounding <= MOST:
        raise ValueError(
            f"confounding is {confounding!r}; P(device | effusion) must lie between {LEAST:.4f} "
            f"(no link) and {MOST}, or the prevalences would change"
        )
    dial, *curves = LINKS.values()
    given, care, rhythm, base, drain = (np.interp(confounding, dial, curve) for curve in curves)
    others = (PACEMAKER - PREVALENCE[HEART] * given) / (1 - PREVALENCE[HEART])
    treatment = mode == "treatment"
    if treatment:
        care = rhythm = 0.0
    else:  # then a pacemaker is one of the devices, whatever the heart
        base, drain, given = PREVALENCE[DEVICES], 0.0, PACEMAKER / PREVALENCE[DEVICES]
        others = given

    def uniform(name, cause="care", share=0.0):
        return ndtr(np.sqrt(share) * normals[cause] + np.sqrt(1 - share) * normals[name])

    do, values = do or {}, background(normals)
    causes = {EFFUSION: ("care", care), HEART: ("rhythm", rhythm)}
    for label, (_, intercept, _) in GRAPH.items():
        if label == "Lung Opacity":
            values["lung"] = any_of(values, LUNG)
        chance = expit(intercept + SCALE * score(label, values))
        drawn = uniform(label, *causes.get(label, ())) < chance
        values[label] = np.bool_(do[label]) if label in do else drawn
    some = uniform(DEVICES, "care", care) < base
    paced = uniform("pacemaker", "rhythm", rhythm) < np.where(values[HEART], given, others)
    drained = (values[EFFUSION] | values[AIR]) & (uniform("drain") < drain)
    ready = dict.fromkeys(PACED, paced) | {"icd_coils": paced & (uniform("icd_coils") < ICD)}
    main, ends = uniform("main"), pairwise((0, *accumulate(share for share, _ in MIX.values())))
    for (kind, (_, beside)), (start, end) in zip(MIX.items(), ends, strict=True):
        first = (start <= main) & (main < end) & (treatment | ~paced)  # or else the pacemaker is
        ready[kind] = first | (uniform(kind) < beside)
    place = {kind: some & there for kind, there in ready.items()}
    if treatment:
        place |= {kind: ready[kind] for kind in PACED}
        place["chest_tube"] = place["chest_tube"] | drained
        ready["chest_tube"] = ready["chest_tube"] | drained
    values |= {HEALTHY: ~any_of(values, PATHOLOGIES), DEVICES: any_of(place, place)}
    return {label: values[label] for label in FINDINGS}, place, ready


@dataclass(frozen=True)
class Patient:
    """One patient in one study: who it is, what is so, and what would be so."""

    seed: int
    number: int
    study: int
    sex: str  # "Male" or "Female"
    age: int
    view: str  # "AP" or "PA"
    supine: bool
    confounding: float
    mode: str
    labels: dict  # finding -> 0 or 1
    severity: dict  # each of SEVERITIES if it were present; normal_ratio, effusion_side
    kinds: tuple  # the devices that are, or would be, in place
    normals: dict = field(repr=False)  # all exogenous draws
    devices_of: int | None = None  # number of the patient whose devices it has or would have

    def draw(self, name):
        """A generator for one named draw of this study: places, devices, exposure."""
        own = self.devices_of is None or not name.startswith("device ")
        return stream(self.seed, self.number if own else self.devices_of, self.study, name)

    def draw_patient(self, name):
        """A generator for one named draw that all studies of the patient share: anatomy."""
        return stream(self.seed, self.number, 0, name)

    def mildness(self, label):
        """Where it stands among all that have the finding, 0 (mildest) to 1; 1 without a dial."""
        return float(ndtr(self.normals[DIALS[label]])) if label in DIALS else 1.0


@dataclass(frozen=True)
class World:
    """What a film shows: the labels, severities as they are (0 if absent) and devices in place."""

    labels: dict
    severity: dict
    devices: tuple


def sample_patient(seed, number, study=1, confounding=0.75, mode="confounded"):
    """Draw patient `number` (1, 2, ...) of the population `seed`: the same numbers, the same one.

    confounding: P(device | effusion), 0.566 (no link) to 0.97. mode: confounded or treatment.
    Another study keeps sex, age, acuity, heart, implants and, but for a treatment's, whether there
    are devices; findings, their severities and lines are new.
    Raises ValueError for a number out of its range.
    """
    whole = all(isinstance(n, Integral) for n in (seed, number, study))
    if not whole or min(seed, number, study - 1) < 0:
        given = f"seed {seed}, number {number}, study {study}"
        raise ValueError(f"{given}: seed and number must be whole and 0 or more, study from 1")
    normals = exogenous(seed, number, study)
    labels, place, ready = mechanism(normals, confounding, mode)
    ap, lying = (
        bool(ndtr(normals[name]) < expit(start + weight * normals["acuity"]))
        for name, (start, weight) in (("view", AP_VIEW), ("supine", SUPINE))
    )
    sex, age = "Male" if ndtr(normals["sex"]) < MALE else "Female", background(normals)["years"]
    return Patient(
        *(seed, number, study, sex, int(age), "AP" if ap else "PA", ap and lying),
        *(confounding, mode, {label: int(value) for label, value in labels.items()}),
        severity=_severity(normals, sex, float(age)),
        kinds=_names(place) or _names(ready),
        normals=normals,
    )


def redrawn(patient, label, number):
    """The patient, but how `label` looks there and absent is as in patient `number`.

    Drawn anew are its severities, the heart's normal width, the side of an effusion, which devices
    there are and where they lie; all else is held. So a film on which `label` is turned over shows
    what else it could have become, for all that the first film tells.
    """
    other = sample_patient(patient.seed, number, patient.study, patient.confounding, patient.mode)
    if label == DEVICES:
        return replace(patient, kinds=other.kinds, devices_of=number)
    names = {name for name, dial in SEVERITIES.items() if dial.label == label}
    names |= {HEART: {"normal_ratio"}, EFFUSION: {"effusion_side"}}.get(label, set())
    normals = patient.normals | {name: other.normals[name] for name in names}
    severity = _severity(normals, patient.sex, float(patient.age))
    if label == HEART:  # the film shows where its leads lie
        severity["lead_ratio"] = patient.severity["normal_ratio"]
    return replace(patient, normals=normals, severity=severity)


def _names(there):
    return tuple(kind for kind in DEVICE_KINDS if there[kind])


def _severity(normals, sex, age):
    severity = {}
    for name, dial in SEVERITIES.items():
        mildest, worst, skew = dial.drawn
        severity[name] = mildest + (worst - mildest) * float(ndtr(normals[name])) ** skew
        if name == "effusion_ml":
            severity[name] = min(mildest + worst * float(np.exp(skew * normals[name])), dial.high)
    middle = (0.440 if sex == "Male" else 0.448) + 0.006 * (age - 61) / 17
    low, high = ndtr((np.array([0.38, 0.495]) - middle) / 0.025)  # it is truncated there
    normal = middle + 0.025 * ndtri(low + (high - low) * ndtr(normals["normal_ratio"]))
    side = np.searchsorted((0.4, 0.7), ndtr(normals["effusion_side"]))
    side = ("right", "left", "both")[side]
    return severity | {"normal_ratio": float(normal), "effusion_side": side}


def intervene(patient, do=None, effect="direct"):
    """The patient's world under `do`, a dict of labels, severities and devices to set.

    A label or device is 0 or 1; a severity is a number in its range (SEVERITIES), and its label is
    1 if it is above 0 (heart_ratio: ENLARGED, effusion_ml: VISIBLE_ML). "Support Devices" is any
    device; a device comes and goes with its parts. effect: "direct" holds all that is not set but
    No Finding; "total" lets what follows in the graph change too, with the same draws.
    Raises ValueError for a name or value that cannot be set, and for a contradiction.
    """
    if effect not in ("direct", "total"):
        raise ValueError(f"effect is {effect!r}; it must be direct or total")
    if not isinstance(do or {}, Mapping):
        raise ValueError(f"do is {do!r}; a dict of names and values is needed")
    binary, dials = _read(do or {})
    held = {name: value for name, value in binary.items() if name in GRAPH}
    labels, kinds = {**patient.labels, **held}, patient.kinds
    if effect == "total":
        labels, place, ready = mechanism(patient.normals, patient.confounding, patient.mode, held)
        kinds = _names(place) or _names(ready)
    devices = _assign(patient, kinds if binary.get(DEVICES, labels[DEVICES]) else (), binary)
    healthy = not any(labels[label] for label in PATHOLOGIES)
    labels = {**labels, HEALTHY: healthy, DEVICES: bool(devices)}
    severity = {**dict.fromkeys(SEVERITIES, 0.0), "heart_ratio": patient.severity["normal_ratio"]}
    severity |= {name: patient.severity[name] for label, name in DIALS.items() if labels[label]}
    severity |= {**dials, "effusion_side": patient.severity["effusion_side"]}
    return World({label: int(labels[label]) for label in FINDINGS}, severity, devices)


def _read(do):
    """What `do` sets to 0 or 1, and its dials; every name and value is checked."""
    binary, dials, names = {}, {}, (*GRAPH, DEVICES, *SEVERITIES, *DEVICE_KINDS)
    for name, value in do.items():
        if name == HEALTHY:
            raise ValueError("No Finding follows from the other findings: set those to 0 instead")
        if name not in names:
            near = nearest(str(name), names)
            raise ValueError(
                f"do has no {name!r}; the nearest is {near!r}. Choose from: {', '.join(names)}"
            )
        *_, low, high, unit, _ = SEVERITIES.get(name, ("", 0, 1, "", ()))
        number = isinstance(value, int | float | np.number | np.bool_) and low <= value <= high
        if not number or (name not in SEVERITIES and value not in (0, 1)):
            needed = f"a number from {low} to {high} {unit}" if name in SEVERITIES else "0 or 1"
            raise ValueError(f"{name} is {value!r}; it must be {needed}")
        if name in SEVERITIES:
            dials[name] = float(value)
        else:
            binary[name] = int(value)
    for name, value in dials.items():
        label = SEVERITIES[name].label
        present = int(value > {HEART: ENLARGED, EFFUSION: VISIBLE_ML}.get(label, 0))
        if binary.setdefault(label, present) != present:
            raise ValueError(
                f"{name} {value:g} makes {label} {present}, which is set to {1 - present}: "
                "leave one of the two out"
            )
    return binary, dials


def _assign(patient, kinds, do):
    """The devices in place after `do`, where those in `kinds` were."""
    added, coils = set(), ndtr(patient.normals["icd_coils"]) < ICD
    for kind in DEVICE_KINDS:  # a whole comes before its parts, and brings them
        if do.get(kind, REQUIRES.get(kind) in added and (coils or kind != "icd_coils")):
            added.add(kind)
    shown = {kind for kind in added.union(kinds) if do.get(kind, 1)}
    for part, whole in REQUIRES.items():
        if do.get(part) and whole not in shown:
            raise ValueError(f"{part} cannot be there without {whole}: set {whole} to 1 too")
        shown -= set() if whole in shown else {part}
    if do.get(DEVICES, bool(shown)) != bool(shown):
        there = ", ".join(kind for kind in DEVICE_KINDS if kind in shown) or "no device"
        raise ValueError(
            f"Support Devices is set to {do[DEVICES]}, but the rest of do leaves {there}: "
            "leave one of the two out"
        )
    return tuple(kind for kind in DEVICE_KINDS if kind in shown)
