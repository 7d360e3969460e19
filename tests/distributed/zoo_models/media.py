"""Models of transformers for images, sound, and texts with images."""

from __future__ import annotations

from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn

from tests.distributed.zoo_models.language import (
    LABELS,
    SHAPE,
    TRANSLATOR,
    VOCABULARY,
    build,
    tokens,
)
from tests.distributed.zoo_models.subject import EXAMPLES, Subject

SIZE, PATCH = 16, 8
_ENCODER = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
}
_PATCHES = {**_ENCODER, "image_size": SIZE, "patch_size": PATCH}
_SOUND = {
    **_ENCODER,
    "conv_dim": (8, 8),
    "conv_kernel": (4, 4),
    "conv_stride": (3, 3),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
    "vocab_size": VOCABULARY,
    "ctc_loss_reduction": "mean",
    "pad_token_id": 0,
}


def _images(seed: int, size: int = SIZE) -> tuple[Tensor, torch.Generator]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(EXAMPLES, 3, size, size, generator=generator), generator


def images(seed: int) -> dict[str, Tensor]:
    pixels, generator = _images(seed)
    return {
        "pixel_values": pixels,
        "labels": torch.randint(0, LABELS, (EXAMPLES,), generator=generator),
    }


def large_images(seed: int) -> dict[str, Tensor]:
    pixels, generator = _images(seed, 32)
    return {
        "pixel_values": pixels,
        "labels": torch.randint(0, LABELS, (EXAMPLES,), generator=generator),
    }


def segments(seed: int) -> dict[str, Tensor]:
    """A batch with a class for every pixel."""
    pixels, generator = _images(seed, 32)
    return {
        "pixel_values": pixels,
        "labels": torch.randint(0, LABELS, (EXAMPLES, 32, 32), generator=generator),
    }


def captioned(seed: int) -> dict[str, Any]:
    """Images with texts, for a contrastive loss over the batch."""
    ids = tokens(seed)
    return {
        "input_ids": ids["input_ids"],
        "attention_mask": ids["attention_mask"],
        "pixel_values": _images(seed)[0],
        "return_loss": True,
    }


def described(seed: int) -> dict[str, Tensor]:
    """Images, with the texts to generate as labels."""
    return {"pixel_values": _images(seed)[0], "labels": tokens(seed)["input_ids"]}


def with_image_tokens(seed: int) -> dict[str, Tensor]:
    """The first four words of a text stand for the patches of its image."""
    ids = tokens(seed)["input_ids"].clone()
    ids[:, :4] = 1
    labels = ids.masked_fill(ids == 1, -100)
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": _images(seed)[0],
        "labels": labels,
    }


