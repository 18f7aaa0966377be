"""Layouts: a small look-alike of each data set, with its true header and its known quirks."""

import gzip
import json
import os
import re
import time
import typing
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from prism_nb.cohort import CohortError, load_cohort, split_by_patient, table1
from prism_nb.findings import FINDINGS
from prism_nb.images import load_image, save_png
from prism_nb.layouts import LAYOUTS, read_labels
from prism_nb.params import Caption

GREY = np.full((8, 8), 120, np.uint8)
LABELS = ",".join(FINDINGS)


def cells(**labels):
    """The 14 cells of a row, in Listing 1's order; blank where nothing is said."""
    names = {name.replace(" ", "_"): name for name in FINDINGS}
    labels = {names[name]: value for name, value in labels.items()}
    return ",".join(str(labels.get(name, "")) for name in FINDINGS)


def write(path: Path, *lines) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "\n".join(lines) + "\n"
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def films(root: Path, *paths) -> None:
    for path in paths:
        save_png(root / path, GREY)


def found(table, row):
    """The findings that a row of a cohort's table calls present."""
    return {name for name in FINDINGS if table[name].iloc[row] == 1}


# CheXpert

CHEXPERT = f"Path,Sex,Age,Frontal/Lateral,AP/PA,{LABELS}"


def chexpert(folder, name="train.csv", prefix="CheXpert-v1.0-small/train/"):
    start = f"{prefix}patient00001/study"
    return write(
        folder / name,
        CHEXPERT,
        f"{start}1/view1_frontal.jpg,Female,68,Frontal,AP,{cells(Edema=-1.0, Fracture=0.0)}",
        f"{start}1/view2_frontal.jpg,Female,68,Frontal,LL,{cells(No_Finding=1.0)}",
        f"{start}1/view3_lateral.jpg,Female,68,Lateral,,{cells(No_Finding=1.0)}",
        f"{prefix}patient64540/study12/view1_frontal.jpg,Unknown,0,Frontal,PA,{cells()}",
    )


@pytest.mark.parametrize(
    ("name", "prefix"),
    [
        ("train.csv", "CheXpert-v1.0-small/train/"),
        ("valid.csv", "CheXpert-v1.0/valid/"),
        ("train.csv.gz", "elsewhere/CheXpert-v1.0/train/"),
    ],
)
def test_chexpert(tmp_path, name, prefix):
    cohort = load_cohort(chexpert(tmp_path, name, prefix), check_images=False)
    table = cohort.table
    assert (cohort.settings["layout"], cohort.counts) == ("chexpert", {"not frontal": 1})
    assert table["film_id"].tolist() == [
        "patient00001_study1_view1_frontal",
        "patient00001_study1_view2_frontal",
        "patient64540_study12_view1_frontal",
    ]
    assert table["view"].tolist() == ["AP", "", "PA"]  # LL is no view of a frontal film
    assert table["Sex"].tolist() == ["Female", "Female", ""]
    assert (found(table, 0), found(table, 1), found(table, 2)) == ({"Edema"}, {"No Finding"}, set())


# CheXpert Plus

PLUS = (
    "path_to_image,path_to_dcm,frontal_lateral,ap_pa,deid_patient_id,patient_report_date_order,"
    "report,section_narrative,section_findings,section_impression,age,sex,race,ethnicity,split"
)


