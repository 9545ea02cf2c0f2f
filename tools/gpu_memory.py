"""Peak memory of one training step on one GPU, without one: the prediction behind check_data.py --gpu_memory_gb.

The model, adapters included, is built of fake tensors, which have shapes and types but no memory. Its weights are
counted, and so is what its forward pass saves for the backward pass. tests/test_tools_data.py holds the prediction
against the allocations of real steps. What is split over processes (ZeRO, FSDP2) is divided by their number;
DeepSpeed's buffers are taken at its default sizes.
"""

import functools
import re
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import multivideo as mv

import numpy as np
import torch
import transformers
import yaml
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

BUCKET = 500_000_000  # elements: DeepSpeed's reduce_bucket_size; its stage3_max_live_parameters is twice that
BLOCK = re.compile(r"(?:layers|blocks)\.\d+$")  # the name of a decoder layer or of a block of the tower
MERGER = re.compile(r"merger(?:_list\.\d+)?$")
BACKWARD = 1.3  # a block's backward pass needs this much of what its forward pass keeps
FAKE = FakeTensorMode(allow_non_fake_inputs=True)
SIDE = 16  # patches: height and width of the clip that is counted, whole windows of Qwen2.5-VL's tower
RUNTIME_GIB = 1.0  # CUDA context, workspaces of the libraries, and what the allocator cannot use
# Optimizer state per trained fp32 weight; the paged ones leave the GPU when it is full.
OPTIMIZER_BYTES = {"adamw_torch": 8, "adamw_torch_fused": 8, "adamw_bnb_8bit": 2, "adamw_8bit": 2, "adafactor": 0,
                   "sgd": 0, "paged_adamw_8bit": 0, "paged_adamw_32bit": 0}  # fmt: skip


def read_launcher(config_file: str | None, num_processes: int | None) -> dict:
    """What accelerate's YAML and --num_processes say: processes, and how they split the model.

    Raises:
        InputError: the file is not one.
    """
    config = {}
    if config_file:
        try:
            config = yaml.safe_load(Path(config_file).read_text())
            kind = config["distributed_type"]
        except (OSError, yaml.YAMLError, TypeError, KeyError) as error:
            raise mv.InputError(f"--config_file {config_file}: not a YAML file of accelerate: {error!r}") from None
    processes = num_processes or config.get("num_processes") or 1
    if not config_file:
        kind = "NO" if processes == 1 else "MULTI_GPU"
    deepspeed = config.get("deepspeed_config", {})
    return {"processes": processes, "kind": kind, "stage": deepspeed.get("zero_stage", 0),
            "offload_optimizer": deepspeed.get("offload_optimizer_device", "none") != "none",
            "offload_weights": deepspeed.get("offload_param_device", "none") != "none"}  # fmt: skip


class Allocated(TorchDispatchMode):
    """Bytes of the tensors made inside that are alive, and the most there were since `most` was set."""

    def __init__(self):
        super().__init__()
        self.live = self.most = 0
        self.known = set()

    def free(self, key, size):
        self.known.remove(key)
        self.live -= size

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            storage = tensor.untyped_storage() if isinstance(tensor, torch.Tensor) else None
            if storage is not None and storage._cdata not in self.known:
                self.known.add(storage._cdata)
                self.live += storage.nbytes()
                weakref.finalize(storage, self.free, storage._cdata, storage.nbytes())
        self.most = max(self.most, self.live)
        return result


