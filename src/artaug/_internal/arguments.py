"""The check of what a user passed, in one grammar of error text, and one error for all that is wrong with a call.

What a user's object *returned* is checked in `artaug._internal.contracts`. Here is what was passed, to a function or to a
constructor::

    <owner>(<name>=<value>): expected <what is allowed>, received <what came>. <What to do.>
"""

import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from numbers import Integral, Real

from artaug._internal.text import shorten
from artaug.errors import ArtAugError, InvalidValueError

_QUOTED = 120
"""Characters of a value that an error quotes."""

_ADVICE = {
    "Adapter": "Such as artaug.PlainLoRA().",
    "Base": "Such as artaug.hub.base_of('black-forest-labs/FLUX.1-dev').",
    "Box": "Such as artaug.Box(0, 0, 0.5, 1), the left half; of pixels, artaug.Box.from_pixels(...).",
    "BestOf": "Such as artaug.BestOf(4, by=scorer).",
    "Checkpoints": "Such as artaug.Checkpoints(folder='runs/first').",
    "Critic": "Such as artaug.critics.PhotometricCritic(), or an object of a subclass of yours.",
    "DifferentialLoRATrainer": "Such as artaug.DifferentialLoRATrainer(rank=16, steps=400).",
    "Fuser": "Such as artaug.ConcatFuser().",
    "Guide": "Such as artaug.RegionalAttention().",
    "Image": "Open a file with PIL.Image.open(path).",
    "DiffusionPipeline": "A name or a folder is for from_pretrained; that of a synthesizer is synthesizer.pipeline.",
    "ImagePair": "Such as artaug.ImagePair(prompt=..., before=..., after=...); that of an attempt is attempt.pair.",
    "LoRA": "Read a file with artaug.LoRA.load(path).",
    "Objective": "Such as artaug.PairedPreference().",
    "LowRank": "Read a file with artaug.LoRA.load(path).",
    "Optimizer": "Such as artaug.AdamW().",
    "PairwiseJudge": "Such as an object of a subclass of yours, see artaug.PairwiseJudge.",
    "PairFilter": "Make one of a scorer, artaug.Gain(scorer, at_least=0.02), or subclass artaug.PairFilter.",
    "Placement": "Such as artaug.Resident() or artaug.OneAtATime().",
    "Plan": "Make one of a prompt, artaug.Plan('a red cone').",
    "RegionPlanner": "Such as artaug.GreedyPlanner().",
    "RunPlan": "Make one with artaug.plan_run(prompts, ...).",
    "Scorer": "Make one of a function, artaug.scorers.FunctionScorer(function=...), or subclass artaug.Scorer.",
    "StopRule": "Such as artaug.StopRule(scorer, prompts).",
    "Synthesizer": "Give it the pipeline, artaug.diffusion.DiffusersSynthesizer(pipeline=pipeline).",
    "Trainable": "Such as an artaug.diffusion.DiffusersSynthesizer.",
    "Validation": "Such as artaug.Validation(scorer=scorer, prompts=prompts).",
    "dtype": "Such as torch.bfloat16.",
}
"""What to do, by the name of the class that was expected."""

ADVICE_BY_NAME = {"targets": "Such as 'to_q|to_k', a regular expression."}
"""What to do, by the name of an argument of which its class says too little."""

_OF_AN_ARRAY = {"Image": "PIL.Image.fromarray", "Mask": "artaug.Mask.from_array"}

_NAMES_ELSEWHERE = {
    "rank": ("r", "network_dim", "dim"),
    "learning_rate": ("lr", "unet_lr"),
    "steps": ("num_inference_steps", "max_train_steps", "num_train_steps", "iterations"),
    "batch_size": ("train_batch_size", "per_device_train_batch_size"),
    "targets": ("target_modules",),
    "schedule": ("lr_scheduler", "lr_scheduler_type"),
    "warmup": ("lr_warmup_steps", "warmup_steps"),
    "optimizer": ("optimizer_type",),
    "cache": ("cache_latents", "cache_latents_to_disk"),
    "dtype": ("torch_dtype", "mixed_precision"),
    "guidance_scale": ("cfg", "cfg_scale"),
    "scale": ("weight", "multiplier", "strength", "lora_scale", "adapter_weight"),
    "at_least": ("threshold", "min", "minimum"),
    "max_new_tokens": ("max_tokens",),
    "seed": ("generator",),
    "synthesizer": ("pipeline", "pipe", "model"),
    "options": ("device", "torch_dtype", "dtype", "batch_size"),
    "store": ("output_dir", "resume", "resume_from_checkpoint"),
}
"""Names of ours, and what the same is called in diffusers, PEFT, sd-scripts, ai-toolkit and OpenAI's protocol."""


def advice_for(classes: Sequence[type], value: object, *, expected: str = "") -> str:
    """What to do about a value that is none of ``classes``; empty where there is nothing to add.

    >>> import numpy as np
    >>> from PIL import Image
    >>> from artaug._internal.arguments import advice_for
    >>> advice_for([Image.Image], np.zeros((8, 8, 3)))
    'Make one of an array with PIL.Image.fromarray(array).'
    """
    names = {cls.__name__ for cls in classes}
    if isinstance(value, type):
        return f"Make one of the class: {value.__name__}(...)."
    if isinstance(value, str) and expected.startswith("a list"):
        return f"Put it in a list: [{shorten(repr(value), 60)}]."
    if isinstance(value, float) and expected.startswith("a whole number") and value.is_integer():
        return f"Write {value:.0f}."
    made = [maker for name, maker in _OF_AN_ARRAY.items() if name in names and hasattr(value, "__array__")]
    if made:
        return f"Make one of an array with {made[0]}(array)."
    if type(value).__name__ == "LoRA" and "Synthesizer" in names:
        return "Draw with it: synthesizer.with_lora(lora)."
    return next((_ADVICE[cls.__name__] for cls in classes if cls.__name__ in _ADVICE), "")


