"""What the lab needs beyond torch is imported when used, so that `import natgrad` stays light."""

from __future__ import annotations

import importlib
from types import ModuleType

from natgrad.errors import ConfigError


def require(module: str, purpose: str, extra: str = "lab") -> ModuleType:
    """Imports an optional dependency.

    Args:
        module: dotted name, such as ``"matplotlib.pyplot"``.
        purpose: what it is needed for, as the message says it.
        extra: which of natgrad's extras brings it.

    Raises:
        ConfigError: it isn't installed; the message says how to get it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = {"sklearn": "scikit-learn"}.get(module.split(".")[0], module.split(".")[0])
        raise ConfigError(
            f'{package} is needed for {purpose}: pip install "natgrad[{extra}]" ({error})'
        ) from error
