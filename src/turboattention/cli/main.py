"""Entry point of the command line. Reports packages that are not installed."""

from __future__ import annotations

import sys
from collections.abc import Callable

from .descriptors import settle
from .missing import INSTALL, missing_package


def _explain(package: str) -> Callable[[], None]:
    def app() -> None:
        sys.stderr.write(f"error: the command line needs the package {package}: {INSTALL}\n")
        raise SystemExit(1)

    return app


settle()
try:
    from .application import app
except ModuleNotFoundError as error:
    package = missing_package(error)
    if package is None:
        raise
    app = _explain(package)
