"""Is it the same experiment? What a run's result depends on, as plain values to store and compare.

Images are compared by the names, sizes and times of their files and, where these differ, by their
contents; functions by their code, constants and everything that they refer to, wherever they are
defined. resume.py refuses a run that is another experiment.
Walk-through: notebooks/05_checkpoints.ipynb.
"""

import hashlib
import json
import os
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..data.clusters import number
from ..data.dataset import HASH_BYTES, MultimodalDataset
from ..data.image_cache import content_hashes
from ..older_names import current_keys
from .function_identity import FUNCTIONS, function_identity

SAMPLE = 10_000  # images that are compared by content where all of them would take too long
# Entries of a tower's configuration that do not change what it computes.
_NO_MATTER = set(
    "transformers_version _name_or_path architectures dtype torch_dtype use_cache id2label "
    "label2id return_dict output_attentions output_hidden_states initializer_range problem_type "
    "model_type _attn_implementation attn_implementation".split()
)
Differences = tuple[list[str], list[str]]  # messages: what differs; what could not be compared


def of_run(trainer) -> dict[str, Any]:
    """Everything that a run's result depends on besides its configuration, as plain values.

    The contents of files are left out; `add_contents` adds them.
    """
    model, config = trainer.model, trainer.config
    found: dict[str, Any] = {"architecture": _architecture(model), "functions": {}, "tokens": {}}
    for name, data in (("train", trainer.train), ("val", trainer.val)):
        found[name] = None if data is None else of_data(data)
        found["tokens"][name] = "" if data is None else _digest(*data.encoded_captions()[:2])
    vocabulary = [sorted(model.tokenizer.get_vocab().items()), model.special_ids.tolist()]
    found["tokens"]["vocabulary"] = _digest(vocabulary)
    for name, known in FUNCTIONS.items():
        value = getattr(config, name)
        shown = f"function {getattr(value, '__name__', type(value).__name__)}"
        identity = function_identity(value if callable(value) else known.get(value, value))
        found["functions"][name] = {"name": shown if callable(value) else value, "is": identity}
    found["computed"] = f"{trainer.precision or torch.float32} on {trainer.device.type}"
    return found


def _architecture(model) -> dict[str, Any]:
    """What the encoder computes, apart from its weights: {"vit.num_attention_heads": 3, …}."""
    spec: dict[str, Any] = {"pooling": model.pooling, "embed_dim": model.embed_dim}
    for name in ("vit", "bert"):
        values = json.loads(json.dumps(getattr(model, name).config.to_dict(), default=str))
        spec |= {f"{name}.{k}": value for k, value in values.items() if k not in _NO_MATTER}
    spec["decoder"] = None if model.decoder is None else json.dumps(model.decoder.spec)
    for name, part in model.named_modules():  # it may have been set by hand
        if isinstance(part, nn.modules.dropout._DropoutNd):
            spec[f"dropout of {name}"] = part.p
    fixed = [name for name, weight in model.named_parameters() if not weight.requires_grad]
    spec["weights that never learn"] = f"{len(fixed)} ({_digest(fixed)})" if fixed else "none"
    return spec


def _digest(*parts) -> str:
    """16 hex digits of tensors, and of other values that their repr identifies."""
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        if isinstance(part, Tensor):
            array = np.ascontiguousarray(part.detach().cpu().numpy())
            digest.update(f"{array.dtype} {array.shape}".encode())
            digest.update(array.reshape(-1).view(np.uint8).data)
        else:
            digest.update(repr(part).encode("utf-8", "backslashreplace"))
    return digest.hexdigest()


# ---- data ----------------------------------------------------------------------------------------


