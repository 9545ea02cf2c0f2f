"""Several processes on a CPU: DDP, ZeRO-2, ZeRO-3, with offload, and FSDP2 give the numbers of one process."""

import json
import math
import os
import re
import shutil
import socket
import sys
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import multivideo as mv

import numpy as np
import peft
import pytest
import torch
import upstream_commands
import yaml
from accelerate.state import AcceleratorState, GradientState, PartialState
from PIL import Image
from reference import hf_inputs
from safetensors.torch import load_file
from test_train import ROOT, demo, in_process, launch, metrics  # noqa: F401
from transformers import AutoModelForImageTextToText, AutoProcessor

CONFIGS = ROOT / "accelerate_configs"
STEPS = 10


@pytest.fixture(scope="module")
def mixed(demo, tmp_path_factory):  # noqa: F811
    """Flags of a run on text only, images only, one video and thirty: 4 samples per step, 10 steps over 13 records."""
    folder = tmp_path_factory.mktemp("mixed")
    thirty = json.loads((demo / "sft_train.json").read_text())
    noise = np.random.default_rng(0).integers(0, 255, (2, 60, 90, 3), dtype=np.uint8)
    for i in range(2):
        Image.fromarray(noise[i]).save(demo / "videos" / f"still-{i}.png")

    def talk(question, answer):
        return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]

    records = []
    for i in range(13):
        one = {"video": thirty[i]["video"][i], "conversations": talk("<video>\nGrey?", "It is." if i % 2 else "No.")}
        still = {"image": [f"still-{i % 2}.png"], "conversations": talk("<image>\nWhat is it?", "Noise.")}
        text = {"conversations": talk(f"Count to {i}.", " ".join(map(str, range(i + 1))))}
        records.append([thirty[i], text, one, text, still, text][i % 6])
    (folder / "data.json").write_text(json.dumps([{**record, "id": i} for i, record in enumerate(records)]))
    return [
        "--model_id", demo / "model", "--data_path", folder / "data.json", "--image_folder", demo / "videos",
        "--video_resized_width", 64, "--video_resized_height", 64, "--image_resized_width", 84,
        "--image_resized_height", 56, "--nframes", 4, "--max_steps", STEPS, "--learning_rate", 3e-3,
        "--save_steps", 5, "--dataloader_num_workers", 0,
    ]  # fmt: skip


@pytest.fixture
def run(runner):
    """Function that trains on `processes` × `rows` rows of one sample with a file of accelerate_configs.

    `really`: by `accelerate launch`, as a user does; else its processes are forked (Runner.launch).
    """

    def run(config, flags, output_dir, processes, rows, check=True, really=False):
        words = [
            "--config_file", CONFIGS / f"{config}.yaml", "--num_processes", processes, "train_sft.py", *flags,
            "--output_dir", output_dir, "--per_device_train_batch_size", 1, "--gradient_accumulation_steps", rows,
        ]  # fmt: skip
        if really:
            said = launch(Path(sys.executable).parent / "accelerate", "launch", *words).stderr
        else:
            done = runner.launch(*words, log=output_dir, check=check)
            said = "\n".join(done.said)
        assert f"4 per step = 1 samples × {rows} rows × {processes} processes" in said
        assert re.search(r"trained +[1-9][\d,]+ parameters", said)
        return None if really else done

    return run


@pytest.fixture(scope="module")
def alone(mixed, tmp_path_factory):
    """One process, 1 × 4: the reference, with each optimizer."""
    folders = {}
    with pytest.MonkeyPatch.context() as monkeypatch:
        for optim in ("adamw_torch", "sgd"):
            folders[optim] = tmp_path_factory.mktemp(optim)
            in_process(
                monkeypatch, *mixed[:-2], "--optim", optim, "--per_device_train_batch_size", 1,
                "--gradient_accumulation_steps", 4, "--output_dir", folders[optim],
            )  # fmt: skip
    return folders


def assert_same_run(folder, reference, tolerance, start=0):
    """Losses and norms within the tolerance; records, samples and tokens equal."""
    ours, theirs = metrics(folder), metrics(reference)
    assert [row["step"] for row in ours] == list(range(1, STEPS + 1))
    for row, expected in zip(ours[start:], theirs[start:]):
        for key in ("loss", "grad_norm"):
            assert row[key] == pytest.approx(expected[key], rel=tolerance), (row["step"], key)
        for key in ("samples", "videos", "images", "tokens", "supervised_tokens", "records_crc32", "learning_rate"):
            assert row[key] == expected[key], (row["step"], key)


