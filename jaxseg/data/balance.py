"""How much each class would have to weigh for rare ones to count."""

import numpy as np


def median_frequency_weights(pixels: np.ndarray, among: np.ndarray) -> np.ndarray:
    """Weights by median frequency balancing: the median of the classes' frequencies, divided by a class's own.

    Args:
      pixels: (C,) integer, each class's pixels.
      among: (C,) integer, all labelled pixels of the images that show it: a frequency is the share of these.

    Returns:
      (C,) float64; NaN for a class that no image shows.

    Source: Eigen and Fergus, "Predicting Depth, Surface Normals and Semantic Labels", 2015, section 6.3.
    """
    frequency = np.divide(pixels, among, where=among > 0, out=np.full(len(pixels), np.nan))
    return np.nanmedian(frequency) / frequency if (among > 0).any() else frequency
