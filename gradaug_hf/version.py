"""The version of the package, which its metadata and the reports of runs read."""

__version__ = "0.1.0"
