"""Captions: Listing 1 as printed, the default template, edits that change one finding."""

import numpy as np
import pandas as pd
import pytest

from prism_nb.captions import (
    PromptError,
    caption,
    captions,
    edit_labels,
    prompt_pair,
    untrained_words,
    vocabulary,
)
from prism_nb.findings import FINDINGS, PATHOLOGIES, LabelError, resolve_labels

NORMAL = dict.fromkeys(FINDINGS, 0.0) | {"No Finding": 1.0}
BLANK = dict.fromkeys(FINDINGS, np.nan)


def film(*present, **other):
    labels = dict.fromkeys(FINDINGS, 0.0) | dict.fromkeys(present, 1.0) | other
    return labels


def listing1(row):
    """Listing 1 of the paper, as printed but for CheXpert's spelling of the second label."""
    findings = []
    for condition in FINDINGS:
        if row[condition] == 1:
            findings.append(condition)
    if findings:
        return "Chest X-ray showing " + ", ".join(findings)
    return "Normal chest X-ray with no significant findings"


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        (NORMAL, "Chest X-ray showing No Finding"),
        (BLANK, "Normal chest X-ray with no significant findings"),
        ({"Edema": -1}, "Normal chest X-ray with no significant findings"),
        (film("Support Devices"), "Chest X-ray showing Support Devices"),
        (
            NORMAL | {"Support Devices": 1},
            "Chest X-ray showing No Finding, Support Devices",
        ),
        (
            film("Pleural Effusion", "Cardiomegaly"),
            "Chest X-ray showing Cardiomegaly, Pleural Effusion",
        ),
    ],
)
def test_listing1_with_its_quirks(labels, expected):
    assert caption(labels, "listing1") == expected


def test_listing1_on_random_rows():
    rng = np.random.default_rng(0)
    table = pd.DataFrame(rng.choice([1, 0, -1, np.nan], (300, 14)), columns=list(FINDINGS))
    expected = [listing1(row) for _, row in table.iterrows()]
    assert captions(table, "listing1") == expected


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        (NORMAL, "normal chest x-ray with no significant findings"),
        ({"Edema": 0}, "normal chest x-ray with no significant findings"),
        (BLANK, "chest x-ray"),
        ({}, "chest x-ray"),
        ({"Support Devices": 0}, "chest x-ray"),  # no pathology is known
        (film(), "chest x-ray"),  # "No Finding" is 0: something unnamed is there
        (film("Support Devices"), "chest x-ray showing support devices"),
        (NORMAL | {"Support Devices": 1}, "chest x-ray showing support devices"),
        ({"Edema": -1}, "chest x-ray showing possible edema"),
        (
            {"Pleural Effusion": 1, "Edema": -1, "Support Devices": 1},
            "chest x-ray showing possible edema, pleural effusion, support devices",
        ),
    ],
)
def test_plain(labels, expected):
    assert caption(labels) == expected
    assert caption(pd.Series(labels, dtype=float)) == expected


def test_only_uncertain_is_not_normal_by_default():
    raw = pd.DataFrame([BLANK | {"Edema": -1.0}])
    row = resolve_labels(raw, "zeros", "absent").iloc[0]
    assert caption(row) == "chest x-ray"
    assert caption(row, "listing1").startswith("Normal")


def test_negatives():
    labels = {"Pleural Effusion": 1, "Cardiomegaly": 0, "Support Devices": 0, "No Finding": 0}
    expected = "chest x-ray showing pleural effusion, no cardiomegaly, no support devices"
    assert caption(labels, negatives=True) == expected
    assert caption({}, negatives=True) == "chest x-ray"


def test_captions_follow_the_table_and_word_each_row():
    rng = np.random.default_rng(1)
    table = pd.DataFrame(rng.choice([1, 0, -1, np.nan], (200, 14)), columns=list(FINDINGS))
    table.insert(0, "film_id", "x")
    expected = [caption(row) for _, row in table.iterrows()]
    assert captions(table) == expected
    assert captions(table.iloc[:0]) == []


