"""Group relative policy optimization (GRPO) of Qwen-VL on prompts with many videos.

    A = (reward − mean of its group) / (standard deviation of its group + 1e-4)
    loss = Σ [− min(ρ A, clip(ρ, 1 − ε, 1 + ε_high) A) + β ρ KL] / completion tokens,     ρ = π(token) / π_old(token)

summed over the completions of the whole accumulation window on all processes (--loss_type has three other divisors).
G completions are sampled from each prompt, scored by reward functions, and learned in one row [prompt, c1 … cG]: the
videos of a prompt are encoded once to sample and once per update, not G times. Left out on purpose: a second engine
for sampling, asynchronous rollouts, padding, a Trainer class.

One record (JSON or JSONL; README.md has the other formats): the answer is the reference that rewards compare with
    {"id": "1", "video": ["a.mp4", "b.mp4"], "conversations": [
        {"from": "human", "value": "<video>\\n<video>\\nWhich is brighter?"}, {"from": "gpt", "value": "The second."}]}

Launch, on a CPU or one GPU:
    accelerate launch --config_file accelerate_configs/cpu.yaml train_grpo.py \\
        --model_id demo/half --data_path demo/sft_train.json --reward_funcs accuracy --output_dir out
    accelerate launch --config_file accelerate_configs/one_gpu.yaml train_grpo.py \\
        --model_id Qwen/Qwen2.5-VL-7B-Instruct --data_path data.json --image_folder videos/ --bf16 True \\
        --reward_funcs format mine.py:f --video_resized_width 64 --video_resized_height 64 --fps 0.25 --output_dir out
"""

import ast
import contextlib
import hashlib
import importlib.util
import inspect
import itertools
import json
import math
import re
import sys
import textwrap
import time
import traceback
import zlib
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import cache, partial
from pathlib import Path

import multivideo as mv

import numpy as np
import pyarrow as pa
import torch
from accelerate.utils import set_seed
from tqdm import tqdm


@dataclass
class GRPOArguments(mv.TrainingArguments):
    """The shared flags and those of rollouts, rewards and the objective."""

    per_device_train_batch_size: int = mv.arg(
        1, "Prompts packed into one row, per process, each with its completions (TRL counts completions)."
    )
    learning_rate: float = mv.arg(1e-6, "Peak learning rate.")
    metric_for_best_model: str = mv.arg("eval_reward", "Metric of an evaluation that decides which one is best.")

    # rollouts
    num_generations: int = mv.arg(
        8,
        "Completions sampled from each prompt: the group that rewards are compared in. ZeRO-3 and FSDP2 gather all "
        "weights on every GPU to sample.",
    )
    max_completion_length: int = mv.arg(256, "Most tokens of a completion.")
    max_prompt_length: int | None = mv.arg(
        None, "Longest prompt in tokens, visual tokens included (default: what completions leave of --max_seq_length)."
    )
    temperature: float = mv.arg(0.9, "Logits are divided by it, to sample and in the objective.")
    top_k: int = mv.arg(50, "Sample among the K likeliest tokens only; 0: among all.")
    top_p: float = mv.arg(1.0, "Sample among the likeliest tokens that together have this probability.")
    min_p: float | None = mv.arg(None, "Sample among tokens at least this share as likely as the likeliest one.")
    repetition_penalty: float = mv.arg(
        1.0, "Above 1: tokens that the prompt or completion already has are less likely."
    )
    rollout_cache_gb: float = mv.arg(
        8.0,
        "Memory for completions in the making (keys, values, probabilities), per process: more prompts take turns.",
    )

    # rewards
    reward_funcs: list[str] = field(
        default_factory=lambda: ["accuracy", "format"],
        metadata={
            "help": "Rewards. accuracy: the answer is the reference but for case, spaces and outer punctuation, "
            "or equal by math_verify. format: <think>…</think> <answer>…</answer>. choice: the same letter. "
            "numeric: max(0, 1 − |x − y| / |y|) for the last number x, the reference's y. Or your own as "
            "file.py:function, called as in TRL with prompts, completions and every column of the data set (None "
            "where a record lacks it): completions are lists of messages where the prompt is a list of turns, texts "
            "where it is a text, or as the function annotates them (list[str], list[list[dict]]). Or file.py for all "
            "of its functions named *_reward, in the file's order, as in 2U1's reward_funcs.py: without annotation "
            "completions are texts. A parameter `assistant` is the first answer, else the reference: a text beside "
            "texts, a message beside messages."
        },
    )
    reward_weights: list[float] | None = field(
        default=None, metadata={"help": "A weight for each of --reward_funcs (default: 1 for each)."}
    )

    # objective
    beta: float = mv.arg(
        0.04,
        "Weight of the KL divergence from the model at the start (with a new adapter and --lora_bias none the same "
        "weights, adapter off; else a frozen copy: 4 bytes per parameter, 2 under DeepSpeed in bf16, split under "
        "ZeRO-3 and FSDP2); 0: no such model.",
    )
    num_iterations: int = mv.arg(
        1, "Optimizer steps taken on each batch of completions; evaluation and checkpoints wait for the last of them."
    )
    epsilon: float = mv.arg(0.2, "The probability ratio is clipped at 1 − epsilon.")
    epsilon_high: float | None = mv.arg(
        None, "The probability ratio is clipped at 1 + epsilon_high (default: epsilon)."
    )
    loss_type: str = mv.arg(
        "dapo",
        "What the sum over tokens is divided by: all tokens (dapo, bnpo), each completion's own and then the number "
        "of completions (grpo), or completions × --max_completion_length (dr_grpo).",
        choices=["grpo", "bnpo", "dr_grpo", "dapo"],
    )
    scale_rewards: str = mv.arg(
        "group", "Advantages are divided by the standard deviation of the group, of all groups of a step, or not.",
        choices=["group", "batch", "none"],
    )  # fmt: skip
    importance_sampling_level: str = mv.arg(
        "token", "Ratios per token, or their geometric mean over the completion.", choices=["token", "sequence"]
    )
    mask_truncated_completions: bool = mv.arg(
        False, "Learn nothing from completions without an end (a step that has no other updates nothing)."
    )

    def objective(self) -> str:
        """For the model card."""
        rewards = ", ".join(Path(name).name for name in self.reward_funcs)
        return f"reinforcement learning (GRPO), loss {self.loss_type}, beta {self.beta:g}, rewards {rewards}"

    def check(self, given: set[str]) -> list[str]:
        """What is wrong with these flags, as sentences; derived defaults are filled in."""
        problems = []

        def complain(condition, sentence):
            if condition:
                problems.append(sentence)

        complain(self.num_generations < 2, f"--num_generations {self.num_generations}: rewards are compared within a "
                 "group, the fewest is 2")  # fmt: skip
        for flag in ("max_completion_length", "max_prompt_length", "temperature", "repetition_penalty",
                     "rollout_cache_gb", "num_iterations", "epsilon", "epsilon_high"):  # fmt: skip
            value = getattr(self, flag)
            complain(value is not None and value <= 0, f"--{flag} {value}: must be above 0")
        for flag in ("top_k", "beta"):
            complain(getattr(self, flag) < 0, f"--{flag} {getattr(self, flag)}: must be 0 or more")
        complain(not 0 < self.top_p <= 1, f"--top_p {self.top_p}: must be above 0, 1 at most")
        complain(not 0 <= (self.min_p or 0) <= 1, f"--min_p {self.min_p}: must lie between 0 and 1")
        complain(self.epsilon > 1, f"--epsilon {self.epsilon}: must be 1 at most")
        room = self.max_seq_length - self.max_completion_length
        complain(room <= 0, f"--max_completion_length {self.max_completion_length} leaves no room for a prompt in "
                 f"--max_seq_length {self.max_seq_length}: raise the second")  # fmt: skip
        complain(room > 0 and (self.max_prompt_length or 0) > room,
                 f"--max_prompt_length {self.max_prompt_length} and --max_completion_length "
                 f"{self.max_completion_length} are more than --max_seq_length {self.max_seq_length}: "
                 "raise the last")  # fmt: skip
        self.max_prompt_length = self.max_prompt_length or room
        self.epsilon_high = self.epsilon if self.epsilon_high is None else self.epsilon_high
        try:
            names = list(load_rewards(self.reward_funcs))
        except mv.InputError as error:
            problems.append(str(error))
        else:
            self.reward_weights = self.reward_weights or [1.0] * len(names)
            complain(len(self.reward_weights) != len(names), f"--reward_weights has {len(self.reward_weights)} "
                     f"numbers for {len(names)} --reward_funcs: give one each")  # fmt: skip
        return problems


# ---------------------------------------------------------------------------------------------------------- records

FEATURES = pa.schema([
    *mv.CONVERSATION,
    ("completions", pa.list_(mv.MESSAGES)),  # always []: the encoder then ends the prompt where the assistant begins
    ("prompt", pa.string()),  # only where the record's own is a text, which reward functions then get as it is
    ("reference", pa.string()),
    ("columns", pa.string()),  # JSON: all other fields, for reward functions
    ("column_names", pa.list_(pa.string())),
    ("left_out", pa.int64()),  # turns after the first answer
])  # fmt: skip
READ = ("prompt", "completion", "conversations", "messages", "video", "videos", "image", "images")  # no columns
REFERENCES = ("solution", "answer", "ground_truth", "reference")
COLUMNS = ("weight", "margin", "objects", "timestamps")  # refused elsewhere; here reward functions may use them


