"""The book has every notebook, public name and number; `make docs` builds it, links included."""

import importlib
import re
import sys
from operator import attrgetter
from pathlib import Path

import pytest
import torch

import mmkit as mm
from tests.contracts.test_docstrings import public

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
sys.path.insert(0, str(DOCS))

from extensions import lookup  # noqa: E402
from extensions.fields import fields_of  # noqa: E402

PAGES = sorted([*DOCS.glob("*.md"), *DOCS.glob("*/*.md")])
NUMBERS = [
    (page.name, role, text)
    for page in PAGES
    for role, text in re.findall(r"\{(result|printed)\}`([^`]+)`", page.read_text())
]


def test_the_contents_name_every_notebook():
    listed = re.findall(r"</notebooks/(\w+)>", (DOCS / "index.md").read_text())
    assert sorted(listed) == sorted(path.stem for path in (ROOT / "notebooks").glob("*.ipynb"))


def documented():
    """All values that the reference has an entry for."""
    found = []
    for page in (DOCS / "api").glob("*.rst"):
        for module, names in re.findall(r"\.\. api:: (\S+)\n\n((?:   \S+\n)+)", page.read_text()):
            found += [attrgetter(name)(importlib.import_module(module)) for name in names.split()]
    return found


def test_the_reference_has_every_public_name_once():
    entries = [id(value) for value in documented() if callable(value)]
    assert [name for name, value in public() if id(value) not in entries] == []
    assert len(entries) == len(set(entries))


@pytest.mark.parametrize("page, role, text", NUMBERS)
def test_a_number_is_in_the_file_that_it_names(page, role, text):
    assert (lookup.number if role == "result" else lookup.printed_number)(text)


@pytest.mark.parametrize("page", sorted((DOCS / "results").glob("*.md")), ids=lambda p: p.name)
def test_no_measured_number_is_typed(page):
    """Of decimals, only those of formats, of options and of code stand in the pages of results."""
    text = re.sub(r"(?s)^```\{.*?^```$", "", page.read_text(), flags=re.M)
    text = re.sub(r"(\{\w+\})?`[^`]*`", "", text)
    assert re.findall(r"\d[.,]\d+", re.sub(r"1,024 images", "", text)) == []


def test_a_number_that_is_missing_is_an_error_that_says_what_there_is():
    for text in (
        ".1f equal_time > rows > masked=0.5 > mean",  # three rows
        ".1f equal_time > rows > masked=0.5, seconds=10 > median",
    ):
        with pytest.raises(KeyError, match=r"fits 3 of|no 'median' in \['seconds'"):
            lookup.number(text)
    with pytest.raises(KeyError, match="printed nothing like"):
        lookup.printed_number(".1f 02_masking > ^no such masker ([0-9.]+)")


def test_numbers_are_shown_in_their_format():
    values = [0.25, 0.5, 0.75]
    assert lookup.shown(0.0317, "100*.1f") == "3.2"
    assert lookup.shown(-1.5, ".1f") == "−1.5" and lookup.shown(None, ".1f") == "–"
    assert lookup._step(values, "mean") == 0.5 and lookup._step(values, "1") == 0.5
    assert lookup._step(values, "plus_minus") == pytest.approx(0.621, abs=1e-3)  # t = 4.303
    assert lookup._step([[3, 0.2], [5, 0.6]], "first 0.45") == 5
    assert lookup._step([[3, 0.2], [5, 0.4]], "first 0.45") is None


def test_the_fields_of_a_dataclass_have_their_comments():
    by_name = {field.name: field for field in fields_of(mm.TrainingConfig)}
    assert by_name["max_steps"].comment.startswith("Optimizer steps after which")
    assert by_name["seed"].heading == "machine" and by_name["seed"].default == "0"
    assert all(field.comment for field in by_name.values())
    assert fields_of(mm.Masking)[0].comment == "(B, N) bool, True = masked"


TERMS = """
    masked, visible, mask ratio, token, image, position, padding, valid, word, micro-batch,
    reconstruct, context, MIM, MLM, ITM, baseline, reference line, EMA, eval_mode, ForwardSpec,
    metadata, to_rgb, token_frequency, maskable_tokens, unk_rate, neighbour_exchange, training run,
    optimizer state, backward pass
""".replace("\n", " ").split(", ")


def test_the_glossary_has_the_terms():
    text = (DOCS / "concepts/glossary.md").read_text()
    assert [term for term in TERMS if f"\n{term.strip()}\n" not in text] == []


# -- examples of the guides --------------------------------------------------------------------


def example(page: str, name: str) -> str:
    """The block of Python in a guide that defines a function."""
    blocks = re.findall(r"(?s)```python\n(.*?)```", (DOCS / "guides" / page).read_text())
    (found,) = [block for block in blocks if f"def {name}(" in block]
    return found


def test_the_masker_of_the_guide_works(monkeypatch):
    """The exact number is masked, nearest patches stay, and a sample's mask is its own."""
    monkeypatch.setitem(mm.masking.IMAGE_MASKERS, "far", None)  # removed after the test
    names: dict = {}
    exec(example("maskers.md", "far_mask"), names)
    noise = mm.mask_noise(0, 0, torch.tensor([3, 5]), 35)
    masking = names["far_mask"](noise, 0.6, mm.masking.Scene((5, 7)))
    assert (~masking.mask).sum(1).tolist() == [14, 14]
    alone = names["far_mask"](noise[1:], 0.6, mm.masking.Scene((5, 7)))
    assert torch.equal(alone.mask[0], masking.mask[1])
    assert not masking.mask.gather(1, noise.argmin(1, keepdim=True)).any()
    assert names["config"].image_mask == "far"


def test_the_loss_of_the_guide_works(monkeypatch):
    """Summed over parts of the rows it is the sum over all."""
    monkeypatch.setitem(mm.losses.CONTRASTIVE, "one_way", None)
    names: dict = {"mm": mm, "torch": torch}
    exec(example("terms.md", "one_way"), names)
    image, text = torch.nn.functional.normalize(torch.randn(2, 7, 5), dim=-1)
    loss = mm.losses.CONTRASTIVE["one_way"]
    whole = loss((image, text), (image, text), 10.0, 0.0, 0, None)
    parts = [
        loss((image[a:b], text[a:b]), (image, text), 10.0, 0.0, a, None)
        for a, b in ((0, 3), (3, 7))
    ]
    torch.testing.assert_close(sum(parts), whole)
