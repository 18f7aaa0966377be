"""Every method under one evaluator: the same films, the same judge, the truth where there is one.

The do-nothing editor and, on the phantom, the perfect editor are always rows: a measure that does
not tell them apart measures nothing. R edits; films (R, H, W) uint8; the judge's probabilities
(R, K). `collect` reads what the methods made, `measure` gives one row an edit and method.
Used by notebook 05.
"""

from dataclasses import dataclass

import numpy as np
import pandas as pd

from prism_nb import geometry, metrics, phantom
from prism_nb.edits import FLOORS, OWN, load_edit_films, truths
from prism_nb.findings import PAPER_HEADS
from prism_nb.ganterfactual import resize, translate
from prism_nb.images import uint8_to_unit, unit_to_uint8
from prism_nb.judging import HEADS

NOTHING, PERFECT, FILTERED = "do nothing", "perfect editor", f"{OWN}, S_CLIP filter"
GAN = "GANterfactual"
NUM = len(PAPER_HEADS)  # the first heads; the others say who it is
SMALL = 224  # pixels a side at which the paper's baseline was measured
ABOUT = ("film_id", "patient_id", "edit", "finding")
JUDGED = ["p_factual", "cpg", "cpg_absolute", "flip", "leakage"]
_IMAGES = ("l1", "ssim", "sparsity")
_WITH_TRUTH = ("true_error", "tea_effectiveness", "tea_amplification", "under_edit", "id_ratio")
_WITH_TRUTH += ("iou_at_area",)


@dataclass
class Cases:
    """The edits of a split, and the films that each method made of them."""

    plan: pd.DataFrame  # R rows of edits.parquet, our own
    factual: np.ndarray  # (R, H, W) uint8
    truth: np.ndarray  # (R, H, W) float32 in [0, 1], NaN where it is not known
    mask: np.ndarray  # (R, H, W) bool, where the truth differs
    layers: list  # R pairs of layers, of the factual and the truth; None where not known
    films: dict  # method -> (R, H, W) uint8
    made: dict  # method -> (R,) bool, the edits that it made

    @property
    def known(self):
        """Which edits have a truth: (R,) bool."""
        return ~np.isnan(self.truth).any(axis=(1, 2))

    def add(self, method, films, made=True):
        """Take in a method's films (R, H, W) uint8; made (R,): which of them are its own."""
        if films.shape != self.factual.shape:
            raise ValueError(
                f"films of {method} are {films.shape}, the factual ones {self.factual.shape}: make "
                "the edits anew in 04_edit at the cohort's size"
            )
        self.films[method], self.made[method] = films, np.broadcast_to(made, len(films))


def collect(cohort, edits, folder, split="test"):
    """The Cases of a split: edits is the table of edits.parquet, its films are in `folder`.

    Floors (one film for all edits of it) and peers are taken as they come. Raises ValueError in
    one line: no edit, edits of another cohort, films of another size.
    """
    edits = edits[edits["split"] == split]
    plan = edits[edits["method"] == OWN].reset_index(drop=True)
    if plan.empty:
        raise ValueError(f"no edit of a {split} film: raise num_{split}_films in 03_invert")
    table = cohort.table.set_index("film_id")
    _check_plan(table, plan)
    factual = cohort.films(table.loc[plan["film_id"]])
    truth, mask = truths(cohort, plan)
    cases = Cases(plan, factual, truth, mask, [], {}, {})
    cases.layers = [
        _layers(cohort, *row) for row in zip(plan.itertuples(), cases.known, strict=True)
    ]
    cases.add(NOTHING, factual)
    methods = dict.fromkeys([*FLOORS.values(), OWN, *edits["method"]])
    for method in methods:
        if len(rows := edits[edits["method"] == method]):
            cases.add(method, *_films_of(rows, plan, folder, factual))
    if cases.known.any():
        perfect = np.where(mask, unit_to_uint8(np.nan_to_num(truth)), factual)
        cases.add(PERFECT, perfect, cases.known)
    return cases


def _check_plan(table, plan):
    """Refuse edits of films that the cohort lacks, or has in another split or with another label.

    Phantom cohorts number their films alike, and a judge has seen what was not in the test split.
    """
    again = "the edits are of another cohort, run 03_invert and 04_edit again"
    if missing := sorted(set(plan["film_id"]) - set(table.index)):
        raise ValueError(
            f"{len(missing)} films were edited that the cohort does not have (the first is "
            f"{missing[0]}): {again}"
        )
    odd = [
        row.film_id
        for row in plan.itertuples()
        if table.at[row.film_id, "split"] != row.split
        or table.at[row.film_id, row.finding] != 1 - row.present
    ]
    if odd:
        raise ValueError(
            f"{len(odd)} edits are of films that the cohort has in another split or with another "
            f"label (the first is {odd[0]}): {again}"
        )


def _films_of(rows, plan, folder, factual):
    """A method's films in the plan's order, and which edits it made; else the factual stands."""
    keys = ["film_id"] if (rows["edit"] == "").all() else ["film_id", "edit"]
    paths = plan[["film_id", "edit"]].merge(rows[[*keys, "path"]], "left", keys)
    made, films = paths["path"].notna().to_numpy(), factual.copy()
    loaded = load_edit_films(folder, paths[made])
    if loaded.shape[1:] != films.shape[1:]:
        return loaded, made  # Cases.add says what is wrong
    films[made] = loaded
    return films, made


