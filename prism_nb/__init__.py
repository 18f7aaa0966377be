"""PRISM as numbered notebooks over a thin package: counterfactual chest radiographs.

The notebooks 01_caption to 06_augment say why and what we see; the modules here say how.
Read them in the paper's order: findings, cohort, images, phantom, captions, diffusion, latents,
finetune, inversion, editing, scoring, classifiers, metrics, augment; then params, figures, run.
Importing the package imports nothing heavy.
"""

__version__ = "0.1.0"