def plus(folder):
    row = ',"NARRATIVE:\nchest, two views",,"none\n\nseen",,61.0,Female,White,Unknown,train'
    start = "train/patient42142/study5/view"
    csv = write(
        folder / "df_chexpert_plus_240401.csv",
        PLUS,
        f"{start}1_frontal.jpg,{start}1_frontal.dcm,Frontal,AP,patient42142,5{row}",
        f"{start}2_lateral.jpg,{start}2_lateral.dcm,Lateral,,patient42142,5{row}",
        f"train/patient7/study1/view1_frontal.jpg,,Frontal,PA,patient7,1{row}",
        f"train/patient8/study1/view1_frontal.jpg,,Frontal,PA,patient8,1{row}",
    )
    labels = dict.fromkeys(FINDINGS)
    blank = {"path_to_image": "train/patient7/study1/view1_frontal.jpg", **labels}
    rows = [
        {"path_to_image": f"{start}1_frontal.jpg", **labels, "Edema": 1.0, "Fracture": -1.0},
        {"path_to_image": f"{start}2_lateral.jpg", **labels, "Edema": 1.0},
        blank,
        {**blank, "path_to_image": "valid/patient9/study1/view1_frontal.jpg"},
    ]
    write(folder / "chexbert_labels/impression_fixed.json", *map(json.dumps, rows))
    return csv


def test_chexpert_plus(tmp_path):
    csv = plus(tmp_path)
    films(tmp_path, "PNG/train/patient42142/study5/view1_frontal.png")  # .jpg in the CSV
    films(tmp_path, "PNG/train/patient7/study1/view1_frontal.png")
    cohort = load_cohort(csv, uncertain="mention", blank="missing")
    table = cohort.table
    assert cohort.settings["layout"] == "chexpert_plus"
    assert table["film_id"].tolist() == [
        "patient42142_study5_view1_frontal",
        "patient7_study1_view1_frontal",
    ]
    assert (table["Edema"][0], table["Fracture"][0]) == (1, -1)
    assert table.loc[1, list(FINDINGS)].isna().all()  # in the file, and nothing said
    assert table["Age"].tolist() == [61, 61]
    assert cohort.rejected["reason"].tolist() == ["no labels for it in impression_fixed.json."]
    note = "impression_fixed.json: 1 of 4 rows of labels match no film"
    where = "the films are read from PNG, a folder of the image root"
    assert cohort.settings["notes"] == [note, where]


def test_chexpert_plus_rejects_films_whose_patient_is_blank(tmp_path):
    csv = plus(tmp_path)
    csv.write_text(csv.read_text().replace(",patient7,", ",,"))
    cohort = load_cohort(csv, check_images=False)
    assert cohort.table["patient_id"].tolist() == ["patient42142"]
    assert cohort.rejected["reason"][0] == "deid_patient_id is blank."


def test_chexpert_plus_without_its_labels(tmp_path):
    csv = plus(tmp_path)
    labels = tmp_path / "chexbert_labels/impression_fixed.json"
    beside = tmp_path / "impression_fixed.json"
    labels.rename(beside)
    assert len(read_labels(csv).raw) == 4
    text = beside.read_text()
    beside.write_text(text.replace('"path_to_image": "', '"path_to_image": "old/'))
    with pytest.raises(CohortError, match=r"The 4 rows of .* match no film; take both of one rel"):
        read_labels(csv)
    beside.write_text(text[:-30])
    with pytest.raises(CohortError, match="cannot be read"):
        read_labels(csv)
    beside.unlink()
    with pytest.raises(CohortError, match=r"no file of labels at .*impression_fixed\.json"):
        read_labels(csv)


# MIMIC-CXR-JPG

METADATA = (
    "dicom_id,subject_id,study_id,PerformedProcedureStepDescription,ViewPosition,Rows,Columns,"
    "StudyDate,StudyTime,ProcedureCodeSequence_CodeMeaning,ViewCodeSequence_CodeMeaning,"
    "PatientOrientationCodeSequence_CodeMeaning"
)
STUDY_LABELS = "subject_id,study_id," + ",".join(sorted(FINDINGS))