def assert_same_weights(folder, reference, tolerance):
    expected = load_file(reference / "model.safetensors")
    weights = load_file(folder / "model.safetensors")
    assert weights.keys() == expected.keys()
    for name, value in weights.items():
        assert value.numel() and (value - expected[name]).abs().max() <= tolerance, name


def test_the_data_is_mixed(alone):
    """Steps whose rows have no vision at all, only images, one video and thirty occur."""
    rows = metrics(alone["sgd"])
    assert {row["samples"] for row in rows} == {4, 1}  # 13 records: three steps of 4, then one of 1
    assert min(row["videos"] for row in rows) <= 1 and max(row["videos"] for row in rows) >= 60
    assert sum(row["images"] for row in rows) >= 3


@pytest.mark.parametrize("shape", [(2, 2), (4, 1)])
def test_ranks_times_accumulation(run, mixed, alone, tmp_path, shape):
    """1×4, 2×2 and 4×1 processes × rows are the same training; under SGD the parameters show it directly."""
    run("ddp", [*mixed, "--optim", "sgd"], tmp_path, *shape)
    assert_same_run(tmp_path, alone["sgd"], 1e-5)
    assert_same_weights(tmp_path, alone["sgd"], 1e-5)


@pytest.mark.parametrize("config", ["ddp", "zero2", "zero2_offload", "zero3", "zero3_offload"])
def test_two_processes_equal_one(run, mixed, alone, tmp_path, config):
    run(config, mixed, tmp_path, 2, 2, really=config in ("ddp", "zero3"))
    assert_same_run(tmp_path, alone["adamw_torch"], 1e-4)
    assert_same_weights(tmp_path, alone["adamw_torch"], 1e-3)
    names = {file.name for file in (tmp_path / "checkpoint-5").iterdir()}
    assert ("deepspeed" in names) is config.startswith("zero")
    if config == "zero3":  # continued from step 5: the same again, to the last bit
        again = tmp_path / "again"
        shutil.copytree(tmp_path / "checkpoint-5", again / "checkpoint-5")
        shutil.copy(tmp_path / "metrics.jsonl", again)
        run(config, [*mixed, "--resume_from_checkpoint", "auto"], again, 2, 2)
        assert metrics(again) == metrics(tmp_path)
        state = json.loads((again / "checkpoint-5" / "trainer_state.json").read_text())
        alone_now = SimpleNamespace(
            deepspeed=True, zero_stage=3, args=mv.TrainingArguments(resume_force=True),
            accelerator=SimpleNamespace(num_processes=1, is_main_process=True),
        )  # fmt: skip
        with pytest.raises(mv.InputError, match="processes: 2 then, 1 now"):
            mv.restore_checkpoint(again / "checkpoint-5", alone_now, state)


def test_more_processes_continue_one(run, mixed, alone, tmp_path):
    """A checkpoint of one process, continued by two at the same global batch: the same samples and losses."""
    shutil.copytree(alone["adamw_torch"] / "checkpoint-5", tmp_path / "checkpoint-5")
    shutil.copy(alone["adamw_torch"] / "metrics.jsonl", tmp_path)
    run("ddp", [*mixed, "--resume_from_checkpoint", "auto"], tmp_path, 2, 2)
    assert_same_run(tmp_path, alone["adamw_torch"], 1e-4, start=5)


@pytest.mark.parametrize("config", ["zero2", "zero3"])
def test_bad_steps_update_nothing_under_deepspeed(run, mixed, tmp_path, config):
    """fp32 ZeRO-2 has no overflow check of its own: one absurd step, then every step is recorded and skipped."""
    flags = [*mixed, "--learning_rate", 1e30, "--lr_scheduler_type", "constant", "--max_bad_steps", 2]
    done = run(config, flags, tmp_path, 2, 2, check=False)
    assert all(done.codes) and "2 steps in a row had a loss or gradient that is not finite" in done.said[0]
    assert [row.get("not_finite") for row in metrics(tmp_path)] == [None, "loss", "loss"]


