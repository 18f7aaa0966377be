"""The method benchmark: every method on the same phantom films, measured against the truth.

`benchmark` runs the methods of methods.py and writes leaderboard.csv (a row a method, edit and
measure), leaderboard.md (to read), differences.csv (default - peer on the same films) and
contact.png. What is finished is kept, method by method and edit by edit, while model, films, dials
and code are the same. Films (R, H, W) uint8 of R edits. Used by `prism-nb benchmark`.
"""

import hashlib
import inspect
import json
from functools import partial
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from PIL import Image
from tqdm.auto import tqdm

from prism_nb import (
    attention,
    diffusion,
    editing,
    editors,
    inversion,
    masks,
    metrics,
    regeneration,
    scoring,
)
from prism_nb import methods as m
from prism_nb.evaluation import NOTHING, PERFECT
from prism_nb.figures import plot_grid
from prism_nb.files import atomic_path, plain, write_text
from prism_nb.findings import slug
from prism_nb.images import save_png, unit_to_uint8
from prism_nb.run import Run

OWN, RIVALRY = "default", {"error_inside": "error in mask", "over_edit": "over-edit"}
SHOWN = 2  # films of an edit on the contact sheet
MEASURES = {  # measure -> heading, digits, whether its interval is shown
    "error_ratio": ("error in mask / nothing's", 3, True),
    "tea_effectiveness": ("TEA effectiveness", 3, True),
    "over_edit": ("over-edit", 3, True),
    "error_inside": ("error in mask", 4, False),
    "error_outside": ("outside", 4, False),
    "tea_amplification": ("TEA amplification", 3, False),
    "iou_at_area": ("IoU", 3, False),
    "l1": ("L1", 4, False),
    "s_clip": ("S_CLIP", 3, False),
    "seconds_inversion": ("s, inversion", 2, False),
    "seconds_edit": ("s, edit", 2, False),
    "memory": ("GiB", 2, False),
}
ABOUT = """\
# The method benchmark

Model {base} with U-Net {unet}, {steps} steps, {dtype}, {device}. Phantom films of patients that
nothing was trained on, one a patient and edit, with and without devices, effusion and cardiomegaly
in equal shares; the truth changes that one finding. Brackets are 95 % by bootstrap over patients
(all are in leaderboard.csv); the error over that of doing nothing is a ratio of means. Films count
as written, in 8 bits. Seconds a film, warm, {batch} at a time, the VAE's encoding as part of the
inversion. GiB: the peak of the GPU's memory, or without a GPU of the whole process, model and
inverted films included. All this says how an editor behaves where the truth is known, and nothing
about patients.
"""


def benchmark(model, out, num_films=64, edits=m.EDITS, methods=(), num_steps=20, seed=0, words=()):
    """Run methods on edits and write the leaderboard into `out`; returns leaderboard.csv's table.

    methods: names in METHODS; none: the usual ones; "all": the grid. words: template and negatives
    of the model's captions. seed: of the methods' noise. A method that raises is set aside, its
    reason in leaderboard.md. Raises ValueError in one line on what it cannot do.
    """
    chosen = m.choose(methods)
    for name, value in (("num_steps", num_steps), ("seed", seed)):
        inversion.check_range(name, value)
    size = diffusion.film_side(model, model.unet.config.sample_size)
    every = m.draw_cases(edits or m.EDITS, num_films, size, *words)
    runner, results, failed = _Runner(model, Path(out), num_steps, seed), [], {}
    bar = tqdm([(name, cases) for name in chosen for cases in every])
    for name, cases in bar:
        bar.set_description(f"{name}, {cases.edit}")
        if name in failed:
            continue
        try:
            results.append(runner(name, chosen[name], cases))
        except Exception as error:  # noqa: BLE001 - a method may be anyone's
            failed[name] = f"{cases.edit}: {type(error).__name__}: {error}".splitlines()[0]
    if not results:
        raise ValueError(f"no method worked: {next(iter(failed.values()))}")
    return _write(Path(out), pd.concat(results, ignore_index=True), runner.about, failed)