def mimic(folder, suffix=""):
    rest = "CHEST (PA AND LAT),{},3056,2544,21800506,213014.531,CHEST (PA AND LAT),,Erect"
    write(
        folder / f"mimic-cxr-2.0.0-metadata.csv{suffix}",
        METADATA,
        f"02aa804e-a1,10000032,50414267,{rest.format('PA')}",
        f"174413ec-b2,10000032,50414267,{rest.format('LATERAL')}",
        f"2a2277a9-c3,11000032,53189527,{rest.format('AP')}",
        f"e084de3b-d4,11000032,53189528,{rest.format('AP AXIAL')}",
        f"68b5c4b1-e5,11000032,53189529,{rest.format('')}",
        f"ffffffff-f6,11000764,57375967,{rest.format('AP')}",
    )
    names = sorted(FINDINGS)

    def study(start, **labels):
        return start + "," + ",".join(str(labels.get(n.replace(" ", "_"), "")) for n in names)

    return write(
        folder / f"mimic-cxr-2.0.0-chexpert.csv{suffix}",
        STUDY_LABELS,
        study("10000032,50414267", Pleural_Effusion=1.0, Edema=-1.0),
        study("11000032,53189527", No_Finding=1.0, Support_Devices=0.0),
        study("11000032,53189528"),
        study("11000032,53189529"),
        study("19999999,59999999", Edema=1.0),
    )


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("half", ["chexpert", "metadata"])
def test_mimic(tmp_path, suffix, half):
    csv = Path(str(mimic(tmp_path, suffix)).replace("chexpert.csv", f"{half}.csv"))
    films(tmp_path, "files/p10/p10000032/s50414267/02aa804e-a1.jpg")
    films(tmp_path, "files/p11/p11000032/s53189527/2a2277a9-c3.jpg")
    cohort = load_cohort(csv)
    table = cohort.table
    assert (cohort.settings["layout"], cohort.counts) == ("mimic", {"not frontal": 3})
    assert table["film_id"].tolist() == ["02aa804e-a1", "2a2277a9-c3"]
    assert table["patient_id"].tolist() == ["p10000032", "p11000032"]
    assert found(table, 0) == {"Pleural Effusion", "Edema"}
    assert found(table, 1) == {"No Finding"}
    reason = f"no labels for it in mimic-cxr-2.0.0-chexpert.csv{suffix}."
    assert cohort.rejected["reason"].tolist() == [reason]  # not: every label absent
    assert "1 of 5 rows of labels match no film" in cohort.settings["notes"][0]
    every = load_cohort(csv, views="all", check_images=False).table
    assert found(every, 1) == {"Pleural Effusion", "Edema"}  # the lateral of the same study


def test_mimic_halves_that_do_not_meet(tmp_path):
    csv = mimic(tmp_path)
    films_csv = tmp_path / "mimic-cxr-2.0.0-metadata.csv"
    text = films_csv.read_text()
    films_csv.write_text(text.replace(",5", ",4"))
    with pytest.raises(
        CohortError, match=r"The 5 rows of .*chexpert\.csv match no film; take both"
    ):
        read_labels(csv)
    films_csv.write_text(text.replace("ViewPosition", "View"))
    with pytest.raises(CohortError, match=r"metadata.csv has no column 'ViewPosition'.*'View'"):
        read_labels(csv)
    films_csv.unlink()
    with pytest.raises(CohortError, match=r"no other half of MIMIC-CXR-JPG, a CSV at .*metadata"):
        read_labels(csv)


def test_further_labels_of_studies(tmp_path):
    csv = mimic(tmp_path)
    extra = write(tmp_path / "e.csv", "subject_id,study_id,fracture", "10000032,50414267,1")
    table = load_cohort(csv, extra_csv=extra, views="all", check_images=False).table
    assert table["Fracture"].tolist() == [1, 1, 0, 0, 0]
    extra = write(tmp_path / "e.csv", "subject_id,study_id,fracture", "10000032,1,1")
    with pytest.raises(CohortError, match=r"no image in common .* compare subject_id, study_id"):
        read_labels(csv, extra_csv=extra)


# PadChest