def test_fsdp2(runner, mixed, demo, alone, tmp_path):  # noqa: F811
    """FSDP2 as accelerate does it, two processes: losses of one, continued to the last bit; bf16 (see the worker)."""
    data = [demo / "model", mixed[3], demo / "videos"]
    for name, checkpoint in (("a", []), ("b", [tmp_path / "a" / "checkpoint-5"])):
        (tmp_path / name).mkdir()
        worker = [*data, tmp_path / name, *checkpoint]
        done = runner.fork("tests/fsdp2_worker.py", worker, tmp_path / name, world=2).wait(kill_others=5)
        assert done.codes == [0, 0], "\n".join(done.said)[-6000:]
    straight, resumed = (json.loads((tmp_path / name / "losses.json").read_text()) for name in "ab")
    assert straight["world_size"] == 2 and len(straight["losses"]) == STEPS
    assert resumed["losses"] == straight["losses"][5:]
    for (loss, norm), row in zip(straight["losses"], metrics(alone["adamw_torch"])):
        assert (loss, norm) == pytest.approx((row["loss"], row["grad_norm"]), rel=1e-4)
    assert_same_weights(tmp_path / "a", alone["adamw_torch"], 1e-3)


def test_fsdp_on_a_cpu_is_refused(monkeypatch):
    """accelerate would silently run DDP instead."""
    for shared in (AcceleratorState, GradientState, PartialState):
        shared._reset_state()
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(mv.InputError, match="FSDP needs GPUs"):
        mv.make_accelerator(mv.TrainingArguments())


@pytest.mark.parametrize("launched_with", ["ddp", "deepspeed"])
@pytest.mark.parametrize("cuda", [True, False])
def test_processes_wait_for_two_hours(monkeypatch, launched_with, cuda):
    """The group of all processes gets the timeout, with the backend of the device."""

    class Started(Exception):
        pass

    def init(backend=None, dist_backend=None, timeout=None, **kwargs):
        raise Started(backend or dist_backend, timeout)

    one_of_two = {"LOCAL_RANK": 0, "RANK": 0, "WORLD_SIZE": 2, "MASTER_ADDR": "localhost", "OMP_NUM_THREADS": 1}
    for name, value in one_of_two.items():
        monkeypatch.setenv(name, str(value))
    if launched_with == "deepspeed":
        monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
        monkeypatch.setattr("deepspeed.comm.init_distributed", init)
    monkeypatch.setattr("torch.distributed.init_process_group", init)
    monkeypatch.setattr("torch.cuda.is_available", lambda: cuda)
    threads = torch.get_num_threads()
    for shared in (AcceleratorState, GradientState, PartialState):
        shared._reset_state()
    try:
        with pytest.raises(Started) as started:
            mv.make_accelerator(mv.TrainingArguments())
    finally:
        torch.set_num_threads(threads)
        for shared in (AcceleratorState, GradientState, PartialState):
            shared._reset_state()
    assert started.value.args == ("nccl" if cuda else "gloo", timedelta(hours=2))


@pytest.mark.parametrize("name, value", [("", ""), ("PYTORCH_CUDA_ALLOC_CONF", "max_split_size_mb:64"),
                                         ("PYTORCH_ALLOC_CONF", "backend:cudaMallocAsync")])  # fmt: skip
def test_allocator(monkeypatch, name, value):
    """Segments grow unless the user has set something; it is set before accelerate starts CUDA."""

    class Started(Exception):
        pass

    def start(**kwargs):
        raise Started(os.environ.get("PYTORCH_ALLOC_CONF"))

    for variable in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"):
        monkeypatch.setenv(variable, "")  # so that it is gone again after the test
        monkeypatch.delenv(variable)
    if name:
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(mv, "Accelerator", start)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    with pytest.raises(Started) as started:
        mv.make_accelerator(mv.TrainingArguments())
    own = {"": "expandable_segments:True", "PYTORCH_ALLOC_CONF": value}
    assert started.value.args == (own.get(name),)


ROWS = """
import torch
import multivideo as mv

args = mv.TrainingArguments(bf16=True, gradient_accumulation_steps=51, optim="sgd", learning_rate=1.0, max_grad_norm=0)
accelerator, model = mv.make_accelerator(args), torch.nn.Linear(8, 8, bias=False).bfloat16()
torch.nn.init.zeros_(model.weight)
engine = mv.Engine(accelerator, model, args)
assert engine.zero_stage == 2
for i in range(51):
    with engine.row(i == 50):
        engine.backward(engine.model(torch.eye(8).bfloat16()).float().sum() * (0.002 if i else 1.0))
print("norm", engine.step()[0])
"""


