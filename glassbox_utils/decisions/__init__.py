"""The cycle that joins the techniques: a decision as data (decision, reading, scoring), where it comes from (cycle),
whether it is fair (audit), what is done about it (mitigation), and the answer to the person who asked (explain,
report). May touch every technique. ``study``, ``cause_study``, ``reality_study``, ``safety_study`` and ``figures`` are
the long runs and tables of notebook 06; ``power_study`` says how often an audit of any decision is right.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
