"""Image augmentation for training, and the centre crop that matches it at evaluation.

As in openvla-oft: a random square crop of 90 percent of the area, resized back, then brightness,
contrast, saturation and hue, each followed by a clip to [0, 1]. A policy trained on such crops sees
objects 5 percent larger than they are; `center_crop` shows it the same scale in rollouts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

CROP_AREA = 0.9
"""Area of the crop relative to the image."""
BRIGHTNESS = 0.2
"""Largest brightness change, images in [0, 1]."""
CONTRAST = SATURATION = (0.8, 1.2)
"""Range of the contrast and saturation factors."""
HUE = 0.05
"""Largest hue change, in turns."""


def augment(tf: Any, image: Any, seed: Any) -> Any:
    """One augmented image; the same `seed` gives the same image.

    Args:
        tf: the tensorflow module; this one does not import it, rollouts run without.
        image: tensorflow tensor `(h, w, 3)` uint8 of static shape.
        seed: tensorflow tensor `(2,)` of integers.

    Returns:
        Tensor `(h, w, 3)` uint8.
    """
    seeds = tf.random.experimental.stateless_split(seed, 5)
    height, width = image.shape[:2]
    side = float(np.sqrt(CROP_AREA))
    corner = tf.random.stateless_uniform([2], seeds[0], 0.0, 1.0 - side)
    box = tf.concat([corner, corner + side], 0)[None]
    pixels = tf.cast(image, tf.float32)[None] / 255.0
    pixels = tf.image.crop_and_resize(pixels, box, [0], [height, width])[0]
    operations = (
        lambda x: tf.image.stateless_random_brightness(x, BRIGHTNESS, seeds[1]),
        lambda x: tf.image.stateless_random_contrast(x, *CONTRAST, seeds[2]),
        lambda x: tf.image.stateless_random_saturation(x, *SATURATION, seeds[3]),
        lambda x: tf.image.stateless_random_hue(x, HUE, seeds[4]),
    )
    for operation in operations:
        pixels = tf.clip_by_value(operation(pixels), 0.0, 1.0)
    return tf.cast(tf.round(pixels * 255.0), tf.uint8)


def center_crop(images: np.ndarray) -> np.ndarray:
    """The central crop of area `CROP_AREA`, resized back; see `crop`.

    Args:
        images: `(..., h, w, 3)` uint8.

    Returns:
        `(..., h, w, 3)` uint8.

    Raises:
        ValueError: another dtype or shape.
    """
    side = float(np.sqrt(CROP_AREA))
    return crop(images, (0.5 * (1.0 - side),) * 2, side)


def crop(images: np.ndarray, corner: Sequence[float], side: float) -> np.ndarray:
    """A crop with the image's proportions, resized back bilinearly; needs no TensorFlow.

    Samples where `tf.image.crop_and_resize` does: the corners of the crop are the corners of the result.

    Args:
        images: `(..., h, w, 3)` uint8.
        corner: (down, right) of the crop's upper left corner, relative to the image's height and width.
        side: of the crop, relative to the image's; `corner + side` is at most 1.

    Returns:
        `(..., h, w, 3)` uint8.

    Raises:
        ValueError: another dtype or shape, or a crop that is empty or not within the image.
    """
    if images.dtype != np.uint8 or images.ndim < 3 or images.shape[-1] != 3:
        raise ValueError(f"a crop needs (..., h, w, 3) uint8, got {images.shape} {images.dtype}")
    if not (side > 0 and min(corner) >= 0 and max(corner) + side <= 1 + 1e-9):
        raise ValueError(f"a crop of side {side} at {tuple(corner)} is not within the image: expected 0 to 1")
    down, right = corner
    rows = _resample(images.astype(np.float32), images.ndim - 3, down, side)
    return np.rint(_resample(rows, images.ndim - 2, right, side)).astype(np.uint8)


def _resample(images: np.ndarray, axis: int, start: float, side: float) -> np.ndarray:
    size = images.shape[axis]
    position = (start + np.linspace(0.0, side, size)) * (size - 1)
    low = np.minimum(position.astype(int), max(size - 2, 0))
    high = np.minimum(low + 1, size - 1)
    weight = (position - low).astype(np.float32).reshape((-1,) + (1,) * (images.ndim - axis - 1))
    return images.take(low, axis) * (1 - weight) + images.take(high, axis) * weight
