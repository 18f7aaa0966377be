"""What the measurements say: Table 2, leakage, Appendix B, realism, whether the filter helps.

Everything starts from `measured` of evaluation.measure: a row an edit and method, a column a
metric, and the judge's probabilities `p HEAD`. The paper's own numbers stand beside ours, marked as
another data set: its methods were judged by different classifiers at different resolutions.
Used by notebook 05.
"""

from functools import partial

import numpy as np
import pandas as pd
from scipy.special import logit

from prism_nb import metrics
from prism_nb.captions import edit_labels
from prism_nb.diffusion import encode_films
from prism_nb.editing import edit
from prism_nb.edits import FLOORS, OWN, recorded_dials
from prism_nb.evaluation import GAN, NOTHING, PERFECT
from prism_nb.findings import PAPER_HEADS, known_labels
from prism_nb.ganterfactual import translate
from prism_nb.images import uint8_to_unit, unit_to_uint8
from prism_nb.inversion import invert

PAPER = pd.DataFrame(  # Table 2 of the paper; CPG is absolute there, by another classifier each
    {"l1": [0.091, 0.031], "cpg_absolute": [0.781, 0.845]},
    index=[f"{GAN} (paper, CheXpert)", "PRISM (paper, CheXpert)"],
)
PAPER_EDIT = "remove Support Devices"
PAPER_ACCURACY = (0.80, 0.87, 0.91, 0.86)  # Table 3, first row, in the order of PAPER_HEADS
FEW = 5  # edits kept, and rejected, of which a filter can be judged
LAST = [GAN, PERFECT, *PAPER.index]  # in the table; what comes before keeps its order


def table2(measured, num_bootstrap=1000, seed=0):
    """Mean and interval by patient of every metric: one row an edit, method and metric.

    Columns as of metrics.summarise; the paper's numbers are the last rows, without n. A metric
    that an edit does not have, for want of a truth or a head, has no row.
    """
    names = [n for n in measured if measured[n].dtype.kind == "f" and not n.startswith("p ")]
    tidy = metrics.summarise(
        measured, ["edit", "method"], names, num_bootstrap=num_bootstrap, seed=seed
    )
    paper = PAPER.rename_axis("method").reset_index().melt("method", None, "metric", "mean")
    both = pd.concat([tidy[tidy["n"] > 0], paper.assign(edit=PAPER_EDIT)], ignore_index=True)
    return both.astype({"n": "Int64", "patients": "Int64"})


def means(tidy, method):
    """Of table2, one method's mean of each metric and edit: {metric: {edit: mean}}."""
    own = tidy[tidy["method"] == method].groupby("metric")
    return {name: dict(zip(part["edit"], part["mean"], strict=True)) for name, part in own}


def nested(frame, *keys):
    """A table as dicts in dicts, by its columns `keys`, with the others innermost: for JSON."""
    found, frame = {}, frame.astype(object)
    for row in frame.where(frame.notna(), None).to_dict("records"):
        inner = found
        for key in keys:
            inner = inner.setdefault(str(row.pop(key)), {})
        inner.update(row)
    return found


def laid_out(tidy, names, digits=3):
    """Some metrics of table2 as text, "mean (low to high)": rows edit and method, with n.

    A metric that fewer edits have, such as flip, has its own n behind it.
    """
    part, row = tidy[tidy["metric"].isin(names)].copy(), ["edit", "method"]
    fewer = (part["n"] < part.groupby(row)["n"].transform("max")).fillna(False)
    texts = pd.Series([_interval(each, digits) for each in part.itertuples()], part.index)
    part["text"] = np.where(fewer, texts + ", n = " + part["n"].astype(str), texts)
    wide = part.pivot(index=row, columns="metric", values="text")
    wide = wide.reindex(columns=[name for name in names if name in wide])
    most = part.groupby(row)["n"].max()
    wide.insert(0, "n", most.astype(object).where(most.notna(), "").astype(str))
    methods = sorted(dict.fromkeys(part["method"]), key=lambda m: m in LAST and LAST.index(m) + 1)
    places = pd.MultiIndex.from_product([part["edit"].unique(), methods], names=wide.index.names)
    return wide.reindex(places[places.isin(wide.index)]).fillna(dict.fromkeys(names, ""))


def _interval(row, digits):
    text = f"{row.mean:.{digits}f}"
    return text if np.isnan(row.low) else f"{text} ({row.low:.{digits}f} to {row.high:.{digits}f})"


def probabilities(measured, method, heads=PAPER_HEADS):
    """The judge's probabilities of a method's films: rows film_id and edit, a column a head."""
    part = measured[measured["method"] == method].set_index(["film_id", "edit"])
    return part[[f"p {head}" for head in heads]].set_axis(list(heads), axis=1)


def leakage_matrix(measured, method=OWN):
    """Mean change of every head's probability, a row an edit: what it should move, and what not."""
    after = probabilities(measured, method)
    change = after - probabilities(measured, NOTHING).loc[after.index]
    return change.groupby("edit", sort=False).mean()


