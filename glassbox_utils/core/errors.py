"""The one error that a user can mend; every room's own errors are kinds of it."""


class GlassboxError(Exception):
    """Something that the user can mend; the message names the value, what is allowed, and the fix."""
