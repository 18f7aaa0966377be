"""The vocabulary of the project: CheXpert's 14 labels and what their values mean.

A label is PRESENT (1), ABSENT (0), UNCERTAIN (-1: the report hedges) or blank (NaN: the report
does not mention it, which is not the same as absent). A policy turns the raw values into those a
model is trained on; the paper counts uncertain as present and blank as absent (section 3.1).
"No Finding" says that no pathology is present; support devices do not count as one.
Used by every notebook.
"""

import difflib
import re
from collections.abc import Iterable

import numpy as np
import pandas as pd

FINDINGS = (
    "No Finding",
    "Enlarged Cardiomediastinum",
    "Cardiomegaly",
    "Lung Opacity",
    "Lung Lesion",
    "Edema",
    "Consolidation",
    "Pneumonia",
    "Atelectasis",
    "Pneumothorax",
    "Pleural Effusion",
    "Pleural Other",
    "Fracture",
    "Support Devices",
)
PATHOLOGIES = tuple(f for f in FINDINGS if f not in ("No Finding", "Support Devices"))
PAPER_HEADS = ("Pleural Effusion", "Cardiomegaly", "No Finding", "Support Devices")

PRESENT, ABSENT, UNCERTAIN = 1.0, 0.0, -1.0  # blank = NaN = not mentioned

UNCERTAIN_POLICIES = {"zeros": ABSENT, "ones": PRESENT, "ignore": np.nan, "mention": UNCERTAIN}
BLANK_POLICIES = {"absent": ABSENT, "missing": np.nan}


class LabelError(ValueError):
    """A label name or value that is not one of the vocabulary."""


def resolve_labels(
    labels: pd.DataFrame, uncertain: str = "ones", blank: str = "absent"
) -> pd.DataFrame:
    """Apply the policies for uncertain and blank labels.

    labels: DataFrame of finding columns with values 1, 0, -1, NaN; returns float32, same columns.
    uncertain: zeros (-1 becomes 0), ones (1), ignore (NaN) or mention (stays -1).
    blank: absent (NaN becomes 0) or missing (stays NaN); an ignored -1 is NaN under both.
    Raises LabelError for any other value or policy.
    """
    _check_policy("uncertain", uncertain, UNCERTAIN_POLICIES)
    _check_policy("blank", blank, BLANK_POLICIES)
    check_labels(labels)
    values = labels.to_numpy(dtype=np.float32, na_value=np.nan)
    resolved = np.where(np.isnan(values), BLANK_POLICIES[blank], values)
    resolved = np.where(values == UNCERTAIN, UNCERTAIN_POLICIES[uncertain], resolved)
    return pd.DataFrame(resolved.astype(np.float32), index=labels.index, columns=labels.columns)


def known_labels(table: pd.DataFrame, heads: Iterable) -> np.ndarray:
    """Labels (N, K) of some findings as a classifier takes them: 1, 0, or NaN where uncertain."""
    labels = table[list(heads)].to_numpy(dtype=np.float32, na_value=np.nan)
    return np.where(labels == UNCERTAIN, np.float32(np.nan), labels)


def _check_policy(name, value, allowed):
    if value not in allowed:
        raise LabelError(f"{name} is {value!r}; it must be one of {', '.join(allowed)}.")


def invalid_labels(labels: pd.DataFrame) -> pd.DataFrame:
    """Mark the cells that are neither 1, 0, -1 nor blank (boolean frame of the same shape)."""
    return labels.notna() & ~labels.isin([PRESENT, ABSENT, UNCERTAIN])


def check_labels(labels: pd.DataFrame) -> None:
    """Raise LabelError, naming column, value and row, at the first value that is not a label."""
    invalid = invalid_labels(labels)
    if not invalid.to_numpy().any():
        return
    row, column = np.argwhere(invalid.to_numpy())[0]
    raise LabelError(
        f"{labels.columns[column]} is {labels.iat[row, column]} in row {labels.index[row]}; "
        "a label is 1 (present), 0 (absent), -1 (uncertain) or blank (not mentioned)."
    )


def no_finding(labels: dict | pd.Series) -> float:
    """Say what a film's "No Finding" must be: 1 if no pathology is present or uncertain, else 0.

    Support devices do not count. NaN where not one pathology is known.
    """
    values = pd.array([labels.get(name, np.nan) for name in PATHOLOGIES], float).to_numpy()
    if np.isin(values, (PRESENT, UNCERTAIN)).any():
        return float(ABSENT)
    return np.nan if np.isnan(values).all() else float(PRESENT)


def slug(finding: str) -> str:
    """Turn a finding into a file or key name: "Pleural Effusion" becomes "pleural_effusion"."""
    return re.sub(r"[^a-z0-9]+", "_", finding.lower()).strip("_")


_BY_SLUG = {slug(finding): finding for finding in FINDINGS}


def is_finding(text: str) -> bool:
    """Say whether the text names one of the 14 findings, in any case and with any separator."""
    return slug(str(text)) in _BY_SLUG


def finding_from(text: str) -> str:
    """Return the finding a text names ("pleural_effusion", "PLEURAL EFFUSION", ...).

    Raises LabelError with the nearest name for anything else.
    """
    if not is_finding(text):
        raise LabelError(
            f"{text!r} is not a finding; the nearest is {nearest(str(text), FINDINGS)!r}. "
            f"Choose one of: {', '.join(FINDINGS)}."
        )
    return _BY_SLUG[slug(str(text))]


def nearest(name: str, names: Iterable) -> str:
    """Return the one of names that is spelled most like name ("" if there are none)."""
    by_key = {str(other).lower(): str(other) for other in names}
    found = difflib.get_close_matches(name.lower(), by_key, n=1, cutoff=0.0)
    return by_key[found[0]] if found else ""