def test_gradients_of_rows_are_added_up_in_fp32(runner, tmp_path):
    """Under ZeRO-2 in bf16 a row of gradients 1 and 50 rows of 0.002 make 1.1 on 8 × 8 weights; in bf16 it stays 1."""
    (tmp_path / "rows.py").write_text(ROWS)
    words = ["--config_file", CONFIGS / "zero2.yaml", "--num_processes", 1, tmp_path / "rows.py"]
    done = runner.launch(*words, log=tmp_path / "rows")
    assert float(done.said[0].split("norm ")[1].split()[0]) == pytest.approx(8.8, rel=1e-3)


NODES = """
import os, sys
import multivideo as mv
import train_sft

mv.PROBE_SECONDS = 1
os.chdir(os.path.join(os.path.dirname(__file__), os.environ["RANK"]))  # a node with a disk of its own
sys.argv = ["train_sft.py", "--model_id", {model!r}, "--data_path", {data!r}, "--output_dir", "out"]
mv.run(train_sft.main)
"""


def test_nodes_with_folders_of_their_own_are_refused(runner, mixed, tmp_path):
    """Only rank 0's folder would become the checkpoint: the run ends at once, and says what to do."""
    for rank in "01":
        (tmp_path / rank / "out").mkdir(parents=True)
    (tmp_path / "nodes.py").write_text(NODES.format(model=str(mixed[1]), data=str(mixed[3])))
    words = ["--config_file", CONFIGS / "ddp.yaml", "--num_processes", 2, tmp_path / "nodes.py"]
    done = runner.launch(*words, log=tmp_path / "nodes", check=False)
    said = "\n".join(done.said)
    host = socket.gethostname()
    message = (
        f"train_sft.py: --output_dir out is not one folder for all processes: a file that process 0 on {host} wrote "
        f"there is not seen by process 1 on {host}, whose parts of checkpoints would be lost. Name a folder on a file "
        "system that all nodes share"
    )
    assert all(done.codes) and said.count(message) == 1 and "multivideo.py" not in said
    assert [path for rank in "01" for path in (tmp_path / rank / "out").iterdir()] == []


