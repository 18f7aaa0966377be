"""The report of a run: one page, whole in itself, that holds every notebook and all they found.

It opens without a network and may be sent as one file: images are embedded, formulas are drawn as
SVG, and no script or style comes from elsewhere. It begins with the state and time of each
notebook, the results, every figure and table, the metrics, parameters and versions; links lead to
the notebooks, one shown at a time on screen, all of them in print.
Used by `prism-nb run` and `prism-nb report`.
"""

import base64
import hashlib
import io
import json
import re
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from prism_nb.execute import states
from prism_nb.files import read_json, write_text
from prism_nb.manifest import read_manifest
from prism_nb.params import describe, known_keys
from prism_nb.run import APPENDICES, STEPS, record_path, without_tables

if TYPE_CHECKING:
    import pandas

WIDGET = "application/vnd.jupyter.widget-view+json"
LONG = 24  # rows; a longer table is folded up
WIDE = 12  # columns; a wider table of few rows is laid on its side
WORDS = 36  # letters; a longer cell is broken into lines
LARGE = 1e6  # pixels; a figure of more is a grid, which needs the page's whole width
NAMED = ["method", "arm", "baseline", "version"]  # columns of names, shown as figures write them
SHOWN = ["text/html", "text/markdown", "image/svg+xml", "image/png", "image/jpeg", "text/plain"]
RESULTS = {  # metrics of Table 2 that are shown first, by the names that a reader gives them
    "tea_effectiveness": "effectiveness",
    "error_inside": "error inside",
    "error_outside": "error outside",
    "true_error": "whole film, of nothing's",
    "cpg": "gain (signed CPG)",
}
CAPTIONS = {  # what to see; the figures say of how many films
    "01_phantom": "One phantom patient: more and more fluid, a wider and wider heart, one device "
    "after the other. The maps are what each truly changed, exact to the pixel.",
    "01_prevalence": "The bars of one finding should be about as long, but for chance in few "
    "films: the split by patient does not sort them.",
    "01_cooccurrence": "Dark cells off the diagonal are findings that go together. A model may "
    "take them for causes: devices go with effusions.",
    "01_films": "Twelve films of the cohort; the caption above each should describe it.",
    "02_losses": "The loss of each step is noisy, as timesteps differ in difficulty; the "
    "validation films (diamonds) decide.",
    "02_levels": "Validation loss by timestep, and how fine-tuning changed it film by film: below "
    "the dashed line is better.",
    "02_samples": "Films generated from the same noise, before fine-tuning (above) and after "
    "(below). Neighbours differ in one finding of the caption.",
    "03_reconstruction": "A film, the VAE alone, and inverted and back with T' = T. The last two "
    "should look alike: what is lost, burnt-in letters first, the VAE loses.",
    "04_scores": "S_CLIP of every edit: the filter drops what lies left of the dashed line.",
    "04_edits": "Test films and their counterfactuals. The difference (blue: density lost) should "
    "look like the true one at the right, and lie inside the mask.",
    "04_doses": "One film under rising guidance, the preset's in the middle. Where the curve "
    "crosses the dashed line, the change is as large as the true one; beyond, the edit overshoots.",
    "04_gallery": "Counterfactuals that pass the filter, with their score.",
    "05_gain": "How far each method moves the judge towards the wanted class. Doing nothing gains "
    "0; the perfect editor says how much there is to gain.",
    "05_effectiveness": "How much of the true change each method made. What the VAE alone removes "
    "(thin wires) is no edit.",
    "05_methods": "The same films by each method; the last column is the truth, where it is known.",
    "05_heads": "The judge before and after. Only the edited head should cross the dashed line; "
    "diamonds are the labels.",
    "05_leakage": "What else moved: the cells beside the edited finding should be as near to 0 as "
    "those of the true counterfactuals.",
    "05_filter": "A filter helps where better scores (right) mean smaller errors (low). Below the "
    "dotted line an edit is nearer to the truth than the film was.",
    "05_worst": "The edits with the largest error, two of a kind: what fails, and how.",
    "06_heads": "Accuracy of each arm's classifiers on the test split, by head; all arms take as "
    "many steps.",
    "06_groups": "Accuracy for effusion where the device tells nothing. The two groups in the "
    "middle are those that mislead who leans on the device.",
    "06_gains": "Difference to training on real films alone. Where an interval holds 0, neither "
    "gain nor loss is shown.",
    "06_sweep": "The worst group at several strengths of the link between device and effusion, of "
    "as many runs as there are.",
    "06_robust": "Films without and with their device, asked of both classifiers: Support Devices "
    "should fall, Pleural Effusion should stay.",
    "A1_accuracy": "How often the model that sees is right. Blind, without films, it should guess: "
    "the dashed line.",
    "A1_pairs": "The film and its counterfactual, as the model that sees was shown them.",
    "A2_matrix": "What goes together in the training films (left), and what went along with an "
    "edit (right), where 0 is right beside the edited one.",
    "A2_held": "Films with cardiomegaly and a device: the edit alone, and with the other findings "
    "held.",
    "A3_places": "How much of a device goes, by where it lies: over bone or clear of it, near the "
    "border or inside.",
    "A3_text": "Letters without a mask, under the automatic mask, and kept.",
    "A3_distorted": "The same film, spoilt in six ways, and its counterfactual.",
    "table1": "Films of each split that show a finding.",
    "agreement": "Generated films that are nearer to their own caption than to the other of their "
    "pair.",
    "losses": "Training loss by step.",
    "reconstruction": "What the VAE and inversion lose.",
    "inversions": "Every inversion on the same films, there and back.",
    "heads": "How good the judge is, on the test split.",
    "table2": "Every metric of every edit and method.",
    "measured": "Every edit by every method: the numbers behind Table 2.",
    "leakage": "Mean change of each head's probability, made and true.",
    "logits": "How far the VAE, the sham edit and each inversion move the judge's logits.",
    "cycles": "L1 to the film after null edits (ours without a mask) and edits taken back.",
    "realism": "Distance of the films to others of the cohort (KID, lower is closer).",
    "table3": "Accuracy on the test split by arm, training and head.",
    "groups": "Accuracy for effusion in the four groups of the balanced test.",
    "arms": "Everything about the effusion head, by arm.",
    "differences": "Every arm against another over the same films.",
    "goals_evidence": "The paper's numbers as goals, fixed beforehand, and what was found.",
    "goals": "Goals fixed before anything ran, and what was found.",
    "vqa": "How often the model that sees is right.",
    "answers": "What the model that sees said of every pair.",
    "along": "Share of each attribute that went along with an edit: 1 beside the edited one, else "
    "0, is right.",
    "confounders": "What went, with and without the other findings held.",
    "places": "How much of a device went, by where it lies.",
    "text": "Mean change of burnt-in letters.",
    "limits": "Edits of spoilt films.",
    "sex": "Change of the recorded sex's probability, and films that crossed a half.",
}
RENAMED = {  # columns of a table, said at more length than in its file
    "differences": {
        "mean": "difference",
        "seed_low": "least by training",
        "seed_high": "most by training",
        "only_a": "arm alone right",
        "only_b": "baseline alone right",
    },
    "agreement": {"change": "change towards own caption"},
}
NOTES = {  # below a table: what its columns are
    "agreement": "agree: share of films nearer to their own caption, before and after fine-tuning; "
    "the change is that of the distance, with its 95 % interval by pair.",
    "heads": "majority: accuracy of always giving the commoner answer; balanced accuracy: mean of "
    "those with and without the finding; ece: calibration error, 0 is best.",
    "arms": "Mean over the trainings and, where they differ, their range. conflict: the balanced "
    "films on which the device misleads; ece: calibration error, 0 is best; flip device: share of "
    "pairs of films in which the device alone turns the answer, reliance: by how much it moves the "
    "probability, both 0 at best; follow effusion: share of pairs in which the answer follows the "
    "effusion, 1 at best.",
    "differences": "difference: accuracy of the arm less that of the baseline, with its 95 % "
    "interval by patient, and its least and most over trainings; alone right: films that one of "
    "the two gets right and the other wrong, from which p comes (McNemar's test); level: "
    "P(device | effusion) in training.",
}


