"""Glassbox: three techniques, one model, evidence and never proof."""

__version__ = "0.1.0"
