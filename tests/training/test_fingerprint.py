"""Only the same experiment is resumed; a refusal names what differs."""

import dataclasses
import functools
import os
import shutil
import threading
import time
import types

import numpy as np
import pytest
import torch
from PIL import Image

import mmkit as mm
from mmkit.data.images import square
from mmkit.files import write_atomically
from mmkit.masking.image import IMAGE_MASKERS, random_mask
from mmkit.models.checkpoint import read_checkpoint
from mmkit.training import fingerprint
from tests.conftest import captions
from tests.training.user_functions import scaled

# ---- a resumed run -------------------------------------------------------------------------------


def pixels_of(data) -> torch.Tensor:
    return data.batch(range(len(data))).pixel_values


def with_pixels(data, pixels, **options):
    options = dict(tokenizer=data.tokenizer) | options
    return mm.MultimodalDataset.from_pixels(pixels, data.texts, **options)


def permuted(tokenizer):
    """A tokenizer of the same size with the ids of two words swapped."""
    from mmkit.data.tokenizer import tokenizer_from_state, tokenizer_state

    state = tokenizer_state(tokenizer)
    for old, new in (('"red"', '"@"'), ('"green"', '"red"'), ('"@"', '"green"')):
        assert old in state["json"]
        state["json"] = state["json"].replace(old, new)
    return tokenizer_from_state(state)


@pytest.mark.parametrize(
    "change, words",
    [
        ("pixels", "other images or captions .training images: their contents"),
        ("one pixel", "other images or captions .training images: their contents"),
        ("sample ids", "other images or captions .training captions or sample ids"),
        ("validation pixels", "validation images: their contents"),
        ("another validation set", "validation captions or sample ids: 7 images -> 11 images"),
        ("no validation set", "validation set: 7 images -> none"),
        ("pooling", "pooling: 'mean' -> 'cls'"),
        ("heads", "vit.num_attention_heads: 2 -> 11"),
        ("width", "embed_dim: 13 -> 17"),
        ("dropout", "vit.hidden_dropout_prob: 0.0 -> 0.2.*more settings of the model"),
        ("dropout by hand", "dropout of image_projection.1: 0.0 -> 0.5"),
        ("norm", "layer_norm_eps"),
        ("frozen", "weights that never learn: 'none' -> '3 "),
        ("tokenizer", "tokenizer: it gives other tokens"),
        (
            "schedule",
            r"schedule: function <lambda> -> function <lambda> \(another one of this name\)",
        ),
        ("a registered schedule", "schedule: function <lambda> -> linear"),
        ("term schedule", "mim_schedule: constant -> function linear"),
        ("partial optimizer", r"optimizer: function partial -> function partial \(another"),
        ("masker", r"image_mask: mine -> mine \(another one of this name\)"),
    ],
)
def test_another_experiment_is_refused_by_name(stopped, make_model, make_data, change, words):
    train, usual = make_data(23), dict(schedule=scaled(1.0))
    if change == "masker":
        IMAGE_MASKERS["mine"] = lambda noise, ratio, scene: random_mask(noise, ratio, scene)
        usual["image_mask"] = "mine"
    if change == "partial optimizer":
        usual["optimizer"] = functools.partial(torch.optim.SGD, lr=0.01, momentum=0.9)
    make, now = stopped(**usual), {}
    pixels = pixels_of(train)
    if change == "pixels":
        now["data"] = make_data(23, seed=5)
    elif change == "one pixel":
        pixels[11, 1, 3, 7] += 1
        now["data"] = with_pixels(train, pixels)
    elif change == "sample ids":
        now["data"] = with_pixels(train, pixels, sample_ids=range(100, 123))
    elif change == "validation pixels":
        now["val"] = make_data(7, seed=2)
    elif change == "another validation set":
        now["val"] = make_data(11, seed=1)
    elif change == "no validation set":
        now["val"] = None
    elif change == "pooling":
        now["model"] = make_model(pooling="cls")
    elif change == "heads":
        now["model"] = make_model()
        for tower in (now["model"].vit, now["model"].bert):
            tower.config.num_attention_heads = 11
    elif change == "width":
        now["model"] = make_model()
        now["model"].embed_dim = 17
        for part in (now["model"].image_projection, now["model"].text_projection):
            part[2] = torch.nn.Linear(22, 17, bias=False)
    elif change == "dropout":
        now["model"] = make_model(dropout=0.2)
    elif change == "dropout by hand":
        now["model"] = make_model()
        now["model"].image_projection[1].p = 0.5
    elif change == "norm":
        now["model"] = make_model()
        now["model"].bert.config.layer_norm_eps = 1e-3
    elif change == "frozen":
        now["model"] = make_model()
        now["model"].image_projection.requires_grad_(False)
    elif change == "tokenizer":
        other = permuted(train.tokenizer)
        now = dict(model=make_model(), val=with_pixels(make_data(7), pixels[:7], tokenizer=other))
        now["model"].tokenizer = other
        now["data"] = with_pixels(train, pixels, tokenizer=other)
        now["val"] = with_pixels(make_data(7), pixels_of(make_data(7, seed=1)), tokenizer=other)
    elif change == "schedule":
        now["schedule"] = scaled(0.5)
    elif change == "a registered schedule":
        now["schedule"] = "linear"
    elif change == "term schedule":
        now["mim_schedule"] = mm.schedules.linear
    elif change == "partial optimizer":
        now["optimizer"] = functools.partial(torch.optim.SGD, lr=0.02, momentum=0.9)
    elif change == "masker":
        IMAGE_MASKERS["mine"] = lambda noise, ratio, scene: random_mask(noise, ratio / 2, scene)
    try:
        with pytest.raises(ValueError, match=words) as refused:
            make(**usual | now)
    finally:
        IMAGE_MASKERS.pop("mine", None)
    no_fork = change in ("tokenizer", "width")
    fork = "a fork cannot have" if no_fork else "or fork it, which starts another run"
    assert str(refused.value).startswith("cannot resume") and fork in str(refused.value)


