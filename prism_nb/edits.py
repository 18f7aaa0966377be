"""Edits as a plan and on disk: which film gets which edit, and the films that came of it.

A plan has one row an edit: film_id, patient_id, split, edit, finding, present, source, target
(the captions T and T'), row (the film's position). On disk `edits/` holds a PNG a film, marked
SYNTHETIC, its mask in one bit, and `edits.parquet`: the plan's columns, how it was made (`recipe`),
mask_area, s_clip, kept, reason, path, mask_path. Films (B, H, W) in [0, 1]. Used by notebooks 04,
05, 06 and by `prism-nb edit`, which wants the plan's words without waiting for torch.
"""

import json
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
from PIL import Image, PngImagePlugin

from prism_nb import phantom
from prism_nb.captions import PromptError, prompt_pair
from prism_nb.files import atomic_path, plain
from prism_nb.findings import FINDINGS, finding_from, slug
from prism_nb.images import load_image, save_png, uint8_to_unit, unit_to_uint8

PLAN = ("film_id", "patient_id", "split", "edit", "finding", "present", "source", "target", "row")
OWN = "ours"  # in tables: what 04_edit made by its own preset
FLOORS = {"vae": "VAE", "reconstruction": "inversion", "sham edit": "sham edit"}
_DEVICES, _EFFUSION, _HEART = "Support Devices", "Pleural Effusion", "Cardiomegaly"
_PAPER = (  # an edit, and the finding that may stand beside it (section 3.2)
    (_DEVICES, False, _EFFUSION),
    (_DEVICES, True, _EFFUSION),
    (_EFFUSION, False, _DEVICES),
    (_HEART, False, _DEVICES),
)


@dataclass(frozen=True)
class Edit:
    """One intervention: a finding to add or to remove."""

    finding: str
    present: bool

    @property
    def name(self):
        """As it stands in the parameters: "remove Support Devices"."""
        return f"{'add' if self.present else 'remove'} {self.finding}"


def parse_edit(text):
    """Read "remove Support Devices" or "add edema"; raises ValueError on anything else."""
    verb, _, finding = text.strip().partition(" ")
    if verb not in ("add", "remove") or not finding:
        raise ValueError(
            f'edit {text!r}: write "add" or "remove" and a finding, as in "remove Edema"'
        )
    return Edit(finding_from(finding), verb == "add")


def _paper_edits():
    """The paper's edits, each with and without another finding beside it: {name: (T, T')}."""
    pairs = {}
    for (finding, present, other), beside in product(_PAPER, (False, True)):
        labels = dict.fromkeys(FINDINGS[1:], 0.0) | {finding: 1.0 - present, other: float(beside)}
        name = Edit(finding, present).name + (f" beside {other}" if beside else "")
        pairs[name] = prompt_pair(labels, finding, present)
    return pairs


PAPER_EDITS = _paper_edits()


def plan_edits(table, edits, template="plain", negatives=False):
    """Plan which film of a cohort's table gets which edit: a DataFrame with the columns PLAN.

    A film that is already as the edit wants, or whose label is unknown, is left out. Raises
    ValueError when no film is left to edit.
    """
    rows = []
    for row in range(len(table)):
        labels = table.iloc[row]
        for each in edits:
            if labels[each.finding] != (0.0 if each.present else 1.0):
                continue
            try:
                pair = prompt_pair(labels, each.finding, each.present, template, negatives)
            except PromptError:
                continue  # the template has no words for this difference
            about = (labels["film_id"], labels["patient_id"], labels["split"])
            rows.append((*about, each.name, each.finding, each.present, *pair, row))
    if not rows:
        wanted = ", ".join(each.name for each in edits)
        raise ValueError(
            f"no inverted film can take any of the edits ({wanted}): name others or invert more"
        )
    return pd.DataFrame(rows, columns=list(PLAN))


def truths(cohort, plan):
    """True counterfactuals of a plan's edits: films (B, H, W) in [0, 1] and masks (B, H, W) bool.

    Only a phantom cohort has them, and only for findings that it draws; others are NaN and False.
    """
    size = cohort.settings["image_size"]
    films = np.full((len(plan), size, size), np.nan, np.float32)
    masks = np.zeros(films.shape, bool)
    if not phantom.is_phantom(cohort.image_root):
        return films, masks
    for number, row in enumerate(plan.itertuples()):
        if row.finding in phantom.DRAWN:
            do = {row.finding: int(row.present)}
            film, masks[number] = phantom.true_counterfactual(
                cohort.image_root, row.film_id, do, size
            )
            films[number] = uint8_to_unit(film)
    return films, masks


def given_dials(params):
    """The dials that a notebook's parameters set themselves, where they do not say "preset"."""
    dials = {"seed": params.seed}
    if params.guidance_scale > 0:
        dials["guidance_scale"] = params.guidance_scale
    if params.mask != "preset":
        dials["mask"] = params.mask
    return dials | ({"detail": params.detail} if params.detail >= 0 else {})


def recorded_dials(editing):
    """Preset and dials of 04_edit's recorded parameters (a dict), as `edit` takes them."""
    return given_dials(SimpleNamespace(**editing)) | {"preset": editing["preset"]}


