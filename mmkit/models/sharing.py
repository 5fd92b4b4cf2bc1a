"""A model as a folder to share: safetensors, JSON, a tokenizer, a card; nothing that can hold code.

`save_pretrained` writes the folder, `from_pretrained` reads it from a disk or a hub, and
`push_to_hub` uses the hub's own mixin. Only a complete folder is read: config.json, which is
written last, has checksums of weights and tokenizer. Walk-through: notebooks/05_checkpoints.ipynb.
"""

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..data.tokenizer import TOKEN_NAMES
from ..files import sync, unfinished_folder
from ..older_names import older_arguments
from .model_card import model_card, training_metadata

CONFIG, WEIGHTS, CARD = "config.json", "model.safetensors", "README.md"
TOKENIZER, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"
_READ = (CONFIG, WEIGHTS, TOKENIZER, TOKENIZER_CONFIG)  # nothing else is downloaded
_FORMAT = 1
_EXACT = (torch.float32, torch.float16, torch.bfloat16)  # exact in float32


class Exportable:
    """Saving, loading and upload of a model that has `architecture` and `from_architecture`."""

    @older_arguments(facts="metadata")
    def save_pretrained(
        self, save_directory: str | os.PathLike, metadata: dict | None = None
    ) -> None:
        """Write the model to a folder that `from_pretrained` and `mm.load` read.

        metadata: what its card says about its training, `run.metadata` (or
        `read_checkpoint(path)`). A README.md that mmkit did not write, or that was edited since, is
        kept. Files are written to a temporary folder and then renamed, so that a full disk leaves
        an earlier export whole. Of several processes, only one may call it. Raises ValueError if
        the folder holds something else, and for weights that float32 cannot represent.
        """
        save_folder(self, Path(save_directory), metadata)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike,
        *,
        device: str | torch.device = "cpu",
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
    ):
        """The model of a folder, or of a hub by its name ("owner/name"), in evaluation mode.

        Weights are float32 and exact. The other options are those of
        `huggingface_hub.snapshot_download`. Never runs code from a file. Raises FileNotFoundError
        if something is missing, ValueError if something is damaged or of another model.
        """
        hub = dict(revision=revision, token=token, cache_dir=cache_dir)
        hub |= dict(force_download=force_download, local_files_only=local_files_only)
        folder = _folder(pretrained_model_name_or_path, hub)
        return load_folder(cls, folder).to_device(device).eval()

    @older_arguments(facts="metadata")
    def push_to_hub(self, repo_id: str, metadata: dict | None = None, **options) -> str:
        """Upload the folder that `save_pretrained` writes; return the address of the commit.

        options: those of `huggingface_hub.ModelHubMixin.push_to_hub` (private, token, branch,
        create_pr, commit_message, …). `ignore_patterns="README.md"` keeps the card on the hub.
        """
        # Not a base class: importing it would nearly double the time of `import mmkit`, and it
        # would keep every argument of __init__.
        from huggingface_hub import ModelHubMixin

        model = self

        class Shared(ModelHubMixin):
            def _save_pretrained(self, save_directory: Path) -> None:
                write_files(model, save_directory, repo_id, metadata)

        return Shared().push_to_hub(repo_id, **options)


# -- writing ---------------------------------------------------------------------------------


def save_folder(model: Any, folder: Path, metadata: dict | None) -> None:
    """Write a model's files to a temporary folder, then rename them into the folder."""
    _check_free(folder)
    for stale in folder.glob(".export-*"):  # left by a killed process
        shutil.rmtree(stale)
    with unfinished_folder(folder, ".export-") as unfinished:
        write_files(model, unfinished, folder.name or "model", metadata)
        _rename_over(unfinished, folder)


