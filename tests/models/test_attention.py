"""The attention of the class token is that of transformers."""

import pytest
import torch

from mmkit.models.attention import class_attention
from tests.models.vits import make_vit

SIZES = {"3 x 4": (15, 20), "7 x 2": (35, 10), "1 x 1": (5, 5), "4 x 6": (20, 30)}


@pytest.mark.parametrize("kind", ["eager", "sdpa"])
@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_attention_is_the_one_transformers_returns(size, kind):
    """Mean over layers and heads of the row of the class token, or of the rows of all patches."""
    vit, pixels = make_vit(size), torch.randn(2, 3, *size)
    every = torch.stack(vit(pixels, output_attentions=True).attentions)  # (layers, B, heads, T, T)
    vit.set_attn_implementation(kind)
    ours = class_attention(vit, pixels)
    assert ours.shape == (2, (size[0] // 5) * (size[1] // 5)) and ours.dtype == torch.float32
    torch.testing.assert_close(ours, every[:, :, :, 0, 1:].mean((0, 2)))
    torch.testing.assert_close(
        class_attention(vit, pixels, of="mean"), every[:, :, :, 1:, 1:].mean((0, 2, 3))
    )
    assert not ours.requires_grad


def slow_half(vit, pixels, of):
    """Attention at half the size: a ViT for the small image, its positions averaged in loops."""
    height, width = pixels.shape[2] // 5, pixels.shape[3] // 5
    small = ((height + 1) // 2, (width + 1) // 2)
    windows = [
        [(i * side // half, -(-(i + 1) * side // half)) for i in range(half)]
        for side, half in zip((height, width), small, strict=True)
    ]
    positions = vit.embeddings.position_embeddings.detach()
    plane = positions[0, 1:].reshape(height, width, -1)
    means = [plane[a:b, c:d].mean((0, 1)) for a, b in windows[0] for c, d in windows[1]]
    other = make_vit((small[0] * 5, small[1] * 5))
    state = vit.state_dict()
    averaged = torch.cat([positions[0, :1], torch.stack(means)])
    state["embeddings.position_embeddings"] = averaged[None]
    other.load_state_dict(state)
    reduced = torch.nn.functional.adaptive_avg_pool2d(pixels, (small[0] * 5, small[1] * 5))
    return class_attention(other, reduced, of=of).unflatten(1, small) / 4


@pytest.mark.parametrize("of", ["cls", "mean"])
@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_half_the_resolution_is_that_of_a_smaller_image(size, of):
    """Each of 2 x 2 patches has a quarter of the small image's patch; sums are at most 1."""
    vit, pixels, grid = make_vit(size), torch.randn(2, 3, *size), (size[0] // 5, size[1] // 5)
    half = class_attention(vit, pixels, half=True, of=of)
    assert half.shape == (2, grid[0] * grid[1]) and half.dtype == torch.float32
    assert (half >= 0).all() and (half.sum(1) <= 1 + 1e-6).all()
    if grid == (1, 1):  # cannot be halved
        assert torch.equal(half, class_attention(vit, pixels, of=of))
        return
    plane, expected = half.unflatten(1, grid), slow_half(vit, pixels, of)
    for row in range(grid[0]):
        for column in range(grid[1]):
            torch.testing.assert_close(plane[:, row, column], expected[:, row // 2, column // 2])
    if grid[0] % 2 == grid[1] % 2 == 0:  # nothing is lost
        whole = class_attention(vit, pixels, of=of).sum(1)
        assert (half.sum(1) > 0.5 * whole).all()


def test_an_encoder_takes_the_attention_of_what_it_pools(make_model):
    """uint8 images are normalised; "cls" by its class token, "mean" by its patches."""
    pixels = torch.randint(0, 256, (2, 3, 15, 15), dtype=torch.uint8)
    for pooling in ("mean", "cls"):
        model = make_model(pooling=pooling).eval()
        normalised = model.normalize(pixels)
        for half in (False, True):
            ours = model.class_attention(pixels, half)
            assert torch.equal(ours, class_attention(model.vit, normalised, half, of=pooling))
            assert torch.equal(ours, model.class_attention(normalised, half))
    assert not torch.allclose(
        class_attention(model.vit, normalised), class_attention(model.vit, normalised, of="mean")
    )


def test_dropout_does_not_change_the_attention():
    """A mask by attention is the same twice in training, and the model stays in training mode."""
    vit, pixels = make_vit(dropout=0.3), torch.randn(2, 3, 15, 20)
    expected = class_attention(vit, pixels)
    vit.train()
    for _ in range(2):
        assert torch.equal(class_attention(vit, pixels), expected)
    assert all(module.training for module in vit.modules())
    class_attention(vit.eval(), pixels)
    assert not any(module.training for module in vit.modules())
