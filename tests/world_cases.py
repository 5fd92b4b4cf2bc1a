"""What 1, 2 and 3 processes compute, for test_world.py: python -m tests.world_cases FOLDER

Writes FOLDER/N.pth. One group of processes computes all cases, because starting it takes long.
"""

import dataclasses
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import mmkit as mm
from mmkit.distributed import all_gather_with_grad, all_reduce_sum, rank_and_world_size
from mmkit.evaluation.reconstruction import evaluate_reconstruction
from mmkit.training import step
from tests.conftest import WORDS
from tests.train_small import DEFAULTS, data, model

LOSSES = [("info_nce", "gather"), ("sigmoid", "gather"), ("sigmoid", "neighbours")]
MASKS = {
    "drop": dict(image_mask_schedule="uniform", image_mask_final_ratio=0.8),
    "replace": dict(
        image_mask="block",
        image_mask_mode="replace",
        text_mask="whole_word",
        text_mask_mode="80/10/10",
        augment="shift",
    ),
}
# (name of the masks, loss, exchange, micro-batches); 53 pairs in batches of 11, 11, 11, 10, 10
GRADIENTS = [("drop", *loss, parts) for loss in LOSSES for parts in (1, 3)]
GRADIENTS += [("replace", "info_nce", "gather", 2)]
# Terms besides the contrastive one, in 1 and 3 micro-batches.
BESIDE = dict(mim_weight=0.7, mlm_weight=0.3, cross_modal=True, decoder_width=32)
ALONE = dict(contrastive_weight=0.0, decoder_width=32, decoder_depth=1)
TERMS = {
    "contrast, pixels, words": BESIDE | MASKS["drop"],
    "unmasked view": BESIDE | dict(contrastive_view="unmasked", text_mask_mode="drop"),
    "MAE": ALONE | dict(mim_weight=1.0, image_mask_ratio=0.75),
    "BERT": ALONE | dict(mlm_weight=1.0, text_mask_mode="80/10/10"),
    # larger batches, 27 and 26: a micro-batch of each process needs two pairs
    "matching": BESIDE | dict(itm_weight=0.4, batch_size=27),
}
OBJECTIVES = [(case, parts) for case in TERMS for parts in (1, 3)]
BATCHES = (0, -1)  # of 11 and 10 pairs, in three processes 4, 4, 3 and 4, 3, 3
PAIRS, WIDTH = 509, 3  # of made features
FIRST_ROWS = {1: [0], 2: [0, 67], 3: [0, 67, 271]}  # of each process: parts of very different sizes
CHUNK = 2000  # logits held at once, if the loss is computed in slices


def everyone(value) -> list:
    """This value of every process, in rank order."""
    if rank_and_world_size()[1] == 1:
        return [value]
    values = [None] * rank_and_world_size()[1]
    torch.distributed.all_gather_object(values, value)
    return values


def config(folder, **values) -> mm.TrainingConfig:
    return mm.TrainingConfig(**DEFAULTS | dict(output_dir=str(folder), run_name="run") | values)


def training_data() -> mm.MultimodalDataset:
    """Captions of several images, and images in several rows, in every batch and across processes.

    Rows have one, two or five captions, so that tables differ in width.
    """
    train = data(53)
    for i, texts in enumerate(train.texts):
        texts += [f"{WORDS[i % 13]} moon"] * (i % 3 > 0) + [f"{w} shoe" for w in WORDS[:3]] * (
            i == 7
        )
    train.same_images([i % 19 for i in range(53)])
    return train


def trainer_of(case, folder="nowhere") -> mm.MaskedMultimodalTrainer:
    masks, loss, exchange, parts = case
    values = dict(loss=loss, exchange=exchange, gradient_accumulation_steps=parts) | MASKS[masks]
    train = training_data()
    return mm.MaskedMultimodalTrainer(
        config(folder, **values), train, None, model(train.tokenizer, 0.0)
    )


