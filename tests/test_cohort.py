"""Cohorts: what is read, what is turned away and why, splits that never share a patient."""

import struct
import zlib
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from prism_nb import cohort as module
from prism_nb.cohort import (
    COLUMNS,
    CohortError,
    cooccurrence,
    load_cohort,
    read_cohort,
    split_by_patient,
    table1,
    write_cohort,
)
from prism_nb.findings import FINDINGS, PAPER_HEADS
from prism_nb.images import check_image, save_png

GREY = np.full((8, 8), 120, np.uint8)


def chexpert_row(path, frontal="Frontal", view="AP", **labels):
    base = {"Path": path, "Sex": "Female", "Age": 61, "Frontal/Lateral": frontal, "AP/PA": view}
    return base | {name: labels.get(name, "") for name in FINDINGS}


def write_chexpert(folder: Path, rows, images=True, prefix="CheXpert-v1.0-small/") -> Path:
    csv = folder / "train.csv"
    folder.mkdir(parents=True, exist_ok=True)
    pd.DataFrame(rows).to_csv(csv, index=False)
    for row in rows if images else []:
        save_png(folder / str(row["Path"]).removeprefix(prefix), GREY)
    return csv


def film_path(patient, study=1, name="view1_frontal.png"):
    return f"CheXpert-v1.0-small/train/patient{patient:05d}/study{study}/{name}"


@pytest.fixture
def four(tmp_path):
    """A CheXpert look-alike: three frontal films of two patients, one lateral."""
    rows = [
        chexpert_row(film_path(1), **{"Pleural Effusion": 1, "Edema": -1, "Fracture": 0}),
        chexpert_row(film_path(1, 2), view="PA", **{"Support Devices": 1.0}),
        chexpert_row(film_path(1, 2, "view2_lateral.png"), "Lateral", "", Edema=1),
        chexpert_row(film_path(2), view="LL", **{"No Finding": 1}),
    ]
    return write_chexpert(tmp_path / "data", rows)


def test_chexpert(four):
    cohort = load_cohort(four)
    table = cohort.table
    assert tuple(table.columns) == COLUMNS
    assert table["film_id"].tolist() == [
        "patient00001_study1_view1_frontal",
        "patient00001_study2_view1_frontal",
        "patient00002_study1_view1_frontal",
    ]
    assert table["path"][0] == "train/patient00001/study1/view1_frontal.png"
    assert table["patient_id"].tolist() == ["patient00001", "patient00001", "patient00002"]
    assert table["view"].tolist() == ["AP", "PA", ""]
    assert table["split"].eq("").all()
    assert table[["Pleural Effusion", "Edema", "Fracture"]].iloc[0].tolist() == [1, 1, 0]
    assert (cohort.counts, len(cohort.rejected)) == ({"not frontal": 1}, 0)
    assert all((cohort.image_root / path).is_file() for path in table["path"])
    assert cohort.settings["layout"] == "chexpert"


def test_policies_and_views(four):
    table = load_cohort(four, uncertain="mention", blank="missing", views="all").table
    assert len(table) == 4
    assert table["Edema"].tolist()[0] == -1
    assert np.isnan(table["Cardiomegaly"]).all()
    ignored = load_cohort(four, uncertain="ignore").table["Edema"]
    np.testing.assert_array_equal(ignored, [np.nan, 0, 0])


def test_the_papers_counts_decode(tmp_path):
    """Frontal only, uncertain as present: effusion = 1 and -1 of the frontal rows."""
    values = [1] * 5 + [-1] * 3 + [0] * 2 + [""] * 4
    rows = [
        chexpert_row(film_path(i), "Lateral" if i % 7 == 0 else "Frontal", **{PAPER_HEADS[0]: v})
        for i, v in enumerate(values)
    ]
    expected = sum(v in (1, -1) for i, v in enumerate(values) if i % 7)
    csv = write_chexpert(tmp_path, rows, images=False)
    table = load_cohort(csv, check_images=False).table
    assert table1(table).loc["Total", "Pleural Effusion"] == expected


@pytest.mark.parametrize(
    "place",
    [
        "",  # the root lacks the folder named in the CSV
        "CheXpert-v1.0-small",  # the root holds it
        "CheXpert-v1.0",  # the root holds it under another name
    ],
)
def test_any_dataset_folder_in_front(tmp_path, place):
    csv = write_chexpert(tmp_path, [chexpert_row(film_path(3))], images=False)
    save_png(tmp_path / "root" / place / "train/patient00003/study1/view1_frontal.png", GREY)
    table = load_cohort(csv, tmp_path / "root").table
    assert (tmp_path / "root" / table["path"][0]).is_file()
    assert table["film_id"][0] == "patient00003_study1_view1_frontal"


