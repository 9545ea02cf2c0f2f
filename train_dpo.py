"""Preference tuning of Qwen-VL (DPO and its kin) on pairs of answers that share their many videos.

    loss = − log σ(β · (log p(chosen)/p_ref(chosen) − log p(rejected)/p_ref(rejected)))     averaged over all pairs

of the accumulation window on all processes; p_ref is the model as it was before training; --dpo_loss has nine more. A
pair is one row [prompt, chosen, rejected]: its videos are decoded once and go through the vision tower once, and the
answers do not see each other. Left out on purpose: padding, truncation, a Trainer class, logits of the prompt.

One record (JSON or JSONL; README.md has the other formats):
    {"id": "1", "video": ["a.mp4", "b.mp4"], "prompt": "<video>\\n<video>\\nWhat changed?",
     "chosen": "The colour.", "rejected": "Nothing."}

Launch, on a CPU or one GPU:
    accelerate launch --config_file accelerate_configs/cpu.yaml train_dpo.py \\
        --model_id demo/model --data_path demo/dpo_train.json --output_dir out
    accelerate launch --config_file accelerate_configs/one_gpu.yaml train_dpo.py \\
        --model_id Qwen/Qwen2.5-VL-7B-Instruct --data_path pairs.json --image_folder videos/ --bf16 True \\
        --video_resized_width 64 --video_resized_height 64 --fps 0.25 --output_dir out
"""

import math
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from datasets import Features, List

import multivideo as mv

FEATURES = Features({**mv.CONVERSATION, "completions": List(mv.MESSAGES)})  # a pair: chosen, rejected
DPO_LOSSES = ["sigmoid", "ipo", "hinge", "robust", "exo_pair", "nca_pair", "sppo_hard", "apo_zero", "apo_down", "sft"]
METRICS = ["rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins", "logps/chosen",
           "logps/rejected"]  # fmt: skip


@dataclass
class DPOArguments(mv.TrainingArguments):
    """The shared flags, and those of preference tuning. Names and defaults are TRL's."""

    beta: float = mv.arg(0.1, "How closely the model is held to the reference: higher is closer (of ipo: τ).")
    dpo_loss: list[str] = field(
        default_factory=lambda: ["sigmoid"],
        metadata={"help": "One loss or several, which are added up.", "choices": DPO_LOSSES,
                  "aliases": ["--loss_type", "--loss-type"]},
    )  # fmt: skip
    loss_weights: list[float] | None = field(
        default=None, metadata={"help": "A weight for each of --dpo_loss (default: 1 for each)."}
    )
    label_smoothing: float = mv.arg(
        0.0, "Share of pairs whose answers may be swapped: for sigmoid, robust (both without it alike) and exo_pair."
    )
    ref_model_id: str | None = mv.arg(
        None, "Another model as the reference (default: the model as it is before training)."
    )
    precompute_ref_log_probs: bool = mv.arg(
        False, "Compute the reference's log-probabilities once, before training, which then needs no reference model."
    )
    ref_log_probs_dir: str | None = mv.arg(
        None, "Folder where they are kept and found again by later runs (default: --output_dir)."
    )
    learning_rate: float = mv.arg(1e-6, "Peak learning rate.")
    lora_dropout: float = mv.arg(
        0.0, "Share of an adapter's inputs that is dropped in training: noise in the margins."
    )

    def check(self, given: set[str]) -> list[str]:
        """What is wrong with these flags, as sentences that name the mend."""
        problems = []

        def complain(condition, sentence):
            if condition:
                problems.append(sentence)

        names, weights = self.dpo_loss, self.loss_weights
        smoothed = {"sigmoid", "robust", "exo_pair"} & set(names)
        complain(not self.beta > 0, f"--beta {self.beta}: must be above 0")
        complain(len(set(names)) < len(names), f"--dpo_loss {' '.join(names)}: name each loss once")
        complain(weights is not None and len(weights) != len(names),
                 f"--loss_weights has {len(weights or [])} numbers for {len(names)} of --dpo_loss: "
                 "give one for each")  # fmt: skip
        complain(weights is not None and not (all(map(math.isfinite, weights)) and any(weights)),
                 f"--loss_weights {weights}: must be finite numbers, not all 0")  # fmt: skip
        complain(not 0 <= self.label_smoothing < 0.5,
                 f"--label_smoothing {self.label_smoothing}: must be 0 or more and below 0.5")  # fmt: skip
        complain(self.label_smoothing and not smoothed,
                 "--label_smoothing means something for sigmoid, robust and exo_pair only: drop it")  # fmt: skip
        complain("exo_pair" in names and self.label_smoothing == 0,
                 "--dpo_loss exo_pair takes the log of --label_smoothing: give 1e-3 (the paper's) or so")  # fmt: skip
        complain(self.ref_log_probs_dir and not self.precompute_ref_log_probs,
                 "--ref_log_probs_dir needs --precompute_ref_log_probs True")  # fmt: skip
        complain(self.ref_model_id and mv.looks_local(self.ref_model_id) and not Path(self.ref_model_id).is_dir(),
                 f"--ref_model_id {self.ref_model_id}: no such folder")  # fmt: skip
        return problems