def gradients(case, number: int) -> dict:
    """Loss, gradients and masks of one batch of epoch 1."""
    trainer = trainer_of(case)
    trainer.net.train()
    batch = trainer.train.batch(*trainer.epoch_batches(1)[number])
    loss = trainer.gradients(batch, 1)
    parts = batch.split(trainer.config.gradient_accumulation_steps)
    masks = {}
    for part, drawn in zip(parts, trainer.drawn, strict=True):
        for row, sample in enumerate(part.sample_ids.tolist()):
            masks[sample] = [m.mask[row].nonzero()[:, 0].tolist() for m in drawn]
    found = gradients_of(trainer.model)
    return {
        "loss": all_reduce_sum(loss),
        "gradients": found,
        "sums": everyone(sum(float(g.double().sum()) for g in found.values())),
        "masks": {sample: masked for part in everyone(masks) for sample, masked in part.items()},
        "micro_batches": everyone([len(part) for part in parts]),
    }


def trainer_of_terms(case, parts: int) -> mm.MaskedMultimodalTrainer:
    train = training_data()
    values = TERMS[case] | dict(gradient_accumulation_steps=parts)
    return mm.MaskedMultimodalTrainer(
        config("nowhere", **values), train, None, model(train.tokenizer, 0.0)
    )


def objective(case, parts: int, number: int) -> dict:
    """Terms and gradients of one batch of epoch 1."""
    trainer = trainer_of_terms(case, parts)
    trainer.net.train()
    batch = trainer.train.batch(*trainer.epoch_batches(1)[number])
    loss = trainer.gradients(batch, 1)
    found = gradients_of(trainer.model)
    return {
        "loss": all_reduce_sum(loss),
        "terms": {term: all_reduce_sum(value) for term, value in trainer.terms.items()},
        "gradients": found,
        "sums": everyone(sum(float(g.double().sum()) for g in found.values())),
        "micro_batches": everyone([len(part) for part in batch.split(parts)]),
    }


def reconstruction(count: int) -> dict:
    """Metrics of reconstruction of so many images, in batches that mask different numbers.

    Without masks there are none, also if a process has no image at all.
    """
    train = training_data()
    encoder = model(train.tokenizer, 0.0).add_decoder(across=True, width=32).to_device("cpu")
    images = data(count, train.tokenizer, seed=1)
    options = dict(batch_size=3, baseline=torch.full((9, 75), 0.4))
    found = {
        context: evaluate_reconstruction(encoder, images, context=context, **options)
        for context in ("matched", "none")
    }
    nothing = dict(image_mask=("random", 0.0), text_mask=("random", 0.0))
    assert evaluate_reconstruction(encoder, images, **nothing) == {}
    return found | {"everyone": everyone(found)}


def gradients_of(encoder) -> dict[str, torch.Tensor]:
    return {
        name: torch.zeros_like(p) if p.grad is None else p.grad
        for name, p in encoder.named_parameters()
    }


class Largest(TorchDispatchMode):
    """Record the size of the largest tensor that any operation makes."""

    entries = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **kwargs or {})
        for x in out if isinstance(out, list | tuple) else [out]:
            if isinstance(x, torch.Tensor):
                self.entries = max(self.entries, x.numel())
        return out