def recipe(inversion, preset, **dials):
    """How an edit is made, as columns: the inversion, the preset, and each dial's value.

    With film_id, source (T) and target (T') that is all it takes for the same version of this
    package to make the edit again; the seed is that of the inversion's noise, too.
    """
    from prism_nb.editing import choose

    values = plain(asdict(choose(preset, dials)))
    values = {k: json.dumps(v) if isinstance(v, dict | list) else v for k, v in values.items()}
    about = {"inversion": inversion.method, "num_steps": inversion.num_steps}
    about |= {"model_key": inversion.model_key, "preset": preset, "editor": values.pop("method")}
    return about | values


def filter_edits(plan, s_clip, area, minimum):
    """The plan with mask_area, s_clip, kept and the reason of what is not: rejected rows stay."""
    low = [f"S_CLIP {value:.3f} is below {minimum:g}" for value in s_clip]
    why = np.where(np.asarray(s_clip) >= minimum, "", low)
    why = np.where(np.asarray(area) > 0, why, "the mask is empty: nothing was changed")
    return plan.assign(mask_area=area, s_clip=s_clip, kept=why == "", reason=why.astype(object))


def edit_film(
    model, film, source, target, film_id="film", method="", num_steps=20, preset="default", **dials
):
    """Edit one film (H, W) in [0, 1] of one's own: its Edited and its recipe.

    method: of the inversion, by default the preset's. Errors are those of `invert` and `edit`.
    """
    from prism_nb.diffusion import encode_films
    from prism_nb.editing import PRESETS, choose, edit
    from prism_nb.inversion import invert

    choose(preset, dials)  # a wrong dial is said before the slow part
    how = PRESETS[preset].inversion
    how = {"method": method} if method and method != how["method"] else how
    z0 = encode_films(model, film[None])
    inversion = invert(
        model, z0, [film_id], [source], num_steps=num_steps, seed=dials.get("seed", 0), **how
    )
    edited = edit(model, inversion, film[None], [0], [target], preset=preset, **dials)
    return edited, recipe(inversion, preset, **dials)


def change_in_words(tokenizer, source, target):
    """What tells T' from T, in one line: "gone: edema; new: nothing"."""
    from prism_nb.editors import changed_words

    both = changed_words(tokenizer, source, target)
    gone, new = (" ".join(word.text for word in words) or "nothing" for words in both)
    return f"gone: {gone}; new: {new}"


def save_edits(folder, plan, edited, table, floors, provenance, peers=None):
    """Write every edited film, its mask and every floor as PNG, then edits.parquet: its table.

    edited: Edited, in the plan's order. floors: method -> films of `table`, in its order (the keys
    of FLOORS). peers: method -> its own plan and Edited. Rerunning overwrites.
    """
    rows = []
    for method, (part, made) in ({OWN: (plan, edited)} | (peers or {})).items():
        by = "" if method == OWN else f"_by_{slug(method)}"
        for number, row in part.reset_index(drop=True).iterrows():
            name = f"{row['film_id']}/{slug(row['edit'])}{by}"
            paths = {"path": f"{name}.png", "mask_path": f"{name}_mask.png"}
            save_edit(folder / paths["path"], made.films[number], row, provenance)
            save_mask(folder / paths["mask_path"], made.masks[number])
            rows.append({**row, "method": method, **paths})
    about = table[["film_id", "patient_id", "split"]].reset_index(drop=True)
    for name, films in floors.items():
        for number, row in about.iterrows():
            path = f"{row['film_id']}/{slug(FLOORS[name])}.png"
            save_png(folder / path, films[number], _mark({}, provenance))
            rows.append({**row, "method": FLOORS[name], "edit": "", "path": path})
    whole = plan.select_dtypes("integer").columns  # floors have none: as floats seeds would differ
    frame = pd.DataFrame(rows).astype(dict.fromkeys(whole, "Int64")).drop(columns="row")
    with atomic_path(folder / "edits.parquet") as temporary:
        frame.to_parquet(temporary, index=False)
    return frame


def save_edit(path, film, about, provenance):
    """Write an edited film as PNG: marked SYNTHETIC, with how it was made, not of whom.

    about: one row of a plan, with s_clip and recipe.
    """
    text = {"T": about["source"], "T'": about["target"], "S_CLIP": f"{about['s_clip']:.4f}"}
    left_out = {"source", "target", "s_clip", "row", "film_id", "patient_id", "split"}
    rest = {key: value for key, value in dict(about).items() if key not in left_out}
    save_png(path, film, _mark(text | {"Recipe": json.dumps(plain(rest))}, provenance))


def save_mask(path, mask):
    """Write a mask (H, W) bool as PNG of one bit a pixel: white where the edit may act."""
    text = PngImagePlugin.PngInfo()
    text.add_text("Description", "mask of a SYNTHETIC counterfactual, made by prism_nb")
    with atomic_path(Path(path)) as temporary:
        Image.fromarray(mask).save(temporary, format="PNG", pnginfo=text)


def _mark(text, provenance):
    """PNG text that says what the picture is: no reader may take it for a patient's film."""
    versions = ", ".join(f"{k} {v}" for k, v in provenance.get("versions", {}).items())
    return {
        "Description": "SYNTHETIC counterfactual, made by prism_nb",
        "Software": versions,
        **text,
    }


def load_edit_films(folder, rows):
    """Films (B, H, W) uint8 of some rows of edits.parquet."""
    return np.stack([unit_to_uint8(load_image(folder / path)) for path in rows["path"]])