def _check_free(folder: Path) -> None:
    """ValueError if an export would overwrite anything other than an export."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; give the name of a folder")
    if (folder / CONFIG).exists() and not _own_config(folder):
        raise ValueError(
            f"{folder} holds a {CONFIG} of something else, which would be overwritten; give "
            "another folder"
        )


def _own_config(folder: Path) -> dict:
    """The config.json of an export, {} if there is none."""
    try:
        return read_config(folder)
    except (ValueError, FileNotFoundError):
        return {}


def write_files(model: Any, folder: Path, name: str, metadata: dict | None) -> None:
    """Write all files of a model into an empty folder, synced, config.json last."""
    from safetensors.torch import save_file

    architecture, training = model.architecture(), training_metadata(metadata)
    tokenizer = architecture.pop("tokenizer")
    save_file(_weights(model), folder / WEIGHTS, metadata={"format": "pt"})
    (folder / TOKENIZER).write_text(tokenizer["json"], encoding="utf-8")
    of_tokenizer = {"tokenizer_class": "PreTrainedTokenizerFast"}
    of_tokenizer |= {"model_max_length": model.max_length, **tokenizer["special_tokens"]}
    _write_json(of_tokenizer, folder / TOKENIZER_CONFIG)
    (folder / CARD).write_text(model_card(model, name, training), encoding="utf-8")
    sums = {file: _sha256(folder / file) for file in (WEIGHTS, TOKENIZER, CARD)}
    head = {"model_type": "mmkit", "format": _FORMAT}
    config = head | {"architecture": architecture, "training": training, "sha256": sums}
    _write_json(config, folder / CONFIG)
    # safetensors makes its file readable for its owner only.
    (folder / WEIGHTS).chmod((folder / CONFIG).stat().st_mode)
    for path in folder.iterdir():
        sync(path)


def _weights(model: Any) -> dict[str, Tensor]:
    """The state dict on the CPU, under the model's own names, each tensor in its own memory.

    safetensors refuses tensors that share memory, such as tied ones: each name gets a copy.
    """
    weights, addresses = {}, set()
    for name, tensor in model.state_dict().items():
        if tensor.dtype not in _EXACT:
            raise ValueError(
                f"{name!r} is {tensor.dtype}, which float32 does not represent exactly; call "
                "model.float() first"
            )
        tensor = tensor.detach().cpu().contiguous()
        storage = tensor.untyped_storage()
        if storage.data_ptr() in addresses or storage.nbytes() != tensor.nbytes:
            tensor = tensor.clone()
        addresses.add(tensor.untyped_storage().data_ptr())
        weights[name.replace("_orig_mod.", "")] = tensor  # added by torch.compile
    return weights


def _rename_over(unfinished: Path, folder: Path) -> None:
    """Replace old files by new ones, the weights first and config.json last.

    If the process is killed in between, config.json does not have the checksum of the weights, and
    the folder is refused.
    """
    written = _own_config(folder).get("sha256", {}).get(CARD)
    if (folder / CARD).exists() and _sha256(folder / CARD) != written:
        (unfinished / CARD).unlink()  # edited by the user
    for name in (WEIGHTS, TOKENIZER, TOKENIZER_CONFIG, CARD, CONFIG):
        if (unfinished / name).exists():
            os.replace(unfinished / name, folder / name)
    sync(folder)


def _write_json(values: dict, path: Path) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# -- reading ---------------------------------------------------------------------------------


def _folder(name: str | os.PathLike, hub: dict) -> Path:
    """The folder of this name, or the downloaded files of a hub."""
    if os.path.isdir(name):
        return Path(name)
    if os.path.exists(name):
        file = os.fspath(name)
        raise ValueError(f"{file} is a file; give the folder it is in, or use mm.load({file!r})")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(os.fspath(name), allow_patterns=list(_READ), **hub))
    except (OSError, ValueError) as error:  # no such name, no network, no permission
        reason = " ".join(str(error).split())[:300]
        raise FileNotFoundError(
            f"no model {os.fspath(name)!r}: there is no such folder, and the hub has none of that "
            f"name ({reason}); check the path, or the name (owner/name) and your access to it"
        ) from None


def load_folder(model_class: Any, folder: Path):
    """The model in a folder; before it is built, its architecture is compared with the weights."""
    from safetensors.torch import load_file

    config = read_config(folder)
    for name in _READ:
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} has no {name}; {_remedy(folder)}")
    tokenizer = {"json": _read_text(folder / TOKENIZER), "special_tokens": _special_tokens(folder)}
    spec = {**config["architecture"], "tokenizer": tokenizer}
    _check_sum(folder, config, TOKENIZER)
    shapes = _read_shapes(folder / WEIGHTS)
    with torch.device("meta"):  # takes no memory, whatever its size
        planned = _build(model_class, spec, folder, len(shapes)).state_dict()
    _compare(folder, {name: tuple(tensor.shape) for name, tensor in planned.items()}, shapes)
    _check_sum(folder, config, WEIGHTS)
    model = _build(model_class, spec, folder, len(shapes))
    model.load_state_dict(load_file(folder / WEIGHTS))
    return model


def read_config(folder: Path) -> dict:
    """The config.json of an export; FileNotFoundError or ValueError if there is none."""
    path = folder / CONFIG
    if not path.is_file():
        raise FileNotFoundError(f"{folder} has no {CONFIG}; {_remedy(folder)}")
    config = _read_json(path)
    if (kind := config.get("model_type")) != "mmkit":
        whose = f"of a {kind!r} model, not of an mmkit model" if kind else "not of an mmkit model"
        raise ValueError(f"{path} is {whose}; {_remedy(folder)}")
    if config.get("format") != _FORMAT:
        raise ValueError(
            f"{path} has format {config.get('format')!r}, this mmkit reads {_FORMAT}; update mmkit"
        )
    for key in ("architecture", "training", "sha256"):
        if not isinstance(config.get(key), dict):
            raise ValueError(f"{path} is damaged ({key!r} is no table); get the file again")
    return config


def _remedy(folder: Path) -> str:
    """What to do instead, by the files in the folder."""
    if (folder / "best_model.pth").is_file():
        return f"it is a run's folder: use mm.load('{folder}/best_model.pth')"
    suffixes = (".bin", ".pth", ".pt", ".pkl", ".pickle", ".ckpt")
    pickles = sorted(path.name for path in folder.glob("*") if path.suffix in suffixes)
    if pickles:
        return f"{pickles[0]} is not read, since such a file can run code: ask for a {WEIGHTS}"
    return "give a complete folder from save_pretrained (for towers alone: from_backbones)"


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"{path} is damaged (no text); get the file again") from None


def _read_json(path: Path) -> dict:
    text = _read_text(path)
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({error}); get the file again") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds a {type(values).__name__}, no settings; get the file again")
    return values


def _special_tokens(folder: Path) -> dict:
    """The names of the special tokens in tokenizer_config.json, and no other setting."""
    values = _read_json(folder / TOKENIZER_CONFIG)
    return {name: values[name] for name in TOKEN_NAMES if values.get(name)}


def _read_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor, from the file's header; ValueError for an incomplete file."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            parts = {name: file.get_slice(name) for name in file.keys()}
            kinds = {part.get_dtype() for part in parts.values()}
            shapes = {name: tuple(part.get_shape()) for name, part in parts.items()}
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{path} is refused: it is damaged or cut off ({error}); get the file again"
        ) from None
    if foreign := kinds - {"F32", "F16", "BF16"}:
        raise ValueError(
            f"{path} holds numbers of type {min(foreign)}, which float32 does not represent; save "
            "it as F32, F16 or BF16"
        )
    return shapes


def _check_sum(folder: Path, config: dict, name: str) -> None:
    """ValueError unless a file is, bit for bit, the one that config.json was written for."""
    if config["sha256"].get(name) != _sha256(folder / name):
        raise ValueError(
            f"{folder / name} is damaged, or of another model than the {CONFIG} beside it (its "
            "sha256 differs); get both again"
        )


def _build(model_class: Any, spec: dict, folder: Path, num_tensors: int):
    """The model of an architecture; ValueError if it describes none."""
    try:
        for tower in ("vit", "bert"):
            if spec[tower].get("num_hidden_layers", 0) > num_tensors:  # would take forever
                raise ValueError(f"more {tower} layers than {WEIGHTS} has tensors")
        heads = spec.get("decoder") or {}
        for name in ("pixel_depth", "word_depth"):
            if heads.get(name, 0) > num_tensors:
                raise ValueError(f"a decoder of more layers ({name}) than {WEIGHTS} has tensors")
        return model_class.from_architecture(spec)
    except Exception as error:  # a wrong setting can raise anything
        reason = " ".join(str(error).split())[:300]
        raise ValueError(
            f"{folder / CONFIG} describes no model that can be built ({type(error).__name__}: "
            f"{reason}); get the folder again"
        ) from None


def _compare(folder: Path, wanted: dict, given: dict) -> None:
    """ValueError naming the first tensor in which weights and architecture differ."""
    for name in wanted | given:
        if wanted.get(name) != given.get(name):
            raise ValueError(
                f"{folder / WEIGHTS} is of another architecture than the {CONFIG}: {name!r} "
                f"is {given.get(name, 'missing')} there, {wanted.get(name, 'unknown')} here; get "
                "both from one export"
            )
