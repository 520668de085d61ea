"""The door to the compiled CPU kernels, `sateen._native`: loads it once and says why when it cannot.

Backends ask `native_available()` in their `why_not` and call `native()` afterwards. The extension is built by
`pip install` where a C++ compiler is found; nothing here builds anything.
"""

from __future__ import annotations

import importlib
import logging
import os
from types import ModuleType

from sateen.errors import BackendUnavailable, ConfigError

log = logging.getLogger("sateen.ops")

ISA_VARIABLE = "SATEEN_CPU_ISA"

_loaded: tuple[ModuleType | None, str | None] | None = None


def _load() -> tuple[ModuleType | None, str | None]:
    global _loaded
    if _loaded is None:
        try:
            module = importlib.import_module("sateen._native")
        except ImportError as error:
            reason = f"the compiled kernels are missing ({error}); install a C++ compiler, then sateen again"
            log.warning("CPU kernels are off: %s", reason)
            _loaded = None, reason
        else:
            wanted = os.environ.get(ISA_VARIABLE, "")
            try:
                level = module.select_isa(wanted)
            except ValueError as error:
                raise ConfigError(f"{ISA_VARIABLE}={wanted}: {error}") from None
            log.info("CPU kernels use instruction set %s", level)
            _loaded = module, None
    return _loaded


def native_available() -> str | None:
    """None where the compiled kernels can run, otherwise the reason why not; logged once.

    Raises:
        ConfigError: `SATEEN_CPU_ISA` names an unknown instruction set or one that this processor lacks.
    """
    return _load()[1]


def native() -> ModuleType:
    """The extension module `sateen._native`.

    Raises:
        BackendUnavailable: it was not built or cannot be loaded.
        ConfigError: as `native_available`.
    """
    module, reason = _load()
    if module is None:
        raise BackendUnavailable(str(reason))
    return module
