"""Technique three: sparse autoencoders. Activations are harvested, an SAE is trained, stored and measured (harvest,
training, store, quality; recipes says which one a model gets), read and written where its metadata say (reading); its
features are searched, described and shown (features, detection, labels, dashboard, absorption), and held at a value
(clamping, learning). May touch ``core``, ``attention`` and ``steering``. ``study`` and ``clamping_*study`` are the long
runs of notebooks 03 and 04, and are imported by no technique.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
