"""Our layers equal transformers' own layers, and so do their gradients."""

import pytest
import torch

from mmkit.models.layers import (
    ROWS,
    _places,
    attend,
    bert_states,
    draws_dropout,
    own_layers,
    vit_layers,
)

B, N, L, D = 3, 7, 11, 20  # 5 heads of 4


@pytest.fixture(params=["gelu", "gelu_new"])  # with a backward pass of its own, and without
def vit(request):
    from transformers import ViTConfig, ViTModel

    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=D, num_hidden_layers=3, num_attention_heads=5, intermediate_size=31,
        image_size=8, patch_size=4, hidden_act=request.param, layer_norm_eps=1e-6,
    )  # fmt: skip
    return shaken(ViTModel(config, add_pooling_layer=False))


@pytest.fixture
def bert():
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=29, hidden_size=D, num_hidden_layers=3, num_attention_heads=5,
        intermediate_size=31, max_position_embeddings=13, type_vocab_size=2,
    )  # fmt: skip
    return shaken(BertModel(config, add_pooling_layer=False))


def shaken(model):
    """Biases and norms as after training, so that a missing one shows."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    model.set_attn_implementation("eager")
    return model.eval()


def same_as_transformers(bert, embedded, positions, valid, atol):
    """Check that states and gradients are those of its own forward pass; return the states."""
    expected = (
        bert(
            inputs_embeds=embedded, position_ids=positions, attention_mask=valid.long()
        ).last_hidden_state
        * valid[..., None]
    )
    theirs = gradients(bert, expected, embedded)
    ours = bert_states(bert, embedded, positions, valid)
    torch.testing.assert_close(ours, expected)
    for name, gradient in gradients(bert, ours, embedded).items():
        torch.testing.assert_close(gradient, theirs[name], msg=name, rtol=1e-4, atol=atol)
    return ours


def gradients(model, states, x):
    model.zero_grad()
    (states * torch.arange(states.numel()).view_as(states).cos()).sum().backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    found["input"], x.grad = x.grad.clone(), None
    return found


@pytest.mark.parametrize("padding", [False, True])
def test_a_vit_as_transformers_runs_it(vit, padding):
    x = torch.randn(B, N, D, requires_grad=True)
    valid = torch.rand(B, N) > 0.4 if padding else None
    mask = None
    if valid is not None:
        valid[:, 0] = True
        mask = torch.zeros(B, 1, 1, N).masked_fill(~valid[:, None, None], float("-inf"))
    expected = x
    for layer in vit.layers:
        expected = layer(expected, mask)
    keep = torch.ones(B, N) if valid is None else valid.float()
    theirs = gradients(vit, expected * keep[..., None], x)
    ours = vit_layers(vit, x, valid)
    torch.testing.assert_close(ours * keep[..., None], expected * keep[..., None])
    for name, gradient in gradients(vit, ours * keep[..., None], x).items():
        torch.testing.assert_close(gradient, theirs[name], msg=name, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("holes", [False, True])
def test_a_bert_as_transformers_runs_it(bert, holes):
    """With padding at the end, and with tokens left out anywhere."""
    lengths = torch.tensor([4, L, 1])
    valid = torch.arange(L) < lengths[:, None]
    if holes:
        valid &= torch.rand(B, L, generator=torch.Generator().manual_seed(1)) > 0.3
        valid[:, 0] = True
    embedded = torch.randn(B, L, D, requires_grad=True)
    positions = torch.randint(0, 13, (B, L))
    ours = same_as_transformers(bert, embedded, positions, valid, atol=1e-5)
    assert not ours[~valid].any()


def test_states_under_autocast_are_float32_and_close(vit, bert):
    x, valid = torch.randn(B, N, D), torch.ones(B, L, dtype=torch.bool)
    embedded, positions = torch.randn(B, L, D), torch.arange(L).expand(B, -1)
    exact = vit_layers(vit, x), bert_states(bert, embedded, positions, valid)
    with torch.autocast("cpu", torch.bfloat16):
        rough = vit_layers(vit, x), bert_states(bert, embedded, positions, valid)
    for a, b in zip(exact, rough, strict=True):
        assert b.dtype == torch.float32 and not torch.equal(a, b)
        assert (a - b).norm() / a.norm() < 0.02


def test_attention_against_a_loop():
    heads, width = 5, D // 5
    mixed, masked = torch.randn(B, N, 3 * D), torch.zeros(B, N, dtype=torch.bool)
    masked[1, 3:] = True
    query, key, value = mixed.split(D, -1)
    expected = torch.empty(B, N, D)
    for b in range(B):
        for h in range(heads):
            part = slice(h * width, (h + 1) * width)
            for i in range(N):
                visible = [j for j in range(N) if not masked[b, j]]
                scores = torch.stack([query[b, i, part] @ key[b, j, part] for j in visible])
                expected[b, i, part] = scores.softmax(0) @ value[b, visible, part]
    torch.testing.assert_close(attend(mixed, heads, masked), expected)


def test_dropout_is_drawn_where_transformers_draws_it(vit, bert):
    """In training, states differ between calls, and their mean is that without dropout."""
    for tower in (vit, bert):
        assert draws_dropout(tower) == (tower is bert)  # transformers' defaults: 0 and 0.1
    bert.train()
    embedded, valid = torch.randn(1, L, D), torch.ones(1, L, dtype=torch.bool)
    run = lambda: bert_states(bert, embedded, torch.arange(L)[None], valid)  # noqa: E731
    with torch.no_grad():
        draws = torch.stack([run() for _ in range(400)])
        assert not torch.equal(draws[0], draws[1])
        exact = bert.eval() and run()
    assert (draws.mean(0) - exact).norm() / exact.norm() < 0.12
    assert torch.equal(run(), run())


def test_whose_layers_run(vit, bert):
    x = torch.randn(B, N, D)
    assert own_layers(vit, x) and own_layers(bert, x)
    calls: list = []
    hook = vit.layers[1].register_forward_hook(lambda *_: calls.append(1))
    assert not own_layers(vit, x)
    hook.remove()
    assert own_layers(vit, x)
    vit.set_attn_implementation("eager")
    vit(torch.zeros(1, 3, 8, 8), output_hidden_states=True, output_attentions=True)
    assert own_layers(vit, x)  # whatever hooks transformers has left
    for layer in bert.encoder.layer:
        layer.compile()
    assert not own_layers(bert, x)
    assert not own_layers(bert, x.to("meta"))


def test_checkpointed_layers_give_the_same_gradient_with_dropout_too(vit, bert):
    """They keep only their inputs and run once more in the backward pass."""
    embedded, valid = torch.randn(2, L, D), torch.arange(L) < torch.tensor([[5], [L]])
    x = torch.randn(B, N, D)
    found = []
    for checkpointing in (False, True):
        for layer in (*vit.train().layers, *bert.train().encoder.layer):
            layer.gradient_checkpointing = checkpointing
        torch.manual_seed(7)
        vit.zero_grad(), bert.zero_grad()
        total = vit_layers(vit, x).square().sum()
        total = total + bert_states(bert, embedded, torch.arange(L).expand(2, -1), valid).sum()
        total.backward()
        both = (*vit.named_parameters(), *bert.named_parameters())
        found.append([p.grad.clone() for _, p in both if p.grad is not None])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


def test_many_tokens_are_computed_in_whole_numbers_of_rows(bert):
    """The rows beyond the valid tokens change nothing, whatever they contain."""
    batch, length = 43, 13
    lengths = torch.randint(3, length + 1, (batch,), generator=torch.Generator().manual_seed(2))
    valid = torch.arange(length) < lengths[:, None]
    kept, rows = _places(valid)
    assert len(kept) == valid.sum() > 4 * ROWS and len(kept) % ROWS
    assert len(rows) % ROWS == 0 and len(rows.unique()) == len(rows)
    assert torch.equal(rows[: len(kept)], kept) and not valid.flatten()[rows[len(kept) :]].any()
    few = torch.ones(3, 5, dtype=torch.bool)
    assert all(len(rows) == 15 for rows in _places(few))
    full = torch.ones(batch, length, dtype=torch.bool)  # no padding to compute with
    assert all(len(rows) == batch * length for rows in _places(full))

    embedded = torch.randn(batch, length, D, requires_grad=True)
    positions = torch.arange(length).expand(batch, -1)
    ours = same_as_transformers(bert, embedded, positions, valid, atol=1e-4)
    spoilt = embedded.detach().masked_fill(~valid[..., None], float("nan"))
    assert torch.equal(bert_states(bert, spoilt, positions, valid), ours)


def lora(linear, trainable=True):
    """A linear layer like LoRA's: a subclass of nn.Linear that adds a product of its own."""

    class Lora(torch.nn.Linear):
        def forward(self, x):
            return super().forward(x) + 0.1 * x.sum(-1, keepdim=True)

    new = Lora(linear.in_features, linear.out_features)
    new.load_state_dict(linear.state_dict())
    return new


