"""Tiny random models of diffusers: transformers of images and videos, and a UNet."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch

from .architectures import Architecture, randomise
from .inputs import BATCH, TEXT_MASKS, TEXT_PADDING, Inputs

TEXT_LENGTH = 12
MISSING = (
    ""
    if importlib.util.find_spec("diffusers")
    else "Models of diffusers are left out, as it is not installed: pip install 's2o-compile[diffusers]'."
)
"""Why these models are left out; "" where they are not."""


class DiffusionModel(Architecture):
    """A model of diffusers, whose attention is SDPA."""

    @property
    def model_class(self) -> Any:
        """Its class."""
        import diffusers

        return getattr(diffusers, self.model)

    @property
    def implementations(self) -> tuple[str, ...]:
        """The spellings of attention that are called."""
        return ("sdpa",)

    def build(self, implementation: str) -> Any:
        """The model in evaluation mode, with weights for which no attention is close to uniform."""
        torch.manual_seed(0)
        return randomise(self.model_class(**self.options).eval())


def diffusion(model: str, sites: int, inputs: Callable[[], Inputs], **options: Any) -> Architecture:
    """A model that attends so many times a call, with padding in the text if it takes a mask of that."""
    scenarios = ("plain", TEXT_PADDING) if inputs().keys() & set(TEXT_MASKS) else ("plain",)
    whole = lambda: inputs() | {"return_dict": False}  # noqa: E731
    return DiffusionModel("diffusion", model, options, whole, sites, scenarios=scenarios)


def noise(name: str, *shape: int, text_channels: int, **others: Any) -> Inputs:
    """A noisy image, video or sequence of their patches, of the given shape, the time of each, and an encoded text."""
    return {
        name: torch.randn(BATCH, *shape),
        "timestep": torch.tensor([1, 7]),
        "encoder_hidden_states": torch.randn(BATCH, TEXT_LENGTH, text_channels),
        **others,
    }


def all_of_the_text(dtype: torch.dtype = torch.long) -> torch.Tensor:
    """A mask of the text that has no padding."""
    return torch.ones(BATCH, TEXT_LENGTH, dtype=dtype)


DIFFUSION: dict[str, Architecture] = {
    "flux": diffusion(
        "FluxTransformer2DModel", 2,
        lambda: noise(
            "hidden_states", 100, 4, text_channels=32, pooled_projections=torch.randn(BATCH, 32),
            img_ids=torch.randint(10, (100, 3)).float(), txt_ids=torch.zeros(TEXT_LENGTH, 3),
        ),
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=[4, 4, 8],
    ),
    "stable_diffusion_3": diffusion(
        "SD3Transformer2DModel", 2,
        lambda: noise("hidden_states", 4, 20, 20, text_channels=32, pooled_projections=torch.randn(BATCH, 64)),
        sample_size=20, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=4,
        caption_projection_dim=32, joint_attention_dim=32, pooled_projection_dim=64, out_channels=4,
    ),
    "wan": diffusion(
        "WanTransformer3DModel", 4, lambda: noise("hidden_states", 4, 2, 16, 16, text_channels=16),
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=16,
        freq_dim=16, ffn_dim=32, num_layers=2, cross_attn_norm=True, qk_norm="rms_norm_across_heads",
        rope_max_seq_len=32,
    ),
    "ltx_video": diffusion(
        "LTXVideoTransformer3DModel", 4,
        lambda: noise(
            "hidden_states", 2 * 8 * 8, 4, text_channels=16, encoder_attention_mask=all_of_the_text(torch.bool),
            num_frames=2, height=8, width=8,
        ),
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8, cross_attention_dim=16,
        num_layers=2, qk_norm="rms_norm_across_heads", caption_channels=16,
    ),
    "hunyuan_video": diffusion(
        "HunyuanVideoTransformer3DModel", 3,
        lambda: noise(
            "hidden_states", 4, 2, 8, 8, text_channels=16, pooled_projections=torch.randn(BATCH, 8),
            encoder_attention_mask=all_of_the_text(), guidance=torch.full((BATCH,), 6.0),
        ),
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=10, num_layers=1, num_single_layers=1,
        num_refiner_layers=1, patch_size=1, patch_size_t=1, guidance_embeds=True, text_embed_dim=16,
        pooled_projection_dim=8, rope_axes_dim=(2, 4, 4),
    ),
    "cogvideox": diffusion(
        "CogVideoXTransformer3DModel", 2, lambda: noise("hidden_states", 2, 4, 16, 16, text_channels=8),
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=4, time_embed_dim=2, text_embed_dim=8,
        num_layers=2, sample_width=16, sample_height=16, sample_frames=5, patch_size=2, temporal_compression_ratio=4,
        max_text_seq_length=TEXT_LENGTH,
    ),
    "pixart": diffusion(
        "PixArtTransformer2DModel", 4,
        lambda: noise(
            "hidden_states", 4, 20, 20, text_channels=32, encoder_attention_mask=all_of_the_text(),
            added_cond_kwargs={"aspect_ratio": None, "resolution": None},
        ),
        sample_size=20, num_layers=2, patch_size=2, attention_head_dim=8, num_attention_heads=3, caption_channels=32,
        in_channels=4, cross_attention_dim=24, out_channels=8, norm_num_groups=4,
    ),
    "qwen_image": diffusion(
        "QwenImageTransformer2DModel", 2,
        lambda: noise(
            "hidden_states", 100, 16, text_channels=16, encoder_hidden_states_mask=all_of_the_text(),
            img_shapes=[[(1, 10, 10)]] * BATCH,
        ),
        patch_size=2, in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=16, guidance_embeds=False, axes_dims_rope=(8, 4, 4),
    ),
    "unet": diffusion(
        "UNet2DConditionModel", 8, lambda: noise("sample", 4, 16, 16, text_channels=8),
        block_out_channels=(8, 16), norm_num_groups=4, layers_per_block=1, cross_attention_dim=8, attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        in_channels=4, out_channels=4, sample_size=16,
    ),
}  # fmt: skip
"""By name. PixArt's mask of the text is made of integers that could be any, times -10,000."""
