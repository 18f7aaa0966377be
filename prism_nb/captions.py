"""A row of labels becomes a caption, and an edit becomes a pair of captions (section 2.1).

template "plain" (the default) says what is known, in lower case: "chest x-ray showing edema".
template "listing1" is the paper's Listing 1 as printed, with its quirks: a film whose labels are
all blank or uncertain is "Normal chest X-ray...", a true normal is "Chest X-ray showing No
Finding", and blank, absent and uncertain cannot be told apart. (The listing misspells "Enlarged
Cardiomeastinum", a column CheXpert does not have; CheXpert's own spelling is used here.)
Edit prompts are built by the same templates, so they hold only words the model was trained on.
Used by notebooks 01, 02, 04 and 06.
"""

import re
from collections.abc import Iterable

import numpy as np
import pandas as pd

from prism_nb.findings import ABSENT, FINDINGS, PRESENT, UNCERTAIN, finding_from, no_finding

Labels = dict | pd.Series  # one film: finding -> 1, 0, -1 or NaN; other keys are left alone

TEMPLATES = ("plain", "listing1")

LISTING1_NORMAL = "Normal chest X-ray with no significant findings"
PLAIN_NORMAL = "normal chest x-ray with no significant findings"
PLAIN_FILM = "chest x-ray"


class PromptError(ValueError):
    """A caption or an edit that cannot be put into words."""


def caption(labels: Labels, template: str = "plain", negatives: bool = False) -> str:
    """Say in one line what a film shows.

    labels: dict or Series with findings as keys, values 1, 0, -1 or NaN (a missing key is NaN).
    negatives: also say what is known to be absent ("no edema"); listing1 has no words for it.
    """
    _check_template(template)
    values = {name: float(labels.get(name, np.nan)) for name in FINDINGS}
    return _listing1(values) if template == "listing1" else _plain(values, negatives)


def _listing1(values):
    found = [name for name in FINDINGS if values[name] == PRESENT]
    return "Chest X-ray showing " + ", ".join(found) if found else LISTING1_NORMAL


def _plain(values, negatives):
    named = [name for name in FINDINGS if name != "No Finding"]
    phrases = {PRESENT: "{}", UNCERTAIN: "possible {}"}
    found = [phrases[values[n]].format(n.lower()) for n in named if values[n] in phrases]
    if found:
        text = "chest x-ray showing " + ", ".join(found)
    else:
        text = PLAIN_NORMAL if _is_normal(values) else PLAIN_FILM
    absent = [f"no {name.lower()}" for name in named if values[name] == ABSENT]
    return ", ".join([text, *absent]) if negatives else text


def _is_normal(values):
    """Tell a normal film from one nothing is known of, when no finding is present.

    "No Finding" decides where it has a value. Where it is 0 and nothing is named, the film is not
    normal: only blank or dropped labels, or something that has no name among the 14.
    """
    if np.isnan(values["No Finding"]):
        return no_finding(values) == PRESENT
    return values["No Finding"] == PRESENT


def captions(table: pd.DataFrame, template: str = "plain", negatives: bool = False) -> list[str]:
    """Caption every film of a table (N rows): a list of N strings, in the table's order."""
    labels = table.reindex(columns=list(FINDINGS)).to_numpy(float, na_value=np.nan)
    rows, which = np.unique(np.nan_to_num(labels, nan=9.0), axis=0, return_inverse=True)
    rows = np.where(rows == 9.0, np.nan, rows)  # few combinations are distinct: word each once
    texts = [caption(dict(zip(FINDINGS, row, strict=True)), template, negatives) for row in rows]
    return [texts[index] for index in which.ravel()]


def prompt_pair(
    labels: Labels, finding: str, present: bool, template: str = "plain", negatives: bool = False
) -> tuple[str, str]:
    """Give the captions before and after an edit that changes one finding.

    finding: a pathology or Support Devices; present: True to add it, False to remove it.
    Returns (source, target). Raises PromptError if the film already has that value, or if the
    template has no words for the difference.
    """
    finding = finding_from(finding)
    before = float(labels.get(finding, np.nan))
    if before == (PRESENT if present else ABSENT):
        state = "already present" if present else "already absent"
        raise PromptError(f"{finding} is {state} in this film; choose another film or edit.")
    source = caption(labels, template, negatives)
    target = caption(edit_labels(labels, finding, present), template, negatives)
    if source == target:
        raise PromptError(
            f"{finding} is {_value_name(before)} in this film, and template {template!r} says "
            f"{source!r} before and after; choose a film where it is present."
        )
    return source, target


def edit_labels(labels: Labels, finding: str, present: bool) -> Labels:
    """Return the labels with one finding changed and "No Finding" made to agree.

    labels: dict or Series, left as it was. Devices are no pathology: editing them leaves
    "No Finding" alone. Raises PromptError for "No Finding" itself, which is a consequence.
    """
    finding = finding_from(finding)
    if finding == "No Finding":
        raise PromptError("No Finding follows from the pathologies; edit one of those instead.")
    edited = labels.copy()
    edited[finding] = PRESENT if present else ABSENT
    if finding != "Support Devices":
        edited["No Finding"] = no_finding(edited)
    return edited


def _value_name(value):
    return {PRESENT: "present", ABSENT: "absent", UNCERTAIN: "uncertain"}.get(value, "not known")


def untrained_words(prompt: str, training_captions: Iterable[str]) -> list[str]:
    """List the words of a prompt that no training caption holds, in the prompt's order.

    Case is ignored, as CLIP's tokenizer does; "x-ray" is one word.
    """
    trained = {word for text in set(training_captions) for word in _words(text)}
    return [word for word in dict.fromkeys(_words(prompt)) if word not in trained]


def vocabulary() -> list[str]:
    """List every word that any template can produce, in lower case, sorted."""
    texts = [LISTING1_NORMAL, PLAIN_NORMAL, *FINDINGS, "chest x-ray showing possible no"]
    return sorted({word for text in texts for word in _words(text)})


def _words(text):
    return re.findall(r"[a-z0-9]+(?:-[a-z0-9]+)*", text.lower())


def _check_template(template):
    if template not in TEMPLATES:
        raise PromptError(f"template is {template!r}; it must be one of {', '.join(TEMPLATES)}.")
