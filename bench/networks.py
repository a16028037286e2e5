"""The weights of known networks, as matrices."""

from __future__ import annotations

from cuda_timing import Shape


def sn_gan_cifar(c: int = 128) -> list[Shape]:
    """ResNet discriminator for 32 x 32 images: Miyato et al., ICLR 2018, table 4b; 11 weights."""
    first = [(c, 27), (c, 9 * c), (c, 3)]
    second = [(c, 9 * c), (c, 9 * c), (c, c)]
    return [*first, *second, *[(c, 9 * c)] * 4, (1, c)]


def sn_gan_imagenet(c: int = 64, classes: int = 1000) -> list[Shape]:
    """ResNet discriminator for 128 x 128 images with projection: ibid. table 6, Miyato and Koyama, ICLR 2018; 19
    weights. A block's first convolution keeps its inputs' channels, its second changes them, a third is the shortcut.
    """
    shapes = [(c, 27), (c, 9 * c), (c, 3)]
    for a in (c, 2 * c, 4 * c, 8 * c):
        shapes += [(a, 9 * a), (2 * a, 9 * a), (2 * a, a)]
    last = 16 * c
    return [*shapes, *[(last, 9 * last)] * 2, (1, last), (classes, last)]


def resnet50() -> list[Shape]:
    """He et al., 2016, table 1: 53 convolutions and the classifier."""
    shapes, inputs = [(64, 147)], 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            shapes += [(width, inputs), (width, 9 * width), (4 * width, width)]
            if block == 0:
                shapes.append((4 * width, inputs))
            inputs = 4 * width
    return [*shapes, (1000, inputs)]


def llama_7b(layers: int = 32, width: int = 4096, inner: int = 11008) -> list[Shape]:
    """Touvron et al., 2023: q, k, v, o, gate, up and down of every layer; no embeddings."""
    return [*[(width, width)] * 4, (inner, width), (inner, width), (width, inner)] * layers