def report_path(folder: Path) -> Path:
    """Where a run's report stands."""
    return folder / "report" / "index.html"


def write_report(folder: Path, notebooks: Path | None = None) -> Path:
    """Write report/index.html, the whole report, and return its path.

    notebooks: their folder, by which results are called stale; else the project's.
    """
    stale = _stale(folder, notebooks)
    manifest = {"profile": "", "parameters": {}} | read_manifest(folder) | {"stale": stale}
    pages = {path.stem: path for path in sorted((folder / "notebooks").glob("[!.]*.ipynb"))}
    parts = {part.__name__[1:].capitalize(): part(folder, manifest) for part in PARTS}
    parts = {name: html for name, html in parts.items() if html}
    old = f"Stale, not made from what the run is given now: {', '.join(stale)}."
    for name in ("Results", "Figures", "Tables", "Metrics") if stale else ():
        if name in parts:
            parts[name] = f"<p><span class='state failed'>{old}</span></p>{parts[name]}"
    contents = "".join(f"<a href='#{name}'>{name}</a>" for name in parts)
    body = "".join(f"<h2 id='{name}'>{name}</h2>{html}" for name, html in parts.items())
    top = f"{_heading(folder, manifest)}<p class='contents'>{contents}</p>"
    sections = [f"<section id='report'>{top}{body}</section>"]
    for name, path in pages.items():
        section = f"<section class='page' id='{name}'>"
        shown = _shown(path, _notebook_section, folder, list(pages))
        sections.append(f"{section}{shown}</section>")
    page = _page(f"Run {folder.name}", "".join(sections), list(pages))
    return write_text(report_path(folder), page)


