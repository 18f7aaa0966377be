"""The phantom's truth: exactness, locality, the graph's probabilities, the layout on disk."""

from itertools import product

import numpy as np
import pandas as pd
import pytest

from prism_nb import phantom
from prism_nb.cohort import load_cohort
from prism_nb.phantom.graph import PREVALENCE, shared_variance

SIZE = 96


@pytest.mark.parametrize("finding", phantom.DRAWN)
@pytest.mark.parametrize("number", [1, 2, 3, 4, 5])
def test_counterfactual_changes_its_layers_only(finding, number):
    patient = phantom.sample_patient(0, number)
    value = 1 - patient.labels[finding]
    factual = phantom.render(patient, SIZE)
    other, mask = phantom.counterfactual(patient, {finding: value}, SIZE)
    assert mask.any(), "an intervention that changes a label must change the film"
    layers = {"Pleural Effusion": "fluid", "Support Devices": "devices"}
    if finding in layers:
        allowed = factual.masks[layers[finding]] | other.masks[layers[finding]]
        wider = allowed.copy()  # the fluid's soft upper edge lies just outside its mask
        for axis, step in product((0, 1), (1, -1)):
            wider |= np.roll(allowed, step, axis)
        assert not (mask & ~wider).any()
    assert (factual.image == other.image)[~mask].all()


@pytest.mark.parametrize("number", [1, 2, 3])
def test_empty_intervention_and_return_give_the_same_bytes(number):
    patient = phantom.sample_patient(0, number)
    film = phantom.render(patient, SIZE).image
    again = {finding: patient.labels[finding] for finding in phantom.DRAWN}
    assert (phantom.render(patient, SIZE, {}).image == film).all()
    assert (phantom.render(patient, SIZE, again).image == film).all()


def test_a_film_does_not_depend_on_what_was_rendered_before():
    first = phantom.render(phantom.sample_patient(0, 1), SIZE).image
    for number in range(2, 9):
        phantom.render(phantom.sample_patient(0, number), SIZE)
    assert (phantom.render(phantom.sample_patient(0, 1), SIZE).image == first).all()


def test_heart_width_follows_the_ratio():
    for number in range(1, 30):
        patient = phantom.sample_patient(3, number)
        small = phantom.render(patient, 256, {"Cardiomegaly": 0}).masks["heart"]
        large = phantom.render(patient, 256, {"Cardiomegaly": 1}).masks["heart"]
        measured = large.any(0).sum() / small.any(0).sum()
        wanted = patient.severity["large_ratio"] / patient.severity["small_ratio"]
        assert measured == pytest.approx(wanted, rel=0.06)


def test_marginals_do_not_depend_on_the_dial():
    shares = {}
    for dial in (0.5658, 0.75, 0.95):
        labels = pd.DataFrame(phantom.sample_patient(1, n, dial).labels for n in range(3000))
        shares[dial] = labels.mean()
        for finding, prevalence in PREVALENCE.items():
            assert labels[finding].mean() == pytest.approx(prevalence, abs=0.03)
        given = labels.loc[labels["Pleural Effusion"] == 1, "Support Devices"].mean()
        assert given == pytest.approx(dial, abs=0.035)


def test_intervening_on_one_finding_leaves_the_others():
    patient = phantom.sample_patient(0, 7)
    for finding, value in product(phantom.DRAWN, (0, 1)):
        labels = phantom.intervene(patient, {finding: value})
        others = [k for k in phantom.DRAWN if k != finding]
        assert all(labels[k] == patient.labels[k] for k in others)
        ill = labels["Pleural Effusion"] or labels["Cardiomegaly"]
        assert labels["No Finding"] == int(not ill)


@pytest.mark.parametrize("dial", [0.2, 0.99])
def test_impossible_dial_is_refused(dial):
    with pytest.raises(ValueError, match="device_given_effusion"):
        shared_variance(dial)


def test_a_finding_that_is_not_drawn_is_refused():
    with pytest.raises(ValueError, match="can set Pleural Effusion"):
        phantom.render(phantom.sample_patient(0, 1), 32, {"Edema": 1})


def test_cohort_on_disk_is_chexperts_layout(tmp_path):
    csv = phantom.write_cohort(tmp_path, 12, 48, seed=5)
    cohort = load_cohort(csv)
    assert cohort.settings["layout"] == "chexpert"
    assert len(cohort.table) == 12
    assert cohort.rejected.empty
    film = cohort.table.iloc[3]
    patient = phantom.patient_of(tmp_path, film["film_id"])
    assert {k: film[k] for k in phantom.DRAWN} == {k: patient.labels[k] for k in phantom.DRAWN}


def test_truth_is_found_again_from_disk(tmp_path):
    phantom.write_cohort(tmp_path, 2, 48, seed=5)
    patient = phantom.sample_patient(5, 2)
    do = {"Support Devices": 1 - patient.labels["Support Devices"]}
    film, mask = phantom.true_counterfactual(tmp_path, "patient00002_study1_view1_frontal", do)
    assert (film == phantom.render(patient, 48, do).image).all()
    assert mask.any()
    with pytest.raises(ValueError, match="not a phantom film"):
        phantom.true_counterfactual(tmp_path, "00000075_000", do, 48)


def test_balanced_films_hold_every_pair_for_every_patient(tmp_path):
    phantom.write_cohort(tmp_path, 1, 32, seed=5)
    films, labels, patients = phantom.balanced_films(tmp_path, 3, size=32)
    frame = pd.DataFrame(labels)[["Pleural Effusion", "Support Devices"]].assign(patient=patients)
    assert films.shape == (12, 32, 32)
    assert len(frame.drop_duplicates()) == 12


def test_lines_never_vanish_on_a_small_film():
    seen = 0
    for number in range(1, 40):
        patient = phantom.sample_patient(2, number)
        film = phantom.render(patient, 64, {"Support Devices": 1})
        for kind in patient.severity["kinds"]:
            seen += 1
            assert film.masks[kind].sum() > 10, kind
    assert seen > 30