def reference_beside(fields: dict, where: str) -> str | None:
    """The first of REFERENCES that a record has, as a text; None if it has none."""
    for key in REFERENCES:
        value = fields.get(key)
        if mv.absent(value):
            continue
        if not isinstance(value, (str, int, float)) or value in (math.inf, -math.inf) or value != value:
            raise ValueError(f"{where}: field {key!r}: the reference answer must be a text or a number, got "
                             f"{value!r:.80}: write it as one, or rename the field")  # fmt: skip
        if not str(value).strip():
            raise ValueError(f"{where}: field {key!r}: the reference answer is empty: write it or drop the record")
        return str(value)
    plurals = [f"{key}s" for key in REFERENCES]  # columns of their own
    others = {key: value for key, value in fields.items() if key not in plurals}
    mv.check_fields(others, REFERENCES, where=where)
    return None


def completion_text(completion, where: str) -> str:
    """The text of a record's `completion`, which is a text or the assistant's turn."""
    try:
        turns = [mv.normalize_turn(turn, i) for i, turn in enumerate(mv.completion_turns(completion))]
    except ValueError as error:
        raise ValueError(f"{where}: field 'completion': {error}") from None
    parts = [part for turn in turns for part in mv.plain_text(turn["content"], tags=True)]
    if len(turns) != 1 or turns[0]["role"] != "assistant" or any(part["type"] != "text" for part in parts):
        raise ValueError(f"{where}: field 'completion' must be one answer, a text, got {completion!r:.80}")
    if not (text := "".join(part["text"] for part in parts)).strip():
        raise ValueError(f"{where}: field 'completion': the reference answer is empty: write it or drop the record")
    return text


def normalize_record(record: dict, where: str) -> dict:
    """A prompt, its reference answer and all other columns, in the schema FEATURES.

    The prompt is `prompt`, a text or a list of turns; or all before the first assistant turn of a conversation (the
    column `assistant`), or in one of the forms of mv.rename_fields. The reference is the first of REFERENCES that the
    record has, else the `completion` or that turn. Beside one of
    REFERENCES, a conversation that ends with a user turn is the prompt as a whole.

    Raises:
        ValueError: names the record, the field, what was found, what was expected and the mend.
    """
    record = mv.rename_fields(record, where)
    fields = record if isinstance(record, dict) else {}
    columns = {key: value for key, value in fields.items() if key not in READ}
    prompt, reference, left_out = fields.get("prompt"), reference_beside(fields, where), []
    passed_on = COLUMNS if reference is None else (*COLUMNS, "reward_model")
    asked = {key: value for key, value in fields.items() if key not in passed_on}
    mv.check_fields(fields, ("prompt", "conversations", "messages"), where=where)
    if prompt is not None:
        if both := [key for key in ("conversations", "messages") if fields.get(key) is not None]:
            raise ValueError(f"{where}: fields 'prompt' and {both[0]!r} are both there: keep one of them")
        row = mv.normalize_conversation({**asked, "messages": mv.prompt_turns(prompt)}, where)
        if row["messages"][-1]["role"] not in ("user", "tool"):
            raise ValueError(f"{where}: 'prompt' must end with a user turn: put the answer into a column of its own, "
                             f"such as {REFERENCES[0]!r}")  # fmt: skip
        if not mv.absent(fields.get("completion")):
            answer = completion_text(fields["completion"], where)
            columns["assistant"] = {"role": "assistant", "content": answer}
            reference = answer if reference is None else reference
    else:
        row = mv.normalize_conversation(asked if fields else record, where)
        roles = [message["role"] for message in row["messages"]]
        if "assistant" in roles and (reference is None or roles[-1] == "assistant"):
            i = roles.index("assistant")
            answer = "".join(part["text"] or "" for part in row["messages"][i]["content"])
            if reference is None and row["messages"][i]["tool_calls"]:
                raise ValueError(f"{where}: the first answer calls a tool: write the turns before the answer as "
                                 f"'prompt', and the answer into a column such as {REFERENCES[0]!r}")  # fmt: skip
            if reference is None and not answer.strip():
                raise ValueError(f"{where}: the reference answer is empty: write it or drop the record")
            reference = answer if reference is None else reference
            columns["assistant"] = {"role": "assistant", "content": answer}
            if thoughts := row["messages"][i]["reasoning"]:
                columns["assistant"]["reasoning_content"] = thoughts
            if any(part["type"] != "text" for message in row["messages"][i:] for part in message["content"]):
                raise ValueError(f"{where}: a video or image in the first answer or a turn after it, which is not "
                                 "read: put it before, or write the turns as 'prompt'")  # fmt: skip
            row["messages"], left_out = row["messages"][:i], row["messages"][i + 1 :]
    try:
        text = json.dumps(columns)
    except TypeError as error:
        raise ValueError(f"{where}: a column is neither text, number, list nor object ({error}): drop it") from None
    return {
        **row, "completions": [], "prompt": prompt if isinstance(prompt, str) else None,
        "reference": reference, "columns": text, "column_names": list(columns),
        "left_out": len(left_out),
    }  # fmt: skip


# ---------------------------------------------------------------------------------------------------------- rewards


def final_answer(text: str) -> str:
    """What stands between the last <answer> tags, else the text without its thoughts."""
    if found := re.findall(r"<answer>(.*?)</answer>", text, re.DOTALL):
        return found[-1].strip()
    return without_thoughts(text)


def without_thoughts(text: str) -> str:
    """The text without its <think> parts; one begins with the text where the chat template gives the <think>."""
    return re.sub(r"<think>.*?</think>|\A(?:(?!<think>).)*?</think>", "", text, flags=re.DOTALL).strip()


def texts_of(completions) -> list[str]:
    """The texts of completions, which come as lists of messages, or as texts where the prompt is one."""
    return [item if isinstance(item, str) else item[0]["content"] for item in completions]


def accuracy_reward(completions, reference, **kwargs) -> list[float | None]:
    """1 if the final answer is the reference's: equal but for case, spaces and outer punctuation, else by math_verify.

    math_verify, where it is installed, decides on references without words only: numbers and formulas.
    """

    def plain(text):
        return " ".join(final_answer(text).casefold().split()).strip(" .,;:!?'\"")

    def same(text, expected):
        if plain(text) == plain(expected):
            return 1.0
        formula = "\\" in expected or "$" in expected or not re.search(r"[^\W\d_]{2,}", final_answer(expected))
        if not formula or importlib.util.find_spec("math_verify") is None:
            return 0.0
        import math_verify

        gold, answer = math_verify.parse(final_answer(expected)), math_verify.parse(final_answer(text))
        return float(math_verify.verify(gold, answer))

    return [same(*pair) if pair[1] is not None else None for pair in zip(texts_of(completions), reference)]


def format_reward(completions, generation_prefix=None, **kwargs) -> list[float]:
    """1 if the completion is exactly `<think>…</think> <answer>…</answer>`.

    A <think> that the chat template gives in `generation_prefix` counts as the completion's own.
    """
    tags = re.compile(r"\s*<think>(?:(?!</?think>).)*</think>\s*<answer>(?:(?!</?answer>).)*</answer>\s*", re.DOTALL)
    texts = texts_of(completions)
    given = [prefix if prefix.strip() == "<think>" else "" for prefix in generation_prefix or [""] * len(texts)]
    return [float(tags.fullmatch(prefix + text) is not None) for prefix, text in zip(given, texts)]


NUMBER = re.compile(r"(?<![\w.])([-+−]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:[eE][-+]?\d+)?|[-+−]?\.\d+)(\s*%)?")


def numeric_reward(completions, reference, **kwargs) -> list[float | None]:
    """Closeness of the final answer's last number x to the reference's y: max(0, 1 − |x − y| / |y|); None without y.

    65 % is 0.65; where only one of the two has the sign, the other may mean either, and the closer one counts.
    """

    def last_number(text):
        found = NUMBER.findall(final_answer(text))
        return (float(found[-1][0].replace(",", "").replace("−", "-")), bool(found[-1][1])) if found else None

    def closeness(x, y):
        return float(x == y) if y == 0 else max(0.0, 1 - abs(x - y) / abs(y))

    def reward(text, expected):
        if expected is None or (target := last_number(expected)) is None:
            return None
        if (given := last_number(text)) is None:
            return 0.0
        (x, x_percent), (y, y_percent) = given, target
        readings = [1] if x_percent == y_percent else [1, 0.01 if x_percent else 100]
        return max(closeness(x * factor, y) for factor in readings)

    return [reward(*pair) for pair in zip(texts_of(completions), reference)]


def choice_reward(completions, reference, **kwargs) -> list[float | None]:
    """1 if the final answer names the reference's letter (`B`, `(B)`, `B. text`, `the answer is B`), else 0."""

    def letter(text):
        text = final_answer(text)
        named = r".*\b(?:answer|option|choice)\W+(?:is\W+)?([A-Z])\b"
        for pattern in (r"\W*([A-Za-z])\W*$", r"\W*([A-Z])\s*[).:]", named, r".*\(([A-Z])\)"):
            if found := re.match(pattern, text, re.DOTALL):
                return found[1].upper()
        return None

    def reward(text, expected):
        target = None if expected is None else letter(expected)
        return None if target is None else float(letter(text) == target)

    return [reward(*pair) for pair in zip(texts_of(completions), reference)]


