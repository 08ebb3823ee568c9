"""Technique one: what heads look at (patterns), which kinds there are (induction, semantic, bias), what they do
(ablation, attribution). May touch ``core``. ``study`` is the long run behind notebook 02.

The room can be called, because its name is also the first thing one does with it: ``gb.attention(model, text)`` is
``patterns.attention(model, text)``.
"""

import sys
from types import ModuleType
from typing import Any

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)


class _Room(ModuleType):
    def __call__(self, model: Any, text: str) -> Any:
        from glassbox_utils.attention.patterns import attention

        return attention(model, text)


sys.modules[__name__].__class__ = _Room
