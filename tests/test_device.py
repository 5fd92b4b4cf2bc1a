"""Number types are chosen by asking the device, and the choice is reported."""

import json
import os
import subprocess
import sys

import pytest
import torch

import mmkit as mm
from mmkit.device import multiplies_bfloat16, pick_precision
from mmkit.training.optim import orthogonalize, orthogonalizing_type
from mmkit.training.summary import describe
from tests import AVX2
from tests.conftest import captions

CPU = torch.device("cpu")


def trainer(folder, **settings) -> mm.MaskedMultimodalTrainer:
    """A small preset model, so that Muon has matrices to orthogonalise."""
    pixels = torch.randint(
        0, 256, (23, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    data = mm.MultimodalDataset.from_pixels(pixels, captions(23))
    config = mm.TrainingConfig(batch_size=23, output_dir=str(folder), **settings)
    return mm.MaskedMultimodalTrainer(config, data)


def metadata(folder) -> dict:
    """What this process chooses and learns; also run in a process that is limited to AVX2."""
    stack = torch.randn(3, 13, 37, generator=torch.Generator().manual_seed(0))
    one = trainer(folder)
    batch = one.first_batch()
    return {
        "fast": multiplies_bfloat16(CPU),
        "auto": str(pick_precision("auto", CPU)),
        "muon": str(orthogonalize(stack).dtype),
        "orthogonal": orthogonalize(stack).float().tolist(),
        "said": describe(one),
        "asked": describe(trainer(folder, mixed_precision="bf16")),
        "losses": [float(one.train_step(batch, 0)[0]) for _ in range(3)],
    }


@pytest.fixture(scope="module")
def on_avx2(tmp_path_factory) -> dict:
    code = (
        "import json, sys; from tests.test_device import metadata; "
        "print(json.dumps(metadata(sys.argv[1])))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path_factory.mktemp("runs"))],
        env=os.environ | AVX2, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_without_bfloat16_units_everything_is_float32(on_avx2):
    assert on_avx2["fast"] is False
    assert (on_avx2["auto"], on_avx2["muon"]) == ("None", "torch.float32")


def test_the_start_report_says_the_type_and_why(on_avx2, tmp_path):
    assert "cpu, float32 (auto: this CPU has no units for bfloat16)" in on_avx2["said"]
    assert "Muon (float32) + AdamW" in on_avx2["said"] and "beware      cpu" not in on_avx2["said"]
    assert "bfloat16 (as asked)" in on_avx2["asked"]
    assert "no units for bfloat16" in on_avx2["asked"].split("beware")[1]
    here = describe(trainer(tmp_path))
    kind = "bfloat16 (auto: this CPU has units" if multiplies_bfloat16(CPU) else "float32 (auto"
    assert kind in here and f"Muon ({str(orthogonalizing_type(CPU))[6:]})" in here
    assert "float32 (as asked)" in describe(trainer(tmp_path, mixed_precision="no"))
    assert "no units for float16" in describe(trainer(tmp_path, mixed_precision="fp16"))


def test_float32_products_give_the_step_of_bfloat16_ones(on_avx2, tmp_path):
    """Up to the rounding of bfloat16: Muon's directions, and the losses of three steps."""
    stack = torch.randn(3, 13, 37, generator=torch.Generator().manual_seed(0))
    reference = orthogonalize(stack, dtype=torch.bfloat16).float()
    found = torch.tensor(on_avx2["orthogonal"])
    assert (found - reference).norm() < 0.03 * reference.norm()
    assert (found - reference).norm() > 0
    assert on_avx2["losses"] == pytest.approx(metadata(tmp_path)["losses"], rel=0.05)
    assert on_avx2["losses"][-1] < on_avx2["losses"][0]


@pytest.mark.parametrize("emulated, expected", [(True, torch.float16), (False, torch.bfloat16)])
def test_a_gpu_that_only_emulates_bfloat16_takes_fp16(monkeypatch, emulated, expected):
    """torch says "supported" for emulation, too, unless it is asked not to."""

    def supported(including_emulation=True):
        return including_emulation or not emulated

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    cuda = torch.device("cuda")
    assert pick_precision("auto", cuda) == expected
    assert orthogonalizing_type(cuda) == (torch.float32 if emulated else torch.bfloat16)


def test_float16_on_a_cpu_is_only_by_request():
    assert mm.device.pick_precision("auto", torch.device("cpu")) != torch.float16
    assert mm.device.pick_precision("fp16", torch.device("cpu")) == torch.float16
