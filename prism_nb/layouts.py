"""Labels CSV -> one raw table, whatever the data set calls its columns.

Three layouts: CheXpert (`Path, Sex, Age, Frontal/Lateral, AP/PA` and 14 labels), NIH ChestX-ray14
(`Image Index, Finding Labels, Patient ID, ...`) and a plain CSV (`path` and any of the findings).
The raw table has a row a film: row (line in the CSV, the header is line 1), path, patient_id,
Sex, Age, view, frontal, the 14 labels as 1, 0, -1 or NaN, and the reason to reject it ("" = none).
Nothing here touches an image. Used by cohort.py.
"""

import re
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd

from prism_nb.findings import FINDINGS, finding_from, invalid_labels, is_finding, nearest, slug

LAYOUTS = ("auto", "chexpert", "nih", "plain")
IMAGE_COLUMN = {"chexpert": "Path", "nih": "Image Index", "plain": "path"}
CHEXPERT_NEEDS = ("Path", "Frontal/Lateral", *FINDINGS)
NIH_NEEDS = ("Image Index", "Finding Labels", "Patient ID")

NIH_FINDINGS = {  # NIH's label -> CheXpert's; None: no home among the 14
    "No Finding": "No Finding",
    "Atelectasis": "Atelectasis",
    "Cardiomegaly": "Cardiomegaly",
    "Consolidation": "Consolidation",
    "Edema": "Edema",
    "Effusion": "Pleural Effusion",
    "Infiltration": "Lung Opacity",
    "Mass": "Lung Lesion",
    "Nodule": "Lung Lesion",
    "Pleural_Thickening": "Pleural Other",
    "Pneumonia": "Pneumonia",
    "Pneumothorax": "Pneumothorax",
    "Emphysema": None,
    "Fibrosis": None,
    "Hernia": None,
}
NIH_UNLABELLED = ("Enlarged Cardiomediastinum", "Fracture", "Support Devices")


class CohortError(ValueError):
    """A cohort that cannot be read, split or used, and what to do about it."""


@dataclass
class Labels:
    """A labels CSV as read: the raw table, its layout, and what was assumed on the way."""

    raw: pd.DataFrame
    layout: str
    blank_columns: list  # the policy for blanks holds here; elsewhere NaN means never labelled
    notes: list = field(default_factory=list)


def read_labels(csv: Path, layout: str = "auto", extra_csv: Path | None = None) -> Labels:
    """Read a labels CSV of any layout, and further labels from extra_csv.

    extra_csv is joined on the image column; its columns that name a finding fill that finding
    (a value there wins over the main CSV, a blank changes nothing).
    Raises CohortError for a missing or unreadable file, a missing column, an unknown layout.
    """
    if layout not in LAYOUTS:
        raise CohortError(f"layout is {layout!r}; it must be one of {', '.join(LAYOUTS)}.")
    table = _read_csv(csv, "labels CSV")
    layout = _detect(table.columns) if layout == "auto" else layout
    labels = {"chexpert": _chexpert, "nih": _nih, "plain": _plain}[layout](table, Path(csv))
    labels.raw.insert(0, "row", table.index + 2)
    if extra_csv:
        _fill_from(labels, Path(extra_csv))
    return labels


