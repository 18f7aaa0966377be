"""Augmentation: the films that each arm adds, and their labels (Table 3, Appendix D).

Counterfactuals come from the training split only, from a generator fine-tuned on the same split;
their labels are the factual's with one finding changed and "No Finding" recomputed. What a GAN, the
generator without a film, or the truth would have given for the same edits stands beside them.
Films uint8 (R, H, W) of R edits, labels float (R, K). Used by notebook 06.
"""

import hashlib
import json
from pathlib import Path

import numpy as np
import pandas as pd
from safetensors import safe_open
from safetensors.numpy import save_file

from prism_nb.arms import NO_COUNTERFACTUALS, AugmentError
from prism_nb.captions import edit_labels
from prism_nb.diffusion import load_model
from prism_nb.edits import truths
from prism_nb.files import atomic_path, read_json
from prism_nb.findings import FINDINGS
from prism_nb.ganterfactual import BUNDLED, load_gan, translate
from prism_nb.images import unit_to_uint8
from prism_nb.latents import load_latents
from prism_nb.networks import CARD_FILE
from prism_nb.phantom import is_phantom
from prism_nb.regeneration import generate_films


def counterfactual_labels(labels, finding, present):
    """Labels of edited films: one finding changed, the others kept, No Finding recomputed.

    labels: DataFrame of the factuals' 14 findings; finding, present: one for all, or one a row.
    AugmentError for an edit that the film does not need: its labels are then not the film's.
    """
    findings = [finding] * len(labels) if isinstance(finding, str) else list(finding)
    values = [present] * len(labels) if np.ndim(present) == 0 else list(present)
    rows = [row for _, row in labels[list(FINDINGS)].iterrows()]
    for row, name, value in zip(rows, findings, values, strict=True):
        if row[name] == value:
            done = ("add", "with") if value else ("remove", "without")
            raise AugmentError(
                f"an edit is to {done[0]} {name} of a film {done[1]} it: the edits are of another "
                "cohort, run 03_invert and 04_edit again."
            )
    edits = zip(rows, findings, values, strict=True)
    edited = [edit_labels(row, name, bool(value)) for row, name, value in edits]
    return pd.DataFrame(edited, index=labels.index, columns=list(FINDINGS), dtype=np.float32)


def check_source(patients, table):
    """Refuse edits of patients outside the training split: they would leak the test set.

    patients: of the edits; table: the cohort with patient_id and split. None at all is refused too.
    """
    if not len(patients):
        raise AugmentError(NO_COUNTERFACTUALS)
    train = set(table.loc[table["split"] == "train", "patient_id"])
    outside = [patient for patient in dict.fromkeys(patients) if patient not in train]
    if outside:
        raise AugmentError(
            f"{len(outside)} patients of the edits are not in the training split (the first is "
            f"{outside[0]}); train on edits of training films only."
        )


def extra_films(arms, cohort, plan, factual, made, labels, folder, device="cpu", seed=0):
    """The films that arms add to the real ones: ({arm: (films, labels)}, {arm: why not}).

    plan: the counterfactuals' rows of edits.parquet; factual, made (R, H, W): the films they were
    made of, and what was made; labels (R, K): the new ones; folder: the run's, with model/ and
    perhaps baseline/, the GAN that 05_evaluate used.
    """

    def from_gan():
        return gan_counterfactuals(factual, plan, labels, _gan_folder(cohort, folder))

    makers = {
        "text_to_image": lambda: (_generated(cohort, plan, folder, device, seed), labels),
        "gan_counterfactuals": from_gan,
        "counterfactuals": lambda: (made, labels),
        "counterfactuals_filtered": lambda: _filtered(plan, made, labels),
        "true_counterfactuals": lambda: (_true_films(cohort, plan), labels),
    }
    extra, skipped = {}, {}
    for arm in arms:
        try:
            if arm in makers:
                extra[arm] = makers[arm]()
        except AugmentError as error:
            skipped[arm] = str(error)
    return extra, skipped


def _filtered(plan, made, labels):
    kept = plan["kept"].to_numpy(bool)
    if not kept.any():
        raise AugmentError("no counterfactual passed the S_CLIP filter of 04_edit")
    return made[kept], labels[kept]


def _true_films(cohort, plan):
    films, _ = truths(cohort, plan)
    if np.isnan(films).any():
        raise AugmentError("the truth of these edits is not known: it is on the phantom alone")
    return unit_to_uint8(films)


def _generated(cohort, plan, folder, device, seed):
    """Films generated under the plan's target captions; on disk, as they take minutes."""
    path = Path(folder) / "training/text_to_image.safetensors"
    latents = load_latents(Path(folder) / "latents")
    about = [[*plan["target"]], [*plan["model_key"].unique()], latents.key, seed, device]
    key = hashlib.sha256(json.dumps(about).encode()).hexdigest()
    if path.is_file():
        with safe_open(path, "np") as file:
            if file.metadata() == {"key": key}:
                return file.get_tensor("films")
    model = load_model(str(Path(folder) / "model"), device=device)
    train = cohort.table.loc[cohort.table["split"] == "train", "film_id"]
    mean = latents.mean(latents.rows(train))
    films = unit_to_uint8(generate_films(model, about[0], mean, seed=seed))
    with atomic_path(path) as partial:
        save_file({"films": films}, partial, {"key": key})
    return films


def _gan_folder(cohort, folder):
    def digest(gan):
        return read_json(gan / CARD_FILE)["sha256"] if (gan / CARD_FILE).is_file() else ""

    own = Path(folder) / "baseline"
    if digest(own) not in ("", digest(BUNDLED)):
        return own
    if not is_phantom(cohort.image_root):
        raise AugmentError("the bundled GAN knows phantom films alone")
    return BUNDLED


def gan_counterfactuals(films, plan, labels, folder=BUNDLED):
    """GANterfactual's films of those edits of a plan that it was trained for: (films, labels).

    films (N, H, W): the factuals, labels (N, K): of the edits. AugmentError where there is no GAN,
    or no edit that it knows.
    """
    if not (Path(folder) / CARD_FILE).is_file():
        raise AugmentError("no GAN is at hand: train one with python -m prism_nb.ganterfactual")
    gan, card = load_gan(folder)
    known = (plan["finding"] == card["finding"]).to_numpy()
    if not known.any():
        raise AugmentError(f"the GAN edits {card['finding']}, and these edits do not")
    films, present = films[known], plan["present"].to_numpy(bool)[known]
    made = np.empty_like(films)
    for value in set(present.tolist()):
        made[present == value] = translate(gan, films[present == value], value)
    return made, labels[known]
