"""Peak memory of one training step on one GPU, by arithmetic: the formula behind check_data.py --gpu_memory_gb.

Weights are counted by building the model, adapters included, on the meta device; activations follow from the shapes in
its config. tests/test_tools_data.py holds the prediction against the allocations of real steps. What is split over
processes (ZeRO, FSDP2) is divided by their number; DeepSpeed's buffers are taken at its default sizes.
"""

import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import multivideo as mv

import torch
import transformers
import yaml

BUCKET = 500_000_000  # elements: DeepSpeed's reduce_bucket_size; its stage3_max_live_parameters is twice that
BACKWARD = 1.3  # a block's backward pass needs this much of what its forward pass keeps
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


class MemoryModel:
    """Predicts the peak memory of one training step on one GPU; weights are counted on the meta device.

    The moments at which it can be highest; W weights, G gradients, O optimizer state, A saved activations:
        end of the forward pass     W + O + A + logits + casts      (with several rows per step + G, here and below)
        start of the backward pass  W + O + A + logits and their gradient, or one block of the language model
        backward pass of the tower  W + O + the language model's G + the tower's A + one of its blocks
        end of the backward pass    W + O + G + one block
        optimizer step              W + O + G + its workspace
    The frozen copy that DPO or GRPO has beside the trained model as a reference is there all the time.
    Types as load_model sets them: trained weights w = 4 bytes under autocast (and casts of them to e = 2 bytes for the
    matrix products), frozen ones 2. A is summed over blocks by what each operation keeps (block_bytes); gradient
    checkpointing leaves the input of each block, and one block's A on top when it is computed again.
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
        self.trained = self.trained_llm = self.frozen = self.quantized = self.cast = 0
        self.largest_quantized, self.largest = 0, max(parameter.numel() for parameter in model.parameters())
        kinds = {}  # (part, block or None) → {"trained", "adapted"}
        for name, parameter in model.named_parameters():
            part, count = mv.part_of(name), parameter.numel()
            in_block = re.search(r"(?:layers|blocks)\.(\d+)\.", name)
            if parameter.requires_grad:
                self.trained += count
                self.trained_llm += count if part == "llm" else 0
                self.cast += count if parameter.ndim > 1 and (tied or "embed_tokens" not in name) else 0
                kind = "adapted" if "lora_" in name else "trained"
                kinds.setdefault((part, in_block and int(in_block[1])), set()).add(kind)
            elif args.bits < 16 and part == "llm" and in_block and parameter.ndim > 1:
                self.quantized += count
                self.largest_quantized = max(self.largest_quantized, count)
            else:
                self.frozen += count
        vision, text = self.config.vision_config, self.config.get_text_config()
        flows = False  # does the gradient reach this block?
        self.blocks = {"vision": [], "llm": []}
        for part, depth in (("vision", vision.depth), ("llm", text.num_hidden_layers)):
            flows = flows or (part, None) in kinds or (part == "llm" and any(key[0] != "llm" for key in kinds))
            for block in range(depth):
                kind = kinds.get((part, block), {"frozen"})
                flows = flows or kind != {"frozen"}
                self.blocks[part].append(("trained" if "trained" in kind else min(kind), flows))
        self.merger = ("merger", None) in kinds or (flows and any(flow for _, flow in self.blocks["vision"]))
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

    def block_bytes(self, part: str, kind: str) -> float:
        """Bytes per token (language model) or patch (tower) that one block keeps for the backward pass.

        Norms keep their input in fp32 and, trained, its normalised form; attention keeps query, key, value, output and
        one number per head; the MLP keeps gate, activated gate, up and, before a trained matrix, their product. Linear
        layers keep their input: one cast each under autocast, one for all where the types agree already.
        """
        args, config, e = self.args, self.config.get_text_config(), self.e
        if part == "llm":
            h, heads, inter = config.hidden_size, config.num_attention_heads, config.intermediate_size
            q, kv, residual = h, h * config.num_key_value_heads // heads, self.residual
            attention, readers = e * (2 * q + 2 * kv), 3
        else:
            config = self.config.vision_config
            h = getattr(config, "embed_dim", config.hidden_size)
            inter = getattr(config, "intermediate_size", None) or int(h * config.mlp_ratio)
            q, kv, heads, residual = h, h, config.num_heads, e
            attention, readers = e * 6 * h, 1  # query, key and value come as one tensor, which stays
        trained, adapted = kind == "trained", kind == "adapted"
        mask = 1 if args.lora_dropout else 0

        def linear(width, count, type_of_input, outputs):
            if adapted:
                return count * (width * (e + mask) + args.lora_rank * e) + (4 * outputs if args.use_dora else 0)
            return width * e * (1 if type_of_input == e else count) if trained else 0

        normed = max(residual, self.w if trained else self.f)
        norms = 2 * (4 * h + (residual * h if trained else 0) + 4)
        heard = linear(h, readers, normed, q + 2 * kv) + attention + 4 * heads + (linear(q, 1, e, h) if adapted else 0)
        mlp = linear(h, 2, normed, 2 * inter) + 3 * e * inter + linear(inter, 1, e, h)
        return norms + heard + mlp

    @property
    def residual(self) -> int:
        """Bytes of a value of the language model's hidden states: the type of its embeddings."""
        return self.w if any(kind == "trained" for kind, _ in self.blocks["llm"]) else self.f

    def peak(self, tokens: int, patches: int, supervised: int) -> dict:
        """Peak in GiB of a step whose largest row has so many tokens, patches and supervised tokens, and its parts."""
        args, text, e = self.args, self.config.get_text_config(), self.e
        patch_dim = 3 * mv.FRAME_FACTOR * self.config.vision_config.patch_size**2
        vision_width = getattr(self.config.vision_config, "embed_dim", self.config.vision_config.hidden_size) * e
        size = {"llm": tokens, "vision": patches}
        width = {"llm": text.hidden_size * self.residual, "vision": vision_width}
        saved = {"vision": patches * patch_dim * e if e < 4 else 0,  # a cast of the pixels, for the first projection
                 "llm": tokens * text.hidden_size * (8 + e),  # embeddings and last norm
                 "merger": patches * vision_width / e * (4 + 4 * e) if self.merger else 0}  # fmt: skip
        block = {"vision": 0, "llm": 0}
        for part, blocks in self.blocks.items():
            for kind, flows in blocks:
                own = self.block_bytes(part, kind) * size[part] if flows else 0
                saved[part] += (width[part] * size[part] if flows else 0) if args.gradient_checkpointing else own
                block[part] = max(block[part], own)
        again = {part: block[part] * BACKWARD if args.gradient_checkpointing else 0 for part in block}
        pixels, logits = patches * patch_dim * 4, supervised * text.vocab_size
        chunk = min(logits * 4, mv.LOGPS_BYTES["cuda"])  # of mv.token_logps
        head = logits * e * 2 + chunk * 2
        states = self.states()
        base, gradients, casts = states["weights"] + states["optimizer"] + pixels, states["gradients"], states["casts"]
        base += states["reference"]
        if args.gradient_accumulation_steps > 1:  # those of earlier rows are there all the time
            base, gradients = base + gradients, 0
        kept = 0 if args.gradient_checkpointing else casts
        activations = sum(saved.values())
        moments = {
            "end of the forward pass": base + activations + casts + logits * e + chunk * 2,
            "start of the backward pass": base + activations + kept + max(head, again["llm"]),
            "backward pass of the tower": base + gradients * self.trained_llm / max(1, self.trained) + kept
            + saved["vision"] + again["vision"],
            "end of the backward pass": base + gradients + block["vision"],
            "optimizer step": base + gradients + states["step"],
        }  # fmt: skip
        moment = max(moments, key=moments.get)
        parts = {"weights": states["weights"], "gradients": states["gradients"], "optimizer": states["optimizer"],
                 "activations": activations + max(again.values()), "pixels": pixels, "logits": head,
                 **({"reference": states["reference"]} if self.copied else {})}  # fmt: skip
        return {"gib": moments[moment] / 2**30 + RUNTIME_GIB, "moment": moment,
                "parts": {name: value / 2**30 for name, value in parts.items()}}  # fmt: skip
