"""Several processes in JupyterLab, as a reader starts them: the output of rank 0 and the value."""

import pytest

from tests.browser.harness import CELLS, run_notebook_in_browser
from tests.browser.test_notebooks_in_browser import notebook_of

pytestmark = pytest.mark.browser

SETUP = """
import torch
import torch.distributed as dist
import mmkit as mm
from mmkit.distributed import all_gather_with_grad, rank_and_world_size

def meet(start):
    rank, processes = rank_and_world_size()
    for step in range(3):
        print(f"step {step}: rank {rank} of {processes}")
    return all_gather_with_grad(torch.tensor([start + rank]))
"""


def test_the_output_of_rank_0_is_shown_and_its_value_returned(lab, browser, tmp_path):
    path = notebook_of(
        tmp_path / "launch.ipynb",
        SETUP,
        "mm.launch(meet, 10, num_processes=2)",
        "mm.launch(meet, 20, num_processes=2)",
    )
    page = run_notebook_in_browser(browser, lab, path, mode="doc", width=1000, height=900)
    shown = page.locator(".jp-OutputArea-output").all_inner_texts()
    for cell, value in ((1, "tensor([10, 11])"), (2, "tensor([20, 21])")):
        outputs = page.evaluate(CELLS)[cell]["outputs"]
        said = "".join("".join(o.get("text", "")) for o in outputs if o.get("name") == "stdout")
        assert said == "".join(f"step {step}: rank 0 of 2\n" for step in range(3))
        assert value in [text.strip() for text in shown]
        assert not [o for o in outputs if o.get("name") == "stderr"]
    assert sum(text.count("rank 0 of 2") for text in shown) == 6
    assert not any("rank 1" in text for text in shown)
    page.close()