PADCHEST = (
    ",ImageID,ImageDir,StudyDate_DICOM,StudyID,PatientID,PatientBirth,PatientSex_DICOM,"
    "ViewPosition_DICOM,Projection,MethodProjection,Pediatric,Modality_DICOM,ReportID,Report,"
    "MethodLabel,Labels,Localizations,LabelsLocalizationsBySentence,labelCUIS,LocalizationsCUIS"
)


def padchest(folder, *labels):
    views = ["PA", "AP_horizontal", "L", "COSTAL", *["PA"] * len(labels)]
    rows = [
        f"{i},{i}_a.png,{i % 3},20140915,77{i},88{i % 4},1930.0,F,,{view},Manual,No,CR,47,"
        f'"sin, nada",Physician,"{text}",[],"[[]]",[],[]'
        for i, (text, view) in enumerate(zip(labels, views, strict=False))
    ]
    return write(folder / "PADCHEST_chest_x_ray_images_labels_160K_01.02.19.csv", PADCHEST, *rows)


def test_padchest(tmp_path):
    csv = padchest(
        tmp_path,
        "['normal']",
        "['cardiomegaly', ' central venous catheter via jugular vein',"
        "' loculated pleural effusion']",
        "['normal']",
        "['normal']",
        "['hydropneumothorax', 'callus rib fracture', 'unchanged', '']",
        "['emphysema', 'calcified pleural thickening']",
        "['unchanged']",
        "['exclude', 'pneumonia']",
        "",
    )
    for i in range(9):  # 16 bits, as the collection has them
        save_png(tmp_path / f"{i % 3}/{i}_a.png", np.full((8, 8), 9000 + i, np.uint16))
    cohort = load_cohort(csv, blank="missing")
    table = cohort.table
    assert (cohort.settings["layout"], cohort.counts) == ("padchest", {"not frontal": 2})
    assert table["film_id"].tolist() == ["0_a", "1_a", "4_a", "5_a"]
    assert (table["view"].tolist(), table["Age"].tolist()) == (["PA", "AP", "PA", "PA"], [84] * 4)
    assert [found(table, row) for row in range(4)] == [
        {"No Finding"},
        {"Cardiomegaly", "Support Devices", "Pleural Effusion"},
        {"Pneumothorax", "Pleural Effusion", "Fracture"},
        {"Pleural Other"},
    ]
    assert table["No Finding"].tolist() == [1, 0, 0, 0]
    assert np.isnan(table["Edema"]).all()  # not in the report: blank, and the policy decides
    assert (load_cohort(csv).table["Edema"] == 0).all()
    assert cohort.rejected["row"].tolist() == [8, 9, 10]
    assert cohort.rejected["reason"].str.contains("nothing is known").all()
    assert load_image(tmp_path / "0/0_a.png").max() == pytest.approx(9000 / 65535, abs=1e-6)


# VinDr-CXR

WIDE = (
    "Aortic enlargement,Atelectasis,Cardiomegaly,Clavicle fracture,Edema,ILD,Lung Opacity,"
    "Nodule/Mass,Pleural effusion,Pleural thickening,Rib fracture,Lung tumor,Other diseases,"
    "No finding"
)


def boxes(folder, *rows):
    header = "image_id,class_name,class_id,rad_id,x_min,y_min,x_max,y_max"
    return write(folder / "train.csv", header, *(f"{row},1,2,3,4" for row in rows))


