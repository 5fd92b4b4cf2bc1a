"""The command line: python -m mmkit inspect | train | evaluate | search | export.

Every field of `TrainingConfig` is a flag of `train`, made from the dataclass by tyro. Runs under
torchrun as it is. Walk-through: README.md.
"""

import os
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
os.environ.setdefault("MPLBACKEND", "Agg")  # figures are written to files here

import tyro

from .. import plots
from ..config import TrainingConfig
from ..data.dataset import MultimodalDataset
from ..data.inspection import inspect
from ..data.openmoji.images import openmoji
from ..data.splits import overlap
from ..evaluation.reconstruction import evaluate_reconstruction
from ..evaluation.retrieval import chance_of_recall, evaluate, mean_recall
from ..evaluation.search import Index
from ..files import shown
from ..joint_calls import leave_group
from ..masking.plan import validation_masks
from ..models.checkpoint import load, read_checkpoint
from ..models.encoder import MultimodalEncoder
from ..models.model_card import training_facts
from ..models.presets import PRESETS
from ..models.sharing import read_config
from ..training.fingerprint import compare_data, of_data
from ..training.run import InUse, Run, newest_run
from ..training.setup import check_arguments
from ..training.trainer import train_model
from .source_flags import Source

Split = Literal["compose", "concept", "random"]


def inspect_(  # noqa: PLR0913 (flags)
    source: Annotated[str, tyro.conf.Positional],
    image: str | None = None,
    text: str | None = None,
    root: str | None = None,
    data_split: str | None = None,
    encoding: str | None = None,
    separator: str | None = None,
    image_size: int = 64,
    max_length: int = 77,
    near: bool = True,
    json: str = "",
    figure: str = "",
) -> None:
    """Report what would be loaded from a source, and what is odd about it; nothing is trained.

    Args:
        source: A table, a folder, tar shards or a hub data set.
        image: Column of the images in a table, their suffix in shards; None = by its usual names.
        text: Column of the texts in a table, their suffix in shards; None = by its usual names.
        root: Folder of the images of a table (None = the table's own), of COCO or of Flickr30k.
        data_split: Split of a hub data set or of Karpathy's JSON.
        encoding: Encoding of a table's letters; None = UTF-8, or what its byte order mark says.
        separator: Character between a table's columns; None = the one that fits.
        image_size: Side in pixels at which images are compared.
        max_length: Tokens of a caption that the model will read (tiny 32, small 64, base 77).
        near: Also look for nearly equal images and captions.
        json: File for the report as JSON; "" = none.
        figure: File for the report as a figure; "" = none.
    """
    named = Source(source, image, text, root, data_split, encoding, separator)
    lenient: dict = dict(on_error="skip", max_skipped=1.0, check="decode")
    data = named.load(image_size=image_size, **lenient)
    report = inspect(data, max_length=max_length, near=near)
    print(report)
    if json:
        print(f"\nwritten: {report.save(json)}")
    if figure:
        words = f"What {source} holds."
        print(f"written: {plots.save(plots.source_report(report, words), figure)}")


