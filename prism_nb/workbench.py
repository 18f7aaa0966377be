"""Editing one film by hand, as functions: what the studio's buttons call (paper 2.3).

    bench = prepare("runs/phantom")           # the run's model, films, inversions, edits, judge
    result = make_edit(bench, film, T, T')    # a counterfactual, and all that is known of it
    save_pair(bench, result)                  # PNGs, and the JSON that makes it again

Films (H, W) in [0, 1]; a box is (left, top, right, bottom) in pixels. Used by studio.py, and by the
cells that it writes.
"""

import hashlib
import io
import re
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from html import escape
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pandas as pd
from matplotlib import colormaps
from PIL import Image, ImageDraw

from prism_nb import metrics, phantom
from prism_nb.captions import PromptError, prompt_pair
from prism_nb.classifiers import load_classifier, predict
from prism_nb.cohort import read_cohort
from prism_nb.diffusion import ModelError, encode_films, load_model
from prism_nb.editing import PRESETS, choose, edit
from prism_nb.edits import OWN, PAPER_EDITS, Edit, load_edit_films, recipe, save_edit, save_mask
from prism_nb.figures import DIFFERENCE
from prism_nb.files import plain, write_json
from prism_nb.findings import FINDINGS, PRESENT, slug
from prism_nb.images import (
    ImageError,
    load_film,
    load_image,
    save_png,
    uint8_to_unit,
    unit_to_uint8,
)
from prism_nb.inversion import invert, load_inversion
from prism_nb.run import project_root, resolve_path, versions
from prism_nb.scoring import load_clip

CALLS = {"fixed_point": 5, "null_text": 12}  # of the U-Net a step, about; other inversions: 1
AREAS = ("mask", "keep")
STORED = ("guidance_scale", "strength", "mask", "threshold", "detail", "seed")
MOST = 8  # inversions kept
COLOURS = {"mask": (230, 159, 0), "keep": (86, 180, 233)}
FACTS = {"s_clip": "S_CLIP", "mask_area": "mask, share of the film"}
FACTS |= {"effectiveness": "change made, projected on the true one"}
FACTS |= {"error_inside": "error in the true change", "error_outside": "error outside of it"}


@dataclass
class Bench:
    """What a run folder holds for editing by hand."""

    folder: Path
    model: object
    cohort: object
    inverted: object  # Inversion
    trained: list  # captions, each once
    scorer: object = None  # ClipScorer
    judge: tuple = ()  # classifier and its heads
    edits: pd.DataFrame | None = None  # the run's own, where 04_edit has written some
    recent: dict = field(default_factory=dict)  # inversions made here

    @property
    def side(self):
        """The side of a film in pixels."""
        return self.cohort.settings["image_size"]


@dataclass
class Result:
    """One edit: the films, and what is known of them."""

    call: dict  # what make_edit was given: it makes the edit again
    factual: np.ndarray  # (H, W) float32
    counterfactual: np.ndarray
    mask: np.ndarray  # (H, W) bool
    recipe: dict
    measures: dict  # name -> number
    heads: dict  # finding -> the judge's probability before and after
    truth: np.ndarray | None  # the true counterfactual, where the phantom knows it


def prepare(run, model=None, scorer=None, precision="auto"):
    """Read what the studio needs from a run: its folder or its Run, after 03_invert: a Bench.

    model, scorer: where they are loaded already. ValueError says which notebook is still to run.
    """
    path = getattr(run, "folder", None) or resolve_path("run_dir", str(run), project_root())
    folder = Path(path).resolve()
    cohort = read_cohort(folder)
    if not (folder / "model" / "base.json").is_file():
        raise ValueError(f"there is no model in {folder}: run 02_finetune first")
    inverted = load_inversion(folder / "inversions")
    model = model or load_model(str(folder / "model"), precision=precision)
    inverted.check(model)
    trained = cohort.table.loc[cohort.table["split"] == "train", "caption"].unique().tolist()
    bench = Bench(folder, model, cohort, inverted, trained, scorer)
    with suppress(FileNotFoundError):
        edits = pd.read_parquet(folder / "edits" / "edits.parquet")
        own = (edits["method"] == OWN) & (edits["model_key"] == inverted.model_key)
        bench.edits = edits[own]
    with suppress(ModelError):  # a base model may have no clip/
        bench.scorer = scorer or load_clip("base", model.base_model, model.device)
    with suppress(ValueError):  # no judge before 05_evaluate
        judge, card = load_classifier(folder / "classifiers" / "judge")
        bench.judge = (judge, card["heads"]) if card["image_size"] == bench.side else ()
    return bench