def speech(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(3, VOCABULARY, (EXAMPLES, 5), generator=generator)
    return {"input_values": torch.randn(EXAMPLES, 400, generator=generator), "labels": labels}


def sounds(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, LABELS, (EXAMPLES,), generator=generator)
    return {"input_values": torch.randn(EXAMPLES, 400, generator=generator), "labels": labels}


def spectra(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, LABELS, (EXAMPLES,), generator=generator)
    return {"input_values": torch.randn(EXAMPLES, 24, 16, generator=generator), "labels": labels}


def features(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(3, VOCABULARY, (EXAMPLES, 6), generator=generator)
    return {"input_features": torch.randn(EXAMPLES, 8, 32, generator=generator), "labels": labels}


def series(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "past_values": torch.randn(EXAMPLES, 16, 2, generator=generator),
        "future_values": torch.randn(EXAMPLES, 4, 2, generator=generator),
    }


def _both(kind: str) -> Any:
    def make() -> nn.Module:
        text = {
            **SHAPE,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "projection_dim": 16,
        }
        config = getattr(hf, f"{kind}Config")(
            text_config=text, vision_config={**_PATCHES, "projection_dim": 16}
        )
        config.projection_dim = 16
        # the usual scale makes rounding errors of the logits 14 times as large
        config.logit_scale_init_value = 1.0
        return getattr(hf, f"{kind}Model")(config)

    return make


def _llava() -> nn.Module:
    text = hf.LlamaConfig(**SHAPE, num_key_value_heads=2)
    vision = hf.CLIPVisionConfig(**_PATCHES)
    return hf.LlavaForConditionalGeneration(
        hf.LlavaConfig(
            vision_config=vision,
            text_config=text,
            image_token_index=1,
            image_seq_length=4,
            vision_feature_layer=-1,
        )
    )


def _image_to_text() -> nn.Module:
    decoder = hf.GPT2Config(
        n_embd=32,
        n_layer=2,
        n_head=4,
        vocab_size=VOCABULARY,
        n_positions=64,
        add_cross_attention=True,
        is_decoder=True,
    )
    config = hf.VisionEncoderDecoderConfig.from_encoder_decoder_configs(
        hf.ViTConfig(**_PATCHES), decoder
    )
    config.decoder_start_token_id, config.pad_token_id = 1, 0
    return hf.VisionEncoderDecoderModel(config)


IMAGES: dict[str, Subject] = {
    "ViT": Subject(
        build("ViT", "ForImageClassification", **_PATCHES, num_labels=LABELS),
        images,
        svrg=True,
        bf16=True,
    ),
    "BEiT": Subject(
        build(
            "Beit",
            "ForImageClassification",
            **_PATCHES,
            num_labels=LABELS,
            use_relative_position_bias=True,
        ),
        images,
    ),
    "DINOv2": Subject(
        build("Dinov2", "ForImageClassification", **_PATCHES, num_labels=LABELS), images
    ),
    "Swin": Subject(
        build(
            "Swin",
            "ForImageClassification",
            image_size=32,
            patch_size=4,
            embed_dim=16,
            depths=[2, 2],
            num_heads=[2, 4],
            window_size=4,
            num_labels=LABELS,
        ),
        large_images,
    ),
    "ConvNeXt": Subject(
        build(
            "ConvNext",
            "ForImageClassification",
            hidden_sizes=[16, 24],
            depths=[1, 1],
            num_stages=2,
            num_labels=LABELS,
        ),
        large_images,
    ),
    "ResNet": Subject(
        build(
            "ResNet",
            "ForImageClassification",
            embedding_size=8,
            hidden_sizes=[8, 16],
            depths=[1, 1],
            num_labels=LABELS,
        ),
        large_images,
    ),
    "MobileNetV2": Subject(
        build(
            "MobileNetV2",
            "ForImageClassification",
            image_size=32,
            depth_multiplier=0.25,
            num_labels=LABELS,
        ),
        large_images,
    ),
    "SegFormer": Subject(
        build(
            "Segformer",
            "ForSemanticSegmentation",
            num_encoder_blocks=2,
            depths=[1, 1],
            sr_ratios=[2, 1],
            hidden_sizes=[8, 16],
            patch_sizes=[7, 3],
            strides=[4, 2],
            num_attention_heads=[1, 2],
            mlp_ratios=[2, 2],
            decoder_hidden_size=16,
            num_labels=LABELS,
        ),
        segments,
    ),
}
SOUNDS: dict[str, Subject] = {
    "wav2vec 2.0": Subject(build("Wav2Vec2", "ForCTC", **_SOUND), speech, sample=True),
    "HuBERT": Subject(
        build("Hubert", "ForSequenceClassification", **_SOUND, num_labels=LABELS), sounds
    ),
    "WavLM": Subject(build("WavLM", "ForCTC", **_SOUND), speech),
    "Whisper": Subject(
        build(
            "Whisper",
            "ForConditionalGeneration",
            **{**TRANSLATOR, "max_target_positions": 32},
            num_mel_bins=8,
            max_source_positions=16,
        ),
        features,
        svrg=True,
    ),
    "Audio Spectrogram Transformer": Subject(
        build(
            "AST",
            "ForAudioClassification",
            config="AST",
            **_ENCODER,
            patch_size=8,
            frequency_stride=8,
            time_stride=8,
            max_length=24,
            num_mel_bins=16,
            num_labels=LABELS,
        ),
        spectra,
    ),
    "PatchTST": Subject(
        build(
            "PatchTST",
            "ForPrediction",
            num_input_channels=2,
            context_length=16,
            prediction_length=4,
            patch_length=4,
            patch_stride=4,
            d_model=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            ffn_dim=24,
            loss="mse",
        ),
        series,
    ),
}
BOTH: dict[str, Subject] = {
    "CLIP": Subject(_both("CLIP"), captioned, sample=True, svrg=True),
    "SigLIP": Subject(_both("Siglip"), captioned),
    "LLaVA": Subject(_llava, with_image_tokens),
    "ViT to GPT-2": Subject(_image_to_text, described),
}
MEDIA: dict[str, Subject] = {**IMAGES, **SOUNDS, **BOTH}