def train(
    config: Annotated[TrainingConfig, tyro.conf.arg(name="")],
    source: Annotated[Source, tyro.conf.arg(name="")],
    split: Split = "compose",
    resume: bool = False,
    fork: str = "",
) -> None:
    """Train on the built-in images or your own, score the test part, draw ten searches.

    Args:
        config: The whole recipe.
        source: The images.
        split: How the built-in images are divided ("random" leaks, for teaching).
        resume: Go on from the last checkpoint of --run-name; without a name, of the newest run.
        fork: Folder of a run whose last state this run starts from; only --batch-size must agree.
    """
    check_arguments(config)  # before anything is loaded
    size = PRESETS[config.preset]["image"]
    training, val, test = _parts(source, size, split, config)
    name = f"{split} test" if not source.data else "test part"
    own = Path(config.output_dir) / config.run_name / "last" / "state.pth"
    go_on: bool | str = resume and (own.is_file() or not fork)  # a fork that was killed goes on
    run = train_model(config, training, val, resume=go_on or fork)
    if not leave_group():
        return
    model = run.model
    ratio = config.painted_mask or config.image_mask_ratio or 0.5
    masks = {"image_mask": (config.image_mask, ratio)}
    best, seconds = run.best["epoch"] + 1, run.history[-1]["seconds"]
    print(
        f"\n{shown(run.path)}: best epoch {best}, {seconds:.0f} s of training, "
        f"peak memory {_peak_gigabytes():.2f} GB"
    )
    if "contrastive" in config.terms:
        _print_scores(model, test, name, masks)
    _print_reconstruction(model, test, config)
    if "contrastive" in config.terms:
        _draw_searches(model, test, name, run.path, source)
    print(f"      {_python()} -m tensorboard.main --logdir {shlex.quote(config.output_dir)}")
    if test.attribution:
        print(f"pictures: {test.attribution}")


def _parts(source: Source, size: int, split: Split, config: TrainingConfig):
    """(train, val, test) of the built-in pictures, or of one's own."""
    source.refuse_without_data()
    if not source.data:
        return openmoji(image_size=size, split=split)
    data = source.load(image_size=size, num_workers=config.num_workers)
    first = os.environ.get("RANK", "0") == "0"
    if first:
        print(f"{data.report}\n")
    train, val, test = source.divide(data, config.seed)
    if first and test is not None and not data.expensive:
        found = overlap(train, test, near=source.group == "content")
        found.near = found.near or 0  # all but "content" kept near-duplicates together
        print(f"{found}\n")
    return train, val, test


