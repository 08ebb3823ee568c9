from . import exercises as exercises
from . import notebooks as notebooks
from . import panels as panels
from .notebooks import execute as execute
from .notebooks import find as find
from .panels import attention_panel as attention_panel
from .panels import clamp_panel as clamp_panel
from .panels import steering_panel as steering_panel
