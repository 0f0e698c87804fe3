"""HPSv2: a CLIP tuned on which of several pictures people liked best."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self, final

import numpy as np
import torch
from PIL.Image import Image
from torch import Tensor

from artaug.scorers.encoders import DualEncoder
from artaug.scorers.loading import build, load_config, load_image_processor, load_tokenizer, read_tensors
from artaug.scorers.open_clip import from_open_clip
from artaug.scorers.pickscore import CLIP_H
from artaug.scoring import Scorer


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class HPSv2(Scorer):
    """``cos(picture, prompt)`` in a CLIP-H tuned on rankings: HPS v2 and v2.1 (Wu et al. 2023), about 0.20 to 0.35.

    Papers print it times 100. Numbers of v2 and of v2.1 do not compare. Unlike the other CLIPs it sees the whole of a
    picture that is not square, between black bars.
    """

    encoder: DualEncoder
    """The tuned CLIP, with a `Letterbox` for an image processor."""
    name: str = "HPSv2"
    """What tables call it; ``from_pretrained`` adds the name of the file, which says whether v2 or v2.1."""

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        *,
        clip: str = CLIP_H,
        revision: str = "main",
        device: str | torch.device | None = None,
        dtype: torch.dtype = torch.float32,
        batch_size: int = 16,
    ) -> Self:
        """Load the tuned weights into the CLIP they were tuned from.

        Args:
            source: a safetensors file with the keys of ``state_dict`` in ``HPS_v2.1_compressed.pt``, which are
                open_clip's. What is published is pickled and refused; the error says how to convert it.
            clip: where the sizes, the tokenizer and the image processor are; its own weights are not read.
            revision: of ``clip``.
            device: where to put the model; None for the CPU.
            dtype: of the weights.
            batch_size: pictures, or prompts, that go through the model together.

        Raises:
            ModelError: for a pickled file, or one whose weights are not exactly those of ``clip``.
        """
        tensors = from_open_clip(read_tensors(source), source=source)
        from transformers import CLIPModel  # noqa: PLC0415 - slow to load

        config = load_config(clip, revision=revision)
        model = build(CLIPModel, config, tensors, source=source, device=device, dtype=dtype)
        seen = load_image_processor(clip, revision=revision)
        encoder = DualEncoder(
            model=model,
            image_processor=Letterbox(
                size_px=model.config.vision_config.image_size, mean=tuple(seen.image_mean), std=tuple(seen.image_std)
            ),
            tokenizer=load_tokenizer(clip, revision=revision),
            name=Path(source).stem,
            batch_size=batch_size,
        )
        return cls(encoder=encoder, name=f"HPSv2 ({Path(source).stem})")

    def score(self, image: Image, prompt: str) -> float:
        return self.score_batch([image], [prompt])[0]

    def score_batch(self, images: Sequence[Image], prompts: Sequence[str]) -> list[float]:
        return self.encoder.cosines(images, prompts)


@final
@dataclass(frozen=True, kw_only=True)
class Letterbox:
    """Shows a model the whole picture: its longer side fits (bicubic, antialiased), black fills the rest of a square."""

    size_px: int
    """Side of the square."""
    mean: tuple[float, ...]
    """Taken from each channel, of values in [0, 1], after filling."""
    std: tuple[float, ...]
    """Each channel is divided by it."""

    def __call__(
        self, images: Sequence[Image], *, return_tensors: str = "pt", input_data_format: str = "channels_last"
    ) -> dict[str, Tensor]:
        """``pixel_values`` of RGB pictures, (pictures, 3, size_px, size_px), as an image processor gives them."""
        squares = torch.stack([self._square(image) for image in images])
        mean, std = (torch.tensor(each)[:, None, None] for each in (self.mean, self.std))
        return {"pixel_values": (squares - mean) / std}

    def _square(self, image: Image) -> Tensor:
        pixels = torch.from_numpy(np.array(image, dtype=np.float32) / 255).permute(2, 0, 1)
        scale = self.size_px / max(image.size)
        width, height = (max(1, round(side * scale)) for side in image.size)
        if (width, height) != image.size:
            pixels = torch.nn.functional.interpolate(
                pixels[None], (height, width), mode="bicubic", antialias=True, align_corners=False
            )[0]
        left, top = (self.size_px - width) // 2, (self.size_px - height) // 2
        right, bottom = self.size_px - width - left, self.size_px - height - top
        return torch.nn.functional.pad(pixels, (left, right, top, bottom))
