"""Labels CSV + image folder -> one table of usable films, split by patient (sections 2.1, 3.1).

A row is a film: film_id, path (under image_root), patient_id, split, Sex, Age, view and the 14
findings after the label policies (findings.py). A bad row or file never stops the reading: it goes
to `rejected` with its reason; a filter (not frontal, max_films) counts what it removes.
The paper splits images; here no patient is in two splits.
Used by notebook 01, which writes the cohort into the run folder, and read by 02 to 06.
"""

import functools
import hashlib
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd

from prism_nb.columns import CohortError, reject
from prism_nb.files import atomic_path, read_json, write_json
from prism_nb.findings import FINDINGS, PAPER_HEADS, PRESENT, known_labels, resolve_labels
from prism_nb.images import ImageError, check_image, load_films
from prism_nb.layouts import LAYOUTS, read_labels

VIEWS = ("frontal", "all")
COLUMNS = ("film_id", "path", "patient_id", "split", "Sex", "Age", "view", *FINDINGS)
REJECTED = {"row": "int64", "path": "str", "reason": "str"}
TABLE1_ROWS = {"Train": "train", "Validation": "val", "Test": "test"}
DECODE_UP_TO = 20_000  # films; of a larger set only the head and the end of each is looked at
ENDINGS = ("", ".png", ".jpg", ".dcm", ".dicom")  # "": as the CSV says


@dataclass
class Cohort:
    """The films of a study, what was turned away and why, and the settings that chose them."""

    table: pd.DataFrame  # COLUMNS
    rejected: pd.DataFrame  # row (line in the CSV), path, reason
    image_root: Path
    settings: dict = field(default_factory=dict)
    counts: dict = field(default_factory=dict)  # filter -> rows it removed

    def films(self, rows: pd.DataFrame | None = None) -> np.ndarray:
        """Films of some rows of the table, of all by default: uint8 (N, size, size)."""
        paths = [self.image_root / path for path in (self.table if rows is None else rows)["path"]]
        return load_films(paths, self.settings["image_size"], self.settings["fit"])


def load_cohort(
    csv: Path | str,
    image_root: Path | str | None = None,
    layout: str = "auto",
    extra_csv: Path | str | None = None,
    views: str = "frontal",
    uncertain: str = "ones",
    blank: str = "absent",
    max_films: int = 0,
    seed: int = 0,
    check_images: bool = True,
) -> Cohort:
    """Read a labels CSV and the films it names.

    csv may also be a folder of DICOM files, which have no labels but those of extra_csv.
    image_root: folder the paths start from, the CSV's own by default. max_films: a random choice
    of so many films (0 = all), the same for the same seed. check_images=False opens no file, and
    so does not follow links either. Raises CohortError if nothing usable is left, and why.
    """
    csv = Path(csv).expanduser()
    settings = {"views": views, "uncertain": uncertain, "blank": blank}
    settings |= {"max_films": max_films, "seed": seed, "check_images": check_images}
    if views not in VIEWS:
        raise CohortError(f"views is {views!r}; it must be one of {', '.join(VIEWS)}.")
    labels = read_labels(csv, layout, extra_csv and Path(extra_csv).expanduser())
    given = _image_root(csv, image_root)
    root = given.resolve()
    raw = _place(labels, root, given)
    raw[list(FINDINGS)] = _resolve(raw, labels.blank_columns, uncertain, blank)
    films, counts = raw[raw["reason"] == ""], {}
    if views == "frontal":
        counts["not frontal"] = int((~films["frontal"]).sum())
        films = films[films["frontal"]]
    reasons = _choose(films, root, max_films, seed, check_images)
    if max_films:
        counts["max_films"] = len(films) - len(reasons)
    rejected = _rejected(raw, reasons)
    films = films.loc[reasons.index[reasons == ""]].sort_index()
    if films.empty:
        raise CohortError(_why_empty(csv, root, len(raw), counts, rejected))
    settings |= {"csv": str(csv), "layout": labels.layout, "extra_csv": str(extra_csv or "")}
    settings |= {"rows": len(raw), "notes": labels.notes}
    table = films.assign(split="")[list(COLUMNS)].reset_index(drop=True)
    return Cohort(table, rejected, root, settings, counts)


