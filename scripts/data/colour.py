"""Colour images as grey levels."""

from __future__ import annotations

import numpy as np

LUMINANCE = (0.299, 0.587, 0.114)  # of red, green and blue: ITU-R BT.601


def grey(image: np.ndarray) -> tuple[np.ndarray, bool]:
    """Grey levels of an image whose last axis is its colours, and whether it has a colour: red, green and blue differ.

    The common value where they are equal in every pixel, else the luminance; a fourth channel, alpha, is ignored.
    """
    colours = image[..., :3]
    if colours.shape[-1] < 3 or (colours == colours[..., :1]).all():
        return image[..., 0], False
    return colours @ np.array(LUMINANCE, dtype=np.float32), True
