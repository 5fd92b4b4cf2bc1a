"""A shared model comes back bit for bit; damaged, foreign or hostile files are refused."""

import contextlib
import copy
import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import mmkit as mm
from mmkit.data.batch import Batch
from mmkit.data.tokenizer import encode_texts
from mmkit.files import write_atomically
from mmkit.masking.plan import draw_maskings
from mmkit.models.decoder import ForwardSpec
from tests.models.damages import DAMAGES, OF_DECODER, only_a_pickle
from tests.models.folders import (
    FILES,
    METADATA,
    TEXTS,
    edit,
    features,
    names,
    same_model,
    save_towers,
    unlike_new,
)
from tests.models.hostile import KERNEL, make_hostile
from tests.small_hub import SmallHub

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


@pytest.mark.parametrize("name", DAMAGES)
def test_what_is_damaged_or_foreign_is_refused(shared, name):
    """The message names the file, whichever way it is read."""
    damage, message = DAMAGES[name]
    damage(shared)
    for read in (mm.load, mm.MultimodalEncoder.from_pretrained):
        with pytest.raises(ValueError, match=message) as refused:
            read(shared)
        assert str(shared) in str(refused.value)


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
