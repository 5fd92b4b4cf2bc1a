"""A run that was killed, at any time and any number of times, ends as one that was not."""

import itertools
import math
import os
import random
import shutil
import time

import pytest
import torch

import mmkit as mm
from mmkit.models.checkpoint import read_checkpoint
from tests.killing import Forks
from tests.train_small import DEFAULTS
from tests.training.small_runs import differences, recorded_masks

# All features whose state must be saved, at once.
EVERYTHING = dict(
    mixed_precision="fp16", gradient_accumulation_steps=2, dropout=0.2,
    image_mask="attentive", text_mask_mode="80/10/10", mim_weight=0.5, mlm_weight=0.3,
    itm_weight=0.2, cross_modal=True, decoder_width=32, decoder_depth=1, ema_decay=0.9,
    term_gradients_every=3,
)  # fmt: skip
FILES = ("last/state.pth", "best_model.pth")


@pytest.fixture(scope="module")
def forks():
    forks = Forks()
    yield forks
    forks.close()


def check_same(folder, one, other):
    """Every record, and every tensor and number in both files."""
    records = [mm.Run.load(folder / name).history for name in (one, other)]
    assert len(records[0]) == len(records[1])
    assert differences(*records) == []
    for file in FILES:
        states = [read_checkpoint(folder / name / file) for name in (one, other)]
        assert {"model_state_dict", "optimizer_state_dict"} <= states[0].keys()
        assert differences(*states) == [], file
    left = [p.name for p in (folder / other).rglob("*") if ".tmp" in p.name]
    assert left == []


def test_a_single_bit_is_a_difference():
    state = {"a": [torch.zeros(2), {"b": 1.0}], "seconds": 3.0}
    assert differences(state, {"a": [torch.zeros(2), {"b": 1.0}], "seconds": 4.0}) == []
    other = {"a": [torch.tensor([0.0, 1e-45]), {"b": math.nextafter(1.0, 2.0)}], "c": 2}
    assert differences(state, other) == ["/a/0", "/a/1/b", "/c"]


# -- killed ----------------------------------------------------------------------------------


def step_times(notes) -> list[float]:
    begun = [seconds for seconds, words in notes if words.startswith("step")]
    return [b - a for a, b in itertools.pairwise(begun)]


def where_killed(notes) -> tuple[int, str]:
    """(step, the file that was being written or "")."""
    step = [int(words.split()[1]) for _, words in notes if words.startswith("step")][-1]
    last = notes[-1][1]
    return step, last.removeprefix("writing ") if last.startswith("writing") else ""


@pytest.mark.slow
@pytest.mark.parametrize("processes, every", [(1, 1), (2, 2)])
def test_killed_at_ten_random_moments(forks, tmp_path, processes, every):
    """SIGKILL of all its processes, ten times during the run: the same bits at the end.

    KILL_SEED=... repeats the moments: so many steps after the start, and a part of a step more.
    """
    seed = int(os.environ.get("KILL_SEED", time.time_ns() % 2**32))
    draw = random.Random(seed)
    values = EVERYTHING | dict(checkpoint_every=every, num_epochs=12, warmup_steps=7)
    whole = forks.train(tmp_path, "whole", values, processes=processes)
    assert whole["status"] == 0, whole["log"]
    step_time = sorted(step_times(whole["notes"]))[30]
    moments = [(steps, draw.uniform(0, 1.3 * step_time)) for steps in (1, 2, 3, 4, 5) * 2]
    draw.shuffle(moments)

    hits = []
    options = dict(processes=processes, resume=True)
    for moment in moments:
        killed = forks.train(tmp_path, "killed", values, kill=moment, **options)
        assert killed["status"] == -9, killed["log"]
        hits.append(where_killed(killed["notes"]))
    inside = [file for _, file in hits if file]
    print(f"KILL_SEED={seed}, {processes} processes, a step takes {1000 * step_time:.0f} ms")
    print("killed in step", ", ".join(f"{step} {file}".strip() for step, file in hits))
    print(f"{len(inside)} of {len(hits)} inside the write of a checkpoint")
    steps = [step for step, _ in hits]
    assert len(set(steps)) >= 4 and steps[-1] > 10  # it made progress in between

    done = forks.train(tmp_path, "killed", values, **options)
    assert done["status"] == 0 and "resuming" in done["log"], done["log"]
    assert 0 < read_checkpoint(tmp_path / "killed/last/state.pth")["skipped"] < 20
    check_same(tmp_path, "whole", "killed")


