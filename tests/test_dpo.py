"""train_dpo.py: losses by hand and against TRL, pairs that share a prompt, records, references, whole runs."""

import dataclasses
import json
import math
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from datasets import Dataset
from PIL import Image
from reference import hf_inputs, write_clip
from safetensors.torch import load_file, save_file
from test_train import ROOT, demo, launch, metrics  # noqa: F401
from transformers import AutoModelForImageTextToText, AutoProcessor

import multivideo as mv
import train_dpo
from train_dpo import DPO_LOSSES, FEATURES, METRICS, DPOArguments, answer_logps, dpo_loss, normalize_record


def run(monkeypatch, *flags):
    """train_dpo.main() in this process."""
    from accelerate.state import AcceleratorState, GradientState, PartialState

    for shared in (AcceleratorState, GradientState, PartialState):
        shared._reset_state()
    monkeypatch.setattr(sys, "argv", ["train_dpo.py", *map(str, flags), "--dataloader_num_workers", "0"])
    train_dpo.main()


# ----------------------------------------------------------------------------------------------------------- losses

# log p(chosen), log p(rejected), the same under the reference, lengths: log-ratios 0.8 and −0.4, a margin of 1.2
BY_HAND = {  # at β = 0.5 and label smoothing 0.1: σ(0.6) = 0.645656, σ(0.4) = 0.598688, σ(0.2) = 0.549834
    "sigmoid": 0.497488,  # 0.9 · 0.437488 + 0.1 · 1.037488
    "ipo": 0.338889,  # (0.8 / 4 + 0.4 / 2 − 1)² would be 0.36; here lengths are 4 and 3: (0.2 + 0.133333 − 1)² + …
    "hinge": 0.4,  # 1 − 0.6
    "robust": 0.362488,  # (0.9 · 0.437488 − 0.1 · 1.037488) / 0.8
    "exo_pair": 0.0,
    "nca_pair": 0.0,
    "sppo_hard": 0.4,  # (0.8 − 1)² + (−0.4 + 1)²
    "apo_zero": 0.0,
    "apo_down": 0.0,
    "sft": 7.0,
}
