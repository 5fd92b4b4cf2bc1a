"""Public names say what they take, return and raise, and their examples run."""

import dataclasses
import doctest
import importlib
import inspect
import re

import pytest
import torch

import mmkit as mm

PACKAGES = (
    "data",
    "masking",
    "losses",
    "models",
    "evaluation",
    "training",
    "cost",
    "plots",
    "widgets",
)
FIRST_MET = """
    Index Masking MultimodalDataset MultimodalDataset.batch MultimodalEncoder
    MultimodalEncoder.preset MultimodalEncoder.from_backbones MaskedMultimodalTrainer TrainingConfig
    cost.step_flops describe embed embed_texts evaluate evaluate_reconstruction from_folder
    from_lists from_table info_nce inspect load load_data losses.masked_pixel_loss
    losses.masked_token_loss mask_noise masking.draw_maskings masking.random_mask
    masking.random_text_mask mean_recall openmoji overlap plots.image_grid recall_at_k reconstruct
    sigmoid_loss split train_model train_wordpiece unk_rate write_shards zero_shot
""".split()  # the names that users meet first


def public():
    """(name, object) of all functions and classes of mm and of its packages' `__all__`, once."""
    found = {}
    for module in [mm, *(importlib.import_module(f"mmkit.{name}") for name in PACKAGES)]:
        for name in getattr(module, "__all__", None) or [
            name for name, value in vars(module).items()
            if getattr(value, "__module__", "") == module.__name__ and name[0] != "_"
        ]:  # fmt: skip
            value = getattr(module, name)
            if inspect.isfunction(value) or inspect.isclass(value):
                found.setdefault(id(value), (f"{module.__name__}.{name}", value))
    return list(found.values())


def sections(doc: str) -> dict[str, str]:
    """Sections of a docstring in Google's style, name -> text."""
    parts = re.split(r"(?m)^(Args|Returns|Yields|Raises|Example|Examples):$", doc)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


@pytest.mark.parametrize("name, value", public(), ids=lambda x: x if isinstance(x, str) else "")
def test_a_docstring_names_arguments_and_result(name, value):
    doc = inspect.getdoc(value) or ""
    assert doc.split("\n")[0].rstrip().endswith((".", ":", "?", "…")), "no summary in one line"
    if dataclasses.is_dataclass(value):
        return  # its fields say what they are where they stand
    signature = inspect.signature(value)
    given = [p for p in signature.parameters if p not in ("self", "args", "kwargs")]
    found = sections(doc)
    missing = [
        p
        for p in given
        if not re.search(rf"(?m)^    (.*, )?\**{p}(, .*)?( \(.*\))?: ", found.get("Args", ""))
    ]
    assert not missing, f"not under Args: {missing}"
    if inspect.isfunction(value) and signature.return_annotation not in (
        None,
        "None",
        inspect.Signature.empty,
    ):
        assert found.get("Returns", "").strip() or found.get("Yields", "").strip(), "no Returns"


@pytest.mark.parametrize("name", FIRST_MET)
def test_an_example_runs(name, make_data, make_model, tmp_path, monkeypatch):
    """`>>>` in its docstring; mm and torch are imported, data and model are small and made."""
    monkeypatch.chdir(tmp_path)
    value = mm
    for part in name.split("."):
        value = getattr(value, part)
    names = {"mm": mm, "torch": torch, "data": make_data(23), "model": make_model()}
    example = doctest.DocTestParser().get_doctest(
        inspect.getdoc(value) or "", names, name, None, None
    )
    assert example.examples, f"{name} has no example"
    runner, said = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS), []
    runner.run(example, out=said.append)
    assert not runner.failures, "".join(said)
