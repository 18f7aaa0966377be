"""The phantom's films: exactness, locality, geometry, photometry, and no shortcut in them."""

import hashlib
import os
import subprocess
import sys
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from scipy.ndimage import binary_dilation
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.preprocessing import StandardScaler

from prism_nb.phantom import (
    DRAWN,
    anatomy,
    counterfactual,
    disease,
    intervene,
    render,
    renderer,
    sample_patient,
)
from prism_nb.phantom.draw import curve, grid, segments, smooth, stroke
from prism_nb.phantom.graph import DEVICE_KINDS, SEVERITIES
from prism_nb.phantom.renderer import film_grid

SIZE = 128
LAYER = {s.label: s.label for s in SEVERITIES.values()} | {"Support Devices": "devices"}


def healthy(number, **other):
    patient = sample_patient(11, number)
    return replace(patient, labels=dict.fromkeys(patient.labels, 0) | {"No Finding": 1}, **other)


def off():
    return dict.fromkeys(DRAWN, 0)


# Exactness


def layers(patient, film, do, label):
    """Where the film's own layers of a label lie; heart and mediastinum with their soft edges."""
    masks = [film.masks[LAYER[label]]] if LAYER[label] in film.masks else []
    g, b, severity = (
        film_grid(patient, SIZE),
        anatomy.body(patient),
        intervene(patient, do).severity,
    )
    pushed = disease.fluid_shift(patient, severity["effusion_ml"])
    if label in ("Cardiomegaly", "Pleural Effusion"):
        masks.append(anatomy.heart(g, b, severity["heart_ratio"], pushed)[0] > 0)
    if label in ("Enlarged Cardiomediastinum", "Pleural Effusion"):
        masks.append(anatomy.mediastinum(g, b, severity["mediastinum_cm"], 0.7 * pushed) > 0)
    return masks


@pytest.mark.parametrize("label", DRAWN)
def test_a_single_intervention_changes_its_own_layers_only(label):
    for number in range(1, 9):
        patient = sample_patient(0, number)
        do = {label: 1 - patient.labels[label]}
        factual, (other, changed) = render(patient, SIZE), counterfactual(patient, do, SIZE)
        allowed = layers(patient, factual, {}, label) + layers(patient, other, do, label)
        assert changed.any(), (label, number)
        assert not (changed & ~np.logical_or.reduce(allowed)).any(), (label, number)


@pytest.mark.parametrize("label", [*DRAWN[3:12], "Support Devices"])
def test_a_mask_is_where_its_finding_shows(label):
    for number in range(1, 6):
        patient = sample_patient(0, number)
        off = render(patient, SIZE, {label: 0}, shift=False).image
        film = render(patient, SIZE, {label: 1}, shift=False)
        changed = (film.image != off).sum()
        assert changed <= film.masks[LAYER[label]].sum() <= 6 * changed + 40, (label, number)


def test_masks_are_the_callers_own():
    patient = sample_patient(0, 2)
    film = render(patient, SIZE)
    for mask in film.masks.values():
        mask[:] = ~mask
    assert (render(patient, SIZE).image == film.image).all()


def test_a_long_sweep_keeps_few_layers():
    patient = healthy(5)
    for ml in range(1200, 2400, 20):
        render(patient, 64, {"effusion_ml": ml})
    assert len(renderer._base(patient, 64).drawn) <= renderer.KEPT + 1


def test_nothing_done_is_the_same_bytes():
    for number in range(1, 6):
        patient = sample_patient(0, number)
        again = {label: patient.labels[label] for label in DRAWN}
        film = render(patient, SIZE).image
        assert (render(patient, SIZE, {}).image == film).all()
        assert (render(patient, SIZE, again).image == film).all()


def test_done_and_undone_is_the_same_bytes_and_order_does_not_matter():
    patient = sample_patient(0, 3)
    films = {}
    for e, d in product((0, 1), repeat=2):
        one = render(patient, SIZE, {"Pleural Effusion": e, "Support Devices": d}).image
        films[e, d] = one
        assert (
            render(patient, SIZE, {"Support Devices": d, "Pleural Effusion": e}).image == one
        ).all()
    assert (films[patient.labels["Pleural Effusion"], patient.labels["Support Devices"]]
            == render(patient, SIZE).image).all()  # fmt: skip