def of_data(data: MultimodalDataset) -> dict[str, Any]:
    """What identifies a data set: its ids and captions, its images and how they are read."""
    # A user's transform may have drawn the pixels that are kept in memory.
    in_memory = data._store is None or (data.resident and data.side is None)
    images: dict[str, Any] = {"in_memory": in_memory, "files": "", "sizes": "", "cut": ""}
    if data._store is not None:
        own = "" if data.side else function_identity(data.transform)
        images["cut"] = own or f"squares of {data.side} pixels"
        images["background"] = list(data.reading.background)
    images["one_image"] = _digest(number(data.image_ids.tolist()))  # rows with the same image
    if hasattr(data._store, "order"):  # shards are read in an order of their own
        images["order"] = _digest(data.epoch_rows(0, 0, 1)[0])
    if in_memory:
        images |= {"every": 1, "contents": _pixels(data)}
    else:
        images |= {"every": _every(data), "contents": ""} | _files(data)
    metadata = {"name": data.name, "count": len(data), "fingerprint": data.fingerprint()}
    return metadata | {"images": images}


def _files(data: MultimodalDataset) -> dict[str, str]:
    """Digests of file names (below their common folder) with sizes, and of these with times.

    {} where a store does not know them.
    """
    store, rows = data._store, data._rows.tolist()
    assert store is not None
    names = [store.name(i).replace(os.sep, "/") for i in rows]
    stamps = [store.stamp(i).split(":") for i in rows]
    if any(len(stamp) < 2 for stamp in stamps):
        return {}
    shared = os.path.commonprefix([min(names), max(names)])  # noqa: RUF071 (cut at a slash)
    start = len(shared.rpartition("/")[0])
    sizes = [[name[start:], stamp[0]] for name, stamp in zip(names, stamps, strict=True)]
    return {"sizes": _digest(sizes), "files": _digest(sizes, [stamp[1] for stamp in stamps])}