def test_vindr_boxes_and_the_consensus_of_readers(tmp_path):
    csv = boxes(
        tmp_path,
        "b0,Cardiomegaly,3,R8",
        "b0,Cardiomegaly,3,R9",
        "b0,ILD,5,R9",
        "b0,Nodule/Mass,8,R10",
        "a0,No finding,14,R8",
        "a0,No finding,14,R8",
        "a0,No finding,14,R9",
        "a0,Pleural effusion,10,R10",
        "c0,Aortic enlargement,0,R8",
        "c0,Pleural thickening,11,R9",
    )
    films(tmp_path, "train/a0.png", "train/b0.png", "train/c0.png")  # converted from .dicom
    cohort = load_cohort(csv, uncertain="mention")
    table = cohort.table.set_index("film_id")
    assert (cohort.settings["layout"], list(table.index)) == ("vindr", ["b0", "a0", "c0"])
    assert table["view"].eq("PA").all()
    assert found(table, 0) == {"Cardiomegaly"}  # two of three readers
    assert found(table, 1) == {"No Finding"}
    assert found(table, 2) == set()  # not normal, and no name for it
    assert table.loc["c0", "Pleural Other"] == -1  # one of two readers
    assert table.loc["b0", ["Lung Opacity", "Lung Lesion"]].tolist() == [0, 0]
    never = ["Support Devices", "Enlarged Cardiomediastinum", "Edema", "Fracture", "Pneumonia"]
    assert table[never].isna().all(axis=None)
    assert table["patient_id"].is_unique


@pytest.mark.parametrize("readers", [True, False])
def test_vindr_image_labels(tmp_path, readers):
    rows = {
        "a0,R1": [0, 1, 0, 0, 1, 0, 0, 0, 1, 0, 1, 0, 1, 0],
        "a0,R2": [0, 0, 0, 1, 1, 0, 0, 0, 1, 0, 0, 0, 0, 0],
        "a0,R3": [0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, "", 0, 0],
        "b0,R1": [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1],
    }
    if not readers:  # the test set holds the consensus
        rows = {k.split(",")[0]: v for k, v in rows.items() if k in ("a0,R2", "b0,R1")}
    start = "image_id,rad_id," if readers else "image_id,"
    lines = [f"{start}," + ",".join(map(str, row)) for start, row in rows.items()]
    csv = write(tmp_path / "annotations/image_labels.csv", f"{start}{WIDE}", *lines)
    films(tmp_path, "test/a0.dcm.png", "test/a0.png", "test/b0.png")
    cohort = load_cohort(csv, tmp_path)
    assert cohort.settings["layout"] == "vindr"
    fracture = {"Edema", "Pleural Effusion", "Fracture"}  # two of three broke a bone, each another
    assert [found(cohort.table, row) for row in (0, 1)] == [fracture, {"No Finding"}]
    assert cohort.table["Support Devices"].isna().all()


# a plain CSV, and DICOM


def test_plain_tells_laterals_by_their_path(tmp_path):
    start = "test/patient64741/study1/view"
    csv = write(
        tmp_path / "test_labels.csv",  # as CheXpert's test set: no view, no sex, no age
        f"Path,{LABELS}",
        f"{start}1_frontal.jpg,{cells(Edema=1.0)}",
        f"{start}2_lateral.jpg,{cells(Edema=1.0)}",
    )
    cohort = load_cohort(csv, check_images=False)
    assert (cohort.settings["layout"], cohort.counts) == ("plain", {"not frontal": 1})
    assert cohort.table["patient_id"].tolist() == ["patient64741"]


@pytest.mark.parametrize("patient", ["PatientID", "Patient ID", "Subject_ID"])
@pytest.mark.parametrize("view", ["ViewPosition", "view_position", "Projection"])
def test_plain_knows_patients_and_views_by_their_usual_names(tmp_path, patient, view):
    rows = [f"{name}{i}.png,{name},{v},1" for name in "AB" for i, v in enumerate(("PA", "LL"))]
    csv = write(tmp_path / "films.csv", f"path,{patient},{view},Edema", *rows)
    cohort = load_cohort(csv, check_images=False)
    assert cohort.table["patient_id"].tolist() == ["A", "B"]
    assert cohort.table["view"].tolist() == ["PA", "PA"]
    assert (cohort.counts, cohort.settings["notes"]) == ({"not frontal": 2}, [])


