"""Devices: where they lie in the healthy body, that each stays itself, and at every size."""

import numpy as np
import pytest
from scipy.ndimage import maximum_filter

from prism_nb.phantom import anatomy
from prism_nb.phantom.devices import (
    CAN,
    DRAW,
    GAP_CM,
    can_place,
    central_line_path,
    chest_tube_path,
    draw_devices,
    lead_paths,
    part,
)
from prism_nb.phantom.draw import grid
from prism_nb.phantom.graph import DEVICE_KINDS, sample_patient
from prism_nb.phantom.renderer import film_grid


@pytest.fixture(scope="module")
def cases():
    patients = [sample_patient(7, number) for number in range(1, 221)]
    return [(patient, anatomy.body(patient)) for patient in patients]


def pixel(g, point):
    """Row and column of a point in cm."""
    return int((point[1] - g.top) / g.pitch), int((point[0] - g.left) / g.pitch)


def grown(mask, by):
    """The mask and all pixels up to `by` from it."""
    return maximum_filter(mask, 2 * by + 1)


def test_every_kind_of_the_graph_is_drawn():
    assert tuple(DRAW) == tuple(DEVICE_KINDS)


def test_et_tube_ends_3_to_7_cm_above_the_carina(cases):
    g = grid(256)
    above = []
    for patient, b in cases:
        rows = np.flatnonzero(draw_devices(patient, g, b, ["et_tube"])["et_tube"].any(axis=1))
        assert rows[0] == 0, "it comes from the mouth"
        above.append(b.carina[1] - (rows[-1] + 0.5) * g.pitch)
    assert min(above) > 2.75  # a quarter of a centimetre is 1.5 pixels
    assert max(above) < 7.25
    assert np.mean(above) == pytest.approx(5, abs=0.3)


def test_leads_end_inside_the_normal_heart_and_inside_a_larger_one(cases):
    g = grid(256)
    for patient, b in cases:
        for ratio in (b.normal_ratio, 0.65):
            heart = anatomy.heart(g, b, ratio)[1]
            for name, path in lead_paths(patient, b).items():
                assert heart[pixel(g, path[-1])], (patient.number, name, ratio)


def test_ventricle_tip_lies_left_of_the_midline_and_points_down_left(cases):
    for patient, b in cases:
        paths = lead_paths(patient, b)
        tip = paths["ventricle"][-1]
        assert 1.0 < tip[0] - b.midline < 8.0
        assert 0 < b.dome[1] - tip[1] < 2.0
        step = tip - part(paths["ventricle"], 0, 1.0)[-1]
        assert min(step) > 0
        rise = paths["atrium"][-1] - part(paths["atrium"], 0, 1.0)[-1]
        assert rise[1] < 0, "the tip in the atrium curls up"


def test_can_lies_inside_the_frame_and_leads_start_at_it(cases):
    left = 0
    for patient, b in cases:
        centre, _, _, side = can_place(patient, b)
        left += side > 0
        g = film_grid(patient, 128)
        can = draw_devices(patient, g, b, ["pacemaker"])["pacemaker"]
        edge = np.r_[can[0], can[-1], can[:, 0], can[:, -1]]
        assert not edge.any(), patient.number
        assert can[pixel(g, centre)] >= CAN
        assert np.hypot(*(lead_paths(patient, b)["ventricle"][0] - centre)) < 3.2
        assert centre[1] > b.clavicle + 4
    assert left / len(cases) == pytest.approx(0.92, abs=0.06)


def test_coils_lie_on_the_ventricle_s_lead(cases):
    g = grid(256)
    for patient, b in cases[:40]:
        coils = draw_devices(patient, g, b, ["icd_coils"])["icd_coils"] > 0
        path = lead_paths(patient, b)["ventricle"]
        y, x = np.nonzero(coils)
        spots = np.column_stack([(x + 0.5) * g.pitch + g.left, (y + 0.5) * g.pitch + g.top])
        away = np.hypot(*(spots[:, None] - part(path, 0, 99)[None]).transpose(2, 0, 1)).min(1)
        assert away.max() < 1.2