def test_folders_that_hold_films_of_the_same_names_are_not_guessed_between(tmp_path):
    (tmp_path / "films.csv").write_text("path,patient,view,edema\na.png,p,PA,1\nb.png,q,PA,0\n")
    for folder in ("annotations", "images"):
        for name in ("a.png", "b.png"):
            save_png(tmp_path / folder / name, GREY)
    with pytest.raises(CohortError, match="both annotations and images hold") as e:
        load_cohort(tmp_path / "films.csv")
    assert "; set image_root to" in str(e.value)
    cohort = load_cohort(tmp_path / "films.csv", tmp_path / "images")
    assert (len(cohort.table), cohort.settings["notes"]) == (2, [])
    (tmp_path / "annotations/b.png").unlink()  # the folder that holds more is it, and is named
    cohort = load_cohort(tmp_path / "films.csv")
    assert cohort.table["path"].tolist() == ["images/a.png", "images/b.png"]
    note = "the films are read from images, a folder of the image root"
    assert cohort.settings["notes"] == [note]


def test_absolute_paths_inside_the_root_are_taken(tmp_path):
    save_png(tmp_path / "a.png", GREY)
    csv = tmp_path / "films.csv"
    pd.DataFrame({"path": [tmp_path.resolve() / "a.png"], "edema": [1]}).to_csv(csv, index=False)
    assert load_cohort(csv).table["path"].tolist() == ["a.png"]


def test_absolute_paths_below_a_linked_root_and_below_the_root_of_all(tmp_path):
    save_png(tmp_path / "real" / "a.png", GREY)
    (tmp_path / "link").symlink_to(tmp_path / "real")
    csv = tmp_path / "films.csv"
    for start, root in (("link", "link"), ("real", "link"), ("real", "real/../real")):
        csv.write_text(f"path,edema\n{tmp_path}/{start}/a.png,1\n")
        assert load_cohort(csv, tmp_path / root).table["path"].tolist() == ["a.png"]
    table = load_cohort(csv, "/").table
    assert table["path"].tolist() == [str(tmp_path.resolve() / "real/a.png")[1:]]


# NIH ChestX-ray14

NIH_HEADER = (
    "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position,"
    "OriginalImage[Width,Height],OriginalImagePixelSpacing[x,y],\n"
)
NIH_LABELS = ["Effusion|Mass", "No Finding", "Hernia", "Infiltration|Edema", "Pleural_Thickening"]


def write_nih(folder, labels=NIH_LABELS, where="images"):
    lines = [
        f"{i:08d}_000.png,{text},0,{i},{'058Y' if i == 1 else 40 + i},{'MF'[i % 2]},PA,"
        "2500,2048,0.17,0.17,\n"
        for i, text in enumerate(labels, 1)
    ]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "Data_Entry.csv").write_text(NIH_HEADER + "".join(lines))
    for i in range(1, len(labels) + 1):
        save_png(folder / where / f"{i:08d}_000.png", GREY)
    return folder / "Data_Entry.csv"


@pytest.mark.parametrize("where", ["", "images", "images_001/images"])
def test_nih(tmp_path, where):
    cohort = load_cohort(write_nih(tmp_path, where=where))
    table = cohort.table.set_index("patient_id")
    assert cohort.settings["layout"] == "nih"
    assert len(cohort.rejected) == 0
    assert table["film_id"]["1"] == "00000001_000"
    assert table["path"]["1"] == str(Path(where, "00000001_000.png"))
    assert table["Age"].tolist() == [58, 42, 43, 44, 45]
    assert table["Sex"]["1"] == "Female"
    present = {p: {f for f in FINDINGS if table.loc[p, f] == 1} for p in table.index}
    assert present["1"] == {"Pleural Effusion", "Lung Lesion"}
    assert present["2"] == {"No Finding"}
    assert present["3"] == set()  # a hernia: not normal, and no name for it
    assert present["4"] == {"Lung Opacity", "Edema"}
    assert present["5"] == {"Pleural Other"}
    assert table["No Finding"].tolist() == [0, 1, 0, 0, 0]
    unlabelled = ["Fracture", "Enlarged Cardiomediastinum", "Support Devices"]
    assert table[unlabelled].isna().all(axis=None)
    np.testing.assert_array_equal(table["Lung Opacity"], [np.nan, 0, np.nan, 1, np.nan])