def _image_root(csv, image_root):
    root = csv if csv.is_dir() else csv.parent
    root = Path(image_root).expanduser() if image_root else root
    if not root.is_dir():
        raise CohortError(f"There is no image folder {root}; image_root must be a folder.")
    return root


def _resolve(raw, blank_columns, uncertain, blank):
    """Apply the label policies; a finding the data set never labels stays missing."""
    labels = raw[list(FINDINGS)].where(raw["reason"] == "")
    resolved = resolve_labels(labels, uncertain, "missing")
    resolved[blank_columns] = resolve_labels(labels[blank_columns], uncertain, blank)
    return resolved


def _place(labels, root, given):
    """Make paths relative to the image root, refuse those that leave it, name the films.

    given: the root before links are followed, which absolute paths may start with as well.
    """
    raw, layout = labels.raw, labels.layout
    for start in (Path(os.path.abspath(given)), root):
        raw["path"] = raw["path"].str.removeprefix(f"{start.as_posix().rstrip('/')}/")
    leaves = "the path leaves the image root:"
    for mask, reason in (
        (raw["path"].isna(), "the path is blank."),
        (raw["path"].str.contains("\0", na=False, regex=False), "a NUL character in the path."),
        (raw["path"].str.contains(r"^(?:/|[A-Za-z]:)", na=False), f"{leaves} an absolute path."),
        (raw["path"].str.contains(r"(?:^|/)\.\.(?:/|$)", na=False), f"{leaves} '..' in the path."),
    ):
        reject(raw, mask, reason)
    fine = raw["reason"] == ""
    paths, nih = raw.loc[fine, "path"], layout == "nih"
    paths = _find_nih(paths, root) if nih else _find_by_prefix(paths, root, labels.notes)
    raw.loc[fine, "path"] = paths
    first = raw.loc[fine].groupby("path")["row"].transform("first")
    again = paths.index[first != raw.loc[fine, "row"]]
    raw.loc[again, "reason"] = "the same image as in line " + first[again].astype(str) + "."
    if layout != "dicom":  # which has named its films: their paths may hold names of people
        raw["film_id"] = _film_ids(raw.loc[raw["reason"] == "", "path"], LAYOUTS[layout].film_id)
    return raw


def _find_nih(names, root):
    """Find films by name in the root, in images, or in the twelve folders of NIH's archives."""
    folders = [*sorted(root.glob("images_*")), *sorted(root.glob("images_*/images"))]
    where = {}
    for folder in [*folders, root / "images", root]:  # the later wins
        if folder.is_dir():
            prefix = folder.relative_to(root)
            where.update((name, (prefix / name).as_posix()) for name in os.listdir(folder))
    return names.map(where).fillna(names).astype("str")


def _find_by_prefix(paths, root, notes, num_probes=50):
    """Drop the leading folders the root lacks or repeats, or put a subfolder of it in front.

    Where that finds no file, with another ending: films are handed on converted. The few likeliest
    ways are tried on a sample; the one that finds most files is used for all. A subfolder that is
    put in front is noted; CohortError where two find as many (the masks of films have their names).
    """
    if paths.empty:
        return paths
    sample = paths.iloc[np.unique(np.linspace(0, len(paths) - 1, num_probes).astype(int))]

    def found(way):
        return sum(os.path.isfile(root / path) for path in _rebase(sample, *way))

    subfolders = [""]
    subfolders += [f"{each.name}/" for each in sorted(root.iterdir()) if each.is_dir()][:20]
    for ending, folders in product(ENDINGS, ([""], subfolders)):
        counts = {way: found(way) for way in product(range(4), folders, [ending])}
        most = max(counts.values())
        if not most:
            continue
        best = [way for way, count in counts.items() if count == most]
        folder, *others = dict.fromkeys(way[1].rstrip("/") for way in best)
        if others:
            raise CohortError(
                f"In {root} both {folder} and {others[0]} hold the films' names; set image_root to "
                "the one that holds the films."
            )
        if folder:
            notes.append(f"the films are read from {folder}, a folder of the image root")
        return _rebase(paths, *best[0])  # the first of equals drops least
    return paths


def _rebase(paths, drop, folder, ending):
    paths = folder + paths.str.replace(rf"^(?:[^/]+/){{{drop}}}", "", regex=True)
    return paths.str.replace(r"\.[A-Za-z0-9]+$", ending, regex=True) if ending else paths


