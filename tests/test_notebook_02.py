"""Notebook 02 on another architecture: every cell runs on a GPT-2-shaped folder, measured on the spot."""

from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

from glassbox_utils import notebooks
from glassbox_utils.models import embedded_folder

NOTEBOOK = Path(__file__).parents[1] / "notebooks" / "02_induction_and_bias_heads.ipynb"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_runs_on_a_gpt2_shaped_model(tmp_path):
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(embedded_folder())
    config = GPT2Config(
        vocab_size=len(tokenizer), n_positions=256, n_embd=64, n_layer=6, n_head=8, bos_token_id=1, eos_token_id=2
    )
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    done, _, peak = notebooks.execute(NOTEBOOK, None, {"MODEL": str(tmp_path)})
    printed = "".join(o.get("text", "") for c in done.cells if c.cell_type == "code" for o in c.outputs)
    assert "6 layers x 8 heads" in printed and "no stored study" in printed
    assert printed.count("measured again") == 7
    assert peak < 4
