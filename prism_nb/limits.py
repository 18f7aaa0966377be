"""Where edits go wrong: what goes along, hard places, burnt-in text, bad films (App. F, G, H).

Most of it asks the phantom, whose true counterfactual x* is known for any attribute: the share of
a true change that a film followed is <x^ - x, x* - x> / |x* - x|^2 over some pixels, 1 if it made
all of it and 0 if none. Plans as of `edits`, R edits; films (R, H, W) in [0, 1]; masks bool.
Used by notebooks A2 and A3.
"""

from dataclasses import fields
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import ndimage

from prism_nb import phantom
from prism_nb.captions import prompt_pair
from prism_nb.classifiers import load_classifier
from prism_nb.diffusion import encode_films
from prism_nb.editing import Edited, edit
from prism_nb.edits import recorded_dials
from prism_nb.images import uint8_to_unit
from prism_nb.inversion import invert
from prism_nb.judging import asker
from prism_nb.metrics import tea_effectiveness
from prism_nb.phantom.anatomy import body, bones
from prism_nb.phantom.renderer import burnt_in_text, film_grid

HEART, EFFUSION = "Cardiomegaly", "Pleural Effusion"
DEVICES, PACEMAKER = "Support Devices", "pacemaker"
ATTRIBUTES = (HEART, EFFUSION, DEVICES, PACEMAKER)
BONE = 0.1  # attenuation of bone above that of soft tissue, from which a place is over bone
BORDERS = (0.05, 0.15)  # shares of the side that are near the border, and a little farther
LEAST_PIXELS = 12  # fewer in a place say nothing
LEAST_LEFT = 0.1  # of a true change, of which a share is to say something
TURN = 20  # degrees


# Few films, inverted and edited anew as the run did it


def invert_again(model, made, films, rows):
    """The Inversion of films as 03_invert made it; rows: theirs of the cohort's table.

    made: the recorded parameters of 03_invert and 04_edit.
    """
    ids, texts = list(rows["film_id"]), list(rows["caption"])
    how, z0 = made["03_invert"], encode_films(model, films)
    steps, seed = how["num_ddim_steps"], how["seed"]
    return invert(model, z0, ids, texts, how["inversion"], steps, seed)


def edit_again(model, made, inverted, films, rows, targets, holds=None, **dials):
    """Edits as 04_edit made them, but for `dials`: Edited; holds: captions to hold, for each."""
    dials = recorded_dials(made["04_edit"]) | dials
    if holds is None:
        return edit(model, inverted, films, rows, targets, **dials)
    edits = zip(rows, targets, holds, strict=True)  # what is held is the same for a whole call
    parts = [edit(model, inverted, films, [k], [to], hold=held, **dials) for k, to, held in edits]
    columns = [[getattr(part, each.name) for part in parts] for each in fields(Edited)]
    return Edited(*(None if column[0] is None else np.concatenate(column) for column in columns))


def load_judge(classifiers, named, device="cpu"):
    """The judge of 05_evaluate as a function of films (judging.asker): its own, or one named."""
    folder = Path(named) if Path(named).is_dir() else Path(classifiers) / "judge"
    judge, card = load_classifier(folder)
    return asker(judge.to(device), card)


# Appendix F: what goes along


def with_attributes(cohort):
    """The cohort's table with a column pacemaker: known of the phantom, else any device."""
    table = cohort.table
    if not phantom.is_phantom(cohort.image_root):
        return table.assign(pacemaker=table[DEVICES])
    known = phantom.factors(cohort.image_root).set_index("film_id")[PACEMAKER]
    return table.assign(pacemaker=table["film_id"].map(known).astype(float))


def with_both(table, count):
    """At most `count` films with a large heart and a pacemaker; with fluid first, then test films.

    table: of with_attributes. Raises ValueError where there is no such film.
    """
    both = table[(table[HEART] == 1) & (table[PACEMAKER] == 1)]
    if both.empty:
        raise ValueError("no film shows cardiomegaly and a pacemaker: give 01_caption more films")
    first = pd.DataFrame({"dry": both[EFFUSION] != 1, "seen": both["split"] != "test"})
    return both.loc[first.sort_values(["dry", "seen"], kind="stable").index].head(count)


def held_captions(labels, finding, settings):
    """Captions that differ from T by one other finding that the film shows: for Dials.hold."""
    how = settings["template"], settings["negatives"]
    others = [x for x in (HEART, EFFUSION, DEVICES) if x != finding and labels[x] == 1]
    return tuple(prompt_pair(labels, other, False, *how)[1] for other in others)


