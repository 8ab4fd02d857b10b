"""Small models with real work in them: a character-level GPT, an MLP and a CNN for 8 x 8 images."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

__all__ = ["GPT", "cnn", "cross_entropy", "mlp"]


class GPT(nn.Module):
    """A decoder-only transformer: pre-norm blocks, learned positions, output weights tied to the embedding."""

    def __init__(self, vocabulary: int, *, context: int, layers: int, heads: int, width: int) -> None:
        super().__init__()
        self.token = nn.Embedding(vocabulary, width)
        self.position = nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(_Block(heads, width) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        for name, p in self.named_parameters():
            if p.dim() == 2:
                # Residual branches start small, so that depth does not change the scale of the stream (GPT-2).
                nn.init.normal_(p, std=0.02 / (2 * layers) ** 0.5 if name.endswith("out.weight") else 0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return logits (batch, context, vocabulary) for tokens (batch, context) int64."""
        x = self.token(tokens) + self.position(torch.arange(tokens.shape[1], device=tokens.device))
        logits: Tensor = F.linear(self.norm(self.blocks(x)), self.token.weight)
        return logits


class _Block(nn.Module):
    def __init__(self, heads: int, width: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.attention_out = nn.Linear(width, width, bias=False)
        self.inner = nn.Linear(width, 4 * width, bias=False)
        self.mlp_out = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, context, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(batch, context, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.attention_out(attended.transpose(1, 2).reshape(batch, context, width))
        y: Tensor = x + self.mlp_out(F.gelu(self.inner(self.norm2(x))))
        return y


def mlp(width: int = 64) -> nn.Module:
    """Return a two-layer perceptron for images (batch, 1, 8, 8) and 10 classes."""
    return nn.Sequential(nn.Flatten(), nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 10))


def cnn(width: int = 16) -> nn.Module:
    """Return a small convolutional network for images (batch, 1, 8, 8) and 10 classes."""
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, 2 * width, 3, padding=1), nn.ReLU(),
        nn.MaxPool2d(2), nn.Flatten(), nn.Linear(2 * width * 16, 10),
    )


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the mean over all targets, of any shape."""
    return F.cross_entropy(logits.flatten(0, -2), targets.flatten())
