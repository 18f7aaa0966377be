"""Labels CSV -> one raw table, whatever the data set calls its columns.

LAYOUTS, at the end, is the table of what sets the data sets apart; one short function each turns
its columns into ours (columns.py says what the raw table holds). What a data set labels in its own
words becomes CheXpert's 14 findings; what it never labels stays missing under every policy.
Nothing here touches an image, but for the headers of a folder of DICOM. Used by cohort.py.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd

from prism_nb import dicom
from prism_nb.columns import (
    CohortError,
    first_of,
    join_key,
    label_values,
    raw_table,
    read_table,
    reject,
)
from prism_nb.findings import FINDINGS, finding_from, is_finding, nearest, slug

SYNONYMS = {  # finding -> what NIH or VinDr-CXR call it, where they do not use the same words
    "Fracture": ("clavicle_fracture", "rib_fracture"),
    "Lung Opacity": ("ild", "infiltration"),
    "Lung Lesion": ("lung_cavity", "lung_tumor", "mass", "nodule", "nodule_mass"),
    "Pleural Effusion": ("effusion",),
    "Pleural Other": ("pleural_thickening",),
}
NIH_LABELS = ("Atelectasis", "Cardiomegaly", "Consolidation", "Edema", "Effusion", "Emphysema")
NIH_LABELS += ("Fibrosis", "Hernia", "Infiltration", "Mass", "No Finding", "Nodule")
NIH_LABELS += ("Pleural_Thickening", "Pneumonia", "Pneumothorax")
NIH_UNLABELLED = ("Enlarged Cardiomediastinum", "Fracture", "Support Devices")
VINDR_BOXED = ("No Finding", "Cardiomegaly", "Lung Opacity", "Lung Lesion", "Consolidation")
VINDR_BOXED += ("Atelectasis", "Pneumothorax", "Pleural Effusion", "Pleural Other")
PADCHEST_FINDINGS = {  # finding -> those of PadChest's 193 labels that mean it (whole label)
    "No Finding": "normal",
    "Enlarged Cardiomediastinum": "(superior )?mediastinal enlargement",
    "Cardiomegaly": "cardiomegaly",
    "Lung Opacity": "infiltrates|increased density|miliary opacities|air bronchogram"
    "|.*(interstitial|alveolar|ground glass) pattern",
    "Lung Lesion": "nodule|multiple nodules|pulmonary mass|cavitation|lung metastasis",
    "Edema": "pulmonary edema",
    "Consolidation": "consolidation",
    "Pneumonia": "(atypical )?pneumonia",
    "Atelectasis": ".*atelectasis.*",
    "Pneumothorax": "(hydro)?pneumothorax",
    "Pleural Effusion": "(loculated )?(pleural|fissural) effusion|hydropneumothorax|empyema",
    "Pleural Other": ".*pleural (thickening|plaques|mass)",
    "Fracture": ".*fracture",
    "Support Devices": ".* (tube|device|stent)|.*catheter.*|pacemaker|dai|artificial.* heart valve"
    "|osteosynthesis material|(humeral |aortic endo|endo)?prosthesis",
}
PLAIN_NAMES = {  # what a plain CSV may call a column, in small letters -> ours
    "patient": "patient_id|patientid",
    "Sex": "sex|gender|patient_sex|patientsex|patient_gender",
    "Age": "age|patient_age|patientage",
}
SECOND_NAMES = {  # what it may call them where nothing bears those names
    "patient": ("subject_id", "subjectid"),
    "view": ("viewposition", "view_position", "projection"),
}
PADCHEST_SAYS_NOTHING = {"", "unchanged", "suboptimal study"}


@dataclass
class Labels:
    """A labels CSV as read: the raw table, its layout, and what was assumed on the way."""

    raw: pd.DataFrame
    blank_columns: list  # the policy for blanks holds here; elsewhere NaN means never labelled
    notes: list = field(default_factory=list)
    layout: str = ""


def read_labels(csv: Path, layout: str = "auto", extra_csv: Path | None = None) -> Labels:
    """Read a labels CSV of any layout, or the headers of a folder of DICOM, and further labels.

    extra_csv is joined on the layout's key; its columns that name a finding fill that finding
    (a value there wins over the main CSV, a blank changes nothing).
    Raises CohortError for a missing or unreadable file, a missing column, an unknown layout.
    """
    csv = Path(csv)
    if layout not in ("auto", *LAYOUTS):
        raise CohortError(f"layout is {layout!r}; it must be one of auto, {', '.join(LAYOUTS)}.")
    if csv.is_dir():
        if layout not in ("auto", "dicom"):
            raise CohortError(f"{csv} is a folder; the {layout} layout needs a CSV.")
        layout, labels = "dicom", _dicom(csv)
    elif layout == "dicom":
        raise CohortError(f"{csv} is no folder; the dicom layout needs a folder of DICOM files.")
    else:
        table = read_table(csv, "labels CSV")
        layout = _detect(table.columns) if layout == "auto" else layout
        if layout != "plain":  # which spells its columns as it likes
            _need(table.columns, LAYOUTS[layout].columns(table.columns), csv, layout)
        labels = LAYOUTS[layout].read(table, csv)
    labels.layout = layout
    labels.raw.insert(0, "row", labels.raw.index + 2)
    if extra_csv:
        _fill_from(labels, Path(extra_csv))
    return labels


def _detect(columns):
    """Tell the layout from the columns, tolerating one that is missing or misspelt."""
    if "path" in columns:  # a word that no data set uses
        return "plain"
    marked = {name: layout for name, layout in LAYOUTS.items() if layout.marks}
    shares = {name: _share(each.columns(columns), columns) for name, each in marked.items()}
    best = max(shares, key=shares.get)
    return best if shares[best] > 0.5 else "plain"


def _share(names, columns):
    return sum(name in columns for name in names) / len(names)


def _need(columns, names, csv, who):
    """Raise CohortError if a column is missing: it is misspelt, or the CSV another data set's.

    who: the layout, or another word for what needs the columns.
    """
    missing = next((name for name in names if name not in columns), "")
    if not missing:
        return
    start = f"{csv} has no column {missing!r}; "
    likely = _detect(columns)
    if who in LAYOUTS and likely not in ("plain", who):
        raise CohortError(f"{start}it looks like {likely}: set layout to {likely} or auto.")
    raise CohortError(
        f"{start}the nearest present is {nearest(missing, columns)!r}. "
        f"The {who} layout needs: {', '.join(names)}."
    )


def _chexpert(table, csv):
    """CheXpert v1.0 and -small: the patient only exists in the path (patientNNNNN).

    "Frontal/Lateral" decides what is frontal: 17 frontal films have LL or RL as AP/PA.
    """
    patient = table["Path"].str.extract(r"(patient\d+)", expand=False)
    frontal = table["Frontal/Lateral"].str.lower() == "frontal"
    raw = raw_table(table, table["Path"], patient, table["AP/PA"], frontal)
    reject(raw, patient.isna() & table["Path"].notna(), "the path names no patientNNNNN.")
    _need(table.columns, FINDINGS, csv, "chexpert")
    _read_columns(raw, table)
    return Labels(raw, list(FINDINGS))


def _read_columns(raw, table):
    for finding in FINDINGS:
        raw[finding] = label_values(table[finding], finding, raw)


def _chexpert_plus(table, csv):
    """CheXpert Plus: films in the CSV, CheXbert's labels of their reports in a file of JSON lines.

    Of the three files that of the impression is read: the findings' calls every film normal, the
    whole report's tells of earlier films as well.
    """
    found = csv.with_name("impression_fixed.json")
    found = found if found.is_file() else csv.parent / "chexbert_labels" / found.name
    frontal = table["frontal_lateral"].str.lower() == "frontal"
    view, patient = first_of(table, "ap_pa"), table["deid_patient_id"]
    raw = raw_table(table, table["path_to_image"], patient, view, frontal)
    reject(raw, patient.isna(), "deid_patient_id is blank.")
    return _with_labels(raw, read_table(found, "file of labels"), found, "path_to_image")


def _mimic(table, csv):
    """MIMIC-CXR-JPG: films in the metadata CSV, labels a study in the chexpert or negbio CSV.

    Either of the two is given; the other lies beside it, packed or not. Only PA and AP are frontal:
    views such as LATERAL, AP AXIAL or none are not. Sex and age stand in MIMIC-IV, not here.
    """
    is_films = "dicom_id" in table.columns
    swap = ("-metadata", "-chexpert") if is_films else (r"-(chexpert|negbio)", "-metadata")
    other = csv.with_name(re.sub(*swap, csv.name.removesuffix(".gz")))
    other = other if other.is_file() else other.with_name(f"{other.name}.gz")
    pair = {csv: table, other: read_table(other, "other half of MIMIC-CXR-JPG, a CSV")}
    films_csv, labels_csv = (csv, other) if is_films else (other, csv)
    films = pair[films_csv]
    _need(films.columns, LAYOUTS["mimic"].columns(["dicom_id"]), films_csv, "mimic")
    subject, study = "p" + films["subject_id"], "s" + films["study_id"]
    path = "files/" + subject.str[:3] + "/" + subject + "/" + study + "/" + films["dicom_id"]
    view, key = films["ViewPosition"].str.upper(), join_key(films, ("subject_id", "study_id"))
    raw = raw_table(films, path + ".jpg", subject, view, view.isin(["PA", "AP"]), key)
    return _with_labels(raw, pair[labels_csv], labels_csv, "subject_id", "study_id")


def _with_labels(raw, labels, csv, *key):
    """Give films the labels that stand in a table of their own, and reject those without any."""
    labels = _by_key(labels, key, csv, "labels'")
    _need(labels.columns, FINDINGS, csv, "labels'")
    unused = int((~labels.index.isin(raw["key"])).sum())
    if unused == len(labels):
        raise CohortError(f"The {unused} rows of {csv} match no film; take both of one release.")
    reject(raw, ~raw["key"].isin(labels.index), f"no labels for it in {csv.name}.")
    _read_columns(raw, labels.reindex(raw["key"]).set_axis(raw.index))
    notes = [f"{csv.name}: {unused} of {len(labels)} rows of labels match no film"]
    return Labels(raw, list(FINDINGS), notes if unused else [])


def _by_key(table, key, csv, who):
    """Index a table by the columns it is joined on; each value may occur once."""
    _need(table.columns, key, csv, who)
    table = table.dropna(subset=list(key))
    table = table.set_index(join_key(table, key))
    double = table.index[table.index.duplicated()]
    if len(double):
        raise CohortError(f"{csv} names {double[0]!r} twice; keep one row for each.")
    return table


def _nih(table, csv):
    """NIH ChestX-ray14: labels joined by "|", each film labelled for each of NIH's classes.

    Emphysema, Fibrosis and Hernia have no home among the 14: such a film is not "No Finding", and
    nothing more is known of it. What NIH never labels stays NaN under every policy: Enlarged
    Cardiomediastinum, Fracture, Support Devices. So does Lung Opacity unless Infiltration or No
    Finding is listed, for an opacity may be there under another name (consolidation, mass, ...).
    """
    view = first_of(table, "View Position").str.upper()
    raw = raw_table(table, table["Image Index"], table["Patient ID"], view, True)
    reject(raw, raw["patient_id"].isna(), "Patient ID is blank.")
    _read_lists(raw, table["Finding Labels"], _nih_row)
    return Labels(
        raw, [], ["nih: labels that the collection does not have are missing, not absent"]
    )


def _read_lists(raw, cells, read):
    """Turn cells that list a film's labels into 14 values; read gives the values and a fault."""
    codes, texts = pd.factorize(cells.fillna(""))
    rows, faults = zip(*map(read, texts), strict=True)  # few texts are distinct
    raw[list(FINDINGS)] = np.array(rows)[codes]
    faults = pd.Series(np.array(faults, dtype=object)[codes], index=raw.index)
    reject(raw, faults != "", faults)


