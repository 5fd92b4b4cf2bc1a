"""The attention of the class token is that of transformers; the EMA is a running mean."""

import copy

import pytest
import torch

from mmkit.models.attention import class_attention
from mmkit.models.ema import EMA

SIZES = {"3 x 4": (15, 20), "7 x 2": (35, 10), "1 x 1": (5, 5), "4 x 6": (20, 30)}


def make_vit(size=(15, 20), seed=0, dropout=0.0):
    """3 layers, 2 heads, width 22, patches of 5 pixels."""
    from transformers import ViTConfig, ViTModel

    torch.manual_seed(seed)
    config = ViTConfig(
        image_size=size,
        patch_size=5,
        hidden_size=22,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=31,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        attn_implementation="eager",
    )
    vit = ViTModel(config, add_pooling_layer=False).eval()
    with torch.no_grad():  # attention that differs between patches, layers and heads
        for parameter in vit.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return vit


# -- attention -------------------------------------------------------------------------------


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


# -- running mean ----------------------------------------------------------------------------


def step(vit, seed):
    """Change the weights, as an optimizer step does."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in vit.parameters():
            parameter += torch.randn(parameter.shape, generator=generator)


@pytest.mark.parametrize("momentum", [0.0, 0.3, 0.996])
def test_the_running_mean_equals_a_slow_loop(momentum):
    """m x mean + (1 - m) x weights, with m = min(momentum, (1 + step) / (10 + step))."""
    vit = make_vit()
    mean = EMA(vit, momentum)
    slow = [parameter.detach().double().clone() for parameter in vit.parameters()]
    for number in range(17):
        step(vit, number)
        mean.update(vit)
        m = min(momentum, (1 + number) / (10 + number))
        slow = [
            m * old + (1 - m) * new.detach().double()
            for old, new in zip(slow, vit.parameters(), strict=True)
        ]
    for ours, expected in zip(mean.module.parameters(), slow, strict=True):
        torch.testing.assert_close(ours.double(), expected, rtol=1e-5, atol=1e-5)
    assert mean.steps == 17
    if momentum == 0:  # no memory at all
        assert torch.equal(
            class_attention(mean.module, torch.ones(1, 3, 15, 20)),
            class_attention(vit, torch.ones(1, 3, 15, 20)),
        )


def test_the_running_mean_is_a_copy_that_never_trains():
    """It has no gradient, no dropout and no shared memory, and leaves the model as it was."""
    vit = make_vit(dropout=0.3).train()
    before = copy.deepcopy(vit.state_dict())
    mean = EMA(vit, 0.9)
    assert not any(parameter.requires_grad for parameter in mean.module.parameters())
    assert not any(module.training for module in mean.module.modules())
    step(mean.module, 0)
    assert all(torch.equal(tensor, before[name]) for name, tensor in vit.state_dict().items())
    mean.update(vit)
    assert vit.training and all(parameter.requires_grad for parameter in vit.parameters())
    assert all(parameter.grad is None for parameter in mean.module.parameters())
    vit(torch.randn(2, 3, 15, 20)).last_hidden_state.sum().backward()
    mean.update(vit)
    assert not any(parameter.requires_grad for parameter in mean.module.parameters())


def test_a_saved_running_mean_continues_as_if_it_had_never_stopped(tmp_path):
    """Weights and momentum schedule come back from a file without code."""
    vit = make_vit()
    mean = EMA(vit, 0.996)
    for number in range(5):
        step(vit, number)
        mean.update(vit)
    torch.save(mean.state_dict(), tmp_path / "mean.pth")
    other = EMA(make_vit(seed=1), 0.996)
    other.load_state_dict(torch.load(tmp_path / "mean.pth", weights_only=True))
    for number in range(5, 8):
        step(vit, number)
        mean.update(vit)
        other.update(vit)
    assert mean.steps == other.steps == 8
    for ours, theirs in zip(mean.module.parameters(), other.module.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert not any(parameter.requires_grad for parameter in other.module.parameters())
