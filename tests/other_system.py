"""A program that uses mmkit without Linux's own calls, as on Windows, and prints what it found.

    python -m tests.other_system FOLDER

Windows is imitated as far as Linux can: what it lacks is taken away, a file that is open cannot be
renamed or removed, folders cannot be opened, only files open for writing are synced, and bytes are
translated unless a file is opened with O_BINARY.
"""

import contextlib
import errno
import json
import multiprocessing
import os
import signal
import sys
import types
import warnings
from pathlib import Path

BINARY = 1 << 30
GONE = (
    "fork forkpty preadv pread pwrite pwritev register_at_fork sched_getaffinity sched_yield "
    "sched_setaffinity posix_fadvise mkfifo mknod getuid geteuid getgid setsid killpg getpgid"
).split()
_text: set[int] = set()  # descriptors that were opened without O_BINARY


def take_away():
    """Make this process one of Windows, with torch as it is on Linux."""
    import torch.utils.data  # noqa: F401

    assert not any(name.startswith("mmkit") for name in sys.modules)
    _add_locks()
    for name in ("fcntl", "resource"):
        sys.modules[name] = None  # type: ignore[assignment]
    for name in GONE:
        delattr(os, name)
    for name in ("SIGKILL", "SIGHUP", "SIGUSR1"):
        delattr(signal, name)
    os.environ.setdefault("USERNAME", "student")  # Windows sets it
    _imitate_files()
    multiprocessing.set_start_method("spawn", force=True)


def _add_locks():
    """The module msvcrt, whose locks of a range of bytes are those of POSIX."""
    import fcntl

    def locking(number, mode, count):
        assert mode == module.LK_NBLCK, "LK_LOCK gives up after ten seconds"
        try:
            fcntl.lockf(number, fcntl.LOCK_EX | fcntl.LOCK_NB, count, 0, os.SEEK_CUR)
        except BlockingIOError:
            raise PermissionError(errno.EACCES, "it is locked") from None

    module = types.ModuleType("msvcrt")
    module.locking, module.LK_NBLCK, module.LK_LOCK = locking, 2, 1
    sys.modules["msvcrt"] = module


def _is_open(path) -> bool:
    """Whether this process has a file open."""
    with contextlib.suppress(OSError):
        status = os.stat(path)
        for name in os.listdir("/proc/self/fd"):
            with contextlib.suppress(OSError):
                if os.path.samestat(os.stat(int(name)), status):
                    return True
    return False


def _imitate_files():
    here = {name: getattr(os, name) for name in "open read close fsync".split()}
    os.O_BINARY = BINARY

    def refusing(name):
        original = getattr(os, name)

        def call(path, *others, **options):
            for one in (path, *others):
                if not options and os.path.isfile(one) and _is_open(one):
                    raise PermissionError(errno.EACCES, "it is open", str(one))
            return original(path, *others, **options)

        setattr(os, name, call)

    for name in ("rename", "replace", "unlink", "remove"):
        refusing(name)

    def open_(path, flags, mode=0o777, **options):
        if os.path.isdir(path) and not options:
            raise PermissionError(errno.EACCES, "it is a folder", str(path))
        number = here["open"](path, flags & ~BINARY, mode, **options)
        (_text.discard if flags & BINARY else _text.add)(number)
        return number

    def close(number):
        _text.discard(number)
        here["close"](number)

    def read(number, count):
        found = here["read"](number, count)
        return found.replace(b"\r\n", b"\n").partition(b"\x1a")[0] if number in _text else found

    def fsync(number):
        flags = Path(f"/proc/self/fdinfo/{number}").read_text().split("flags:")[1].split()[0]
        if not int(flags, 8) & (os.O_WRONLY | os.O_RDWR):
            raise OSError(errno.EBADF, "it is not open for writing")
        here["fsync"](number)

    os.open, os.read, os.close, os.fsync = open_, read, close, fsync


def brighter(image):
    """A transform, which makes worker processes decode."""
    from torchvision.transforms.v2 import functional as F

    return F.resize(F.pil_to_tensor(image), [15, 15], antialias=True).float() / 200


def digest(*tensors) -> str:
    """A text that changes with any bit."""
    import hashlib

    import numpy as np

    whole = hashlib.blake2b(digest_size=8)
    for tensor in tensors:
        whole.update(np.ascontiguousarray(tensor).tobytes())
    return whole.hexdigest()