BUILT_IN = {"accuracy": accuracy_reward, "format": format_reward, "numeric": numeric_reward, "choice": choice_reward}


@cache
def load_reward_file(path: Path):
    """The module of a file of reward functions, None if it is no Python file: run once per process.

    Dataclasses, pickle and typing look it up in sys.modules: it is there under a name that nothing else has.
    """
    name = f"reward_file_{re.sub(r'[^a-zA-Z0-9]', '_', path.stem)}_{hashlib.sha256(bytes(path)).hexdigest()[:16]}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None:
        return None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        sys.modules.pop(name, None)
        raise
    return module


@dataclass(frozen=True)
class Reward:
    """A function of --reward_funcs and the form in which it takes completions.

    texts: True for texts, False for lists of messages, None for TRL's rule: lists of messages where the prompt is a
    list of turns, texts where it is a text.
    """

    function: Callable
    texts: bool | None = None


def load_rewards(names: list[str]) -> dict[str, Reward]:
    """The functions of --reward_funcs by their names: built-in ones, `file.py:function`, and all of a `file.py`.

    Raises:
        InputError: an unknown name, a file that cannot be imported, or a function that cannot take what it is given.
    """
    rewards = {}
    for name in names:
        file, colon, function_name = name.rpartition(":")
        if not colon and name in BUILT_IN:
            found = {name: Reward(BUILT_IN[name])}
        elif not colon and not name.endswith(".py"):
            raise mv.InputError(f"--reward_funcs {name}: expected one of {', '.join(BUILT_IN)}, or file.py:function, "
                                "or file.py for all of its functions named *_reward")  # fmt: skip
        elif not colon:
            module = _reward_module(name, name)
            found = {key: value for key, value in vars(module).items() if key.endswith("_reward") and callable(value)}
            if not found:
                raise mv.InputError(f"--reward_funcs {name}: no function of the file is named *_reward: rename them, "
                                    f"or give one as {name}:function")  # fmt: skip
            found = {key: _checked_reward(name, key, value, whole_file=True) for key, value in found.items()}
        else:
            function = getattr(_reward_module(name, file), function_name, None)
            if not callable(function):
                raise mv.InputError(f"--reward_funcs {name}: {file} has no plain function {function_name!r}")
            found = {function_name: _checked_reward(name, function_name, function, whole_file=False)}
        if twice := [function_name for function_name in found if function_name in rewards]:
            raise mv.InputError(f"--reward_funcs {name}: two functions of the name {twice[0]}: rename one")
        rewards |= found
    return rewards


def _reward_module(name, file):
    if not Path(file).is_file():
        raise mv.InputError(f"--reward_funcs {name}: no such file: {file}")
    if str(Path(file).resolve().parent) not in sys.path:
        sys.path.append(str(Path(file).resolve().parent))  # for what it imports from beside it
    try:
        module = load_reward_file(Path(file).resolve())
    except Exception as error:
        raise mv.InputError(f"--reward_funcs {name}: {file} cannot be imported: {_told(error)}") from error
    if module is None:
        raise mv.InputError(f"--reward_funcs {name}: {file} is no Python file")
    return module


def _checked_reward(name, function_name, function, whole_file):
    """The Reward of a function that can be called with everything by name; those of a whole file take texts."""
    rename = ", or rename it if it is no reward" if whole_file else ""
    if inspect.iscoroutinefunction(function):
        file = name if whole_file else name.rpartition(":")[0]
        raise mv.InputError(f"--reward_funcs {name}: {file} has no plain function {function_name!r}, it is async: "
                            f"write it without{rename}")  # fmt: skip
    parameters = inspect.signature(function).parameters
    own = inspect.signature(function, follow_wrapped=False).parameters.values()
    if any(p.kind is p.POSITIONAL_ONLY and p.default is p.empty for p in own):
        raise mv.InputError(f"--reward_funcs {name}: {function_name} is given everything by name: remove the '/' from "
                            f"its parameters{rename}")  # fmt: skip
    if all(p.kind is not p.VAR_KEYWORD for p in parameters.values()):
        raise mv.InputError(f"--reward_funcs {name}: {function_name} must take **kwargs: it is given prompts, "
                            f"completions, completion_ids and every column of the records{rename}")  # fmt: skip
    texts = annotated_texts(parameters["completions"].annotation) if "completions" in parameters else None
    if texts is None and whole_file:
        texts = True
        if any(_names_content(node) for node in ast.walk(_source_tree(function))):
            raise mv.InputError(
                f"--reward_funcs {name}: the functions of a whole file are given completions and `assistant` as "
                f"texts, but {function_name} reads a 'content': give the functions one by one, as "
                f"{name}:{function_name}, which get lists of messages where the prompt is a list of turns, or write "
                f"`completions: {AS_MESSAGES}` in their signatures"
            )
    return Reward(function, texts)


AS_TEXTS, AS_MESSAGES = "list[str]", "list[list[dict]]"  # annotations of `completions`


def annotated_texts(annotation) -> bool | None:
    """True if an annotation of `completions` is one of texts (list[str]), False if of lists of messages, else None."""
    text = annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)
    text = re.sub(r"\s|(?:\w+\.)+", "", text)
    sequence = "(?:list|List|Sequence|Iterable)"
    if re.fullmatch(rf"{sequence}\[str\]", text):
        return True
    return False if re.fullmatch(rf"{sequence}\[{sequence}(?:\[[^|]*\])?\]", text) else None


def _source_tree(function, whole_file=False):
    """The syntax tree of a function, or of its file; an empty one where there is no source, as of a C function."""
    function = inspect.unwrap(function)
    function = function.func if isinstance(function, partial) else function
    function = function if inspect.isroutine(function) or inspect.isclass(function) else type(function)
    try:
        if whole_file:
            return ast.parse(Path(inspect.getsourcefile(function)).read_bytes())
        return ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError):
        return ast.Module([], [])


def _names_content(node):
    return isinstance(node, ast.Constant) and node.value == "content"


def check_forms(flag: str, source: str, records, rewards: dict):
    """Make sure that functions that are given lists of messages read their 'content'.

    A list of one message has the length 1, whatever its text is: a reward that takes it for a text may not fail.

    Raises:
        InputError: names the function, what it is given, and how to ask for the other form.
    """
    if not records.data.column("prompt").null_count:
        return  # all prompts are texts, and so are all completions
    for name, reward in rewards.items():
        if name in BUILT_IN or reward.texts is not None or not _looks_at_completions(reward.function):
            continue
        if not any(_names_content(node) for node in ast.walk(_source_tree(reward.function, whole_file=True))):
            parameters = inspect.signature(reward.function).parameters
            given = "lists of messages [{'role': 'assistant', 'content': text}], as in TRL for prompts of turns"
            raise mv.InputError(f"--reward_funcs {name}: for records of {flag} {source} completions are {given}, but "
                                f"its file never reads 'content': write `completions: {AS_TEXTS}` in its signature to "
                                f"get texts{' (and `assistant` as one)' if 'assistant' in parameters else ''}, or "
                                f"`completions: {AS_MESSAGES}` if it does read them")  # fmt: skip


def _looks_at_completions(function):
    """Whether a function uses its completions for more than their number."""
    used, counted = [], []
    for node in ast.walk(_source_tree(function)):
        word = node.id if isinstance(node, ast.Name) else node.value if isinstance(node, ast.Constant) else None
        if word == "completions":  # the parameter, or kwargs["completions"]
            used.append(node)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "len" and node.args:
            argument = node.args[0]
            counted.append(argument.slice if isinstance(argument, ast.Subscript) else argument)
    return any(node not in counted for node in used)


def _told(error):
    """An exception in one line, with the place where it was raised."""
    place = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {error} ({Path(place.filename).name}, line {place.lineno})"


def column_names(records) -> list[str]:
    """The columns of a data set for reward functions: every name that any of its records has.

    `assistant` is one of them wherever there is a reference (see reward_inputs).
    """
    chunks = records.data.column("column_names").chunks
    names = [name for chunk in chunks for name in chunk.flatten().unique().to_pylist()]
    if records.data.column("reference").null_count < len(records):
        names.append("assistant")
    return list(dict.fromkeys(names))


def check_sets(args, records, eval_records, encoder: mv.Encoder) -> list:
    """What no single record shows: every data set has the references, columns and forms that the rewards ask for.

    Returns the reward functions. Raises:
        InputError: names the flag and what is missing.
    """
    functions = load_rewards(args.reward_funcs)
    for flag, table in (("data_path", records), ("eval_path", eval_records)):
        check_references(f"--{flag}", table, args.reward_funcs)
        if table:
            check_parameters(f"--{flag}", getattr(args, flag), column_names(table), functions)
            check_forms(f"--{flag}", getattr(args, flag), table, functions)
    return functions


# Besides the columns, to every reward function.
GIVEN = ("prompts", "completions", "completion_ids", "generation_prefix", "reference")