def loss_part(kind: str, exchange: str, chunk: int) -> dict:
    """`contrastive_fraction` of made features in unequal parts: value, gradients, memory."""
    torch.manual_seed(0)
    image, text = (F.normalize(torch.randn(PAIRS, WIDTH), dim=1) for _ in range(2))
    captions = torch.arange(PAIRS) % 389  # of each image one more, in one direction only
    table = torch.stack([captions, torch.where(captions % 5 > 0, captions + 31, -1)], 1)
    rank, processes = rank_and_world_size()
    bounds = [*FIRST_ROWS[processes], PAIRS]
    rows = slice(bounds[rank], bounds[rank + 1])
    width = 1 if rank == 0 and processes > 1 else 2  # a table may be narrower in one process
    table[: FIRST_ROWS[2][1], 1] = -1
    partners = captions[rows], table[rows, :width]
    leaves = [image[rows], text[rows], torch.tensor(1.3), torch.tensor(-1.0)]
    leaves = [x.clone().requires_grad_() for x in leaves]
    step.LOGITS, before = chunk, step.LOGITS
    saved = []

    def keep(x):
        saved.append(x.numel())
        return x

    with Largest() as largest, torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        loss = step.contrastive_fraction(*leaves, partners, kind, exchange)
        kept = sum(saved)
        grads = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
    step.LOGITS = before
    return {
        "loss": all_reduce_sum(loss),
        "image": all_gather_with_grad(grads[0]),
        "text": all_gather_with_grad(grads[1]),
        "scale": all_reduce_sum(grads[2]),
        "bias": all_reduce_sum(grads[3]),
        "largest": everyone(largest.entries),
        "kept": everyone(kept),
        "rows": everyone(len(image[rows])),
    }


def order() -> list:
    """[epoch][batch][process] -> sample ids."""
    trainer = trainer_of(GRADIENTS[0])
    ids = trainer.train.sample_ids
    return [
        [everyone(ids[rows].tolist()) for rows, _ in trainer.epoch_batches(epoch)]
        for epoch in (0, 1)
    ]


def evaluation(count: int) -> dict:
    """Features and scores of so many images, the last two of which have two captions."""
    train = training_data()
    encoder, images = model(train.tokenizer, 0.0), data(count, train.tokenizer, seed=1)
    images.texts[-2:] = [[*c, f"{c[0]} house"] for c in images.texts[-2:]]
    features = mm.embed(encoder, images, batch_size=5)
    masks = dict(image_mask=("random", 0.5), text_mask=("random", 0.3))
    plain, masked = mm.evaluate(encoder, images), mm.evaluate(encoder, images, **masks)
    return {
        "features": dataclasses.asdict(features),
        "scores": [plain, masked],
        "everyone": everyone(plain),
    }


def train_with_tools(folder, optimizer: str) -> dict:
    """Two epochs, the ViT frozen in the first, with an EMA of the weights validated."""
    values = dict(
        num_epochs=2, frozen_image_epochs=1, ema_decay=0.9, optimizer=optimizer, run_name=optimizer
    )
    train = training_data()
    encoder = model(train.tokenizer, 0.0)
    before = {name: p.detach().clone() for name, p in encoder.named_parameters()}
    trainer = mm.MaskedMultimodalTrainer(
        config(folder, **values, gradient_accumulation_steps=2), train, data(17, seed=1), encoder
    )
    run = trainer.fit()
    return {
        "losses": [r["loss"] for r in run.history],
        "before": before,
        "weights": dict(trainer.model.state_dict()),
        "mean": dict(trainer.ema.module.state_dict()),
    }


def all_cases(folder: str) -> dict:
    torch.set_num_threads(1)
    found = {
        "gradients": {f"{case} {n}": gradients(case, n) for case in GRADIENTS for n in BATCHES},
        "shares": {
            f"{kind} {exchange} {chunk}": loss_part(kind, exchange, chunk)
            for kind, exchange in LOSSES
            for chunk in (step.LOGITS, CHUNK)
        },
        "objectives": {
            f"{case} {parts} {n}": objective(case, parts, n)
            for case, parts in OBJECTIVES
            for n in BATCHES
        },
        "reconstruction": {count: reconstruction(count) for count in (17, 2)},
        "order": order(),
        "evaluation": {count: evaluation(count) for count in (17, 2)},
    }
    for optimizer in ("adamw", "muon"):
        found[optimizer] = train_with_tools(f"{folder}/{rank_and_world_size()[1]}", optimizer)
    return found


if __name__ == "__main__":
    for processes in (3, 2, 1):  # a process that has trained alone can launch no others
        found = mm.launch(all_cases, sys.argv[1], num_processes=processes)
        torch.save(found, Path(sys.argv[1]) / f"{processes}.pth")