def _stale(folder: Path, notebooks: Path | None) -> dict[str, str]:
    """Notebooks whose results are of other parameters, code or inputs than the run's, and why."""
    try:
        rows = states(folder, notebooks)
    except (ValueError, LookupError, OSError):  # of a version with other parameters: who knows
        return {}
    return {row["notebook"]: row["detail"] for row in rows if row["state"] == "again"}


def _shown(path: Path, show: Callable[..., str], *given: object) -> str:
    """What `show` makes of a file, or a line that names it where it cannot be read."""
    try:
        return show(path, *given)
    except Exception as error:  # noqa: BLE001 - a file may be anyone's; the rest is worth a page
        name = f"{path.parent.name}/{path.name}" if path.suffix != ".json" else path.name
        why = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        return f"<p class='caption'>{escape(f'{name} cannot be shown ({why}).')}</p>"


def _heading(folder: Path, manifest: dict) -> str:
    entries = [entry for entry in manifest["steps"].values() if "outputs" in entry]
    seconds, noun = (
        sum(e["seconds"] for e in entries),
        "notebook" if len(entries) == 1 else "notebooks",
    )
    made = [f"{len(entries)} {noun} in {_duration(seconds)}"]
    made += [f"on {device}" for device in sorted({e["provenance"]["device"] for e in entries})]
    made += [f"finished {max(_when(entry['finished']) for entry in entries)}"] if entries else []
    profile = f"Profile {escape(manifest['profile'])}: {', '.join(made)}."
    whole = "This file is whole in itself: it holds every notebook, figure and table of the run."
    return f"<h1>Run {escape(folder.name)}</h1><p class='sub'>{profile} {whole}</p>"