def small_model(tokenizer):
    import torch
    from transformers import BertConfig, ViTConfig

    import mmkit as mm

    tower = dict(hidden_size=22, num_hidden_layers=2, num_attention_heads=2, intermediate_size=31)
    torch.manual_seed(0)
    vit = ViTConfig(image_size=15, patch_size=5, **tower)
    bert = BertConfig(vocab_size=len(tokenizer), max_position_embeddings=17, **tower)
    return mm.MultimodalEncoder(vit, bert, tokenizer, embed_dim=13)


def use(folder: Path) -> dict:
    """Data, training, a resumed run, an image cache and shards; what they gave."""
    import gzip

    import mmkit as mm

    found: dict = {}
    options: dict = dict(cache_dir=folder / "cache", num_workers=1)
    train, _, _ = mm.openmoji(image_size=8, cache_dir=options["cache_dir"])
    batch = train.batch(range(7))
    found["built in"] = [len(train), digest(batch.pixel_values, batch.input_ids)]

    own = mm.load_data(make_images(folder / "images"), image_size=15, **options)
    for way in ("decoded", "from the cache"):
        own = mm.load_data(folder / "images", image_size=15, check="decode", **options)
        found[way] = [own.meta[3]["file"], own.resident, digest(own.batch([5, 2]).pixel_values)]

    for path in mm.write_shards(own, folder / "shards", samples_per_shard=5):
        path.with_suffix(".tar.gz").write_bytes(gzip.compress(path.read_bytes()))
        if path.stem != "00000":
            path.unlink()  # one is read in place, the others from the spool
    (folder / "shards" / "00000.tar.gz").unlink()
    again = mm.from_shards(folder / "shards", image_size=15, **options)
    found["shards"] = [len(again), digest(again.batch(range(len(again))).pixel_values)]
    mm.write_shards(again.subset(range(4)), folder / "other", overwrite=True)

    found["training"] = trained(folder, mm.load_data(
        folder / "images", transform=brighter, tokenizer=own.tokenizer, **options
    ))  # fmt: skip
    return found


def make_images(folder: Path) -> Path:
    """Twelve images with their captions in a folder below; its path."""
    import torch
    from PIL import Image

    (folder / "reds").mkdir(parents=True)
    draws = torch.Generator().manual_seed(0)
    for row in range(12):
        path = folder / "reds" / f"{row}.png"
        pixels = torch.randint(0, 256, (21, 21, 3), generator=draws, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(path)
        path.with_suffix(".txt").write_text(f"a red {'cat dog boat'.split()[row % 3]} {row}")
    return folder


def trained(folder: Path, data) -> list:
    """A run of two steps, killed by a callback and resumed; its losses and its weights."""
    import mmkit as mm

    options: dict = dict(
        output_dir=str(folder / "runs"), run_name="small", batch_size=6, num_epochs=1,
        warmup_steps=1, num_workers=1, log_every=1, keep_last=2, checkpoint_every=1,
        mixed_precision="no", image_mask_ratio=0.5,
    )  # fmt: skip
    config = mm.TrainingConfig(**options)

    def stop(trainer, record):
        raise KeyboardInterrupt

    with contextlib.suppress(KeyboardInterrupt), contextlib.redirect_stdout(sys.stderr):
        mm.train_model(config, data, data, small_model(data.tokenizer), callbacks=[stop])
    with contextlib.redirect_stdout(sys.stderr):
        model = small_model(data.tokenizer)
        run = mm.train_model(config, data, data, model, resume=True)
    losses = [record["loss"] for record in run.history if record["split"] == "train"]
    mm.load(run.best_file).save_pretrained(folder / "shared")
    weights = mm.load(folder / "shared").state_dict().values()
    names = [path.name for path in run.path.iterdir() if "tfevents" not in path.name]
    return [losses, digest(*weights), sorted(names)]


def main(folder: Path) -> None:
    import accelerate  # noqa: F401  (libraries as they are installed on Linux)
    import torch.utils.tensorboard  # noqa: F401
    import transformers.models.bert.modeling_bert
    import transformers.models.vit.modeling_vit  # noqa: F401
    import webdataset  # noqa: F401

    take_away()
    warnings.filterwarnings("error", "images are decoded in this process")
    from mmkit.data import workers

    workers.FEW = 0  # workers for few images, too
    print(json.dumps(use(folder)))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
elif __name__ == "__mp_main__":  # a worker
    take_away()
