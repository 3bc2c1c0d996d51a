"""Versions of installed packages."""

from functools import cache


def installed(package: str) -> str | None:
    """Return the installed version of ``package``, or None if it is not installed."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return None


@cache
def own() -> str:
    """Return the version of ckptavg; "0+unknown" if its source tree is imported without being installed."""
    return installed("ckptavg") or "0+unknown"
