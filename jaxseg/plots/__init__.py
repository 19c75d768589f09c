"""The figures, drawn with matplotlib: numpy arrays in, PNG files out. matplotlib is imported here and nowhere else."""

from jaxseg.plots.architecture import plot_architecture
from jaxseg.plots.comparison import plot_class_bars
from jaxseg.plots.confusion import plot_confusion
from jaxseg.plots.contact import plot_contact_sheet
from jaxseg.plots.curves import Curve, StageHistory, plot_losses, plot_mean_ious, plot_training
from jaxseg.plots.filtering import (
    Panel,
    choose_detail,
    magnitude_picture,
    plot_filtered,
    sample_photograph,
    signed_picture,
)
from jaxseg.plots.page import DPI, LUMA
from jaxseg.plots.pictures import (
    VOID_COLOUR,
    Example,
    Row,
    choose_examples,
    overlay,
    plot_overlay,
    plot_results,
    plot_rows,
)
from jaxseg.plots.variants import Variant, plot_variants

__all__ = [
    "DPI",
    "LUMA",
    "VOID_COLOUR",
    "Curve",
    "Example",
    "Panel",
    "Row",
    "StageHistory",
    "Variant",
    "choose_detail",
    "choose_examples",
    "magnitude_picture",
    "overlay",
    "plot_architecture",
    "plot_class_bars",
    "plot_confusion",
    "plot_contact_sheet",
    "plot_filtered",
    "plot_losses",
    "plot_mean_ious",
    "plot_overlay",
    "plot_results",
    "plot_rows",
    "plot_training",
    "plot_variants",
    "sample_photograph",
    "signed_picture",
]