def _film_ids(paths, start):
    """Name films by their path, without folders that say nothing: patient00001_study1_view1_...

    start: at the "path", the "patient" or the file's "name". Films in DICOM of one's own (start
    "path") are named by a hash, as their paths may hold names of people.
    """
    stems = paths.str.replace(r"\.[A-Za-z0-9]+$", "", regex=True)
    if start == "patient":
        stems = stems.str.replace(r"^.*?(patient\d+/)", r"\1", regex=True)
    if start == "name":
        stems = stems.str.replace(r"^.*/", "", regex=True)
    own = paths.str.contains(r"\.(?:dcm|dicom)$", case=False) & (start == "path")
    stems[own] = paths[own].map(lambda path: f"film_{_digest(path):016x}")
    ids = stems.str.replace(r"[^A-Za-z0-9.-]+", "_", regex=True).str.lstrip("._-")
    unclear = ids.str.lower().duplicated(keep=False) | (ids == "") | (ids.str.len() > 100)
    marks = paths[unclear].map(lambda path: f"-{_digest(path):016x}"[:9])
    ids[unclear] = ids[unclear].str.slice(0, 100) + marks
    return ids


def _digest(text):
    """Hash a text to 64 bits, the same on every machine and in every version."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def _choose(films, root, max_films, seed, check_images):
    """Look at films, in an order that seed draws, until max_films good ones are found.

    Returns the reason to reject ("" = good) of every film looked at, indexed as films.
    """
    wanted = max_films or len(films)
    keys = [_digest(f"{seed}:{film_id}") for film_id in films["film_id"]] if max_films else []
    order = films.iloc[np.argsort(keys)] if max_films else films
    reasons = pd.Series("", index=order.index[:0], dtype="str")
    while (reasons == "").sum() < wanted and len(reasons) < len(order):
        missing = wanted - int((reasons == "").sum())
        looked = order["path"].iloc[len(reasons) : len(reasons) + missing]
        faults = _faults(looked, root, decode=wanted <= DECODE_UP_TO) if check_images else ""
        reasons = pd.concat([reasons, pd.Series(faults, index=looked.index, dtype="str")])
    return reasons


def _faults(paths, root, decode):
    look = functools.partial(_fault, root=root, decode=decode)
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # decoding releases the GIL
        return list(pool.map(look, paths))


def _fault(path, root, decode):
    real = Path(os.path.realpath(root / path))
    if not real.is_relative_to(root):
        return "the path leaves the image root: a link; set image_root to where it leads."
    try:
        check_image(real, decode=decode)
    except ImageError as error:
        return error.reason
    return ""


def _rejected(raw, reasons):
    bad = pd.concat([raw.loc[raw["reason"] != "", "reason"], reasons[reasons != ""]])
    rejected = raw.loc[bad.index, ["row", "path"]].fillna({"path": ""}).assign(reason=bad)
    rejected = rejected.astype(REJECTED)
    return rejected.sort_values("row").reset_index(drop=True)


def _why_empty(csv, root, rows, counts, rejected):
    """Say which filter removed how many rows, and the commonest reason for rejecting."""
    parts = [f"filter {name!r} removed {number}" for name, number in counts.items()]
    if len(rejected):
        common = rejected["reason"].mode().iloc[0]
        line = rejected.loc[rejected["reason"] == common, "row"].iloc[0]
        parts.append(f"{len(rejected)} rejected (commonest, as in line {line}: {common})")
    return f"No film is left of {rows} rows in {csv} under {root}: {'; '.join(parts)}"


def split_by_patient(
    table: pd.DataFrame, test_share: float = 0.15, val_share: float = 0.15, seed: int = 0
) -> pd.DataFrame:
    """Put every patient into train, val or test: test_share first, then val_share of the rest.

    Depends on seed and the set of patients only, not on the order of rows. At least one patient
    is in each split; fewer than three are a CohortError. Section 3.1 (there by image).
    """
    for name, share in (("test_share", test_share), ("val_share", val_share)):
        if not 0 < share < 1:
            raise CohortError(f"{name} is {share}; it must lie between 0 and 1.")
    patients = sorted(table["patient_id"].unique(), key=lambda p: (_digest(f"{seed}:{p}"), p))
    if len(patients) < 3:
        raise CohortError(
            f"The cohort has {len(patients)} patient(s); a split needs at least 3, one each for "
            "train, val and test. Add patients, or check how they are told apart."
        )
    num_test = min(max(1, round(test_share * len(patients))), len(patients) - 2)
    num_val = min(
        max(1, round(val_share * (len(patients) - num_test))), len(patients) - num_test - 1
    )
    names = np.repeat(["test", "val"], [num_test, num_val]).tolist()
    names += ["train"] * (len(patients) - len(names))
    where = dict(zip(patients, names, strict=True))
    return table.assign(split=table["patient_id"].map(where).astype("str"))


def choose_films(table: pd.DataFrame, counts: dict[str, int], seed: int = 0) -> pd.DataFrame:
    """Pick at most so many films of each split ({"test": 48, ...}), taking captions in turn.

    Rare captions are so shown more often than they occur: every edit finds films, and shares
    among the chosen say nothing of the cohort. The same seed picks the same films.
    """
    parts = []
    for split, count in counts.items():
        films = table[table["split"] == split]
        films = films.loc[
            films["film_id"].map(lambda f: _digest(f"{seed}:{f}")).sort_values().index
        ]
        turn = films.groupby("caption").cumcount()  # 0 for the first film of every caption
        parts.append(films.loc[turn.sort_values(kind="stable").index[:count]])
    return pd.concat(parts, ignore_index=True)


def write_cohort(cohort: Cohort, folder: Path | str) -> None:
    """Write cohort.parquet, rejected.csv and, last, cohort.json into a folder, each atomically."""
    folder = Path(folder)
    with atomic_path(folder / "cohort.parquet") as path:
        cohort.table.to_parquet(path, index=False)
    with atomic_path(folder / "rejected.csv") as path:
        cohort.rejected.to_csv(path, index=False)
    root = cohort.image_root.absolute()
    if root.is_relative_to(folder.absolute()):  # a run folder may then be moved as a whole
        root = root.relative_to(folder.absolute())
    about = {"image_root": root.as_posix()}
    about |= {"settings": cohort.settings, "counts": cohort.counts}
    write_json(folder / "cohort.json", about)


def read_cohort(folder: Path | str) -> Cohort:
    """Read what write_cohort wrote; CohortError if the folder holds no whole cohort."""
    folder = Path(folder)
    for name in ("cohort.json", "cohort.parquet", "rejected.csv"):
        if not (folder / name).is_file():
            raise CohortError(f"There is no {name} in {folder}; run 01_caption first.")
    about = read_json(folder / "cohort.json")
    return Cohort(
        pd.read_parquet(folder / "cohort.parquet"),
        pd.read_csv(folder / "rejected.csv", dtype=REJECTED, keep_default_na=False),
        folder / about["image_root"],
        about["settings"],
        about["counts"],
    )


def table1(table: pd.DataFrame) -> pd.DataFrame:
    """Count the films that show each finding, a row a split: the paper's Table 1, and the rest.

    Columns: the paper's four heads, the other findings, films, patients.
    """
    columns = [*PAPER_HEADS, *(name for name in FINDINGS if name not in PAPER_HEADS)]
    parts = {name: table[table["split"] == split] for name, split in TABLE1_ROWS.items()}
    rows = {
        name: (part[columns] == PRESENT).sum().to_dict()
        | {"films": len(part), "patients": part["patient_id"].nunique()}
        for name, part in (parts | {"Total": table}).items()
    }
    return pd.DataFrame.from_dict(rows, orient="index").astype(int)


def cooccurrence(table: pd.DataFrame, names: Iterable = FINDINGS) -> pd.DataFrame:
    """Give P(column | row) for each pair of findings, or of other columns of labels: in [0, 1].

    Among the films where the row's is present and the column's is known (uncertain is not), the
    share where the column's is present too; NaN where there is no such film.
    """
    names = list(names)
    labels = known_labels(table, names)  # (N, K)
    present, known = (labels == PRESENT).astype(float), (~np.isnan(labels)).astype(float)
    with np.errstate(invalid="ignore"):
        shares = (present.T @ present) / (present.T @ known)
    return pd.DataFrame(shares, index=names, columns=names)
