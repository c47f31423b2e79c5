"""The one place the version stands; read at build time without importing torch."""

__version__ = "0.1.0"
