"""What one checkout of mmkit computes, as one JSON file: run by tests/contracts/golden.py.

    PYTHONPATH=CHECKOUT python tests/contracts/golden_cases.py OUT.json [--resume-from FOLDER]

Uses public names of mmkit alone, and of those that were renamed the older ones, because it must run
on the checkout before the change, too. Tensors are reported as hashes of their bytes.
"""

import argparse
import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import numpy as np
import torch

import mmkit as mm

SMALL = dict(
    batch_size=11,
    num_epochs=2,
    warmup_steps=3,
    learning_rate=5e-3,
    matrix_learning_rate=1.5e-2,
    log_every=1,
    mixed_precision="no",
    text_mask_ratio=0.3,
)
TERMS = dict(pixels_weight=0.7, words_weight=0.3, cross_modal=True, decoder_width=32)
RUNS = {
    "contrast": {},
    "all terms": TERMS | dict(matching_weight=0.4, batch_size=27, term_gradients_every=2),
    "unmasked view": TERMS | dict(contrastive_view="unmasked", text_mask_mode="drop"),
    "MAE": dict(contrastive_weight=0, pixels_weight=1, norm_pix_loss=True, image_mask_ratio=0.75),
    "BERT": dict(contrastive_weight=0, words_weight=1, text_mask_mode="80/10/10"),
    "sigmoid over neighbours": dict(loss="sigmoid", exchange="neighbours"),
    "accumulation": dict(gradient_accumulation_steps=3),
    "naive accumulation": dict(gradient_accumulation_steps=3, accumulation="naive"),
    "schedules": dict(
        image_mask_schedule="uniform",
        image_mask_final_ratio=0.8,
        text_mask_schedule="linear",
        text_mask_final_ratio=0.6,
        schedule="linear",
        unmasked_epochs=1,
        augment="shift",
    ),
    "EMA, dropout, frozen": dict(
        ema_decay=0.9, dropout=0.1, frozen_image_epochs=1, layer_decay=0.8, optimizer="adamw"
    ),
    "attentive": dict(image_mask="attentive"),
    "schedules of terms": TERMS | dict(pixels_schedule="rising", words_schedule="last_half"),
}
IN_TWO_PROCESSES = ("contrast", "all terms", "sigmoid over neighbours", "accumulation", "attentive")
WORDS = "sun moon tree house fish bird shoe ball star boat cake lamp ring".split()
# of one machine or run
OWN = "run_name seconds samples_per_second waiting_for_data waited host pid output_dir".split()


def digest(value) -> str:
    """A hash of type, shape and bytes."""
    value = torch.as_tensor(value).detach().cpu().contiguous()
    head = f"{value.dtype} {tuple(value.shape)} ".encode()
    content = value.flatten().view(torch.uint8).numpy().tobytes()
    return hashlib.sha256(head + content).hexdigest()[:16]


def plain(value):
    """Nested values with each tensor as its hash; keys as strings."""
    if isinstance(value, torch.Tensor | np.ndarray):
        return digest(value)
    if isinstance(value, dict):
        return {str(key): plain(x) for key, x in value.items() if key not in OWN}
    if isinstance(value, list | tuple):
        return [plain(x) for x in value]
    if isinstance(value, bytes):
        return hashlib.sha256(value).hexdigest()[:16]
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def captions(count: int) -> list[list[str]]:
    pairs = [f"a {WORDS[i % 13]} beside the {WORDS[(i * 5 + i // 13) % 13]}" for i in range(count)]
    return [[pair, f"{pair} again"] if i % 3 else [pair] for i, pair in enumerate(pairs)]


def data(count: int, seed: int = 0) -> mm.MultimodalDataset:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (count, 3, 15, 15), generator=generator, dtype=torch.uint8)
    meta = [{"group": WORDS[i % 3]} for i in range(count)]
    return mm.MultimodalDataset.from_pixels(pixels, captions(count), meta=meta)


def small_model(tokenizer, dropout: float = 0.0) -> mm.MultimodalEncoder:
    from transformers import BertConfig, ViTConfig

    tower = dict(hidden_size=22, num_hidden_layers=2, num_attention_heads=2, intermediate_size=31)
    drop = dict(hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout)
    vit = ViTConfig(image_size=15, patch_size=5, **tower, **drop)
    bert = BertConfig(vocab_size=len(tokenizer), max_position_embeddings=17, **tower, **drop)
    torch.manual_seed(0)
    return mm.MultimodalEncoder(vit, bert, tokenizer, embed_dim=13, dropout=dropout)


def train(folder: Path, name: str, values: dict, resume: bool = False, stop_at: int = -1) -> None:
    """One small run, in however many processes call it; killed at a step where one is given."""
    values = SMALL | values | dict(output_dir=str(folder), run_name=name)
    config, train_set = mm.TrainingConfig(**values), data(53)

    def kill(trainer, record):
        if record["step"] == stop_at and record["split"] == "train":
            os.kill(os.getpid(), signal.SIGKILL)

    model = small_model(train_set.tokenizer, config.dropout)
    mm.train_model(config, train_set, data(17, seed=1), model, resume=resume, callbacks=[kill])


