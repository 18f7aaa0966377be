"""Every method under one evaluator: the same films, the same judge, the truth where there is one.

The do-nothing editor and, on the phantom, the perfect editor are always rows: a measure that does
not tell them apart measures nothing. Films (B, H, W) in [0, 1]; probabilities (B, K). Used by
notebook 05.
"""

import numpy as np
import pandas as pd

from prism_nb import metrics
from prism_nb.edits import FLOORS, OWN, load_edit_films, truths
from prism_nb.images import load_films, uint8_to_unit, unit_to_uint8

NOTHING, PERFECT, FILTERED = "do nothing", "perfect editor", f"{OWN}, S_CLIP filter"


def measure_edits(cohort, edits, folder, judge, heads, predict, split="test"):
    """Measure each method on each edit of a split: one row an edit and method, a column a metric.

    edits: the table of edits.parquet, its films in `folder`; predict(judge, films) gives (B, K).
    """
    plan = edits[(edits["method"] == OWN) & (edits["split"] == split)].reset_index(drop=True)
    if plan.empty:
        raise ValueError(f"no edit of a {split} film: raise num_{split}_films in 03_invert")
    where = cohort.table.set_index("film_id")["path"]
    paths = [cohort.image_root / where[film] for film in plan["film_id"]]
    factual = load_films(paths, cohort.settings["image_size"], cohort.settings["fit"])
    truth, mask = truths(cohort, plan)
    known = ~np.isnan(truth).any(axis=(1, 2))
    films = {NOTHING: factual}
    for name in FLOORS.values():
        own = edits[edits["method"] == name].set_index("film_id")
        if len(own):
            films[name] = load_edit_films(folder, own.loc[plan["film_id"]])
    films[OWN] = load_edit_films(folder, plan)
    films[PERFECT] = unit_to_uint8(np.where(known[:, None, None], truth, 0.0))
    ask = {name: predict(judge, part) for name, part in films.items()}
    parts = []
    for name, part in films.items():
        rows = known if name == PERFECT else np.ones(len(plan), bool)
        if rows.any():
            measured = _measure(plan, factual, part, truth, mask, known, ask, name, heads)
            parts.append(measured[rows].assign(method=name))
        if name == OWN:
            parts.append(measured[plan["kept"].to_numpy(bool)].assign(method=FILTERED))
    return pd.concat(parts, ignore_index=True)


def _measure(plan, factual, films, truth, mask, known, ask, name, heads):
    """One method's metrics, a row an edit of the plan; NaN where a head or the truth is missing."""
    x, x_cf = uint8_to_unit(factual), uint8_to_unit(films)
    frame = plan[["film_id", "patient_id", "edit", "finding"]].copy()
    frame["l1"] = metrics.l1(x, x_cf)
    for column in ("cpg", "cpg_absolute", "flip", "leakage"):
        frame[column] = np.nan
    for finding in set(plan["finding"]) & set(heads):
        rows, head = (plan["finding"] == finding).to_numpy(), list(heads).index(finding)
        before, after = ask[NOTHING][rows], ask[name][rows]
        toward = plan.loc[rows, "present"].to_numpy(int)
        frame.loc[rows, "cpg"] = metrics.cpg(before[:, head], after[:, head], toward)
        frame.loc[rows, "cpg_absolute"] = metrics.cpg_absolute(before[:, head], after[:, head])
        frame.loc[rows, "flip"] = metrics.flip(before[:, head], after[:, head], toward)
        frame.loc[rows, "leakage"] = metrics.leakage(before, after, head)
    with_truth = (
        "error_inside",
        "error_outside",
        "tea_effectiveness",
        "tea_amplification",
        "iou_at_area",
    )
    for column in with_truth:
        frame[column] = np.nan
    if known.any():
        x, x_cf, x_true, m = x[known], x_cf[known], truth[known], mask[known]
        frame.loc[known, "error_inside"] = metrics.error_inside(x_cf, x_true, m)
        frame.loc[known, "error_outside"] = metrics.error_outside(x_cf, x_true, m)
        for column in with_truth[2:]:
            frame.loc[known, column] = getattr(metrics, column)(x, x_cf, x_true)
    return frame
