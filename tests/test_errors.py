"""Settings of other types become plain values."""

import json
import os
from pathlib import Path

import numpy as np
import torch

from mmkit import TrainingConfig


def test_numbers_and_paths_of_other_types_become_plain_values():
    given = TrainingConfig(
        num_epochs=np.int64(3), batch_size=16.0, max_steps=torch.tensor(7), seed=np.uint8(5),
        learning_rate=np.float32(0.1), weight_decay=1, deterministic=np.bool_(True),
        output_dir=Path("some") / "runs", run_name=np.str_("one"), matrix_learning_rate=None,
        text_mask_ratio=torch.tensor(0.3), image_mask_schedule="linear", image_mask_final_ratio=0,
    )  # fmt: skip
    plain = dict(
        num_epochs=3, batch_size=16, max_steps=7, seed=5, learning_rate=0.1, weight_decay=1.0,
        deterministic=True, output_dir=os.path.join("some", "runs"), run_name="one",
        text_mask_ratio=0.3, matrix_learning_rate=None, image_mask_final_ratio=0.0,
    )  # fmt: skip
    found = json.loads(json.dumps(given.to_dict()))
    for name, value in plain.items():
        assert found[name] == value and type(found[name]) is type(value), name
