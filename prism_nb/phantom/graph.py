"""The phantom's causal graph: who has an effusion, a large heart, a device, and how severe.

Every patient has exogenous draws that never change: each comes from its own stream keyed by
(seed, patient, name), and all of them are made whether or not the finding is present, so that
`do(...)` is defined for every patient. Effusion and devices share a hidden cause (the seed paper's
spurious correlation); the dial `device_given_effusion` sets P(device | effusion) and leaves both
marginals as they are. This first version draws effusion, cardiomegaly and devices.
"""

from dataclasses import dataclass
from functools import lru_cache
from zlib import crc32

import numpy as np
from scipy.optimize import brentq
from scipy.stats import multivariate_normal, norm

# Table 1's totals over CheXpert's 191,027 frontal films, uncertain counted as positive.
PREVALENCE = {"Pleural Effusion": 0.4527, "Cardiomegaly": 0.1578, "Support Devices": 0.5658}
DRAWN = tuple(PREVALENCE)  # findings that this version draws; the other labels stay blank
DEVICE_KINDS = ("pacemaker", "central_line", "tubes", "ecg", "sternal_wires")
KIND_SHARE = (0.22, 0.20, 0.20, 0.24, 0.14)  # the primary kind; others join by chance


def stream(seed, patient, name):
    """A random generator of its own for one named draw of one patient."""
    return np.random.Generator(
        np.random.Philox(np.random.SeedSequence([seed, patient, crc32(name.encode())]))
    )


@lru_cache(maxsize=16)
def shared_variance(device_given_effusion):
    """Share of latent variance that effusion and devices have in common.

    Raises ValueError outside [P(device), 0.97], where no non-negative correlation exists or it
    becomes singular.
    """
    p_effusion, p_device = PREVALENCE["Pleural Effusion"], PREVALENCE["Support Devices"]
    if not p_device - 5e-4 <= device_given_effusion <= 0.97:
        raise ValueError(
            f"device_given_effusion is {device_given_effusion}; it must lie between {p_device:.3f} "
            "(no correlation) and 0.97"
        )
    if device_given_effusion <= p_device + 5e-4:
        return 0.0
    corner = norm.ppf([p_effusion, p_device])

    def excess(r):
        joint = multivariate_normal.cdf(corner, cov=[[1, r], [r, 1]])
        return joint / p_effusion - device_given_effusion

    return float(brentq(excess, 0.0, 0.999, xtol=1e-6))


@dataclass(frozen=True)
class Patient:
    """One patient: identity, exogenous anatomy and severities, and the factual labels."""

    seed: int
    number: int
    sex: str
    age: int
    view: str  # "AP" or "PA"
    labels: dict  # finding -> 0 or 1, No Finding included
    severity: dict  # always drawn: effusion_ml, effusion_side, large_ratio, small_ratio, kinds

    def draw(self, name):
        """The generator of one named draw of this patient."""
        return stream(self.seed, self.number, name)


def close_labels(labels):
    """Labels with the deterministic child No Finding recomputed; devices do not count."""
    healthy = not (labels["Pleural Effusion"] or labels["Cardiomegaly"])
    return {**labels, "No Finding": int(healthy)}


def _severity(draw):
    side = draw("effusion side").choice(["right", "left", "both"], p=[0.4, 0.3, 0.3])
    kinds = draw("kinds")
    primary = kinds.choice(len(DEVICE_KINDS), p=KIND_SHARE)
    extra = kinds.random(len(DEVICE_KINDS)) < 0.2
    return {
        "effusion_ml": float(min(200 + draw("effusion volume").lognormal(np.log(450), 0.8), 2500)),
        "effusion_side": str(side),
        "small_ratio": float(np.clip(draw("heart ratio").normal(0.45, 0.03), 0.38, 0.495)),
        "large_ratio": float(np.clip(draw("heart enlargement").normal(0.59, 0.035), 0.53, 0.68)),
        "kinds": tuple(k for i, k in enumerate(DEVICE_KINDS) if i == primary or extra[i]),
    }


def sample_patient(seed, number, device_given_effusion=0.75):
    """Draw patient `number` of the population `seed`: the same arguments give the same patient."""

    def draw(name):
        return stream(seed, number, name)

    shared = shared_variance(device_given_effusion)
    common = draw("common cause").normal()
    labels = {}
    for finding, prevalence in PREVALENCE.items():
        own, weight = draw(finding).normal(), 0.0 if finding == "Cardiomegaly" else shared
        latent = np.sqrt(weight) * common + np.sqrt(1 - weight) * own
        labels[finding] = int(latent < norm.ppf(prevalence))
    return Patient(
        seed=seed,
        number=number,
        sex="Male" if draw("sex").random() < 0.59 else "Female",
        age=int(np.clip(draw("age").normal(61, 17), 18, 90)),
        view="AP" if draw("view").random() < 0.85 else "PA",
        labels=close_labels(labels),
        severity=_severity(draw),
    )


def intervene(patient, do):
    """Factual labels with `do` forced, No Finding recomputed; ValueError if it cannot be set."""
    for finding, value in do.items():
        if finding not in DRAWN or value not in (0, 1):
            raise ValueError(
                f"do({finding}={value}): the phantom can set {', '.join(DRAWN)} to 0 or 1"
            )
    return close_labels({**patient.labels, **{k: int(v) for k, v in do.items()}})
