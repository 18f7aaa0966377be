"""Edits as a plan and on disk: which film gets which edit, and the films that came of it.

A plan has one row an edit: film_id, patient_id, split, edit, finding, present, source, target
(the captions T and T'), row (the film's position). On disk `edits/` holds a PNG a film, marked
SYNTHETIC, and `edits.parquet`: the plan's columns and method, s_clip, kept, path. Films (B, H, W)
in [0, 1]. Used by notebooks 04, 05 and 06.
"""

from dataclasses import dataclass

import numpy as np
import pandas as pd

from prism_nb import phantom
from prism_nb.captions import PromptError, prompt_pair
from prism_nb.files import atomic_path
from prism_nb.findings import finding_from, slug
from prism_nb.images import load_image, save_png, uint8_to_unit, unit_to_uint8

PLAN = ("film_id", "patient_id", "split", "edit", "finding", "present", "source", "target", "row")
OWN = "PRISM"  # the method's name in tables
FLOORS = {"vae": "VAE", "reconstruction": "inversion", "sham edit": "sham edit"}


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


def plan_edits(table, edits, template="plain", negatives=False):
    """Plan which film of a cohort's table gets which edit: a DataFrame with the columns PLAN.

    A film that is already as the edit wants, or whose label is unknown, is left out. Raises
    ValueError when no film is left to edit.
    """
    rows = []
    for row in range(len(table)):
        labels = table.iloc[row]
        for edit in edits:
            if labels[edit.finding] != (0.0 if edit.present else 1.0):
                continue
            try:
                pair = prompt_pair(labels, edit.finding, edit.present, template, negatives)
            except PromptError:
                continue  # the template has no words for this difference
            about = (labels["film_id"], labels["patient_id"], labels["split"])
            rows.append((*about, edit.name, edit.finding, edit.present, *pair, row))
    if not rows:
        wanted = ", ".join(edit.name for edit in edits)
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


def save_edits(folder, plan, edited, table, floors, provenance):
    """Write every edited film and every floor as PNG, then edits.parquet; returns its table.

    floors: method -> films of `table`, in its order (the keys of FLOORS). Rerunning overwrites.
    """
    rows = []
    for number, row in plan.reset_index(drop=True).iterrows():
        path = f"{row['film_id']}/{slug(row['edit'])}.png"
        text = {"T": row["source"], "T'": row["target"], "S_CLIP": f"{row['s_clip']:.4f}"}
        save_png(folder / path, edited[number], _mark(text, provenance))
        rows.append({**row, "method": OWN, "path": path})
    about = table[["film_id", "patient_id", "split"]].reset_index(drop=True)
    for name, films in floors.items():
        for number, row in about.iterrows():
            path = f"{row['film_id']}/{slug(FLOORS[name])}.png"
            save_png(folder / path, films[number], _mark({}, provenance))
            rows.append({**row, "method": FLOORS[name], "edit": "", "path": path})
    frame = pd.DataFrame(rows).drop(columns="row")
    with atomic_path(folder / "edits.parquet") as temporary:
        frame.to_parquet(temporary, index=False)
    return frame


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