def _notebooks(folder: Path, manifest: dict) -> str:
    rows = []
    for notebook in STEPS:
        entry = manifest["steps"].get(notebook, {})
        if notebook in APPENDICES and not entry:
            continue
        done = "outputs" in entry and record_path(folder, notebook).exists()
        there = (folder / "notebooks" / f"{notebook}.ipynb").exists()
        stale = manifest["stale"].get(notebook, "") if done else ""
        state = "done" if done else "failed or cut short" if entry else "not run"
        state = escape(f"stale: {stale}") if stale else state
        seconds = _duration(entry["seconds"]) if done else ""
        link = f"<a href='#{notebook}'>{notebook}</a>" if there else notebook
        mark = "state" if done and not stale else "state failed" if entry else "note"
        when = _when(entry["finished"]) if "finished" in entry else ""
        rows.append([link, f"<span class='{mark}'>{state}</span>", seconds, when])
    return _table(["notebook", "state", "time", "finished"], rows, raw=True)


def _results(folder: Path, manifest: dict) -> str:
    path = folder / "tables" / "table2.csv"
    return _shown(path, _best) if path.exists() else ""


def _best(path: Path) -> str:
    import pandas

    tidy = pandas.read_csv(path)
    again = tidy["method"].isin(("inversion", "ours, S_CLIP filter"))  # table2 has them
    tidy = tidy[tidy["metric"].isin(RESULTS) & tidy["n"].notna() & ~again]
    last = (tidy["method"] == "perfect editor").argsort(kind="stable")
    wide = _wide(_readable(tidy.iloc[last]))
    wide = pandas.concat(part for _, part in wide.groupby("edit", sort=False))
    wide = wide[[name for name in ("edit", "method", "n", *RESULTS) if name in wide]]
    head, rows = _cells(wide.rename(columns=RESULTS))
    for row, above in reversed([*zip(rows[1:], rows[:-1], strict=True)]):
        row[0] = "" if row[0] == above[0] else row[0]
    note = (
        "<p>What <a href='#05_evaluate'>05_evaluate</a> measured: mean and 95 % interval by "
        "patient. <i>Effectiveness</i> is the change that was made, projected on the true one, 0 "
        "for doing nothing and 1 for the perfect editor; <i>error</i> the mean absolute one, "
        "inside and outside what truly changes, and over the whole film as a multiple of what "
        "doing nothing leaves; <i>gain</i> how far the judge moved towards the wanted class.</p>"
    )
    return note + _table(head, rows)


def _figures(folder: Path, manifest: dict) -> str:
    parts, shown = [], {}
    for path in _in_order((folder / "figures").glob("[!.]*.png")):
        shown.setdefault(path.stem[:2], []).append(path)
    for number, paths in shown.items():
        notebook = next((name for name in STEPS if name.startswith(number)), number)
        figures = "".join(_shown(path, _figure) for path in paths)
        parts.append(f"<h3><a href='#{notebook}'>{notebook}</a></h3>")
        parts.append(f"<div class='gallery'>{figures}</div>")
    note = "<p class='note'>Click a figure to enlarge it.</p>"
    return note + "".join(parts) if parts else ""


def _in_order(paths: Iterable[Path]) -> list[Path]:
    """Files as the notebooks write them, then those of one's own."""
    places = {name: number for number, name in enumerate(CAPTIONS)}
    return sorted(paths, key=lambda path: (places.get(path.stem, len(places)), path.stem))


def _figure(path: Path) -> str:
    from PIL import Image

    name = escape(path.stem)
    caption = CAPTIONS.get(path.stem, "")
    width, height = Image.open(path).size
    large = " class='large'" if width * height > LARGE else ""
    image = f"<img src='{_data_uri(path)}' alt='{escape(caption or name, quote=True)}'>"
    text = f"<figcaption><b>{name}</b> {escape(caption)}</figcaption>"
    return f"<figure id='figure-{name}'{large}><a href='#figure-{name}'>{image}</a>{text}</figure>"


def _tables(folder: Path, manifest: dict) -> str:
    paths = _in_order((folder / "tables").glob("[!.]*.csv"))
    return "".join(_shown(path, _table_file) for path in paths)