def replace(owner, name, change):
    setattr(owner, name, change(getattr(owner, name)))


CHANGES = {
    "dropout set by hand": lambda vit, bert: (
        setattr(vit.layers[1].dropout, "p", 0.3),
        setattr(bert.encoder.layer[2].output.dropout, "p", 0.3),
    ),
    "attention's dropout set by hand": lambda vit, bert: (
        setattr(vit.layers[1].attention, "attention_dropout", 0.3),
        setattr(bert.encoder.layer[0].attention.self.dropout, "p", 0.3),
    ),
    "a subclass of Linear": lambda vit, bert: (
        replace(vit.layers[0].attention, "q_proj", lora),
        replace(bert.encoder.layer[1].attention.self, "value", lora),
    ),
    "a parametrized weight": lambda vit, bert: (
        torch.nn.utils.parametrizations.spectral_norm(vit.layers[0].mlp.fc1),
        torch.nn.utils.parametrizations.spectral_norm(bert.encoder.layer[1].output.dense),
    ),
    "another activation": lambda vit, bert: (
        setattr(vit.layers[2].mlp, "activation_fn", torch.nn.ReLU()),
        setattr(bert.encoder.layer[2].intermediate, "intermediate_act_fn", torch.nn.ReLU()),
    ),
    "another norm": lambda vit, bert: (
        setattr(vit.layers[0], "layernorm_after", torch.nn.RMSNorm(D)),
        setattr(bert.encoder.layer[0].output, "LayerNorm", torch.nn.RMSNorm(D)),
    ),
    "an adapter": lambda vit, bert: (
        setattr(vit.layers[0].mlp, "activation_fn", torch.nn.Sequential(torch.nn.Linear(31, 31))),
        setattr(bert.embeddings, "dropout", torch.nn.Sequential(torch.nn.Linear(D, D))),
    ),
    "a method of an object": lambda vit, bert: (
        setattr(vit.layers[0], "forward", lambda x, *_, **__: 2 * x),
        setattr(bert.encoder.layer[1], "feed_forward_chunk", lambda x: 2 * x),
    ),
    "another scale of the attention": lambda vit, bert: (
        setattr(vit.layers[2].attention, "scaling", 1.5),
        setattr(bert.encoder.layer[0].attention.self, "scaling", 1.5),
    ),
    "parts in another mode": lambda vit, bert: (
        vit.layers[1].dropout.train(),
        bert.encoder.layer[0].attention.train(),
    ),
    "a config changed afterwards": lambda vit, bert: (
        setattr(vit.config, "hidden_act", "relu"),
        setattr(bert.config, "hidden_dropout_prob", 0.7),
    ),
    "weights in another type": lambda vit, bert: (
        vit.layers[1].mlp.fc1.double(),
        bert.encoder.layer[1].double(),
    ),
    "a user's attention": lambda vit, bert: (
        setattr(vit.config, "_attn_implementation", "mine"),
        setattr(bert.config, "_attn_implementation", "mine"),
    ),
    "a hook on the backward pass": lambda vit, bert: (
        vit.layers[1].register_full_backward_pre_hook(lambda *_: None),
        bert.encoder.register_full_backward_hook(lambda *_: None),
    ),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_whatever_is_not_the_plain_layer_is_left_to_transformers(vit, bert, change):
    x = torch.randn(B, N, D)
    assert own_layers(vit, x) and own_layers(bert, x)
    change(vit, bert)
    assert not own_layers(vit, x) and not own_layers(bert, x)


def test_a_decoder_and_states_of_another_type_are_left_to_transformers(bert):
    from transformers import BertModel

    x = torch.randn(B, L, D)
    assert not own_layers(bert, x.bfloat16()) and not own_layers(bert, x.double())
    assert own_layers(bert.double(), x.double())
    bert.config.is_decoder = True
    assert not own_layers(bert, x.double())
    causal = BertModel(bert.config, add_pooling_layer=False)
    assert not own_layers(causal, x)


def test_other_derivatives_and_hooks_on_all_modules_get_transformers_layers(vit):
    x, found = torch.randn(1, N, D), []
    hook = torch.nn.modules.module.register_module_forward_hook(lambda *_: found.append(1))
    try:
        assert not own_layers(vit, x)
    finally:
        hook.remove()
    torch.func.grad(lambda x: found.append(own_layers(vit, x)) or x.sum())(x)
    with torch.autograd.forward_ad.dual_level():
        found.append(own_layers(vit, x))
    assert found == [False, False] and own_layers(vit, x)


def test_an_unknown_part_may_draw_dropout(vit):
    assert not draws_dropout(vit)
    vit.layers[1].attention.attention_dropout = 0.3
    assert draws_dropout(vit)
    vit.layers[1].attention.attention_dropout = 0.0
    replace(vit.layers[0].attention, "q_proj", lora)
    assert draws_dropout(vit)


def test_a_caption_of_padding_alone_spoils_no_gradient(bert):
    """Its states are 0; the states of the others and all gradients are as without it."""
    lengths = torch.tensor([4, 0, L])
    valid = torch.arange(L) < lengths[:, None]
    embedded = torch.randn(B, L, D, requires_grad=True)
    positions = torch.arange(L).expand(B, -1)
    states = bert_states(bert, embedded, positions, valid)
    assert not states[1].any()
    found = gradients(bert, states[[0, 2]], embedded)
    alone = bert_states(bert, embedded[[0, 2]], positions[:2], valid[[0, 2]])
    for name, gradient in gradients(bert, alone, embedded).items():
        assert gradient.isfinite().all()
        torch.testing.assert_close(found[name], gradient, msg=name, rtol=1e-4, atol=1e-5)


def test_what_is_changed_in_the_patch_projection_is_used(make_model, make_data):
    """A subclass of the convolution, such as LoRA's, is called; a hook on it, too."""

    class Doubled(torch.nn.Conv2d):
        def forward(self, x):
            return 2 * super().forward(x)

    model, batch = make_model().to_device("cpu").eval(), make_data(5).batch(range(5))
    patches = model.vit.embeddings.patch_embeddings
    plain = patches.projection
    calls = []
    with torch.no_grad():
        before = model.image_tokens(batch.pixel_values)
        hook = plain.register_forward_hook(lambda *_: calls.append(1))
        torch.testing.assert_close(model.image_tokens(batch.pixel_values), before)
        hook.remove()
        patches.projection = Doubled(3, 22, 5, 5)
        patches.projection.load_state_dict(plain.state_dict())
        changed = model.image_tokens(batch.pixel_values)
        patches.projection = plain
        plain.weight *= 2
        plain.bias *= 2
        expected = model.image_tokens(batch.pixel_values)
    assert calls == [1] and not torch.equal(changed, before)
    torch.testing.assert_close(changed, expected)
