"""A shared model comes back bit for bit; damaged, foreign or hostile files are refused."""

import contextlib
import copy
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file

import mmkit as mm
from mmkit.data.batch import Batch
from mmkit.data.tokenizer import encode_texts
from mmkit.files import write_atomically
from mmkit.masking.plan import draw_maskings
from mmkit.models.decoder import ForwardSpec
from tests.small_hub import SmallHub

FILES = {"README.md", "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
TEXTS = ["old red cat", "dog", "small blue boat and a zebra"]


@pytest.fixture
def shared(make_model, tmp_path):
    """The folder of a small model."""
    make_model().save_pretrained(tmp_path / "shared")
    return tmp_path / "shared"


def names(folder):
    return {path.name for path in Path(folder).iterdir()}


def edit(folder, change, file="config.json"):
    """Change the values of a JSON file in place."""
    path = Path(folder) / file
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def features(model):
    side = model.image_size
    generator = torch.Generator().manual_seed(3)
    pixels = torch.randint(0, 256, (3, 3, side, side), dtype=torch.uint8, generator=generator)
    texts = encode_texts(model.tokenizer, TEXTS, model.max_length)
    with torch.no_grad():
        return model.encode_image(pixels), model.encode_text(*texts)


def same_model(one, other):
    """Check everything by which a user could tell them apart."""
    a, b = one.state_dict(), other.state_dict()
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    for (name, x), (other_name, y) in zip(one.named_buffers(), other.named_buffers(), strict=True):
        assert name == other_name and x.dtype == y.dtype and torch.equal(x, y), name
    assert one.architecture() == other.architecture()
    dropouts = [[m.p for m in x.modules() if isinstance(m, torch.nn.Dropout)] for x in (one, other)]
    assert dropouts[0] == dropouts[1]
    assert one.tokenizer(TEXTS)["input_ids"] == other.tokenizer(TEXTS)["input_ids"]
    one = copy.deepcopy(one).to_device("cpu").eval()
    assert all(map(torch.equal, features(one), features(other)))
    assert not other.training


def unlike_new(model):
    """Change every parameter and buffer, so that none can be right by chance."""
    torch.manual_seed(5)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor += 0.1 * torch.rand_like(tensor)
    return model


# -- there and back --------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"dropout": 0.3}, {"pooling": "cls"}])
def test_a_small_model_comes_back_to_the_bit(make_model, tmp_path, options):
    """With either pooling, with dropout, with its own pixel statistics."""
    model = unlike_new(make_model(image_mean=(0.4, 0.5, 0.6), **options))
    model.save_pretrained(tmp_path / "new" / "shared")
    same_model(model, mm.MultimodalEncoder.from_pretrained(tmp_path / "new/shared"))
    same_model(model, mm.load(str(tmp_path / "new/shared")))


def test_a_preset_comes_back_to_the_bit(tokenizer, tmp_path):
    model = unlike_new(mm.MultimodalEncoder.preset("tiny", tokenizer=tokenizer, dropout=0.1))
    model.save_pretrained(tmp_path)
    assert names(tmp_path) == FILES
    assert len({path.stat().st_mode for path in tmp_path.iterdir()}) == 1  # equally readable
    same_model(model, mm.load(tmp_path))


def save_towers(model, folder):
    """Checkpoints of both towers as transformers saves them."""
    model.vit.save_pretrained(folder / "vit")
    statistics = {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.25, 0.3]}
    kind = {"image_processor_type": "ViTImageProcessor"}
    (folder / "vit/preprocessor_config.json").write_text(json.dumps(statistics | kind))
    model.bert.save_pretrained(folder / "bert")
    model.tokenizer.save_pretrained(folder / "bert")
    return str(folder / "vit"), str(folder / "bert")


def test_towers_from_checkpoints_come_back_to_the_bit(make_model, tmp_path):
    towers = save_towers(unlike_new(make_model()), tmp_path)
    model = mm.MultimodalEncoder.from_backbones(*towers, embed_dim=7, temperature=0.1)
    model.save_pretrained(tmp_path / "shared")
    again = mm.MultimodalEncoder.from_pretrained(tmp_path / "shared")
    same_model(model, again)
    assert again.pixel_stats[0].flatten().tolist() == pytest.approx([0.4, 0.5, 0.6])