def _table_file(path: Path) -> str:
    import pandas

    frame = _readable(pandas.read_csv(path))
    if path.stem == "arms" and "seed" in frame:
        frame = _by_arm(frame)
    frame = _wide(frame).rename(columns=RENAMED.get(path.stem, {}))
    cut = f" (the first 200 of {len(frame)} rows)" if len(frame) > 200 else ""
    table, name = _table(*_cells(frame[:200])), f"<b>{escape(path.stem)}</b>"
    table += f"<p class='columns'>{NOTES[path.stem]}</p>" if path.stem in NOTES else ""
    about = f"{name} {escape(CAPTIONS.get(path.stem, ''))}{cut}"
    if len(frame) > LONG:
        return f"<details><summary>{about}</summary>{table}</details>"
    return f"<p class='caption'>{about}</p>{table}"


def _readable(frame: "pandas.DataFrame") -> "pandas.DataFrame":
    """Methods and arms by the names that the figures give them."""
    from prism_nb.figures import readable

    named = [name for name in NAMED if name in frame and frame[name].dtype.kind not in "ifb"]
    shown = {name: frame[name].map(readable, na_action="ignore") for name in named}
    return frame.assign(**shown)


def _by_arm(frame: "pandas.DataFrame") -> "pandas.DataFrame":
    """A row a measure and a column an arm: the mean over trainings, and their range beside it."""
    import pandas

    arms = frame.drop(columns="seed").groupby("arm", sort=False)
    columns = {}
    for suffix, statistic in (("", arms.mean()), ("_low", arms.min()), ("_high", arms.max())):
        columns |= {f"{arm}{suffix}": scores for arm, scores in statistic.T.items()}
    table = pandas.DataFrame(columns).rename_axis("measure").reset_index()
    return table.assign(measure=table["measure"].str.replace("_", " "))


def _wide(frame: "pandas.DataFrame") -> "pandas.DataFrame":
    """A table with each interval as text beside its number, and with a column a metric."""
    frame = _with_intervals(frame)
    if not {"metric", "mean", "n"} <= set(frame):
        return frame
    keys = [name for name in frame if name not in ("metric", "n", "patients", "mean")]
    wide = frame.groupby(keys, sort=False)[["n"]].max()
    for metric in frame["metric"].unique():
        wide[metric] = frame[frame["metric"] == metric].set_index(keys)["mean"]
    return wide.reset_index()


def _with_intervals(frame: "pandas.DataFrame") -> "pandas.DataFrame":
    """Columns `x_low` and `x_high`, or `low` and `high` after x, put into x as text."""
    names = list(frame)
    for low in [str(name) for name in names if re.fullmatch(r"(.+_)?low", str(name))]:
        high, middle = f"{low[:-3]}high", low[:-4] or names[names.index(low) - 1]
        if high not in names or middle not in names:
            continue
        kind = frame["metric"] if "metric" in frame else [0] * len(frame)
        digits = frame[middle].abs().groupby(kind).transform("max").map(_digits)
        rows = zip(frame[middle], frame[low], frame[high], digits, strict=True)
        frame = frame.assign(**{middle: [_interval(*row) for row in rows]})
        frame = frame.drop(columns=[low, high])
    return frame


def _interval(mean: float, low: float, high: float, digits: int) -> str:
    text = _number(mean, digits)
    known = low == low and low != high
    return f"{text} ({_number(low, digits)} to {_number(high, digits)})" if known else text


def _digits(largest: float) -> int:
    """Decimals that show three figures of the largest number of a column."""
    return next((n for n, size in enumerate((1000, 100, 10)) if largest >= size), 3)


