"""The LAION aesthetic predictor: how much people like a picture, independent of its prompt."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self, final

import torch
from PIL.Image import Image
from torch import Tensor, nn

from artaug._internal.annotations import checked
from artaug._internal.weights import model_errors
from artaug.errors import ModelError
from artaug.scorers.encoders import DualEncoder
from artaug.scorers.loading import DEFAULT_OPTIONS, LoadOptions, load_weights
from artaug.scoring import Scorer


@checked
@final
@dataclass(frozen=True, kw_only=True, eq=False)
class AestheticScore(Scorer):
    """A head of linear layers on the CLIP vector of a picture: LAION aesthetic v2, trained on ratings from 1 to 10.

    Stable Diffusion has about 5 to 6; 6 and more is good. The prompt is not used, and scores differ little: on its own
    this is a weak predictor of preference (76.8 % of human choices, against PickScore's 79.8 %).

    Raises:
        ModelError: if the head does not fit the vectors of the encoder.
    """

    encoder: DualEncoder
    """``openai/clip-vit-large-patch14``, on whose vectors the published heads were trained."""
    head: nn.Module = field(repr=False)
    """From vectors of length 1, (pictures, features), to (pictures, 1)."""
    name: str = "LAION aesthetic"
    """The name in tables."""

    def __post_init__(self) -> None:
        first = next(self.head.parameters())
        if first.shape[-1] != self.encoder.model.config.projection_dim:
            raise ModelError(
                f"the head takes {first.shape[-1]} features and {self.encoder.name} gives "
                f"{self.encoder.model.config.projection_dim}. The published heads need openai/clip-vit-large-patch14."
            )

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        *,
        clip: str = "openai/clip-vit-large-patch14",
        options: LoadOptions = DEFAULT_OPTIONS,
    ) -> Self:
        """Load the head from a file, and its CLIP.

        Args:
            source: a safetensors file with the keys of ``sac+logos+ava1-l14-linearMSE.pth`` (``layers.0.weight``,
                ``layers.2.weight``, ...) or of a single linear layer (``weight``, ``bias``). What is published is
                pickled and refused; the error says how to convert it.
            clip: its CLIP, a folder or a name on the Hub.
            options: of the CLIP. The head, a few matrices, stays on the CPU and is float32.

        Raises:
            ModelError: for a pickled or unknown file, or a CLIP that cannot be loaded.
        """
        with model_errors(f"{str(source)!r} is no head of linear layers"):
            head = linear_head(load_weights(source), source=source)
        return cls(encoder=DualEncoder.from_pretrained(clip, options=options), head=head)

    @property
    def models(self) -> Sequence[nn.Module]:
        return self.encoder.models

    def score(self, image: Image, prompt: str) -> float:
        return self.score_batch([image], [prompt])[0]

    @torch.inference_mode()
    def score_batch(self, images: Sequence[Image], prompts: Sequence[str]) -> list[float]:
        if not images:
            return []
        return [float(score) for score in self.head(self.encoder.embed_images(images))[:, 0]]


def linear_head(weights: dict[str, Tensor], *, source: str | Path) -> nn.Module:
    """Linear layers in sequence, made of their weights; the published heads have no activation between them.

    Raises:
        ModelError: if the weights are not those of linear layers that fit each other and end in one number.
    """
    numbers = sorted({int(name.split(".")[1]) for name in weights if name.startswith("layers.")})
    prefixes = [f"layers.{number}." for number in numbers] or [""]
    if {f"{prefix}{name}" for prefix in prefixes for name in ("weight", "bias")} != weights.keys():
        raise ModelError(
            f"{str(source)!r} has {sorted(weights)[:4]}, which is not a head of linear layers. Expected layers.0.weight, "
            "layers.0.bias, ... as in sac+logos+ava1-l14-linearMSE, or weight and bias of one layer."
        )
    layers = []
    for prefix in prefixes:
        weight, bias = weights[f"{prefix}weight"].float(), weights[f"{prefix}bias"].float()
        layer = nn.Linear(weight.shape[1], weight.shape[0])
        layer.load_state_dict({"weight": weight, "bias": bias})
        layers.append(layer)
    next_inputs = [layer.in_features for layer in layers[1:]] + [1]
    if next_inputs != [layer.out_features for layer in layers]:
        raise ModelError(f"the layers of {str(source)!r} do not fit each other, or do not end in one number.")
    return nn.Sequential(*layers).requires_grad_(False).eval()
