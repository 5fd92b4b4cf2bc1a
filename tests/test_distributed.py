"""What processes exchange keeps its gradient."""

import subprocess
import sys
import textwrap

import pytest
import torch

from mmkit.distributed import rank_slice


def run(code: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", textwrap.dedent(code)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def test_one_process_has_the_whole_batch():
    assert torch.equal(rank_slice(torch.arange(7))[0], torch.arange(7))


@pytest.mark.slow
def test_gathering_keeps_the_gradient_of_keys():
    """Two processes with 3 and 4 rows have the loss and gradients of one process with 7."""
    done = run("""
        import torch, mmkit as mm
        from mmkit.distributed import all_gather_with_grad, rank_and_world_size
        from mmkit.training.step import contrastive_fraction

        torch.manual_seed(0)
        image, text = (torch.nn.functional.normalize(torch.randn(7, 5), dim=1) for _ in range(2))
        groups = torch.tensor([0, 1, 2, 0, 4, 5, 6])

        def part_of(kind, rows):
            leaves = [image[rows], text[rows], torch.tensor(1.3), torch.tensor(-1.0)]
            leaves = [x.clone().requires_grad_() for x in leaves]
            partners = groups[rows], groups[rows, None]
            loss = contrastive_fraction(*leaves, partners, kind)
            grads = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
            rows_of = [g.detach().reshape(len(g) if g.ndim else 1, -1) for g in grads]
            return [loss.detach()[None], *rows_of]

        def both():
            rows = slice(0, 3) if rank_and_world_size()[0] == 0 else slice(3, 7)
            parts = {kind: part_of(kind, rows) for kind in ("info_nce", "sigmoid")}
            return {kind: [all_gather_with_grad(p) for p in part] for kind, part in parts.items()}

        got = mm.launch(both, num_processes=2)
        for kind, (loss, image_grad, text_grad, scale_grad, bias_grad) in got.items():
            whole = part_of(kind, slice(0, 7))
            torch.testing.assert_close(loss.sum()[None], whole[0])
            torch.testing.assert_close(image_grad, whole[1])
            torch.testing.assert_close(text_grad, whole[2])
            torch.testing.assert_close(scale_grad.sum().reshape(1, 1), whole[3])
            torch.testing.assert_close(bias_grad.sum().reshape(1, 1), whole[4])
        print("equal")
    """)
    assert "equal" in done.stdout, done.stderr[-2000:]
