"""The card of a shared model says what is known, and nothing else."""

import re

from huggingface_hub import ModelCard

import mmkit as mm
from tests.models.folders import FILES, METADATA, same_model


def test_the_card_says_what_is_known(make_model, tmp_path):
    make_model(pooling="cls").save_pretrained(tmp_path / "shared", metadata=METADATA)
    card = ModelCard.load(tmp_path / "shared/README.md")
    assert card.data.library_name == "mmkit" and "mmkit" in card.data.tags
    assert card.data.pipeline_tag == "zero-shot-image-classification"
    for row in (
        "| image | 15 x 15 pixels, patches of 5: 9 |",
        "| ViT | width 22, 2 layers, 2 heads |",
        "captions of up to 17 tokens",
        "| common space | 13 numbers |",
        "| pooling | the first token |",
        "| data | openmoji-compose-train |",
        "| `image_mask` | block |",
        "| `image_mask_ratio` | 0.4 |",
        "| `text_mask_ratio` | 0.15 |",
        "| weights of epoch | 13 |",
        "| image to text R@1, validation | 87.1 % |",
        "MIT licence",
        "CC BY-SA 4.0",
    ):
        assert row in card.text, row
    parameters = sum(p.numel() for p in make_model().parameters())
    assert f"| parameters | {parameters:,} |" in card.text
    for file in FILES - {"model.safetensors"}:
        assert "/home/me" not in (tmp_path / "shared" / file).read_text()


def test_the_card_of_a_model_of_unknown_training_claims_nothing(make_model, tmp_path):
    make_model().save_pretrained(tmp_path / "shared")
    card = (tmp_path / "shared/README.md").read_text()
    assert "Nothing was recorded" in card and "OpenMoji" not in card and "R@1" not in card


def test_the_lines_on_the_card_run(make_model, tmp_path, monkeypatch):
    make_model().save_pretrained(tmp_path / "shared")
    (code,) = re.findall(r"```python\n(.*?)```", (tmp_path / "shared/README.md").read_text(), re.S)
    monkeypatch.chdir(tmp_path)
    scope: dict = {}
    exec(code, scope)
    same_model(make_model(), scope["model"])


def test_every_tensor_is_on_the_card(make_model, shared):
    card = (shared / "README.md").read_text()
    named = re.findall(r"`([a-z_]+)(?:\.\*)?`", card)
    assert {name.split(".")[0] for name in make_model().state_dict()} <= set(named)


def test_a_run_knows_its_metadata(make_data, make_model, tmp_path):
    """After a real run of two steps, the card names settings, data and recall."""
    config = mm.TrainingConfig(
        batch_size=11, max_steps=2, image_mask_ratio=0.3, output_dir=str(tmp_path), run_name="quick"
    )
    data = make_data(23, name="noise")
    run = mm.train_model(config, data, make_data(7, seed=1), model=make_model())
    run.model.save_pretrained(tmp_path / "shared", metadata=run.metadata)
    card = (tmp_path / "shared/README.md").read_text()
    recall = 100 * run.best["text_to_image_R@1"]
    for row in ("| data | noise |", "| `image_mask_ratio` | 0.3 |", "| `max_steps` | 2 |"):
        assert row in card
    assert f"| text to image R@1, validation | {recall:.1f} % |" in card
    same_model(run.model, mm.load(tmp_path / "shared"))