def test_plain_rejects_films_whose_patient_is_blank(tmp_path):
    lines = "path,PatientID,Edema", "a.png,p,1", "b.png, ,0", "c.png,,0"
    csv = write(tmp_path / "films.csv", *lines)
    cohort = load_cohort(csv, check_images=False)
    assert cohort.table["patient_id"].tolist() == ["p"]
    assert cohort.rejected["row"].tolist() == [3, 4]
    assert set(cohort.rejected["reason"]) == {"patient is blank."}


def test_plain_finds_patients_in_paths_and_counts_those_without(tmp_path):
    names = {
        "x/Patient001/a.png": "Patient001",
        "x\\Patient001\\b.png": "Patient001",
        "patient_002/a.png": "patient_002",
        "PATIENT-3/a.png": "PATIENT-3",
        "patient 4.png": "patient 4",
        "train_patient00005_view1.png": "patient00005",
        "outpatient6/a.png": "film_outpatient6/a.png",
        "b.png": "film_b.png",
    }
    csv = write(tmp_path / "films.csv", "path,Edema", *(f"{name},1" for name in names))
    labels = read_labels(csv)
    assert labels.raw["patient_id"].tolist() == list(names.values())
    note = "plain: no patient column; it is patientNNNNN in the path; 2 of 8 films have none"
    assert labels.notes[0] == f"{note}, each taken to be a patient"


@pytest.mark.parametrize(
    ("path", "frontal"),
    [
        ("bilateral/a.png", True),
        ("x/Unilateral/contralateral.png", True),
        ("a/view2_lateral.png", False),
        ("LATERAL.png", False),
        ("Lateral/a.png", False),
    ],
)
def test_plain_reads_lateral_as_a_word(tmp_path, path, frontal):
    csv = write(tmp_path / "films.csv", "path,patient,Edema", f"{path},p,1")
    assert read_labels(csv).raw["frontal"].tolist() == [frontal]


def test_ages_in_other_units_than_years(tmp_path):
    ages = ["090D", "013M", "052w", "061Y", "61", "61.5", "61 years", "8 months", ""]
    rows = [f"{i}.png,p,{age},1" for i, age in enumerate(ages)]
    raw = read_labels(write(tmp_path / "films.csv", "path,patient,age,Edema", *rows)).raw
    expected = [90 / 365.25, 13 / 12, 52 / 52.18, 61, 61, 61.5, 61, 8, np.nan]
    np.testing.assert_allclose(raw["Age"], expected)


@pytest.mark.parametrize(
    ("header", "row"),
    [
        ("path,patient,Edema,Edema", "a.png,p,1,0"),
        ("path,patient,Edema, Edema", "a.png,p,1,0"),
        (f"Path, Path,Sex,Age,Frontal/Lateral,AP/PA,{LABELS}", f"a,b,F,3,Frontal,AP,{cells()}"),
        ("path,path,report,Edema", "a.png,a.png,none,1"),
    ],
)
def test_a_column_that_is_there_twice_is_refused(tmp_path, header, row):
    csv = write(tmp_path / "films.csv", header, row)
    with pytest.raises(CohortError, match=r"has two columns '(Edema|[Pp]ath)'; keep one") as e:
        read_labels(csv)
    assert "\n" not in str(e.value)


def test_columns_that_look_like_a_second_one_are_fine(tmp_path):
    lines = ",path,patient,,Edema.1,Edema,report,report, ,", "0,a.png,p,,x,1,a,b,,"
    raw = read_labels(write(tmp_path / "films.csv", *lines)).raw
    assert raw["Edema"].tolist() == [1]


def test_a_second_name_holds_where_the_first_is_not_there(tmp_path):
    lines = "path,patient_id,subject_id,view,ViewPosition,Edema", "a.png,p,s,PA,x,1"
    raw = read_labels(write(tmp_path / "films.csv", *lines)).raw
    assert (raw["patient_id"].tolist(), raw["view"].tolist()) == (["p"], ["PA"])
    with pytest.raises(CohortError, match=r"'subject' but none called patient"):
        read_labels(write(tmp_path / "films.csv", "path,subject,Edema", "a.png,chest,1"))


