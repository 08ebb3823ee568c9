"""Glassbox: three techniques, one model, evidence and never proof."""

__version__ = "0.1.0"


class GlassboxError(Exception):
    """Something that the user can mend; the message names the value, what is allowed, and the fix."""
