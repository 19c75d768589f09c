"""The figures, drawn with matplotlib: numpy arrays in, PNG files out. matplotlib is imported here and nowhere else."""

from jaxseg.plots.architecture import plot_architecture
from jaxseg.plots.filtering import (
    Panel,
    choose_detail,
    magnitude_picture,
    plot_filtered,
    sample_photograph,
    signed_picture,
)
from jaxseg.plots.page import DPI, LUMA
from jaxseg.plots.runs import (
    VOID_COLOUR,
    Example,
    StageHistory,
    choose_examples,
    overlay,
    plot_confusion,
    plot_results,
    plot_training,
)

__all__ = [
    "DPI",
    "LUMA",
    "VOID_COLOUR",
    "Example",
    "Panel",
    "StageHistory",
    "choose_detail",
    "choose_examples",
    "magnitude_picture",
    "overlay",
    "plot_architecture",
    "plot_confusion",
    "plot_filtered",
    "plot_results",
    "plot_training",
    "sample_photograph",
    "signed_picture",
]
