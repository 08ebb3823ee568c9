"""Notebooks as things: run them, bring them into the form that is committed, make pages of them (notebooks); live
panels for them (panels). May touch every room below.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
