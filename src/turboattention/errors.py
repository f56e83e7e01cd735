"""Exceptions of this package. All derive from `TurboError`, and from a matching built-in exception."""

from __future__ import annotations


class TurboError(Exception):
    """Base of all errors below. Messages read ``argument: expected X, got Y``."""


class ShapeError(TurboError, ValueError):
    """A tensor's shape does not fit the others, or the documented layout."""


class DtypeError(TurboError, TypeError):
    """A tensor's dtype or device is not the one expected."""


class ConfigError(TurboError, ValueError):
    """A setting has a value outside its range, or contradicts another setting."""


class InputError(TurboError, ValueError):
    """A plain argument (a length, an index, a path, a text) is outside its range."""


class UnsupportedError(TurboError, NotImplementedError):
    """A known feature that is not supported."""


class NonFiniteError(TurboError, ValueError):
    """NaN or infinity among the valid rows of a tensor; the cache is unchanged."""


class FormatError(TurboError, ValueError):
    """A file is damaged, not of this format, or of an unknown version of it."""


class BackendError(TurboError, RuntimeError):
    """A backend named explicitly cannot run this call."""


class GuardWarning(UserWarning):
    """The guard found heads whose quantization error is beyond its bound."""
