"""Technique two: a vector that is fitted (fit, training), added while the model writes (apply), chosen under a budget
of side effects (selection), and kept in a file (vectors). May touch ``core`` and ``attention``. ``study``,
``report_study`` and ``figures`` are the long runs and tables of notebook 05, and are imported by no technique.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