def test_a_film_does_not_depend_on_what_was_rendered_before():
    first = render(sample_patient(0, 1), SIZE).image
    for number in range(2, 9):
        render(sample_patient(0, number), SIZE, {"Edema": 1})
    assert (render(sample_patient(0, 1), SIZE).image == first).all()


@pytest.mark.parametrize("threads", ["1", "4"])
def test_another_process_with_other_threads_renders_the_same_bytes(threads):
    script = """
import hashlib
from prism_nb.phantom import render, sample_patient
films = [render(sample_patient(0, n), 96, do).image for n in (3, 1) for do in ({}, {"Edema": 1})]
print(hashlib.sha256(b"".join(f.tobytes() for f in films)).hexdigest())
"""
    films = [
        render(sample_patient(0, n), 96, do).image for n in (1, 3) for do in ({}, {"Edema": 1})
    ]
    ours = hashlib.sha256(b"".join(f.tobytes() for f in films[2:] + films[:2])).hexdigest()
    run = subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | {"OMP_NUM_THREADS": threads},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert run.stdout.strip() == ours


def test_full_scatter_reaches_further_than_its_layer():
    patient = healthy(4)
    do = {"effusion_ml": 1500}
    local = render(patient, SIZE, do).image != render(patient, SIZE).image
    wide = render(patient, SIZE, do, full_scatter=True).image
    wide = wide != render(patient, SIZE, full_scatter=True).image
    assert wide.sum() > local.sum()


# Geometry


def width(mask):
    columns = np.flatnonzero(mask.any(0))
    return columns[-1] - columns[0] + 1


@pytest.mark.parametrize("ratio", [0.42, 0.50, 0.60])
def test_heart_over_thorax_is_the_ratio_within_a_pixel(ratio):
    for number in range(1, 13):
        patient = healthy(number)
        b = anatomy.body(patient)
        film = render(patient, 256, {"heart_ratio": ratio})
        inner = 2 * b.half / film_grid(patient, 256).pitch
        assert width(film.masks["lungs"]) == pytest.approx(inner, abs=1)
        assert width(film.masks["heart"]) == pytest.approx(ratio * b.magnify * inner, abs=1)


def test_a_third_of_the_heart_lies_to_the_right():
    for number in range(1, 40):
        b = anatomy.body(healthy(number))
        left, right, _, _ = anatomy.heart_outline(b, 0.5)
        middle = b.midline * 0.6
        assert (left - middle) / (left - right) == pytest.approx(2 / 3)


def test_population_geometry():
    bodies = [anatomy.body(sample_patient(5, number)) for number in range(1, 401)]
    right_higher = np.mean([b.dome[-1] < b.dome[1] for b in bodies])
    assert 0.94 <= right_higher <= 0.995
    forks = np.rad2deg([b.fork for b in bodies])
    assert np.mean(forks) == pytest.approx(60, abs=1.5)
    assert np.std(forks) == pytest.approx(7.8, abs=1.2)
    for male, expected in ((True, 29.7), (False, 27.1)):
        assert np.mean([2 * b.half for b in bodies if b.male is male]) == pytest.approx(
            expected, abs=0.6
        )


def test_ribs_slope_down_to_the_front():
    b = anatomy.body(healthy(1))
    for n in range(anatomy.RIBS):
        path = anatomy.rib_path(b, 1, n)
        assert path[-1, 1] > path[0, 1] + 2
        assert path[:, 0].max() <= b.half + 1.5


# Dose and response


