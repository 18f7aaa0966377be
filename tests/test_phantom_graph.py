"""The phantom's graph: prevalences, the dial, what follows from what, and what cannot be set."""

import subprocess
import sys
import time
from itertools import combinations

import numpy as np
import pandas as pd
import pytest
from scipy.special import expit

from prism_nb.cohort import split_by_patient
from prism_nb.findings import FINDINGS, PATHOLOGIES
from prism_nb.phantom import calibrate, graph
from prism_nb.phantom.anatomy import body
from prism_nb.phantom.devices import lead_paths
from prism_nb.phantom.graph import (
    DEVICE_KINDS,
    DIALS,
    ENLARGED,
    IMPLANTS,
    MODES,
    PREVALENCE,
    REQUIRES,
    SEVERITIES,
    exogenous,
    intervene,
    mechanism,
    redrawn,
    sample_patient,
)

EFFUSION, HEART, DEVICES, HEALTHY = (
    "Pleural Effusion",
    "Cardiomegaly",
    "Support Devices",
    "No Finding",
)
# what a finding can change, besides No Finding and devices
FOLLOWS = {
    EFFUSION: {"Atelectasis", "Lung Opacity"},
    HEART: {"Enlarged Cardiomediastinum"},
    "Consolidation": {"Pneumonia", "Lung Opacity"},
    **{k: {"Lung Opacity"} for k in ("Edema", "Pneumonia", "Atelectasis", "Lung Lesion")},
}
PATIENTS = 20_000


@pytest.fixture(scope="module")
def normals():
    """The draws of 20,000 patients, stacked: name -> array.

    Chance alone moves a share of .5 by .35 points (one standard deviation) in so many.
    """
    rows = [exogenous(1, number) for number in range(1, PATIENTS + 1)]
    return {name: np.array([row[name] for row in rows]) for name in rows[0]}


@pytest.fixture(scope="module", params=MODES)
def people(request):
    return [sample_patient(3, number, mode=request.param) for number in range(1, 121)]


# prevalences and the dial


@pytest.mark.parametrize("mode", MODES)
def test_prevalences_are_table_1s(normals, mode):
    labels, place, _ = mechanism(normals, 0.75, mode)
    assert list(labels) == list(FINDINGS) == list(PREVALENCE)
    for label, share in PREVALENCE.items():
        assert labels[label].mean() == pytest.approx(share, abs=0.005), label
    assert place["pacemaker"].mean() == pytest.approx(0.08, abs=0.005)


def test_prevalences_are_the_papers_counts():
    counts = {EFFUSION: 86_477, HEART: 30_142, HEALTHY: 16_974, DEVICES: 108_085}
    for label, count in counts.items():
        assert PREVALENCE[label] == pytest.approx(count / 191_027, abs=5e-5)


def test_the_split_is_table_1s():
    patients = pd.DataFrame({"patient_id": [f"patient{n:05d}" for n in range(10_000)]})
    shares = split_by_patient(patients, 0.15, 0.15)["split"].value_counts() / 100
    assert shares.to_dict() == {"train": 72.25, "val": 12.75, "test": 15.0}


@pytest.mark.parametrize("mode", MODES)
def test_one_patient_is_one_of_the_population(normals, mode):
    labels, place, ready = mechanism(normals, 0.9, mode)
    for index in range(300):
        patient = sample_patient(1, index + 1, confounding=0.9, mode=mode)
        assert patient.labels == {label: int(labels[label][index]) for label in FINDINGS}
        there = place if patient.labels[DEVICES] else ready
        assert set(patient.kinds) == {kind for kind in DEVICE_KINDS if there[kind][index]}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("dial", "paced"), [(0.5658, 0.08), (0.68, 0.154), (0.75, 0.2), (0.95, 0.4), (0.97, 0.42)]
)
def test_the_dial_moves_the_links_and_no_marginal(mode, dial, paced):
    labels, place, _ = calibrate.population(300_000, 1, dial, mode)
    assert labels[DEVICES][labels[EFFUSION]].mean() == pytest.approx(dial, abs=0.005)
    assert place["pacemaker"][labels[HEART]].mean() == pytest.approx(paced, abs=0.007)
    assert place["pacemaker"].mean() == pytest.approx(0.08, abs=0.003)
    for label, share in PREVALENCE.items():
        assert labels[label].mean() == pytest.approx(share, abs=0.004), label