def test_the_same_experiment_goes_on_without_a_word(stopped, make_data, make_model, capsys):
    """All rebuilt; a function by its registered name; other names of sets; views."""
    make = stopped(
        schedule=mm.schedules.linear, optimizer=functools.partial(torch.optim.SGD, lr=0.1)
    )
    capsys.readouterr()
    train = make_data(23, name="elsewhere").subset(range(23))
    optimizer = functools.partial(torch.optim.SGD, lr=0.1)
    trainer = make(data=train, schedule="linear", optimizer=optimizer, num_workers=0)
    assert trainer.step == 6
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 1 and said[0].endswith("at step 6 of 16")


def test_a_function_that_cannot_be_compared_is_said(stopped, capsys):
    lock = threading.Lock()
    make = stopped(schedule=lambda p: 1 - p if lock else 0.0)
    assert make(schedule=lambda p: 1 - p if lock else 0.0).step == 6
    assert "beware      schedule (function <lambda>) cannot be compared: it refers to a lock" in (
        capsys.readouterr().out
    )


def test_byte_code_of_another_python_is_not_compared(stopped, tmp_path, capsys):
    make = stopped(schedule=scaled(1.0))
    path = tmp_path / "run/last/state.pth"
    state = read_checkpoint(path)
    state["identity"]["functions"]["schedule"]["is"] = "3.1:0123456789abcdef"
    write_atomically(state, path)
    assert make(schedule=scaled(1.0)).step == 6
    assert "schedule (function <lambda>) cannot be compared: another Python" in (
        capsys.readouterr().out
    )


def test_a_run_from_before_this_fingerprint_goes_on_with_a_word(
    stopped, make_data, tmp_path, capsys
):
    make = stopped()
    path = tmp_path / "run/last/state.pth"
    state = read_checkpoint(path)
    del state["identity"]
    state["data"] = {name: state["data"][name] for name in ("name", "fingerprint")}
    write_atomically(state, path)
    capsys.readouterr()
    assert make(data=make_data(23, seed=5), val=None).step == 6
    said = capsys.readouterr().out
    assert "beware      training images were not checked" in said
    assert "nor were the validation set, the model, its tokenizer and functions" in said
    with pytest.raises(ValueError, match="training captions or sample ids: unnamed -> 29 images"):
        make(data=make_data(29))


# ---- image files ---------------------------------------------------------------------------------


@pytest.fixture
def in_files(tmp_path, tokenizer):
    """f(folder) is a data set of 23 images in files, which are written if missing."""

    def make(folder="images", **options):
        root = tmp_path / folder
        for row in range(23):
            file = root / f"sub{row % 3}" / f"{row}.bmp"  # all of the same size
            if not file.exists():
                file.parent.mkdir(parents=True, exist_ok=True)
                generator = np.random.default_rng(row)
                Image.fromarray(generator.integers(0, 256, (15, 15, 3), np.uint8)).save(file)
                os.utime(file, (1e9, 1e9))
        paths = [root / f"sub{row % 3}" / f"{row}.bmp" for row in range(23)]
        options = dict(image_size=15, tokenizer=tokenizer) | options
        return mm.MultimodalDataset(paths, captions(23), **options)

    return make


