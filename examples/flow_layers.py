"""Real NVP (Dinh, Sohl-Dickstein and Bengio 2017): invertible layers with exact log-determinants, and the flow made of them.

Our own, because a flow library would be a dependency for these few lines, and here every one of them can be read and is tested.
Every layer maps [N, C, H, W] to ``(y, log|det dy/dx|)`` with the determinants as [N], and has `inverse`.
"""

import math

import torch
from torch import Tensor, nn


class Logit(nn.Module):
    """Pixels in [0, 1] -> the whole line: logit(alpha + (1 - 2 alpha) x). The margin alpha keeps black and white finite."""

    def __init__(self, alpha: float = 0.05):
        super().__init__()
        self.alpha = alpha

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        p = self.alpha + (1 - 2 * self.alpha) * x
        slope = math.log(1 - 2 * self.alpha) - p.log() - (-p).log1p()
        return p.logit(), slope.flatten(1).sum(1)

    def inverse(self, y: Tensor) -> Tensor:
        return (y.sigmoid() - self.alpha) / (1 - 2 * self.alpha)


class Squeeze(nn.Module):
    """[N, C, H, W] -> [N, 4C, H/2, W/2]: each 2 x 2 square becomes four groups of channels. A permutation, so the log-determinant is 0."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        n, c, h, w = x.shape
        squares = x.reshape(n, c, h // 2, 2, w // 2, 2).permute(0, 3, 5, 1, 2, 4)
        return squares.reshape(n, 4 * c, h // 2, w // 2), x.new_zeros(n)

    def inverse(self, y: Tensor) -> Tensor:
        n, c, h, w = y.shape
        squares = y.reshape(n, 2, 2, c // 4, h, w).permute(0, 3, 4, 1, 5, 2)
        return squares.reshape(n, c // 4, 2 * h, 2 * w)


def checkerboard(shape: tuple[int, int, int], odd: bool) -> Tensor:
    """[1, 1, H, W]: 1 where the sum of row and column is odd (even, if not `odd`)."""
    _, h, w = shape
    sums = torch.arange(h)[:, None] + torch.arange(w)
    return (sums % 2 == int(odd)).float()[None, None]


def half_of_channels(shape: tuple[int, int, int], first: bool) -> Tensor:
    """[1, C, 1, 1]: 1 in the first (second) half. After a squeeze that is the upper (lower) row of each square: no checkerboard."""
    c = shape[0]
    return ((torch.arange(c) < c // 2) == first).float()[None, :, None, None]


class Coupling(nn.Module):
    """y = b x + (1 - b) (x exp(s(b x)) + t(b x)), with s = scale * tanh(.): what the mask b keeps decides what happens to the rest."""

    def __init__(self, shape: tuple[int, int, int], mask: Tensor, hidden: int):
        super().__init__()
        c, h, w = shape
        self.register_buffer("mask", mask)
        # The network sees the mask too: a 0 that is masked and a pixel that is 0 are not the same.
        self.register_buffer("board", mask.expand(1, 1, h, w) if mask.shape[1] == 1 else torch.zeros(1, 1, h, w))
        self.into = nn.Conv2d(c + 1, hidden, 3, padding=1)
        self.block = nn.Sequential(nn.ReLU(), nn.Conv2d(hidden, hidden, 3, padding=1))
        self.out = nn.Sequential(nn.ReLU(), nn.Conv2d(hidden, 2 * c, 3, padding=1))
        nn.init.zeros_(self.out[1].weight)  # the flow starts as the identity
        nn.init.zeros_(self.out[1].bias)
        self.scale = nn.Parameter(torch.ones(c, 1, 1))

    def scale_and_shift(self, kept: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.into(torch.cat([kept, self.board.expand(len(kept), -1, -1, -1)], 1))
        s, t = self.out(hidden + self.block(hidden)).chunk(2, 1)
        return (1 - self.mask) * self.scale * s.tanh(), (1 - self.mask) * t

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        s, t = self.scale_and_shift(self.mask * x)
        return x * s.exp() + t, s.flatten(1).sum(1)

    def inverse(self, y: Tensor) -> Tensor:
        s, t = self.scale_and_shift(self.mask * y)
        return (y - t) * (-s).exp()


class BatchNorm(nn.Module):
    """(x - mean) / sqrt(var + eps) of each channel, with the batch's statistics in training and their running averages in evaluation.

    The log-determinant is that of the map with the statistics held constant, which is exact in evaluation. Only there it has an inverse.
    """

    def __init__(self, channels: int, momentum: float = 0.1, eps: float = 1e-5):
        super().__init__()
        self.momentum, self.eps = momentum, eps
        self.register_buffer("mean", torch.zeros(channels, 1, 1))
        self.register_buffer("var", torch.ones(channels, 1, 1))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mean, var = self.mean, self.var
        if self.training:
            var, mean = torch.var_mean(x, (0, 2, 3), correction=0)
            mean, var = mean[:, None, None], var[:, None, None]
            self.mean.lerp_(mean.detach(), self.momentum)
            self.var.lerp_(var.detach(), self.momentum)
        log_det = -0.5 * x.shape[2] * x.shape[3] * (var + self.eps).log().sum()
        return (x - mean) * (var + self.eps).rsqrt(), log_det.expand(len(x))

    def inverse(self, y: Tensor) -> Tensor:
        if self.training:
            raise RuntimeError("the inverse needs the running averages: call eval() first")
        return y * (self.var + self.eps).sqrt() + self.mean


class Chain(nn.ModuleList):
    """Layers in a row: log-determinants add up, inverses run backwards."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        total = x.new_zeros(len(x))
        for layer in self:
            x, log_det = layer(x)
            total = total + log_det
        return x, total

    def inverse(self, y: Tensor) -> Tensor:
        for layer in reversed(self):
            y = layer.inverse(y)
        return y


