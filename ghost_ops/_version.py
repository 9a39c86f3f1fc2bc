"""The version of the package, kept here alone: packaging reads it from this file."""

__version__ = "0.1.0"
