"""A small training for torchrun's workers, one of which is killed with SIGKILL, once.

python -m torch.distributed.run … -m tests.dies_once FOLDER NAME '{"num_epochs": 3}'
    [--kill RANK@STEP …] [--wait-alone STEP]

Each kill happens once: a file beside the run remembers it. wait-alone: a single process waits
before that step, for another one to join.
"""

import argparse
import json
import os
import signal
import time

import mmkit as mm
from tests.train_small import DEFAULTS, data, model


class DiesOnce(mm.MaskedMultimodalTrainer):
    kills, wait_alone = (), -1

    def train_step(self, batch, epoch):
        here = f"{self.rank}@{self.step}"
        done = self.path.with_name(f"{self.path.name}-killed-{here}")
        if here in self.kills and not done.exists():
            done.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        while self.step == self.wait_alone and self.processes == 1:
            time.sleep(0.1)  # until torchrun ends this process
        return super().train_step(batch, epoch)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("folder")
    parser.add_argument("name")
    parser.add_argument("values", type=json.loads)
    parser.add_argument("--kill", nargs="*", default=())
    parser.add_argument("--wait-alone", type=int, default=-1)
    args = parser.parse_args()
    where = dict(output_dir=args.folder, run_name=args.name)
    config = mm.TrainingConfig(**DEFAULTS | where | args.values)
    train = data(53)
    built = model(train.tokenizer, config.dropout)
    trainer = DiesOnce(config, train, data(17, seed=1), built)
    trainer.kills, trainer.wait_alone = args.kill, args.wait_alone
    trainer.fit()


if __name__ == "__main__":
    main()
