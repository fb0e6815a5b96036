"""Labelled images: where they are read from, what is done to them, and the batches of a training.

Batches are NumPy's, and the same in every framework: one is a function of the seed, the epoch and
the step alone.
"""

from doconv_core.training.data.operations import parsed
from doconv_core.training.data.own import as_data
from doconv_core.training.data.pipeline import Series, batches, series
from doconv_core.training.data.readers import DATA_SETS, open_data
from doconv_core.training.data.sources import BrokenImages, DataError, ImageData, Source

__all__ = [
    "DATA_SETS", "BrokenImages", "DataError", "ImageData", "Series", "Source", "as_data",
    "batches", "open_data", "parsed", "series",
]  # fmt: skip
