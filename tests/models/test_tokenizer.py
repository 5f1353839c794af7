"""Tokenizer: ranges, shapes, agreement of training and inference, resume, bytes."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError

from models.losses.config import BUILDERS, ReconstructionConfig
from models.registry import build
from models.tokenizer import Tokenizer, TokenizerPass, to_bytes
from models.tokenizer_config import TokenizerConfig


def tiny_config(pixel_range: str = "-1..1") -> TokenizerConfig:
    autoencoder = {"kind": "convolutional", "widths": [8, 16], "latent": 4, "pixel_range": pixel_range}
    return TokenizerConfig.model_validate({"autoencoder": autoencoder, "quantizer": {"kind": "vector", "codes": 12}})


@pytest.fixture
def images_BCHW() -> torch.Tensor:
    return torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(3))


def train_briefly(training: TokenizerPass, images_BCHW: torch.Tensor, steps: int) -> list[float]:
    optimizer = torch.optim.AdamW(training.parameters(), lr=3e-3)
    errors = []
    for step in range(steps):
        torch.manual_seed(step)
        losses = training.train()(images_BCHW).losses
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
        errors.append(losses["l2"].item())
    return errors


def build_training(config: TokenizerConfig) -> TokenizerPass:
    torch.manual_seed(0)
    return TokenizerPass(Tokenizer(config), build(ReconstructionConfig(l2=1.0), BUILDERS))


@pytest.mark.parametrize("pixel_range", ["0..1", "-1..1"])
def test_codes_and_images_have_the_promised_form(pixel_range: str, images_BCHW: torch.Tensor) -> None:
    tokenizer = Tokenizer(tiny_config(pixel_range)).eval()
    codes_Bhw = tokenizer.encode(images_BCHW)
    assert codes_Bhw.shape == (4, *tokenizer.grid(16, 16)) == (4, 4, 4)
    assert codes_Bhw.dtype == torch.int64
    assert codes_Bhw.max() < tokenizer.codebook_size == 12
    decoded_BCHW = tokenizer.decode(codes_Bhw)
    assert decoded_BCHW.shape == images_BCHW.shape
    assert 0 <= decoded_BCHW.min() <= decoded_BCHW.max() <= 1


@pytest.mark.parametrize("quantizer", [{"kind": "vector", "codes": 12}, {"kind": "lookup-free"}])
@pytest.mark.parametrize("code", [-1, 16])
def test_codes_out_of_range_are_refused(quantizer: dict[str, object], code: int) -> None:
    autoencoder = {"kind": "convolutional", "widths": [8, 16], "latent": 4}
    tokenizer = Tokenizer(TokenizerConfig.model_validate({"autoencoder": autoencoder, "quantizer": quantizer})).eval()
    with pytest.raises(ValueError, match=r"expected 0 to 1[15]"):
        tokenizer.decode(torch.tensor([[[0, code]]]))


def test_pixel_ranges_are_inverses(images_BCHW: torch.Tensor) -> None:
    for pixel_range in ("0..1", "-1..1"):
        tokenizer = Tokenizer(tiny_config(pixel_range))
        pixels_BCHW = tokenizer.to_pixels(images_BCHW)
        torch.testing.assert_close(tokenizer.to_images(pixels_BCHW), images_BCHW)
    assert pixels_BCHW.min() < -0.9


def test_training_lowers_the_error_and_agrees_with_inference(images_BCHW: torch.Tensor) -> None:
    training = build_training(tiny_config())
    errors = train_briefly(training, images_BCHW, 30)
    assert errors[-1] < 0.5 * errors[0]
    tokenizer = training.tokenizer
    reconstruction_BCHW = tokenizer.to_images(training.eval()(images_BCHW).output_BCHW)
    torch.testing.assert_close(tokenizer.decode(tokenizer.encode(images_BCHW)), reconstruction_BCHW, rtol=0, atol=1e-5)


def test_state_dict_holds_everything(images_BCHW: torch.Tensor) -> None:
    training = build_training(tiny_config())
    train_briefly(training, images_BCHW, 3)
    other = Tokenizer(tiny_config()).eval()
    other.load_state_dict(training.tokenizer.state_dict())
    assert torch.equal(other.encode(images_BCHW), training.tokenizer.eval().encode(images_BCHW))


def test_config_answers_without_a_network() -> None:
    config = tiny_config()
    assert (config.codebook_size, config.downsample, config.grid(16, 32)) == (12, 4, (4, 8))
    with pytest.raises(ValueError, match="18x16 pixels does not divide"):
        config.grid(18, 16)
    with pytest.raises(ValidationError, match="groups 8 must divide every width, but not 12"):
        TokenizerConfig.model_validate(
            {"autoencoder": {"kind": "convolutional", "widths": [12]}, "quantizer": {"kind": "vector", "codes": 12}}
        )


def test_bytes_are_rounded_or_truncated() -> None:
    images = torch.tensor([-0.1, 0.0, 0.5, 0.999, 1.0, 1.2])
    assert to_bytes(images, "round").tolist() == [0, 0, 128, 255, 255, 255]
    assert to_bytes(images, "truncate").tolist() == [0, 0, 127, 254, 255, 255]
