"""Glassbox: three techniques, one model, evidence and never proof.

``import glassbox_utils as gb`` is the public face. Its names are listed, with their types, in ``__init__.pyi``, and are
loaded when they are first used; all else is imported from its room: ``core`` below everything, then ``attention``,
``steering`` and ``saes`` (one technique each), ``decisions`` (the cycle that joins them), ``lab`` (notebooks, panels).
"""

import lazy_loader

__version__ = "0.2.0"
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