def test_a_users_special_tokens_stay_special(make_model, tokenizer, tmp_path):
    """They are never masked, also after loading."""
    model = make_model()
    model.tokenizer = copy.deepcopy(tokenizer)
    model.tokenizer.add_special_tokens({"extra_special_tokens": ["tree"]})
    special = mm.data.tokenizer.special_ids(model.tokenizer)
    assert len(special) == len(model.special_ids) + 1
    model.save_pretrained(tmp_path)
    assert torch.equal(mm.load(tmp_path).special_ids, special)


def test_tensors_that_share_memory_and_compiled_layers(make_model, tmp_path):
    """Each tensor is written under the model's own name; the features are the same."""
    model = unlike_new(make_model().to_device("cpu").eval())
    model.text_projection = model.image_projection
    compiled = copy.deepcopy(model)
    compiled.vit.layers[0] = torch.compile(compiled.vit.layers[0])
    compiled.save_pretrained(tmp_path)
    assert model.state_dict().keys() == load_file(tmp_path / "model.safetensors").keys()
    assert all(map(torch.equal, features(model), features(mm.load(tmp_path))))


def test_half_precision_comes_back_in_float32_and_float64_is_refused(make_model, tmp_path):
    model = unlike_new(make_model())
    for kind in (torch.float16, torch.bfloat16):
        half = copy.deepcopy(model).to(kind)
        half.save_pretrained(tmp_path)
        weights = mm.load(tmp_path).state_dict()
        assert {w.dtype for w in weights.values()} == {torch.float32}
        assert all(torch.equal(weights[k], v.float()) for k, v in half.state_dict().items())
    with pytest.raises(ValueError, match=r"is torch\.float64, .* call model\.float\(\) first"):
        model.double().save_pretrained(tmp_path)
    assert torch.equal(mm.load(tmp_path).logit_scale, half.logit_scale.float())


def test_an_encoder_is_copied_and_pickled_as_before(make_model):
    """Data loading workers and EMA need it."""
    model = make_model(pooling="cls")
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        same_model(model, again.to_device("cpu").eval())


def test_the_parts_are_readable_without_mmkit(make_model, tmp_path):
    """transformers builds both towers and the tokenizer from the files as the card describes."""
    from transformers import AutoTokenizer, BertConfig, BertModel, ViTConfig, ViTModel

    model = unlike_new(make_model()).eval()
    model.save_pretrained(tmp_path)
    architecture = json.loads((tmp_path / "config.json").read_text())["architecture"]
    weights = load_file(tmp_path / "model.safetensors")

    def tower(kind, config_class, model_class):
        tower = model_class(config_class(**architecture[kind]), add_pooling_layer=False)
        own = {k.removeprefix(f"{kind}."): v for k, v in weights.items() if k.startswith(kind)}
        tower.load_state_dict(own)
        return tower.eval()

    pixels = torch.randn(2, 3, 15, 15)
    vit, bert = tower("vit", ViTConfig, ViTModel), tower("bert", BertConfig, BertModel)
    assert torch.equal(vit(pixels)[0], model.vit(pixels)[0])
    tokens = AutoTokenizer.from_pretrained(tmp_path)(TEXTS, padding=True, return_tensors="pt")
    input_ids, valid = encode_texts(model.tokenizer, TEXTS, 17)
    assert torch.equal(tokens["input_ids"], input_ids)
    states = bert(input_ids, attention_mask=valid.long())[0]
    assert torch.equal(states, model.bert(input_ids, attention_mask=valid.long())[0])


HEADS = dict(width=32, pixel_depth=1, word_depth=2)


