"""Attributes measured from geometry: did the border of heart and fluid, the wire, really move?

On the phantom, each film comes with its layers: masks (H, W) of lungs, heart, fluid, devices. For
an edited film x^ they are found pixel by pixel: a layer there stands as in the truth x* where the
film followed the true change by more than half, and as in the factual x elsewhere,
    <d, D> > <D, D> / 2 around the pixel, with d = x^ - x and D = x* - x.
Then all three films are measured by one code. What x^ changed where the truth changes nothing is
not seen here; metrics.over_edit counts it. Films (B, H, W) in [0, 1]; layers: a dict a film.
Used by notebook 05.
"""

import numpy as np
from scipy.ndimage import gaussian_filter

from prism_nb.metrics import edits_of

SIGMA = 2.0  # pixels around one that are asked as well, so that noise does not decide


def heart_ratio(layers):
    """Width of the heart over that of the chest, each in its widest row: 0 to 1."""
    chest = np.flatnonzero(layers["lungs"].any(axis=0))
    heart = layers["heart"].sum(axis=1).max()
    return float(heart / (chest[-1] - chest[0] + 1)) if len(chest) else np.nan


def fluid_height(layers):
    """Height of the fluid in its tallest column, as a share of the film's: 0 to 1."""
    return float(layers["fluid"].sum(axis=0).max() / len(layers["fluid"]))


def device_pixels(layers):
    """Share of the film that devices cover: 0 to 1."""
    return float(layers["devices"].mean())


ATTRIBUTES = {
    "Cardiomegaly": heart_ratio,
    "Pleural Effusion": fluid_height,
    "Support Devices": device_pixels,
}
LAYERS = ("lungs", "heart", "fluid", "devices")


def followed(factual, counterfactual, truth, sigma=SIGMA):
    """Where the film made more than half of the true change: (B, H, W) bool.

    Far from any true change the whole film decides, so that x* is the truth everywhere, x nowhere.
    """
    made, wanted = edits_of(factual, counterfactual, truth)  # (B, H * W)
    done, whole = made * wanted - wanted**2 / 2, wanted**2
    near = gaussian_filter(done.reshape(truth.shape), (0, sigma, sigma))
    reach = gaussian_filter(whole.reshape(truth.shape), (0, sigma, sigma)) > 0
    return np.where(reach, near > 0, done.sum(axis=1)[:, None, None] > 0)


def attribute_error(measure, factual, counterfactual, truth, layers, true_layers):
    """What an attribute is on the film less what it is in truth, signed: 0 is perfect (B,).

    measure: one of ATTRIBUTES; layers, true_layers: those of the factual and of the truth.
    Doing nothing leaves the whole difference. NaN where the truth changes nothing.
    """
    arrived = followed(factual, counterfactual, truth)
    errors = []
    for here, old, new in zip(arrived, layers, true_layers, strict=True):
        found = {name: np.where(here, new[name], old[name]) for name in LAYERS}
        errors.append(measure(found) - measure(new))
    changed = (np.asarray(truth) != np.asarray(factual)).any(axis=(1, 2))
    return np.where(changed, errors, np.nan)