def check_parameters(flag: str, source: str, columns: list[str], functions: dict):
    """Make sure that the records have what reward functions ask for by name.

    Raises:
        InputError: names the function, the parameters, the data file and the columns that there are.
    """
    for name, reward in functions.items():
        # The function's own, not those of one that it wraps, for which it may fill some in.
        parameters = inspect.signature(reward.function, follow_wrapped=False).parameters.values()
        needed = [parameter.name for parameter in parameters if parameter.default is parameter.empty
                  and parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)]  # fmt: skip
        if missing := [parameter for parameter in needed if parameter not in (*GIVEN, *columns)]:
            many = "parameters" if len(missing) > 1 else "parameter"
            there = f"{', '.join(columns) or 'none'} (and always {', '.join(GIVEN)})"
            raise mv.InputError(f"--reward_funcs {name}: no column of {flag} {source} for its {many} "
                                f"{', '.join(map(repr, missing))}: there are {there}. Add it to the records, or give "
                                f"the {many} a default")  # fmt: skip


def reward_inputs(groups: list[dict], columns: list[str], texts: bool | None = None) -> dict:
    """What a reward function is given, a list with one entry per completion for each of GIVEN and of the columns.

    `generation_prefix` is what the chat template writes before each completion, such as "<think>\\n".

    `columns` are those of the data set: what a record lacks of them is None. `texts` is that of a Reward. The form of
    completions is that of TRL's GRPOTrainer, unless `texts` decides. `assistant` is what the trainer of
    2U1/Qwen-VL-Series-Finetune gives by that name, the first answer, else the reference: as a message beside lists of
    messages (as there until October 2025), as a text beside texts (as there since).
    """
    names = [*dict.fromkeys(["reference", *(name for name in columns if name not in GIVEN[:4])])]
    inputs = {name: [] for name in (*GIVEN[:4], *names)}
    for group in groups:
        record = group["record"]
        own = {"reference": record["reference"], **json.loads(record["columns"])}
        plain = record["prompt"]
        own_texts = plain is not None if texts is None else texts
        if "assistant" in names:
            own["assistant"] = _assistant(own, as_text=own_texts, convert=texts is not None)
        turns = [{"role": turn["role"], "content": [
            {"type": "text", "text": part["text"]} if part["type"] == "text" else
            {"type": "image", "image": part["files"][0]} if part["type"] == "image" else
            {"type": "video", "video": part["files"][0] if part["type"] == "video" else part["files"]}
            for part in turn["content"]]} for turn in record["messages"]]  # fmt: skip
        for message, turn in zip(turns, record["messages"]):
            message |= {"reasoning_content": turn["reasoning"]} if turn.get("reasoning") else {}
            message |= {"tool_calls": json.loads(turn["tool_calls"])} if turn.get("tool_calls") else {}
        for text, ids in zip(group["texts"], group["ids"]):
            inputs["prompts"].append(turns if plain is None else plain)
            inputs["completions"].append(text if own_texts else [{"role": "assistant", "content": text}])
            inputs["completion_ids"].append(ids)
            inputs["generation_prefix"].append(group.get("generation_prefix", ""))
            for key in names:
                inputs[key].append(own.get(key))
    return inputs


def _assistant(own, as_text, convert):
    """The column `assistant`: the record's own or its first answer, as it is unless `convert`, else the reference."""
    value = own.get("assistant")
    is_message = isinstance(value, dict) and "content" in value
    answer = value["content"] if is_message else value
    if mv.absent(answer) or (isinstance(answer, str) and not answer.strip()):
        answer, convert = own["reference"], True
    elif not convert or is_message != as_text:
        return value
    return answer if as_text or answer is None else {"role": "assistant", "content": answer}


def _given_form(reward, group, failure):
    """For errors that come of the other form of completions: what was given, and how to get the other."""
    if not isinstance(failure, (TypeError, AttributeError, KeyError, IndexError)):
        return ""
    texts = group["record"]["prompt"] is not None if reward.texts is None else reward.texts
    given = "texts" if texts else "lists of messages [{'role': 'assistant', 'content': text}]"
    other = "lists of messages" if texts else "texts"
    return (f". Its completions{', and `assistant`,' if texts else ''} are {given}: to get {other}, write "
            f"`completions: {AS_MESSAGES if texts else AS_TEXTS}` in its signature")  # fmt: skip