def _nih_row(text):
    """Turn "Effusion|Mass" into 14 values and a fault ("" = none)."""
    names = [name.strip().replace(" ", "_") for name in text.split("|")]
    for name in names:
        if slug(name) not in map(slug, NIH_LABELS):
            near = nearest(name, NIH_LABELS)
            fault = f"Finding Labels says {name!r}; the nearest NIH label is {near!r}."
            return [np.nan] * len(FINDINGS), fault if text else "Finding Labels is blank."
    present = {_finding(name) for name in names}
    values = {finding: float(finding in present) for finding in FINDINGS}
    values.update(dict.fromkeys(NIH_UNLABELLED, np.nan))
    if not present & {"Lung Opacity", "No Finding"}:
        values["Lung Opacity"] = np.nan
    return list(values.values()), ""


def _finding(name):
    """The finding that NIH or VinDr-CXR mean by a name; the name itself if it has no home."""
    if is_finding(name):
        return finding_from(name)
    return next((finding for finding, names in SYNONYMS.items() if slug(name) in names), name)


def _padchest(table, csv):
    """PadChest: 16-bit PNG, labels as a Python list whose items may start with a space.

    The labels come from reports, so that what is not listed is blank, not absent.
    """
    view = table["Projection"].replace("AP_horizontal", "AP")  # AP, lying down
    year = pd.to_numeric(first_of(table, "StudyDate_DICOM").str[:4], errors="coerce")
    age = year - pd.to_numeric(first_of(table, "PatientBirth"), errors="coerce")
    table = table.assign(Age=age.astype("str"), Sex=first_of(table, "PatientSex_DICOM"))
    path = (table["ImageDir"] + "/").fillna("") + table["ImageID"]
    patient, frontal = table["PatientID"], view.isin(["PA", "AP"])
    raw = raw_table(table, path, patient, view, frontal, table["ImageID"])
    reject(raw, patient.isna(), "PatientID is blank.")
    _read_lists(raw, table["Labels"], _padchest_row)
    return Labels(raw, list(FINDINGS))


