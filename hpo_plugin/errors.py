"""Errors that several packages raise and handle. Each package defines its other errors itself."""


class ConfigError(ValueError):
    """A configuration that contradicts itself or selects nothing; the message names the keys, values and remedy."""