class _Runner:
    """Runs a method on an edit, or reads what it gave before: a table with a row a film."""

    def __init__(self, model, out, num_steps, seed):
        self.model, self.out, self.warm = model, out, set()
        self.inverter, self.seed = m.Inverter(model, num_steps), seed
        parts = [diffusion.weights_hash(x) for x in (model.unet, model.vae, model.text_encoder)]
        self.about = {"base": model.base_model, "unet": parts[0][:8], "steps": num_steps}
        self.about |= {"dtype": str(model.dtype).split(".")[1], "device": model.device.type}
        self.key = [self.about, *parts, seed, _code()]
        try:
            scorer = scoring.load_clip("base", model.base_model, model.device)
            self.score = scorer.s_clip
            self.key.append(diffusion.weights_hash(scorer.clip))
        except diffusion.ModelError:  # a base without a CLIP
            self.score = lambda x, *_: np.full(len(x), np.nan)

    def __call__(self, name, function, cases):
        key = _digest([self.key, name, _recipe(function), *cases])
        path = self.out / "results" / f"{slug(name)}-{slug(cases.edit)}-{key[:12]}.parquet"
        if not path.exists():
            made, cost = self._make(name, function, cases)
            frame = m.measure(cases, made, self.score).assign(method=name, **cost)
            save_png(path.with_suffix(".png"), made[:SHOWN].reshape(-1, made.shape[-1]))
            with atomic_path(path) as temporary:
                frame.to_parquet(temporary, index=False)
        return pd.read_parquet(path).assign(sheet=str(path.with_suffix(".png")))

    def _make(self, name, function, cases):
        """The method's films, uint8, and what they cost."""
        model, inverter = self.model, self.inverter
        if name not in self.warm:  # one film, untimed: imports, caches
            one = m.Cases(cases.edit, *(part[:1] for part in cases[1:]))
            function(model, one, partial(m.Inverter(model, inverter.num_steps), one), self.seed)
            self.warm.add(name)
        m.reset_peak(model)
        inverter.cost, spent, start = 0.0, inverter.spent, m.now(model)
        made = np.asarray(function(model, cases, partial(inverter, cases), self.seed))
        took = m.now(model) - start - (inverter.spent - spent)
        if made.shape != cases.films.shape or not ((made >= 0) & (made <= 1)).all():
            need = f"{cases.films.shape} in [0, 1] are needed"
            raise ValueError(f"it made films {made.shape} that are not all fine: {need}")
        cost = {"seconds_inversion": inverter.cost, "seconds_edit": took / len(made)}
        return unit_to_uint8(made), cost | {"memory": Run.peak_memory()}


def _code():
    """The code that makes and measures films; a change of it makes results anew."""
    modules = (attention, diffusion, editing, editors, inversion, masks, metrics)
    modules += (regeneration, scoring)
    own = (m.in_grid, m.Inverter, m.measure, _Runner)
    return [inspect.getsource(part) for part in (*modules, *own)]


def _recipe(function):
    """A method's own code and dials."""
    dials = getattr(function, "keywords", {})
    return [inspect.getsource(getattr(function, "func", function)), plain(dials)]


def _digest(parts):
    parts = [hashlib.sha256(x).hexdigest() if isinstance(x, np.ndarray) else x for x in parts]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


# Tables


def tabulate(results):
    """Means with intervals by patient: one row an edit, method and measure."""
    by = ["edit", "method"]
    table = metrics.summarise(results, by, [name for name in MEASURES if name in results])
    rows = []
    for key, part in results.groupby(by, sort=False):
        size = len(part), part["patient_id"].nunique()
        rows.append((*key, "error_ratio", *size, *_ratio(part)))
    return pd.concat([table, pd.DataFrame(rows, columns=table.columns)], ignore_index=True)


def _ratio(part):
    """Error in the mask over that of doing nothing, a ratio of means: (ratio, low, high)."""
    codes = metrics.patient_codes(part["patient_id"])
    above, below = (np.bincount(codes, part[n]) for n in ("error_inside", "error_nothing"))
    draws = [(w @ above) / (w @ below) for w in metrics.resample_patients(len(above), 1000, 0)]
    return above.sum() / below.sum(), *metrics.percentile_bounds(draws)