def logit_changes(measured, tried=None, num_bootstrap=1000, seed=0):
    """How far the floors move the judge's logits (Appendix B): a row a floor and head.

    Mean absolute change over the films, each once, with its interval by patient; 0 is best.
    tried: what the judge says of other films that came back, of `asked_back`: further rows.
    """
    parts, before = [], probabilities(measured, NOTHING)
    for floor in FLOORS.values():
        after = probabilities(measured, floor)
        if len(after):
            p = [part.loc[after.index] for part in (before, after)]
            moved = _moved(*p).groupby("film_id").first()
            moved["patient_id"] = measured.groupby("film_id")["patient_id"].first()
            parts.append(moved.assign(method=floor))
    frame = pd.concat([*parts, tried]).melt(
        ["method", "patient_id"], var_name="head", value_name="logit_change"
    )
    by = ["method", "head"]
    return metrics.summarise(frame, by, "logit_change", num_bootstrap=num_bootstrap, seed=seed)


def asked_back(ask, patients, factual, films):
    """Absolute changes of the judge's logits by each way there and back of 03_invert.

    patients: B; factual (B, H, W) uint8; films: method -> (B, H, W) uint8. A row a method and
    film, a column a head.
    """
    heads, known = list(PAPER_HEADS), ask(factual)
    parts = []
    for method, made in films.items():
        moved = _moved(known[:, : len(heads)], ask(made)[:, : len(heads)])
        frame = pd.DataFrame(moved, columns=heads)
        parts.append(frame.assign(method=method, patient_id=list(patients)))
    return pd.concat(parts, ignore_index=True)


def _moved(before, after):
    p, q = (part.clip(1e-6, 1 - 1e-6) for part in (before, after))
    return abs(logit(q) - logit(p))


def labels_around(cohort, plan, heads=PAPER_HEADS):
    """What a film shows before and after an edit: two lists of labels an edit, for Figure 6."""
    films, heads = cohort.table.set_index("film_id").loc[plan["film_id"]], list(heads)
    pairs = zip(films.iloc, plan.itertuples(), strict=True)
    edited = [edit_labels(film, row.finding, bool(row.present)) for film, row in pairs]
    before, after = (known_labels(part, heads).tolist() for part in (films, pd.DataFrame(edited)))
    return [list(pair) for pair in zip(before, after, strict=True)]


def own_editors(model, made, plan):
    """Our editor as functions of films (B, H, W): null edit, a plan's edits, and their opposites.

    Each inverts the films anew under what they show. The null edit (T' = T) has no mask, under
    which it would change nothing. made: the recorded parameters of 03_invert and 04_edit.
    """
    inverting, dials = made["03_invert"], recorded_dials(made["04_edit"])
    ids, old, new = (list(plan[name]) for name in ("film_id", "source", "target"))

    def turn(films, source, target, **more):
        z0 = encode_films(model, films)
        how = (inverting[name] for name in ("inversion", "num_ddim_steps", "seed"))
        inverted = invert(model, z0, ids, source, *how)
        return edit(model, inverted, films, range(len(ids)), target, **dials | more).films

    return (
        partial(turn, source=old, target=old, mask="none"),
        partial(turn, source=old, target=new),
        partial(turn, source=new, target=old),
    )


def gan_editors(gan, present):
    """GANterfactual as own_editors, for films that show its finding (`present`) or do not."""

    def turn(films, to):
        return uint8_to_unit(translate(gan, unit_to_uint8(films), to))

    null, there = (partial(turn, to=to) for to in (present, not present))
    return null, there, null


def cycles(films, editors, counts=(1, 5)):
    """L1 of null edits in a row (composition), and of edits taken back (reversibility).

    films (B, H, W) in [0, 1]; editors: method -> its null edit, edits there and edits back, each a
    function of films. Both are 0 for an editor that does only what is asked. A row a method and
    number of cycles.
    """
    rows = []
    for method, (null, there, back) in editors.items():
        for count in counts:
            apart = {"composition": metrics.composition(films, null, count).mean()}
            apart["reversibility"] = metrics.reversibility(films, there, back, count).mean()
            rows.append({"method": method, "cycles": count, "films": len(films)} | apart)
    return pd.DataFrame(rows)


def realism(cases, real, features, seed=0):
    """KID of each method's films against real ones: a row a method, lower is more like them.

    real (N, H, W) uint8: other films of the test split; features(films) gives (N, D). The films of
    doing nothing and the perfect editor say what a perfect score looks like here. Of several edits
    of a film the first counts: films that repeat would raise KID, which takes them as independent.
    """
    known, rows = features(real), []
    for method, films in cases.films.items():
        mine = np.flatnonzero(cases.made[method])
        films = films[mine[~cases.plan["film_id"].iloc[mine].duplicated().to_numpy()]]
        if min(len(films), len(real)) > 1:
            mean, std = metrics.kid(features(films), known, seed=seed)
            rows.append({"method": method, "films": len(films), "kid": mean, "std": std})
    return pd.DataFrame(rows, columns=["method", "films", "kid", "std"])