def _cells(frame: "pandas.DataFrame") -> tuple[list, list]:
    """Head and rows of a table as text; the numbers of a column have the same decimals."""
    head = ["" if str(name).startswith("Unnamed") else str(name) for name in frame]
    columns = []
    for column in (frame[name] for name in frame):
        digits = None
        if column.dtype.kind == "f" and (largest := column.abs().max()) >= 0.01:
            enough = (n for n in range(3) if column.dropna().round(n).equals(column.dropna()))
            digits = next(enough, _digits(largest))
        columns.append([_number(value, digits) for value in column])
    rows = [list(row) for row in zip(*columns, strict=True)]
    if len(head) > WIDE > len(rows) > 0:  # on its side it can be read without scrolling
        head, *rows = (list(row) for row in zip(head, *rows, strict=True))
    return [name.replace("_", " ") for name in head], rows


def _metrics(folder: Path, manifest: dict) -> str:
    path = folder / "metrics.json"
    return _shown(path, _numbers) if path.exists() else ""


def _numbers(path: Path) -> str:
    parts = []
    for notebook, values in read_json(path).items():
        numbers = _flat(without_tables(values))
        rows = [[name.replace("_", " "), _number(value)] for name, value in numbers]
        table = _table(["metric", "value"], rows)
        parts.append(f"<details><summary><b>{notebook}</b></summary>{table}</details>")
    note = "<p class='note'>metrics.json, by notebook: mostly means of the tables above.</p>"
    return note + "".join(parts) if parts else ""