def test_unknown_template():
    with pytest.raises(PromptError, match=r"'fancy'; it must be one of plain, listing1"):
        caption(NORMAL, "fancy")


@pytest.mark.parametrize("template", ["plain", "listing1"])
def test_pairs_differ_in_one_finding(template):
    start = "Chest X-ray showing " if template == "listing1" else "chest x-ray showing "
    both = film("Pleural Effusion", "Support Devices")
    source, target = prompt_pair(both, "support_devices", False, template)
    assert source.lower() == "chest x-ray showing pleural effusion, support devices"
    assert target.lower() == "chest x-ray showing pleural effusion"
    assert source.startswith(start)
    back, again = prompt_pair(edit_labels(both, "Support Devices", False), "Support Devices", True)
    assert (back, again) == prompt_pair(both, "Support Devices", False)[::-1]


def test_removing_the_only_finding_gives_a_normal_film():
    only = film("Cardiomegaly")
    normal = "normal chest x-ray with no significant findings"
    assert prompt_pair(only, "Cardiomegaly", False) == ("chest x-ray showing cardiomegaly", normal)
    assert prompt_pair(only, "Cardiomegaly", False, "listing1")[1] == (
        "Chest X-ray showing No Finding"
    )
    assert prompt_pair(NORMAL, "Edema", True) == (normal, "chest x-ray showing edema")


@pytest.mark.parametrize(
    ("labels", "finding", "present", "message"),
    [
        (film("Edema"), "Edema", True, "already present"),
        (film("Edema"), "Pneumonia", False, "already absent"),
        (film("Edema"), "No Finding", True, "follows from the pathologies"),
        ({"Edema": 1}, "Pneumonia", False, "not known"),
    ],
)
def test_edits_without_effect_are_refused(labels, finding, present, message):
    with pytest.raises(PromptError, match=message):
        prompt_pair(labels, finding, present)


def test_unknown_finding_in_an_edit():
    with pytest.raises(LabelError, match="nearest is 'Edema'"):
        prompt_pair(NORMAL, "Edma", True)


@pytest.mark.parametrize("kind", [dict, pd.Series])
def test_edit_labels(kind):
    labels = kind(film("Edema", "Fracture"))
    once = edit_labels(labels, "edema", False)
    assert (once["Edema"], once["Fracture"], once["No Finding"]) == (0, 1, 0)
    twice = edit_labels(once, "Fracture", False)
    assert twice["No Finding"] == 1
    assert edit_labels(twice, "Edema", True)["No Finding"] == 0
    assert (labels["Edema"], labels["No Finding"]) == (1, 0)  # left as it was
    assert isinstance(once, kind)


def test_a_device_edit_leaves_no_finding_alone():
    for value in (0.0, 1.0):
        edited = edit_labels(film(**{"No Finding": value}), "Support Devices", True)
        assert edited["No Finding"] == value


def test_untrained_words():
    trained = captions(pd.DataFrame([film("Pleural Effusion"), NORMAL]))
    assert untrained_words("chest X-ray showing severe pleural effusion", trained) == ["severe"]
    prompt = "chest xray of the patient without medical devices"
    assert " ".join(untrained_words(prompt, trained)) == prompt.removeprefix("chest ")
    assert untrained_words("", trained) == []


def test_vocabulary_covers_every_template():
    table = pd.DataFrame([dict.fromkeys(FINDINGS, value) for value in (1, 0, -1, np.nan)])
    table.loc[len(table)] = NORMAL
    texts = captions(table, "listing1") + captions(table) + captions(table, negatives=True)
    words = vocabulary()
    assert untrained_words(" ".join(texts), [" ".join(words)]) == []
    assert untrained_words(" ".join(words), texts) == []
    assert words == sorted(words)
    assert len(PATHOLOGIES) == 12
