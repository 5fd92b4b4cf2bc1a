"""A call by one process alone ends in words; one by all of them works."""

import re

import pytest

from tests.training.launch.cells import run

TRAINED = """
    from tests.train_small import DEFAULTS, data, model

    def train(folder, callback):
        train, val = data(23), data(13, seed=1)
        config = mm.TrainingConfig(**DEFAULTS | dict(output_dir=folder, num_epochs=1))
        trainer = mm.MaskedMultimodalTrainer(
            config, train, val, model(train.tokenizer, 0.1), callbacks=[callback]
        )
        trainer.extra = data(7, train.tokenizer)
        return trainer.fit().history[-1]["loss"]
"""


@pytest.mark.parametrize(
    ("who", "call", "words"),
    [
        (0, "mm.evaluate(trainer.model, trainer.extra)", "mm.embed, by itself or in mm.evaluate"),
        pytest.param(
            1,
            "mm.Index(trainer.model, trainer.extra)",
            "mm.embed, by itself",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            0,
            "trainer.train_step(trainer.first_batch(), 0)",
            "the trainer's train_step",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_call_by_one_rank_alone_ends_in_words(tmp_path, who, call, words):
    """In a callback, while the other rank goes on training: an error instead of a deadlock."""
    done = run(
        TRAINED
        + f"""
    def callback(trainer, record):
        if trainer.rank == {who}:
            {call}

    refused(train, {str(tmp_path)!r}, callback, num_processes=2)
    """,
        seconds=150,
        OMP_NUM_THREADS="1",
    )
    assert "RuntimeError" in done.stdout and "all processes must make a call" in done.stdout
    assert words in done.stdout and "training, after the callbacks" in done.stdout


@pytest.mark.slow
def test_a_call_by_all_ranks_works_and_one_whose_others_have_gone_home_is_said(tmp_path):
    done = run(
        TRAINED
        + f"""
    from mmkit import joint_calls

    found = []
    def callback(trainer, record):
        found.append(mm.evaluate(trainer.model, trainer.extra)["loss"])
        if trainer.rank == 0:
            torch.rand(record["step"])  # ranks may differ in calls that are not joint

    def both(folder, callback):
        return train(folder, callback), found

    watched = mm.launch(both, {str(tmp_path / "a")!r}, callback, num_processes=2)
    alone = mm.launch(both, {str(tmp_path / "b")!r}, lambda *_: None, num_processes=2)
    print(watched[0] == alone[0], len(watched[1]) > 1, len(alone[1]))

    def one_only(who):
        train = data(13)
        if rank_and_world_size()[0] == who:
            mm.evaluate(model(train.tokenizer, 0.0), train)

    refused(one_only, 0, num_processes=2)
    refused(one_only, 1, num_processes=2)

    def waits_long():
        joint_calls.SAID, joint_calls.LIMIT = 0.2, 1.0
        if rank_and_world_size()[0]:
            return time.sleep(3)
        joint_calls.meet("this call")
    refused(waits_long, num_processes=2)
    """,
        seconds=300,
        OMP_NUM_THREADS="1",
    )
    assert "\nTrue True 0\n" in done.stdout
    for rank in (0, 1):
        words = f"process {rank} of 2 is in mm.embed, .*process {1 - rank} is in no call: it has e"
        assert re.search(words, done.stdout)
    assert "has waited 1 s in this call for process [1]" in done.stdout
    assert "has waited 0 s in this call for process [1], which has not called it" in done.stderr