def gone_along(cohort, plan, factual, films, names=ATTRIBUTES):
    """How much of each attribute's true removal the films followed: a row an edit and attribute.

    Of others than the edited one, only where the true edit changes nothing: there, 0 is right.
    Columns: about the edit, attribute, share (NaN where the film does not show the attribute, or
    little of it lies where it can be told apart).
    """
    rows = []
    for k, row in enumerate(plan.itertuples()):
        x, own = factual[k], _true(cohort, row, {row.finding: int(row.present)})
        for name in names:
            truth = _true(cohort, row, {name: 0})
            where = (own == x) | (name == row.finding)
            change = (truth - x) ** 2
            enough = change[where].sum() > LEAST_LEFT * change.sum()
            share = followed(x, films[k], truth, where) if enough else np.nan
            rows.append((row.film_id, row.patient_id, row.edit, name, share))
    return pd.DataFrame(rows, columns=["film_id", "patient_id", "edit", "attribute", "share"])


def followed(factual, film, truth, where):
    """Share of the true change that a film (H, W) followed within `where`; NaN for no change."""
    parts = [np.where(where, each, factual)[None] for each in (film, truth)]
    return float(tea_effectiveness(factual[None], *parts)[0])


def _true(cohort, row, do):
    size = cohort.settings["image_size"]
    film, _ = phantom.true_counterfactual(cohort.image_root, row.film_id, do, size)
    return uint8_to_unit(film)


# Appendices G and H: hard places, text, bad films


def places(patient, size):
    """Where on the film a device can be: over bone or clear of it, at the border or inside."""
    bone = bones(film_grid(patient, size), body(patient)) > BONE
    steps = np.minimum(np.arange(size), np.arange(size)[::-1]) / size
    border = np.minimum.outer(steps, steps)
    near, far = BORDERS
    return {
        "over bone": bone,
        "clear of bone": ~bone,
        f"within {near:.0%} of the border": border < near,
        f"{near:.0%} to {far:.0%} from it": (border >= near) & (border < far),
        f"over {far:.0%} from it": border >= far,
    }


def removed_by_place(cohort, plan, factual, films, truth):
    """How well devices went, by where they lie and by kind: a row an edit and place.

    Columns: place, pixels, share (of the true change), error (mean |x^ - x*| there), untouched
    (the same of the film itself).
    """
    rows, size = [], cohort.settings["image_size"]
    for k, row in enumerate(plan.itertuples()):
        patient = phantom.patient_of(cohort.image_root, row.film_id)
        masks, changed = phantom.render(patient, size).masks, truth[k] != factual[k]
        kinds = {
            f"kind: {n}".replace("_", " "): masks[n] for n in phantom.DEVICE_KINDS if n in masks
        }
        for place, where in (places(patient, size) | kinds).items():
            where = where & changed
            if where.sum() < LEAST_PIXELS:
                continue
            share = followed(factual[k], films[k], truth[k], where)
            errors = [abs(x[k] - truth[k])[where].mean() for x in (films, factual)]
            rows.append((row.film_id, row.patient_id, place, int(where.sum()), share, *errors))
    head = ["film_id", "patient_id", "place", "pixels", "share", "error", "untouched"]
    return pd.DataFrame(rows, columns=head)


def text_masks(cohort, film_ids):
    """Where letters are burnt into films of the phantom: (R, H, W) bool."""
    patients = [phantom.patient_of(cohort.image_root, film) for film in film_ids]
    size = cohort.settings["image_size"]
    return np.stack([burnt_in_text(patient, size) > 0 for patient in patients])


def with_margin(masks, pixels=3):
    """Masks (R, H, W) that reach so many pixels farther."""
    return ndimage.maximum_filter(masks, (1, 2 * pixels + 1, 2 * pixels + 1))


def corner_of(letters):
    """The upper corner, a third of the side, that holds most letters (H, W): two slices."""
    third = len(letters) // 3
    left = letters[:, :third].sum() >= letters[:, -third:].sum()
    return slice(third), slice(third) if left else slice(-third, None)


def _noisy(films, rng):
    return films + rng.normal(0, 0.08, films.shape[-2:])  # the same on a film and on its truth


def _turned(films, _):
    return ndimage.rotate(films, TURN, (-1, -2), reshape=False, order=1)


def _blurred(films, _):
    return ndimage.gaussian_filter(films, (0, *[films.shape[-1] / 100] * 2))


DISTORTIONS = {  # films (R, H, W) in [0, 1] and a generator -> films, before clipping
    "as it is": lambda films, _: films,
    "burnt": lambda films, _: films**2.5,
    "too bright": lambda films, _: films**0.4,
    "blurred": _blurred,
    "noisy": _noisy,
    "turned": _turned,
}


def distort(films, name, seed=0):
    """Films (R, H, W) in [0, 1] spoilt in one way of DISTORTIONS, each alike: float32."""
    films = DISTORTIONS[name](np.asarray(films, np.float64), np.random.default_rng(seed))
    return np.clip(films, 0, 1).astype(np.float32)