def predictions(model, across):
    """Predicted patches, masked tokens and pairs of a made batch."""
    side, size = model.image_size, model.patch_size
    generator = torch.Generator().manual_seed(3)
    pixels = torch.randint(0, 256, (3, 3, side, side), dtype=torch.uint8, generator=generator)
    texts = encode_texts(model.tokenizer, TEXTS, model.max_length)
    batch = Batch(pixels, *texts, torch.arange(3))
    masks = draw_maskings(batch, model.token_info, seed=0, epoch=0, image=("random", 0.5),
                          text=("random", 0.5), predict_tokens=True)  # fmt: skip
    noise = torch.rand(3, 2, generator=generator) if across else None
    with torch.no_grad():
        out = model(
            batch, *masks, "drop", "replace", ForwardSpec(False, "masked", True, True, noise)
        )
    assert out.pixels.shape == (3, (side // size) ** 2, 3 * size**2)
    return [out.pixels, out.token_logits, *([out.matching] if across else [])]


@pytest.mark.parametrize("heads", [{}, dict(across=True, matching=True), dict(norm_pix_loss=True)])
def test_a_decoder_comes_back_to_the_bit(make_model, tmp_path, heads):
    """From a folder and from a best_model.pth; a folder without a decoder gives none."""
    model = make_model(dropout=0.1).add_decoder(**HEADS | heads).to_device("cpu")
    model = unlike_new(model).eval()
    model.save_pretrained(tmp_path / "shared")
    write_atomically(
        {"model_state_dict": model.state_dict(), "architecture": model.architecture()},
        tmp_path / "best_model.pth",
    )
    wanted = predictions(model, "across" in heads)
    for path in (tmp_path / "shared", tmp_path / "best_model.pth"):
        other = mm.load(path)
        assert other.decoder.spec == model.decoder.spec
        same_model(model, other)
        assert all(map(torch.equal, predictions(other, "across" in heads), wanted))

    make_model().save_pretrained(tmp_path / "plain")
    assert "decoder" not in json.loads((tmp_path / "plain/config.json").read_text())["architecture"]
    assert mm.load(tmp_path / "plain").decoder is None


# -- error messages --------------------------------------------------------------------------


def other_weights(folder, **changes):
    """Other weights with a correct checksum, as in another export."""
    weights = load_file(folder / "model.safetensors") | changes
    kept = {k: v for k, v in weights.items() if v is not None}
    save_file(kept, folder / "model.safetensors")
    total = mm.models.sharing._sha256(folder / "model.safetensors")
    edit(folder, lambda config: config["sha256"].update({"model.safetensors": total}))


def cut(name, fraction):
    def damage(folder):
        path = folder / name
        content = path.read_bytes()
        path.write_bytes(content[: int(fraction * len(content))])

    return damage


def flip(name, position):
    """Change one bit of a file, at a fraction of its length."""

    def damage(folder):
        content = bytearray((folder / name).read_bytes())
        content[int(position * len(content))] ^= 1
        (folder / name).write_bytes(bytes(content))

    return damage


def setting(*keys, value):
    """Set another value in config.json."""

    def damage(folder):
        def change(config):
            for key in keys[:-1]:
                config = config[key]
            config[keys[-1]] = value

        edit(folder, change)

    return damage


def only_a_pickle(folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def text(name, content):
    return lambda folder: (folder / name).write_text(content)


WEIGHTS, TOKENIZER = "model.safetensors", "tokenizer.json"
DAMAGES = {
    "weights cut in the head": (cut(WEIGHTS, 0.001), r"model\.safetensors is refused: .* cut off"),
    "weights cut in the middle": (cut(WEIGHTS, 0.5), r"model\.safetensors is refused: .* cut off"),
    "weights cut at the end": (cut(WEIGHTS, 0.9999), r"model\.safetensors is refused: .* cut off"),
    "weights empty": (cut(WEIGHTS, 0), r"model\.safetensors is refused: it is damaged"),
    "a bit of the weights": (flip(WEIGHTS, 0.9), r"model\.safetensors is damaged, or of another"),
    "a bit of the tokenizer": (flip(TOKENIZER, 0.5), r"tokenizer\.json is damaged, or of another"),
    "tokenizer of another": (text(TOKENIZER, "{}"), r"tokenizer\.json is damaged, or of another"),
    "no such special token": (text("tokenizer_config.json", "[1"), r"tokenizer_config\.json is da"),
    "config cut off": (cut("config.json", 0.7), r"config\.json is damaged"),
    "config no text": (lambda f: (f / "config.json").write_bytes(b"\xff\xfe\x00"), "no text"),
    "config a list": (text("config.json", "[1, 2]"), r"config\.json holds a list, no settings"),
    "config endless": (text("config.json", "[" * 99_999), r"config\.json is damaged"),
    "config of a ViT": (
        setting("model_type", value="vit"),
        r"config\.json is of a 'vit' model, not of an mmkit model; give a complete folder",
    ),
    "config of nothing": (text("config.json", "{}"), r"config\.json is not of an mmkit model"),
    "a newer mmkit": (setting("format", value=2), "has format 2, this mmkit reads 1; update mmkit"),
    "no table": (setting("sha256", value=[1]), "'sha256' is no table"),
    "another pooling": (
        setting("architecture", "pooling", value="max"),
        r"config\.json describes no model that can be built \(ValueError: pooling='max'",
    ),
    "a setting of another kind": (
        setting("architecture", "vit", "hidden_size", value="22"),
        r"describes no model that can be built .*hidden_size.* expected int, got str",
    ),
    "an unknown setting": (
        setting("architecture", "colour", value="red"),
        "describes no model that can be built .*unexpected keyword argument 'colour'",
    ),
    "another width": (
        setting("architecture", "embed_dim", value=17),
        r"of another architecture .*'image_projection\.2\.weight' is \(13, 22\) there, \(17, 22\)",
    ),
    # Sizes that fit into no memory: they are compared before anything is built.
    "an absurd width": (
        setting("architecture", "vit", "intermediate_size", value=10**12),
        r"of another architecture .*fc1.* is \(31, 22\) there, \(1000000000000, 22\) here",
    ),
    "an absurd depth": (
        setting("architecture", "bert", "num_hidden_layers", value=10**12),
        "more bert layers than model.safetensors has tensors",
    ),
    "a tensor too many": (
        lambda folder: other_weights(folder, more=torch.zeros(3)),
        "'more' is .3,. there, unknown here; get both from one export",
    ),
    "a tensor missing": (
        lambda folder: other_weights(folder, logit_bias=None),
        "'logit_bias' is missing there",
    ),
    "a tensor of whole numbers": (
        lambda folder: other_weights(folder, logit_bias=torch.tensor(-10)),
        "holds numbers of type I64, which float32 does not represent",
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_what_is_damaged_or_foreign_is_refused(shared, name):
    """The message names the file, whichever way it is read."""
    damage, message = DAMAGES[name]
    damage(shared)
    for read in (mm.load, mm.MultimodalEncoder.from_pretrained):
        with pytest.raises(ValueError, match=message) as refused:
            read(shared)
        assert str(shared) in str(refused.value)


OF_DECODER = {
    "depth": (
        setting("architecture", "decoder", "pixel_depth", value=10**12),
        r"a decoder of more layers \(pixel_depth\) than model.safetensors has tensors",
    ),
    "width": (
        setting("architecture", "decoder", "width", value=32 * 10**6),
        r"of another architecture .*'decoder\..* is \(32.*\) there, \(32000000",
    ),
    "no width": (
        setting("architecture", "decoder", "width", value=0),
        "width=0 must be a multiple",
    ),
    "a depth below 0": (
        setting("architecture", "decoder", "word_depth", value=-1),
        "describes no model that can be built .*word_depth=-1 must be 0",
    ),
    "a width in words": (
        setting("architecture", "decoder", "width", value="32"),
        "describes no model that can be built",
    ),
    "no table": (setting("architecture", "decoder", value=[1]), "describes no model that can be"),
    "an unknown head": (
        setting("architecture", "decoder", "sound", value=True),
        "describes no model that can be built .*unexpected keyword argument 'sound'",
    ),
    "a head too many": (
        setting("architecture", "decoder", "across", value=True),
        r"'decoder\..*other.* is missing there",
    ),
    "forgotten": (setting("architecture", "decoder", value=None), "unknown here; get both"),
}


@pytest.mark.parametrize("name", OF_DECODER)
def test_a_damaged_decoder_is_refused(make_model, tmp_path, name):
    """With a message, before anything of an absurd size is built."""
    make_model().add_decoder(**HEADS).save_pretrained(tmp_path / "shared")
    damage, message = OF_DECODER[name]
    damage(tmp_path / "shared")
    with pytest.raises(ValueError, match=message):
        mm.load(tmp_path / "shared")


@pytest.mark.parametrize("name", sorted(FILES - {"README.md"}))
def test_what_is_missing_is_named(shared, name):
    (shared / name).unlink()
    with pytest.raises(
        FileNotFoundError, match=f"has no {name}; give a complete folder from save_pretr"
    ):
        mm.load(shared)


def test_a_wrong_path_is_explained(make_model, shared, tmp_path):
    """For pickled weights, a run's folder, a file or nothing, the message says what to do."""
    only_a_pickle(shared)
    message = (
        r"no model\.safetensors; pytorch_model\.bin is not read, since such a file can run code"
    )
    with pytest.raises(FileNotFoundError, match=message):
        mm.load(shared)
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_text(json.dumps(mm.TrainingConfig().to_dict()))
    (run / "best_model.pth").write_bytes(b"")
    with pytest.raises(ValueError, match=r"it is a run's folder: use mm\.load\('.*best_model\.pth"):
        mm.load(run)
    with pytest.raises(ValueError, match=r"holds a config\.json of something else"):
        make_model().save_pretrained(run)  # whose config.json it would overwrite
    assert json.loads((run / "config.json").read_text()) == mm.TrainingConfig().to_dict()
    with pytest.raises(ValueError, match=r"is a file; give the folder .* mm\.load\('"):
        mm.MultimodalEncoder.from_pretrained(run / "best_model.pth")
    with pytest.raises(ValueError, match="is a file; give the name of a folder"):
        make_model().save_pretrained(run / "best_model.pth")
    with pytest.raises(FileNotFoundError, match=r"no model './gone': there is no such folder, and"):
        mm.MultimodalEncoder.from_pretrained("./gone")
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        mm.load(tmp_path / "gone")
    with pytest.raises(TypeError, match="trust_remote_code"):
        mm.MultimodalEncoder.from_pretrained(run, trust_remote_code=True)


# -- no code runs ----------------------------------------------------------------------------


class Hostile:
    """Unpickling this would create a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def make_hostile(folder, trace):
    """Use all ways in which a transformers folder can ask for its own code, or for a kernel."""
    (folder / "evil.py").write_text(f"open({str(trace)!r}, 'w')\nclass Evil: pass\n")
    of_model = {"AutoConfig": "evil.Evil", "AutoModel": "evil.Evil"}
    for file in ("config.json", "tokenizer_config.json"):
        if (folder / file).exists():
            auto_map = of_model | {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}
            edit(folder, lambda v, m=auto_map: v.update(auto_map=m, custom_code="evil.py"), file)
    for name in ("pytorch_model.bin", "tokenizer.pkl"):
        (folder / name).write_bytes(pickle.dumps(Hostile(trace)))


KERNEL = {
    name: "kernels-community/evil" for name in ("attn_implementation", "_attn_implementation")
}


def test_a_hostile_folder_runs_nothing(make_model, shared, tmp_path):
    """Code in the folder, pickles and kernels to download are ignored; the model is unchanged."""
    trace = tmp_path / "it_ran"
    make_hostile(shared, trace)
    kind = {"tokenizer_class": "Evil", "model_type": "evil"}
    edit(shared, lambda values: values.update(kind), "tokenizer_config.json")
    for tower in ("vit", "bert"):
        edit(shared, lambda c, t=tower: c["architecture"][t].update(KERNEL, auto_map={"a": "b"}))
    model = mm.load(shared)
    same_model(make_model(), model)
    assert not trace.exists() and "evil" not in sys.modules


def test_a_checkpoint_or_a_tower_cannot_ask_for_code_either(make_model, tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asks whether to run code"))
    model, trace = make_model(), tmp_path / "it_ran"
    spec = model.architecture()
    spec["vit"] |= KERNEL
    state = {"architecture": spec, "model_state_dict": model.state_dict()}
    write_atomically(state, tmp_path / "best_model.pth")
    same_model(model, mm.load(tmp_path / "best_model.pth"))
    for kernel in KERNEL:
        folder = tmp_path / kernel
        folder.mkdir()
        vit, bert = save_towers(model, folder)
        make_hostile(Path(vit), trace)
        make_hostile(Path(bert), trace)
        edit(vit, lambda values, k=kernel: values.update({k: KERNEL[k]}))
        loaded = mm.MultimodalEncoder.from_backbones(vit, bert)
        assert loaded.vit.config._attn_implementation == "sdpa"
        assert torch.equal(loaded.vit.layernorm.weight, model.vit.layernorm.weight)
    edit(vit, lambda values: values.update(model_type="evil"))
    with pytest.raises(ValueError, match="trust_remote_code"):
        mm.MultimodalEncoder.from_backbones(vit, bert)
    assert not trace.exists() and "evil" not in sys.modules


# -- complete files --------------------------------------------------------------------------


def test_a_full_disk_leaves_the_earlier_export_whole(make_model, shared, monkeypatch):
    import safetensors.torch

    def full_disk(tensors, path, metadata=None):
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    (shared / ".export-killed").mkdir()  # left by a killed process
    monkeypatch.setattr(safetensors.torch, "save_file", full_disk)
    with pytest.raises(OSError, match="No space left"):
        make_model(seed=1).save_pretrained(shared)
    monkeypatch.undo()
    same_model(make_model(), mm.load(shared))
    assert names(shared) == FILES


@pytest.mark.parametrize("renamed", range(6))
def test_killed_between_two_renames_it_is_never_a_mixture(make_model, shared, monkeypatch, renamed):
    """The old model before the first rename, the new one after the last, refused in between."""
    replace, left = os.replace, [renamed]

    def killed(source, target):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", killed)
    new = make_model(seed=1)
    with pytest.raises(KeyboardInterrupt) if renamed < 5 else contextlib.nullcontext():
        new.save_pretrained(shared)
    monkeypatch.undo()
    if renamed in (0, 5):
        same_model(new if renamed else make_model(), mm.load(shared))
    else:
        with pytest.raises(ValueError, match=r"of another model than the config\.json beside it"):
            mm.load(shared)
    new.save_pretrained(shared)
    same_model(new, mm.load(shared))


def test_weights_of_another_export_are_never_mixed_in(make_model, shared, tmp_path):
    """The architecture is the same and every tensor fits, but the files do not belong together."""
    make_model(seed=1).save_pretrained(tmp_path / "other")
    shutil.copy(tmp_path / "other/model.safetensors", shared)
    with pytest.raises(ValueError, match=r"of another model than the config\.json beside it"):
        mm.load(shared)


# -- the card --------------------------------------------------------------------------------

METADATA = {
    "config": mm.TrainingConfig(
        image_mask="block", image_mask_ratio=0.4, text_mask_ratio=0.15, output_dir="/home/me/runs"
    ).to_dict(),
    "data": {"name": "openmoji-compose-train", "fingerprint": "f00"},
    "epoch": 12,
    "best": {"image_to_text_R@1": 0.8712, "loss": 1.5, "split": "val"},
    "model_state_dict": {"never": torch.zeros(2)},
}


def test_the_card_says_what_is_known(make_model, tmp_path):
    make_model(pooling="cls").save_pretrained(tmp_path / "shared", metadata=METADATA)
    card = ModelCard.load(tmp_path / "shared/README.md")
    assert card.data.library_name == "mmkit" and "mmkit" in card.data.tags
    assert card.data.pipeline_tag == "zero-shot-image-classification"
    for row in (
        "| image | 15 x 15 pixels, patches of 5: 9 |",
        "| ViT | width 22, 2 layers, 2 heads |",
        "captions of up to 17 tokens",
        "| common space | 13 numbers |",
        "| pooling | the first token |",
        "| data | openmoji-compose-train |",
        "| `image_mask` | block |",
        "| `image_mask_ratio` | 0.4 |",
        "| `text_mask_ratio` | 0.15 |",
        "| weights of epoch | 13 |",
        "| image to text R@1, validation | 87.1 % |",
        "MIT licence",
        "CC BY-SA 4.0",
    ):
        assert row in card.text, row
    parameters = sum(p.numel() for p in make_model().parameters())
    assert f"| parameters | {parameters:,} |" in card.text
    for file in FILES - {"model.safetensors"}:
        assert "/home/me" not in (tmp_path / "shared" / file).read_text()


def test_the_card_of_a_model_of_unknown_training_claims_nothing(make_model, tmp_path):
    make_model().save_pretrained(tmp_path / "shared")
    card = (tmp_path / "shared/README.md").read_text()
    assert "Nothing was recorded" in card and "OpenMoji" not in card and "R@1" not in card


def test_the_lines_on_the_card_run(make_model, tmp_path, monkeypatch):
    make_model().save_pretrained(tmp_path / "shared")
    (code,) = re.findall(r"```python\n(.*?)```", (tmp_path / "shared/README.md").read_text(), re.S)
    monkeypatch.chdir(tmp_path)
    scope: dict = {}
    exec(code, scope)
    same_model(make_model(), scope["model"])


def test_every_tensor_is_on_the_card(make_model, shared):
    card = (shared / "README.md").read_text()
    named = re.findall(r"`([a-z_]+)(?:\.\*)?`", card)
    assert {name.split(".")[0] for name in make_model().state_dict()} <= set(named)


def test_a_card_that_a_user_wrote_is_kept(make_model, tmp_path):
    """A card that mmkit wrote is replaced with the model."""
    make_model().save_pretrained(tmp_path)
    make_model().save_pretrained(tmp_path, metadata=METADATA)
    assert "openmoji-compose-train" in (tmp_path / "README.md").read_text()
    with open(tmp_path / "README.md", "a") as file:
        file.write("Do not use it for mushrooms.\n")
    for _ in range(2):
        make_model(seed=1).save_pretrained(tmp_path)
        assert "mushrooms" in (tmp_path / "README.md").read_text()
    same_model(make_model(seed=1), mm.load(tmp_path))


def test_a_run_knows_its_metadata(make_data, make_model, tmp_path):
    """After a real run of two steps, the card names settings, data and recall."""
    config = mm.TrainingConfig(
        batch_size=11, max_steps=2, image_mask_ratio=0.3, output_dir=str(tmp_path), run_name="quick"
    )
    data = make_data(23, name="noise")
    run = mm.train_model(config, data, make_data(7, seed=1), model=make_model())
    run.model.save_pretrained(tmp_path / "shared", metadata=run.metadata)
    card = (tmp_path / "shared/README.md").read_text()
    recall = 100 * run.best["text_to_image_R@1"]
    for row in ("| data | noise |", "| `image_mask_ratio` | 0.3 |", "| `max_steps` | 2 |"):
        assert row in card
    assert f"| text to image R@1, validation | {recall:.1f} % |" in card
    same_model(run.model, mm.load(tmp_path / "shared"))


# -- a hub -----------------------------------------------------------------------------------

PUSH_AND_LOAD = """
import sys
import mmkit as mm

model = mm.load(sys.argv[1])
print(model.push_to_hub("me/first", metadata={"data": {"name": "noise"}}, token="hf_none"))
model = mm.MultimodalEncoder.from_pretrained("me/first", token="hf_none")
model.save_pretrained(sys.argv[2])
for name, message in (("me/gone", "has none of that name (404"), ("me/pickled", "has no config")):
    try:
        mm.MultimodalEncoder.from_pretrained(name)
    except FileNotFoundError as error:
        assert message in str(error), error
    else:
        raise AssertionError(name)
"""
LOAD = """
import sys
import mmkit as mm

mm.MultimodalEncoder.from_pretrained("me/first").save_pretrained(sys.argv[1])
"""


def python(code, *arguments, **env):
    command = [sys.executable, "-c", code, *map(str, arguments)]
    env = os.environ | {"HF_HUB_DISABLE_PROGRESS_BARS": "1"} | env
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=env)


@pytest.mark.slow
def test_pushed_to_a_hub_and_loaded_by_name(shared, make_model, tmp_path):
    """Through the hub's own mixin and client, over HTTP; then from the cache, without the hub."""
    with SmallHub() as hub:
        hub.files["me/pickled"] = {"pytorch_model.bin": b"never asked for"}
        env = {"HF_ENDPOINT": hub.address, "HF_HOME": str(tmp_path / "cache")}
        done = python(PUSH_AND_LOAD, shared, tmp_path / "again", **env)
        assert done.returncode == 0, done.stderr
        files = hub.files["me/first"]
        assert done.stdout.strip().startswith(f"{hub.address}/me/first/commit/")
        assert not [asked for asked in hub.asked if "pytorch_model.bin" in asked]
    assert files.keys() - {".gitattributes"} == FILES
    for name in ("model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        assert files[name] == (shared / name).read_bytes()
    card = files["README.md"].decode()
    assert 'from_pretrained("me/first")' in card and "| data | noise |" in card
    same_model(make_model(), mm.load(tmp_path / "again"))

    done = python(LOAD, tmp_path / "offline", **env, HF_HUB_OFFLINE="1")
    assert done.returncode == 0, done.stderr
    same_model(make_model(), mm.load(tmp_path / "offline"))