def test_extra_csv(tmp_path):
    csv = write_nih(tmp_path)
    extra = tmp_path / "devices.csv"
    names = [f"{i:08d}_000.png" for i in (1, 2, 4, 9)]
    pd.DataFrame({"Image Index": names, "support_devices": [1, 0, "", 1], "kinds": "line"}).to_csv(
        extra, index=False
    )
    cohort = load_cohort(csv, extra_csv=extra)
    expected = [1, 0, np.nan, np.nan, np.nan]
    np.testing.assert_array_equal(cohort.table["Support Devices"], expected)
    assert "extra: Support Devices for 3 of 5 rows" in cohort.settings["notes"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("Image,support_devices\na,1\n", "no column 'Image Index'; the nearest present is 'Image'"),
        ("Image Index,device\n00000001_000.png,1\n", "no column that names a finding"),
        ("Image Index,edema\nx.png,1\n", "no image in common"),
        ("Image Index,edema\n00000001_000.png,1\n00000001_000.png,0\n", "twice"),
        ("Image Index,Edema,edema\n00000001_000.png,1,0\n", "two columns that mean 'Edema'"),
    ],
)
def test_extra_csv_refusals(tmp_path, text, message):
    (tmp_path / "extra.csv").write_text(text)
    with pytest.raises(CohortError, match=message):
        load_cohort(write_nih(tmp_path), extra_csv=tmp_path / "extra.csv")
    with pytest.raises(CohortError, match="There is no extra CSV at"):
        load_cohort(tmp_path / "Data_Entry.csv", extra_csv=tmp_path / "none.csv")


@pytest.mark.parametrize(
    ("header", "double"),
    [("path,Pleural Effusion,pleural_effusion", "Pleural Effusion"), ("Path,path,edema", "path")],
)
def test_an_extra_csv_with_two_columns_of_one_meaning(tmp_path, header, double):
    (tmp_path / "films.csv").write_text("path,patient,edema\na.png,p,1\n")
    (tmp_path / "extra.csv").write_text(f"{header}\na.png,1,0\n")
    with pytest.raises(CohortError, match=rf"extra\.csv has two columns that mean '{double}'"):
        load_cohort(tmp_path / "films.csv", extra_csv=tmp_path / "extra.csv", check_images=False)
    (tmp_path / "extra.csv").write_text("path,Sex,gender,Pleural Effusion\na.png,F,F,1\n")
    cohort = load_cohort(
        tmp_path / "films.csv", extra_csv=tmp_path / "extra.csv", check_images=False
    )
    assert cohort.table["Pleural Effusion"].tolist() == [1]  # two that are not read do no harm


def test_nih_label_that_does_not_exist(tmp_path):
    cohort = load_cohort(write_nih(tmp_path, ["Efusion", "Edema", ""]))
    assert cohort.rejected["row"].tolist() == [2, 4]
    assert "nearest NIH label is 'Effusion'" in cohort.rejected["reason"][0]
    assert cohort.rejected["reason"][1] == "Finding Labels is blank."


# plain CSV


def test_plain(tmp_path):
    text = (
        "PATH,patient,pleural_effusion,SUPPORT DEVICES,view\n"
        "a b/ä.png,p1,1,0,PA\n\n./c.png,p1,,-1,lateral\nd.png,p2,0,1,\n"
    )
    (tmp_path / "films.csv").write_text(text, encoding="utf-8-sig")
    for name in ("a b/ä.png", "c.png", "d.png"):
        save_png(tmp_path / name, GREY)
    cohort = load_cohort(tmp_path / "films.csv")
    table = cohort.table
    assert cohort.settings["layout"] == "plain"
    assert table["film_id"].tolist() == ["a_b_", "d"]
    assert table["patient_id"].tolist() == ["p1", "p2"]
    assert table["Pleural Effusion"].tolist() == [1, 0]
    assert table["Edema"].isna().all()  # no such column: unlabelled is not absent
    assert cohort.counts == {"not frontal": 1}


def test_plain_without_patients_says_so(tmp_path):
    (tmp_path / "films.csv").write_text(
        "path,edema\nx/patient00007/a.png,1\nx/patient00007/b.png,0\nc.png,0\n"
    )
    cohort = load_cohort(tmp_path / "films.csv", check_images=False)
    patients = cohort.table["patient_id"]
    assert patients.tolist() == ["patient00007", "patient00007", "film_c.png"]
    assert any("no patient column" in note for note in cohort.settings["notes"])


