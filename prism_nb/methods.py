"""What the benchmark compares: phantom films with their truth, methods that edit them, measures.

A method is a function (model, cases, invert, seed) -> films (R, H, W) in [0, 1];
invert(method=..., further dials) gives it the Inversion of the cases' films, made once for all
methods that ask for the same. To add a method is to add a function to METHODS. Shapes: R edits;
films (R, H, W) uint8. Used by `prism-nb benchmark`, through leaderboard.py.
"""

import time
from contextlib import suppress
from functools import partial
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch

from prism_nb import metrics
from prism_nb.captions import prompt_pair
from prism_nb.diffusion import decode_latents, encode_films
from prism_nb.editing import PRESETS, edit
from prism_nb.editors import CONTROLS, Dials
from prism_nb.edits import FLOORS as KNOWN
from prism_nb.edits import parse_edit
from prism_nb.evaluation import NOTHING, PERFECT
from prism_nb.findings import nearest
from prism_nb.images import uint8_to_unit
from prism_nb.inversion import METHODS as INVERSIONS
from prism_nb.inversion import Inversion, concat, invert
from prism_nb.phantom import DRAWN, intervene, redrawn, render, sample_patient
from prism_nb.phantom.pretrain import MAIN, UNCONFOUNDED

EDITS = (*(f"remove {name}" for name in MAIN), "add Support Devices")
CASES_SEED = 7_000_003  # a population of its own: nothing is trained on its patients
WORLDS = list(product((0, 1), repeat=len(MAIN)))  # each with and without the others, in turn
ANOTHER = 1_000_000  # patients further on is the one from whom is taken what is drawn anew
PATIENTS_A_FILM = 200  # looked at before a finding is called too rare
BATCH = 8  # films inverted at once


class Cases(NamedTuple):
    """The films of one edit, captions T and T', and the truth, which no method may look at."""

    edit: str
    film_ids: list
    films: np.ndarray  # (R, H, W) uint8
    sources: list
    targets: list
    truth: np.ndarray  # (R, H, W) uint8
    redrawn: np.ndarray  # (R, H, W) uint8, what else the truth could have been, see `another_draw`


def draw_cases(edits, num_films, size, template="plain", negatives=False):
    """A list of Cases, num_films each: always the same patients, of fewer films the first.

    A patient gives an edit one film, whose truth visibly differs. Raises ValueError in one line.
    """
    edits, words = [parse_edit(text) for text in dict.fromkeys(edits)], (template, negatives)
    if wrong := [each.name for each in edits if each.finding not in DRAWN]:
        raise ValueError(f"{wrong[0]}: it follows from the others; name one of {', '.join(DRAWN)}")
    if num_films < 1:
        raise ValueError(f"num_films is {num_films}; it must be 1 or more")
    found, number = {each: [] for each in edits}, 0
    while wanting := [each for each in edits if len(found[each]) < num_films]:
        number += 1
        if number > 1000 + PATIENTS_A_FILM * num_films:
            raise ValueError(f"too few films can take {wanting[0].name!r}: lower num_films")
        patient = sample_patient(CASES_SEED, number, confounding=UNCONFOUNDED)
        do = dict(zip(MAIN, WORLDS[number % len(WORLDS)], strict=True))
        labels = intervene(patient, do).labels
        for each in wanting:
            if labels[each.finding] != each.present:
                found[each] += _case(patient, do, each, size, words)
    return [_stacked(each, rows) for each, rows in found.items()]


def _case(patient, do, each, size, words):
    """One film, its captions and its truth, in a list; an empty one where no eye sees a change."""
    factual = render(patient, size, do)
    turned = do | {each.finding: int(each.present)}
    truth = render(patient, size, turned).image
    if not (np.abs(uint8_to_unit(truth) - uint8_to_unit(factual.image)) > metrics.VISIBLE).any():
        return []
    pair = prompt_pair(factual.labels, each.finding, each.present, *words)
    other = redrawn(patient, each.finding, patient.number + ANOTHER)
    guess = render(other, size, turned).image
    return [(f"patient{patient.number:05d}", factual.image, *pair, truth, guess)]


def _stacked(each, rows):
    ids, films, sources, targets, *truths = map(list, zip(*rows, strict=True))
    return Cases(each.name, ids, np.stack(films), sources, targets, *map(np.stack, truths))


class Inverter:
    """Inverts films, each once for all methods in a row that ask for the same; keeps the time."""

    def __init__(self, model, num_steps):
        self.model, self.num_steps = model, num_steps
        self.how, self.kept, self.seconds = None, {}, {}
        self.spent = self.cost = 0.0  # seconds that ran; seconds a film, had nothing been kept

    def __call__(self, cases, **how):
        """The Inversion of the cases by `invert`'s method and dials; method "none" encodes only."""
        if how != self.how:
            self.how, self.kept, self.seconds = how, {}, {}
        missing = [row for row, film in enumerate(cases.film_ids) if film not in self.kept]
        for start in range(0, len(missing), BATCH):
            self._add(cases, missing[start : start + BATCH])
        self.cost += np.mean([self.seconds[film] for film in cases.film_ids])
        return concat([self.kept[film] for film in cases.film_ids])

    def _add(self, cases, rows):
        model, steps, start = self.model, self.num_steps, now(self.model)
        z0 = encode_films(model, uint8_to_unit(cases.films[rows]))
        texts = [[part[row] for row in rows] for part in (cases.film_ids, cases.sources)]
        if self.how == {"method": "none"}:
            found = Inversion(*texts, z0.expand(steps + 1, *z0.shape), method="none")
        else:
            found = invert(model, z0, *texts, num_steps=steps, **self.how)
        took = now(model) - start
        self.spent += took
        for number, film in enumerate(found.film_ids):
            self.kept[film], self.seconds[film] = found.select([number]), took / len(rows)


