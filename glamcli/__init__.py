"""glam: train, evaluate and plan GLaM-style mixture-of-experts language models.

The Python interface is what `__all__` names (docs/python.md): `glamcli.open` for a trained run,
`glamcli.load_recipe` and `glamcli.train` for a new one. Everything below, modules and packages, is
private to `glam` and changes without notice. Importing this loads nothing: jax comes with the
first use.
"""

import sys
from types import ModuleType

TYPE_CHECKING = False  # true to type checkers; `typing` itself would be most of this import
if TYPE_CHECKING:
    from glamcli.api import Param, Run
    from glamcli.api import find_recipe as load_recipe
    from glamcli.api import open_run as open
    from glamcli.api import train_run as train
    from glamcli.errors import GlamError

__version__ = "0.1.0"
__all__ = ["GlamError", "Param", "Run", "__version__", "load_recipe", "open", "train"]


def __getattr__(name: str) -> object:
    if name == "GlamError":
        from glamcli.errors import GlamError

        return GlamError
    if name in __all__:
        from glamcli import api

        renamed = {"open": "open_run", "load_recipe": "find_recipe", "train": "train_run"}
        return getattr(api, renamed.get(name, name))
    raise AttributeError(f"module `glamcli` has no attribute `{name}`")


class _Package(ModuleType):
    """Importing the package `glamcli.train` would hide the function of that name."""

    def __setattr__(self, name: str, value: object) -> None:
        if not (name == "train" and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
