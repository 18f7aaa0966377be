"""GANterfactual's training (github.com/hcmlab/GANterfactual, cyclegan.py), from what it does.

A pair of films at a time in float32, as Keras' train_on_batch has it: the generators translate
once for the discriminators, each of which has an Adam and a step of its own, then again, film by
film, for the combined loss of the generators. The networks are copies of ours.
"""

from copy import deepcopy

import torch
from torch.nn import functional as F


class Port:
    """Its training loop around the networks of a GANterfactual of ours."""

    def __init__(self, gan, guide):
        """Copy both, in the memory layout that torch has by default."""
        plain = {"memory_format": torch.contiguous_format}
        self.gan, self.guide = (deepcopy(x).float().to(**plain) for x in (gan, guide))
        self.gan.requires_grad_(True)
        self.guide.eval().requires_grad_(False)
        parts = [self.gan.discriminators["absent"], self.gan.discriminators["present"]]
        parts.append(torch.nn.ModuleList([self.gan.to_absent, self.gan.to_present]))
        self.adams = [torch.optim.Adam(p.parameters(), 2e-4, betas=(0.5, 0.999)) for p in parts]

    def step(self, x, y):
        """One update of all from a film without (x) and one with the finding (y): its losses."""
        gan, (of_absent, of_present, of_generators) = self.gan, self.adams
        with torch.no_grad():
            absent, present = gan.to_absent(y), gan.to_present(x)
        losses = []
        for kind, adam, true, made in (
            ("absent", of_absent, x, absent),
            ("present", of_present, y, present),
        ):
            judge = gan.discriminators[kind]
            losses.append(_off(judge(true), 1) + _off(judge(made), 0))
            self._take(adam, losses[-1])
        absent, present = gan.to_absent(y), gan.to_present(x)
        fooled = _off(gan.discriminators["absent"](absent), 1)
        fooled = fooled + _off(gan.discriminators["present"](present), 1)
        cycle = F.l1_loss(gan.to_absent(present), x) + F.l1_loss(gan.to_present(absent), y)
        same = F.l1_loss(gan.to_absent(x), x) + F.l1_loss(gan.to_present(y), y)
        off, on = (self.guide((z[:, 0] + 1) / 2)[:, 0].sigmoid() for z in (absent, present))
        guided = _off(off, 0) + _off(on, 1)
        self._take(of_generators, fooled + 10 * cycle + same + guided)
        return [loss.item() for loss in (sum(losses), cycle, same, guided)]

    def _take(self, adam, loss):
        self.gan.zero_grad()
        loss.backward()
        adam.step()


def _off(scores, target):
    return (scores - target).square().mean()