def dpo_loss(
    name: str, logps: torch.Tensor, ref_logps: torch.Tensor, lengths: torch.Tensor, beta: float, label_smoothing: float
) -> torch.Tensor:
    """The loss `name` of each pair; all are to be averaged over pairs, but sft over the tokens of the chosen answers.

    Log-probabilities of whole answers in nats under the model and the reference, and their lengths in tokens, each
    [N, 2] (chosen, rejected) → [N]. Adding a loss is two lines here (its condition, its formula) and its name in
    DPO_LOSSES. All but the smoothing of sigmoid are those of TRL 1.16.
    """
    chosen, rejected = (logps - ref_logps).unbind(1)  # log-ratios; times β: the implicit rewards
    margin = beta * (chosen - rejected)
    if name == "sigmoid":  # DPO, arXiv:2305.18290 eq. 7; smoothed: cDPO, ericmitchell.ai/cdpo.pdf eq. 3
        return -(1 - label_smoothing) * F.logsigmoid(margin) - label_smoothing * F.logsigmoid(-margin)
    if name == "ipo":  # IPO, arXiv:2310.12036 eq. 17, with log-ratios per token as its authors computed them; β is τ
        return (chosen / lengths[:, 0] - rejected / lengths[:, 1] - 1 / (2 * beta)) ** 2
    if name == "hinge":  # SLiC's hinge on log-ratios, arXiv:2309.06657
        return F.relu(1 - margin)
    if name == "robust":  # Robust DPO, arXiv:2403.00409: unbiased if this share of the pairs is swapped
        clean, swapped = F.logsigmoid(margin), F.logsigmoid(-margin)
        return (label_smoothing * swapped - (1 - label_smoothing) * clean) / (1 - 2 * label_smoothing)
    if name == "exo_pair":  # EXO, arXiv:2402.00856 eq. 16: KL(softmax of the rewards ‖ (1 − ε, ε))
        return (torch.sigmoid(margin) * (F.logsigmoid(margin) - math.log1p(-label_smoothing))
                + torch.sigmoid(-margin) * (F.logsigmoid(-margin) - math.log(label_smoothing)))  # fmt: skip
    if name == "nca_pair":  # NCA, arXiv:2402.05369 with two answers and a hard preference
        return -F.logsigmoid(beta * chosen) - (F.logsigmoid(-beta * chosen) + F.logsigmoid(-beta * rejected)) / 2
    if name == "sppo_hard":  # SPPO, arXiv:2405.00675 eq. 4.7 with P = 1 for chosen and 0 for rejected
        return (chosen - 0.5 / beta) ** 2 + (rejected + 0.5 / beta) ** 2
    if name == "apo_zero":  # APO, arXiv:2408.06266 eq. 7: chosen up, rejected down
        return 1 - torch.sigmoid(beta * chosen) + torch.sigmoid(beta * rejected)
    if name == "apo_down":  # APO, arXiv:2408.06266 eq. 8: both down, rejected more (the model is better than both)
        return torch.sigmoid(beta * chosen) + 1 - torch.sigmoid(margin)
    if name == "sft":  # negative log-likelihood of the chosen answer
        return -logps[:, 0]
    raise ValueError(f"no loss {name!r}; known: {', '.join(DPO_LOSSES)}")


def answer_logps(logits: torch.Tensor, targets: torch.Tensor, sequences: torch.Tensor, pairs: int):
    """Log-probability and length of each answer: logits [1, S, V], targets and sequences [S] → two of [pairs, 2]."""
    zeros = torch.zeros(2 * pairs, device=logits.device)
    token_logps = mv.token_logps(logits, targets)
    logps = zeros.index_add(0, sequences, token_logps)
    lengths = zeros.index_add(0, sequences, torch.ones_like(token_logps))
    return logps.view(pairs, 2), lengths.view(pairs, 2)


def loss_sums(logps, ref_logps, lengths, args: DPOArguments) -> torch.Tensor:
    """Each loss of --dpo_loss, summed over the pairs of a row: three of [N, 2] → [losses]."""
    losses = [dpo_loss(name, logps, ref_logps, lengths, args.beta, args.label_smoothing) for name in args.dpo_loss]
    return torch.stack(losses).sum(1)


def loss_scales(args: DPOArguments, pairs: int, chosen_tokens: int) -> list[float]:
    """What each sum of loss_sums is multiplied by: its weight / number of pairs, of sft: of chosen tokens."""
    weights = args.loss_weights or [1.0] * len(args.dpo_loss)
    counts = [chosen_tokens if name == "sft" else pairs for name in args.dpo_loss]
    return [weight / max(count, 1) for weight, count in zip(weights, counts)]


def metric_sums(logps: torch.Tensor, ref_logps: torch.Tensor, beta: float) -> torch.Tensor:
    """METRICS summed over the pairs of a row: two of [N, 2] → [6]. Rewards are β times log-ratios."""
    chosen, rejected = (beta * (logps - ref_logps)).unbind(1)
    return torch.stack([chosen, rejected, (chosen > rejected).float(), chosen - rejected, *logps.unbind(1)]).sum(1)


