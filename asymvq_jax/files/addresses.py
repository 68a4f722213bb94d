"""Paths that are addresses of buckets, and the packages that they need."""

from __future__ import annotations

import importlib.util

from asymvq_jax.errors import ConfigError

# What etils.epath and TensorStore need for each kind of address.
PACKAGES = {"gs": "gcsfs", "s3": "s3fs"}


def check_address(path: str, field: str = "") -> None:
    """Raises ConfigError for an address (gs://...) that cannot be served here; paths of this machine are all right.

    Args:
        path: a path or an address.
        field: how messages call it, such as "data.path".
    """
    scheme, address, _ = path.partition("://")
    if not address:
        return
    named = f"{field}={path!r}" if field else path
    if scheme not in PACKAGES:
        known = ", ".join(f"{name}://" for name in PACKAGES)
        raise ConfigError(f"{named}: expected a path of this machine, or an address that begins with {known}")
    package = PACKAGES[scheme]
    if importlib.util.find_spec(package) is None:
        extra = " (or: pip install 'asymvq-jax[gcs]')" if scheme == "gs" else ""
        raise ConfigError(f"{named} needs the package {package}; install it with: pip install {package}{extra}")
