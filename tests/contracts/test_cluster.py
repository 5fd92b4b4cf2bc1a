"""Several machines: torchrun's agents find each other and restart killed workers."""

import json
import re
import sys
from pathlib import Path

import pytest
import torch

import mmkit as mm
from tests.train_small import DEFAULTS, data, model
from tests.two_nodes import Nodes

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]


def losses(path):
    return [(r["split"], r["step"], r["loss"]) for r in mm.Run.load(path).history]


def assert_equal_up_to_summation(path, reference):
    ours, theirs = losses(path), losses(reference)
    assert [r[:2] for r in ours] == [r[:2] for r in theirs]
    assert [r[2] for r in ours] == pytest.approx([r[2] for r in theirs], rel=1e-4)


def test_two_nodes_run_the_command_and_are_one_process(tmp_path):
    """The built-in images, in micro-batches: the losses of one process; rank 0 evaluates."""
    values = dict(max_steps=3, batch_size=24, log_every=1, mixed_precision="no", num_workers=0)
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in values.items()]
    flags += ["--gradient-accumulation-steps=2", "--run-name=two", f"--output-dir={tmp_path}"]
    with Nodes(tmp_path) as nodes:
        for _ in range(2):
            nodes.start("-m", "mmkit", "train", *flags)
        train, val, _ = mm.openmoji(image_size=64)
        config = mm.TrainingConfig(**values, output_dir=str(tmp_path), run_name="one")
        mm.train_model(config, train, val)
        assert nodes.finish() == [0, 0], nodes.errors()
        rank_0, rank_1 = nodes.said()
        assert "processes: 2" in rank_0 and rank_0.count("compose test: ") == 1
        assert rank_1 == ""
        # The agents may print a last message of their own on how they ended.
        assert "Warning" not in nodes.errors() and "Traceback" not in nodes.errors()
    assert_equal_up_to_summation(tmp_path / "two", tmp_path / "one")
    assert len(list((tmp_path / "two").glob("events*"))) == 1  # one process wrote
    assert (tmp_path / "two/searches.png").is_file()


def small(folder, name, *flags, **values):
    return ["-m", "tests.dies_once", folder, name, json.dumps(values), *flags]


def test_killed_workers_are_restarted_and_nothing_is_lost(tmp_path):
    """One killed before the first checkpoint, the other in mid-epoch: the same bits at the end."""
    values = dict(dropout=0.2, gradient_accumulation_steps=2, checkpoint_every=3)
    with Nodes(tmp_path) as nodes:
        for _ in range(2):
            nodes.start(*small(tmp_path, "whole", **values))
        assert nodes.finish() == [0, 0], nodes.errors()
    with Nodes(tmp_path, max_restarts=3) as nodes:
        for _ in range(2):
            nodes.start(*small(tmp_path, "killed", "--kill", "1@1", "0@8", **values))
        assert nodes.finish() == [0, 0], nodes.errors()
        said = "".join(nodes.said())
    began = re.findall(
        r"nothing to resume .*: starting a new run|resuming .* at step \d+ of \d+", said
    )
    anew = f"nothing to resume in {tmp_path / 'killed'}: starting a new run"
    assert began == [anew, anew, f"resuming {tmp_path / 'killed'} at step 6 of 15"]
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")
    for file in ("last/state.pth", "best_model.pth"):
        one, other = (
            mm.models.checkpoint.read_checkpoint(tmp_path / n / file) for n in ("whole", "killed")
        )
        torch.testing.assert_close(
            one["model_state_dict"], other["model_state_dict"], rtol=0, atol=0
        )
        assert str(one["optimizer_state_dict"]) == str(other["optimizer_state_dict"])


def test_a_machine_that_joins_does_not_begin_anew(tmp_path):
    """torchrun restarts the workers for it without counting a restart; the run is resumed."""
    values = dict(num_epochs=2, checkpoint_every=3, optimizer="adamw")
    words = small(tmp_path, "grown", "--wait-alone", "8", **values)
    with Nodes(tmp_path, nnodes="1:2", max_restarts=1) as nodes:
        nodes.start(*words)
        nodes.wait_for("epoch   1/2")
        nodes.start(*words)
        where = dict(output_dir=str(tmp_path), run_name="alone")
        train = data(53)
        config = mm.TrainingConfig(**DEFAULTS | where | values)
        mm.train_model(config, train, data(17, seed=1), model(train.tokenizer, 0.0))
        assert nodes.finish() == [0, 0], nodes.errors()
        said = "".join(nodes.said())
    assert "at step 6 of 10" in said or "at step 5 of 10" in said
    assert "saved by 1 processes, now 2: the same up to float summation" in said
    assert_equal_up_to_summation(tmp_path / "grown", tmp_path / "alone")


def test_a_run_that_may_be_restarted_needs_a_name(tmp_path):
    with Nodes(tmp_path, nnodes="1", max_restarts=1) as nodes:
        nodes.start("-m", "mmkit", "train", f"--output-dir={tmp_path / 'runs'}")
        assert nodes.finish() != [0]
        assert "give a run_name, or no --max-restarts" in nodes.errors()
        assert "Traceback" not in nodes.errors().split("give a run_name")[0]
    assert not (tmp_path / "runs").exists()


def test_a_folder_that_is_not_shared_is_named(tmp_path):
    """Each machine has its own disk: all report it, and none waits forever."""
    command = (
        f"exec {sys.executable} -m mmkit train --run-name=x --output-dir={tmp_path}/$GROUP_RANK"
    )
    with Nodes(tmp_path) as nodes:
        for _ in range(2):
            nodes.start("--no-python", "bash", "-c", command)
        assert 0 not in nodes.finish()
        summary = nodes.errors().split("Root Cause")[1]
        assert "is seen by 1 of 2 processes; output_dir must be a folder that all" in summary