def test_film_ids_stay_unique(tmp_path):
    paths = ["a/b.png", "a_b.png", "A_b.jpg", "x" * 150 + ".png", "ok.png"]
    (tmp_path / "films.csv").write_text("path,edema\n" + "".join(f"{p},1\n" for p in paths))
    ids = load_cohort(tmp_path / "films.csv", check_images=False).table["film_id"]
    assert ids.str.lower().is_unique
    assert ids.iloc[-1] == "ok"
    assert not ids.str.contains("/").any()
    assert ids.str.len().max() < 120


# what is turned away


def bomb(path):
    def chunk(kind, data):
        check = zlib.crc32(kind + data)
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", check)

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 20000, 20000, 8, 0, 0, 0, 0))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", b"") + chunk(b"IEND", b""))


def test_bad_rows_are_rejected_with_line_and_reason(tmp_path):
    root = tmp_path / "root"
    noise = np.random.default_rng(0).integers(0, 255, (64, 64), dtype=np.uint8)
    for name in ("good.png", "two.png", "cut.png", "word.png"):
        save_png(root / name, noise)
    (root / "cut.png").write_bytes((root / "cut.png").read_bytes()[:2000])
    (root / "empty.png").touch()
    (root / "text.png").write_text("hello")
    bomb(root / "bomb.png")
    save_png(tmp_path / "secret.png", GREY)
    (root / "link.png").symlink_to(tmp_path / "secret.png")
    lines = {
        "good.png,1": None,
        "none.png,1": "there is no such file.",
        "empty.png,1": "the file has zero bytes.",
        "text.png,1": "not a PNG or JPEG, nor DICOM",
        "cut.png,1": "truncated or damaged",
        "bomb.png,1": "100,000,000 pixels",
        "../secret.png,1": "leaves the image root: '..' in the path.",
        "sub/../../secret.png,1": "leaves the image root: '..'",
        "/etc/hostname,1": "leaves the image root: an absolute path.",
        "C:\\films\\a.png,1": "leaves the image root: an absolute path.",
        "link.png,1": "leaves the image root: a link",
        "two.png,2": "Edema is 2; a label is 1, 0, -1 or blank.",
        "word.png,yes": "Edema is yes; a label is 1, 0, -1 or blank.",
        "./good.png,0": "the same image as in line 2.",
        ",1": "the path is blank.",
    }
    (root / "films.csv").write_text("path,edema\n" + "\n".join(lines) + "\n")
    cohort = load_cohort(root / "films.csv")
    assert cohort.table["film_id"].tolist() == ["good"]
    assert cohort.rejected["row"].tolist() == list(range(3, len(lines) + 2))
    for found, expected in zip(cohort.rejected["reason"], list(lines.values())[1:], strict=True):
        assert expected in found


def test_a_path_that_no_disk_can_hold_is_a_rejected_row(tmp_path):
    save_png(tmp_path / "a.png", GREY)
    (tmp_path / "films.csv").write_text(f"path,edema\na.png,1\nb\0.png,1\n{'x' * 300}.png,1\n")
    cohort = load_cohort(tmp_path / "films.csv")
    assert cohort.table["path"].tolist() == ["a.png"]
    assert cohort.rejected["row"].tolist() == [3, 4]
    assert cohort.rejected["reason"][0] == "a NUL character in the path."


def test_many_films_are_looked_at_by_head_and_end(tmp_path, monkeypatch):
    noise = np.random.default_rng(0).integers(0, 255, (64, 64), dtype=np.uint8)
    names = [f"{name}.{kind}" for name in ("whole", "cut", "more") for kind in ("png", "jpg")]
    for name in names:
        Image.fromarray(noise).save(tmp_path / name)
        if not name.startswith("whole"):
            data = (tmp_path / name).read_bytes()
            data = data[:2000] if name.startswith("cut") else data + b"\0\0 and notes"
            (tmp_path / name).write_bytes(data)
    (tmp_path / "films.csv").write_text("path,edema\n" + "".join(f"{n},1\n" for n in names))
    for limit in (9, 0):
        monkeypatch.setattr(module, "DECODE_UP_TO", limit)
        cohort = load_cohort(tmp_path / "films.csv")
        assert cohort.rejected["path"].tolist() == ["cut.png", "cut.jpg"]
        assert cohort.rejected["reason"].str.contains("truncated or damaged").all()
    monkeypatch.setattr(Image.Image, "load", lambda _: pytest.fail("decoded"))
    for name in names[:2]:
        check_image(tmp_path / name, decode=False)