def couplings(shape: tuple[int, int, int], masks: list[Tensor], hidden: int) -> list[nn.Module]:
    return [layer for mask in masks for layer in (Coupling(shape, mask, hidden), BatchNorm(shape[0]))]


class RealNVP(nn.Module):
    """Images [N, C, H, W] in [0, 1] -> latent [N, C H W], standard normal.

    Each scale but the last: three couplings with checkerboard masks, squeeze, three with channel masks, then half of the channels
    leaves as latent variables. The last: four with checkerboard masks. H and W are multiples of 2^(scales - 1).
    """

    def __init__(self, shape: tuple[int, int, int], scales: int = 2, hidden: int = 24, alpha: float = 0.05):
        super().__init__()
        c, h, w = shape
        self.dimensions = c * h * w
        if scales < 1 or h % 2 ** (scales - 1) or w % 2 ** (scales - 1):
            raise ValueError(f"{scales} scales need a height and width that are multiples of {2 ** max(scales - 1, 0)}, got {h} x {w}")
        self.scales, self.shapes = nn.ModuleList(), []
        for _ in range(scales - 1):
            boards = [checkerboard((c, h, w), odd) for odd in (True, False, True)]
            fine = couplings((c, h, w), boards, hidden)
            c, h, w = 4 * c, h // 2, w // 2
            halves = [half_of_channels((c, h, w), first) for first in (True, False, True)]
            self.scales.append(Chain([*fine, Squeeze(), *couplings((c, h, w), halves, hidden)]))
            c, hidden = c // 2, 2 * hidden
            self.shapes.append((c, h, w))
        self.scales.append(Chain(couplings((c, h, w), [checkerboard((c, h, w), odd) for odd in (True, False, True, False)], hidden)))
        self.shapes.append((c, h, w))
        self.scales[0].insert(0, Logit(alpha))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        latent, total = [], x.new_zeros(len(x))
        for scale in self.scales:
            x, log_det = scale(x)
            total = total + log_det
            leaves, x = x.chunk(2, 1) if scale is not self.scales[-1] else (x, x)
            latent.append(leaves.flatten(1))
        return torch.cat(latent, 1), total

    def inverse(self, z: Tensor) -> Tensor:
        parts = z.split([math.prod(shape) for shape in self.shapes], 1)
        parts = [part.reshape(-1, *shape) for part, shape in zip(parts, self.shapes, strict=True)]
        x = self.scales[-1].inverse(parts[-1])
        for scale, leaves in zip(reversed(self.scales[:-1]), reversed(parts[:-1]), strict=True):
            x = scale.inverse(torch.cat([leaves, x], 1))
        return x


def normal_log_density(z: Tensor) -> Tensor:
    """[N, D] -> [N]: the logarithm of the standard normal density."""
    return -0.5 * (z.square() + math.log(2 * math.pi)).sum(1)


def dequantise(x: Tensor, levels: int, noise: Tensor | float = 0.5) -> Tensor:
    """Level k of pixels k / (levels - 1) -> (k + noise) / levels, for noise in [0, 1)."""
    return (x * (levels - 1) + noise) / levels


def bits_per_dimension(flow: RealNVP, x: Tensor, levels: int) -> tuple[Tensor, Tensor]:
    """([N] bits per dimension of the images x in [0, 1], with all Jacobians: logit, flow, and the width 1/levels of a level; latents)."""
    z, log_det = flow(x)
    return math.log2(levels) - (normal_log_density(z) + log_det) / (z.shape[1] * math.log(2)), z
