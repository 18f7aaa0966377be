"""The causal chest phantom: films whose true counterfactual is known pixel for pixel.

Read in the order graph, anatomy, devices, renderer, cohort. It says how an editor behaves when
the truth is known; it says nothing about patients. This version draws pleural effusion,
cardiomegaly and five kinds of device; the other eleven labels stay blank or, for No Finding,
follow from these. Images (H, W) uint8. Used by notebooks 01, 04, 05 and 06.
"""

from prism_nb.phantom.cohort import (
    balanced_films,
    is_phantom,
    patient_of,
    true_counterfactual,
    write_cohort,
)
from prism_nb.phantom.graph import DRAWN, Patient, intervene, sample_patient
from prism_nb.phantom.renderer import Film, counterfactual, render

__all__ = [
    "DRAWN",
    "Film",
    "Patient",
    "balanced_films",
    "counterfactual",
    "intervene",
    "is_phantom",
    "patient_of",
    "render",
    "sample_patient",
    "true_counterfactual",
    "write_cohort",
]