def now(model):
    """Seconds of a clock, once the device has done what it was given."""
    if model.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def reset_peak(model):
    """Count the peak of memory anew; without a GPU only Linux can."""
    if model.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def in_grid(model, cases, invert, seed, preset="default", how=None, sham=False, **dials):
    """A point of the grid: an inversion (by default the preset's) and the dials of `edit`."""
    how = how or PRESETS[preset].inversion
    found = invert(**how, **({"seed": seed} if how["method"] == "ddpm" else {}))
    rows, texts = range(len(cases.films)), cases.sources if sham else cases.targets
    return edit(model, found, cases.films, rows, texts, preset=preset, seed=seed, **dials).films


def nothing(model, cases, invert, seed):
    """The films as they are."""
    return uint8_to_unit(cases.films)


def perfect(model, cases, invert, seed):
    """The truth."""
    return uint8_to_unit(cases.truth)


def another_draw(model, cases, invert, seed):
    """The truth, but what the film does not tell drawn anew: how wide the heart was before, which
    devices come and where.

    An editor that samples films as they are cannot be expected to come nearer to the truth. What
    lies behind fluid or metal is the true one here, though no film shows it.
    """
    return uint8_to_unit(cases.redrawn)


def through_vae(model, cases, invert, seed):
    """What the VAE alone makes of the films: what no editor without a mask falls below."""
    return decode_latents(model, invert(method="none").trajectory[0]).numpy()


def truth_through_vae(model, cases, invert, seed):
    """What the VAE makes of the truth: the error that it leaves of an edit that is perfect."""
    return decode_latents(model, encode_films(model, uint8_to_unit(cases.truth))).numpy()


FLOORS = {
    NOTHING: nothing,
    PERFECT: perfect,
    "another draw": another_draw,
    KNOWN["vae"]: through_vae,
    "VAE of the truth": truth_through_vae,
    KNOWN["sham edit"]: partial(in_grid, sham=True, mask="none"),  # T' = T
}


def _grid():
    """Inversion x control x mask at the default's guidance, which starts where each has it."""
    for name, steer, mask in product(INVERSIONS, CONTROLS, ("auto", "none")):
        how = {"method": name}  # null-text is tuned for the guidance that the edit will have
        how |= {"guidance_scale": Dials().guidance_scale} if name == "null_text" else {}
        dials = {"guidance_from": None, "control": steer, "mask": mask}
        yield f"{name}/{steer}/{mask}", partial(in_grid, how=how, **dials)


NO_NOISE = ("sdedit", "ledits++")  # they make their own
METHODS = {
    **{name: partial(in_grid, preset=name) for name in PRESETS},
    **{name: partial(in_grid, preset=name, how={"method": "none"}) for name in NO_NOISE},
    "prism negative_prompt": partial(
        in_grid, preset="prism", how={"method": "negative_prompt"}, guidance_from=None
    ),
    **dict(_grid()),
}
USUAL = (  # those that share an inversion stand together
    *("default", "direct/plain/none", "direct/p2p/auto", "direct/p2p+blend/auto"),
    *("bdia/plain/auto", "fixed_point/plain/auto", "ddpm/plain/auto", "ddim/plain/auto"),
    *("diffedit", "negative_prompt/plain/auto", "prism negative_prompt", "prism", *NO_NOISE),
)


def choose(names=()):
    """The functions of some methods, floors first; no name: the usual ones; "all": the whole grid.

    Raises ValueError with the nearest name.
    """
    names = list(METHODS) if list(names) == ["all"] else list(names) or USUAL
    for name in names:
        if name not in METHODS:
            raise ValueError(f"no method {name!r}; the nearest is {nearest(name, METHODS)!r}")
    return FLOORS | {name: METHODS[name] for name in names}


def measure(cases, made, score):
    """Measures of edited films (R, H, W) uint8 against the truth: a table with a row a film.

    score: ClipScorer's s_clip, or alike.
    """
    x, new, true = map(uint8_to_unit, (cases.films, made, cases.truth))
    mask, who = cases.films != cases.truth, cases.film_ids
    found = {
        "error_inside": metrics.error_inside(new, true, mask),
        "error_nothing": metrics.error_inside(x, true, mask),
        "error_outside": metrics.error_outside(new, true, mask),
        "tea_effectiveness": metrics.tea_effectiveness(x, new, true),
        "tea_amplification": metrics.tea_amplification(x, new, true),
        "over_edit": metrics.over_edit(x, new, true, mask),
        "iou_at_area": metrics.iou_at_area(x, new, true),
        "l1": metrics.l1(x, new),
        "s_clip": score(x, new, cases.sources, cases.targets),
    }
    return pd.DataFrame({"film_id": who, "patient_id": who, "edit": cases.edit} | found)