def normalize_record(record: dict, where: str) -> dict:
    """Two answers to one prompt, as `{"id", "messages", "completions": [chosen, rejected]}` of the schema FEATURES.

    `chosen` and `rejected` are texts, or turns that follow the `prompt` (a text or turns, which `messages` or
    `conversations` may hold as well), or without it whole conversations, whose common leading turns are the prompt.

    Raises:
        ValueError: names the record, the field, what was found, what was expected and the mend.
    """
    if not isinstance(record, dict):
        return mv.normalize_conversation(record, where)  # which refuses it
    try:
        answers = [_answer(record, name) for name in ("chosen", "rejected")]
        prompts = [name for name in ("prompt", "messages", "conversations") if record.get(name) is not None]
        if len(prompts) > 1:
            raise ValueError(f"fields {' and '.join(map(repr, prompts))} are both there: keep the one with the prompt")
        prompt = record[prompts[0]] if prompts else None
        if any(_role(answer[0]) != "assistant" for answer in answers):
            answers, prompt = _split(answers, prompt)
        elif prompt is None:
            raise ValueError("field 'prompt' is missing: give it, or begin 'chosen' and 'rejected' with its turns")
        prompt = prompt if isinstance(prompt, (list, tuple)) else [{"role": "user", "content": prompt}]
        completions = [_completion(answer, name) for answer, name in zip(answers, ("chosen", "rejected"))]
        if completions[0] == completions[1]:
            raise ValueError("'chosen' and 'rejected' are the same, so there is nothing to learn: drop the record")
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    rest = {key: value for key, value in record.items() if key not in ("chosen", "rejected", *prompts)}
    row = mv.normalize_conversation({**rest, "messages": prompt}, where)
    if row["messages"][-1]["role"] != "user":
        raise ValueError(f"{where}: the prompt must end with a user turn, got {row['messages'][-1]['role']!r}")
    return {**row, "completions": completions}


def _role(turn):
    role = next((turn[key] for key in ("from", "role") if turn.get(key) is not None), None)
    return mv.ROLES.get(role) if isinstance(role, str) else role


def _answer(record, name):
    """The field `chosen` or `rejected` as a list of turns, not yet looked into."""
    value = record.get(name)
    if isinstance(value, str):
        return [{"role": "assistant", "content": value}]
    turns = [value] if isinstance(value, dict) else value
    if not isinstance(turns, (list, tuple)) or not turns or not all(isinstance(turn, dict) for turn in turns):
        raise ValueError(f"field {name!r}: expected the answer, a text or a list of turns, got {value!r:.80}")
    return list(turns)


def _split(answers, prompt):
    """Whole conversations → (what follows their common leading turns, these turns)."""
    chosen, rejected = answers
    shared = next((i for i, (a, b) in enumerate(zip(chosen, rejected)) if a != b), min(len(chosen), len(rejected)))
    if not shared:
        raise ValueError("'chosen' and 'rejected' do not begin with the same turn: give what both answer as 'prompt'")
    if isinstance(prompt, str) and prompt not in (chosen[shared - 1].get("content"), chosen[shared - 1].get("value")):
        raise ValueError("'prompt' is not the turn that 'chosen' and 'rejected' share last: drop one of them")
    if isinstance(prompt, (list, tuple)):
        raise ValueError("'prompt' is there, so 'chosen' and 'rejected' must begin with an assistant ('gpt') turn, "
                         f"got {_role(chosen[0])!r} and {_role(rejected[0])!r}")  # fmt: skip
    for answer, name in ((chosen, "chosen"), (rejected, "rejected")):
        if len(answer) == shared:
            raise ValueError(f"{name!r} has no turn of its own: all {shared} are in the other answer too")
    return [chosen[shared:], rejected[shared:]], chosen[:shared]


def _completion(turns, name):
    """The turns of one answer in the schema: text only, from an assistant turn to an assistant turn."""
    try:
        turns = [mv.normalize_turn(turn, i) for i, turn in enumerate(turns)]
    except ValueError as error:
        raise ValueError(f"{name!r}: {error}") from None
    for i, turn in enumerate(turns):
        if media := [part["type"] for part in turn["content"] if part["type"] != "text"]:
            raise ValueError(f"{name!r}: turn {i} has a {media[0]}: videos and images belong in the prompt, which "
                             "both answers share")  # fmt: skip
        if turn["role"] != ("user" if i % 2 else "assistant"):
            raise ValueError(f"{name!r}: turn {i} is of {turn['role']!r}; assistant and user turns must alternate, "
                             "the assistant's first")  # fmt: skip
        if turn["role"] == "assistant" and not any((part["text"] or "").strip() for part in turn["content"]):
            raise ValueError(f"{name!r}: an assistant ('gpt') turn without text: write the answer or drop the record")
    if turns[-1]["role"] != "assistant":
        raise ValueError(f"{name!r}: the last turn must be the assistant's, got {turns[-1]['role']!r}")
    return turns