def test_the_notebook_says_what_was_assumed(root):
    book = json.loads((root / "notebooks" / "01_caption.ipynb").read_text(encoding="utf-8"))
    sources = ["".join(cell["source"]) for cell in book["cells"]]
    assert any(re.search(r'in cohort\.settings\["notes"\].*\n +print\(note\)', s) for s in sources)


def test_plain_refuses_to_guess_whose_a_film_is(tmp_path):
    csv = write(tmp_path / "films.csv", "path,Sex,study patient no,Edema", "a.png,F,7,1")
    with pytest.raises(CohortError, match=r"'study patient no'.*; rename it to patient") as e:
        read_labels(csv)
    assert "\n" not in str(e.value)
    lines = "path,patient,patient_class,subjective,Edema", "a.png,p7,inpatient,x,1"
    assert read_labels(write(tmp_path / "films.csv", *lines)).raw["patient_id"].tolist() == ["p7"]
    lines = "path,patient_class,Edema", "x/patient00007/a.png,inpatient,1"
    raw = read_labels(write(tmp_path / "films.csv", *lines)).raw  # the path says it
    assert raw["patient_id"].tolist() == ["patient00007"]
    lines = "path,PatientSex,PatientAge,Edema", "a.png,F,061Y,1"
    raw = read_labels(write(tmp_path / "films.csv", *lines)).raw
    assert (raw["Sex"].tolist(), raw["Age"].tolist()) == (["Female"], [61])


def test_a_csv_of_own_dicom_files_names_no_one(tmp_path):
    csv = write(tmp_path / "films.csv", "path,patient,edema", "DOE JANE/1.dcm,p1,1", "b.png,p2,0")
    ids = load_cohort(csv, check_images=False).table["film_id"]
    assert ids[0].startswith("film_")
    assert "DOE" not in ids[0]
    assert ids[1] == "b"


def test_a_folder_of_dicom(tmp_path):
    pytest.importorskip("pydicom")
    from test_dicom import write as write_dicom

    write_dicom(tmp_path / "in/DOE/1.dcm")
    write_dicom(tmp_path / "in/DOE/2.dcm", ViewPosition="LL")
    write_dicom(tmp_path / "in/ROE/1", PatientID="9", ViewPosition=None)
    write_dicom(tmp_path / "in/ROE/2", Modality="CT", PatientID="9")
    cohort = load_cohort(tmp_path / "in")
    table = cohort.table
    assert (cohort.settings["layout"], cohort.counts) == ("dicom", {"not frontal": 1})
    assert table["path"].tolist() == ["DOE/1.dcm", "ROE/1"]
    assert table["film_id"].str.fullmatch("film_[0-9a-f]{16}").all()
    assert table["patient_id"].str.fullmatch("patient_[0-9a-f]{16}").all()
    assert (table["view"].tolist(), table["Sex"].tolist()) == (["PA", ""], ["Female", "Female"])
    assert table[list(FINDINGS)].isna().all(axis=None)
    assert (cohort.rejected["row"].tolist(), cohort.rejected["path"].tolist()) == ([4], ["ROE/2"])
    extra = write(tmp_path / "labels.csv", "PATH,pleural_effusion", "DOE/1.dcm,1", "ROE/1,-1")
    labelled = load_cohort(tmp_path / "in", extra_csv=extra).table
    assert labelled["Pleural Effusion"].tolist() == [1, 1]
    assert cohort.settings["notes"] == [
        "dicom: 2 files name no view and are taken to be frontal"  # a rejected one is among them
    ]
    for name in ("1", "2"):
        write_dicom(tmp_path / f"nameless/{name}.dcm", PatientID="", StudyInstanceUID="1.2.3")
    write_dicom(tmp_path / "nameless/ct.dcm", PatientID="", Modality="CT")
    nameless = load_cohort(tmp_path / "nameless")
    assert nameless.table["patient_id"].nunique() == 1
    note = "dicom: 2 files have no PatientID; those of one study are taken to be of one patient"
    assert note in nameless.settings["notes"]
    (tmp_path / "none").mkdir()
    with pytest.raises(CohortError, match="no DICOM file in"):
        load_cohort(tmp_path / "none")
    with pytest.raises(CohortError, match="is a folder; the nih layout needs a CSV"):
        load_cohort(tmp_path / "in", layout="nih")
    with pytest.raises(CohortError, match="is no folder; the dicom layout needs a folder"):
        load_cohort(extra, layout="dicom")