def _draw_searches(
    model: MultimodalEncoder, test: MultimodalDataset, name: str, path: Path, source: Source
):
    """Ten captions of the test split and what is found by them, as a picture; what to do next."""
    index = Index(model, test)
    queries = [*dict.fromkeys(text[0] for text in test.texts)][:: max(1, len(test) // 10)][:10]
    words = f"Ten captions of the {name}, each with its nearest of {len(test)} pictures."
    figure = plots.search_results(index, queries, k=min(6, len(test)), caption=words)
    print(f"\nten searches: {plots.save(figure, path / 'searches.png')}")
    print("next: make lab (open 01_data.ipynb), or search all pictures by your own words:")
    query = queries[0] if source.data else "a woman firefighter"
    flags = [*source.words(without=("group",)), "--checkpoint", f"{path}/best_model.pth"]
    print(f"      {shlex.join([_python(), '-m', 'mmkit', 'search', query, *flags])}")


def _print_reconstruction(
    model: MultimodalEncoder, data: MultimodalDataset, config: TrainingConfig
):
    """What the decoder puts back, hidden as in a validation of the run; nothing without one."""
    if model.decoder is None:
        return
    masks: dict = validation_masks(config)
    modes: dict = dict(image_mode=config.image_mask_mode, text_mode=config.text_mask_mode)
    print("\nput back (hidden as in training):")
    looks = {"right": "its own", "none": "nothing", "wrong": "another's"}
    for sees in looks if model.decoder.across else ("right",):
        found = evaluate_reconstruction(model, data, sees=sees, **masks, **modes)
        words = [f"pixel error {found['pixel_error']:.4f}"] if "pixel_error" in found else []
        if "words_accuracy" in found:
            words.append(f"words right {100 * found['words_accuracy']:.1f} %")
            words.append(f"perplexity {found['words_perplexity']:.1f}")
        if "matching_accuracy" in found:
            words.append(f"pairs told {100 * found['matching_accuracy']:.1f} % (always no: 66.7)")
        seen = f"decoder looks at {looks[sees]}" if model.decoder.across else ""
        print(f"{seen:28}{', '.join(words)}")


def _peak_gigabytes() -> float:
    """Most memory this process ever held."""
    import resource

    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, kilobytes on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def _python() -> str:
    """How this Python was called, short enough to be typed again."""
    path = Path(sys.executable)
    return os.path.relpath(path) if path.is_relative_to(Path.cwd()) else "python"


def _print_scores(model: MultimodalEncoder, data: MultimodalDataset, name: str, masks: dict):
    """A table: Recall@K both ways, with everything seen and with patches hidden, and chance."""
    print(f"\n{name}: {len(data)} pictures, {sum(map(len, data.texts))} captions (per cent)")
    print(f"{'':24}image to text         text to image         mean")
    print(f"{'':24}R@1    R@5    R@10   R@1    R@5    R@10   R@1")
    masker, ratio = masks["image_mask"]
    hidden = f"{masker} mask"
    if masker not in ("painted", "layers"):  # which go by no ratio
        share = f"{100 * ratio:.0f} %"
        hidden = f"{share} of patches hidden" if masker == "random" else f"{masker}, {share} hidden"
    for label, options in (("everything seen", {}), (hidden, masks)):
        result = evaluate(model, data, **options)
        ways = [
            result[way].get(k) for way in ("image_to_text", "text_to_image") for k in (1, 5, 10)
        ]
        numbers = "".join(f"{'-' if x is None else f'{100 * x:.1f}':<7}" for x in ways)
        print(f"{label:24}{numbers}{100 * mean_recall(result):.1f}")
        cut = result["cut_captions"]
    if cut:
        print(f"{cut:,} captions are longer than the model reads, and are judged without their end")
    chance = [chance_of_recall(data, k) for k in (1, 5, 10)]
    numbers = "".join(f"{100 * way[i]:<7.1f}" for i in (0, 1) for way in chance)
    print(f"{'chance':24}{numbers}{50 * sum(chance[0]):.1f}")


def _checkpoint(path: str) -> Path:
    """The file given, else the newest run's best model."""
    if path:
        return Path(path)
    newest = newest_run(Path("runs"))
    if not newest:
        raise FileNotFoundError(
            "no run in runs/; train first (make train), or give --checkpoint FILE"
        )
    return Run.load(Path("runs") / newest).best_file


def _facts(path: Path) -> dict:
    """What is known of the training of a model: of a run, of a checkpoint, of an export."""
    if path.is_dir():
        return read_config(path)["training"]
    if path.name == "best_model.pth" and (path.parent / "metrics.jsonl").is_file():
        return Run.load(path.parent).facts
    return training_facts(read_checkpoint(path))


def _evaluate(
    source: Annotated[Source, tyro.conf.arg(name="")],
    checkpoint: str = "",
    split: Split = "compose",
    part: Literal["val", "test", "all"] = "test",
    hidden: float = 0.5,
) -> None:
    """Score a checkpoint on a part of the images, with everything visible and with masked patches.

    Args:
        source: The images.
        checkpoint: A best_model.pth or an exported folder; "" = the newest run's best model.
        split: How the built-in images are divided.
        part: Which part is scored, divided as `train` does; "all" is for images of your own.
        hidden: Fraction of the patches that is masked in the second line, in (0, 1).
    """
    source.refuse_without_data()
    if part == "all" and not source.data:
        raise ValueError("--part all is for pictures of your own; give --data, or a part")
    path = _checkpoint(checkpoint)
    model = load(path)
    masks = {"image_mask": ("random", hidden)}
    if source.data:
        data, name = _own_part(source, model.image_size, part, path)
        _print_scores(model, data, name, masks)
        return
    trained_on = _facts(path).get("data", "")
    if (trained_on == "openmoji-random-train") != (split == "random"):
        trained_on = trained_on or "other pictures"
        print(f"beware: trained on {trained_on}, which may hold what is tested here")
    data = openmoji(image_size=model.image_size, split=split)[1 if part == "val" else 2]
    _print_scores(model, data, f"{split} {part}", masks)


def _own_part(source: Source, size: int, part: str, path: Path) -> tuple[MultimodalDataset, str]:
    """(a part of one's own pictures, what it is called); says where the model may have seen it."""
    data, facts = source.load(image_size=size), _facts(path)
    trained_on = facts.get("data", "")
    if part == "all":
        if trained_on == f"{data.name}-train":
            print("beware: these are all pictures, those that the model was trained on included")
        return data, f"all of {data.name}"
    train, val, test = source.divide(data, facts.get("config", {}).get("seed", 0))
    if trained_on != train.name:
        print(f"beware: trained on {trained_on or 'other pictures'}, not on {train.name}")
    elif differs := _differing(path, train):
        print(
            f"beware: {train.name} is not what it was when the model was trained ({differs}), so "
            f"that it may have seen what is in the {part} part"
        )
    chosen = val if part == "val" else test
    assert chosen is not None  # `divide` gives each a share
    return chosen, f"{part} part"


def _differing(path: Path, train: MultimodalDataset) -> str:
    """What differs from the set a checkpoint was trained on, "" where nothing or not known."""
    then = {} if path.is_dir() else read_checkpoint(path).get("data")
    if not isinstance(then, dict) or not then.get("fingerprint"):
        return ""
    return "; ".join(compare_data(then, of_data(train), train)[0])


def search(
    query: Annotated[str, tyro.conf.Positional],
    source: Annotated[Source, tyro.conf.arg(name="")],
    checkpoint: str = "",
    k: int = 10,
    out: str = "search.png",
) -> None:
    """Find images, the built-in ones or your own, by words or by an image file.

    Args:
        query: Words, or the path of an image.
        source: The images.
        checkpoint: A best_model.pth or an exported folder; "" = the newest run's best model.
        k: How many images are found.
        out: File for the grid of results.
    """
    source.refuse_without_data()
    model = load(_checkpoint(checkpoint))
    found = []
    size = model.image_size
    parts = [source.load(image_size=size)] if source.data else openmoji(image_size=size)
    for data in parts:
        found += [
            (hit, data[hit.row]["image"])
            for hit in Index(model, data).search(query, min(k, len(data)))
        ]
    found = sorted(found, key=lambda pair: -pair[0].score)[:k]
    for hit, _ in found:
        print(f"{hit.score:.3f}  {hit.text}")
    titles = [f"{hit.score:.2f} {hit.text}" for hit, _ in found]
    words = f"Nearest to {query!r} among all {source.data or 'built-in'} pictures (cosine)."
    print(
        plots.save(plots.picture_grid([image for _, image in found], titles, 5, None, words), out)
    )


def export(out: str, checkpoint: str = "") -> None:
    """Write a model as a folder to share: safetensors, JSON, its tokenizer and a card.

    Args:
        out: Folder that is written.
        checkpoint: A best_model.pth or an exported folder; "" = the newest run's best model.
    """
    path = _checkpoint(checkpoint)
    load(path).save_pretrained(out, facts=_facts(path))
    size = sum(file.stat().st_size for file in Path(out).iterdir())
    print(f"{path} written to {out} ({size / 1e6:.1f} MB); its README.md is the model's card")
    print(f'load it: mm.MultimodalEncoder.from_pretrained("{out}")')


def main() -> None:
    """Run one of the commands; a wrong input is one line of words, not a traceback."""
    commands: dict[str, Callable] = {
        "inspect": inspect_,
        "train": train,
        "evaluate": _evaluate,
        "search": search,
        "export": export,
    }
    try:
        tyro.extras.subcommand_cli_from_dict(
            commands, prog="mmkit", description=__doc__.splitlines()[0]
        )
    except (ValueError, OSError, ImportError, InUse) as error:
        print(f"mmkit: {' '.join(str(error).splitlines())}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    if "TORCHELASTIC_ERROR_FILE" in os.environ:  # torchrun then says what failed first
        from torch.distributed.elastic.multiprocessing.errors import record

        main = record(main)
    main()
