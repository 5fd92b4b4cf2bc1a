"""The command line: python -m mmkit inspect | train | evaluate | search | export.

Every field of `TrainingConfig` is a flag of `train`, which tyro makes from the dataclass. The
commands also run under torchrun. Walk-through: README.md.
"""

import io
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
from ..models.model_card import training_metadata
from ..models.presets import PRESETS
from ..models.sharing import read_config
from ..older_names import OLDER_FIELDS
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
    """Report what would be loaded from a source and what is unusual about it, without training.

    Args:
        source: A table, a folder, tar shards or a hub data set.
        image: Column of the images in a table, suffix in shards; None = found by its usual names.
        text: Column of the texts in a table, suffix in shards; None = found by its usual names.
        root: Folder of the images of a table (None = the table's own), of COCO or of Flickr30k.
        data_split: Split of a hub data set or of Karpathy's JSON.
        encoding: Text encoding of a table; None = UTF-8, or what its byte order mark says.
        separator: Character between a table's columns; None = found from its content.
        image_size: Side in pixels at which images are compared.
        max_length: Number of tokens of a caption that the model reads (tiny 32, small 64, base 77).
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
        caption = f"Contents of {source}."
        print(f"written: {plots.save(plots.source_report(report, caption), figure)}")


def train(
    config: Annotated[TrainingConfig, tyro.conf.arg(name="")],
    source: Annotated[Source, tyro.conf.arg(name="")],
    split: Split = "compose",
    resume: bool = False,
    fork: str = "",
) -> None:
    """Train on the built-in images or your own, evaluate on the test part, draw ten searches.

    Args:
        config: Every choice of the run.
        source: The images.
        split: How the built-in images are divided ("random" leaks, for teaching).
        resume: Continue from the last checkpoint of --run-name, or of the newest run.
        fork: Folder of a run from whose last state this run starts; only --batch-size must agree.
    """
    check_arguments(config)  # before anything is loaded
    size = PRESETS[config.preset]["image"]
    training, val, test = _parts(source, size, split, config)
    name = f"{split} test" if not source.data else "test part"
    own = Path(config.output_dir) / config.run_name / "last" / "state.pth"
    go_on: bool | str = resume and (own.is_file() or not fork)  # a killed fork is resumed
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
        print(f"images: {test.attribution}")


def _parts(source: Source, size: int, split: Split, config: TrainingConfig):
    """(train, val, test) of the built-in images or the user's own."""
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
        found.near = found.near or 0  # other groups keep near-duplicates together
        print(f"{found}\n")
    return train, val, test


