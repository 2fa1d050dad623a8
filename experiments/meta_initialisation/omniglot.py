"""Omniglot (Lake, Salakhutdinov & Tenenbaum 2015) from a folder on this machine: alphabet/character/drawing.png."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

SIDE = 14  # pixels to which the drawings are shrunk
HELD_OUT = 0.3  # share of the characters that meta-training does not see


def folder(text: str) -> Path:
    """The argument of the command line."""
    path = Path(text)
    if not path.is_dir():
        raise argparse.ArgumentTypeError(f"there is no folder {text}: unpack images_background.zip and name its folder")
    if not any(path.glob("*/*/*.png")):
        raise argparse.ArgumentTypeError(f"{text} holds no alphabet/character/drawing.png: name images_background")
    return path


def load(path: Path, seed: int, ways: int, images: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Images of the characters for meta-training and of those held out, each [n, SIDE²] with ink 1 and paper 0.

    Args:
        path: see `folder`.
        seed: of the split.
        ways: least number of characters on either side.
        images: least number of drawings of a character; characters with fewer are left out.

    Raises:
        SystemExit: if too few characters are left.
    """
    from PIL import Image

    def read(file: Path) -> np.ndarray:
        with Image.open(file) as drawing:
            small = drawing.convert("L").resize((SIDE, SIDE), Image.Resampling.BOX)
        return 1 - np.asarray(small, np.float32).ravel() / 255

    drawings = (sorted(character.glob("*.png")) for character in sorted(path.glob("*/*")) if character.is_dir())
    classes = [np.stack([read(file) for file in files]) for files in drawings if len(files) >= images]
    held_out = round(HELD_OUT * len(classes))
    if min(held_out, len(classes) - held_out) < ways:
        raise SystemExit(
            f"--omniglot: {path} has {len(classes)} characters of at least {images} drawings; {ways} must be left on "
            f"either side after {HELD_OUT:.0%} are held out: name the whole of images_background."
        )
    order = np.random.default_rng(seed).permutation(len(classes))
    return [classes[i] for i in order[held_out:]], [classes[i] for i in order[:held_out]]