def differences(results):
    """The default less each peer on the same films: one row an edit, peer and measure."""
    rows = []
    for (edit, peer), part in results.groupby(["edit", "method"], sort=False):
        own = results[(results["edit"] == edit) & (results["method"] == OWN)]
        if peer in (OWN, *m.FLOORS) or own.empty:
            continue
        both = own.merge(part, on="film_id", suffixes=("", "_peer"))
        for name in RIVALRY:
            change = both[name] - both[f"{name}_peer"]
            mean, low, high = metrics.bootstrap_interval(change, both["patient_id"])
            verdict = "the default beats it" if high < 0 else "it beats the default"
            verdict = verdict if high < 0 or low > 0 else "not told apart"
            rows.append((edit, peer, name, len(both), mean, low, high, verdict))
    columns = ("edit", "peer", "metric", "n", "mean", "low", "high", "verdict")
    return pd.DataFrame(rows, columns=columns)


def _write(out, results, about, failed):
    """Write the tables, the text and the contact sheet; returns the table."""
    table, compared = tabulate(results), differences(results)
    for name, frame in (("leaderboard", table), ("differences", compared)):
        with atomic_path(out / f"{name}.csv") as temporary:
            frame.to_csv(temporary, index=False)
    text = [ABOUT.format(**about, batch=m.BATCH)]
    for edit, part in table.groupby("edit", sort=False):
        text += [f"## {edit}, n = {part['n'].max()}\n", _markdown(part), ""]
    if len(compared):
        text += ["## Does the default beat its peers?\n", *_sentences(compared), ""]
    if failed:
        text += ["## Set aside\n", *(f"- {name}: {why}" for name, why in failed.items()), ""]
    write_text(out / "leaderboard.md", "\n".join(text))
    _contact(results, out / "contact.png")
    return table


def _sentences(compared):
    """Of each edit and peer, whether the default beats it."""
    for (edit, peer), part in compared.groupby(["edit", "peer"], sort=False):
        said = [f"{RIVALRY[x.metric]} {_cell(x, 4, True)}, {x.verdict}" for x in part.itertuples()]
        yield f"- {edit}, default less {peer}, n = {part['n'].max()}: {'; '.join(said)}."


def _markdown(part):
    """One edit's methods as a table, the least error in the mask first."""
    cells = {(row.method, row.metric): row for row in part.itertuples()}
    ranks = part[part["metric"] == "error_ratio"].sort_values("mean", kind="stable")
    lines = [["method", *(heading for heading, *_ in MEASURES.values())]]
    for method in ranks["method"]:
        each = [_cell(cells[method, name], *how[1:]) for name, how in MEASURES.items()]
        lines.append([method, *each])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * width for width in widths])
    rows = [[cell.ljust(width) for cell, width in zip(x, widths, strict=True)] for x in lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _cell(row, digits, wide):
    if np.isnan(row.mean):
        return "-"
    shown = wide and not np.isnan(row.low)
    between = f" [{row.low:.{digits}f}, {row.high:.{digits}f}]" if shown else ""
    return f"{row.mean:.{digits}f}{between}"


def _contact(results, path):
    """A few films, their truth, and what each method made of them: a row a method."""
    edits, methods = (list(results[name].unique()) for name in ("edit", "method"))
    sheets = results.drop_duplicates(["edit", "method"]).set_index(["edit", "method"])["sheet"]
    films = {key: np.array(Image.open(sheet)) for key, sheet in sheets.items()}
    films = {key: strip.reshape(-1, *[strip.shape[1]] * 2) for key, strip in films.items()}
    blank = np.zeros_like(next(iter(films.values())))
    rows = [np.concatenate([films.get((edit, x), blank) for edit in edits]) for x in methods]
    names = [{NOTHING: "film", PERFECT: "truth"}.get(method, method) for method in methods]
    titles = [edit for edit in edits for _ in blank]
    axes = plot_grid(rows, names, [titles] + [[""] * len(titles)] * (len(rows) - 1))
    with atomic_path(path) as temporary:
        note = {"Description": "SYNTHETIC counterfactuals, made by prism_nb", "Software": None}
        axes[0, 0].figure.savefig(temporary, dpi=100, bbox_inches="tight", metadata=note)
    plt.close(axes[0, 0].figure)
