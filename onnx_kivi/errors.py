"""The exceptions a caller may want to tell apart; each message says where, expected, got, and what to do."""

from __future__ import annotations


class KiviError(Exception):
    """Base of every error this package raises on purpose."""


class UnsupportedModelError(KiviError):
    """The file is not an ONNX decoder this package can read or rewrite."""


class ConfigError(KiviError, ValueError):
    """An option or argument is outside what the spec allows."""


class CacheError(KiviError):
    """A cache handle, a step on it, or a tensor given to it is wrong."""


class SpecMismatchError(KiviError):
    """A node was written for another version of the op than this package serves."""


class BackendUnavailableError(KiviError):
    """The backend, host or ISA level asked for does not exist on this machine."""


class ExtraUnavailableError(KiviError, ImportError):
    """A package that an extra needs is missing, or of a version that this package does not know."""