def test_memory_under_ddp(demo, monkeypatch):  # noqa: F811
    """DDP's buckets are the gradients themselves, and only the main process hands out the optimizer's state."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    alone = {"LOCAL_RANK": 0, "RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "localhost", "MASTER_PORT": port,
             "OMP_NUM_THREADS": 1}  # fmt: skip
    for name, value in alone.items():
        monkeypatch.setenv(name, str(value))
    for shared in (AcceleratorState, GradientState, PartialState):
        shared._reset_state()
    try:
        args = mv.TrainingArguments(model_id=str(demo / "model"), dataloader_num_workers=0)
        accelerator = mv.make_accelerator(args)
        engine = mv.Engine(accelerator, mv.load_model(args, "cpu"), args)
        assert isinstance(engine.model, torch.nn.parallel.DistributedDataParallel)
        inputs = {"input_ids": torch.tensor([[5, 6, 7]]), "position_ids": torch.arange(3).expand(4, 1, 3),
                  "plan": mv.AttentionPlan.make([3]), "use_cache": False}  # fmt: skip
        engine.backward(engine.model(**inputs).logits.sum())
        gradients = [p.grad for p in engine.raw_model.model.language_model.parameters()]
        buckets = {gradient.untyped_storage().data_ptr() for gradient in gradients}
        assert len(buckets) < len(gradients) / 4
        engine.step()
        assert engine.optimizer_state().keys() <= set(engine.names) and engine.optimizer_state()
        monkeypatch.setattr(type(accelerator), "is_main_process", False)
        assert engine.optimizer_state() == {}
    finally:
        torch.distributed.destroy_process_group()
        for shared in (AcceleratorState, GradientState, PartialState):
            shared._reset_state()


@pytest.mark.parametrize("error", [
    "[../third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:1234",
    "NCCL error in: ProcessGroupNCCL.cpp:2063, remote process exited or there was a network error, NCCL version 2.27\n"
    "ncclRemoteError: A call failed possibly due to a network error or a remote process exiting prematurely.",
    "NCCL communicator was aborted on rank 1. Original reason for failure was: Error while waiting for a collective",
    "Failed to recv, got 0 bytes. Connection was likely closed. Did the remote server shutdown or crash?",
])  # fmt: skip
def test_messages_that_another_process_is_gone(error):
    """Verbatim from gloo, NCCL and torch's store; an error of one's own is not among them."""
    assert mv.lost_another(RuntimeError(error))
    assert not mv.lost_another(RuntimeError("NCCL error: unhandled cuda error: an illegal memory access"))


def test_configs():
    """Every YAML is one that accelerate reads, and leaves precision and accumulation to the script."""
    from accelerate.commands.config.config_args import load_config_from_file

    configs = {path.stem: yaml.safe_load(path.read_text()) for path in CONFIGS.glob("*.yaml")}
    assert set(configs) == {"cpu", "one_gpu", "ddp", "zero2", "zero2_offload", "zero3", "zero3_offload", "fsdp2",
                            "zero3_offload_multinode"}  # fmt: skip
    for name, config in configs.items():
        load_config_from_file(str(CONFIGS / f"{name}.yaml"))
        assert "mixed_precision" not in config and "gradient_clipping" not in config.get("deepspeed_config", {}), name
    stages = {name: config["deepspeed_config"]["zero_stage"] for name, config in configs.items() if "zero" in name}
    assert all(str(stage) in name for name, stage in stages.items())
    several = configs["zero3_offload_multinode"]["deepspeed_config"]
    del several["deepspeed_multinode_launcher"]
    assert several == configs["zero3_offload"]["deepspeed_config"]
    assert configs["fsdp2"]["fsdp_config"]["fsdp_version"] == 2


def test_shares_cover_every_record_once():
    """Any number of ranks, sizes that do not divide: each record of a step goes to one rank, rows are even."""
    for world_size in (1, 2, 3, 4, 8):
        for batch_size in (1, 2, 5):
            for size in range(1, 41):
                window = list(range(100, 100 + size))
                shares = [mv.micro_batches(window, batch_size, rank, world_size) for rank in range(world_size)]
                assert len({len(share) for share in shares}) == 1
                assert sorted(i for share in shares for row in share for i in row) == window
    seen = [window for window, _ in zip(mv.step_windows(10, 4, 7, 0), range(6))]
    assert sorted(i for window, _ in seen[:3] for i in window) == list(range(10))
    assert [position for _, position in seen] == [4, 8, 10, 14, 18, 20]
    assert seen[3][0] != seen[0][0]
    resumed = next(mv.step_windows(10, 4, 7, 14))
    assert resumed == seen[4]
    assert sorted(i for window, _ in seen[3:] for i in window) == list(range(10))


ADAPTERS = {  # kind → (flags, configs): adapter in the language model, tower and merger in full unless frozen
    "lora": (["--lora_rank", 4], ["ddp", "zero3"]),
    "dora": (["--lora_rank", 4, "--use_dora", "True", "--freeze_merger", "True"], ["zero3"]),
    "4 bits": (["--lora_rank", 4, "--bits", 4], ["ddp"]),
}


@pytest.mark.parametrize("kind", ADAPTERS)
def test_adapters_over_processes(run, mixed, demo, tmp_path, monkeypatch, kind):  # noqa: F811
    """DDP and ZeRO-3 write the adapter of one process, no tensor empty; plain peft gives the same logits."""
    own, configs = ADAPTERS[kind]
    flags = [
        *mixed, *own, "--max_steps", 3, "--lora_enable", "True", "--freeze_llm", "True", "--lora_dropout", 0,
        "--lora_namespan_exclude", "['lm_head', 'embed_tokens']", "--optim", "sgd", "--save_steps", 2,
    ]  # fmt: skip
    in_process(
        monkeypatch, *flags, "--per_device_train_batch_size", 1, "--gradient_accumulation_steps", 4,
        "--output_dir", tmp_path / "one",
    )  # fmt: skip
    expected = load_file(tmp_path / "one" / "adapter_model.safetensors")
    assert any("lora_A" in name for name in expected) and any("visual.patch_embed" in name for name in expected)
    for config in configs:
        run(config, flags, tmp_path / config, 2, 2)
        for folder in (tmp_path / config, tmp_path / config / "checkpoint-2"):
            weights = load_file(folder / "adapter_model.safetensors")
            assert weights.keys() == expected.keys() and all(value.numel() for value in weights.values())
        weights = load_file(tmp_path / config / "adapter_model.safetensors")
        for name, value in weights.items():
            assert (value - expected[name]).abs().max() <= 1e-5, name
    args = mv.TrainingArguments(model_id=str(demo / "model"), video_resized_width=56, video_resized_height=56)
    record = next(row for row in mv.load_records(str(mixed[3])) if row["id"] == "2")  # the first with one video
    inputs, _ = hf_inputs(record, str(demo / "videos"), args, AutoProcessor.from_pretrained(demo / "model"))
    assert len(inputs["video_grid_thw"]) == 1
    logits = {}
    for folder in ("one", *configs):
        base = AutoModelForImageTextToText.from_pretrained(demo / "model")
        with torch.no_grad():
            logits[folder] = peft.PeftModel.from_pretrained(base, tmp_path / folder).eval()(**inputs).logits
        torch.testing.assert_close(logits[folder], logits["one"], rtol=0, atol=1e-4)


REWARD_FILE = """
def accuracy_reward(completions, assistant, **kwargs):
    return [float(completion.strip() == answer.strip()) for completion, answer in zip(completions, assistant)]