def _layers(cohort, row, known):
    if not known or row.finding not in geometry.ATTRIBUTES:
        return None
    patient = phantom.patient_of(cohort.image_root, row.film_id)
    size, do = cohort.settings["image_size"], {row.finding: int(row.present)}
    pair = (phantom.render(patient, size, each).masks for each in (None, do))
    return [{name: masks[name] for name in geometry.LAYERS} for masks in pair]


def add_baseline(cases, gan, finding):
    """Let a GANterfactual make the edits of its finding; it has no other."""
    mine = (cases.plan["finding"] == finding).to_numpy()
    wanted, films = cases.plan["present"].to_numpy(), cases.factual.copy()
    for present in (False, True):
        part = mine & (wanted == present)
        films[part] = translate(gan, cases.factual[part], present)
    if mine.any():
        cases.add(GAN, films, mine)


def measure(cases, ask):
    """One row an edit and method: ABOUT, method, a column a metric, and `p HEAD` a head.

    ask(films) gives the judge's probabilities (R, 6) of HEADS. The filtered rows are those of our
    own that passed the filter. Columns `_224` are of films shrunk to 224 pixels a side.
    """
    asked, parts = {name: ask(films) for name, films in cases.films.items()}, []
    for name, films in cases.films.items():
        frame = _measure(cases, films, asked[name], asked)
        if cases.factual.shape[1] > SMALL:
            frame = frame.assign(**_shrunk(cases, films, ask))
        frame = frame.assign(method=name)
        if name == OWN:
            frame["s_clip"] = cases.plan["s_clip"].to_numpy(float)
        parts.append(frame[cases.made[name]])
        if name == OWN:
            kept = cases.plan["kept"].to_numpy(bool)
            parts.append(frame[kept].assign(method=FILTERED))
    return pd.concat(parts, ignore_index=True)


def _measure(cases, films, after, asked):
    """One method's metrics, a row an edit of the plan; NaN where a head or the truth is missing."""
    x, x_cf, known = uint8_to_unit(cases.factual), uint8_to_unit(films), cases.known
    frame = cases.plan[list(ABOUT)].copy()
    for name in (*_IMAGES, *(["lpips"] if metrics.lpips_weights().is_file() else [])):
        frame[name] = getattr(metrics, name)(x, x_cf)
    frame = frame.assign(**_judged(cases.plan, asked[NOTHING], after, asked.get(PERFECT)))
    for name, values in _compared(cases, x[known], x_cf[known]).items():
        frame[name] = np.nan
        frame.loc[known, name] = values
    return frame.join(pd.DataFrame(after, columns=[f"p {head}" for head in HEADS]))


def _judged(plan, before, after, true=None):
    """What the judge's probabilities (R, 6) say of a method: a row an edit, a column a metric."""
    found = pd.DataFrame(np.nan, range(len(plan)), JUDGED)
    if true is not None:
        found["leakage_beyond_truth"] = np.nan
    for finding in set(plan["finding"]) & set(HEADS):
        i, k = np.flatnonzero(plan["finding"] == finding), HEADS.index(finding)
        p, q, toward = before[i], after[i], plan["present"].to_numpy(int)[i]
        found.loc[i, "p_factual"] = p[:, k]
        found.loc[i, "cpg"] = metrics.cpg(p[:, k], q[:, k], toward)
        found.loc[i, "cpg_absolute"] = metrics.cpg_absolute(p[:, k], q[:, k])
        found.loc[i, "flip"] = metrics.flip(p[:, k], q[:, k], toward)
        heads = p[:, :NUM], q[:, :NUM], k
        found.loc[i, "leakage"] = metrics.leakage(*heads)
        if true is not None:
            found.loc[i, "leakage_beyond_truth"] = metrics.leakage(*heads, true[i, :NUM])
    return found.assign(identity_shift=metrics.identity_shift(before[:, NUM:], after[:, NUM:]))


def _shrunk(cases, films, ask):
    """L1 at 224 pixels, and the gain when the judge sees no more than those."""
    side, small = cases.factual.shape[1], [resize(x, SMALL) for x in (cases.factual, films)]
    asked = [ask(resize(x, side)) for x in small]
    l1 = metrics.l1(*(uint8_to_unit(x) for x in small))
    return {"l1_224": l1, "cpg_224": _judged(cases.plan, *asked)["cpg"].to_numpy()}


def _compared(cases, x, x_cf):
    """The metrics that need the truth, of the edits that have one: name -> values."""
    truth, mask = cases.truth[cases.known], cases.mask[cases.known]
    found = {name: getattr(metrics, name)(x, x_cf, truth) for name in _WITH_TRUTH}
    found["error_inside"] = metrics.error_inside(x_cf, truth, mask)
    found["error_outside"] = metrics.error_outside(x_cf, truth, mask)
    found["over_edit"] = metrics.over_edit(x, x_cf, truth, mask)
    found["pointing_game"] = metrics.pointing_game(x, x_cf, mask)
    findings, errors = cases.plan["finding"].to_numpy()[cases.known], np.full(len(x), np.nan)
    layers = [pair for pair, known in zip(cases.layers, cases.known, strict=True) if known]
    for finding, size_of in geometry.ATTRIBUTES.items():
        if (rows := np.flatnonzero(findings == finding)).size:
            pairs = zip(*(layers[row] for row in rows), strict=True)
            signed = geometry.attribute_error(size_of, x[rows], x_cf[rows], truth[rows], *pairs)
            errors[rows] = np.abs(signed)
    return found | {"attribute_error": errors}
