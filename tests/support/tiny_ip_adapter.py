"""An IP-Adapter for the tiny UNets, put on by diffusers' own `load_ip_adapter`: random weights, nothing downloaded."""

import torch
from safetensors.torch import save_file
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

_CLIP = 12
_TOKENS = 4


def with_ip_adapter(pipeline, *, scale=0.8, adapters=1):
    """The same pipeline with as many IP-Adapters, and an encoder of pictures; global randomness untouched."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        encoder = picture_encoder()
        states = [adapter_state(pipeline.unet) for _ in range(adapters)]
    processor = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    pipeline.register_modules(image_encoder=encoder, feature_extractor=processor)
    pipeline.load_ip_adapter(
        states,
        subfolder=[""] * adapters,
        weight_name=[""] * adapters,
        low_cpu_mem_usage=False,
        image_encoder_folder=None,
    )
    pipeline.set_ip_adapter_scale([scale] * adapters)
    return pipeline


def save_ip_adapter(folder, weight_name, unet):
    """Save an adapter and its encoder as ``h94/IP-Adapter`` has them."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        picture_encoder().save_pretrained(folder / "image_encoder")
        state = adapter_state(unet)
    save_file(
        {f"{part}.{name}": tensor for part, tensors in state.items() for name, tensor in tensors.items()},
        folder / weight_name,
    )


def picture_encoder():
    return CLIPVisionModelWithProjection(
        CLIPVisionConfig(
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            image_size=32,
            patch_size=8,
            projection_dim=_CLIP,
        )
    ).eval()


def adapter_state(unet):
    """A state dict in the form of the published files: layers are counted over all attentions, those of text have odd numbers."""
    width = unet.config.cross_attention_dim
    layers = [name for name in unet.attn_processors if name.endswith("attn2.processor")]
    ip_adapter = {}
    for number, name in enumerate(layers):
        attention = unet.get_submodule(name.removesuffix(".processor"))
        inner = attention.to_q.out_features
        for key in ("to_k_ip", "to_v_ip"):
            ip_adapter[f"{2 * number + 1}.{key}.weight"] = torch.randn(inner, width)
    return {
        "image_proj": {
            "proj.weight": torch.randn(_TOKENS * width, _CLIP),
            "proj.bias": torch.randn(_TOKENS * width),
            "norm.weight": torch.ones(width),
            "norm.bias": torch.zeros(width),
        },
        "ip_adapter": ip_adapter,
    }