def argument_error(owner: str, name: str, value: object, *, expected: str, advice: str = "") -> InvalidValueError:
    """Make the error that names an argument, what came, what was expected and what to do.

    >>> from artaug._internal.arguments import argument_error
    >>> print(argument_error("enhance", "rounds", 2.5, expected="a whole number of at least 1"))
    enhance(rounds=2.5): expected a whole number of at least 1, received a float.
    """
    kind = type(value).__name__
    received = "None" if value is None else f"{'an' if kind[0].lower() in 'aeiou' else 'a'} {kind}"
    if isinstance(value, type):
        received = f"the class {value.__name__}"
    message = f"{owner}({name}={shorten(repr(value), _QUOTED)}): expected {expected}, received {received}."
    return InvalidValueError(f"{message} {advice}".rstrip())


def unknown_argument(owner: str, name: str, value: object, *, names: Sequence[str]) -> InvalidValueError:
    """Make the error for a name that is none of the arguments' ``names``.

    >>> from artaug._internal.arguments import unknown_argument
    >>> print(unknown_argument("Gain", "threshold", 0.5, names=["scorer", "at_least"]))
    Gain(threshold=0.5): expected one of the arguments scorer, at_least, received a float. Did you mean at_least?
    """
    same = [ours for ours, theirs in _NAMES_ELSEWHERE.items() if name in theirs and ours in names]
    near = same or get_close_matches(name, names, n=1)
    advice = f"Did you mean {near[0]}?" if near else ""
    return argument_error(owner, name, value, expected=f"one of the arguments {', '.join(names)}", advice=advice)


def check_argument(owner: str, name: str, value: object, of: type, *, optional: bool = False) -> None:
    """Refuse an argument of another type.

    Args:
        owner: the function or class that it was passed to.
        name: of the argument.
        value: what came.
        of: the class that is expected.
        optional: whether None is allowed.

    Raises:
        InvalidValueError: if it is not an instance, naming what would be one.
    """
    if isinstance(value, of) or (optional and value is None):
        return
    raise argument_error(owner, name, value, expected=f"an instance of {type_name(of)}", advice=advice_for([of], value))


def check_items(owner: str, name: str, values: object, of: type) -> None:
    """Refuse what is no list or tuple of instances of a class.

    Raises:
        InvalidValueError: naming the first item that is of another type.
    """
    if isinstance(values, str | bytes) or not isinstance(values, Sequence):
        raise argument_error(owner, name, values, expected=f"a list of {type_name(of)}", advice="Put it in a list.")
    for index, item in enumerate(values):
        check_argument(owner, f"{name}[{index}]", item, of)


def check_count(owner: str, name: str, value: object, *, least: int = 1) -> None:
    """Refuse what is no whole number of at least ``least``; numpy's are taken.

    Raises:
        InvalidValueError: if it is not.
    """
    if isinstance(value, bool) or not isinstance(value, Integral) or int(value) < least:
        raise argument_error(owner, name, value, expected=f"a whole number of at least {least}")


def check_number(owner: str, name: str, value: object) -> None:
    """Refuse what is no number; numpy's are taken. The range is for the caller to check.

    Raises:
        InvalidValueError: if it is none.
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        raise argument_error(owner, name, value, expected="a number")


def check_finite_number(owner: str, name: str, value: object) -> None:
    """Refuse what is no finite number; numpy's are taken.

    Raises:
        InvalidValueError: if it is not.
    """
    check_number(owner, name, value)
    if isinstance(value, Real) and not math.isfinite(value):
        raise argument_error(owner, name, value, expected="a finite number")


class Faults:
    """All that is wrong with one call, so that one error lists it.

    >>> from artaug._internal.arguments import Faults, check_count
    >>> faults = Faults("improve")
    >>> for name, value in {"batch_size": 0, "seed": None}.items():
    ...     with faults.collected():
    ...         check_count("improve", name, value)
    >>> faults.raise_any()
    Traceback (most recent call last):
    artaug.InvalidValueError: improve: 2 things are wrong, and nothing was begun:
    - improve(batch_size=0): expected a whole number of at least 1, received an int.
    - improve(seed=None): expected a whole number of at least 1, received None.
    """

    def __init__(self, owner: str) -> None:
        self._owner = owner
        self._errors: list[ArtAugError] = []

    @contextmanager
    def collected(self) -> Iterator[None]:
        """Keep an error of artaug that is raised in the ``with`` block, instead of raising it; a bug is raised."""
        try:
            yield
        except ArtAugError as error:
            self._errors.append(error)

    def raise_any(self) -> None:
        """Raise what was collected.

        Raises:
            ArtAugError: the only one as it is, of its own class.
            InvalidValueError: for several, with a line for each.
        """
        if len(self._errors) == 1:
            raise self._errors[0]
        if self._errors:
            lines = "".join(f"\n- {error}" for error in self._errors)
            raise InvalidValueError(
                f"{self._owner}: {len(self._errors)} things are wrong, and nothing was begun:{lines}"
            )


def type_name(of: type) -> str:
    """The name of a class, as people import it."""
    if of.__module__ == "builtins":
        return of.__qualname__
    packages = of.__module__.split(".")
    prefixes = (".".join(packages[:length]) for length in range(1, len(packages)))
    exporting = (prefix for prefix in prefixes if of.__name__ in getattr(sys.modules.get(prefix), "__all__", ()))
    return f"{next(exporting, of.__module__)}.{of.__qualname__}"
