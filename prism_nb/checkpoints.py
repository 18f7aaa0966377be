"""Checkpoints of a training: named tensors, whole or not at all, the two newest kept.

A checkpoint is a folder step-00000100/ with state.safetensors and checkpoint.json: the step, the
digest of the tensors' file, and the key of the training, a digest of all that decides its result.
Another key is another training; a damaged checkpoint is passed over for the one before it.
Used by finetune.py, and through it by notebook 02.
"""

import logging
import shutil
from pathlib import Path

from safetensors.torch import load_file, save_file

from prism_nb.files import TEMPORARY, atomic_folder, read_json, sha256_file, write_json

DAMAGE = (OSError, ValueError, KeyError, TypeError)  # what reading a torn checkpoint raises
log = logging.getLogger(__name__)


class Checkpoints:
    """The checkpoints of one training in a folder that belongs to it alone."""

    def __init__(self, folder, key):
        """Name the folder and the key; nothing is read or written yet."""
        self.folder, self.key, self.kept = Path(folder), key, []

    def save(self, step, tensors):
        """Write a checkpoint, then remove all but this one and the one before it."""
        path = self.folder / f"step-{step:08d}"
        with atomic_folder(path) as partial:
            save_file(tensors, partial / "state.safetensors")
            digest = sha256_file(partial / "state.safetensors")
            about = {"key": self.key, "step": step, "sha256": digest}
            write_json(partial / "checkpoint.json", about)
        self.kept = [*self.kept, path][-2:]
        for other in self.folder.iterdir():
            ours = other.name.startswith(("step-", TEMPORARY)) and other.is_dir()
            if ours and other not in self.kept:
                shutil.rmtree(other)

    def load(self, last_step):
        """The tensors of the newest whole checkpoint up to a step, or None: start anew."""
        found = newest_first(self.folder)
        for path in found:
            try:
                about = read_json(path / "checkpoint.json")
                if about["key"] != self.key or about["step"] > last_step:
                    continue
                tensors = read_state(path)
            except DAMAGE as error:
                log.warning("checkpoint %s is damaged (%s): trying an older one", path, error)
                continue
            log.info("training goes on from step %d (%s)", about["step"], path)
            self.kept = [path]
            return tensors
        if found:
            log.warning("no usable checkpoint of this training in %s: starting anew", self.folder)
        return None


def newest_first(folder):
    """The checkpoints in a folder, whatever their key."""
    return sorted(Path(folder).glob("step-*"), reverse=True)


def read_state(path):
    """The tensors of a checkpoint; ValueError if their bytes are not those that were written."""
    if sha256_file(path / "state.safetensors") != read_json(path / "checkpoint.json")["sha256"]:
        raise ValueError("state.safetensors is not as it was written")
    return load_file(path / "state.safetensors")