@pytest.fixture
def reads(monkeypatch, tmp_path):
    """Count the images read for their contents; all files count as written long ago."""
    seen, real, now = [], mm.data.image_cache.content_hash, time.time_ns
    monkeypatch.setenv("MMKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(mm.data.image_cache.time, "time_ns", lambda: now() + 10**10)
    monkeypatch.setattr(
        mm.data.image_cache, "content_hash", lambda *args: (seen.append(args), real(*args))[1]
    )
    return seen


def test_image_files_are_known_by_their_state_and_else_by_their_contents(
    stopped, in_files, tmp_path, reads
):
    make = stopped(data=in_files())
    assert len(reads) == 23  # for the overlap of both sets and for the fingerprint, once
    root = tmp_path / "images"
    assert make(data=in_files()).step == 6
    shutil.move(root, tmp_path / "moved")  # another folder, the same times
    assert make(data=in_files("moved")).step == 6
    assert len(reads) == 23  # nothing had to be read for any of this
    for file in (tmp_path / "moved").rglob("*.bmp"):
        os.utime(file, (2e9, 2e9))
    assert make(data=in_files("moved")).step == 6  # the same bytes
    assert make(data=in_files("moved", device="cpu")).step == 6
    assert len(reads) == 2 * 23  # once each

    file = tmp_path / "moved/sub2/5.bmp"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(ValueError, match="training images: their contents"):
        make(data=in_files("moved"))
    file.write_bytes(whole)
    assert make(data=in_files("moved")).step == 6
    other = tmp_path / "moved/sub1/7.bmp"
    os.rename(file, tmp_path / "swap")
    os.rename(other, file)
    os.rename(tmp_path / "swap", other)
    with pytest.raises(ValueError, match="training images: their contents"):
        make(data=in_files("moved"))


def test_how_images_are_read_counts(stopped, in_files):
    """A user's transform is compared by what it computes, in memory as well."""

    def cut(by):
        return lambda image: square(15)(image).float() / by

    make = stopped(data=in_files(transform=cut(255)), val=None)
    assert make(data=in_files(transform=cut(255)), val=None).step == 6
    with pytest.raises(ValueError, match="cut by another image_size or transform"):
        make(data=in_files(transform=cut(127)), val=None)
    with pytest.raises(ValueError, match="cut by another image_size or transform"):
        make(data=in_files(), val=None)
    dark = in_files(transform=cut(255))
    dark.reading = dataclasses.replace(dark.reading, background=(0, 0, 0))
    with pytest.raises(ValueError, match="images have another background"):
        make(data=dark, val=None)


def test_of_very_many_images_a_sample_is_compared(in_files, monkeypatch, reads):
    """No image is read where that was ruled out; names and sizes are compared, with a warning."""
    monkeypatch.setattr(fingerprint, "SAMPLE", 5)
    monkeypatch.setattr(mm.MultimodalDataset, "expensive", True)
    data = in_files()
    then = {"train": fingerprint.of_data(data), "val": None}
    trainer = types.SimpleNamespace(train=data)
    fingerprint.add_contents(then, trainer)
    assert then["train"]["images"]["every"] == 5 and len(reads) == 5
    for row, same in ((4, True), (5, False)):
        file = data._store.paths[row]
        content = bytearray(open(file, "rb").read())
        content[-1] ^= 1
        with open(file, "wb") as changed:
            changed.write(content)
        found = fingerprint.compare_data(then["train"], fingerprint.of_data(data), data)
        assert (found == ([], [])) == same, row
    unread = {**then["train"], "images": then["train"]["images"] | {"contents": "", "every": 0}}
    differs, unsure = fingerprint.compare_data(unread, fingerprint.of_data(data), data)
    assert not differs and "compared by names and sizes only" in unsure[0]


def test_shards_dealt_out_in_another_order_are_another_set(make_data, tmp_path):
    """The same images and captions in shards of another size give other batches."""
    from tests.train_small import data as small

    found = []
    for size in (7, 5):
        folder = tmp_path / f"by{size}"
        mm.write_shards(small(53), folder, samples_per_shard=size)
        data = mm.from_shards(folder, image_size=15, cache_dir=tmp_path / "cache")
        found.append((fingerprint.of_data(data), data))
    differs, _ = fingerprint.compare_data(found[0][0], *found[1])
    assert "images are in other shards" in differs
    assert fingerprint.compare_data(found[0][0], fingerprint.of_data(found[0][1]), found[0][1]) == (
        [],
        [],
    )


def test_rows_that_count_as_one_image_are_part_of_a_set(make_data):
    """Rows of one image are partners of each other's captions; their numbers do not matter."""
    data = make_data(23)
    then = fingerprint.of_data(data.subset(range(11)))
    part = make_data(23).subset(range(11))
    part.same_images([f"image {row}" for row in range(11)])
    assert fingerprint.compare_data(then, fingerprint.of_data(part), part) == ([], [])
    part.same_images([f"image {max(row, 3)}" for row in range(11)])
    differs, _ = fingerprint.compare_data(then, fingerprint.of_data(part), part)
    assert differs == ["which rows count as the same image"]
