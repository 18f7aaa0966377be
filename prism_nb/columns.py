"""Cells of a labels CSV -> values: text, labels, sexes, ages, paths, and the fault of a bad row.

The raw table has a row a film: row (record in the CSV, whose header is 1), path, key (what further
labels are joined on), patient_id, Sex, Age, view, frontal, the 14 labels as 1, 0, -1 or NaN
(blank), and the reason to reject it ("" = none). A bad cell never stops the reading: it gives its
row a reason. Used by layouts.py.
"""

import re
import warnings
from pathlib import Path

import numpy as np
import pandas as pd

from prism_nb.dicom import AGE_UNITS
from prism_nb.files import one_line
from prism_nb.findings import invalid_labels


class CohortError(ValueError):
    """A cohort that cannot be read, split or used, and what to do about it."""


def read_table(path, what):
    """Read a CSV (or a JSON object a line) as text, stripped; the index keeps the order of rows."""
    path = Path(path)
    if not path.is_file():
        raise CohortError(f"There is no {what} at {path}; check the path.")
    try:
        table = _read_json(path) if path.suffix in (".json", ".jsonl") else _read_csv(path)
    except (pd.errors.EmptyDataError, pd.errors.ParserError, pd.errors.ParserWarning) as error:
        why = f"{path} is not a CSV that can be read ({one_line(error)}); repair it."
        raise CohortError(why) from None
    except (OSError, EOFError, ValueError) as error:  # a UnicodeDecodeError is a ValueError
        raise CohortError(f"{path} cannot be read ({error}); save it as UTF-8 text.") from None
    table.columns = table.columns.str.strip()
    double = table.columns[table.columns.duplicated()]
    if len(double):
        raise CohortError(f"{path} has two columns {double[0]!r}; keep one of them.")
    table = table.dropna(how="all")
    if table.empty:
        raise CohortError(f"{path} has a header but no rows; a film a row is needed.")
    return table.apply(lambda column: column.str.strip()).replace("", np.nan)


def _read_csv(path):
    """Read every cell as text, without the reports: they are most of the bytes, and not needed."""
    options = {"index_col": False, "skip_blank_lines": False, "encoding": "utf-8-sig"}
    with warnings.catch_warnings():
        warnings.simplefilter("error", pd.errors.ParserWarning)
        header = pd.read_csv(path, header=None, nrows=1, dtype=str, **options).iloc[0].str.strip()
        kept = header[~header.str.match(r"report$|section_", case=False, na=False)]
        # Without usecols too long a row is an error.
        chosen = list(kept.index) if len(kept) < len(header) else None
        table = pd.read_csv(path, dtype=str, usecols=chosen, **options)
    # Names as they are written: pandas calls a second Edema Edema.1.
    table.columns = np.where(kept.isin(["", np.nan]), table.columns, kept)
    return table


def _read_json(path):
    table = pd.read_json(path, lines=True, dtype=False)
    return table.apply(lambda column: column.astype("str"))


def raw_table(table, path, patient, view, frontal, key=None):
    """Start the raw table; the labels follow. What is no PA or AP has no view, frontal or not."""
    raw = pd.DataFrame(index=table.index)
    raw["path"] = _posix(path)
    raw["key"] = raw["path"] if key is None else key
    raw["patient_id"] = patient
    raw["Sex"] = _sex(first_of(table, "Sex", "sex", "Patient Gender", "Patient Sex"))
    raw["Age"] = _age(first_of(table, "Age", "age", "Patient Age"))
    raw["view"] = view.where(view.isin(["PA", "AP"]), "")
    raw["frontal"] = frontal
    raw["reason"] = ""
    return raw


def join_key(table, columns):
    """What labels are joined on: paths as in the raw table, or several columns as one text."""
    first, *others = columns
    key = _posix(table[first])
    for name in others:
        key = key + "/" + table[name]
    return key


def label_values(cells, finding, raw):
    """Turn text cells into label values; a cell that is no label marks its row for rejection."""
    values = pd.to_numeric(cells, errors="coerce").astype(float)
    wrong = cells.notna() & (values.isna() | invalid_labels(values.to_frame()).iloc[:, 0])
    said = f"{finding} is " + cells[wrong].astype("str") + "; a label is 1, 0, -1 or blank."
    reject(raw, wrong, said)
    return values.where(~wrong)


def reject(raw, mask, reason):
    """Give the marked rows a reason (one text, or a text a row), unless they have one already."""
    mask = mask & (raw["reason"] == "")
    if mask.any():
        raw.loc[mask, "reason"] = reason if isinstance(reason, str) else reason[mask]


def first_of(table, *names):
    """Return the first of the named columns that is there, or a blank one."""
    found = [name for name in names if name in table.columns]
    return table[found[0]] if found else pd.Series(np.nan, index=table.index, dtype="str")


def _sex(cells):
    words = {"m": "Male", "male": "Male", "f": "Female", "female": "Female"}
    return cells.str.lower().map(words).fillna("").astype("str")


def _age(cells):
    """Years as a number; NIH's first release writes 061Y and, of children, 013M or 090D."""
    parts = cells.str.extract(r"^(\d+(?:\.\d+)?)([YMWDymwd]?)")
    units = parts[1].str.upper().map(AGE_UNITS).fillna(1)
    return pd.to_numeric(parts[0]).astype(float) / units


def _posix(paths):
    """Paths with forward slashes, none doubled, none leading "./"."""
    paths = paths.str.replace("\\", "/", regex=False)
    paths = paths.str.replace(re.compile(r"/{2,}|/(?:\./)+"), "/", regex=True)
    return paths.str.replace(re.compile(r"^(?:\./)+"), "", regex=True)