def score(functions: dict, groups: list[dict], columns: list[str]) -> torch.Tensor:
    """Rewards of every completion by every function: float64 [P, G, F] for P groups, NaN where it is not applicable.

    Raises:
        InputError: names the function and the record if it raised, or did not give one finite number or None for each.
    """
    shape = (len(groups), len(groups[0]["ids"]) if groups else 0)
    rewards = torch.full((*shape, len(functions)), math.nan, dtype=torch.float64)
    for f, (name, reward) in enumerate(functions.items() if groups else ()):
        try:
            values = reward.function(**reward_inputs(groups, columns, reward.texts))
        except Exception as error:
            culprits, failure = groups, error
            for group in groups:  # which one? the first that fails alone
                try:
                    reward.function(**reward_inputs([group], columns, reward.texts))
                except Exception as again:
                    culprits, failure = [group], again
                    break
            ids = " or ".join(mv.record_name(group["record"]["id"]) for group in culprits)
            raise mv.InputError(f"reward function {name} failed on {ids}: {_told(failure)}"
                                f"{_given_form(reward, culprits[0], failure)}") from error  # fmt: skip
        values = values.tolist() if isinstance(values, (torch.Tensor, np.ndarray)) else values
        ids = ", ".join(group["record"]["id"] for group in groups[:8])
        if not isinstance(values, (list, tuple)) or len(values) != rewards[..., f].numel():
            got = f"{len(values)} rewards" if isinstance(values, (list, tuple)) else repr(values)[:80]
            raise mv.InputError(f"reward function {name} gave {got} for {rewards[..., f].numel()} completions of "
                                f"{mv.record_name(ids)}: expected a list, one number or None for each")  # fmt: skip
        for i, value in enumerate(values):
            group, g = groups[i // shape[1]], i % shape[1]
            if value is not None and not (isinstance(value, (int, float, np.number, torch.Tensor))
                                          and math.isfinite(value)):  # fmt: skip
                raise mv.InputError(
                    f"reward function {name} gave {value!r} for {mv.record_name(group['record']['id'])}, its "
                    f"completion {group['texts'][g]!r:.200}: expected a finite number or None"
                )
            rewards[i // shape[1], g, f] = math.nan if value is None else float(value)
    return rewards


# --------------------------------------------------------------------------------------------------------- rollouts


END_CHECK_TOKENS = {"cpu": 1, "cuda": 8}  # decoded between two looks at which completions have ended


def sample_tokens(scores: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
    """Tokens by inverse transform sampling: scores [R, V] (fp32 logits), draws [R] (uniform in [0, 1), fp64) → [R].

    Of scores that are not finite (the step on them is a bad one) it is the last token.
    """
    cumulative = scores.softmax(-1).cumsum(-1, dtype=torch.float64)
    tokens = torch.searchsorted(cumulative, draws[:, None] * cumulative[:, -1:], right=True)[:, 0]
    return tokens.clamp(max=scores.shape[1] - 1)


def cache_bytes(config) -> tuple[int, int]:
    """fp32 bytes that decoding keeps: of each token, keys and values; of each completion, recurrent states."""
    recurrent = mv.recurrent_layers(config)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    token = 4 * 2 * (config.num_hidden_layers - recurrent) * config.num_key_value_heads * head_dim
    if not recurrent:
        return token, 0
    keys = config.linear_num_key_heads * config.linear_key_head_dim
    values = config.linear_num_value_heads * config.linear_value_head_dim
    convolution = (2 * keys + values) * config.linear_conv_kernel_dim
    return token, 4 * recurrent * (convolution + values * config.linear_key_head_dim)


@torch.no_grad()
def generate(engine, prompts: list[dict], encoder, args, draws: list[np.ndarray] | None = None, caught=()):
    """Complete encoded prompts: `(ids, logps)`, for each prompt a list of G lists up to and with the end token.

    Greedy with G = 1, or sampled with `draws`, uniform numbers [G, max_completion_length] for each prompt: what is
    sampled depends on nothing else, such as which prompts are decoded together or on which process. `logps` are those
    of the sampled tokens at --temperature under the model alone, as the objective has them, before top_k and the like.
    All prompts are decoded together, as many at once as --rollout_cache_gb holds; it breaks off, and the completions
    with it, once a signal is in `caught`. Call it under `engine.gathered()`: the processes need not be in step.
    """
    model, G = engine.raw_model, len(draws[0]) if draws else 1
    config = engine.raw_model.config.get_text_config()
    token_bytes, state_bytes = cache_bytes(config)
    completion_bytes = args.max_completion_length * token_bytes + state_bytes + 32 * config.vocab_size
    results, chunks = [None] * len(prompts), []
    for i in sorted(range(len(prompts)), key=lambda i: -len(prompts[i]["input_ids"])):  # like lengths go together
        room = chunks and len(prompts[chunks[-1][0]]["input_ids"]) * token_bytes + G * completion_bytes
        if not chunks or (len(chunks[-1]) + 1) * room > args.rollout_cache_gb * 2**30:
            chunks.append([])
        chunks[-1].append(i)
    was_training = model.training
    model.eval()  # no dropout
    # One context: weights are cast once. Compiled blocks run eagerly: each token's cache has another length.
    with engine.autocast(), torch.compiler.set_stance("force_eager"):
        for chunk in chunks:
            noise = None if draws is None else torch.from_numpy(np.stack([draws[i] for i in chunk]))  # [P, G, L]
            out = _decode(model, [prompts[i] for i in chunk], encoder, args, noise, engine.accelerator.device, caught)
            for i, result in zip(chunk, out):
                results[i] = result
    model.train(was_training)
    return [ids for ids, _ in results], [logps for _, logps in results]


def _decode(model, prompts, encoder, args, draws, device, caught):
    """One chunk of generate: P prompts with G completions each, in step until all have ended."""
    from transformers import (
        LogitsProcessorList,
        MinPLogitsWarper,
        RepetitionPenaltyLogitsProcessor,
        TopPLogitsWarper,
    )

    P, G = len(prompts), 1 if draws is None else draws.shape[1]
    lengths = torch.tensor([len(prompt["input_ids"]) for prompt in prompts])
    longest, logits, columns = int(lengths.max()), [], []
    for start in range(0, P, args.per_device_train_batch_size):  # prefill in rows, as in training
        samples = prompts[start : start + args.per_device_train_batch_size]
        inputs, _, _ = mv.pack(samples, encoder, device)
        parts = lengths[start : start + len(samples)]
        ends = parts.cumsum(0)
        output = model(**inputs | {"use_cache": True, "logits_to_keep": (ends - 1).to(device)})
        logits.append(output.logits[0])  # [rows, V]
        for k, (begin, end) in enumerate(zip((ends - parts).tolist(), ends.tolist())):
            columns.append(prompt_states(output.past_key_values, k, begin, end, longest))
    # The G completions of a prompt are decoded as G queries of one row, which hold the prompt's keys and values once:
    # [P, heads, longest + t·G, D], prompts padded on the left, and behind them the G tokens of each step.
    cache = decoding_cache(model.config.get_text_config(), columns, G)
    del columns, output
    logits = torch.cat(logits)[:, None].expand(-1, G, -1)  # [P, G, V]
    sees = (torch.arange(longest) >= longest - lengths[:, None])[:, None, None].expand(-1, 1, G, -1).to(device)
    own = torch.eye(G, dtype=torch.bool, device=device)
    position = torch.tensor([int(prompt["position_ids"][1:].max()) + 1 for prompt in prompts], device=device)
    seen = torch.stack([torch.nn.functional.pad(ids, (longest - len(ids), 0), value=int(ids[-1])) for ids in
                        (torch.from_numpy(prompt["input_ids"]) for prompt in prompts)]).to(device)  # fmt: skip
    seen = seen[:, None].expand(-1, G, -1)  # [P, G, longest + t]: for the repetition penalty
    draws = None if draws is None else draws.to(device)

    penalty = RepetitionPenaltyLogitsProcessor(args.repetition_penalty) if args.repetition_penalty != 1 else None
    warpers = LogitsProcessorList([TopPLogitsWarper(args.top_p)] if args.top_p < 1 else [])
    warpers += [MinPLogitsWarper(args.min_p)] if args.min_p else []
    stops = torch.tensor(end_tokens(model, encoder), device=device)
    vision_ids = torch.tensor(encoder.vision_ids, device=device)  # a list would be copied for each token

    tokens = torch.full((P, G, args.max_completion_length), -1, device=device)
    logps = torch.zeros(P, G, args.max_completion_length, device=device)
    rows, ended = torch.arange(P, device=device), torch.zeros(P, G, dtype=torch.bool, device=device)
    for t in range(args.max_completion_length):
        raw = logits.flatten(0, 1).float()  # [rows·G, V]
        scaled = raw / args.temperature
        normalizer = scaled.logsumexp(-1)
        scores = penalty(seen.flatten(0, 1), raw) if penalty else raw
        if draws is not None:
            scores = scores / args.temperature if penalty else scaled
        scores[:, vision_ids] = scores[:, len(encoder.tokenizer) :] = -math.inf  # and ids of no token
        if draws is None:
            token = scores.argmax(-1)
        else:
            if args.top_k:
                scores, candidates = scores.topk(min(args.top_k, scores.shape[1]))
            token = sample_tokens(warpers(None, scores), draws[rows, :, t].flatten())
            token = candidates.gather(1, token[:, None])[:, 0] if args.top_k else token
        logp = scaled.gather(1, token[:, None])[:, 0] - normalizer
        token, running = token.view(-1, G), ~ended[rows]
        tokens[rows, :, t] = torch.where(running, token, -1)
        logps[rows, :, t] = logp.view(-1, G)
        ended[rows] |= torch.isin(token, stops)
        if t + 1 == args.max_completion_length or caught:
            break
        going = None  # which prompts have completions that go on; to ask, the host waits for the device
        if (t + 1) % END_CHECK_TOKENS[torch.device(device).type] == 0:
            going = ~ended[rows].all(1)
            if not going.any():
                break
        seen = torch.cat([seen, token[..., None]], -1)
        sees = torch.cat([sees, own.expand(len(rows), 1, G, G)], -1)
        if going is not None and not going.all():  # prompts whose completions have all ended leave
            rows, token, seen, sees = rows[going], token[going], seen[going], sees[going]
            cache.reorder_cache(going.nonzero()[:, 0])
        logits = model(
            input_ids=token, position_ids=(position[rows] + t).expand(3, G, -1).transpose(1, 2), attention_mask=sees,
            past_key_values=cache, use_cache=True,
        ).logits  # fmt: skip
    counts = (tokens >= 0).sum(-1).tolist()
    tokens, logps = tokens.tolist(), logps.tolist()
    return [([tokens[p][g][:n] for g, n in enumerate(counts[p])], [logps[p][g][:n] for g, n in enumerate(counts[p])])
            for p in range(P)]  # fmt: skip


def prompt_states(cache, k: int, begin: int, end: int, longest: int) -> list:
    """What each layer keeps of prompt `k` of a packed row, its tokens `begin` to `end`: two tensors.

    Keys and values, padded on the left to [1, heads, longest, D], or what convolution and recurrence go on from.
    """
    states = []
    for layer in cache.layers:
        if hasattr(layer, "recurrent_states"):
            states.append([x[k : k + 1] for x in (layer.conv_states[0], layer.recurrent_states[0])])
        else:
            pad = (0, 0, longest - (end - begin), 0)
            states.append([torch.nn.functional.pad(x[:, :, begin:end], pad) for x in (layer.keys, layer.values)])
    return states


def decoding_cache(config, prompts: list, G: int):
    """The cache to decode G completions of each prompt with: keys and values once, recurrent states [P, G, …]."""
    from transformers import DynamicCache

    cache = DynamicCache(config=config)
    for i, layer in enumerate(cache.layers):
        first, second = (torch.cat([prompt[i][k] for prompt in prompts]) for k in (0, 1))
        if hasattr(layer, "recurrent_states"):
            mv.set_recurrent_states(layer, *(x[:, None].repeat(1, G, *[1] * (x.ndim - 1)) for x in (first, second)))
        else:
            layer.update(first, second)
    return cache


def end_tokens(model, encoder) -> list[int]:
    """Tokens that end a completion: the end of a turn and what the model's own generation config names."""
    named = model.generation_config.eos_token_id
    return sorted({encoder.end_of_turn, *(named if isinstance(named, list) else [named])} - {None})


# -------------------------------------------------------------------------------------------------------- objective


def group_advantages(rewards: torch.Tensor, scale: str, batch_std: float = math.nan) -> torch.Tensor:
    """How much better than its group each completion is: rewards [P, G] (NaN: no reward applies) → [P, G].

    Divided by the standard deviation (+ 1e-4) of its group or of the whole step (`batch_std`), or not at all. 0 where
    no reward applies. Source: eq. 3 of DeepSeekMath (arXiv 2402.03300), as TRL computes it; "none" is Dr. GRPO's.
    """
    advantages = rewards - rewards.nanmean(1, keepdim=True)
    if scale != "none":
        std = group_std(rewards)[:, None] if scale == "group" else batch_std
        advantages = advantages / (std + 1e-4)
    return advantages.nan_to_num(0.0)


def group_std(rewards: torch.Tensor) -> torch.Tensor:
    """Standard deviation (n − 1) of each group, without its NaNs: [P, G] → [P]; NaN for fewer than two values."""
    count = (~rewards.isnan()).sum(1)
    squares = (rewards - rewards.nanmean(1, keepdim=True)).square().nansum(1)
    return (squares / (count - 1)).where(count > 1, math.nan).sqrt()


def token_weights(lengths: torch.Tensor, learned: torch.Tensor, totals: dict, args) -> torch.Tensor:
    """What a token of each completion weighs in the loss: lengths [C] in tokens, learned [C] (is it not masked) → [C].

    `totals` are those of the whole window on all processes: `completions`, and `supervised_tokens`, of the learned.
    Sources: DeepSeekMath (grpo), DAPO (arXiv 2503.14476), Dr. GRPO (arXiv 2503.20783); bnpo is TRL's per batch, which
    here is the window, so it equals dapo.
    """
    if args.loss_type == "grpo":
        return learned / (lengths * max(totals["completions"], 1))
    if args.loss_type == "dr_grpo":
        return learned / (max(totals["completions"], 1) * args.max_completion_length)
    return learned / max(totals["supervised_tokens"], 1)


def grpo_loss(logps, old_logps, ref_logps, advantages, sequences, weights, args):
    """The clipped objective: `(loss, KL [S] or None, clipped [S])`, the loss summed with the weights of its tokens.

    logps, old_logps, ref_logps [S] of the completions' tokens (ref_logps None: no KL); sequences [S], which completion
    a token is of; advantages, weights [C] of the completions. Source: eq. 4 of DeepSeekMath and its KL estimate,
    weighted by the ratio as in TRL (unbiased: arXiv 2512.02556); sequence level: GSPO (arXiv 2507.18071).
    """
    log_ratio = logps - old_logps
    if args.importance_sampling_level == "sequence":
        sums = torch.zeros_like(weights).index_add(0, sequences, log_ratio)
        log_ratio = (sums / sequences.bincount(minlength=len(weights)).clamp(min=1))[sequences]
    ratio, advantage = log_ratio.exp(), advantages[sequences]
    low, high = 1 - args.epsilon, 1 + args.epsilon_high
    losses = -torch.min(ratio * advantage, ratio.clamp(low, high) * advantage)
    clipped = ((ratio < low) & (advantage < 0)) | ((ratio > high) & (advantage > 0))
    kl = None
    if ref_logps is not None:
        difference = ref_logps - logps
        kl = (difference.exp() - difference - 1) * ratio
        losses = losses + args.beta * kl
    return (losses * weights[sequences]).sum(), kl, clipped


# --------------------------------------------------------------------------------------------------------- training


def make_groups(engine, samples, indices, records, encoder, args, step, caught) -> list[dict]:
    """Complete encoded prompts, under engine.gathered(): one group each, none at all once a signal is caught.

    In optimizer step `step` G completions are sampled, with random numbers that depend on nothing but the seed, the
    step and the record; in an evaluation (None) one is made greedily. Samples that were skipped have no group.
    A group has `record`, `sample`, `ids` and `logps` (see generate), `texts` and `generation_prefix`, which the chat
    template writes before them.
    """
    kept = [(sample, i) for sample, i in zip(samples, indices) if "input_ids" in sample]
    shape, draws = (args.num_generations, args.max_completion_length), None
    if step is not None:
        draws = [np.random.default_rng([args.seed, step, i]).random(shape) for _, i in kept]
    ids, logps = generate(engine, [sample for sample, _ in kept], encoder, args, draws, caught)
    decode = partial(encoder.tokenizer.decode, skip_special_tokens=True)
    groups = [{"record": records[i], "sample": sample, "ids": ids[p], "logps": logps[p],
               "generation_prefix": encoder.generation_prefix(records[i].get("chat_template_kwargs")),
               "texts": list(map(decode, ids[p]))} for p, (sample, i) in enumerate(kept)]  # fmt: skip
    return [] if caught else groups


def reward_groups(functions: dict, groups: list[dict], columns: list[str], args):
    """Give every group its `rewards` (float64 [G, F]) and their weighted sum `reward` ([G]; NaN: none applies)."""
    weights = torch.tensor(args.reward_weights, dtype=torch.float64)
    for group, rewards in zip(groups, score(functions, groups, columns)):
        total = (rewards * weights).nansum(-1)
        group |= {"rewards": rewards, "reward": total.where(~rewards.isnan().all(-1), math.nan)}


def group_sums(groups: list[dict], stops: list[int], args) -> torch.Tensor:
    """What the statistics of groups are made of, float64 [9 + 2·F], to be summed over processes (see statistics)."""
    nothing = torch.zeros(0, dtype=torch.float64)
    rewards = torch.cat([nothing, *(group["reward"] for group in groups)])
    scored = rewards[~rewards.isnan()]
    stds = torch.cat([nothing, *(group_std(group["reward"][None]) for group in groups)]).nan_to_num(0.0)
    each = torch.cat([nothing.view(0, len(args.reward_weights)), *(group["rewards"] for group in groups)])
    ids = [tokens for group in groups for tokens in group["ids"]]
    cut = sum(tokens[-1] not in stops for tokens in ids)
    own = [len(groups), stds.sum(), (stds < 1e-8).sum(), len(ids), sum(map(len, ids)), cut, len(scored),
           scored.sum(), scored.square().sum()]  # fmt: skip
    return torch.tensor([*map(float, own), *each.nansum(0).tolist(), *(~each.isnan()).sum(0).tolist()],
                        dtype=torch.float64)  # fmt: skip


def statistics(sums: torch.Tensor, names: list[str]) -> tuple[dict, float]:
    """The metrics of a step's completions from group_sums of all processes, and the deviation of all their rewards."""
    groups, stds, zero, completions, tokens, cut, scored, total, squares, *each = sums.tolist()
    told = {
        "reward": total / scored if scored else math.nan,
        "reward_std": stds / (groups or math.nan),
        "frac_reward_zero_std": zero / (groups or math.nan),
        "completions/mean_length": tokens / (completions or math.nan),
        "completions/clipped_ratio": cut / (completions or math.nan),
        "completions/unscored": int(completions - scored),
    }
    for name, value, count in zip(names, each[: len(names)], each[len(names) :]):
        told[f"rewards/{name}"] = value / count if count else math.nan
    variance = (squares - total**2 / max(scored, 1)) / (scored - 1) if scored > 1 else math.nan
    return told, math.sqrt(max(variance, 0.0)) if variance == variance else math.nan


def groups_with_gradient(groups, stops: list[int], args) -> list[dict]:
    """Those of some groups that are learned: without --beta, not those whose advantages are all 0."""
    groups = [group for group in groups if any(is_learned(tokens, stops, args) for tokens in group["ids"])]
    return [group for group in groups if args.beta or group["advantages"].any()]


def pack_groups(groups: list[dict], encoder, stops: list[int], args, device) -> dict:
    """The groups of a row (or none) as [prompt, c1 … cG] each, and what its loss needs of every completion ([C])."""
    samples = [mv.add_suffixes(group["sample"], [(ids, ids) for ids in group["ids"]]) for group in groups]
    inputs, targets, sequences = mv.pack(samples, encoder, device)
    ids = [tokens for group in groups for tokens in group["ids"]]
    advantages = torch.cat([torch.zeros(0), *(group["advantages"].float() for group in groups)])
    return {
        "inputs": inputs, "targets": targets, "sequences": sequences, "advantages": advantages.to(device),
        "lengths": torch.tensor([len(tokens) for tokens in ids], device=device),
        "learned": torch.tensor([is_learned(tokens, stops, args) for tokens in ids], dtype=torch.bool, device=device),
        "rollout_logps": torch.tensor([x for group in groups for own in group["logps"] for x in own], device=device),
    }  # fmt: skip


def is_learned(tokens: list[int], stops: list[int], args) -> bool:
    """Whether a completion counts in the loss."""
    return not args.mask_truncated_completions or tokens[-1] in stops


def frozen_copy_of(args) -> str | None:
    """The model that a run loads a frozen copy of, beside the trained one, as its reference; None: no copy."""
    return None if not args.beta or mv.adapter_off_is_start(args) else args.model_id


def load_reference(args, device):
    """The model at the start, in the types of the trained one: the same numbers."""
    own = replace(args, gradient_checkpointing=False)
    if not own.lora_weight_path:  # an adapter that decides the types, and is taken off again
        own = replace(own, lora_namespan_exclude="['lm_head', 'embed_tokens']", num_lora_modules=1, use_dora=False)
    with torch.random.fork_rng([device] if torch.device(device).type == "cuda" else []):  # adapters begin at random
        model = mv.load_model(own, device)
    return model.unload() if args.lora_enable and not own.lora_weight_path else model


@torch.no_grad()
def reference_logps(reference, inputs: dict, targets: torch.Tensor, args) -> torch.Tensor:
    """Log-probabilities [S] of a packed row under a frozen engine, or the trained one's, its adapter put aside."""
    model, training = reference.raw_model, reference.raw_model.training
    model.eval()  # no dropout, no checkpointing
    with contextlib.nullcontext() if reference.frozen else model.disable_adapter(), reference.autocast():
        logps = mv.token_logps(reference.model(**inputs).logits, targets, args.temperature)
    model.train(training)
    return logps


def check_references(flag: str, records, names: list[str]):
    """Make sure that built-in rewards have references to compare with.

    Raises:
        InputError: names the first record without one.
    """
    needing = [name for name in names if name in BUILT_IN and name != "format"]
    missing = records.data.column("reference").null_count if records is not None else 0
    if needing and missing:
        first = next(row["id"] for row in records if row["reference"] is None)
        raise mv.InputError(f"{flag}: {missing} records have no reference answer, first {first}, but --reward_funcs "
                            f"{needing[0]} needs one: add an assistant ('gpt') turn, or one of the "
                            f"columns {', '.join(REFERENCES)}")  # fmt: skip


def describe_rewards(args, functions: dict, samples_per_step: int, records):
    """Print what follows mv.describe_run: completions per step, and what they are rewarded for."""
    turns = records.data.column("prompt").null_count  # records whose prompt is a list of turns
    by_record = "texts" if not turns else "messages" if turns == len(records) else "texts or messages, as the prompt"
    forms = {True: " (given texts)", False: " (given messages)", None: f" (given {by_record})"}
    rewards = ", ".join(
        f"{weight:g} × {name}{'' if name in BUILT_IN else forms[reward.texts]}"
        for (name, reward), weight in zip(functions.items(), args.reward_weights)
    )
    if "accuracy" in args.reward_funcs:
        rewards += f" (math_verify: {'yes' if importlib.util.find_spec('math_verify') else 'not installed'})"
    each = (
        f"{args.num_generations} of at most {args.max_completion_length} tokens for each of {samples_per_step} prompts"
    )
    iterations = f", {args.num_iterations} steps on them" if args.num_iterations > 1 else ""
    mv.say(f"  rollouts   {each} per batch{iterations}\n  rewards    {rewards}")
    if left_out := sum(records["left_out"]):
        mv.say(f"  note       {left_out} turns after the first answers of the records are not read")


def shown_group(group: dict, names: list[str], step: int) -> dict:
    """A line of completions.jsonl: the prompt with its videos as tags, the reference, and every completion."""
    prompt = "".join(part["text"] if part["type"] == "text" else f"<{'image' if part['type'] == 'image' else 'video'}>"
                     for turn in group["record"]["messages"] for part in turn["content"])  # fmt: skip
    prompt = re.sub(r"(<(?:video|image)>)\1{2,}", lambda run: f"{run[1]}×{len(run[0]) // len(run[1])} ", prompt)
    completions = []
    for g, text in enumerate(group["texts"]):
        rewards = {name: _number(value) for name, value in zip(names, group["rewards"][g].tolist())}
        numbers = {
            "reward": _number(group["reward"][g].item()),
            **rewards,
            "advantage": _number(group["advantages"][g].item()),
        }
        completions.append({"text": text, **numbers, "tokens": len(group["ids"][g])})
    told = {"step": step, "id": group["record"]["id"], "prompt": prompt, "reference": group["record"]["reference"]}
    return told | {"completions": completions}


def _number(value):
    return round(value, 6) if math.isfinite(value) else None


@torch.no_grad()
def evaluate(engine, stream, records, encoder, functions, columns, args, caught) -> dict | None:
    """Greedy answers to all of `records`: the means of `eval_reward`, every reward, and `eval_accuracy`.

    None if a process was asked to stop meanwhile.
    """
    model, accelerator = engine.model, engine.accelerator
    model.eval()
    own = mv.micro_batches(list(range(len(records))), args.per_device_eval_batch_size,
                           accelerator.process_index, accelerator.num_processes)  # fmt: skip
    stops = end_tokens(engine.raw_model, encoder)
    sums, right = torch.zeros(9 + 2 * len(functions), dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    bar = tqdm(total=len(own), desc="eval", leave=False, disable=not accelerator.is_main_process)
    with engine.gathered():
        for indices, samples in zip(own, stream.batches(records, own, args.eval_image_folder)):
            if mv.stop_asked(accelerator, caught):
                return None
            groups = make_groups(engine, samples, indices, records, encoder, args, None, caught)
            reward_groups(functions, groups, columns, args)
            sums += group_sums(groups, stops, args)
            for group in groups:
                (value,) = accuracy_reward(group["texts"], [group["record"]["reference"]])
                finite = all(map(math.isfinite, group["logps"][0]))
                right += torch.tensor([value or 0.0, value is not None, not finite], dtype=torch.float64)
            bar.update()
    bar.close()
    model.train()
    sums = accelerator.reduce(torch.cat([sums, right]).to(accelerator.device)).cpu()
    if mv.stop_asked(accelerator, caught):  # the last answers were broken off
        return None
    if not sums[0]:
        return {"eval_samples": 0}
    told, _ = statistics(sums[:-3], list(functions))
    broken = bool(sums[-1])  # answers of a model whose log-probabilities are not finite mean nothing
    if math.isnan(told["reward"]) and not broken:
        mv.stop_all(
            accelerator, f"--eval_path {args.eval_path}: no reward function is applicable to any of its records"
        )
    told = {key: value for key, value in told.items() if key not in ("reward_std", "frac_reward_zero_std")}
    if sums[-2]:
        told["accuracy"] = (sums[-3] / sums[-2]).item()
    told = {f"eval_{key}": math.nan if broken else value for key, value in told.items()
            if broken or math.isfinite(value)}  # fmt: skip
    return told | {"eval_samples": int(sums[0])}


def main():
    args = mv.parse_arguments(GRPOArguments)
    trackers = [name for name in args.report_to if name != "none"]
    accelerator = mv.make_accelerator(args)
    set_seed(args.seed)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = args.tf32
    output_dir, is_main = mv.make_output_dir(accelerator, args), accelerator.is_main_process
    metrics_path = output_dir / "metrics.jsonl"

    # ---- data: everything that can be wrong with it is said before any weight is loaded
    args.image_folder = args.image_folder or mv.data_folder(args.data_path)
    args.eval_image_folder = args.eval_image_folder or args.image_folder
    encoder = mv.Encoder(args.model_id, args)
    with accelerator.main_process_first():
        records = mv.load_records(args.data_path, normalize_record, FEATURES, encoder=encoder)
        eval_records = None
        if args.eval_path:
            eval_records = mv.load_records(args.eval_path, normalize_record, FEATURES, encoder=encoder)
    functions = check_sets(args, records, eval_records, encoder)
    columns, eval_columns = column_names(records), column_names(eval_records) if eval_records else None
    mv.check_files(accelerator, "data_path", records, args.image_folder, encoder)
    mv.check_files(accelerator, "eval_path", eval_records, args.eval_image_folder, encoder)
    stream = mv.SampleStream(encoder, args)
    batch_size, world_size = args.per_device_train_batch_size, accelerator.num_processes
    samples_per_step = batch_size * args.gradient_accumulation_steps * world_size
    total_steps = mv.count_steps(len(records), samples_per_step, args)
    if args.max_steps < 0:
        total_steps *= args.num_iterations

    # ---- reference for the KL divergence: the trained model without its adapter, or a frozen copy
    reference = None
    if frozen_copy_of(args):
        reference = mv.Engine(accelerator, load_reference(args, accelerator.device), args, frozen=True)

    # ---- model and optimizer
    resumed = mv.find_checkpoint(args)
    engine = mv.Engine(accelerator, mv.load_model(args, accelerator.device, resumed), args)
    model, raw_model = engine.model, engine.raw_model
    if args.beta and reference is None:
        reference = engine

    # ---- resume: `state` is everything that is not a tensor
    state = {
        "step": 0, "samples_seen": 0, "bad_steps": 0, "bad_videos": 0, "all_videos": 0, "eval_due": False,
        "save_due": False, "best": None, "best_checkpoint": None, "evals_without_gain": 0,
        "run": mv.run_identity(args, encoder, records, samples_per_step),
    }  # fmt: skip
    state["run"] |= {"generations": args.num_generations, "iterations": args.num_iterations}
    state["run"]["reference"] = args.lora_weight_path or args.model_id if args.beta else None
    if resumed:
        state = mv.restore_checkpoint(resumed, engine, state)
    if is_main:
        for name in ("metrics.jsonl", "bad_steps.jsonl", "completions.jsonl"):
            mv.cut_jsonl(output_dir / name, state)
        mv.write_json(output_dir / "arguments.json", {**asdict(args), **mv.conventions(encoder)})
    if trackers:
        config = {key: value for key, value in asdict(args).items() if isinstance(value, (int, float, str))}
        names = {"wandb": {"name": args.run_name}} if args.run_name else {}
        accelerator.init_trackers(output_dir.name, config, names)
    if is_main:
        mv.describe_run(args, raw_model, stream, records, total_steps, world_size)
        describe_rewards(args, functions, samples_per_step, records)

    # ---- the loop: evaluation and saving come first, so that a run stopped in one begins with it again
    windows = mv.step_windows(len(records), samples_per_step, args.seed, state["samples_seen"])
    windows = itertools.islice(windows, max(0, math.ceil((total_steps - state["step"]) / args.num_iterations)))
    rank = accelerator.process_index
    steps = stream.steps(records, windows, batch_size, rank, world_size, args.image_folder)
    bar = tqdm(total=total_steps, initial=state["step"], desc="train", disable=not is_main)
    model.train()
    stops, iteration = end_tokens(raw_model, encoder), -1
    caught, saved_step, stop = mv.catch_signals(), None, False
    while True:
        epoch = state["samples_seen"] / len(records)
        if state["eval_due"]:
            result = evaluate(engine, stream, eval_records, encoder, functions, eval_columns, args, caught)
            if stop := result is None:
                break
            if not result["eval_samples"]:
                mv.save_checkpoint(args.output_dir, engine, encoder.processor, state)
                mv.stop_unevaluated(accelerator, args, eval_records)
            result = mv.finite_result(result)
            improved = mv.judge(state, result, args)
            state["eval_due"] = False
            state["save_due"] = state["save_due"] or (improved and args.load_best_model_at_end)
            if improved and state["save_due"]:
                state["best_checkpoint"] = f"checkpoint-{state['step']}"
            if is_main:
                mv.append_jsonl(metrics_path, {"step": state["step"], "epoch": round(epoch, 6), **result})
                bar.write(f"step {state['step']}: {mv.result_text(result)}")
            if trackers:
                accelerator.log(mv.numbers(result), state["step"])
        if state["save_due"]:
            state["save_due"], saved_step = False, state["step"]
            mv.save_checkpoint(args.output_dir, engine, encoder.processor, state)
        early = 0 < args.early_stopping_patience <= state["evals_without_gain"]
        if early or state["step"] >= total_steps:
            break

        # ---- data, rollouts, and the exchange that keeps the processes together
        started = time.perf_counter()
        iteration = (iteration + 1) % args.num_iterations
        if iteration == 0:
            window, samples_seen, rows = next(steps)
            data_wait = time.perf_counter() - started
            encoded = [sample for samples in rows for sample in samples]
            indices = itertools.chain(*mv.micro_batches(window, batch_size, rank, world_size))
            with engine.gathered():
                groups = make_groups(engine, encoded, indices, records, encoder, args, state["step"], caught)
            rollout_seconds = time.perf_counter() - started - data_wait
            reward_groups(functions, groups, columns, args)
            told, std = statistics(accelerator.reduce(group_sums(groups, stops, args).to(accelerator.device)).cpu(),
                                   list(functions))  # fmt: skip
            for group in groups:
                group["advantages"] = group_advantages(group["reward"][None], args.scale_rewards, std)[0]
            reward_seconds = time.perf_counter() - started - data_wait - rollout_seconds
            left = iter(groups)  # in the order of their rows
            per_row = [sum("input_ids" in sample for sample in samples) for samples in rows]
            learned_rows = [groups_with_gradient(itertools.islice(left, count), stops, args) for count in per_row]
            old_logps, ref_logps = [None] * len(rows), [None] * len(rows)
            kept = [sample for sample in encoded if "input_ids" in sample]
            completions = [ids for group in groups for ids in group["ids"]]
            local_counts = {
                "samples": len(groups),
                "skipped_samples": len(encoded) - len(kept),
                "shrunk_samples": sum(sample["shrunk"] for sample in kept),
                "videos": sum(sample["num_videos"] for sample in kept),
                "images": sum(sample["num_images"] for sample in kept),
                "bad_videos": sum(len(sample["bad"]) for sample in encoded),
                "tokens": sum(sample["num_tokens"] for sample in kept) + sum(map(len, completions)),
                "supervised_tokens": sum(len(ids) for ids in completions if is_learned(ids, stops, args)),
                "completions": len(completions),
                "completion_tokens": sum(map(len, completions)),
                "update_tokens": sum(len(group["sample"]["input_ids"]) + sum(map(len, group["ids"]))
                                     for row_groups in learned_rows for group in row_groups),
            }  # fmt: skip
        else:
            data_wait = rollout_seconds = reward_seconds = 0.0
        counts, stop = mv.exchange(accelerator, state, window, local_counts, caught)
        if stop := stop and iteration == 0:  # rollouts are not saved: what began with them is brought to its end
            break
        if iteration == 0:
            mv.check_bad_ratio(accelerator, args, state, counts)

        # ---- forward, backward, step
        factor = mv.lr_factor(state["step"], total_steps, args)
        engine.set_learning_rate(factor)
        learning = counts["supervised_tokens"] > 0  # if not, no process computes or updates anything
        step_loss = torch.full((), 0.0 if learning else math.nan, device=accelerator.device)
        # KL, clipped, |Δ log p|, tokens
        sums = torch.full((4,), 0.0 if learning else math.nan, dtype=torch.float64, device=accelerator.device)
        for k, row_groups in enumerate(learned_rows if learning else []):
            last = k == len(rows) - 1
            batch = pack_groups(row_groups, encoder, stops, args, accelerator.device)
            inputs, targets, sequences = batch["inputs"], batch["targets"], batch["sequences"]
            if reference and iteration == 0:
                ref_logps[k] = reference_logps(reference, inputs, targets, args)
            with engine.row(last):
                with engine.autocast():
                    logits = model(**inputs).logits
                    logps = mv.token_logps(logits, targets, args.temperature)
                    if iteration == 0:
                        old_logps[k] = logps.detach()
                    weights = token_weights(batch["lengths"], batch["learned"], counts, args)
                    loss, kl, clipped = grpo_loss(logps, old_logps[k], ref_logps[k], batch["advantages"],
                                                  sequences, weights, args)  # fmt: skip
                    # Gradients are averaged over processes: times world_size makes it the sum over the window.
                    loss = (loss if len(targets) else logits.sum() * 0.0) * world_size
                step_loss += loss.detach() / world_size
                gap = (old_logps[k] - batch["rollout_logps"]).abs()
                told_of = torch.stack([gap * 0 if kl is None else kl.detach(), clipped, gap, torch.ones_like(gap)])
                sums += told_of.double() @ batch["learned"][sequences].double()
                if last:
                    step_loss = accelerator.reduce(step_loss)
                    loss_finite = bool(torch.isfinite(step_loss))
                    loss = loss if loss_finite else loss * math.nan  # then no process updates anything
                engine.backward(loss)
        grad_norm, overflow = engine.step() if learning else (math.nan, False)
        kl_sum, clipped_sum, gap_sum, learned = accelerator.reduce(sums).tolist()
        bad = learning and (not loss_finite or not (math.isfinite(grad_norm) or overflow))
        state["step"], state["samples_seen"] = state["step"] + 1, samples_seen
        if learning:
            state["bad_steps"] = state["bad_steps"] + 1 if bad else 0

        # ---- log
        seconds = time.perf_counter() - started
        update_seconds = seconds - data_wait - rollout_seconds - reward_seconds
        row = {
            "step": state["step"],
            "epoch": round(samples_seen / len(records), 6),
            "loss": float(step_loss),
            "learning_rate": args.learning_rate * factor,
            "grad_norm": grad_norm,
            **told,
            "kl": kl_sum / max(counts["supervised_tokens"], 1),
            "clip_ratio": clipped_sum / max(counts["supervised_tokens"], 1),
            "sampling_logp_difference": gap_sum / max(learned, 1),
            **counts,
            "records_crc32": zlib.crc32(json.dumps(window).encode()),
            "step_seconds": round(seconds, 4),
            "data_wait_seconds": round(data_wait, 4),
            "rollout_seconds": round(rollout_seconds, 4),
            "reward_seconds": round(reward_seconds, 4),
            "rollout_tokens_per_second": round(counts["completion_tokens"] / (rollout_seconds or math.inf), 1),
            "update_tokens_per_second": round(counts["update_tokens"] / update_seconds, 1),
            **mv.peak_memory(),
        }
        if bad or overflow:
            row["not_finite"] = "loss" if not loss_finite else "gradient"
        row = mv.finite_values(row)
        if is_main:
            mv.append_jsonl(metrics_path, row)
            if groups and iteration == 0 and (state["step"] - 1) % args.logging_steps < args.num_iterations:
                shown = shown_group(groups[0], list(functions), state["step"])
                mv.append_jsonl(output_dir / "completions.jsonl", shown)
            if bad:
                mv.append_jsonl(output_dir / "bad_steps.jsonl", mv.bad_step(row, [records[i] for i in window]))
        if trackers and state["step"] % args.logging_steps == 0:
            accelerator.log(mv.numbers(row), state["step"])
        progress = f"reward {told['reward']:.3f}" if math.isfinite(told["reward"]) else "no reward"
        bar.set_postfix_str(
            f"{progress}, {counts['samples'] / seconds:.1f} samples/s, "
            f"{counts['videos'] / seconds:.0f} videos/s, data wait {data_wait / seconds:.0%}, "
            f"rollout {rollout_seconds / seconds:.0%}"
        )
        bar.update()
        if state["bad_steps"] >= args.max_bad_steps:
            mv.stop_all(accelerator, f"{args.max_bad_steps} steps in a row had a loss or gradient that is not finite; "
                        f"the newest checkpoint has the last good weights. Their records and files are in "
                        f"{output_dir / 'bad_steps.jsonl'}")  # fmt: skip

        # ---- what is due now
        ends_epoch, ends = samples_seen % len(records) == 0, state["step"] >= total_steps
        if iteration < args.num_iterations - 1 and not ends:
            continue  # rollouts are not saved: evaluation and checkpoints wait for the last iteration on them
        passed = args.num_iterations  # steps since the last look: was one of them a round number?
        every = args.eval_steps or args.logging_steps
        due = {"no": False, "steps": state["step"] % every < passed, "epoch": ends_epoch}
        state["eval_due"] = args.eval_strategy != "no" and (due[args.eval_strategy] or ends)
        due = {"no": False, "steps": state["step"] % args.save_steps < passed, "epoch": ends_epoch}
        state["save_due"] = due[args.save_strategy]

    # ---- the end: asked to stop, or done
    bar.close()
    steps.close()
    stream.close()
    if stop:
        if state["step"] != saved_step:
            mv.save_checkpoint(args.output_dir, engine, encoder.processor, state)
        mv.say(f"stopped by a signal after step {state['step']}: go on with --resume_from_checkpoint auto")
        accelerator.end_training()
        raise SystemExit(143)
    if early:
        mv.say(f"stopped early: {state['evals_without_gain']} evaluations without improvement")
    best = state["best_checkpoint"] if args.load_best_model_at_end else None
    mv.publish_model(args.output_dir, engine, encoder.processor, best)
    mv.say(f"saved {best or 'the last step'} to {output_dir}; every step is in {metrics_path}")
    accelerator.end_training()


if __name__ == "__main__":
    mv.run(main)
