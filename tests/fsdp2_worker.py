"""One of two gloo processes that train with FSDP2 as accelerate does it, for test_distributed.py.

accelerate starts FSDP2 on GPUs only: its state is told that it is FSDP2; all that it does then is its own.

    torchrun --nproc_per_node 2 tests/fsdp2_worker.py MODEL DATA VIDEOS OUT [CHECKPOINT]
"""

import dataclasses
import json
import os
import sys
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ["ACCELERATE_USE_FSDP"] = "true"

import multivideo as mv

import torch
import torch.distributed as dist
import yaml
from accelerate import DistributedType
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import FullyShardedDataParallelPlugin

from train_sft import normalize_record, sft_loss

STEPS = 10


def accelerator_on_gloo(args):
    """The run's Accelerator under accelerate_configs/fsdp2.yaml, told that it is FSDP2 although it is on a CPU."""
    options = yaml.safe_load((ROOT / "accelerate_configs" / "fsdp2.yaml").read_text())["fsdp_config"]
    os.environ.update({name.upper(): str(value).lower() for name, value in options.items()})
    os.environ["FSDP_AUTO_WRAP_POLICY"] = options["fsdp_auto_wrap_policy"]
    os.environ["FSDP_STATE_DICT_TYPE"] = options["fsdp_state_dict_type"]
    made = mv.Accelerator

    def make(**kwargs):
        accelerator = made(**kwargs)
        for shared in (AcceleratorState, PartialState):
            shared._shared_state["distributed_type"] = DistributedType.FSDP
        AcceleratorState._shared_state["fsdp_plugin"] = FullyShardedDataParallelPlugin()
        return accelerator

    with mock.patch.object(mv, "Accelerator", make):
        accelerator = mv.make_accelerator(args)
    assert accelerator.is_fsdp2 and accelerator.num_processes == 2
    return accelerator


def check_half_precision(args, batch, expected):
    """Under --bf16 weights are gathered in bf16, and gradients and what is trained stay fp32."""
    args = dataclasses.replace(args, bf16=True)
    accelerator = accelerator_on_gloo(args)
    engine, types = mv.Engine(accelerator, mv.load_model(args, "cpu"), args), set()
    inputs, targets, _ = batch
    for layer in engine.model.model.language_model.layers:
        layer.mlp.up_proj.register_forward_hook(lambda module, given, output: types.add(module.weight.dtype))
    with engine.row(True):
        with engine.autocast():
            loss = sft_loss(engine.model(**inputs).logits, targets) / len(targets)
        engine.backward(loss)
    assert types == {torch.bfloat16}
    assert {p.dtype for p in engine.model.parameters()} == {p.grad.dtype for p in engine.model.parameters()}
    assert {p.dtype for p in engine.model.parameters()} == {torch.float32}
    assert abs(loss.item() - expected) < 0.01 * expected, (loss.item(), expected)


def main(model_path, data, videos, out, checkpoint=None):
    torch.set_num_threads(1)
    args = mv.TrainingArguments(
        model_id=model_path, nframes=4, video_resized_width=56, video_resized_height=56, output_dir=out,
        image_resized_width=84, image_resized_height=56, learning_rate=3e-3, dataloader_num_workers=0,
    )  # fmt: skip
    accelerator = accelerator_on_gloo(args)
    records = mv.load_records(data, normalize_record)
    encoder = mv.Encoder(model_path, args)
    engine = mv.Engine(accelerator, mv.load_model(args, "cpu", checkpoint), args)
    assert {type(parameter).__name__ for parameter in engine.model.parameters()} == {"DTensor"}
    state = {"step": 0, "samples_seen": 0, "best_checkpoint": None, "run": {"records": len(records)}}
    if checkpoint:
        state = mv.restore_checkpoint(Path(checkpoint), engine, state)
    rank, world_size = accelerator.process_index, accelerator.num_processes
    losses = []
    for window, seen in mv.step_windows(len(records), 4, 42, state["samples_seen"]):
        rows = mv.micro_batches(window, 1, rank, world_size)
        packed = [mv.pack([encoder(records[i], videos) for i in row], encoder, "cpu") for row in rows]
        if state["step"] == 0 and not checkpoint:
            with torch.no_grad():
                inputs, targets, _ = packed[0]
                first = sft_loss(engine.model(**inputs).logits, targets).item() / len(targets)
            check_half_precision(args, packed[0], first)
        sums = torch.tensor([float(sum(len(targets) for _, targets, _ in packed)), 0.0])
        dist.all_reduce(sums)
        tokens = sums[0].item()
        for k, (inputs, targets, _) in enumerate(packed):
            with engine.row(k == len(packed) - 1):
                loss = sft_loss(engine.model(**inputs).logits, targets) * world_size / tokens
                sums[1] += loss.detach() / world_size
                engine.backward(loss)
        engine.set_learning_rate(mv.lr_factor(state["step"], STEPS, args))
        total = sums[1].clone()
        dist.all_reduce(total)
        norm, _ = engine.step()
        losses.append([total.item(), norm])
        state["step"], state["samples_seen"] = state["step"] + 1, seen
        if state["step"] == 5 and not checkpoint:
            mv.save_checkpoint(out, engine, encoder.processor, state)
        if state["step"] == STEPS:
            break
    mv.publish_model(out, engine, encoder.processor, None)
    if rank == 0:
        (Path(out) / "losses.json").write_text(json.dumps({"world_size": world_size, "losses": losses}))
    dist.destroy_process_group()
    os._exit(0)  # on gloo, torch's destructors abort one of some 35 such processes ("terminate called")


if __name__ == "__main__":
    main(*sys.argv[1:])
