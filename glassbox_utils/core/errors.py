"""The one error that a user can mend; every room's own errors are kinds of it."""


class GlassboxError(Exception):
    """Something that the user can mend; the message names the value, what is allowed, and the fix."""


class ModelError(GlassboxError, ValueError):
    """A model, layer, head, hook, token or prompt that does not exist, or parts that do not add up; the message names
    what does."""