def _read_csv(path, what):
    """Read a CSV as text, every cell stripped, blank lines dropped; the index keeps line order."""
    path = Path(path)
    if not path.is_file():
        raise CohortError(f"There is no {what} at {path}; check the path.")
    options = {"dtype": str, "index_col": False, "skip_blank_lines": False}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", pd.errors.ParserWarning)
            table = pd.read_csv(path, encoding="utf-8-sig", **options)
    except (pd.errors.EmptyDataError, pd.errors.ParserError, pd.errors.ParserWarning) as error:
        reason = str(error).strip().splitlines()[0]
        raise CohortError(f"{path} is not a CSV that can be read ({reason}); repair it.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise CohortError(f"{path} cannot be read ({error}); save it as UTF-8 text.") from None
    table.columns = table.columns.str.strip()
    table = table.dropna(how="all")
    if table.empty:
        raise CohortError(f"{path} has a header but no rows; a film a row is needed.")
    return table.apply(lambda column: column.str.strip()).replace("", np.nan)


def _detect(columns):
    """Tell the layout from the columns, tolerating one that is missing or misspelt."""
    labels = sum(name in columns for name in FINDINGS)
    chexpert = sum(name in columns for name in ("Path", "Frontal/Lateral", "AP/PA"))
    nih = sum(name in columns for name in (*NIH_NEEDS, "View Position"))
    if chexpert + (labels >= len(FINDINGS) // 2) >= 2:
        return "chexpert"
    return "nih" if nih >= 2 else "plain"


def _need(columns, names, csv, layout):
    for name in names:
        if name not in columns:
            raise CohortError(
                f"{csv} has no column {name!r}; the nearest present is "
                f"{nearest(name, columns)!r}. The {layout} layout needs: {', '.join(names)}."
            )


def _raw(table, path, patient, view, frontal):
    """Start the raw table; the labels follow."""
    raw = pd.DataFrame(index=table.index)
    raw["path"] = _posix(path)
    raw["patient_id"] = patient
    raw["Sex"] = _sex(_first_of(table, "Sex", "Patient Gender", "Patient Sex"))
    raw["Age"] = _age(_first_of(table, "Age", "Patient Age"))
    raw["view"] = view.where(view.isin(["PA", "AP"]), "")
    raw["frontal"] = frontal
    raw["reason"] = ""
    return raw


def _chexpert(table, csv):
    """CheXpert's columns; the patient only exists in the path (patientNNNNN)."""
    _need(table.columns, CHEXPERT_NEEDS, csv, "chexpert")
    patient = table["Path"].str.extract(r"(patient\d+)", expand=False)
    frontal = table["Frontal/Lateral"].str.lower() == "frontal"
    raw = _raw(table, table["Path"], patient, _first_of(table, "AP/PA"), frontal)
    _reject(raw, patient.isna() & table["Path"].notna(), "the path names no patientNNNNN.")
    for finding in FINDINGS:
        raw[finding] = _numbers(table[finding], finding, raw)
    return Labels(raw, "chexpert", list(FINDINGS))


def _nih(table, csv):
    """NIH ChestX-ray14: labels joined by "|", each film labelled for each of NIH's classes.

    Emphysema, Fibrosis and Hernia have no home among the 14: such a film is not "No Finding", and
    nothing more is known of it. What NIH never labels stays NaN under every policy: Enlarged
    Cardiomediastinum, Fracture, Support Devices. So does Lung Opacity unless Infiltration or No
    Finding is listed, for an opacity may be there under another name (consolidation, mass, ...).
    """
    _need(table.columns, NIH_NEEDS, csv, "nih")
    view = _first_of(table, "View Position").str.upper()
    raw = _raw(table, table["Image Index"], table["Patient ID"], view, True)
    _reject(raw, raw["patient_id"].isna(), "Patient ID is blank.")
    codes, texts = pd.factorize(table["Finding Labels"].fillna(""))
    rows, faults = zip(*(_nih_row(text) for text in texts), strict=True)  # few texts are distinct
    raw[list(FINDINGS)] = np.array(rows)[codes]
    faults = pd.Series(np.array(faults, dtype=object)[codes], index=raw.index)
    _reject(raw, faults != "", faults)
    notes = ["nih: labels that the collection does not have are missing, not absent"]
    return Labels(raw, "nih", [], notes)


def _nih_row(text):
    """Turn "Effusion|Mass" into 14 values and a fault ("" = none)."""
    names = [name.strip().replace(" ", "_") for name in text.split("|")]
    known = {slug(name): finding for name, finding in NIH_FINDINGS.items()}
    for name in names:
        if slug(name) not in known:
            near = nearest(name, NIH_FINDINGS)
            fault = f"Finding Labels says {name!r}; the nearest NIH label is {near!r}."
            return [np.nan] * len(FINDINGS), fault if text else "Finding Labels is blank."
    present = {known[slug(name)] for name in names}
    values = {finding: float(finding in present) for finding in FINDINGS}
    values.update(dict.fromkeys(NIH_UNLABELLED, np.nan))
    if not present & {"Lung Opacity", "No Finding"}:
        values["Lung Opacity"] = np.nan
    return list(values.values()), ""


def _plain(table, csv):
    """A path column, optionally patient, sex, age and view, and findings in any spelling."""
    table = table.rename(columns={name: _plain_name(name) for name in table.columns})
    double = table.columns[table.columns.duplicated()]
    if len(double):
        raise CohortError(f"{csv} has two columns that mean {double[0]!r}; keep one of them.")
    _need(table.columns, ["path"], csv, "plain")
    findings = [name for name in FINDINGS if name in table.columns]
    if not findings:
        raise CohortError(f"{csv} has no column that names a finding, such as {FINDINGS[10]!r}.")
    notes = []
    patient = _first_of(table, "patient")
    if "patient" not in table.columns:
        patient = table["path"].str.extract(r"(patient\d+)", expand=False)
        notes.append("plain: no patient column; patientNNNNN in the path, else a patient a film")
    view = _first_of(table, "view").str.upper()
    if "view" not in table.columns:
        notes.append("plain: no view column; every film is taken to be frontal")
    frontal = view.isna() | view.isin(["PA", "AP", "FRONTAL"])
    own = "film_" + table["path"]
    raw = _raw(table, table["path"], patient.fillna(own), view, frontal)
    for finding in FINDINGS:
        given = finding in findings
        raw[finding] = _numbers(table[finding], finding, raw) if given else np.nan
    return Labels(raw, "plain", findings, notes)


def _plain_name(name):
    if is_finding(name):
        return finding_from(name)
    alias = {"patient_id": "patient", "sex": "Sex", "gender": "Sex", "age": "Age"}
    return alias.get(slug(name), slug(name))


def _fill_from(labels, csv):
    """Lay the finding columns of an extra CSV over the raw table, joined on the image column."""
    extra = _read_csv(csv, "extra CSV")
    key = IMAGE_COLUMN[labels.layout]
    if labels.layout == "plain":
        extra = extra.rename(columns={name: _plain_name(name) for name in extra.columns})
    _need(extra.columns, [key], csv, "extra CSV's")
    columns = {name: finding_from(name) for name in extra.columns if is_finding(name)}
    if not columns:
        raise CohortError(f"{csv} has no column that names a finding; it would add nothing.")
    extra = extra.dropna(subset=[key]).assign(**{key: lambda table: _posix(table[key])})
    double = extra.loc[extra[key].duplicated(), key]
    if len(double):
        raise CohortError(f"{csv} names {double.iloc[0]!r} twice; keep one row an image.")
    raw = labels.raw
    matched = raw["path"].isin(extra[key])
    if not matched.any():
        raise CohortError(f"{csv} has no image in common with the labels CSV; compare {key!r}.")
    for name, finding in columns.items():
        cells = extra.set_index(key)[name].reindex(raw["path"]).set_axis(raw.index)
        raw[finding] = _numbers(cells, finding, raw).fillna(raw[finding])
    labels.notes.append(
        f"extra: {', '.join(columns.values())} for {matched.sum()} of {len(raw)} rows"
    )


def _numbers(cells, finding, raw):
    """Turn text cells into label values; a cell that is no label marks its row for rejection."""
    values = pd.to_numeric(cells, errors="coerce").astype(float)
    wrong = cells.notna() & (values.isna() | invalid_labels(values.to_frame()).iloc[:, 0])
    said = f"{finding} is " + cells.fillna("") + "; a label is 1, 0, -1 or blank."
    _reject(raw, wrong, said)
    return values.where(~wrong)


def _reject(raw, mask, reason):
    """Give the marked rows a reason, unless they have one already."""
    mask = mask & (raw["reason"] == "")
    if mask.any():
        raw["reason"] = raw["reason"].mask(mask, reason)


def _first_of(table, *names):
    """Return the first of the named columns that is there, or a blank one."""
    found = [name for name in names if name in table.columns]
    return table[found[0]] if found else pd.Series(np.nan, index=table.index, dtype="str")


def _sex(cells):
    words = {"m": "Male", "male": "Male", "f": "Female", "female": "Female"}
    return cells.str.lower().map(words).fillna("").astype("str")


def _age(cells):
    """Years as a number; NIH's first release writes 061Y."""
    return pd.to_numeric(cells.str.extract(r"^(\d+(?:\.\d+)?)", expand=False)).astype(float)


def _posix(paths):
    """Paths with forward slashes, none doubled, none leading "./"."""
    paths = paths.str.replace("\\", "/", regex=False)
    paths = paths.str.replace(re.compile(r"/{2,}|/(?:\./)+"), "/", regex=True)
    return paths.str.replace(re.compile(r"^(?:\./)+"), "", regex=True)