def _padchest_row(text):
    """Turn "['cardiomegaly', ' NSG tube']" into 14 values and a fault ("" = none)."""
    names = {name.strip() for name in re.findall(r"'([^']*)'", text)} - PADCHEST_SAYS_NOTHING
    if "exclude" in names or not names:
        return [np.nan] * len(FINDINGS), f"Labels says {text or 'nothing'}, so nothing is known."
    found = [any(re.fullmatch(p, name) for name in names) for p in PADCHEST_FINDINGS.values()]
    no_finding = float(names == {"normal"})  # any other label, one of the 14 or not, is a finding
    return [no_finding, *np.where(found[1:], 1.0, np.nan)], ""


def _vindr(table, csv):
    """VinDr-CXR: a row a reader (image_labels_*.csv), or a row a box of a reader; films are PA.

    A finding is present where more than half of a film's readers say so, uncertain at exactly half.
    What is no class of the file is missing under every policy. There is no patient in it.
    """
    if "class_name" in table.columns:
        found = table["class_name"].map(_finding)
        reader = [table["image_id"], first_of(table, "rad_id").fillna("all")]
        votes = pd.get_dummies(found, dtype=float).groupby(reader).max()
        labelled = {*VINDR_BOXED, *votes.columns}
    else:
        votes = table.set_index("image_id").rename(columns=_finding)
        votes = votes[[name for name in votes.columns if name in FINDINGS]]
        votes = votes.apply(pd.to_numeric, errors="coerce").fillna(0.0).T.groupby(level=0).max().T
        labelled = set(votes.columns)
    table = table.drop_duplicates("image_id").assign(view="PA")
    image = table["image_id"]
    raw = raw_table(table, image + ".dicom", "film_" + image, table["view"], True, image)
    share = votes.groupby("image_id").mean().reindex(image, columns=list(FINDINGS)).fillna(0.0)
    labels = np.select([share > 0.5, share < 0.5], [1.0, 0.0], -1.0)  # (images, 14)
    raw[list(FINDINGS)] = np.where([name in labelled for name in FINDINGS], labels, np.nan)
    return Labels(raw, [], ["vindr: no patient in the CSV; each film is taken to be a patient"])