def _flat(value: object, name: str = "") -> Iterator[tuple[str, object]]:
    """Numbers inside dicts and lists with the way to them as their name: auroc, Cardiomegaly."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _flat(inner, f"{name}, {key}" if name else key)
    elif isinstance(value, list):
        yield name, ", ".join(_number(inner) for inner in value)
    else:
        yield name, value


def _parameters(folder: Path, manifest: dict) -> str:
    rows = [row for notebook in STEPS for row in describe(notebook)]
    known = {row["name"]: row for row in reversed(rows)}
    given = manifest["parameters"]
    names = [name for name in known_keys() if name in given] + [n for n in given if n not in known]

    def table(names: list, values: dict) -> str:
        shown = [[n, _text(values[n]), known[n]["help"] if n in known else ""] for n in names]
        return _table(["name", "value", "meaning"], shown)

    rest = {name: row["default"] for name, row in known.items() if name not in given}
    ours = "<p class='caption'>What the profile gives:</p>" + table(names, given)
    others = table([name for name in known_keys() if name in rest], rest)
    about = f"All else, {len(rest)} parameters, at the notebooks' defaults"
    return f"{ours}<details><summary>{about}</summary>{others}</details>"


def _provenance(folder: Path, manifest: dict) -> str:
    rows = {"profile": [manifest["profile"]]}
    for notebook in STEPS:
        entry = manifest["steps"].get(notebook, {})
        made = entry.get("provenance", {})
        found = {name: made[name] for name in ("seed", "device") if name in made}
        for name, value in (found | made.get("versions", {})).items():
            rows.setdefault(name, []).append(str(value))
        if "fingerprint" in entry:
            text = json.dumps(entry["fingerprint"], sort_keys=True)
            digest = hashlib.sha256(text.encode()).hexdigest()[:12]
            rows[f"{notebook}: code, parameters and inputs"] = [digest]
    note = (
        "<p class='note'>Steps with the same digest were made from the same code, parameters and "
        "inputs; manifest.json holds them file by file.</p>"
    )
    shown = [[name, ", ".join(dict.fromkeys(values))] for name, values in rows.items()]
    return note + _table(["what", "value"], shown)


PARTS: tuple[Callable[[Path, dict], str], ...] = (
    _notebooks,
    _results,
    _figures,
    _tables,
    _metrics,
    _parameters,
    _provenance,
)


def _notebook_section(path: Path, folder: Path, names: list[str]) -> str:
    import nbformat
    from nbformat.v4 import new_markdown_cell

    notebook = nbformat.read(path, as_version=4)
    _without_widgets(notebook)
    for n, cell in reversed(list(enumerate(notebook.cells))):
        if "injected-parameters" in cell.metadata.get("tags", []):
            notebook.cells.insert(n, new_markdown_cell("*What the profile sets:*"))
    html, _ = _exporter().from_notebook_node(notebook)
    return _offline(html, path, folder, names)


def _exporter() -> object:
    from nbconvert import HTMLExporter
    from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath
    from traitlets.config import Config

    class Renderer(IPythonRenderer):
        def inline_math(self, body):
            return _math(body)

        def block_math(self, body):
            return _math(body, block=True)

        def latex_environment(self, name, body):
            return _math(body, block=True)

    def markdown(source):
        return MarkdownWithMath(renderer=Renderer(escape=False)).render(source)

    config = Config({"NbConvertBase": {"display_data_priority": SHOWN}})
    exporter = HTMLExporter(template_name="basic", config=config)
    exporter.register_filter("markdown2html", markdown)
    return exporter


def _math(source: str, block: bool = False) -> str:
    """Draw a formula as an embedded SVG; what matplotlib cannot set stays as its source."""
    from matplotlib.mathtext import math_to_image

    image = io.BytesIO()
    shown = escape(source.strip())
    try:
        math_to_image(f"${' '.join(source.split())}$", image, format="svg", dpi=72)
    except ValueError:
        return f"<code>{shown}</code>"
    data = base64.b64encode(image.getvalue()).decode()
    kind = "math block" if block else "math"
    return f"<img class='{kind}' alt='{shown}' src='data:image/svg+xml;base64,{data}'>"


def _without_widgets(notebook: object) -> None:
    # A widget is dead outside JupyterLab. A progress bar goes; of others a note remains.
    for cell in notebook.cells:
        kept = []
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            if WIDGET in data and not any(kind.startswith("image/") for kind in data):
                text = "".join(data.get("text/plain", ""))
                if "%|" in text or "/s]" in text or "Progress" in text:
                    continue
                note = "<p class='note'>Interactive: open the notebook in JupyterLab.</p>"
                output["data"] = {"text/html": note}
            kept.append(output)
        if "outputs" in cell:
            cell["outputs"] = kept
    notebook.metadata.pop("widgets", None)


def _offline(html: str, path: Path, folder: Path, names: list[str]) -> str:
    """Embed images of the run, keep links inside the page, drop what would need a network."""
    from bs4 import BeautifulSoup

    soup = BeautifulSoup(html, "html.parser")
    for tag in [*soup(["script", "link", "iframe"]), *soup("a", class_="anchor-link")]:
        tag.decompose()
    for tag in soup(id=True):  # of one page, so that notebooks share no name
        tag["id"] = f"{path.stem}-{tag['id']}"
    for image in soup("img"):
        source = image.get("src", "")
        file = (path.parent / source).resolve() if not source.startswith("data:") else None
        if file and file.is_file() and file.is_relative_to(folder.resolve()):
            image["src"] = _data_uri(file)
        elif file:
            image.replace_with(image.get("alt", source))
    for cell in soup("div", class_="code_cell"):
        saved = re.search(r'save_figure\(.*?"(\w+)"', cell.get_text())
        for image in cell("img") if saved else ():
            image["alt"] = CAPTIONS.get(saved[1], saved[1])
    for link in soup("a", href=re.compile(r"^(?!https?:)")):
        target, _, place = link["href"].partition("#")
        name = Path(target).stem if target else path.stem
        if name in names:
            link["href"] = f"#{name}-{place}" if place else f"#{name}"
        elif target == "README.md":
            link["href"] = "#report"
        else:
            link.unwrap()
    for table in soup("table"):
        table.wrap(soup.new_tag("div", attrs={"class": "scroll"}))
        _align(table)
    return str(soup)


def _align(table: object) -> None:
    """Text to the left, with the head of its column; counted from the right, past merged cells."""
    head = [row for row in table("tr") if not row("td")][-1:]
    for row in table("tr"):
        for place, cell in enumerate(reversed(row(["th", "td"])), 1):
            if cell.name == "td" and not _numeric(text := cell.get_text()):
                cell["class"] = ["text"] + ["long"] * (len(text) > WORDS)
                for names in (above(["th"]) for above in head):
                    if place <= len(names):
                        names[-place]["class"] = "text"


def _page(title: str, body: str, names: list[str]) -> str:
    from pygments.formatters import HtmlFormatter

    style = Path(__file__).with_name("report.css").read_text(encoding="utf-8")
    code = HtmlFormatter(style="default").get_style_defs(".highlight")
    links = "".join(
        f"<a href='#{name}'>{shown}</a>"
        for name, shown in [("report", "Report"), *((name, name) for name in names)]
    )
    return (
        f"<!DOCTYPE html>\n<html lang='en'><head><meta charset='utf-8'><title>{escape(title)}"
        "</title><meta name='viewport' content='width=device-width, initial-scale=1'>"
        f"<style>{code}\n.highlight {{ background: none; }}\n{style}</style></head><body>"
        f"<nav><div>{links}</div></nav><main>{body}</main></body></html>\n"
    )


def _table(head: list, rows: list, raw: bool = False) -> str:
    """A column stands at the right where all of it is numbers, else at the left."""
    numeric = [all(_numeric(cells[i]) for cells in rows) for i in range(len(head))]

    def row(cells: list, tag: str) -> str:
        shown = [str(cell) if raw else escape(str(cell)) for cell in cells]
        kinds = ["" if number else _kind(cell) for cell, number in zip(shown, numeric, strict=True)]
        if tag == "td":  # where a line has no room, an interval stands below its number
            shown = [
                re.sub(r"\(.*\)$", r"<span>\g<0></span>", cell) if number else cell
                for cell, number in zip(shown, numeric, strict=True)
            ]
        return "".join(f"<{tag}{k}>{cell}</{tag}>" for cell, k in zip(shown, kinds, strict=True))

    body = "".join(f"<tr>{row(cells, 'td')}</tr>" for cells in rows)
    table = f"<table><thead><tr>{row(head, 'th')}</tr></thead><tbody>{body}</tbody></table>"
    return f"<div class='scroll'>{table}</div>"


def _kind(cell: str) -> str:
    return " class='text long'" if len(re.sub("<.*?>", "", cell)) > WORDS else " class=text"


def _numeric(cell: object) -> bool:
    number = r"[-+]?[\d,.]+(e[-+]?\d+)?"
    text = str(cell).strip()
    return bool(re.fullmatch(rf"{number}( \({number} to {number}\))?( s| %)?|–|", text))


def _number(value: object, digits: int | None = None) -> str:
    """A number as text: with so many decimals, else whole with commas or with three figures."""
    if value is None or value != value:  # NaN is the one value that differs from itself
        return "–"
    if isinstance(value, bool) or not isinstance(value, float | int):
        return _text(value)
    if digits is not None:
        return f"{round(value, digits) + 0.0:,.{digits}f}"  # no -0.000
    return f"{int(value):,}" if value == int(value) else f"{value:.3g}"


def _text(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    parts = [f"{hours} h" if hours else "", f"{minutes} min" if minutes else "", f"{rest} s"]
    return " ".join(part for part in parts[: 2 if hours else 3] if part)


def _when(text: str) -> str:
    return datetime.fromisoformat(text).strftime("%Y-%m-%d %H:%M %Z").strip()


def _data_uri(path: Path) -> str:
    """A file of an image inside the page; PNG as WebP, of half the size, without loss."""
    from PIL import Image

    kind = "svg+xml" if path.suffix == ".svg" else path.suffix.lstrip(".").replace("jpg", "jpeg")
    data = path.read_bytes()
    if kind == "png":
        kind, packed = "webp", io.BytesIO()
        Image.open(io.BytesIO(data)).save(packed, "WEBP", lossless=True, method=1, quality=0)
        data = packed.getvalue()
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
