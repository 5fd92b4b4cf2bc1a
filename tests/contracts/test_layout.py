"""The package is laid out as it says."""

import importlib
import pkgutil
import types
from pathlib import Path

import mmkit

ROOT = Path(__file__).parents[2]
# Tests of no single module, and tests and measurements that need what most machines lack.
APART = ("contracts", "browser", "gpu", "benchmarks")


def modules():
    for found in pkgutil.walk_packages(mmkit.__path__, "mmkit."):
        if not found.name.endswith("__main__"):
            yield importlib.import_module(found.name)


def test_no_module_is_shadowed_by_another_thing_of_its_name():
    """`from mmkit.training import launch` gives the module, whatever is defined there."""
    for module in modules():
        parent, _, name = module.__name__.rpartition(".")
        assert getattr(importlib.import_module(parent), name) is module, module.__name__


def test_what_a_package_offers_is_there_and_says_what_it_is():
    """Each `__all__` names what exists, and each function and class of it has a docstring."""
    for module in [mmkit, *modules()]:
        for name in getattr(module, "__all__", ()):
            value = getattr(module, name)
            if isinstance(value, types.FunctionType | type):
                assert value.__doc__, f"{module.__name__}.{name}"


def test_all_of_the_public_names_are_still_there():
    """What a user's code of the flat package imports from mmkit."""
    before = (
        "Batch EncoderOutput Index MaskedMultimodalTrainer Masking MultimodalDataset "
        "MultimodalEncoder Reading Run TrainingConfig cost describe embed embed_texts evaluate "
        "evaluate_reconstruction from_class_folders from_coco from_flickr30k from_folder from_hub "
        "from_lists from_shards from_table info_nce inspect launch load load_data losses "
        "mask_noise masking mean_recall minilm openmoji optim overlap plots probe put_back "
        "recall_at_k retrieval sigmoid_loss split train_model train_wordpiece unk_rate "
        "widgets write_shards zero_shot"
    ).split()
    assert [name for name in before if not hasattr(mmkit, name)] == []


def test_tests_mirror_the_package():
    """mmkit/a/b.py has tests/a/test_b.py, and each test file outside `APART` has its module."""
    package, tests = ROOT / "mmkit", ROOT / "tests"
    wanted = {
        path.relative_to(package).with_name(f"test_{path.name}").as_posix()
        for path in package.rglob("*.py")
        if not path.stem.startswith("__")
    }
    there = {path.relative_to(tests) for path in tests.rglob("test_*.py")}
    given = {path.as_posix() for path in there if path.parts[0] not in APART}
    missing, alone = sorted(wanted - given), sorted(given - wanted)
    assert not missing and not alone, f"not there: {missing}; of no module: {alone}"
