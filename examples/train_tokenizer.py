"""A tokenizer trained by our steps without a store: what `smalti train-tokenizer` does, on tensors that you have in memory.

A `Task` says what is trained and by which losses; the trainer brings optimizer, schedule, averages, precision, passes of a
batch, and several processes under `torchrun`. Run it in the folder of the clone.
"""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.datasets import load_digits

from models.autoencoders.config import ConvolutionalConfig
from models.losses.config import ReconstructionConfig
from models.losses.reconstruction import ReconstructionLoss
from models.metrics import psnr
from models.quantizers.config import VectorConfig
from models.tokenizer import Tokenizer, TokenizerPass
from models.tokenizer_config import TokenizerConfig
from stages.training.config import AdamW, OneCycle, TrainingConfig
from stages.training.task import Batch, Losses, Modules, Part, Task
from stages.training.trainer import open_trainer

MODEL = TokenizerConfig(  # a code for each 2x2 pixels
    autoencoder=ConvolutionalConfig(channels=1, widths=(32,), latent=8),
    quantizer=VectorConfig(codes=64, weight=0.1, revive_every=20, revive_until=100),
)
TRAINING = TrainingConfig(steps=150, batch=64, optimizer=AdamW(learning_rate=5e-3), schedule=OneCycle(), ema=0.99)


class DigitsTask(Task):
    """Reconstruction of handwritten digits, the last 297 of which are held out."""

    def __init__(self) -> None:
        images_NCHW = torch.from_numpy(load_digits().images).float().unsqueeze(1) / 16  # (1797, 1, 8, 8) in [0,1]
        self.images_NCHW, self.held_out_MCHW = images_NCHW.split([1500, 297])
        self.tokenizer = Tokenizer(MODEL)
        learner = TokenizerPass(self.tokenizer, ReconstructionLoss(ReconstructionConfig(l2=4.0)))
        self.parts = [Part("tokenizer", learner, TRAINING.optimizer, TRAINING.schedule)]
        self.rows = len(self.images_NCHW)

    def batch(self, step: int, rows_B: NDArray[np.int64], share: slice) -> Batch:
        return {"images": self.images_NCHW[rows_B[share]]}

    def losses(self, part: str, modules: Modules, batch: Any, step: int) -> Losses:
        seen = modules[part](batch["images"])
        return Losses(seen.losses, seen.stats)

    def evaluate(self) -> dict[str, float]:
        """Decibels of held-out images after their way through the codes."""
        images_MCHW = self.held_out_MCHW.to(self.replicas.device)
        return {"psnr": psnr(self.tokenizer.decode(self.tokenizer.encode(images_MCHW)), images_MCHW).mean().item()}


def train(device: str = "auto") -> dict[str, float]:
    """Figures of the trained tokenizer; `trainer.state()` on the way is all that `trainer.load` needs to continue exactly."""
    with open_trainer(lambda device: DigitsTask(), TRAINING, device=device) as trainer:
        for losses in trainer.steps():
            if trainer.step % 50 == 0:
                print(trainer.step, trainer.figures(losses))
        return trainer.finish()  # now trainer.task.tokenizer holds the result: averaged weights, in evaluation mode


if __name__ == "__main__":
    print(train())