def filtered(measured, plan):
    """Our own edits with s_clip, kept and `error`: in the true change, over that of doing nothing.

    Not over the whole film, where an edit that does nothing would come out well. Where no truth is
    known, 1 - CPG.
    """
    own, nothing = (
        measured[measured["method"] == name].reset_index(drop=True) for name in (OWN, NOTHING)
    )
    own = own.assign(kept=plan["kept"].to_numpy(bool))
    if "error_inside" in own and own["error_inside"].notna().any():
        return own.assign(error=own["error_inside"] / nothing["error_inside"])
    return own.assign(error=1 - own["cpg"])


def filter_sentence(own, what="error in the true change", num_bootstrap=1000, seed=0):
    """Say whether the S_CLIP filter helps, whichever way it came out; own: of `filtered`.

    Errors are divided by the mean of their kind of edit, so that a hard kind does not decide.
    """
    own = own[own["error"].notna()]
    of_kind = own.groupby("edit")
    error = (own["error"] / of_kind["error"].transform("mean")).fillna(1)
    rank = (own["s_clip"] - of_kind["s_clip"].transform("mean")).corr(error, "spearman")
    also = "" if np.isnan(rank) else f" (rank correlation of score and error {rank:+.2f})"
    kept, error, n = own["kept"].to_numpy(), error.to_numpy(), len(own)
    if not n:
        return "Nothing can be said of the S_CLIP filter: no edit has an error that is known."
    if kept.all() or not kept.any():
        did = "keeps" if kept.all() else "rejects"
        return f"The S_CLIP filter {did} all {n} edits, so it selects nothing here{also}."
    codes, draws = metrics.patient_codes(own["patient_id"]), []
    for weights in metrics.resample_patients(codes.max() + 1, num_bootstrap, seed):
        w = weights[:, codes]
        means = [metrics.ratio(w @ (error * part), w @ part) for part in (kept, ~kept)]
        draws.append(means[0] - means[1])
    low, high = metrics.percentile_bounds(draws)
    facts = f"keeps {kept.sum()} of {n} edits: of the mean {what} of its kind, a kept one has "
    facts += (
        f"{error[kept].mean():.2f} and a rejected one {error[~kept].mean():.2f}, 95 % interval "
    )
    facts += f"of the difference {low:+.2f} to {high:+.2f}{also}"
    verdict = "whether it helps, these films do not tell"
    if min(kept.sum(), n - kept.sum()) < FEW:  # a bootstrap of one or two knows no spread
        verdict = f"fewer than {FEW} on one side do not tell whether it helps"
    elif high < 0:
        verdict = "it helps"
    elif low > 0:
        verdict = "it keeps the worse ones"
    return f"The S_CLIP filter {facts}; {verdict}."


def worst(own, each=2):
    """Positions of the edits with the largest errors, `each` a kind; own: of `filtered`."""
    falling = own.dropna(subset="error").sort_values("error", ascending=False, kind="stable")
    return falling.groupby("edit", sort=False).head(each).sort_values("edit").index.to_list()


def check_goals(tidy, heads):
    """What was hoped for, fixed beforehand, against what came out: goal, found, met.

    tidy: of table2; heads: of score_heads. CPG and L1 are the paper's Table 2, accuracies its
    Table 3, of CheXpert; leakage and AUROC are our own. Where the perfect editor itself misses
    one, films and judge do not allow it.
    """
    part = tidy[tidy["edit"] == PAPER_EDIT]
    mine = {(row.metric, row.method): row for row in part.itertuples()}
    rows, rival = [], {key: row.mean for key, row in mine.items()}

    def goal(name, metric, met):
        if own := mine.get((metric, OWN)):
            known = [m for m in (GAN, PERFECT) if (metric, m) in mine]
            beside = ", ".join(f"{m} {rival[metric, m]:.3f}" for m in known)
            found = f"{_interval(own, 3)}, n = {own.n}; {beside}"
            rows.append((f"{PAPER_EDIT}: {name}", found, bool(met(own.mean))))

    goal("L1 at most .031", "l1", lambda x: x <= 0.031)
    goal("signed CPG at least .845", "cpg", lambda x: x >= 0.845)
    if ("l1", GAN) in rival:
        goal(f"L1 below {GAN}'s", "l1", lambda x: x < rival["l1", GAN])
        goal(f"signed CPG above {GAN}'s", "cpg", lambda x: x > rival["cpg", GAN])
    goal("leakage at most .05", "leakage", lambda x: x <= 0.05)
    for score, least in (("accuracy", PAPER_ACCURACY), ("auroc", 0.9)):
        found = heads.set_index("head")[score].reindex(list(PAPER_HEADS)).to_numpy()
        wanted = np.broadcast_to(least, len(found))
        said = ", ".join(f"{head} {x:.2f}" for head, x in zip(PAPER_HEADS, found, strict=True))
        name = f"judge's {score} at least {' '.join(f'{x:.2f}' for x in wanted)}"
        rows.append((name, said, bool((found >= wanted).all())))
    return pd.DataFrame(rows, columns=["goal", "found", "met"])