def film_of(bench, film):
    """A film (H, W) in [0, 1]: by its id in the cohort, or by the path of a PNG, JPEG or DICOM."""
    known = bench.cohort.table.set_index("film_id")["path"]
    path = bench.cohort.image_root / known[film] if film in known else bench.folder / film
    path = path if path.is_file() else Path(film)
    return uint8_to_unit(load_film(path, bench.side, bench.cohort.settings["fit"]))


def receive(bench, content):
    """Take in a film of one's own, the bytes of a PNG, JPEG or DICOM: its path, for make_edit.

    The run folder gets its pixels at the model's size, named after themselves, and nothing else.
    """
    with TemporaryDirectory() as folder:
        path = Path(folder) / "film"
        path.write_bytes(content)
        try:
            film = load_film(path, bench.side, bench.cohort.settings["fit"])
        except ImageError as error:
            raise ImageError(error.reason) from None
    name = f"studio/own_{hashlib.sha256(film).hexdigest()[:10]}.png"
    save_png(bench.folder / name, film)
    return name


def choices(bench, film):
    """The edits that a film can take: {name: (T, T')}, those of a finding, then the paper's."""
    table, settings, pairs = bench.cohort.table, bench.cohort.settings, {}
    own = table[table["film_id"] == film]
    for finding, present in [(f, p) for p in (False, True) for f in FINDINGS[1:]]:
        known = {} if present else {finding: PRESENT}  # of a film of one's own: nothing else is
        labels = own.iloc[0] if len(own) else known
        if present or labels[finding] == PRESENT:
            with suppress(PromptError):  # there already, or the template has no words for it
                words = settings["template"], settings["negatives"]
                pairs[Edit(finding, present).name] = prompt_pair(labels, finding, present, *words)
    return pairs | {f"paper: {name}": pair for name, pair in PAPER_EDITS.items()}


def make_edit(
    bench, film, source, target, preset="default", method="", num_steps=0, progress=None, **dials
):
    """Edit one film, source its T, target T': a Result. film: as for film_of.

    method, num_steps: of the inversion, by default the preset's and the run's; the run's own
    inversion serves where it fits. dials: those of `edit`; mask and keep may be boxes.
    progress(done, total) is called before each call of the U-Net; what it raises ends the edit.
    """
    factual, areas = film_of(bench, film), {k: dials[k] for k in AREAS if k in dials}
    given = dials | {name: _area(bench, area) for name, area in areas.items()}
    choose(preset, given)  # a wrong dial is said before the slow part
    how, num_steps = PRESETS[preset].inversion, num_steps or bench.inverted.num_steps
    how = {"method": method} if method not in ("", how["method"]) else how
    total = num_steps * (1 + CALLS.get(how["method"], 1))
    with _watched(bench.model.unet, total, progress):
        how = how | {"seed": dials.get("seed", 0)}
        inversion = _inversion(bench, film, factual, source, num_steps, how)
        edited = edit(bench.model, inversion, factual[None], [0], [target], preset=preset, **given)
    call = {"film": film, "source": source, "target": target, "preset": preset}
    call |= {"method": how["method"], "num_steps": num_steps, **dials}
    about = recipe(inversion, preset, **dials | dict.fromkeys(areas)) | areas
    return _result(bench, call, factual, edited.films[0], edited.masks[0], about)


def stored(bench, film, target=None):
    """What 04_edit wrote of a film, under T' or as its first edit: a Result, or None."""
    if bench.edits is None:
        return None
    rows = bench.edits[bench.edits["film_id"] == film]
    rows = rows if target is None else rows[rows["target"] == target]
    if rows.empty:
        return None
    row, folder = rows.iloc[0], bench.folder / "edits"
    made, mask = load_edit_films(folder, rows[:1])[0], load_image(folder / row["mask_path"]) == 1
    call = {
        name: row[name]
        for name in ("source", "target", "preset", "num_steps", *STORED)
        if name in row
    }
    call = plain({"film": film, "method": row["inversion"], **call})
    return _result(bench, call, film_of(bench, film), uint8_to_unit(made), mask, plain(dict(row)))