def test_more_fluid_is_higher_and_whiter():
    patient = healthy(2, supine=False)
    patient = replace(patient, severity=patient.severity | {"effusion_side": "right"})
    volumes = (0, 250, 500, 900, 1400, 2000, 2500)
    films = [render(patient, SIZE, {"effusion_ml": ml}) for ml in volumes]
    area = [film.masks["fluid"].sum() for film in films]
    grey = [film.image[films[0].masks["lungs"]].mean() for film in films]
    assert (np.diff(area) > 0).all()
    assert (np.diff(grey) > 0).all()


def test_angle_is_blunted_from_200_ml_and_dome_hidden_from_500():
    for number in range(1, 9):
        patient = healthy(number, supine=False)
        patient = replace(patient, severity=patient.severity | {"effusion_side": "right"})
        b, g = anatomy.body(patient), film_grid(patient, 256)
        layer = {ml: disease.effusion(patient, g, b, ml).water for ml in (150, 200, 300, 600)}
        angle = g.window(
            (b.midline - b.half + 0.1, b.floor[-1] - 1.5), (b.midline - b.half + 1.0, b.floor[-1])
        )
        dome = g.window(
            (b.midline - 0.5 * b.half, b.dome[-1] - 0.4), (b.midline - 0.45 * b.half, b.dome[-1])
        )
        assert not layer[150].any()
        assert layer[200][angle].mean() > 0.3
        assert layer[300][dome].mean() < 0.15
        assert layer[600][dome].mean() > 0.4


def test_a_large_effusion_pushes_the_heart_away():
    patient = healthy(3)
    for side, sign in (("right", 1), ("left", -1), ("both", 0)):
        patient = replace(patient, severity=patient.severity | {"effusion_side": side})
        assert np.sign(disease.fluid_shift(patient, 2400)) == sign
        assert disease.fluid_shift(patient, 1000) == 0
    shifted = render(patient, SIZE, {"effusion_ml": 2400})
    assert shifted.labels["Pleural Effusion"] == 1


@pytest.mark.parametrize(
    ("name", "sign"),
    [("edema", 1), ("consolidation", 1), ("pneumonia", 1), ("opacity", 1), ("pneumothorax_cm", -1),
     ("lesion_cm", 1), ("pleural_cm", 1), ("atelectasis", 1), ("mediastinum_cm", 1),
     ("heart_ratio", 1)],
)  # fmt: skip
def test_a_severity_is_a_dial(name, sign):
    dial = SEVERITIES[name]
    patient = healthy(6)
    values = np.linspace(max(dial.low, 0.2 * dial.high), dial.high, 4)
    plain = render(patient, SIZE, {name: dial.low}).image.astype(int)
    amount = [(render(patient, SIZE, {name: float(v)}).image - plain).sum() for v in values]
    assert (np.diff(sign * np.array(amount)) > 0).all()


def test_a_fracture_displaces_its_rib():
    patient = healthy(6)
    plain = render(patient, 256).image.astype(int)
    change = [
        np.abs(render(patient, 256, {"fracture_cm": s}).image - plain).sum() for s in (0.3, 1.2)
    ]
    assert 0 < change[0] < change[1]


# Photometry and shortcuts


def test_air_is_darker_than_heart_than_bone_than_metal():
    order = []
    for number in range(1, 13):
        patient = healthy(number)
        film = render(patient, 256, {"pacemaker": 1})
        image, masks = film.image, film.masks
        rows = np.arange(256)[:, None] > 256 * 0.3
        lung = image[masks["lungs"] & ~masks["heart"] & ~masks["mediastinum"] & ~masks["devices"]]
        heart = image[masks["heart"] & ~masks["devices"] & rows]
        can = masks["pacemaker"]
        order.append((np.median(lung), np.median(heart), np.median(image[can])))
    lung, heart, metal = np.array(order).T
    assert (lung < heart).all()
    assert (heart <= metal + 8).all()  # scatter greys a can that lies over thin lung
    assert np.mean(metal - heart) > 10
    bones = anatomy.bones(grid(128), anatomy.body(healthy(1)))
    assert (bones >= 0).all()
    assert bones.max() > 0.3


