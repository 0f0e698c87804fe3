"""What a run was computed with: versions of packages, Python, the device and its threads."""

import platform
from importlib.metadata import PackageNotFoundError, version

import torch

_PACKAGES = ("artaug", "torch", "diffusers", "transformers", "peft", "numpy", "pillow")


def installed_versions() -> dict[str, str]:
    """By name; what decides the last bits of pictures, and with them what a run that goes on would draw."""
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    gpu = {"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}
    return {
        **versions,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "threads": str(torch.get_num_threads()),
        **gpu,
    }
