"""One of several gloo processes that train with torch's fully_shard, for test_distributed.py.

accelerate starts FSDP2 on GPUs only, so this stands in for its Accelerator with the few calls that Engine makes.

    torchrun --nproc_per_node 2 tests/fsdp2_worker.py MODEL DATA VIDEOS OUT [CHECKPOINT]
"""

import contextlib
import json
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ["ACCELERATE_USE_FSDP"] = "true"

import multivideo as mv

import torch
import torch.distributed as dist
from accelerate import DistributedType
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard

from train_sft import normalize_record, sft_loss

STEPS = 10


class GlooFSDP2:
    """What Engine and the checkpoints ask of an Accelerator, with torch's own fully_shard."""

    distributed_type, is_fsdp2, device = DistributedType.FSDP, True, torch.device("cpu")

    def __init__(self):
        dist.init_process_group("gloo")
        self.process_index, self.num_processes = dist.get_rank(), dist.get_world_size()
        self.is_main_process, self.wait_for_everyone = self.process_index == 0, dist.barrier

    def prepare(self, model, optimizer):
        """Shard the blocks and the rest; the optimizer gets the sharded parameters in the old ones' places."""
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        groups = [[names[id(parameter)] for parameter in group["params"]] for group in optimizer.param_groups]
        for block in [*model.model.language_model.layers, *model.model.visual.blocks]:
            fully_shard(block)
        fully_shard(model)
        sharded = dict(model.named_parameters())
        for group, members in zip(optimizer.param_groups, groups):
            group["params"] = [sharded[name] for name in members]
        self.optimizer = optimizer
        return model, self

    def get_state_dict(self, model):
        return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))

    def gather(self, tensor):
        parts = [torch.empty_like(tensor) for _ in range(self.num_processes)]
        dist.all_gather(parts, tensor)
        return torch.cat(parts)

    @contextlib.contextmanager
    def no_sync(self, model):
        model.set_requires_gradient_sync(False)
        yield
        model.set_requires_gradient_sync(True)


def main(model_path, data, videos, out, checkpoint=None):
    torch.set_num_threads(1)
    args = mv.TrainingArguments(
        model_id=model_path, nframes=4, video_resized_width=56, video_resized_height=56, output_dir=out,
        image_resized_width=84, image_resized_height=56, learning_rate=3e-3,
    )  # fmt: skip
    accelerator = GlooFSDP2()
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
