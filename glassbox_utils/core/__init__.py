"""What everything stands on: files and downloads, models, text and tokens, corpora, interventions, statistics,
evidence, figures. Knows nothing of attention heads, steering vectors or sparse autoencoders, and imports no other
room. It alone moves tensors between devices and types.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