def scores(features, truth):
    """AUROC of a logistic model on the second half, trained on the first."""
    features = StandardScaler().fit_transform(np.array(features, float))
    half = len(truth) // 2
    model = LogisticRegression(C=0.05, max_iter=500).fit(features[:half], truth[:half])
    return roc_auc_score(truth[half:], model.predict_proba(features[half:])[:, 1])


@pytest.fixture(scope="module")
def coins():
    """Films of patients whose effusion and devices a coin decided."""
    rng, rows = np.random.default_rng(0), []
    for number in range(1, 501):
        patient = sample_patient(21, number)
        effusion, device = (int(c) for c in rng.integers(0, 2, 2))
        film = render(
            patient,
            64,
            off()
            | {
                "Pleural Effusion": effusion,
                "effusion_ml": 900 * effusion,
                "Support Devices": device,
            },
        )
        chest = np.logical_or.reduce(
            [film.masks[k] for k in ("lungs", "heart", "mediastinum", "devices")]
        )
        chest[24:] |= np.abs(np.arange(64) - 31.5) < 29  # fluid lies behind the diaphragm as well
        rows.append((patient, effusion, film.image, binary_dilation(chest, iterations=2)))
    return rows


def test_effusion_cannot_be_told_from_what_is_no_effusion(coins):
    truth = np.array([row[1] for row in coins])
    header = [[p.age, p.sex == "Male", p.view == "AP", p.supine] for p, *_ in coins]
    blank = [np.where(mask, 0, image) for _, _, image, mask in coins]
    small = [b.reshape(8, 8, 8, 8).mean((1, 3)).ravel() for b in blank]
    border = [np.concatenate([i[:5].ravel(), i[:, 0], i[:, -1]]) for _, _, i, _ in coins]
    for name, features in (("header", header), ("masked", small), ("border", border)):
        assert scores(features, truth) < 0.60, name  # chance, n 250: standard error .037
    whole = [i.reshape(8, 8, 8, 8).mean((1, 3)).ravel() for _, _, i, _ in coins]
    assert scores(whole, truth) > 0.7  # and the check itself can see


# Bad input, small films, and the drawing


@pytest.mark.parametrize("size", [63, 96.0, "big", 5000])
def test_an_impossible_size_is_refused_and_harms_nothing(size):
    with pytest.raises(ValueError, match="it must be a whole number of pixels"):
        render(sample_patient(0, 1), size)
    assert render(sample_patient(0, 1), 96).image.shape == (96, 96)


def test_every_device_is_seen_on_a_small_film():
    for kind in DEVICE_KINDS:
        wanted = {kind: 1} | (
            {"pacemaker": 1, "pacemaker_leads": 1} if "leads" in kind or "icd" in kind else {}
        )
        film, mask = counterfactual(healthy(8), wanted, 96)
        assert film.masks[kind].sum() >= 8, kind
        assert mask.sum() >= 8, kind


def test_smooth_is_constant_outside_its_edge():
    assert (smooth(np.array([-9.0, -0.5, 0.5, 9.0]), 1.0) == [0, 0, 1, 1]).all()
    assert smooth(np.array([0.0]), 1.0)[0] == 0.5


def test_strokes_stay_near_their_line_and_off_the_film_draw_nothing():
    g = grid(96)
    out = g.empty()
    stroke(out, g, curve([(-5, 5), (0, 8), (5, 5)]), 0.5, 1.0)
    assert out.max() <= 1.0
    assert not out[40:].any()
    away = g.empty()
    stroke(away, g, [(50, 50), (60, 60)], 0.5, 1.0)
    assert not away.any()


def test_many_segments_add_what_a_stroke_adds():
    g = grid(256)
    one, many = g.empty(), g.empty()
    stroke(one, g, [(0.0, 10.0), (6.0, 14.0)], 0.4, 1.0)
    ends = np.linspace([0.0, 10.0], [6.0, 14.0], 7)
    segments(many, g, ends[:-1], ends[1:], np.full(6, 0.4), np.full(6, 1.0))
    assert many.sum() == pytest.approx(one.sum(), rel=0.08)
    assert many.max() == pytest.approx(1.0, abs=0.05)
