"""Random inputs of the zoo's models, and the scenarios that they are called in."""

from __future__ import annotations

from typing import Any

import torch

BATCH, LENGTH, SOURCE, PREFIX = 2, 40, 32, 24
VOCABULARY, IMAGE_TOKEN = 99, 3
PADDING = ("left padding", "right padding")
TEXT_PADDING = "text padding"
TEXT_MASKS = ("encoder_attention_mask", "encoder_hidden_states_mask")
"""Of diffusion models, the masks of the encoded text."""
CACHE = {"prefill": PREFIX, "decode": LENGTH - 1, "padded decode": LENGTH - 1}
STATIC_CACHE = {"static prefill": PREFIX, "static decode": LENGTH - 1}
"""How many positions are in the cache before the call that is compiled; a static cache has its full length at once."""
SEQUENCES = ("decoder_input_ids", "input_ids")
"""The inputs that grow with the sequence; a model's first of them is the one that is cached."""

Inputs = dict[str, Any]


def tokens(length: int = LENGTH) -> torch.Tensor:
    """Token ids, none of which means padding, an image, or a beginning or end."""
    return torch.randint(IMAGE_TOKEN + 2, VOCABULARY, (BATCH, length))


def text() -> Inputs:
    """Token ids."""
    return {"input_ids": tokens()}


def source_and_target() -> Inputs:
    """Token ids of an encoder and of its decoder."""
    return {"input_ids": tokens(SOURCE), "decoder_input_ids": tokens()}


def pixels(*shape: int) -> Inputs:
    """Images, or videos, of the given shape."""
    return {"pixel_values": torch.randn(BATCH, *shape)}


def waveform(samples: int = 400) -> Inputs:
    """Raw audio."""
    return {"input_values": torch.randn(BATCH, samples)}


def spectrogram(name: str, *shape: int, **others: Any) -> Inputs:
    """Audio features of the given shape."""
    return {name: torch.randn(BATCH, *shape), **others}


def text_with_image(size: int) -> Inputs:
    """Token ids in the middle of which an image takes the place of `size` tokens."""
    ids = tokens()
    ids[:, 12 : 12 + size] = IMAGE_TOKEN
    return {"input_ids": ids}


def flat_patches(side: int, patch: int) -> Inputs:
    """Images of side x side patches, flattened, for an image in the middle of the text."""
    patches = torch.randn(BATCH * side**2, 3 * 2 * patch**2)
    kinds = (text_with_image(side**2 // 4)["input_ids"] == IMAGE_TOKEN).int()
    sizes = torch.tensor([[1, side, side]] * BATCH)
    return {"pixel_values": patches, "image_grid_thw": sizes, "mm_token_type_ids": kinds}


def padding_mask(inputs: Inputs, side: str) -> torch.Tensor:
    """A mask of the sequence that has a quarter of the first row padded on one side."""
    sequence = inputs.get("input_ids", inputs.get("input_values"))
    assert sequence is not None
    mask = torch.ones(sequence.shape, dtype=torch.long)
    padded = sequence.shape[1] // 4
    mask[0, slice(padded) if side == "left" else slice(-padded, None)] = 0
    return mask


def padded_text(mask: torch.Tensor) -> torch.Tensor:
    """A mask of texts of which the first is a quarter shorter."""
    mask = mask.clone()
    mask[0, -(mask.shape[1] // 4) :] = 0
    return mask


def scenario_inputs(model: Any, inputs: Inputs, scenario: str) -> Inputs:
    """The arguments of the call that a scenario compiles; what is before it in a cache is computed here."""
    if scenario == TEXT_PADDING:
        return inputs | {name: padded_text(inputs[name]) for name in TEXT_MASKS if name in inputs}
    if scenario in PADDING:
        return inputs | {"attention_mask": padding_mask(inputs, scenario.split()[0])}
    if scenario == "padded decode":
        inputs = inputs | {"attention_mask": padding_mask(inputs, "left")}
    if scenario in STATIC_CACHE:
        return continued(model, inputs, STATIC_CACHE[scenario], static_cache(model))
    return continued(model, inputs, CACHE[scenario]) if scenario in CACHE else inputs


def static_cache(model: Any) -> Any:
    """An empty cache of more positions than any scenario fills."""
    from transformers import StaticCache

    return StaticCache(config=model.config, max_cache_len=64)


def continued(model: Any, inputs: Inputs, start: int, cache: Any = None) -> Inputs:
    """The call with the positions from `start` on, after one that puts those before it in a cache."""
    name = next(name for name in SEQUENCES if name in inputs)
    shape = inputs[name].shape
    before = {key: value[:, :start] if value.shape == shape else value for key, value in inputs.items()}
    output = model(**before, use_cache=True, past_key_values=cache)
    rest = {name: inputs[name][:, start:], "past_key_values": output.past_key_values}
    if "attention_mask" in inputs:
        rest["attention_mask"] = inputs["attention_mask"]
    if name == "decoder_input_ids":
        rest["encoder_outputs"] = (output.encoder_last_hidden_state,)
    return rest


def real_positions(model: Any, inputs: Inputs, output: torch.Tensor) -> torch.Tensor | slice:
    """The positions [batch, length] of an output that are not padding."""
    mask = inputs.get("attention_mask")
    if mask is None or "decoder_input_ids" in inputs or output.dim() < 3:
        return slice(None)
    if "input_values" in inputs:
        mask = model._get_feature_vector_attention_mask(output.shape[1], mask)
    return mask[:, -output.shape[1] :].bool()
