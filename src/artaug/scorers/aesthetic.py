"""The LAION aesthetic predictor: how much people like a picture, whatever it was drawn from."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self, final

import torch
from PIL.Image import Image
from torch import Tensor, nn

from artaug.errors import ModelError
from artaug.scorers.encoders import DualEncoder
from artaug.scorers.loading import read_tensors
from artaug.scoring import Scorer


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class AestheticScore(Scorer):
    """A head of linear layers on the CLIP vector of a picture: LAION aesthetic v2, trained on ratings from 1 to 10.

    Stable Diffusion draws about 5 to 6; 6 and more is good. The prompt is not looked at, and the scale is flat: on its
    own this is a weak judge of preference (76.8 % of human choices, against PickScore's 79.8 %).

    Raises:
        ModelError: if the head does not fit the vectors of the encoder.
    """

    encoder: DualEncoder
    """``openai/clip-vit-large-patch14``, on whose vectors the published heads were trained."""
    head: nn.Module = field(repr=False)
    """From (pictures, features), of length 1 each, to (pictures, 1)."""
    name: str = "LAION aesthetic"
    """What tables call it."""

    def __post_init__(self) -> None:
        first = next(self.head.parameters())
        if first.shape[-1] != self.encoder.model.config.projection_dim:
            raise ModelError(
                f"the head reads {first.shape[-1]} features and {self.encoder.name} gives "
                f"{self.encoder.model.config.projection_dim}. The published heads read openai/clip-vit-large-patch14."
            )

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        *,
        clip: str = "openai/clip-vit-large-patch14",
        revision: str = "main",
        device: str | torch.device | None = None,
        dtype: torch.dtype = torch.float32,
        batch_size: int = 16,
    ) -> Self:
        """Load the head from a file and the CLIP it sits on.

        Args:
            source: a safetensors file with the keys of ``sac+logos+ava1-l14-linearMSE.pth`` (``layers.0.weight``,
                ``layers.2.weight``, ...) or of a single linear layer (``weight``, ``bias``). What is published is
                pickled and refused; the error says how to convert it.
            clip: its CLIP, a folder or a name on the Hub.
            revision: of the CLIP.
            device: where to put the CLIP; None for the CPU. The head, a few matrices, stays on the CPU.
            dtype: of the CLIP; the head is float32.
            batch_size: of the CLIP.

        Raises:
            ModelError: for a pickled or unknown file, or a CLIP that cannot be loaded.
        """
        head = linear_head(read_tensors(source), source=source)
        return cls(
            encoder=DualEncoder.from_pretrained(
                clip, revision=revision, device=device, dtype=dtype, batch_size=batch_size
            ),
            head=head,
        )

    def score(self, image: Image, prompt: str) -> float:
        return self.score_batch([image], [prompt])[0]

    @torch.inference_mode()
    def score_batch(self, images: Sequence[Image], prompts: Sequence[str]) -> list[float]:
        if not images:
            return []
        return [float(number) for number in self.head(self.encoder.embed_images(images))[:, 0]]


def linear_head(tensors: dict[str, Tensor], *, source: str | Path) -> nn.Module:
    """Linear layers one after the other, from their weights: no activation lies between them, and dropout is over.

    Raises:
        ModelError: if the weights are not those of linear layers that follow each other and end in one number.
    """
    numbers = sorted({int(name.split(".")[1]) for name in tensors if name.startswith("layers.")})
    names = [f"layers.{number}." for number in numbers] or [""]
    if {f"{name}{part}" for name in names for part in ("weight", "bias")} != tensors.keys():
        raise ModelError(
            f"{str(source)!r} has {sorted(tensors)[:4]}, which is no head of linear layers. Expected layers.0.weight, "
            "layers.0.bias, ... as in sac+logos+ava1-l14-linearMSE, or weight and bias of one layer."
        )
    layers = []
    for name in names:
        weight, bias = tensors[f"{name}weight"].float(), tensors[f"{name}bias"].float()
        layer = nn.Linear(weight.shape[1], weight.shape[0])
        layer.load_state_dict({"weight": weight, "bias": bias})
        layers.append(layer)
    widths = [layer.in_features for layer in layers[1:]] + [1]
    if widths != [layer.out_features for layer in layers]:
        raise ModelError(f"the layers of {str(source)!r} do not follow each other to one number, so they are no head.")
    return nn.Sequential(*layers).requires_grad_(False).eval()
