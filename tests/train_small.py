"""A small real training run for tests that need processes of its own (to kill, or to have two).

python -m tests.train_small FOLDER NAME '{"num_epochs": 3}' [--resume] [--kill-at 7]
    [--kill-in-write 2] [--processes 2] [--record] [--shards]
"""

import argparse
import json
import os
import random
import signal
from pathlib import Path

import numpy as np
import torch

import mmkit as mm
from mmkit.data.images import square
from tests.conftest import captions

DEFAULTS = dict(
    batch_size=11,
    num_epochs=3,
    warmup_steps=3,
    learning_rate=5e-3,
    matrix_learning_rate=1.5e-2,
    log_every=1,
    mixed_precision="no",
    text_mask_ratio=0.3,
)
QUICK = DEFAULTS | dict(num_epochs=2)


def data(count: int, tokenizer=None, seed: int = 0) -> mm.MultimodalDataset:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (count, 3, 15, 15), generator=generator, dtype=torch.uint8)
    return mm.MultimodalDataset.from_pixels(pixels, captions(count), tokenizer=tokenizer)


def jittered(image) -> torch.Tensor:
    """A transform that draws from every generator there is."""
    pixels = square(15)(image).float() / 255 + torch.rand(3, 1, 1) * random.random()
    return pixels * np.random.rand()


def data_in_files(folder: Path, count: int) -> mm.MultimodalDataset:
    """The same images, decoded by workers."""
    from torchvision.io import write_png

    folder.mkdir(exist_ok=True)
    paths = [folder / f"{row}.png" for row in range(count)]
    for item, path in zip(data(count), paths, strict=True):
        if not path.exists():
            write_png(item["image"], str(path))
    return mm.MultimodalDataset(paths, captions(count), transform=jittered)


def data_in_shards(folder: Path, count: int) -> mm.MultimodalDataset:
    """The same images in tar shards of 7, streamed."""
    if not folder.exists():
        mm.write_shards(data(count), folder, samples_per_shard=7)
    return mm.from_shards(folder, image_size=15, cache_dir=folder.parent / "cache")


def model(tokenizer, dropout: float) -> mm.MultimodalEncoder:
    from transformers import BertConfig, ViTConfig

    tower = dict(hidden_size=22, num_hidden_layers=2, num_attention_heads=2, intermediate_size=31)
    drop = dict(hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout)
    vit = ViTConfig(image_size=15, patch_size=5, **tower, **drop)
    bert = BertConfig(vocab_size=len(tokenizer), max_position_embeddings=17, **tower, **drop)
    torch.manual_seed(0)
    return mm.MultimodalEncoder(vit, bert, tokenizer, embed_dim=13, dropout=dropout)


def other_model(make_data):
    """A model that reads other tokens, and at most 5 of a caption."""
    from transformers import BertConfig, ViTConfig

    tokenizer = mm.train_wordpiece(["moon", "the old red house and the small boat"])
    tower = dict(hidden_size=22, num_hidden_layers=1, num_attention_heads=2, intermediate_size=31)
    return mm.MultimodalEncoder(
        ViTConfig(image_size=15, patch_size=5, **tower),
        BertConfig(vocab_size=len(tokenizer), max_position_embeddings=5, **tower),
        tokenizer,
        embed_dim=13,
    )


class Dying(mm.MaskedMultimodalTrainer):
    """A trainer that is killed by SIGKILL, as by a crash of the machine, before step `kill_at`.

    record: append what was masked from each sample to masks-RANK.jsonl. notes: a pipe that hears
    when a step begins; -1 = none.
    """

    kill_at, record, notes = -1, False, -1

    def gradients(self, batch, epoch, weights=None):
        loss = super().gradients(batch, epoch, weights)
        if self.record and weights is None:
            with open(self.path / f"masks-{self.rank}.jsonl", "a") as file:
                parts = batch.split(self.config.gradient_accumulation_steps)
                for part, drawn in zip(parts, self.drawn, strict=True):
                    for row, sample in enumerate(part.sample_ids.tolist()):
                        masked = [m.mask[row].nonzero()[:, 0].tolist() for m in drawn]
                        print(json.dumps([epoch, sample, *masked]), file=file)
        return loss

    def train_step(self, batch, epoch):
        if self.notes >= 0 and self.rank == 0:
            os.write(self.notes, f"step {self.step}\n".encode())
        if self.step == self.kill_at:
            self.accelerator.wait_for_everyone()  # so that the files of the others are complete
            os.kill(os.getpid(), signal.SIGKILL)
        return super().train_step(batch, epoch)


def die_in_write(number: int):
    """Let the `number`-th checkpoint be half written, then kill."""
    save, seen = torch.save, [0]

    def half(state, file):
        seen[0] += 1
        if seen[0] == number:
            save(state, file)
            file.truncate(file.tell() // 2)
            os.kill(os.getpid(), signal.SIGKILL)
        save(state, file)

    torch.save = half


def run(
    folder: str,
    name: str,
    values: dict,
    resume: bool = False,
    kill_at: int = -1,
    record: bool = False,
    files: bool = False,
    shards: bool = False,
) -> None:
    config = mm.TrainingConfig(**DEFAULTS | dict(output_dir=folder, run_name=name) | values)
    train = data_in_files(Path(folder) / "images", 53) if files else data(53)
    if shards:
        train = data_in_shards(Path(folder) / "shards", 53)
    trainer = Dying(config, train, data(17, seed=1), model(train.tokenizer, config.dropout), resume)
    trainer.kill_at, trainer.record = kill_at, record
    trainer.fit()


def launch(folder: str, name: str, values: dict, *options, processes: int = 1) -> None:
    """`run` in several processes."""
    mm.launch(run, folder, name, values, *options, num_processes=processes)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("folder")
    parser.add_argument("name")
    parser.add_argument("values", type=json.loads)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--kill-at", type=int, default=-1)
    parser.add_argument("--kill-in-write", type=int, default=0)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--record", action="store_true")
    parser.add_argument("--shards", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.kill_in_write:
        die_in_write(args.kill_in_write)
    options = (args.resume, args.kill_at, args.record, False, args.shards)
    launch(args.folder, args.name, args.values, *options, processes=args.processes)


if __name__ == "__main__":
    main()