# all of them


def nih(folder):
    return write(
        folder / "Data_Entry_2017.csv",
        "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,"
        "View Position,OriginalImage[Width,Height],OriginalImagePixelSpacing[x,y],",
        "00000001_000.png,Cardiomegaly,0,1,058Y,M,PA,2682,2749,0.143,0.143,",
    )


MAKERS = {
    "chexpert": chexpert,
    "chexpert_plus": plus,
    "mimic": mimic,
    "nih": nih,
    "padchest": lambda folder: padchest(folder, "['normal']"),
    "vindr": lambda folder: boxes(folder, "a0,Cardiomegaly,3,R8"),
    "plain": lambda folder: write(folder / "films.csv", f"path,{LABELS}", f"a.png,{cells()}"),
}


@pytest.mark.parametrize("name", MAKERS)
def test_a_layout_is_told_from_the_columns_and_a_wrong_one_named(tmp_path, name):
    csv = MAKERS[name](tmp_path)
    labels = read_labels(csv)
    assert labels.layout == name
    assert set(read_labels(csv, name).raw) == set(labels.raw)
    for other in set(MAKERS) - {name, "plain"}:
        hint = f"set layout to {name} or auto" if name != "plain" else "the nearest present is"
        with pytest.raises(CohortError, match=hint) as caught:
            read_labels(csv, other)
        assert "\n" not in str(caught.value)


def test_parameters_name_every_layout():
    allowed = typing.get_args(Caption.model_fields["layout"].annotation)
    assert allowed == ("auto", *LAYOUTS)


@pytest.mark.skipif("CHEXPERT_CSV" not in os.environ, reason="CHEXPERT_CSV names no train.csv")
def test_the_papers_table_1_on_chexpert_itself():
    start = time.process_time()
    table = load_cohort(os.environ["CHEXPERT_CSV"], check_images=False).table
    counts = table1(split_by_patient(table)).loc["Total"]
    assert time.process_time() - start < 20
    assert counts["films"] == 191_027
    assert counts["patients"] == 64_534
    names = ["Pleural Effusion", "Cardiomegaly", "No Finding", "Support Devices"]
    assert counts[names].tolist() == [86_477, 30_092, 16_974, 108_085]


def test_columns_are_read_as_text_and_reports_not_at_all(tmp_path):
    from prism_nb.columns import read_table

    csv = write(tmp_path / "a.csv", "id, report ,section_x,n", '007,"a\nb",c, 1.0 ', ",,,")
    table = read_table(csv, "CSV")
    assert table.to_dict("list") == {"id": ["007"], "n": ["1.0"]}
    lines = write(tmp_path / "a.jsonl", '{"id": "007", "n": 1.0}', '{"id": "8", "n": null}')
    table = read_table(lines, "file")
    assert table["id"].tolist() == ["007", "8"]
    assert pd.isna(table["n"][1])
    (tmp_path / "cut.csv.gz").write_bytes(gzip.compress(b"a,b\n1,2\n" * 99)[:30])
    with pytest.raises(CohortError, match=r"cut\.csv\.gz cannot be read"):
        read_table(tmp_path / "cut.csv.gz", "CSV")
