"""Caches of diffusers, which reuse in a step what layers computed in earlier ones: what works beside one, and what is refused.

First-block caching computes the first block in every step, and adds what the others did at the last full step if the first
has hardly changed. It keeps the passes of guidance apart by the contexts that a pipeline names. Under `RegionalAttention` a pass is
one call with one sequence, so that this holds with regions as without. Guides that call the model themselves, or read layers that are
passed over, have no place in it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from artaug.errors import GuideError, ModelError
from artaug.regional.guide import Guide

_BESIDE_REGIONS = "FirstBlockCacheConfig"
"""The cache whose passes are kept apart, and which computes every layer or none but the first."""


def active_cache(module: nn.Module) -> str | None:
    """What caches in a model: the class of its config, or of a hook that was put on without one; None if nothing does."""
    config = getattr(module, "_cache_config", None)
    if config is not None:
        return type(config).__name__
    registries: list[Any] = [getattr(part, "_diffusers_hook", None) for part in module.modules()]
    hooks = (hook for registry in registries if registry is not None for hook in registry.hooks.values())
    return next((type(hook).__name__ for hook in hooks if hook._is_stateful), None)  # noqa: SLF001 - only caches are


def cache_settings(module: nn.Module) -> str:
    """What caches, and how, for the identity of what draws."""
    config = getattr(module, "_cache_config", None)
    return str(active_cache(module)) if config is None else repr(config)


def check_guide_beside_cache(guide: Guide, module: nn.Module) -> None:
    """Refuse a guide on a model that caches, unless the two work together.

    Raises:
        GuideError: naming both.
    """
    cache = active_cache(module)
    if cache is None or (guide.runs_cached and cache == _BESIDE_REGIONS):
        return
    reason = (
        f"{cache} has not been compared with exact attention under regions: of the caches of diffusers, {_BESIDE_REGIONS} has"
        if guide.runs_cached
        else "this guide calls the model itself, or reads layers that the cache passes over"
    )
    raise GuideError(
        f"{guide!r} cannot act on a {type(module).__name__} that reuses what it computed in earlier steps ({cache}): {reason}. "
        "Call its disable_cache() before drawing with the guide."
    )


def check_trains_uncached(module: nn.Module) -> None:
    """Refuse to train a model that caches.

    Raises:
        ModelError: since a training would learn from what another step computed.
    """
    if (cache := active_cache(module)) is not None:
        raise ModelError(
            f"this {type(module).__name__} reuses what it computed in earlier steps ({cache}), and a training computes every step "
            "for itself. Call its disable_cache() before training."
        )


@contextmanager
def cache_contexts_named(pipeline: object, module: nn.Module) -> Iterator[None]:
    """Say in a ``with`` block which pipeline does not tell a cache what it computes, where diffusers names no pipeline.

    Raises:
        ModelError: naming it.
    """
    try:
        yield
    except ValueError as error:
        if "No cache context is set" not in str(error):
            raise
        raise ModelError(
            f"{type(pipeline).__name__} of diffusers does not say which pass of guidance it computes, and {active_cache(module)} "
            f"has to know. Call disable_cache() of the {type(module).__name__}."
        ) from error