def test_central_line_ends_in_the_lower_cava(cases):
    for patient, b in cases:
        x, y = central_line_path(patient, b)[0][-1]
        assert -3.0 < x - b.midline < -1.6
        assert 0.4 < y - b.carina[1] < 4.1


def test_chest_tube_side_hole_and_tip_lie_inside_the_thorax(cases):
    for patient, b in cases:
        path, hole = chest_tube_path(patient, b)
        for x, y in np.vstack([part(path, hole, hole + GAP_CM), path[-1:]]):
            across = abs(x - b.midline)
            assert across < anatomy.wall_x(b, np.float64(y)) + 0.1, patient.number
            side = 1 if x > b.midline else -1
            assert b.apex < y < b.floor[side], patient.number
        assert abs(path[0, 0]) > b.half, "it comes from outside"


def test_stripe_is_broken_at_the_side_hole(cases):
    g = grid(512)
    for patient, b in cases[:20]:
        tube = draw_devices(patient, g, b, ["chest_tube"])["chest_tube"]
        path, hole = chest_tube_path(patient, b)

        def brightest(distance, tube=tube, path=path):
            row, column = pixel(g, part(path, distance, distance + 0.1)[0])
            return tube[row - 3 : row + 4, column - 3 : column + 4].max()

        broken = brightest(hole + GAP_CM / 2)
        assert broken < 0.75 * brightest(hole - 1.5)
        assert broken < 0.75 * brightest(hole + GAP_CM + 1.5)


def test_a_kind_is_the_same_whatever_else_is_drawn(cases):
    g = grid(128)
    for patient, b in cases[:12]:
        together = draw_devices(patient, g, b, DRAW)
        for kind in DRAW:
            alone = draw_devices(patient, g, b, [kind])
            assert list(alone) == [kind]
            assert np.array_equal(alone[kind], together[kind]), kind


def test_maps_are_positive_and_exactly_zero_outside_a_small_area(cases):
    g = grid(256)
    for patient, b in cases[:25]:
        for kind, film in draw_devices(patient, g, b, DRAW).items():
            assert (film.dtype, film.shape) == (np.float32, (256, 256))
            assert np.isfinite(film).all(), kind
            assert film.min() >= 0, kind
            if kind != "prosthesis":
                assert 0 < np.mean(film > 0) < 0.12, kind
        x, y = can_place(patient, b)[0]
        can = draw_devices(patient, g, b, ["pacemaker"])["pacemaker"]
        assert not can[np.hypot(g.x - x, g.y - y) > 4.0].any()


def test_devices_stay_visible_on_a_small_film(cases):
    for patient, b in cases[:60]:
        g = film_grid(patient, 64)
        maps = draw_devices(patient, g, b, DRAW)
        for kind, film in maps.items():
            assert (film > 0).sum() > 10, kind
        for path in lead_paths(patient, b).values():  # unbroken from the can to the tip
            for point in part(path, 0.3, 99):
                row, column = pixel(g, point)
                near = maps["pacemaker_leads"][row - 1 : row + 2, column - 1 : column + 2]
                assert near.max() > 0.5


@pytest.mark.parametrize("size", [64, 128, 256])
def test_sizes_agree_in_place(cases, size):
    fine, coarse = grid(512), grid(size)
    k = 512 // size
    for patient, b in cases[:6]:
        large, small = (draw_devices(patient, g, b, DRAW) for g in (fine, coarse))
        for kind in DRAW:
            down = (large[kind] > 0).reshape(size, k, size, k).any(axis=(1, 3))
            mask = small[kind] > 0
            assert (down & grown(mask, 1)).sum() >= 0.95 * down.sum(), kind
            assert (mask & grown(down, 1)).sum() >= 0.95 * mask.sum(), kind


def test_unknown_kind_is_refused(cases):
    patient, b = cases[0]
    with pytest.raises(ValueError, match="unknown device 'stent'; use one of pacemaker"):
        draw_devices(patient, grid(64), b, ["pacemaker", "stent"])
