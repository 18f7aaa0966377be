"""Find the numbers of the phantom's graph again, and print them as graph.py holds them.

    python -m prism_nb.phantom.calibrate --seed 0 --samples 300000

Intercepts from the prevalences, the one scale of all log-odds from P(No Finding), and the links
that give the shares wanted at each setting of the dial. Expected shares are compared, not counts.
"""

import argparse

import numpy as np
from scipy.optimize import brentq
from scipy.special import expit, ndtr, ndtri

from prism_nb.phantom import graph
from prism_nb.phantom.graph import AIR, DEVICES, EFFUSION, HEALTHY, HEART, PREVALENCE


def draws(samples, seed=0):
    """The exogenous draws of `samples` patients at once: name -> (samples,) standard normals."""
    rng = np.random.default_rng(seed)
    return {n: rng.standard_normal(samples) for names in graph.NORMALS.values() for n in names}


def population(samples, seed=0, confounding=0.75, mode="confounded", do=None):
    """What `graph.mechanism` says of `samples` patients at once: name -> (samples,) bool."""
    return graph.mechanism(draws(samples, seed), confounding, mode, do)


def intercept(odds, share):
    """The intercept that, added to log-odds (n,), makes the mean probability `share`."""
    return brentq(lambda start: expit(start + odds).mean() - share, -9, 9, xtol=1e-5)


def fit(normals):
    """The scale and each finding's intercept that give PREVALENCE, No Finding's included."""

    def at(scale):
        values, starts, healthy = graph.background(normals), {}, 1.0
        none = {**values, **dict.fromkeys((*graph.GRAPH, "lung"), 0)}
        for label in graph.GRAPH:
            if label == "Lung Opacity":
                values["lung"] = graph.any_of(values, graph.LUNG)
            odds = scale * graph.score(label, values)
            starts[label] = intercept(odds, PREVALENCE[label])
            values[label] = ndtr(normals[label]) < expit(starts[label] + odds)
            healthy *= 1 - expit(starts[label] + scale * graph.score(label, none))
        return starts, healthy.mean() - PREVALENCE[HEALTHY]

    scale = brentq(lambda scale: at(scale)[1], 0.2, 2, xtol=1e-4)
    return scale, at(scale)[0]


def common_cause(given, device, finding):
    """The share of variance that finding and device must share for P(device | finding) = given.

    finding: (n,) its probability for each patient. device: the marginal. At most 0.999.
    """
    cause = np.linspace(-6, 6, 161)
    density = np.exp(-(cause**2) / 2) / np.exp(-(cause**2) / 2).sum()

    def excess(share):
        common, own = np.sqrt(share) * cause, np.sqrt(1 - share)
        ill = density * ndtr((ndtri(finding) - common[:, None]) / own).mean(axis=1)
        return ill @ ndtr((ndtri(device) - common) / own) / ill.sum() - given

    return brentq(excess, 0, 0.999, xtol=1e-5) if excess(0) < -1e-4 else 0.0


def treat(given, paced, effusion, heart, air):
    """P(device but for treatment) and P(chest tube | its reasons) for P(device | effusion) = given.

    effusion, heart, air: (n,) each finding's probability. paced: P(pacemaker | cardiomegaly).
    """
    others = (graph.PACEMAKER - PREVALENCE[HEART] * paced) / (1 - PREVALENCE[HEART])
    unpaced = 1 - others - (paced - others) * heart
    ill, well, leak = ((unpaced * x).mean() for x in (effusion, 1 - effusion, (1 - effusion) * air))
    # P(none) = (1 - base) (ill (1 - drain) + well - leak drain), and its first part is known
    known = (1 - given) * effusion.mean() / (1 - PREVALENCE[DEVICES])
    drain = max((ill - known * (ill + well)) / (ill - known * (ill + leak)), 0.0)
    return 1 - (1 - PREVALENCE[DEVICES]) / (ill * (1 - drain) + well - leak * drain), drain


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--samples", type=int, default=300_000)
    asked = parser.parse_args()
    normals = draws(asked.samples, asked.seed)
    scale, starts = fit(normals)
    print(f"SCALE = {scale:.3f}")
    for label, start in starts.items():
        print(f"{label!r}: ({PREVALENCE[label]}, {start:.3f}, {graph.GRAPH[label][2]}),")
    view = intercept(
        graph.AP_VIEW[1] * normals["acuity"], 0.85
    )  # CheXpert's share of frontal films
    print(f"AP_VIEW = ({view:.3f}, {graph.AP_VIEW[1]})")
    values = graph.background(normals)
    chances = [
        expit(starts[label] + scale * graph.score(label, values))
        for label in (EFFUSION, HEART, AIR)
    ]
    effusion, heart = (np.quantile(x, np.linspace(0.0005, 0.9995, 1000)) for x in chances[:2])
    device, among = PREVALENCE[DEVICES], graph.PACEMAKER / PREVALENCE[DEVICES]
    dials, paced = graph.LINKS["device | effusion"], graph.LINKS["pacemaker | cardiomegaly"]
    treated = [treat(dial, given, *chances) for dial, given in zip(dials, paced, strict=True)]
    columns = {
        "care": [common_cause(dial, device, effusion) for dial in dials],
        "rhythm": [common_cause(given / device, among, heart) for given in paced],
        "base": [base for base, _ in treated],
        "drain": [drain for _, drain in treated],
    }
    for name, column in columns.items():
        print(f'"{name}": ({", ".join(f"{value:.3f}" for value in column)}),')


if __name__ == "__main__":
    main()