def _plain(table, csv):
    """A path column, optionally patient, sex, age and view, and findings in any spelling."""
    given = table.columns
    table = table.rename(columns={name: _plain_name(name) for name in given})
    for ours, names in SECOND_NAMES.items():
        other = next((name for name in names if name in table.columns), None)
        if other and ours not in table.columns:
            table = table.rename(columns={other: ours})
    _refuse_double(table.columns, csv)
    _need(table.columns, ["path"], csv, "plain")
    findings = [name for name in FINDINGS if name in table.columns]
    if not findings:
        raise CohortError(f"{csv} has no column that names a finding, such as {FINDINGS[10]!r}.")
    notes = []
    patient, view = first_of(table, "patient"), first_of(table, "view").str.upper()
    blank = patient.isna()
    if "patient" not in table.columns:
        patient = table["path"].str.extract(r"(?i)(?<![a-z])(patient[ _-]?\d+)", expand=False)
        own, blank = patient.isna(), False
        _refuse_to_guess(given if own.any() else [], csv)
        patient = patient.fillna("film_" + table["path"])
        notes.append(
            f"plain: no patient column; it is patientNNNNN in the path; {own.sum()} of {len(own)} "
            "films have none, each taken to be a patient"
        )
    frontal = view.isna() | view.isin(["PA", "AP", "FRONTAL"])
    if "view" not in table.columns:
        lateral = re.compile("(?<![a-z])lateral", re.IGNORECASE)  # bilateral is no view
        frontal = ~table["path"].str.contains(lateral, na=False)
        notes.append('plain: no view column; a film is frontal unless its path says "lateral"')
    raw = raw_table(table, table["path"], patient, view, frontal)
    reject(raw, blank, "patient is blank.")
    _read_columns(raw, table.reindex(columns=list(FINDINGS)))
    return Labels(raw, findings, notes)


def _refuse_double(names, csv):
    """Raise CohortError if two columns have come by the same name."""
    double = pd.Index(names)[pd.Index(names).duplicated()]
    if len(double):
        raise CohortError(f"{csv} has two columns that mean {double[0]!r}; keep one of them.")


