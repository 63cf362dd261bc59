"""The version, for people and for the build."""

__version__ = "0.1.0"