def save_pair(bench, result):
    """Write film, counterfactual and mask as PNG, and the JSON that repeats the edit: its path.

    `make_edit(bench, **read_json(path)["call"])` does so.
    """
    folder, call = bench.folder / "studio", result.call
    number = 1 + max([int(path.name[:3]) for path in folder.glob("[0-9]*.json")], default=0)
    path = folder / f"{number:03d}_{slug(Path(call['film']).stem)}.json"
    about = {"source": call["source"], "target": call["target"]} | result.recipe
    about["s_clip"] = result.measures.get("s_clip", np.nan)
    save_png(path.with_name(f"{path.stem}_film.png"), result.factual)
    save_edit(path.with_suffix(".png"), result.counterfactual, about, {"versions": versions()})
    save_mask(path.with_name(f"{path.stem}_mask.png"), result.mask)
    about = {"call": call, "recipe": result.recipe, "measures": result.measures}
    about |= {"heads": result.heads, "versions": versions(), "code": as_code(bench, result)}
    return write_json(path, about)


def as_code(bench, result):
    """A cell that makes the same edit again without a widget."""
    run = shown(bench.folder)
    precision = "bf16" if "bfloat16" in str(bench.model.dtype) else "fp32"
    lines = ["from prism_nb.workbench import make_edit, prepare, save_pair", ""]
    lines += [f"bench = prepare({run!r}, precision={precision!r})"]
    lines += ["result = make_edit(", "    bench,"]
    lines += [f"    {name}={value!r}," for name, value in result.call.items()]
    return "\n".join([*lines, ")", "save_pair(bench, result)"])


def shown(path):
    """A path as from the project root, where it lies in it: "runs/phantom"."""
    root = project_root()
    return (path.relative_to(root) if path.is_relative_to(root) else path).as_posix()


def _area(bench, area):
    """A box as a mask (H, W) bool; a word, None or a mask as it is; a list of them one by one."""
    if area is None or isinstance(area, str | np.ndarray):
        return area
    if any(np.ndim(one) or isinstance(one, str) for one in area):
        return [_area(bench, one) for one in area]
    left, top, right, bottom = area
    if not (0 <= left < right <= bench.side and 0 <= top < bottom <= bench.side):
        need = f"left < right and top < bottom, from 0 to {bench.side}"
        raise ValueError(f"box {tuple(area)}: give (left, top, right, bottom), {need}")
    mask = np.zeros((bench.side, bench.side), bool)
    mask[top:bottom, left:right] = True
    return mask


@contextmanager
def _watched(unet, total, progress):
    """Call progress(done, total) before each call of the U-Net."""
    calls = count(1)

    def tick(*_):
        if progress:
            progress(min(next(calls), total), total)

    hook = unet.register_forward_pre_hook(tick)
    try:
        yield
    finally:
        hook.remove()


def _inversion(bench, film, factual, source, num_steps, how):
    """The run's inversion of the film where film, T, steps and method fit, else a new one."""
    run, method = bench.inverted, how["method"]
    fits = (run.method, run.num_steps) == (method, num_steps) and method != "ddpm"  # has a seed
    if film in run.film_ids and fits:
        row = run.film_ids.index(film)
        if run.captions[row] == source:
            return run.select([row])
    key = (hashlib.sha256(factual).hexdigest(), source, num_steps, method, how["seed"])
    if key not in bench.recent:
        z0 = encode_films(bench.model, factual[None])
        bench.recent[key] = invert(bench.model, z0, [film], [source], num_steps=num_steps, **how)
        bench.recent = dict(list(bench.recent.items())[-MOST:])
    return bench.recent[key]


def _result(bench, call, factual, made, mask, about):
    """A Result with what the scorer, the judge and the phantom say of an edit."""
    x, x_made, heads = factual[None], made[None], {}
    measures = {"mask_area": float(mask.mean())}
    if bench.scorer:
        texts = [call["source"]], [call["target"]]
        measures["s_clip"] = float(bench.scorer.s_clip(x, x_made, *texts)[0])
    if bench.judge:
        judge, names = bench.judge
        said = predict(judge, unit_to_uint8(np.concatenate([x, x_made])))
        heads = dict(zip(names, said.T.tolist(), strict=True))
    truth, where = _truth(bench, call)
    if truth is not None:
        t, w = truth[None], where[None]
        measures["effectiveness"] = float(metrics.tea_effectiveness(x, x_made, t)[0])
        measures["error_inside"] = float(metrics.error_inside(x_made, t, w)[0])
        measures["error_outside"] = float(metrics.error_outside(x_made, t, w)[0])
    return Result(call, factual, made, mask, about, measures, heads, truth)


