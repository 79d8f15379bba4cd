"""The networks that are raced on: plain torch modules, with weights that a seed decides."""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn


def autoencoder_784(seed: int) -> nn.Sequential:
    """784-1000-500-250-30 and its mirror image: tanh, linear code, linear output (logits).

    The network of Hinton & Salakhutdinov (2006) with the tanh units of Martens & Grosse (2015), but with dense
    initial weights: normal with variance 1/fan-in, biases zero.
    """
    sizes = [784, 1000, 500, 250, 30, 250, 500, 1000, 784]
    layers: list[nn.Module] = []
    for index, (fan_in, fan_out) in enumerate(itertools.pairwise(sizes)):
        layers.append(nn.Linear(fan_in, fan_out))
        if index not in (3, 7):  # the code and the output are linear
            layers.append(nn.Tanh())
    return normal_weights(nn.Sequential(*layers), seed)


def perceptron(sizes: tuple[int, ...], seed: int) -> nn.Sequential:
    """A multilayer perceptron with tanh units, weights normal with variance 1/fan-in, biases zero."""
    layers: list[nn.Module] = []
    for fan_in, fan_out in itertools.pairwise(sizes):
        layers += [nn.Linear(fan_in, fan_out), nn.Tanh()]
    return normal_weights(nn.Sequential(*layers[:-1]), seed)


def small_cnn(seed: int, channels: tuple[int, int] = (8, 16)) -> nn.Sequential:
    """Two 5×5 convolutions with pooling, then one hidden layer of 64; about 20,000 parameters with (8, 16)."""
    first, second = channels
    model = nn.Sequential(
        nn.Unflatten(1, (1, 28, 28)),
        nn.Conv2d(1, first, 5), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(first, second, 5), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(16 * second, 64), nn.ReLU(), nn.Linear(64, 10),
    )  # fmt: skip
    return normal_weights(model, seed, gain=2**0.5)


def normal_weights(model: nn.Sequential, seed: int, gain: float = 1.0) -> nn.Sequential:
    """Draws the weights anew, with variance gain²/fan-in; biases are zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                fan_in = parameter[0].numel()
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * (gain / fan_in**0.5))
            else:
                parameter.zero_()
    return model


# -------------------------------------------------------------------------------------------- residual net


class ResidualBlock(nn.Module):
    """Two 3×3 convolutions with BatchNorm beside a shortcut, which is a 1×1 convolution where shapes change."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Float[Tensor, "n inputs h w"]) -> Float[Tensor, "n outputs h2 w2"]:
        """ReLU(shortcut + block)."""
        y = torch.relu(self.norm1(self.conv1(x)))
        return torch.relu(self.shortcut(x) + self.norm2(self.conv2(y)))


class ResNet(nn.Module):
    """The residual net of He et al. (2016, §4.2) for small images: 6 · blocks + 2 layers, three widths.

    Args:
        side: pixels to the side of the square, grey images, which come flattened.
        width: channels of the first stage; the second has twice, the third four times as many.
        blocks: residual blocks a stage.
        stride: of the first convolution.
        classes: outputs.
    """

    def __init__(
        self, side: int, width: int = 16, blocks: int = 3, stride: int = 1, classes: int = 10
    ) -> None:
        super().__init__()
        self.side = side
        self.conv = nn.Conv2d(1, width, 3, stride, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        widths = [width] * blocks + [2 * width] * blocks + [4 * width] * blocks
        self.blocks = nn.Sequential(
            *(ResidualBlock(a, b, 1 if a == b else 2) for a, b in itertools.pairwise([width, *widths]))
        )
        self.head = nn.Linear(4 * width, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Float[Tensor, "n pixels"]) -> Float[Tensor, "n classes"]:
        """Logits."""
        x = images.view(-1, 1, self.side, self.side)
        x = self.blocks(torch.relu(self.norm(self.conv(x))))
        return self.head(x.mean((2, 3)))


# -------------------------------------------------------------------------------------------- transformers


class Attention(nn.Module):
    """Attention of several heads, with one projection for queries, keys and values."""

    def __init__(self, width: int, heads: int, causal: bool) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Float[Tensor, "n t d"]) -> Float[Tensor, "n t d"]:
        """Softmax(q kᵀ / √d) v, projected."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.out(y.transpose(1, 2).flatten(2))


class TransformerBlock(nn.Module):
    """Attention and a perceptron, each after a LayerNorm and beside a shortcut."""

    def __init__(self, width: int, heads: int, causal: bool, factor: int = 4) -> None:
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(width), Attention(width, heads, causal)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, factor * width), nn.GELU(), nn.Linear(factor * width, width)
        )

    def forward(self, x: Float[Tensor, "n t d"]) -> Float[Tensor, "n t d"]:
        """The sum of both parts."""
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class VisionTransformer(nn.Module):
    """A vision transformer (Dosovitskiy et al. 2021): patches, a class token, learnt positions.

    Args:
        side: pixels to the side of the square, grey images, which come flattened.
        patch: pixels to the side of a patch.
        width, depth, heads: of the transformer.
        classes: outputs.
    """

    def __init__(
        self, side: int, patch: int, width: int = 64, depth: int = 4, heads: int = 4, classes: int = 10
    ) -> None:
        super().__init__()
        self.side = side
        self.patches = nn.Conv2d(1, width, patch, stride=patch)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.positions = nn.Parameter(0.02 * torch.randn(1, (side // patch) ** 2 + 1, width))
        self.blocks = nn.Sequential(*(TransformerBlock(width, heads, causal=False) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)
        _scale_residual_branches(self, depth)

    def forward(self, images: Float[Tensor, "n pixels"]) -> Float[Tensor, "n classes"]:
        """Logits, from the class token."""
        x = self.patches(images.view(-1, 1, self.side, self.side)).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], dim=1) + self.positions
        return self.head(self.norm(self.blocks(x))[:, 0])


class CharTransformer(nn.Module):
    """A causal transformer over characters, as GPT-2 (Radford et al. 2019) is built; input and output not tied."""

    def __init__(
        self, characters: int, context: int, width: int = 96, depth: int = 4, heads: int = 4
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(characters, width)
        self.positions = nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(TransformerBlock(width, heads, causal=True) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, characters, bias=False)
        nn.init.normal_(self.embedding.weight, std=0.02)
        nn.init.normal_(self.positions.weight, std=0.02)
        _scale_residual_branches(self, depth)

    def forward(self, text: Int[Tensor, "n t"]) -> Float[Tensor, "n characters t"]:
        """Logits of the next character at every place, laid out as `nn.CrossEntropyLoss` takes them."""
        x = self.embedding(text) + self.positions(torch.arange(text.shape[1], device=text.device))
        return self.head(self.norm(self.blocks(x))).transpose(1, 2)


def _scale_residual_branches(model: nn.Module, depth: int) -> None:
    """GPT-2's start: weights of deviation 0.02, those that end a residual branch 0.02/√(2 depth), biases zero."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            ends = name.endswith(("attention.out", "mlp.2"))
            nn.init.normal_(module.weight, std=0.02 / (2 * depth) ** 0.5 if ends else 0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
