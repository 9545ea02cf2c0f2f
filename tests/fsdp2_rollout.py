"""One of two gloo processes whose weights FSDP2 splits, for test_grpo.py: rollout, then an update.

    torchrun --nproc_per_node 2 tests/fsdp2_rollout.py MODEL DATA VIDEOS OUT

Only the first process has prompts to complete: a forward that waited for the other one would hang.
"""

import json
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import multivideo as mv

import numpy as np
import torch
import torch.distributed as dist
from fsdp2_worker import accelerator_on_gloo
from torch.distributed.fsdp import FSDPModule

import train_grpo as grpo


def main(model_path, data, videos, out):
    torch.set_num_threads(1)
    args = grpo.GRPOArguments(
        model_id=model_path, nframes=4, video_resized_width=56, video_resized_height=56, output_dir=out,
        num_generations=3, max_completion_length=5, top_k=0, learning_rate=1e-3, dataloader_num_workers=0,
    )  # fmt: skip
    args.check(set())
    accelerator = accelerator_on_gloo(args)
    records = mv.load_records(data, grpo.normalize_record, grpo.FEATURES)
    encoder = mv.Encoder(model_path, args)
    engine = mv.Engine(accelerator, mv.load_model(args, "cpu"), args)
    samples = [encoder(records[i], videos) for i in range(3)]
    draws = [np.random.default_rng(i).random((3, 5)) for i in range(3)]
    blocks = [module for module in engine.model.modules() if isinstance(module, FSDPModule)]
    groups = [group for block in blocks for group in block._get_fsdp_state()._fsdp_param_groups]
    resharded, logps = [block is not engine.model and group.post_forward_mesh_info is not None
                        for block in blocks for group in block._get_fsdp_state()._fsdp_param_groups], []  # fmt: skip
    assert len(set(resharded)) == 2  # blocks are, the head and the root are not
    for _ in range(2):  # a rollout, an update, and a rollout with the changed weights
        with engine.gathered():
            if accelerator.is_main_process:
                ids, own = grpo.generate(engine, samples, encoder, args, draws)
                logps.append(own)
        assert {type(parameter).__name__ for parameter in engine.model.parameters()} == {"DTensor"}
        assert [group.post_forward_mesh_info is not None for group in groups] == resharded
        box = [ids if accelerator.is_main_process else None]
        dist.broadcast_object_list(box)
        rank = accelerator.process_index  # the first process learns two prompts, the second one
        chosen = [0, 1] if rank == 0 else [2]
        full = [mv.add_suffixes(samples[i], [(c, c) for c in box[0][i]]) for i in chosen]
        inputs, targets, _ = mv.pack(full, encoder, "cpu")
        engine.set_learning_rate(1.0)
        with engine.row(True):
            loss = -mv.token_logps(engine.model(**inputs).logits, targets, args.temperature).sum()
            engine.backward(loss * accelerator.num_processes / 100)
        norm, _ = engine.step()
    if accelerator.is_main_process:
        (Path(out) / "rollout.json").write_text(json.dumps({"ids": ids, "logps": logps, "norm": norm}))
    dist.destroy_process_group()
    os._exit(0)  # on gloo, torch's destructors abort one of some 35 such processes ("terminate called")


if __name__ == "__main__":
    main(*sys.argv[1:])
