"""What a run was computed with: versions of packages, Python, the device and its threads."""

import platform
from collections.abc import Mapping
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from types import MappingProxyType

import torch

_PACKAGES = ("artaug", "torch", "diffusers", "transformers", "peft", "numpy", "pillow")


@lru_cache(maxsize=1)
def _package_versions() -> Mapping[str, str]:
    """By name. Made once: the files of every package are read for it."""
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    return MappingProxyType(versions)


def installed_versions() -> dict[str, str]:
    """By name; what decides the last bits of pictures, and with them what a run that goes on would draw."""
    gpu = {"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}
    return {
        **_package_versions(),
        "python": platform.python_version(),
        "machine": platform.machine(),
        "threads": str(torch.get_num_threads()),
        **gpu,
    }
