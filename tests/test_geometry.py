"""Attributes from geometry: the truth has no error, doing nothing has all of it."""

import numpy as np
import pytest

from prism_nb import geometry as g
from prism_nb import phantom
from prism_nb.images import uint8_to_unit

EDITS = {"Cardiomegaly": 0, "Pleural Effusion": 0, "Support Devices": 0}
SIZE = 128


@pytest.fixture(scope="module", params=list(EDITS))
def case(request):
    """A finding, the films with and without it, and their layers."""
    patient, finding = phantom.sample_patient(5, 3), request.param
    two = [phantom.render(patient, SIZE, {finding: value}) for value in (1, EDITS[finding])]
    films = [uint8_to_unit(film.image)[None] for film in two]
    return g.ATTRIBUTES[finding], films, [[film.masks] for film in two]


def test_the_truth_has_no_error_and_doing_nothing_all_of_it(case):
    measure, (factual, truth), (layers, true_layers) = case
    whole = measure(layers[0]) - measure(true_layers[0])
    assert whole > 0.005  # removing makes it smaller
    errors = [
        g.attribute_error(measure, factual, film, truth, layers, true_layers)[0]
        for film in (truth, factual)
    ]
    assert errors == [0.0, pytest.approx(whole)]


def test_what_goes_most_of_the_way_counts_and_what_goes_less_does_not(case):
    measure, (factual, truth), (layers, true_layers) = case
    far, near = (factual + share * (truth - factual) for share in (0.7, 0.3))
    args = truth, layers, true_layers
    assert g.attribute_error(measure, factual, far, *args)[0] == 0
    whole = g.attribute_error(measure, factual, factual, *args)
    assert g.attribute_error(measure, factual, near, *args) == whole


def test_the_lower_half_removed_leaves_the_upper(case):
    measure, (factual, truth), (layers, true_layers) = case
    half = factual.copy()
    half[:, SIZE // 2 :] = truth[:, SIZE // 2 :]
    error = g.attribute_error(measure, factual, half, truth, layers, true_layers)[0]
    assert 0 <= error <= measure(layers[0]) - measure(true_layers[0])


def test_noise_does_not_decide(case):
    measure, (factual, truth), (layers, true_layers) = case
    noise = np.random.default_rng(0).normal(0, 0.01, truth.shape).astype(np.float32)
    noisy = (truth + noise).clip(0, 1)
    error = g.attribute_error(measure, factual, noisy, truth, layers, true_layers)[0]
    assert abs(error) < 0.2 * (measure(layers[0]) - measure(true_layers[0]))


def test_a_truth_that_changes_nothing_is_nan(case):
    measure, (factual, _), (layers, _) = case
    assert np.isnan(g.attribute_error(measure, factual, factual, factual, layers, layers)).all()


def test_measures_by_hand():
    empty = np.zeros((10, 20), bool)
    layers = dict.fromkeys(g.LAYERS, empty)
    assert np.isnan(g.heart_ratio(layers))
    lungs, heart, fluid = empty.copy(), empty.copy(), empty.copy()
    lungs[2:8, 2:18] = True
    heart[5, 6:14], fluid[6:9, 3] = True, True
    layers |= {"lungs": lungs, "heart": heart, "fluid": fluid, "devices": heart}
    assert g.heart_ratio(layers) == 0.5
    assert g.fluid_height(layers) == pytest.approx(0.3)
    assert g.device_pixels(layers) == pytest.approx(0.04)