def test_a_confounded_device_is_tied_to_effusion_alone():
    labels, place, _ = calibrate.population(300_000, 2, 0.95)
    for label in (HEART, "Edema", "Consolidation", "Pneumothorax", "Fracture"):
        assert labels[DEVICES][labels[label]].mean() == pytest.approx(0.5658, abs=0.012), label
    shown = place["chest_tube"].mean(), place["chest_tube"][labels[DEVICES]].mean() * 0.5658
    assert shown[0] == pytest.approx(shown[1], abs=0.002)


def test_any_of_the_kinds_is_support_devices(normals):
    for mode in MODES:
        labels, place, ready = mechanism(normals, 0.75, mode)
        assert (np.any(list(place.values()), axis=0) == labels[DEVICES]).all()
        assert np.any(list(ready.values()), axis=0).all()
        assert all((place[whole] | ~place[part]).all() for part, whole in REQUIRES.items())
        assert all(0.005 < place[kind].mean() < 0.5 for kind in DEVICE_KINDS)


def test_severities_can_be_seen_and_sides_have_their_shares():
    people = [sample_patient(2, number) for number in range(1, 2001)]
    severity = pd.DataFrame([patient.severity for patient in people])
    assert severity["effusion_ml"].between(200, 2500).all()
    assert severity["effusion_ml"].median() == pytest.approx(650, rel=0.06)
    assert severity["heart_ratio"].between(0.53, 0.70).all()
    assert severity["normal_ratio"].between(0.38, 0.495).all()
    assert (severity[list(SEVERITIES)] > 0).all(axis=None)
    for name, dial in SEVERITIES.items():
        assert severity[name].between(dial.low, dial.high).all()
    sides = severity["effusion_side"].value_counts(normalize=True)
    assert sides.to_dict() == pytest.approx({"right": 0.4, "left": 0.3, "both": 0.3}, abs=0.04)
    about = pd.DataFrame([(p.sex == "Male", p.view == "AP", p.age) for p in people]).mean()
    assert about.tolist() == pytest.approx([0.59, 0.85, 61], rel=0.04)
    assert not any(patient.supine for patient in people if patient.view == "PA")


def test_mildness_is_the_rank_of_the_severity(people):
    for label, name in DIALS.items():
        ranks = [patient.mildness(label) for patient in people]
        amounts = [patient.severity[name] for patient in people]
        assert (np.diff(np.array(amounts)[np.argsort(ranks)]) >= 0).all()
        assert np.mean(ranks) == pytest.approx(0.5, abs=0.1)
    assert people[0].mildness(DEVICES) == 1


def test_the_calibrator_finds_the_numbers_again():
    normals = calibrate.draws(60_000, 5)
    scale, starts = calibrate.fit(normals)
    assert scale == pytest.approx(graph.SCALE, abs=0.02)
    for label, start in starts.items():
        assert start == pytest.approx(graph.GRAPH[label][1], abs=0.02), label
    values = graph.background(normals)
    effusion, heart, air = (
        expit(starts[label] + scale * graph.score(label, values))
        for label in (EFFUSION, HEART, "Pneumothorax")
    )
    at = graph.LINKS["device | effusion"].index(0.75)
    care, rhythm = graph.LINKS["care"][at], graph.LINKS["rhythm"][at]
    device = PREVALENCE[DEVICES]
    assert calibrate.common_cause(0.75, device, effusion[:500]) == pytest.approx(care, abs=0.02)
    found = calibrate.common_cause(0.2 / device, 0.08 / device, heart[:500])
    assert found == pytest.approx(rhythm, abs=0.02)
    wanted = graph.LINKS["base"][at], graph.LINKS["drain"][at]
    assert calibrate.treat(0.75, 0.2, effusion, heart, air) == pytest.approx(wanted, abs=0.005)


# interventions


def test_without_do_the_world_is_the_patients(people):
    for patient in people:
        for effect in ("direct", "total"):
            world = intervene(patient, effect=effect)
            assert world.labels == patient.labels
            assert world.devices == (patient.kinds if patient.labels[DEVICES] else ())
        for name, dial in SEVERITIES.items():
            healthy = patient.severity["normal_ratio"] if dial.label == HEART else 0
            ill = patient.labels[dial.label]
            assert world.severity[name] == (patient.severity[name] if ill else healthy)


def test_no_finding_follows_from_the_others(people):
    for patient in people[:40]:
        for label in PATHOLOGIES:
            assert intervene(patient, {label: 1}).labels[HEALTHY] == 0
        none = dict.fromkeys(PATHOLOGIES, 0)
        for devices in (0, 1):
            world = intervene(patient, {**none, DEVICES: devices})
            assert world.labels[HEALTHY] == 1
            assert bool(world.devices) == devices
        assert intervene(patient, none).devices == intervene(patient).devices
        lone = intervene(patient, {**none, "Fracture": 1}).labels
        assert [label for label in PATHOLOGIES if lone[label]] == ["Fracture"]