def test_links_inside_the_root_are_fine(tmp_path):
    save_png(tmp_path / "root" / "a.png", GREY)
    (tmp_path / "root" / "b.png").symlink_to(tmp_path / "root" / "a.png")
    (tmp_path / "link").symlink_to(tmp_path / "root")
    (tmp_path / "root" / "films.csv").write_text("path,edema\nb.png,1\n")
    assert len(load_cohort(tmp_path / "link" / "films.csv").table) == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "There is no labels CSV at"),
        ("", "is not a CSV that can be read"),
        ("path,edema\n", "has a header but no rows"),
        ("path,edema\na.png,1,2,3\n", "is not a CSV that can be read"),
        ("pth,edema\na.png,1\n", "no column 'path'; the nearest present is 'pth'"),
        ("path,edma\na.png,1\n", "no column that names a finding"),
        ("path,edema,Edema\na.png,1,1\n", "two columns that mean 'Edema'"),
    ],
)
def test_a_csv_that_cannot_be_read(tmp_path, text, message):
    if text is not None:
        (tmp_path / "films.csv").write_text(text)
    with pytest.raises(CohortError, match=message):
        load_cohort(tmp_path / "films.csv")


@pytest.mark.parametrize("broken", ["Path", "Frontal/Lateral", "Pleural Effusion"])
def test_a_missing_chexpert_column_is_named_with_the_nearest(tmp_path, broken):
    csv = write_chexpert(tmp_path, [chexpert_row(film_path(1))])
    table = pd.read_csv(csv).rename(columns={broken: broken[:-1] + "_"})
    table.to_csv(csv, index=False)
    with pytest.raises(
        CohortError, match=f"no column '{broken}'; the nearest present is '{broken[:-1]}_'"
    ):
        load_cohort(csv)


def test_binary_csv_and_wrong_settings(tmp_path, four):
    (tmp_path / "b.csv").write_bytes(b"path,edema\n\xff\xfe\x00,1\n")
    with pytest.raises(CohortError, match="cannot be read"):
        load_cohort(tmp_path / "b.csv")
    with pytest.raises(CohortError, match="image_root must be a folder"):
        load_cohort(four, tmp_path / "nowhere")
    with pytest.raises(CohortError, match="views is 'side'"):
        load_cohort(four, views="side")
    with pytest.raises(CohortError, match="layout is 'kaggle'"):
        load_cohort(four, layout="kaggle")


def test_an_empty_cohort_names_the_filter_and_how_many(tmp_path):
    rows = [chexpert_row(film_path(i), "Lateral") for i in range(3)]
    with pytest.raises(CohortError, match=r"left of 3 rows .* filter 'not frontal' removed 3"):
        load_cohort(write_chexpert(tmp_path, rows))
    csv = write_chexpert(tmp_path / "b", [chexpert_row(film_path(1))], images=False)
    with pytest.raises(CohortError, match=r"1 rejected \(.*line 2: there is no such file"):
        load_cohort(csv)


def test_max_films_chooses_the_same_and_fills_up(tmp_path):
    names = [f"{i:02d}.png" for i in range(20)]
    for name in names:
        save_png(tmp_path / name, GREY)
    (tmp_path / "films.csv").write_text("path,edema\n" + "".join(f"{n},1\n" for n in names))
    first = load_cohort(tmp_path / "films.csv", max_films=6)
    again = load_cohort(tmp_path / "films.csv", max_films=6)
    other = load_cohort(tmp_path / "films.csv", max_films=6, seed=1)
    assert first.table["path"].tolist() == again.table["path"].tolist()
    assert first.table["path"].tolist() != other.table["path"].tolist()
    assert first.table["path"].is_monotonic_increasing  # the CSV's order
    assert first.counts["max_films"] == 14
    gone = first.table["path"][0]
    (tmp_path / gone).unlink()
    filled = load_cohort(tmp_path / "films.csv", max_films=6)
    assert len(filled.table) == 6
    assert filled.rejected["path"].tolist() == [gone]
    assert filled.counts["max_films"] == 13
    assert len(load_cohort(tmp_path / "films.csv", max_films=100).table) == 19


# splits


