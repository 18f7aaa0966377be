"""The causal chest phantom: films whose true counterfactual is known pixel for pixel.

Read in the order draw, graph, anatomy, disease, devices, renderer, cohort. A structural causal
model decides who has which of CheXpert's 14 labels, how severe, and which devices; geometry and
Beer-Lambert's law turn that into a film; `do` changes one thing and renders again with every
random draw as before. It says how an editor behaves when the truth is known; it says nothing about
patients. Images (H, W) uint8. Used by notebooks 01, 04, 05 and 06.
    python -m prism_nb.phantom --out DIR --patients 1000     writes a cohort
    python -m prism_nb.phantom.calibrate                     finds the graph's numbers again
    python -m prism_nb.phantom.pretrain OUT                  trains the bundled base model
    python -m prism_nb.phantom.quality [BASE]                measures it on films it has never seen
"""

from prism_nb.phantom.cohort import (
    balanced_films,
    factors,
    is_phantom,
    patient_of,
    true_counterfactual,
    write_cohort,
)
from prism_nb.phantom.graph import (
    DEVICE_KINDS,
    SEVERITIES,
    Patient,
    World,
    intervene,
    redrawn,
    sample_patient,
)
from prism_nb.phantom.renderer import DRAWN, Film, counterfactual, render

__all__ = [
    "DEVICE_KINDS",
    "DRAWN",
    "SEVERITIES",
    "Film",
    "Patient",
    "World",
    "balanced_films",
    "counterfactual",
    "factors",
    "intervene",
    "is_phantom",
    "patient_of",
    "redrawn",
    "render",
    "sample_patient",
    "true_counterfactual",
    "write_cohort",
]