@pytest.mark.parametrize("label", PATHOLOGIES)
def test_what_does_not_follow_stays(people, label):
    for patient in people:
        here = intervene(patient)
        do = {label: 1 - patient.labels[label]}
        for effect in ("direct", "total"):
            world = intervene(patient, do, effect)
            changed = {k for k in FINDINGS if world.labels[k] != patient.labels[k]}
            allowed = {label, HEALTHY} | (FOLLOWS.get(label, set()) if effect == "total" else set())
            if label == EFFUSION and effect == "total":
                allowed |= FOLLOWS["Atelectasis"]
            treats = patient.mode == "treatment" and effect == "total"
            treats &= label in (EFFUSION, "Pneumothorax", HEART)
            assert changed <= allowed | ({DEVICES} if treats else set())
            kinds = set(world.devices) ^ set(here.devices)
            parts = {"pacemaker", *REQUIRES} if label == HEART else {"chest_tube"}
            assert kinds <= (parts if treats else set())
            moved = {k for k in world.severity if world.severity[k] != here.severity[k]}
            assert moved == {DIALS[k] for k in changed if k in DIALS}


def test_total_effects_have_the_size_that_the_graph_gives_them(normals):
    both = [mechanism(normals, 0.75, "confounded", {EFFUSION: value}) for value in (0, 1)]
    healthy, ill = (labels["Atelectasis"] for labels, *_ in both)
    assert not (healthy & ~ill).any(), "an effusion never removes an atelectasis"
    log_odds = np.diff([np.log(x.mean() / (1 - x.mean())) for x in (healthy, ill)])
    assert log_odds == pytest.approx(0.8 * graph.SCALE, abs=0.05)
    assert all((both[0][1][kind] == both[1][1][kind]).all() for kind in DEVICE_KINDS)
    both = [mechanism(normals, 0.75, "treatment", {EFFUSION: value})[1] for value in (0, 1)]
    drained = both[1]["chest_tube"].mean() - both[0]["chest_tube"].mean()
    assert 0.3 < drained < 0.65
    both = [mechanism(normals, 0.95, "treatment", {HEART: value})[1] for value in (0, 1)]
    assert [place["pacemaker"].mean() for place in both] == pytest.approx([0.02, 0.4], abs=0.01)


def test_treatment_follows_under_total_only():
    moved = 0
    for number in range(1, 60):
        patient = sample_patient(4, number, mode="treatment")
        do = {EFFUSION: 1 - patient.labels[EFFUSION]}
        here = intervene(patient).devices
        assert intervene(patient, do, "direct").devices == here
        moved += intervene(patient, do, "total").devices != here
        held = intervene(patient, {**do, "chest_tube": int("chest_tube" in here)}, "total")
        assert ("chest_tube" in held.devices) == ("chest_tube" in here)
    assert moved > 10


def test_do_then_undo_is_the_same_world(people):
    for patient in people[:60]:
        for effect in ("direct", "total"):
            here = intervene(patient, effect=effect)
            for label in (*PATHOLOGIES, DEVICES):
                assert intervene(patient, {label: here.labels[label]}, effect) == here
            for kind in DEVICE_KINDS:
                assert intervene(patient, {kind: int(kind in here.devices)}, effect) == here
            for name in SEVERITIES:
                assert intervene(patient, {name: here.severity[name]}, effect) == here


def test_disjoint_dos_commute(people):
    changes = [
        {EFFUSION: 1},
        {"heart_ratio": 0.61},
        {"edema": 0.0},
        {"pacemaker": 1},
        {"ecg": 0},
        {"Lung Lesion": 0},
    ]
    for patient in people[:30]:
        for first, second in combinations(changes, 2):
            one, other, both = (intervene(patient, do) for do in (first, second, first | second))
            assert both == intervene(patient, second | first)
            here = intervene(patient)
            for name in set(FINDINGS) - {HEALTHY, DEVICES}:
                wanted = one if one.labels[name] != here.labels[name] else other
                assert both.labels[name] == wanted.labels[name]
            added = set(one.devices) | set(other.devices)
            lost = set(here.devices) - (set(one.devices) & set(other.devices))
            assert set(both.devices) == added - lost


