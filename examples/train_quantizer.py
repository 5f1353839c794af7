"""A quantizer in a training loop of your own: plain torch, and parts of `models/`. Run it in the folder of the clone."""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import mse_loss

from models.quantizers.config import VectorConfig
from models.quantizers.vector import VectorQuantizer


def train(steps: int = 300) -> dict[str, float]:
    """Codes of 2x2 pixels of handwritten digits; returns the squared error of the last batch, and the share of codes in use."""
    torch.manual_seed(0)
    images_NCHW = torch.from_numpy(load_digits().images).float().unsqueeze(1) / 16  # (1797, 1, 8, 8) in [0,1]
    encoder, decoder = nn.Conv2d(1, 8, 2, stride=2), nn.ConvTranspose2d(8, 1, 2, stride=2)
    quantizer = VectorQuantizer(VectorConfig(codes=64, revive_every=20, revive_until=200), dim=8)
    network = nn.ModuleList([encoder, quantizer, decoder])
    optimizer = torch.optim.AdamW(network.parameters(), lr=5e-3)
    for _ in range(steps):
        images_BCHW = images_NCHW[torch.randint(len(images_NCHW), (64,))]
        quantized = quantizer(encoder(images_BCHW))  # z_BDhw, codes_Bhw, losses, stats
        error = mse_loss(decoder(quantized.z_BDhw), images_BCHW)
        (error + sum(quantized.losses.values())).backward()
        optimizer.step()
        optimizer.zero_grad()
    return {"error": error.item(), "usage": quantized.stats["usage"].item()}


if __name__ == "__main__":
    print(train())
