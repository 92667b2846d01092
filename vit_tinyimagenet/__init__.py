__version__ = "0.1.0"

from . import api   # names that are loaded when they are first used: nbs/api.ipynb

__getattr__, __dir__, __all__ = api.__getattr__, api.__dir__, [*api.NAMES]