def test_severities_are_dials(people):
    patient = people[0]
    for name, dial in SEVERITIES.items():
        for value in np.linspace(dial.low, dial.high, 7):
            world = intervene(patient, {name: value})
            assert world.severity[name] == value
            limit = ENLARGED if dial.label == HEART else 0
            assert world.labels[dial.label] == int(value > limit)
            assert intervene(patient, {name: value, dial.label: int(value > limit)}) == world
    assert intervene(patient, {EFFUSION: 1}).severity["effusion_ml"] >= 200


def test_a_device_comes_and_goes_with_its_parts(people):
    coils = 0
    for patient in people:
        with_can = intervene(patient, {"pacemaker": 1}).devices
        assert with_can[:2] == ("pacemaker", "pacemaker_leads")
        coils += "icd_coils" in with_can
        without = intervene(patient, {"pacemaker": 0}).devices
        assert (
            set(without) == set(with_can) - {"pacemaker", *REQUIRES} or not patient.labels[DEVICES]
        )
        can_only = intervene(patient, {"pacemaker": 1, "pacemaker_leads": 0}).devices
        assert not set(REQUIRES) & set(can_only)
        whole = intervene(patient, {"pacemaker": 1, "icd_coils": 1}).devices
        assert whole[:3] == ("pacemaker", "pacemaker_leads", "icd_coils")
        assert intervene(patient, {DEVICES: 1}).devices == patient.kinds
        none = intervene(patient, dict.fromkeys(DEVICE_KINDS, 0))
        assert none.devices == ()
        assert none.labels[DEVICES] == 0
        assert none == intervene(patient, {DEVICES: 0})
        alone = intervene(patient, {**dict.fromkeys(DEVICE_KINDS, 0), "port": 1})
        assert alone.devices == ("port",)
        assert alone.labels[DEVICES] == 1
    assert 0.2 < coils / len(people) < 0.5


# the same again


