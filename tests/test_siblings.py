"""The four trainers are siblings: what recurs in their main() is the same to the letter, in the same order."""

import difflib
import re

import pytest
from test_train import ROOT

# What a trainer may have otherwise than train_sft.py: its objective and what it counts.
ALL = r"SFTArguments|load_records|normalize = |evaluate\(|sft_loss|enumerate\(|mv\.pack\(|step_loss|window_tokens"
OWN = {
    "train_dpo.py": r"loss_finite",
    "train_cls.py": r"load_model|step_windows|result is None|supervised_tokens",
    # rollouts stand between data and exchange; several steps may learn one batch of completions
    "train_grpo.py": r"encoded|kept|counts|data_wait|next\(|islice|bad_steps\.js|due = |if stop:|---- data|^}$",
}


def lines(script):
    """The lines of main(), without indentation."""
    source = (ROOT / script).read_text().split("def main():")[1]
    return [line.strip() for line in source.splitlines() if line.strip()]


@pytest.mark.parametrize("script", OWN)
def test_main_is_the_same(script):
    ours, theirs = lines("train_sft.py"), lines(script)
    blocks = difflib.SequenceMatcher(None, ours, theirs, autojunk=False).get_matching_blocks()
    shared = {i for block in blocks for i in range(block.a, block.a + block.size)}
    assert len(shared) > 120
    missing = [line for i, line in enumerate(ours) if i not in shared]
    own = re.compile(f"{ALL}|{OWN[script]}")
    assert [line for line in missing if not own.search(line)] == [], f"{script} does otherwise than train_sft.py"
