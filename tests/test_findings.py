"""The vocabulary: policies against hand-made truths, refusals that name what is wrong."""

import numpy as np
import pandas as pd
import pytest

from prism_nb.findings import (
    FINDINGS,
    PAPER_HEADS,
    PATHOLOGIES,
    LabelError,
    check_labels,
    finding_from,
    nearest,
    no_finding,
    resolve_labels,
    slug,
)

RAW = pd.DataFrame({"Edema": [1, 0, -1, np.nan], "Fracture": [np.nan, -1, 0, 1]})
NAN = np.nan


def test_vocabulary_is_chexperts():
    assert len(FINDINGS) == 14
    assert (FINDINGS[0], FINDINGS[-1]) == ("No Finding", "Support Devices")
    assert len(PATHOLOGIES) == 12
    assert set(PAPER_HEADS) <= set(FINDINGS)


@pytest.mark.parametrize(
    ("uncertain", "blank", "edema", "fracture"),
    [
        ("ones", "absent", [1, 0, 1, 0], [0, 1, 0, 1]),
        ("zeros", "absent", [1, 0, 0, 0], [0, 0, 0, 1]),
        ("mention", "absent", [1, 0, -1, 0], [0, -1, 0, 1]),
        ("ignore", "absent", [1, 0, NAN, 0], [0, NAN, 0, 1]),
        ("ones", "missing", [1, 0, 1, NAN], [NAN, 1, 0, 1]),
        ("ignore", "missing", [1, 0, NAN, NAN], [NAN, NAN, 0, 1]),
    ],
)
def test_policies(uncertain, blank, edema, fracture):
    resolved = resolve_labels(RAW, uncertain, blank)
    np.testing.assert_array_equal(resolved["Edema"], edema)
    np.testing.assert_array_equal(resolved["Fracture"], fracture)
    assert set(resolved.dtypes) == {np.dtype("float32")}
    assert RAW["Edema"].iloc[2] == -1  # the given frame is left as it was


@pytest.mark.parametrize("policy", [{"uncertain": "one"}, {"blank": "zero"}])
def test_unknown_policy_is_refused(policy):
    with pytest.raises(LabelError, match=r"must be one of"):
        resolve_labels(RAW, **policy)


def test_a_label_of_two_is_named():
    with pytest.raises(LabelError, match=r"Edema is 2\.0 in row 7"):
        check_labels(pd.DataFrame({"Edema": [1.0, 2.0]}, index=[6, 7]))


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ({"Edema": 0}, 1),
        ({"Edema": 1}, 0),
        ({"Edema": -1, "Fracture": 0}, 0),
        ({"Edema": 0, "Support Devices": 1}, 1),  # devices are no pathology
        ({"Edema": 0, "No Finding": 0}, 1),  # what No Finding said before does not count
        ({"Support Devices": 1}, NAN),  # no pathology is known
        ({}, NAN),
    ],
)
def test_no_finding(labels, expected):
    np.testing.assert_equal(no_finding(labels), float(expected))
    np.testing.assert_equal(no_finding(pd.Series(labels, dtype=float)), float(expected))
    np.testing.assert_equal(no_finding(pd.Series(labels, dtype="Float64")), float(expected))


def test_names():
    assert slug("Pleural Effusion") == "pleural_effusion"
    assert {finding_from(slug(name)) for name in FINDINGS} == set(FINDINGS)
    assert finding_from("PLEURAL-effusion ") == "Pleural Effusion"
    with pytest.raises(LabelError, match=r"'Plural Efusion'.*nearest is 'Pleural Effusion'"):
        finding_from("Plural Efusion")
    assert nearest("x", []) == ""
