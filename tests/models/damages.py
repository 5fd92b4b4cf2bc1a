"""What can be wrong with a shared model's folder, and the message that says so."""

import torch
from safetensors.torch import load_file, save_file

import mmkit as mm
from tests.models.folders import edit


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
