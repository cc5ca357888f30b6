"""The version, in one place: read by the build and by `s2dm_loss.__version__`."""

__version__ = "0.3.0"