def _every(data: MultimodalDataset) -> int:
    """The interval of images whose contents are compared: 1 = all images, 0 = none."""
    if data.report is not None and data.report.checked == "none":
        return 0  # images were not to be opened
    return -(-len(data) // SAMPLE) if data.expensive else 1


def _contents(data: MultimodalDataset, every: int) -> str:
    """Digest of the bytes of each `every`-th image; they are read once and cached."""
    if not every:
        return ""
    assert data._store is not None
    return _digest(content_hashes(data._store, data._rows[::every].tolist(), data.cache_dir))


def _pixels(data: MultimodalDataset) -> str:
    """Digest of the pixels, or of an even sample of images where all exceed `HASH_BYTES`."""
    size = len(data) * data._take(np.array([0])).nbytes
    rows = np.arange(0, len(data), -(-size // HASH_BYTES))
    parts = [rows[start : start + 256] for start in range(0, len(rows), 256)]
    return _digest([_digest(data._take(part)) for part in parts])


def add_contents(identity: dict, trainer) -> None:
    """Add the contents of files, where they are unknown yet, to the result of `of_run`."""
    for name in ("train", "val"):
        if identity[name] and not identity[name]["images"]["contents"]:
            images = identity[name]["images"]
            images["contents"] = _contents(getattr(trainer, name), images["every"])


# ---- comparison ----------------------------------------------------------------------------------


def compare(then: dict, now: dict, trainer) -> Differences:
    """Compare the result of `of_run` now with the stored one.

    Args:
        then: the stored result.
        now: the present result; contents that had to be read are added to it.
        trainer: a MaskedMultimodalTrainer, whose images may be read.
    Returns:
        Messages on what differs, and on what could not be compared.
    """
    differs: list[str] = []
    unsure: list[str] = []
    for name, label in (("train", "training"), ("val", "validation")):
        old, new, data = then[name], now[name], getattr(trainer, name)
        if old is not None and new is not None:
            found = compare_data(old, new, data)
            differs += [f"{label} {difference}" for difference in found[0]]
            unsure += [f"{label} {difference}" for difference in found[1]]
        elif old is not new:
            counts = [f"{one['count']:,} images" if one else "none" for one in (old, new)]
            differs.append(f"{label} set: {' -> '.join(counts)}")
    old, new = then["architecture"], now["architecture"]
    changed = [name for name in old if name in new and old[name] != new[name]]
    differs += [f"{name}: {old[name]!r} -> {new[name]!r}" for name in changed[:5]]
    differs += [f"{len(changed) - 5} more settings of the model"] if changed[5:] else []
    if other_tokens(then, now):
        differs.append("tokenizer: it gives other tokens")
    functions = current_keys(then["functions"])
    for name, new in now["functions"].items():
        old = functions.get(name, new)
        same = _same_function(old["is"], new["is"])
        if same is None:
            why = next((f["is"] for f in (old, new) if f["is"].startswith("?")), "? another Python")
            unsure.append(f"{name} ({new['name']}) cannot be compared: {why[2:]}")
        elif not same and ("mask" not in name or old["name"] == new["name"]):  # else see config
            also = " (another one of this name)" if old["name"] == new["name"] else ""
            differs.append(f"{name}: {old['name']} -> {new['name']}{also}")
    return differs, unsure


def other_tokens(then: dict, now: dict) -> bool:
    """Whether the tokenizer differs: in the ids of tokens, or in the tokens of a caption."""
    sets = [name for name in ("train", "val") if then[name] and now[name]]
    alike = [name for name in sets if then[name]["fingerprint"] == now[name]["fingerprint"]]
    return any(then["tokens"][name] != now["tokens"][name] for name in ["vocabulary", *alike])


def _same_function(old: str, new: str) -> bool | None:
    """Whether two identities are equal; None where one is unknown or the Pythons differ."""
    unknown = old.startswith("?") or new.startswith("?")
    pythons = [one.partition(":")[0] for one in (old, new) if ":" in one]
    return None if unknown or len(set(pythons)) == 2 else old == new


def compare_data(then: dict, now: dict, data: MultimodalDataset) -> Differences:
    """Compare the result of `of_data` now with a stored one.

    Args:
        then: the stored result; older versions stored name and fingerprint only.
        now: the present result; contents that had to be read are added to it.
        data: the data set now.
    Returns:
        Messages on what differs, and on what could not be compared.
    """
    if then.get("fingerprint") != now["fingerprint"]:
        was = f"{then['count']:,} images" if "count" in then else then.get("name") or "unnamed"
        return [f"captions or sample ids: {was} -> {now['count']:,} images"], []
    if "images" not in then:
        return [], ["images were not checked: the version that saved this did not record them"]
    old, new = then["images"], now["images"]
    if old["in_memory"] != new["in_memory"]:
        where = {True: "in memory", False: "in files"}
        return [f"images: {where[old['in_memory']]} -> {where[new['in_memory']]}"], []
    differs, unsure = [], []
    if (same := _same_function(old["cut"], new["cut"])) is None:
        unsure.append(f"transform cannot be compared: {new['cut'].removeprefix('? ')}")
    elif not same:
        differs.append("images are cut by another image_size or transform")
    for name, message in (
        ("background", "images have another background"),
        ("order", "images are in other shards"),
        ("one_image", "which rows count as the same image"),
    ):
        if old.get(name) != new.get(name):
            differs.append(message)
    if not old["files"] or old["files"] != new["files"]:
        differs += _compare_contents(old, new, data, unsure)
    else:  # the contents need not be read
        new |= {"every": old["every"], "contents": old["contents"]}
    return differs, unsure


def _compare_contents(old: dict, new: dict, data: MultimodalDataset, unsure: list) -> list[str]:
    """A message on how the images differ, or none; reads them where that was done before."""
    if not old["contents"]:
        if old["sizes"] and old["sizes"] == new["sizes"]:
            unsure.append("images were compared by names and sizes only, since their times differ")
            return []
        if old["sizes"]:
            return ["images: names or sizes of their files"]
        unsure.append("images were not checked: that would mean reading them all")
        return []
    if not old["in_memory"]:
        new |= {"every": old["every"], "contents": _contents(data, old["every"])}
    return [] if old["contents"] == new["contents"] else ["images: their contents"]