@pytest.mark.slow
@pytest.mark.parametrize("manner", ["before", "torn"])
def test_killed_at_every_change_to_a_file(forks, tmp_path, manner):
    """Each start dies at a later file change: before it, or with a part of the bytes written.

    Such changes are every write and rename of metrics, settings and checkpoints: half a temporary
    file, before its rename, after it but before the metrics, between the best and the last one, and
    while a resumed run rewrites its metrics.
    """
    values = EVERYTHING | dict(checkpoint_every=2)
    assert forks.train(tmp_path, "whole", values)["status"] == 0
    places = set()
    for number in range(1, 40):
        reply = forks.train(tmp_path, "killed", values, resume=True, die_at=[number, manner])
        words = [words for _, words in reply["notes"]]
        places |= {note for note in words if note.startswith("dies at")}
        if reply["status"] == 0:
            break
        assert reply["status"] < 0, reply["log"]
        for file in FILES:
            if (tmp_path / "killed" / file).exists():
                read_checkpoint(tmp_path / "killed" / file)  # complete, whatever happened
        if (tmp_path / "killed/metrics.jsonl").exists():
            mm.Run.load(tmp_path / "killed")
    assert reply["status"] == 0 and number > 10
    wanted = {f"dies at {place}" for place in (
        "write .lock", "write metrics.jsonl (temporary)", "rename metrics.jsonl",
        "write metrics.jsonl", "write state.pth (temporary)", "rename state.pth",
    )}  # fmt: skip
    print(manner, sorted(places))
    assert wanted <= places and any("config.json" in place for place in places)
    check_same(tmp_path, "whole", "killed")


@pytest.mark.slow
def test_killed_between_best_and_last(forks, tmp_path):
    """The epoch's steps are saved before validation: the end of the epoch is repeated."""
    values = EVERYTHING | dict(num_epochs=2)
    assert forks.train(tmp_path, "whole", values)["status"] == 0
    # 5 changes at the start, 5 + 2 records; then last/, the strip of images, best_model.pth: write,
    # rename; the record; last/ once more
    wanted = ["rename state.pth", "write 00000005.png (temporary)", "rename 00000005.png",
              "write best_model.pth (temporary)", "rename best_model.pth", "write metrics.jsonl",
              "write state.pth (temporary)", "rename state.pth"]  # fmt: skip
    seen = []
    for number in range(13, 24):
        name = f"killed{number}"
        reply = forks.train(tmp_path, name, values, die_at=[number, "before"])
        assert reply["status"] == -9
        seen.append(reply["notes"][-1][1].removeprefix("dies at "))
        reply = forks.train(tmp_path, name, values, resume=True)
        began = "resuming" if "rename state.pth" in seen[:-1] else "nothing to resume"
        assert reply["status"] == 0 and began in reply["log"], reply["log"]
        check_same(tmp_path, "whole", name)
        if seen.count("rename state.pth") == 2:
            break
    assert seen[-len(wanted) :] == wanted


