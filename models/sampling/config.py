"""How codes are chosen from logits; no torch here."""

from __future__ import annotations

from pydantic import Field

from models.config import Config


class SamplingConfig(Config):
    """Guidance first, then temperature, top-k and top-p, then one draw (or the largest logit with `greedy`)."""

    guidance_scale: float = Field(0.0, ge=0, description="weight of the condition; 0 and 1 both turn guidance off")
    guidance_power: float = Field(0.0, ge=0, description="power of the cosine that guidance rises by; 0 is constant")
    temperature: float = Field(1.0, gt=0, description="divides the guided logits")
    top_k: int | None = Field(None, ge=1, description="keep the k likeliest codes (and what ties with the last)")
    top_p: float | None = Field(None, gt=0, le=1, description="keep the likeliest codes that together reach this")
    greedy: bool = Field(False, description="take the likeliest code instead of drawing")

    @property
    def guided(self) -> bool:
        """Whether a second, unconditional stream is needed. Scale 1 weighs it with exactly 0, so it is left out."""
        return self.guidance_scale not in (0.0, 1.0)
