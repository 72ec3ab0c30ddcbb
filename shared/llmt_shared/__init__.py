"""What both stages must know: the dataset on disk, segments, order, configs, errors."""

__version__ = "0.1.0"
