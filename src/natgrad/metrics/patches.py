"""Second moments of a convolution's patches, Σ over examples and positions of the outer products of patches.

Two ways to the same sum. Patches can be made and multiplied, which takes S f² multiplications an example, with S
positions and f features of a patch. Or the second moments of whole images come first, M[u, v] = Σₙ xₙ[u] xₙ[v] over
pairs of pixels, and two taps of the kernel read pixels u + p and v + p for every position p:

    Σₙₚ xₙ[u + p] xₙ[v + p] = Σₚ M[u + p, v + p],

window sums of M, whose price does not depend on the number of examples. With P pixels M takes P²/2 multiplications an
example, which is less where kernels are large and images small. No patch is formed then.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from natgrad.linalg import accumulate_gram, symmetric_gram
from natgrad.operators.readings import Patches

# Patches are made so many numbers at a time: what the cache of a processor core holds until they are multiplied.
CACHED = 2**18
# M has at most so many entries.
LARGEST = 2**22


def add_patch_moments(total: Float[Tensor, "groups f f"], patches: Patches, decay: float) -> None:
    """Total ← decay · total + Σₙₚ patch patchᵀ, for each group of channels."""
    channels = patches.images.shape[1] // patches.groups
    if _pixels_are_cheaper(patches):
        total.mul_(decay)
        for k, own in enumerate(total):
            own += _window_sums(patches, patches.images[:, k * channels : (k + 1) * channels])
        return
    beta = decay
    step = max(1, CACHED // (patches.groups * patches.features * patches.positions))
    for start in range(0, len(patches), step):
        rows = patches.rows(slice(start, start + step)).flatten(1, 2)
        for own, one in zip(total, rows, strict=True):
            accumulate_gram(own, one, beta, 1.0)
        beta = 1.0


def sum_of_patches(patches: Patches, weights: Float[Tensor, "n"]) -> Float[Tensor, "g f"]:
    """Σₙₚ wₙ patch: the patches of the images' sum, as both are linear."""
    image = torch.tensordot(weights, patches.images, 1)[None]
    whole = Patches(image, patches.kernel, patches.stride, patches.dilation, patches.groups)
    return whole.vectors(slice(None))[0].sum(-1)


def _pixels_are_cheaper(patches: Patches) -> bool:
    if len(patches.kernel) > 2:
        return False
    _, channels, height, width = patches.images.shape
    channels //= patches.groups
    pixels, taps = channels * height * width, channels * height * patches.kernel[1]
    windows = 4 * (patches.shape[1] * taps**2 + patches.shape[0] * patches.features**2)  # bound by memory
    by_pixels = len(patches) * pixels**2 / 2 + windows
    return pixels**2 <= LARGEST and by_pixels < len(patches) * patches.positions * patches.features**2


def _window_sums(patches: Patches, images: Float[Tensor, "n c h w"]) -> Float[Tensor, "f f"]:
    _, c, h, w = images.shape
    rows, columns = patches.kernel
    tall, wide = patches.shape
    (down, across), (fall, reach) = patches.stride, patches.dilation
    moments = symmetric_gram(images.reshape(len(images), -1))
    pixels = c * h * w
    # Along the images' width, then along their height: rows of M count the first pixel, columns the second.
    narrow = moments.new_zeros(c, h, columns, c, h, columns)
    steps = (h * w * pixels, w * pixels, reach * pixels, h * w, w, reach)
    for x in range(wide):
        narrow += moments.as_strided(narrow.shape, steps, x * across * (pixels + 1))
    sums = moments.new_zeros(c, rows, columns, c, rows, columns)
    s = narrow.stride()
    steps = (s[0], fall * s[1], s[2], s[3], fall * s[4], s[5])
    for y in range(tall):
        sums += narrow.as_strided(sums.shape, steps, y * down * (s[1] + s[4]))
    return sums.view(c * rows * columns, -1)