class MemoryModel:
    """Predicts the peak memory of one training step on one GPU; see `saved` for activations.

    The moments at which it can be highest; W weights, G gradients, O optimizer state, A saved activations:
        forward pass of the tower   W + O + the tower's A + what one of its blocks needs (with several rows per step
                                    + G, here and below)
        end of the forward pass     W + O + A + logits + casts
        start of the backward pass  W + O + A + logits and their gradient, or the head's G and one decoder layer
        first decoder layer         W + O + the language model's G + the A before it + one decoder layer
        backward pass of the tower  W + O + the language model's G + the tower's A + one of its blocks
        end of the backward pass    W + O + G + one block
        optimizer step              W + O + G + its workspace
    The frozen copy that DPO or GRPO has beside the trained model as a reference is there all the time.
    Types as load_model sets them: trained weights w = 4 bytes under autocast (and casts of them to e = 2 bytes for the
    matrix products), frozen ones 2. A is what `saved` counts; gradient checkpointing leaves the input of each block,
    and one block's A on top when it is computed again.
    """

    def __init__(self, args, launch: dict, copied: str | None = None):
        """`copied` names the model of which a frozen copy is beside the trained one, as a reference."""
        self.args, self.launch, self.copied = args, launch, copied
        self.config = transformers.AutoConfig.from_pretrained(args.model_id, cache_dir=args.cache_dir)
        with torch.device("meta"):
            model = transformers.AutoModelForImageTextToText.from_config(self.config)
        tied = model.lm_head.weight is model.get_input_embeddings().weight
        trained = mv.choose_trained(model, args)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in trained)
        if args.lora_enable:
            model = mv.add_adapter(model, trained, args)
        self.model = model
        self.recurrent = mv.recurrent_layers(self.config.get_text_config()) > 0
        self.trained = self.trained_llm = self.frozen = self.quantized = self.cast = 0
        self.trained_head = self.trained_embeddings = 0  # those tied to the head are in the former
        self.largest_quantized, self.largest = 0, max(parameter.numel() for parameter in model.parameters())
        for name, parameter in model.named_parameters():
            part, count = mv.part_of(name), parameter.numel()
            in_block = re.search(r"(?:layers|blocks)\.(\d+)\.", name)
            if parameter.requires_grad:
                self.trained += count
                self.trained_llm += count if part == "llm" else 0
                self.trained_head += count if ("embed_tokens" if tied else "lm_head") in name else 0
                self.trained_embeddings += count if "embed_tokens" in name and not tied else 0
                self.cast += count if parameter.ndim > 1 and (tied or "embed_tokens" not in name) else 0
            elif args.bits < 16 and part == "llm" and in_block and parameter.ndim > 1:
                self.quantized += count
                self.largest_quantized = max(self.largest_quantized, count)
            else:
                self.frozen += count
        low = 2 if args.bf16 or args.fp16 or args.pure_bf16 else 4
        deepspeed = launch["kind"] == "DEEPSPEED"
        self.e = low  # bytes of the values that matrix products read
        self.w = low if deepspeed or args.pure_bf16 else 4  # of trained weights
        self.f = self.w if deepspeed or launch["kind"] == "FSDP" else low  # of frozen ones
        self.copy = self.copy_bytes() if copied else 0

    def quantized_bytes(self, count: int) -> float:
        """Bytes of so many weights under --bits, with their scales."""
        return count * (1.0 if self.args.bits == 8 else 0.516 if self.args.double_quant else 0.5625)

    def copy_bytes(self) -> float:
        """Bytes of the frozen copy: in the types of the trained model, with the adapter that training goes on from."""
        if self.copied == self.args.model_id and self.args.lora_weight_path:
            return self.trained * self.w + self.frozen * self.f + self.quantized_bytes(self.quantized)
        with torch.device("meta"):
            config = transformers.AutoConfig.from_pretrained(self.copied, cache_dir=self.args.cache_dir)
            model = transformers.AutoModelForImageTextToText.from_config(config)
        trained, total = mv.choose_trained(model, self.args), 0
        for name, parameter in model.named_parameters():
            in_block = mv.part_of(name) == "llm" and re.search(r"layers\.\d+\.", name)
            if self.args.bits < 16 and in_block and parameter.ndim > 1:
                total += self.quantized_bytes(parameter.numel())
            else:
                total += parameter.numel() * (self.w if name in trained else self.f)
        return total

    def states(self) -> dict:
        """Bytes that do not depend on the data: weights, gradients, optimizer (per GPU), workspaces."""
        args, launch, w = self.args, self.launch, self.w
        n, kind, stage = launch["processes"], launch["kind"], launch["stage"]
        weights = self.trained * w + self.frozen * self.f
        weights += self.quantized_bytes(self.quantized)
        gradients, optimizer = self.trained * w, self.trained * OPTIMIZER_BYTES[args.optim]
        optimizer *= w / 4 if args.optim.startswith("adamw_torch") else 1  # states have the weights' type
        step = 3 * self.largest * 4 if args.optim == "adafactor" else 0  # AdamW is fused: it needs none
        other = self.cast * self.e if w > self.e else 0  # casts, which live as long as the forward pass
        other += 2 * self.largest_quantized * self.e  # unpacked for its product
        copy = self.copy / n if kind == "FSDP" or stage == 3 else self.copy
        copy = 0 if launch["offload_weights"] else copy
        if kind == "DEEPSPEED":
            optimizer = self.trained * (12 if w == 2 else 8) / n  # with fp32 masters
            gradients *= 2 if w == 2 and not args.fp16 else 1  # rows are added up in fp32
            gradients, step = gradients / (n if stage > 1 else 1), self.trained * 4 / n
            buckets = min(BUCKET, self.trained) * w
            if launch["offload_optimizer"]:
                optimizer = step = gradients = 0
            if stage == 3:
                buckets += min(2 * BUCKET, self.trained + self.frozen) * w
                weights = 0 if launch["offload_weights"] else weights / n
            weights += buckets
        elif kind == "FSDP":
            whole = max(self.largest * 2, (self.trained + self.frozen) / 20) * w  # embeddings and head, and two layers
            weights, gradients, optimizer, step = weights / n + whole, gradients / n, optimizer / n, step / n
        return {"weights": weights, "gradients": gradients, "optimizer": optimizer, "step": step, "casts": other,
                "reference": copy}  # fmt: skip

    @staticmethod
    def fake(shape, dtype: torch.dtype) -> torch.Tensor:
        """A tensor on the CPU without memory."""
        with FAKE:
            return torch.empty(shape, dtype=dtype)

    @functools.cached_property
    def saved(self) -> dict:
        """What the parts of the model save for the backward pass, and what the forward pass needs on top.

        Name of a block, a merger, or of the tower or the language model for what is around these → (bytes saved, bytes
        of the part's input, most bytes alive in its forward pass that nothing has saved). Bytes are per token of the
        language model or patch of the tower: the difference of two lengths, so that what does not grow with them,
        such as casts of weights, is not in them; see `states`.
        """
        types_of = {2: mv.autocast_dtype(self.args) or torch.bfloat16, 4: torch.float32}
        for module in self.model.modules():
            for name, weight in module.named_parameters(recurse=False):
                dtype = types_of[self.w if weight.requires_grad else self.f]
                module._parameters[name] = torch.nn.Parameter(self.fake(weight.shape, dtype), weight.requires_grad)
            for name, buffer in module.named_buffers(recurse=False):
                module._buffers[name] = self.fake(buffer.shape, buffer.dtype)
        mv.use_packed_attention(self.model.train(), "sdpa")  # saves what the kernels on CUDA save
        once, twice = self.count_saved(1), self.count_saved(2)
        merge, saved = self.config.vision_config.spatial_merge_size, {}
        for name, sizes in twice.items():
            units = SIDE**2 // merge**2 if mv.part_of(f"{name}.") == "llm" else SIDE**2
            saved[name] = [(size - less) / units for size, less in zip(sizes, once[name])]
        return saved

    def count_saved(self, length: int) -> dict:
        """A forward pass on one clip of `length` temporal patches; bytes by name as in `saved`, of all of it."""
        vision, low = self.config.vision_config, mv.autocast_dtype(self.args)
        merge, patch_size, grid = vision.spatial_merge_size, vision.patch_size, np.array([[length, SIDE, SIDE]])
        clip = SimpleNamespace(config=self.config, merge_size=merge, patch_size=patch_size)
        tower = {name.removeprefix("video_"): value for name, value in mv.tower_inputs(grid, clip, "cpu").items()}
        base = (self.model.get_base_model() if hasattr(self.model, "peft_config") else self.model).model
        tokens = length * SIDE**2 // merge**2
        pixels = self.fake((length * SIDE**2, 3 * mv.FRAME_FACTOR * patch_size**2), torch.float32)
        input_ids = self.fake((1, tokens), torch.long)
        storages = [tensor.untyped_storage() for tensor in (pixels, *self.model.parameters())]
        known = {storage._cdata: storage for storage in storages}  # alive, so that no other gets its number
        counted, inside = {"visual": [0, 0, 0], "language_model": [0, 0, 0]}, ["visual"]

        def enter(module, inputs, name):
            inside.append(name)
            counted[name] = [0, inputs[0].nbytes, 0]
            allocated.most = allocated.live

        def leave(module, inputs, output, name):
            inside.pop()
            counted[name][2] = allocated.most - sum(size for size, _, _ in counted.values())

        def save(tensor):
            storage = tensor.untyped_storage()
            if storage._cdata not in known:
                known[storage._cdata] = storage
                counted[inside[-1]][0] += storage.nbytes()
            return tensor

        hooks = []
        for name, module in base.named_modules():
            if BLOCK.search(name) or MERGER.search(name):
                hooks.append(module.register_forward_pre_hook(functools.partial(enter, name=name)))
                hooks.append(module.register_forward_hook(functools.partial(leave, name=name)))
        with (
            torch.autocast("cpu", low or torch.bfloat16, enabled=low is not None),
            torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor),
            Allocated() as allocated,
        ):
            features = base.visual(pixels.type(base.visual.dtype), torch.from_numpy(grid), **tower).pooler_output
            inside = ["language_model"]
            embeds = base.get_input_embeddings()(input_ids)
            embeds = embeds.masked_scatter(input_ids[..., None] == 0, features.to(embeds.dtype))
            positions, plan = torch.arange(tokens).expand(4, 1, tokens), mv.AttentionPlan.make([tokens])
            base.language_model(inputs_embeds=embeds, position_ids=positions, plan=plan, use_cache=False)
        for hook in hooks:
            hook.remove()
        return counted

    def peak(self, tokens: int, patches: int, supervised: int) -> dict:
        """Peak in GiB of a step whose largest row has so many tokens, patches and supervised tokens, and its parts."""
        args, text, e = self.args, self.config.get_text_config(), self.e
        patch_dim = 3 * mv.FRAME_FACTOR * self.config.vision_config.patch_size**2
        units = {"llm": tokens, "vision": patches, "merger": patches}
        saved, block = dict.fromkeys(units, 0), dict.fromkeys(units, 0)
        forward = 0  # what one of the tower's blocks needs at most
        for name, (size, of_input, needed) in self.saved.items():
            part = mv.part_of(f"{name}.")
            if BLOCK.search(name):
                forward = max(forward, needed * units[part]) if part == "vision" else forward
                block[part] = max(block[part], size * units[part])
                size = of_input if size and args.gradient_checkpointing else size
            saved[part] += size * units[part]
        again = {part: block[part] * BACKWARD if args.gradient_checkpointing else 0 for part in block}
        pixels, logits = patches * patch_dim * 4, supervised * text.vocab_size
        chunk = min(logits * 4, mv.LOGPS_BYTES["cuda"])  # of mv.token_logps
        head = logits * e * 2 + chunk * 2
        states = self.states()
        base, gradients, casts = states["weights"] + states["optimizer"] + pixels, states["gradients"], states["casts"]
        base += states["reference"]
        if args.gradient_accumulation_steps > 1:  # those of earlier rows are there all the time
            base, gradients = base + gradients, 0
        llm, of_head, of_embeddings = (  # shares of the gradients
            count / max(1, self.trained) for count in (self.trained_llm, self.trained_head, self.trained_embeddings)
        )
        kept = 0 if args.gradient_checkpointing else casts
        activations = sum(saved.values())
        moments = {
            "forward pass of the tower": base + casts * (1 - llm) + saved["vision"] + forward,
            "end of the forward pass": base + activations + casts + logits * e + chunk * 2,
            "start of the backward pass": base + activations + kept + max(head, gradients * of_head + again["llm"]),
            "backward pass of the first decoder layer": base + gradients * (llm - of_embeddings) + kept
            + saved["vision"] + saved["merger"] + max(block["llm"], again["llm"]),
            "backward pass of the tower": base + gradients * llm + kept + saved["vision"] + again["vision"],
            "end of the backward pass": base + gradients + block["vision"],
            "optimizer step": base + gradients + states["step"],
        }  # fmt: skip
        moment = max(moments, key=moments.get)
        parts = {"weights": states["weights"], "gradients": states["gradients"], "optimizer": states["optimizer"],
                 "activations": activations + max(again.values()), "pixels": pixels, "logits": head,
                 **({"reference": states["reference"]} if self.copied else {})}  # fmt: skip
        return {"gib": moments[moment] / 2**30 + RUNTIME_GIB, "moment": moment,
                "parts": {name: value / 2**30 for name, value in parts.items()}}  # fmt: skip