@pytest.mark.slow
def test_killed_while_an_earlier_run_is_replaced(forks, tmp_path):
    """The earlier run is there, or cannot be resumed; a part of it is never continued."""
    old, new = dict(num_epochs=1, learning_rate=1e-3), dict(num_epochs=1)
    assert forks.train(tmp_path, "old", old)["status"] == 0
    assert forks.train(tmp_path, "whole", new)["status"] == 0
    places = []
    for number in range(1, 8):
        name = f"killed{number}"
        shutil.copytree(tmp_path / "old", tmp_path / name)
        reply = forks.train(tmp_path, name, new, die_at=[number, "before"])
        assert reply["status"] == -9
        places.append(reply["notes"][-1][1].removeprefix("dies at "))
        best = [tmp_path / run / "best_model.pth" for run in ("old", name)]
        assert best[0].read_bytes() == best[1].read_bytes()
        untouched = "remove state.pth" not in places[:-1]
        reply = forks.train(tmp_path, name, new if not untouched else old, resume=True)
        assert reply["status"] == 0 and ("resuming" in reply["log"]) == untouched, reply["log"]
        check_same(tmp_path, "old" if untouched else "whole", name)
    assert places == ["write .lock", "remove state.pth", "remove config.json",
                      "write metrics.jsonl (temporary)", "rename metrics.jsonl",
                      "write config.json (temporary)", "rename config.json"]  # fmt: skip


@pytest.mark.slow
def test_images_from_files_are_drawn_again_as_they_were(forks, tmp_path):
    """Decoding workers and a random transform, killed in mid-epoch; more workers afterwards."""
    values = dict(dropout=0.2, num_epochs=2, checkpoint_every=1, num_workers=1)
    assert forks.train(tmp_path, "whole", values, files=True)["status"] == 0
    assert forks.train(tmp_path, "killed", values, files=True, kill_at=7)["status"] != 0
    reply = forks.train(tmp_path, "killed", values | dict(num_workers=2), files=True, resume=True)
    assert reply["status"] == 0 and "resuming" in reply["log"], reply["log"]
    check_same(tmp_path, "whole", "killed")


@pytest.mark.slow
@pytest.mark.parametrize("before, after", [(1, 2), (2, 1), (3, 2)])
def test_the_number_of_processes_may_change_on_resume(forks, tmp_path, before, after):
    """Killed in mid-epoch: the same up to summation, every sample still once in that epoch."""
    values = dict(optimizer="adamw", gradient_accumulation_steps=2, num_epochs=3)
    values |= dict(checkpoint_every=1, text_mask_mode="80/10/10")
    options = dict(record=True)
    assert forks.train(tmp_path, "straight", values, **options)["status"] == 0
    reply = forks.train(tmp_path, "changed", values, processes=before, kill_at=7, **options)
    assert reply["status"] != 0
    reply = forks.train(tmp_path, "changed", values, processes=after, resume=True, **options)
    assert reply["status"] == 0 and "at step 7 of 15" in reply["log"], reply["log"]
    assert f"processes: {after}" in reply["log"]

    straight, changed = (mm.Run.load(tmp_path / name).history for name in ("straight", "changed"))
    assert [r["step"] for r in changed] == [r["step"] for r in straight]
    for key in ("loss", "train_loss", "grad_norm"):
        values = [[r[key] for r in records if key in r] for records in (changed, straight)]
        assert values[0] == pytest.approx(values[1], rel=1e-4)
    weights = [
        read_checkpoint(tmp_path / name / "last/state.pth")["model_state_dict"]
        for name in ("straight", "changed")
    ]
    for name, weight in weights[0].items():
        torch.testing.assert_close(weights[1][name], weight, rtol=1e-3, atol=1e-4)
    drawn = recorded_masks(tmp_path, "changed")
    assert len(drawn) == 3 * 53 and drawn == recorded_masks(tmp_path, "straight")


def test_two_threads_give_the_same_bits_twice(make_model, make_data, tmp_path):
    """Rows that several pairs use are summed in a fixed order, in any thread order."""
    threads, ends = torch.get_num_threads(), []
    torch.set_num_threads(2)
    try:
        for name in ("one", "other"):
            values = EVERYTHING | dict(mixed_precision="no", batch_size=53, num_epochs=5)
            config = mm.TrainingConfig(
                **DEFAULTS | values | dict(output_dir=str(tmp_path), run_name=name)
            )
            run = mm.train_model(config, make_data(53), make_data(17, seed=1), make_model(0.2))
            ends.append((run.history, read_checkpoint(run.path / "last/state.pth")))
    finally:
        torch.set_num_threads(threads)
    assert differences(*ends) == []