def _truth(bench, call):
    """The true counterfactual of what T and T' differ in, and where it differs; else two Nones."""
    root, film, said = bench.cohort.image_root, call["film"], []
    for text in (call["source"], call["target"]):
        says = {f: re.search(rf"(?<!no )\b{f}\b", text, re.IGNORECASE) for f in phantom.DRAWN}
        said.append({finding: int(match is not None) for finding, match in says.items()})
    do = dict(said[1].items() - said[0].items())
    known = film in set(bench.cohort.table["film_id"]) and phantom.is_phantom(root)
    if not (do and known):
        return None, None
    truth, where = phantom.true_counterfactual(root, film, do, bench.side)
    return uint8_to_unit(truth), where


# Pictures, as PNG bytes, and numbers, as HTML


def png(picture):
    """PNG bytes of a film (H, W) in [0, 1], or of uint8, grey or (H, W, 3)."""
    picture, buffer = np.asarray(picture), io.BytesIO()
    picture = picture if picture.dtype == np.uint8 else unit_to_uint8(picture)
    Image.fromarray(picture).save(buffer, format="PNG")
    return buffer.getvalue()


def wipe(result, share):
    """Original on the left, counterfactual from `share` of the width on, a white line between."""
    edge = round(share * result.factual.shape[1])
    both = np.hstack([result.factual[:, :edge], result.counterfactual[:, edge:]])
    if 0 < edge < both.shape[1]:
        both[:, edge] = 1
    return png(both)


def pictures(result):
    """What else there is to see of an edit: {panel: PNG bytes}, with the truth where known."""
    shown = {"difference": _signed(result.counterfactual - result.factual)}
    colour = np.where(result.mask[..., None], COLOURS["mask"], 0)
    share = 0.35 * result.mask[..., None]
    film = unit_to_uint8(result.factual)[..., None]
    shown["mask"] = (film * (1 - share) + colour * share).astype(np.uint8)
    if result.truth is not None:
        shown["true counterfactual"] = result.truth
        shown["true difference"] = _signed(result.truth - result.factual)
    return {name: png(picture) for name, picture in shown.items()}


def _signed(difference):
    """Counterfactual - original in the colours of the figures: uint8 (H, W, 3)."""
    low, high = DIFFERENCE["vmin"], DIFFERENCE["vmax"]
    colours = colormaps[DIFFERENCE["cmap"]]((difference - low) / (high - low), bytes=True)
    return colours[..., :3]


def framed(film, boxes):
    """A film with the boxes drawn on it, {"mask" or "keep": box}: PNG bytes."""
    image = Image.fromarray(unit_to_uint8(film)).convert("RGB")
    for name, (left, top, right, bottom) in boxes.items():
        corners = (left, top, right - 1, bottom - 1)
        ImageDraw.Draw(image).rectangle(corners, outline=COLOURS[name], width=1)
    return png(image)


def facts(result):
    """What was measured, as HTML: numbers, and the judge's probability before and after."""
    rows = [(FACTS[name], value) for name, value in result.measures.items() if value == value]
    text = " &nbsp;·&nbsp; ".join(f"{name} <b>{value:.3f}</b>" for name, value in rows)
    colours = {"original": "#888", "counterfactual": "#d55e00"}
    bar = "<div style='width:{0:.0f}px;height:8px;background:{1}'></div>"
    lines = []
    for head, both in result.heads.items():
        bars = "".join(bar.format(160 * p, c) for p, c in zip(both, colours.values(), strict=True))
        numbers = " → ".join(f"{p:.2f}" for p in both)
        lines.append(f"<tr><td>{escape(head)}<td style='width:160px'>{bars}<td>{numbers}</tr>")
    legend = ", ".join(f"<b style='color:{c}'>{name}</b>" for name, c in colours.items())
    judge = f"<table><caption>the judge: {legend}</caption>{''.join(lines)}</table>"
    return f"<p>{text}</p>{judge if lines else ''}"