def files_of(run: Path) -> dict:
    """What a run wrote, times and paths aside."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    config = json.loads((run / "config.json").read_text())
    config = {k: v for k, v in config.items() if k not in ("output_dir", "run_name")}
    found: dict = {"metrics": plain(records), "config": config}
    for file in ("best_model.pth", "last/state.pth"):
        found[file] = plain(torch.load(run / file, weights_only=True, map_location="cpu"))
    found["files"] = sorted(
        "events" if path.name.startswith("events") else str(path.relative_to(run))
        for path in run.rglob("*")
        if path.is_file() and not path.name.startswith(".")
    )
    return found


def runs(folder: Path) -> dict:
    found = {}
    # First: an Accelerator would tie this process to one.
    for name in IN_TWO_PROCESSES:
        mm.launch(train, folder, f"{name}, 2 processes", RUNS[name], num_processes=2)
        found[f"{name}, 2 processes"] = files_of(folder / f"{name}, 2 processes")
    for name, values in RUNS.items():
        train(folder, name, values)
        found[name] = files_of(folder / name)
    return found


def killed(folder: Path, name: str, values: dict) -> Path:
    """A run that was killed in its second epoch, where a state of the first is kept."""
    job = [sys.executable, __file__, "--kill", json.dumps([str(folder), name, values])]
    ended = subprocess.run(job, capture_output=True, text=True)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    return folder / name


def resumed(folder: Path) -> dict:
    found = {}
    for name in ("all terms", "attentive"):
        path = killed(folder, f"{name}, killed", RUNS[name])
        train(folder, path.name, RUNS[name], resume=True)
        found[f"{name}, killed and resumed"] = files_of(path)
    return found


def maskers() -> dict:
    """The masks of each masker, in two epochs, on the built-in images."""
    images = mm.openmoji(image_size=64)[0].subset(range(24))
    found: dict = {}

    def draw(name: str, **values):
        config = mm.TrainingConfig(num_epochs=2, batch_size=24, mixed_precision="no", **values)
        trainer = mm.MaskedMultimodalTrainer(config, images)
        batch = images.batch(range(24))
        for epoch in (0, 1):
            image, text = trainer.maskings(trainer.first_batch() if epoch else batch, epoch)
            for kind, masking in (("image", image), ("text", text)):
                parts = ("mask", "ids_keep", "ids_restore", "keep_valid", "substitute")
                found[f"{name}, epoch {epoch}, {kind}"] = masking and {
                    part: plain(getattr(masking, part)) for part in parts
                }

    for name in mm.masking.IMAGE_MASKERS:
        painted = [[i % 3 == 0] * 8 for i in range(8)] if name == "painted" else None
        draw(f"image {name}", image_mask=name, painted_mask=painted)
    for name in mm.masking.TEXT_MASKERS:
        for mode in ("replace", "80/10/10"):
            draw(f"text {name} {mode}", text_mask=name, text_mask_ratio=0.4, text_mask_mode=mode)
    noise = mm.mask_noise(3, 5, torch.tensor([7, 2**40, -1]), 11, "a stream")
    return found | {"noise": plain(noise)}


def built_in(folder: Path) -> dict:
    """The tiny preset on built-in images: training, retrieval, reconstruction, probe, export."""
    torch.manual_seed(0)
    images, _, test = mm.openmoji(image_size=64)
    others = images.subset(range(7, len(images), 14))
    images = images.subset(range(0, len(images), 14))
    test = test.subset(range(0, len(test), 5))
    config = mm.TrainingConfig(
        num_epochs=2, batch_size=50, output_dir=str(folder), run_name="tiny",
        mixed_precision="no", words_weight=0.3, pixels_weight=0.3, text_mask_ratio=0.3,
    )  # fmt: skip
    run = mm.train_model(config, images, test)
    model = run.model
    features = mm.embed(model, test)
    index = mm.Index(model, test)
    batch = test.batch(range(8))
    maskings = mm.masking.draw_maskings(
        batch, model, seed=0, epoch=0, image=("block", 0.5), text=("random", 0.4)
    )
    back = mm.put_back(model, batch, *maskings)
    model.save_pretrained(folder / "shared")
    again = mm.MultimodalEncoder.from_pretrained(folder / "shared")
    return {
        "run": files_of(folder / "tiny"),
        "features": [digest(features.image_features), digest(features.text_features)],
        "evaluate": plain(mm.evaluate(model, test)),
        "search": [(hit.row, hit.score) for hit in index.search("a red apple", 5)],
        "zero_shot": plain(mm.zero_shot(model, features, {"faces": "a face", "flags": ["a flag"]})),
        "reconstruction": plain(
            mm.evaluate_reconstruction(
                model, test, image_mask=("random", 0.5), text_mask=("random", 0.3)
            )
        ),
        "reconstructed": [plain(value) for value in vars(back).values()],
        "probe": plain(mm.probe.probe(model, images, others, by="group")),
        "exported files": sorted(path.name for path in (folder / "shared").iterdir()),
        "exported weights": plain(again.state_dict()),
        "state_dict keys": list(model.state_dict()),
        "split": [plain(part.sample_ids) for part in mm.split(images, seed=1)],
        "unknown": mm.unknown_share(images.tokenizer, ["a zebra and a xylophone"]),
        "frequency": digest(images.piece_frequency()),
    }


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("out", nargs="?")
    parser.add_argument("--kill", type=json.loads)
    parser.add_argument("--resume-from", type=Path, help="killed runs of the other checkout")
    parser.add_argument("--leave-in", type=Path, help="where to leave killed runs for the other")
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    if args.kill:
        folder, name, values = args.kill
        train(Path(folder), name, values, stop_at=8 if values.get("batch_size", 11) == 11 else 3)
    with contextlib.redirect_stdout(sys.stderr), tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        found = {"runs": runs(folder) | resumed(folder), "masks": maskers()}
        found["built-in"] = built_in(folder)
        for name in ("all terms", "attentive"):
            if args.leave_in:
                killed(args.leave_in, name, RUNS[name])
            if args.resume_from:
                train(args.resume_from, name, RUNS[name], resume=True)
                found["runs"][f"{name}, begun by the other"] = files_of(args.resume_from / name)
        found["version"] = str(Path(mm.__file__).parent)
    Path(args.out).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