def _draw_searches(
    model: MultimodalEncoder, test: MultimodalDataset, name: str, path: Path, source: Source
):
    """Save a figure of ten searches by captions of the test part, and print what to do next."""
    index = Index(model, test)
    queries = [*dict.fromkeys(text[0] for text in test.texts)][:: max(1, len(test) // 10)][:10]
    caption = f"Ten captions of the {name}, each with the nearest of {len(test)} images."
    figure = plots.search_results(index, queries, k=min(6, len(test)), caption=caption)
    print(f"\nten searches: {plots.save(figure, path / 'searches.png')}")
    print("next: make lab (open 01_data.ipynb), or search all images by your own words:")
    query = queries[0] if source.data else "a woman firefighter"
    flags = [*source.words(without=("group",)), "--checkpoint", f"{path}/best_model.pth"]
    print(f"      {shlex.join([_python(), '-m', 'mmkit', 'search', query, *flags])}")


def _print_reconstruction(
    model: MultimodalEncoder, data: MultimodalDataset, config: TrainingConfig
):
    """Print how well the decoder reconstructs, masked as in validation; nothing without one."""
    if model.decoder is None:
        return
    masks: dict = validation_masks(config)
    modes: dict = dict(image_mode=config.image_mask_mode, text_mode=config.text_mask_mode)
    print("\nreconstruction (masked as in training):")
    for context in ("matched", "none", "mismatched") if model.decoder.across else ("matched",):
        found = evaluate_reconstruction(model, data, context=context, **masks, **modes)
        results = [f"pixel error {found['pixel_error']:.4f}"] if "pixel_error" in found else []
        if "mlm_accuracy" in found:
            results.append(f"token accuracy {100 * found['mlm_accuracy']:.1f} %")
            results.append(f"perplexity {found['mlm_perplexity']:.1f}")
        if "itm_accuracy" in found:
            accuracy = 100 * found["itm_accuracy"]
            results.append(f"matching accuracy {accuracy:.1f} % (always no: 66.7)")
        label = f"context {context}" if model.decoder.across else ""
        print(f"{label:28}{', '.join(results)}")


def _peak_gigabytes() -> float:
    """The largest memory this process has held, in GB."""
    try:
        import resource
    except ImportError:  # Windows
        import psutil

        memory = psutil.Process().memory_info()
        return getattr(memory, "peak_wset", memory.rss) / 1e9

    unit = 1 if sys.platform == "darwin" else 1024  # bytes on macOS, kilobytes on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def _python() -> str:
    """The command of this Python, short enough to type."""
    path = Path(sys.executable)
    return os.path.relpath(path) if path.is_relative_to(Path.cwd()) else "python"


def _print_scores(model: MultimodalEncoder, data: MultimodalDataset, name: str, masks: dict):
    """Print Recall@K both ways, with nothing masked and with patches masked, and chance."""
    print(f"\n{name}: {len(data)} images, {sum(map(len, data.texts))} captions (per cent)")
    print(f"{'':24}image to text         text to image         mean")
    print(f"{'':24}R@1    R@5    R@10   R@1    R@5    R@10   R@1")
    masker, ratio = masks["image_mask"]
    masked = f"{masker} mask"
    if masker not in ("painted", "layers"):  # these have no ratio
        fraction = f"{100 * ratio:.0f} %"
        masked = (
            f"{fraction} of patches masked"
            if masker == "random"
            else f"{masker}, {fraction} masked"
        )
    for label, options in (("nothing masked", {}), (masked, masks)):
        result = evaluate(model, data, **options)
        ways = [
            result[way].get(k) for way in ("image_to_text", "text_to_image") for k in (1, 5, 10)
        ]
        numbers = "".join(f"{'-' if x is None else f'{100 * x:.1f}':<7}" for x in ways)
        print(f"{label:24}{numbers}{100 * mean_recall(result):.1f}")
        cut = result["cut_captions"]
    if cut:
        print(
            f"{cut:,} captions are longer than the model reads, and are evaluated without their end"
        )
    chance = [chance_of_recall(data, k) for k in (1, 5, 10)]
    numbers = "".join(f"{100 * way[i]:<7.1f}" for i in (0, 1) for way in chance)
    print(f"{'chance':24}{numbers}{50 * sum(chance[0]):.1f}")


def _checkpoint(path: str) -> Path:
    """The given file, or the newest run's best model."""
    if path:
        return Path(path)
    newest = newest_run(Path("runs"))
    if not newest:
        raise FileNotFoundError(
            "no run in runs/; train first (make train), or give --checkpoint FILE"
        )
    return Run.load(Path("runs") / newest).best_file


def _metadata(path: Path) -> dict:
    """Metadata of a model's training, from a run, a checkpoint or an exported folder."""
    if path.is_dir():
        return read_config(path)["training"]
    if path.name == "best_model.pth" and (path.parent / "metrics.jsonl").is_file():
        return Run.load(path.parent).metadata
    return training_metadata(read_checkpoint(path))


def _evaluate(
    source: Annotated[Source, tyro.conf.arg(name="")],
    checkpoint: str = "",
    split: Split = "compose",
    part: Literal["val", "test", "all"] = "test",
    masked: float = 0.5,
) -> None:
    """Evaluate a checkpoint on a part of the images, with nothing and with patches masked.

    Args:
        source: The images.
        checkpoint: A best_model.pth or an exported folder; "" = the newest run's best model.
        split: How the built-in images are divided.
        part: Part to evaluate on, divided as `train` does; "all" is for images of your own.
        masked: Fraction of patches masked in the second line, in (0, 1).
    """
    source.refuse_without_data()
    if part == "all" and not source.data:
        raise ValueError("--part all is for images of your own; give --data, or a part")
    path = _checkpoint(checkpoint)
    model = load(path)
    masks = {"image_mask": ("random", masked)}
    if source.data:
        data, name = _own_part(source, model.image_size, part, path)
        _print_scores(model, data, name, masks)
        return
    trained_on = _metadata(path).get("data", "")
    if (trained_on == "openmoji-random-train") != (split == "random"):
        trained_on = trained_on or "other images"
        print(f"beware: trained on {trained_on}, which may hold images that are tested here")
    data = openmoji(image_size=model.image_size, split=split)[1 if part == "val" else 2]
    _print_scores(model, data, f"{split} {part}", masks)


def _own_part(source: Source, size: int, part: str, path: Path) -> tuple[MultimodalDataset, str]:
    """(a part of the user's images, its name); warns where the model may have seen it."""
    data, metadata = source.load(image_size=size), _metadata(path)
    trained_on = metadata.get("data", "")
    if part == "all":
        if trained_on == f"{data.name}-train":
            print("beware: these are all images, including those that the model was trained on")
        return data, f"all of {data.name}"
    train, val, test = source.divide(data, metadata.get("config", {}).get("seed", 0))
    if trained_on != train.name:
        print(f"beware: trained on {trained_on or 'other images'}, not on {train.name}")
    elif differs := _differing(path, train):
        print(
            f"beware: {train.name} is not what it was when the model was trained ({differs}), so "
            f"that the model may have seen the {part} part"
        )
    chosen = val if part == "val" else test
    assert chosen is not None  # `divide` returns three parts
    return chosen, f"{part} part"


def _differing(path: Path, train: MultimodalDataset) -> str:
    """How a set differs from the one a checkpoint was trained on; "" if not, or if unknown."""
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
    """Find images, the built-in ones or your own, by a text or an image file.

    Args:
        query: A text, or the path of an image.
        source: The images.
        checkpoint: A best_model.pth or an exported folder; "" = the newest run's best model.
        k: Number of images to find.
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
    caption = f"Nearest to {query!r} among all {source.data or 'built-in'} images (cosine)."
    print(
        plots.save(plots.image_grid([image for _, image in found], titles, 5, None, caption), out)
    )


def export(out: str, checkpoint: str = "") -> None:
    """Export a model as a folder to share: safetensors, JSON, its tokenizer and a model card.

    Args:
        out: Folder to write.
        checkpoint: A best_model.pth or an exported folder; "" = the newest run's best model.
    """
    path = _checkpoint(checkpoint)
    load(path).save_pretrained(out, metadata=_metadata(path))
    size = sum(file.stat().st_size for file in Path(out).iterdir())
    print(f"{path} written to {out} ({size / 1e6:.1f} MB); its README.md is the model's card")
    print(f'load it: mm.MultimodalEncoder.from_pretrained("{out}")')


def _current_flag(word: str) -> str:
    """A flag under its current name; an older one answers, with a message."""
    flag, given, value = word.partition("=")
    new = OLDER_FIELDS.get(flag.removeprefix("--").replace("-", "_")) if flag[:2] == "--" else None
    if new is None:
        return word
    new = f"--{new.replace('_', '-')}"
    print(f"mmkit: {flag} is called {new} now", file=sys.stderr)
    return f"{new}{given}{value}"


def main() -> None:
    """Run one of the commands; a wrong input gives a message of one line, not a traceback."""
    commands: dict[str, Callable] = {
        "inspect": inspect_,
        "train": train,
        "evaluate": _evaluate,
        "search": search,
        "export": export,
    }
    for stream in (sys.stdout, sys.stderr):  # Windows may have no arrows for what is not a screen
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    try:
        tyro.extras.subcommand_cli_from_dict(
            commands,
            prog="mmkit",
            description=__doc__.splitlines()[0],
            args=[_current_flag(word) for word in sys.argv[1:]],
        )
    except (ValueError, OSError, ImportError, InUse) as error:
        print(f"mmkit: {' '.join(str(error).splitlines())}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    if "TORCHELASTIC_ERROR_FILE" in os.environ:  # torchrun then reports the first failure
        from torch.distributed.elastic.multiprocessing.errors import record

        main = record(main)
    main()
