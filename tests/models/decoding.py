"""Masks, changed batches and relations for tests of the decoder, and MAE with our weights."""

import dataclasses

import torch

from mmkit.masking.plan import draw_maskings, mask_ratios
from mmkit.models.decoder import ForwardSpec

PAINTED = torch.tensor([[1, 0, 1], [0, 1, 1], [0, 0, 1]])
# Which captions (columns) are correct for which images: rows 0 and 2 show the same image, and the
# caption of row 4 is correct for image 3, too, but not that of row 3 for image 4.
IDS = torch.tensor([0, 1, 2, 3, 4])
TABLE = torch.tensor([[0, 2], [1, -1], [2, 0], [3, 4], [4, -1]])
CORRECT = torch.eye(5, dtype=torch.bool)
CORRECT[0, 2] = CORRECT[2, 0] = CORRECT[3, 4] = True


def draw(model, batch, masks="constant", text_mode="replace", seed=0):
    """Maskings of a batch: one ratio for all, one for each sample, or painted."""
    ratio = 0.6
    if masks == "uniform":
        ratio = mask_ratios("uniform", 0.2, 0.8, 0.0, batch.sample_ids, seed=seed, epoch=0)
    image = ("painted", PAINTED) if masks == "painted" else ("random", ratio)
    text = ("random", ratio)
    options = dict(seed=seed, epoch=0, text_mode=text_mode, predict_tokens=True)
    return draw_maskings(batch, model.token_info, image=image, text=text, **options)


def wanted(**values):
    return ForwardSpec(**dict(contrast=False, pixels=True, tokens=True) | values)


def other_words(batch, where, model):
    """The batch with another token at each of these positions."""
    ids = model.word_ids
    index = (batch.input_ids[..., None] == ids).long().argmax(-1)
    ids = torch.where(where, ids[(index + 1) % len(ids)], batch.input_ids)
    assert (ids != batch.input_ids)[where].all()
    return dataclasses.replace(batch, input_ids=ids)


def other_pixels(batch, patches, patch_size=5):
    """The batch with every pixel of these patches (B, N) changed."""
    grid = batch.pixel_values.shape[2] // patch_size
    where = patches.unflatten(1, (grid, grid))
    for axis in (1, 2):
        where = where.repeat_interleave(patch_size, axis)
    pixels = torch.where(where[:, None], 255 - batch.pixel_values, batch.pixel_values)
    return dataclasses.replace(batch, pixel_values=pixels)


def mae_and_ours(make_model, norm_pix_loss):
    """transformers' MAE, and our model with the same weights."""
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    torch.manual_seed(3)
    tower = dict(hidden_size=22, num_hidden_layers=2, num_attention_heads=2, intermediate_size=31)
    decoder = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=2)
    mae = ViTMAEForPreTraining(
        ViTMAEConfig(
            image_size=15, patch_size=5, mask_ratio=0.75, norm_pix_loss=norm_pix_loss, **tower,
            **{f"decoder_{name}": value for name, value in decoder.items()},
            decoder_intermediate_size=256,
        )
    )  # fmt: skip
    mae.decoder.initialize_weights(9)  # a new model does not set its positions
    with torch.no_grad():
        for parameter in mae.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
    ours = make_model().add_decoder(
        words=False, width=64, pixel_depth=2, norm_pix_loss=norm_pix_loss
    )
    ours.vit.load_state_dict(mae.vit.state_dict())
    theirs, layers, head = mae.decoder, ours.decoder.pixel_layers, ours.decoder.pixel_head
    layers.embed.load_state_dict(theirs.decoder_embed.state_dict())
    layers.layers.load_state_dict(theirs.decoder_layers.state_dict())
    layers.norm.load_state_dict(theirs.decoder_norm.state_dict())
    layers.mask_token.data = theirs.mask_token.data.flatten().clone()
    order = ours_from_theirs(5)
    head.weight.data = theirs.decoder_pred.weight.data[order].clone()
    head.bias.data = theirs.decoder_pred.bias.data[order].clone()
    return mae.train(), ours.to_device("cpu").train()


def ours_from_theirs(p):
    """Index of value (c, row, column) of our patch in theirs, which is (row, column, c)."""
    return torch.arange(3 * p * p).reshape(p, p, 3).permute(2, 0, 1).flatten()


def special(model, batch):
    return torch.isin(batch.input_ids, model.special_ids)