def patients_table(counts):
    ids = [f"p{i}" for i, number in enumerate(counts) for _ in range(number)]
    return pd.DataFrame({"patient_id": ids, "film": range(len(ids))})


@settings(max_examples=60, deadline=None)
@given(
    counts=st.lists(st.integers(1, 4), min_size=3, max_size=60),
    seed=st.integers(0, 2**31),
    shares=st.tuples(st.floats(0.01, 0.99), st.floats(0.01, 0.99)),
    shuffle=st.randoms(use_true_random=False),
)
def test_no_patient_is_in_two_splits(counts, seed, shares, shuffle):
    table = patients_table(counts)
    order = list(range(len(table)))
    shuffle.shuffle(order)
    split = split_by_patient(table, *shares, seed=seed)
    other = split_by_patient(table.iloc[order], *shares, seed=seed)
    assert split.groupby("patient_id")["split"].nunique().eq(1).all()
    assert set(split["split"]) == {"train", "val", "test"}
    pd.testing.assert_frame_equal(other.sort_index(), split)  # row order does not matter
    assert split["film"].tolist() == table["film"].tolist()


def test_shares_are_the_papers():
    split = split_by_patient(patients_table([1] * 1000), seed=3)["split"].value_counts()
    assert split.to_dict() == {"test": 150, "val": 128, "train": 722}
    a, b = (split_by_patient(patients_table([1] * 1000), seed=s)["split"] for s in (3, 4))
    assert (a != b).any()


def test_a_split_never_changes_between_versions():
    split = split_by_patient(patients_table([1] * 7), seed=0)
    assert split.set_index("patient_id")["split"].to_dict() == {
        "p0": "val",
        "p2": "test",
        **dict.fromkeys(["p1", "p3", "p4", "p5", "p6"], "train"),
    }


def test_too_few_patients():
    for number in (1, 2):
        with pytest.raises(CohortError, match=rf"has {number} patient.*at least 3"):
            split_by_patient(patients_table([5] * number))
    with pytest.raises(CohortError, match="test_share is 0"):
        split_by_patient(patients_table([1] * 9), test_share=0)


# on disk, and the tables


def test_write_and_read(tmp_path, four):
    (four.parent / "train/patient00002/study1/view1_frontal.png").unlink()
    cohort = load_cohort(four)
    cohort.table = cohort.table.assign(split="train")
    write_cohort(cohort, tmp_path / "run")
    again = read_cohort(tmp_path / "run")
    pd.testing.assert_frame_equal(again.table, cohort.table)
    pd.testing.assert_frame_equal(again.rejected, cohort.rejected)
    assert (again.settings, again.counts) == (cohort.settings, cohort.counts)
    assert again.image_root == cohort.image_root
    (tmp_path / "run" / "cohort.json").unlink()
    with pytest.raises(CohortError, match=r"no cohort\.json .* run 01_caption first"):
        read_cohort(tmp_path / "run")


def test_tables_of_counts():
    table = pd.DataFrame(np.zeros((4, 14)), columns=list(FINDINGS)).assign(
        split=["train", "train", "val", "test"], patient_id=["a", "a", "b", "c"]
    )
    table["Pleural Effusion"] = [1, 1, 1, 0]
    table["Support Devices"] = [1, 0, np.nan, 1]
    table["Edema"] = [-1, np.nan, 0, 0]
    counts = table1(table)
    assert list(counts.index) == ["Train", "Validation", "Test", "Total"]
    assert tuple(counts.columns[:4]) == PAPER_HEADS
    assert counts["Pleural Effusion"].tolist() == [2, 1, 0, 3]
    assert counts["Edema"].tolist() == [0, 0, 0, 0]
    assert counts["films"].tolist() == [2, 1, 1, 4]
    assert counts["patients"].tolist() == [1, 1, 1, 3]
    shares = cooccurrence(table)
    assert shares.loc["Pleural Effusion", "Support Devices"] == 0.5  # of the two that are known
    assert shares.loc["Support Devices", "Pleural Effusion"] == 0.5
    assert shares.loc["Edema"].isna().all()
    table = pd.DataFrame({"heart": [1, 1, 1, 1, 0, np.nan], "fluid": [1, -1, -1, 0, 1, 1]})
    shares = cooccurrence(table, ["heart", "fluid"])
    assert shares.loc["heart", "fluid"] == 0.5, "uncertain is not known"
    assert shares.loc["fluid", "heart"] == 0.5