def test_another_process_draws_the_same_patient():
    script = (
        "from prism_nb.phantom.graph import *\n"
        "p = [sample_patient(7, n, 2, 0.9, 'treatment') for n in (1, 2, 3)]\n"
        "print(p, [intervene(x, {'Edema': 1}, 'total') for x in p], p[0].draw('a').random())"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    people = [sample_patient(7, number, 2, 0.9, "treatment") for number in (1, 2, 3)]
    worlds = [intervene(patient, {"Edema": 1}, "total") for patient in people]
    assert run.stdout.strip() == f"{people} {worlds} {people[0].draw('a').random()}"


def test_order_and_dial_touch_no_other_draw():
    first = sample_patient(0, 5)
    for number in (9, 4, 5):
        again = sample_patient(0, number)
    assert again == first
    for dial, mode in ((0.6, "confounded"), (0.97, "treatment")):
        other = sample_patient(0, 5, confounding=dial, mode=mode)
        assert (other.normals, other.severity) == (first.normals, first.severity)
        assert (other.age, other.sex, other.view) == (first.age, first.sex, first.view)
        assert other.draw("noise").random() == first.draw("noise").random()


def test_another_study_is_of_the_same_patient():
    findings, lines = 0, 0
    for number in range(1, 200):
        first, second = (sample_patient(0, number, study) for study in (1, 2))
        assert (first.sex, first.age) == (second.sex, second.age)
        for name in ("normal_ratio", "heart_ratio"):
            assert first.severity[name] == second.severity[name]
        assert first.labels[HEART] == second.labels[HEART]
        assert first.labels[DEVICES] == second.labels[DEVICES]
        stay = {"pacemaker", *REQUIRES, *IMPLANTS}
        assert stay & set(first.kinds) == stay & set(second.kinds)
        assert first.draw_patient("body").random() == second.draw_patient("body").random()
        assert first.draw("noise").random() != second.draw("noise").random()
        findings += first.labels != second.labels
        lines += first.kinds != second.kinds
    assert findings > 150
    assert lines > 60


def test_redrawn_changes_what_one_finding_looks_like_and_no_other_draw():
    patient, other = sample_patient(0, 5), sample_patient(0, 1005)
    moved = {
        HEART: {"heart_ratio", "normal_ratio", "lead_ratio"},
        EFFUSION: {"effusion_ml"},
        "Edema": {DIALS["Edema"]},
        DEVICES: set(),
    }
    for label, names in moved.items():
        again = redrawn(patient, label, 1005)
        changed = {k for k, v in again.severity.items() if v != patient.severity.get(k)}
        assert changed - {"effusion_side"} == names
        assert again.severity["effusion_ml"] in (
            patient.severity["effusion_ml"],
            other.severity["effusion_ml"],
        )
        assert (again.labels, again.age, again.sex) == (patient.labels, patient.age, patient.sex)
        assert again.draw("noise").random() == patient.draw("noise").random()
        assert again.draw_patient("anatomy").random() == patient.draw_patient("anatomy").random()
        whose = other if label == DEVICES else patient
        assert again.kinds == whose.kinds
        assert again.draw("device ecg").random() == whose.draw("device ecg").random()
    again = redrawn(patient, HEART, 1005)
    assert body(again).normal_ratio != body(patient).normal_ratio
    for name, path in lead_paths(patient, body(patient)).items():
        assert np.array_equal(lead_paths(again, body(again))[name], path), "leads stay"


def test_a_patient_is_drawn_quickly():
    taken = []
    for batch in range(5):
        start = time.process_time()  # other work on the machine does not count
        for number in range(100):
            sample_patient(batch, number)
        taken.append((time.process_time() - start) / 100)
    assert min(taken) < 1.5e-3


# bad input


@pytest.mark.parametrize(
    ("do", "says"),
    [
        ({"pacemaker": 0, "pacemaker_leads": 1}, "cannot be there without pacemaker: set pace"),
        ({"pacemaker_leads": 1, DEVICES: 0}, "pacemaker_leads cannot be there without pacemaker"),
        ({"pacemaker_leads": 0, "icd_coils": 1}, "icd_coils cannot be there without pacemaker_l"),
        ({"Pleural Efusion": 1}, "nearest is 'Pleural Effusion'. Choose from: Pleural Effusion"),
        ({"cardiomegaly": 1}, "no 'cardiomegaly'; the nearest is 'Cardiomegaly'"),
        ({"pacemaker_lead": 1}, "nearest is 'pacemaker_leads'"),
        ({3: 1}, "do has no 3"),
        ({HEALTHY: 1}, "No Finding follows from the other findings: set those to 0"),
        ({"effusion_ml": 2501}, "effusion_ml is 2501; it must be a number from 0 to 2500 ml"),
        ({"effusion_ml": -1}, "must be a number from 0"),
        ({"edema": float("nan")}, "edema is nan; it must be a number from 0 to 1"),
        ({"edema": "severe"}, "edema is 'severe'; it must be a number"),
        ({"heart_ratio": 0.2}, "must be a number from 0.36 to 0.7 of the thorax"),
        ({EFFUSION: 2}, "Pleural Effusion is 2; it must be 0 or 1"),
        ({EFFUSION: 0.5}, "Pleural Effusion is 0.5; it must be 0 or 1"),
        ({EFFUSION: None}, "Pleural Effusion is None; it must be 0 or 1"),
        ({"ecg": "yes"}, "ecg is 'yes'; it must be 0 or 1"),
        ({EFFUSION: 0, "effusion_ml": 500}, "500 makes Pleural Effusion 1, which is set to 0"),
        ({HEART: 1, "heart_ratio": 0.45}, "0.45 makes Cardiomegaly 0, which is set to 1"),
        ({DEVICES: 0, "port": 1}, "Support Devices is set to 0, but the rest of do leaves port"),
        ({DEVICES: 1, **dict.fromkeys(DEVICE_KINDS, 0)}, "leaves no device"),
    ],
)
def test_an_impossible_do_is_one_clear_line(do, says):
    patient = next(p for p in (sample_patient(0, n) for n in range(1, 50)) if not p.labels[DEVICES])
    for effect in ("direct", "total"):
        with pytest.raises(ValueError) as caught:
            intervene(patient, do, effect)
        assert says in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({"confounding": 0.3}, "confounding is 0.3; P.device . effusion. must lie between 0.5658"),
        ({"confounding": 0.99}, "and 0.97"),
        ({"confounding": float("nan")}, "confounding is nan"),
        ({"mode": "both"}, "mode is 'both'; it must be confounded or treatment"),
        ({"seed": -1}, "seed -1, number 1, study 1: seed and number must be whole and 0 or more"),
        ({"study": 0}, "study from 1"),
    ],
)
def test_a_patient_that_cannot_be_drawn_is_refused(asked, says):
    with pytest.raises(ValueError, match=says):
        sample_patient(**{"seed": 0, "number": 1, **asked})
    with pytest.raises(ValueError, match="effect is 'all'; it must be direct or total"):
        intervene(sample_patient(0, 1), {EFFUSION: 1}, effect="all")
