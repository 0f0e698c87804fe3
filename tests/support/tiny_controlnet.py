"""ControlNets for the tiny pipelines: random weights, and layers that begin as zeros are not zeros."""

import torch
from diffusers import ControlNetModel


def tiny_controlnet(unet) -> ControlNetModel:
    """A ControlNet with the weights of a UNet, the same every time, global randomness untouched."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        controlnet = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(4, 8, 8, 8)).eval()
        heard(controlnet)
    return controlnet


def heard(controlnet) -> None:
    """Layers that begin as zeros would leave the picture without effect."""
    for name, parameter in controlnet.named_parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.2)
        if "cond_embedding" in name:
            parameter.data.mul_(4)