def length_reward(completions, **kwargs):
    return [-len(completion) / 100 for completion in completions]
"""


@pytest.mark.parametrize("script", ["finetune_lora.sh", "finetune_lora_vision.sh", "finetune_video.sh",
                                    "finetune_dpo.sh", "finetune_grpo.sh", "finetune_cls.sh"])  # fmt: skip
def test_upstream_scripts_train(mixed, demo, tmp_path, monkeypatch, script):  # noqa: F811
    """Upstream's own flags, less those that are answered, train one step on one-video records of its own forms."""
    name = {"dpo.sh": "dpo", "grpo.sh": "grpo", "cls.sh": "cls"}.get(script.removeprefix("finetune_"), "sft")
    command, kept = getattr(upstream_commands, f"{name.upper()}_COMMANDS")[script], []
    for flag, value in zip(command[::2], command[1::2]):
        kept += [] if flag.lstrip("-") in mv.REPLACED_FLAGS else [flag, value]
    records = [record for record in json.loads(Path(mixed[3]).read_text()) if isinstance(record.get("video"), str)]
    assert len(records) == 2
    question = "<video>\nGrey?"
    if name == "dpo":
        records = [{"id": r["id"], "video": r["video"], "prompt": question, "chosen": "Yes.", "rejected": "No."}
                   for r in records]  # fmt: skip
    elif name == "cls":
        records = [{"id": r["id"], "video": r["video"], "prompt": question, "label": str(i)}
                   for i, r in enumerate(records)]  # fmt: skip
        kept += ["--eval_path", tmp_path / "data.json", "--eval_image_folder", demo / "videos"]
    elif name == "grpo":
        (tmp_path / "reward_funcs.py").write_text(REWARD_FILE)
        kept += ["--reward_funcs", tmp_path / "reward_funcs.py", "--max_completion_length", 4]
    (tmp_path / "data.json").write_text(json.dumps(records))
    in_process(
        monkeypatch, *kept, "--model_id", demo / "model", "--data_path", tmp_path / "data.json", "--image_folder",
        demo / "videos", "--max_steps", 1, "--per_device_train_batch_size", 1, "--output_dir", tmp_path / "out",
        trainer=f"train_{name}",
    )  # fmt: skip
    row = metrics(tmp_path / "out")[0]
    assert math.isfinite(row["loss"]) and row["samples"] == (1 if name == "grpo" else len(records))
    assert row["videos"] == row["samples"] and (row["grad_norm"] > 0 or name == "grpo")
    if name == "grpo":
        lengths = [row[f"rewards/{function}"] for function in ("accuracy_reward", "length_reward")]
        assert 0 <= lengths[0] <= 1 and lengths[1] < 0
    adapter = "lora" in script
    assert load_file(tmp_path / "out" / ("adapter_model.safetensors" if adapter else "model.safetensors"))


@pytest.mark.parametrize("config", ["one_gpu", "zero3_offload_multinode"])
def test_other_configs_start(mixed, tmp_path, config):
    """one_gpu.yaml falls back to the CPU; the multi-node file runs on one node when told so."""
    several = ["--num_machines", 1, "--machine_rank", 0, "--main_process_ip", "127.0.0.1"] if "multi" in config else []
    launch(
        Path(sys.executable).parent / "accelerate", "launch", "--config_file", CONFIGS / f"{config}.yaml", *several,
        "--num_processes", 2 if several else 1, "train_sft.py", *mixed, "--max_steps", 2, "--save_strategy", "no",
        "--per_device_train_batch_size", 2, "--output_dir", tmp_path,
    )  # fmt: skip
    assert [row["samples"] for row in metrics(tmp_path)] == ([4, 4] if several else [2, 2])
    assert load_file(tmp_path / "model.safetensors")