def _refuse_to_guess(columns, csv):
    """Raise CohortError if a column may tell patients apart: else one could be in two splits."""
    telling = [name for name in columns if re.search("patient|subject", name, re.I)]
    unused = [name for name in telling if _plain_name(name) not in PLAIN_NAMES]
    if unused:
        raise CohortError(
            f"{csv} has a column {unused[0]!r} but none called patient; rename it to patient if it "
            "tells patients apart, else drop it."
        )


def _plain_name(name):
    alias = {word: ours for ours, words in PLAIN_NAMES.items() for word in words.split("|")}
    return finding_from(name) if is_finding(name) else alias.get(slug(name), slug(name))


def _dicom(folder):
    """A folder of DICOM files, at any depth: no labels, which extra_csv may give by path.

    Films and patients are named by hashes of the files' unique ids, never by what identifies them.
    """
    headers = pd.DataFrame(dicom.describe_folder(folder))
    if headers.empty:
        raise CohortError(f"There is no DICOM file in {folder}; give a folder that holds some.")
    headers.index -= 1  # so that the first file is row 1
    view, frontal = headers["view"], headers["view"].isin(["PA", "AP", ""])
    raw = raw_table(headers, headers["path"], headers["patient_id"], view, frontal)
    raw["film_id"] = headers["film_id"]
    reject(raw, headers["reason"] != "", headers["reason"])
    raw[list(FINDINGS)] = np.nan
    nameless = ~headers["has_patient"] & (headers["reason"] == "")
    assumed = {
        "name no view and are taken to be frontal": (view == "").sum(),
        "have no PatientID; those of one study are taken to be of one patient": nameless.sum(),
    }
    return Labels(raw, [], [f"dicom: {n} files {what}" for what, n in assumed.items() if n])


def _fill_from(labels, csv):
    """Lay the finding columns of an extra CSV over the raw table, joined on the layout's key."""
    extra = read_table(csv, "extra CSV")
    key = LAYOUTS[labels.layout].key.split("|")
    used = (*key, *FINDINGS)
    names = {name: _plain_name(name) for name in extra.columns if _plain_name(name) in used}
    extra = extra.rename(columns=names)
    findings = [name for name in extra.columns if name in FINDINGS]
    _refuse_double([name for name in extra.columns if name in used], csv)
    extra = _by_key(extra, key, csv, "extra CSV's")
    if not findings:
        raise CohortError(f"{csv} has no column that names a finding; it would add nothing.")
    raw = labels.raw
    matched = raw["key"].isin(extra.index)
    if not matched.any():
        raise CohortError(
            f"{csv} has no image in common with the labels CSV; compare {', '.join(key)}."
        )
    cells = extra.reindex(raw["key"]).set_axis(raw.index)
    for finding in findings:
        raw[finding] = label_values(cells[finding], finding, raw).fillna(raw[finding])
    said = f"{', '.join(findings)} for {matched.sum()} of {len(raw)} rows"
    labels.notes.append(f"extra: {said}")


@dataclass(frozen=True)
class Layout:
    """What sets one data set apart from the others; columns are separated by "|"."""

    read: Callable | None  # (table, csv) -> Labels
    key: str  # columns that further labels are joined on
    film_id: str  # films are named by their file's "name", by their "path", or from "patient" on
    marks: str = ""  # columns it must have; one of the sets that " or " separates is enough

    def columns(self, present):
        """The set of marks of which most are among the columns present."""
        sets = [marks.split("|") for marks in self.marks.split(" or ")]
        return max(sets, key=lambda names: _share(names, present))


LAYOUTS = {
    "chexpert": Layout(_chexpert, "Path", "patient", "Path|Frontal/Lateral|AP/PA|No Finding"),
    "chexpert_plus": Layout(
        _chexpert_plus, "path_to_image", "patient", "path_to_image|frontal_lateral|deid_patient_id"
    ),
    "mimic": Layout(
        _mimic,
        (study := "subject_id|study_id"),
        "name",
        f"{study}|dicom_id|ViewPosition or {study}",
    ),
    "nih": Layout(
        _nih, "Image Index", "name", "Image Index|Finding Labels|Patient ID|View Position"
    ),
    "padchest": Layout(
        _padchest, "ImageID", "name", "ImageID|ImageDir|PatientID|Projection|Labels"
    ),
    "vindr": Layout(_vindr, "image_id", "name", "image_id|class_name or image_id|ILD|No finding"),
    "plain": Layout(_plain, "path", "path"),
    "dicom": Layout(None, "path", "own"),
}
