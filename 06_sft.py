"""06 · Supervised fine-tuning: from a text model to one that answers, thinks as much as it is told to, and calls tools.

Left out:  several processes, and long-context and safety data; the released template's paragraph on how to call tools (section 2).
Sources:   [Ultra] Nemotron 3 Ultra report, arXiv 2606.15007 · [Super] Nemotron 3 Super report
           [Template] NVIDIA's published nano3.jinja, and the renderers of tinker-cookbook and PrimeIntellect that follow Ultra's chat_template
           [Packing] Fewer Truncations Improve Language Modeling, arXiv 2404.10830 · [Megatron] Megatron-LM, the code that trained it
Run:       python 06_sft.py                       # about 3 minutes on 2 CPU cores, from the newest checkpoint in out/pretrain: train, then score
           python 06_sft.py --resume              # goes on after Ctrl-C
           python 06_sft.py --score-on validation --out out/try --base out/pretrain/step-000850     # while choosing settings
           python 06_sft.py --data tasks my/chats.jsonl --fresh        # your own conversations beside the built-in questions
           python 06_sft.py --base DIR --data hf:ORG/SET@200MB --out out/mine      # a released checkpoint's layout, a hub set with "messages"
Contents:  1 config   2 chat format   3 conversations   4 packing   5 loss   6 schedule and trainer   7 evaluation
           8 tables and figure   9 command
Letters:   b batch  t time  k prediction depth
"""
from __future__ import annotations

import glob
import hashlib
import importlib
import itertools
import json
import math
import random
import re
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from data import corpus, tasks
from data.batches import Batch
from data.tokenizer import SPECIALS, Tokenizer

nvfp4, nemotron, pretrain = (importlib.import_module(name) for name in ("01_nvfp4", "04_model", "05_pretrain"))

# %% 1 · Config  [Ultra, SFT]
# Every setting once, Ultra's value beside ours. A pair is (stage 1, stage 2): the first normalises its loss by tokens, the second by conversations
# and reads longer packs.

Mode = Literal["regular", "medium", "off"]
Style = Literal["ultra", "nano"]
Normalize = Literal["token", "conversation"]
MODES: tuple[Mode, ...] = get_args(Mode)


@dataclass(frozen=True)
class SFTConfig:
    """Fine-tunes a checkpoint on conversations, in two stages, and scores it on held-out questions."""
    base: Path | None = None         # directory with the released names and a tokenizer; nothing = the newest checkpoint in OUT/pretrain
    data: tuple[str, ...] = ("tasks",)      # "tasks" (built in), files of messages (.jsonl), hf:NAME@200MB
    out: Path = Path("out")          # rows and figure; metrics and checkpoints in out/sft
    families: tuple[str, ...] = tasks.EASY      # built-in questions by family; "all" = every one of data/tasks
    tokens: int = 160_000            # to learn in built-in conversations, shared equally between families, whatever the length of their prompts
    levels: int = 1                  # difficulties of the built-in questions, from the easiest
    modes: tuple[float, float, float] = (1.0, 0.2, 0.2)      # share of them worked in mode regular, medium, off, ours: Super 2 % low, 3 % off
    cut: float = 0.12                # share of regular traces that come again, cut at a random budget  [Super: 12 % in its budget tuning]
    steps: tuple[int, int] = (480, 40)            # ours; Ultra 3,200 and 300 (204,800 and 19,200 packs in batches of 64)
    pack: tuple[int, int] = (512, 896)            # tokens a pack, ours; Ultra 294,912 and 515,000
    batch: tuple[int, int] = (2, 1)               # packs a step, ours; Ultra 64
    lr: tuple[float, float] = (4e-3, 5e-4)        # peak, ours: a model this small bears it; Ultra 1.5e-5 and 1e-5
    lr_min: tuple[float, float] = (2.7e-4, 1e-4)      # in Ultra's proportion to the peak: 1e-6 of 1.5e-5, 2e-6 of 1e-5
    warmup: tuple[float, float] = (9600 / 204800, 6400 / 19200)      # share of a stage's steps  [Ultra]
    pool: int = 16                   # packs open at a time, ours: the report says a fixed number
    tolerance: float = 0.02          # a pack with less than this share left is full, ours: the report says nearly full
    mtp_weight: float = 0.1          # of each prediction depth, not shared between them  [Ultra, SFT]; 0 = without
    aux_weight: float = 1e-4         # sequence balance loss, as in pretraining, ours
    weight_decay: float = 0.1        # as in pretraining, ours
    held_out: int = 24               # held-out questions a family that the model is scored on, in each mode
    score_on: Literal["held_out", "validation"] = "held_out"      # "validation" while settings are being chosen, "held_out" once, at the end
    validate_every: int = 60         # steps between looks at the loss on validation conversations; 0: never
    max_tokens: int = 96             # most tokens an answer may have
    device: Literal["cpu", "cuda", "mps"] = "cpu"
    precision: Literal["fp32", "bf16", "nvfp4"] = "fp32"
    micro_batches: int = 1           # pieces a step's packs are computed in; the loss is normalised over all of them
    recompute: bool = False          # drop activations and compute them again: less memory, same numbers
    seed: int = 0
    save_every: int = 100
    resume: bool = False             # go on from the newest whole checkpoint in out/sft
    fresh: bool = False              # delete the checkpoints of an earlier run first

    def __post_init__(self):
        for name in ("tokens", "levels", "pool", "held_out", "max_tokens", "micro_batches"):
            if getattr(self, name) < 1: raise ValueError(f"{name} = {getattr(self, name)} must be at least 1.")
        known = [family.name for family in tasks.FAMILIES]      # a few of them are there with reasoning-gym only, and left out without it
        if unknown := [name for name in self.families if name not in ("all", *known)]:
            raise ValueError(f"unknown family {unknown[0]!r}: choose all, or some of {', '.join(known)}.")
        if self.score_on not in tasks.SPLITS[1:]: raise ValueError(f"score_on = {self.score_on!r}: choose one of {', '.join(tasks.SPLITS[1:])}.")
        if not self.data: raise ValueError('data is empty: give "tasks", files of messages, or hf:NAME.')
        if min(self.pack) < 2 or self.steps[0] < 1 or self.steps[1] < 0 or min(self.batch) < 1:
            raise ValueError(f"steps {self.steps}, pack {self.pack} and batch {self.batch} must be positive; only stage 2 may have 0 steps.")
        if not max(self.modes): raise ValueError("modes is 0 everywhere: at least one mode needs a share.")
        for name in ("modes", "cut", "warmup", "tolerance"):
            shares = np.atleast_1d(getattr(self, name))
            if shares.min() < 0 or shares.max() > 1: raise ValueError(f"{name} = {getattr(self, name)} must be shares between 0 and 1.")

    @property
    def home(self) -> Path: return Path(self.out) / "sft"

    @property
    def by_domain(self) -> dict[str, list[str]]:
        chosen = {domain: [f for f in names if "all" in self.families or f in self.families] for domain, names in tasks.DOMAINS.items()}
        return {domain: names for domain, names in chosen.items() if names}

    def stage(self, step: int) -> int:
        """0 or 1: the stage that the step with this number (from 0) belongs to."""
        return int(step >= self.steps[0])

    def rate(self, step: int) -> float:
        """Learning rate of the step with this number (from 0); each stage has its own warmup and cosine."""
        s = self.stage(step)
        return cosine_lr(step + 1 - s * self.steps[0], self.steps[s], round(self.warmup[s] * self.steps[s]), self.lr[s], self.lr_min[s])

    def training(self) -> pretrain.PretrainConfig:
        """The settings as 05's trainer reads them; the schedule is rate()."""
        both = dict(steps=sum(self.steps), warmup=0.0, decay=0.0, branch_steps=sum(self.steps), branches=(), record=False, health_every=0)
        own = ("out", "aux_weight", "mtp_weight", "weight_decay", "device", "precision", "micro_batches", "recompute", "seed", "save_every")
        return pretrain.PretrainConfig(batch=self.micro_batches, seq=self.pack[0], **both, **{name: getattr(self, name) for name in own})


# What may differ between a run and its continuation.
FREE = {"out", "device", "recompute", "save_every", "held_out", "score_on", "validate_every", "max_tokens", "resume", "fresh"}


# %% 2 · Chat format  [Template]
#     <|im_start|>system\n SYSTEM, TOOLS <|im_end|>\n          always there, empty or not
#     <|im_start|>user\n QUESTION <|im_end|>\n                 medium: QUESTION\n\n{reasoning effort: efficient}, in the last one only
#     <|im_start|>assistant\n<think>\n REASONING </think> ANSWER <|im_end|>\n            without reasoning: <think></think> ANSWER
# A generation begins behind "<think>\n", with thinking off behind "<think></think>"; what comes then, up to <|im_end|>, is what the model must
# write, and nothing else is learnt. Tool responses come back as a user's turn. Behind the user's next message earlier reasoning is dropped: its turn
# reads <think></think>. Style nano (Nano, Super) has newlines around </think>, and "low" for "efficient" (Super).
# NOTE: text is encoded piece by piece, cut at special tokens and where generation begins, so that a prompt's ids begin the whole's ids.
# ours: the released template adds a paragraph behind </tools> (form of a call, an example, a reminder), some 300 tokens of every question, which
# a small model does not read. `tool_note` takes that text.

IM_START, IM_END, THINK, END_THINK = (SPECIALS[name] for name in ("<|im_start|>", "<|im_end|>", "<think>", "</think>"))
CALL, END_CALL, RESPONSE, END_RESPONSE = (SPECIALS[name] for name in ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"))
EFFORT = {"ultra": "\n\n{reasoning effort: efficient}", "nano": "\n\n{reasoning effort: low}"}
Piece = tuple[int | str, bool]      # a special token or text, and whether the model learns to write it


def as_text(value) -> str: return json.dumps(value, ensure_ascii=False) if isinstance(value, (dict, list, tuple)) else str(value)


def _extra_keys(values: dict, known: Iterable[str]) -> str:
    """What a schema says beyond the known keys:  <default>3</default>"""
    return "".join(f"\n<{key}>{as_text(value)}</{key}>" for key, value in values.items() if key not in known)


def tools_text(tools: Iterable[dict]) -> str:
    """Tool definitions as the system block shows them.  [Template]

    A tool is dict(name, description, parameters={name: dict(type, description)}, required) or OpenAI's JSON schema, wrapped in "function" or not.
    """
    text = "# Tools\n\nYou have access to the following functions:\n\n<tools>"
    for tool in tools:
        tool = tool.get("function", tool)
        schema = tool.get("parameters") or {}
        if schema.get("type") != "object": schema = dict(properties=schema)
        required = tool.get("required", schema.get("required"))
        text += f"\n<function>\n<name>{tool['name']}</name>"
        if tool.get("description"): text += f"\n<description>{tool['description'].strip()}</description>"
        text += "\n<parameters>"
        for name, values in schema.get("properties", {}).items():
            text += f"\n<parameter>\n<name>{name}</name>"
            if "type" in values: text += f"\n<type>{values['type']}</type>"
            if "description" in values: text += f"\n<description>{values['description'].strip()}</description>"
            if "enum" in values: text += f"\n<enum>{as_text(values['enum'])}</enum>"
            text += _extra_keys(values, ("name", "type", "description", "enum")) + "\n</parameter>"
        text += _extra_keys(schema, ("type", "properties", "required"))
        if required is not None: text += f"\n<required>{as_text(list(required))}</required>"
        text += "\n</parameters>" + _extra_keys(tool, ("type", "name", "description", "parameters", "required")) + "\n</function>"
    return text + "\n</tools>"


def _call(call: dict) -> list[Piece]:
    """<tool_call>\n<function=f>\n<parameter=p>\nvalue\n</parameter>\n</function>\n</tool_call>\n     (vLLM reads it with its parser qwen3_coder)"""
    arguments = "".join(f"<parameter={name}>\n{as_text(value)}\n</parameter>\n" for name, value in call["arguments"].items())
    return [(CALL, True), (f"\n<function={call['name']}>\n{arguments}</function>\n", True), (END_CALL, True), ("\n", True)]


def _assistant(message: dict, mode: Mode, style: Style, history: bool) -> list[Piece]:
    """One assistant turn. message["cut"]: the reasoning was cut at a budget and somebody else wrote </think>, so it is not learnt  [Ultra]."""
    content, calls, learn_end = message.get("content") or "", message.get("tool_calls") or [], not message.get("cut")
    reasoning = (message.get("reasoning") or "") if mode != "off" else ""
    pieces: list[Piece] = [(IM_START, False), ("assistant\n", False), (THINK, False)]
    thought = bool(reasoning.strip())
    if thought and not history:
        pieces += [("\n", False), (reasoning, True), ("\n" if style == "nano" else "", learn_end), (END_THINK, learn_end)]
    else: pieces.append((END_THINK, False))      # the prompt wrote both
    if style == "nano" and thought and not (history and calls): content = "\n" + content
    # the template trims what is behind a turn; the exceptions are its own
    if not (history and calls): content = content.rstrip()
    elif style == "nano": content = content.strip()
    if calls: content += "\n"
    return [*pieces, (content, True), *(piece for call in calls for piece in _call(call)), (IM_END, True), ("\n", False)]


FOLLOWS = {"user": ("start", "assistant"), "assistant": ("user", "tool"), "tool": ("assistant", "tool")}      # role: what may come before


def check_call(call: dict) -> None:
    """ValueError for a call that its own text would end early: the parser would read another one than was meant."""
    for kind, name in (("tool", call["name"]), *(("argument", name) for name in call["arguments"])):
        if not re.fullmatch(r"[A-Za-z_]\w*", name, re.A): raise ValueError(f"{name!r} is no name of a {kind}: use letters, digits and _.")
    for name, value in call["arguments"].items():
        text = as_text(value)
        if "</tool_call>" in text or f"{text}\n</parameter>\n".index("\n</parameter>\n") < len(text):
            raise ValueError(f"argument {name} of {call['name']} holds a tag that would end the call early: leave this conversation out.")


def check_messages(messages: list[dict], generation_prompt: bool = False) -> None:
    """ValueError, in one sentence, for what is no conversation."""
    rest = messages[1:] if messages and messages[0].get("role") == "system" else messages
    if not rest: raise ValueError("the conversation is empty: give at least a user's message.")
    before = "start"
    for i, message in enumerate(rest):
        role = message.get("role")
        if role == "system": raise ValueError("a system message must come first, and only once.")
        if role not in FOLLOWS: raise ValueError(f"unknown role {role!r}: use system, user, assistant or tool.")
        if before not in FOLLOWS[role]: raise ValueError(f"message {i} is from {role} behind {before}: it must follow {' or '.join(FOLLOWS[role])}.")
        if role == "tool" and before == "assistant" and not rest[i - 1].get("tool_calls"):
            raise ValueError(f"message {i} is a tool's response, and the assistant before it called no tool.")
        content = message.get("content")
        if not isinstance(content, str) and (role != "assistant" or content is not None):
            raise ValueError(f"message {i} from {role} has no text as content.")
        for call in message.get("tool_calls") or (): check_call(call)
        before = role
    if generation_prompt == (before == "assistant"):
        wanted = "the assistant's turn is there already: leave generation_prompt out" if generation_prompt else \
            "there is no answer to learn: end with an assistant's message, or ask for generation_prompt=True"
        raise ValueError(f"the conversation ends with {before} and {wanted}.")


def chat_pieces(messages: list[dict], mode: Mode, style: Style, tools: Iterable[dict], generation_prompt: bool, keep_history_thinking: bool,
                tool_note: str) -> list[Piece]:
    system = ""
    if messages[0]["role"] == "system": system, messages = messages[0]["content"], messages[1:]
    if tools := list(tools): system += ("\n\n" if system else "") + tools_text(tools) + tool_note
    last_user = max(i for i, message in enumerate(messages) if message["role"] == "user")
    pieces: list[Piece] = [(IM_START, False), ("system\n" + system, False), (IM_END, False), ("\n", False)]
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            pieces += _assistant(message, mode, style, history=i < last_user and not keep_history_thinking)
        elif message["role"] == "user":
            effort = EFFORT[style] if mode == "medium" and i == last_user else ""
            pieces += [(IM_START, False), ("user\n" + message["content"] + effort, False), (IM_END, False), ("\n", False)]
        else:      # several responses share one block
            if messages[i - 1]["role"] != "tool": pieces += [(IM_START, False), ("user\n", False)]
            pieces += [(RESPONSE, False), ("\n" + message["content"] + "\n", False), (END_RESPONSE, False), ("\n", False)]
            if i + 1 == len(messages) or messages[i + 1]["role"] != "tool": pieces += [(IM_END, False), ("\n", False)]
    if generation_prompt:
        pieces += [(IM_START, False), ("assistant\n", False), (THINK, False), (END_THINK, False) if mode == "off" else ("\n", False)]
    return pieces


def render_chat(messages: list[dict], mode: Mode = "regular", style: Style = "ultra", *, tokenizer: Tokenizer, tools: Iterable[dict] = (),
                generation_prompt: bool = False, keep_history_thinking: bool = False, tool_note: str = "") -> tuple[list[int], list[bool]]:
    """(ids, loss mask) of a conversation; the mask is True on the tokens that the model has to write, wherever they stand.

    Every assistant turn is learnt; reasoning that the format drops (history) is not there to be learnt. Mode off drops all of it.
    generation_prompt: end where the assistant begins to write. ValueError for an unknown mode or style, or what is no conversation.

    2+2? Sum. 4 -> <|im_start|>system\\n<|im_end|>\\n<|im_start|>user\\n2+2?<|im_end|>\\n<|im_start|>assistant\\n<think>\\nSum.</think>4<|im_end|>\\n
    learnt: Sum.</think>4<|im_end|>
    """
    if mode not in MODES: raise ValueError(f"unknown mode {mode!r}: choose one of {', '.join(MODES)}.")
    if style not in EFFORT: raise ValueError(f"unknown style {style!r}: choose one of {', '.join(EFFORT)}.")
    check_messages(messages, generation_prompt)
    pieces = chat_pieces(messages, mode, style, tools, generation_prompt, keep_history_thinking, tool_note)
    ids, mask, i = [], [], 0
    while i < len(pieces):
        piece, learn = pieces[i]
        i += 1
        if isinstance(piece, int): new = [piece]
        else:      # neighbouring texts are one text to the tokenizer, unless generation begins between them
            while i < len(pieces) and isinstance(pieces[i][0], str) and pieces[i][1] == learn: piece += pieces[i][0]; i += 1
            new = tokenizer.encode(piece)
        ids += new
        mask += [learn] * len(new)
    return ids, mask


# %% 3 · Conversations  [Ultra, SFT data]
# Every built-in question (data/tasks) is worked by a program, at full and at medium length, and comes in up to three modes; some regular traces
# come again, cut at a random number of tokens with the answer kept, because a client that closes the trace at a budget leaves the model just
# there. Tools in them are run. Files and hub sets bring messages of their own, in OpenAI's form.

class Conversation(NamedTuple):
    source: str                  # what it is interleaved and counted by: a domain, a file
    messages: list[dict]
    mode: Mode = "regular"
    tools: tuple = ()
    cut: bool = False            # its first reasoning was cut at a budget

    @property
    def prompt(self) -> str:
        """What may occur once in a pack: everything up to the first user's message."""
        return "\n".join(m["content"] for m in self.messages[:2] if m["role"] in ("system", "user"))


def opening(task: tasks.Task) -> list[dict]:
    system = [dict(role="system", content=task.system)] if task.system else []
    return [*system, dict(role="user", content=task.prompt)]


def cut_at_budget(messages: list[dict], tokenizer: Tokenizer, rng: random.Random) -> list[dict] | None:
    """The same conversation with its first reasoning cut behind 1 to n - 1 of n tokens and marked; None when there is nothing to cut."""
    for i, message in enumerate(messages):
        ids = tokenizer.encode(message.get("reasoning") or "") if message["role"] == "assistant" else []
        if len(ids) < 2: continue
        kept = tokenizer.decode(ids[:rng.randrange(1, len(ids))]).rstrip("\ufffd")      # the cut may lie inside a character
        if kept.strip(): return [*messages[:i], dict(message, reasoning=kept, cut=True), *messages[i + 1:]]
    return None


def thought_of(messages: list[dict]) -> list[dict]:
    """ours: a call without a thought gets the tool's name as one. The prompt of a thinking mode has opened <think> already, and an empty thought,
    which is written <think></think>, would be learnt behind a prompt that never comes."""
    return [dict(m, reasoning=m["tool_calls"][0]["name"]) if m.get("tool_calls") and not (m.get("reasoning") or "").strip() else m for m in messages]


def conversations_of(task: tasks.Task, domain: str, config: SFTConfig, tokenizer: Tokenizer, rng: random.Random) -> Iterator[Conversation]:
    """One question in the modes that are drawn for it, and perhaps once more with its trace cut."""
    environment = tasks.ENVIRONMENTS[task.family]
    full = opening(task) + thought_of(environment.worked(task, "regular", rng))
    brief = opening(task) + thought_of(environment.worked(task, "medium", rng))
    for mode, messages, share in zip(MODES, (full, brief, full), config.modes):
        if rng.random() < share: yield Conversation(domain, messages, mode, task.tools)
    if rng.random() < config.cut and (short := cut_at_budget(full, tokenizer, rng)):
        yield Conversation(domain, short, "regular", task.tools, cut=True)


SHORTEST = 8      # tokens to learn: hardly a question has fewer in regular mode, so that a budget says how many questions are enough


def task_conversations(config: SFTConfig, tokenizer: Tokenizer, split: str = "train") -> Iterator[Conversation]:
    """Worked built-in questions of one side of the split, the same for the same settings. Families that have few come again and again."""
    families = [(domain, family) for domain, names in config.by_domain.items() for family in names]
    for domain, family in families:
        environment = tasks.ENVIRONMENTS[family]
        levels = min(config.levels, environment.levels)
        rng = random.Random(f"{config.seed} {family}")
        for level in range(levels):
            left = config.tokens / (len(families) * levels)
            drawn = tasks.draw(family, level, int(left / SHORTEST) + 1, config.seed, split, at_most=True)
            for task in itertools.cycle(drawn) if split == "train" else drawn:
                for talk in conversations_of(task, domain, config, tokenizer, rng):
                    left -= sum(render_chat(talk.messages, talk.mode, tokenizer=tokenizer, tools=talk.tools)[1])
                    if left >= 0: yield talk
                if left < 0: break


def from_openai(message: dict) -> dict:
    """A message in our form: "reasoning" (also from reasoning_content, or <think> inside the content), tool calls unwrapped, arguments parsed."""
    message = {key: value for key, value in message.items() if value is not None}
    content = message.get("content", "")
    if not isinstance(message.get("role"), str) or not isinstance(content, str): raise ValueError("a message needs a role and text as content")
    out = dict(role=message["role"], content=content)
    if message["role"] != "assistant": return out
    out["reasoning"] = message.get("reasoning") or message.get("reasoning_content")
    if not out["reasoning"] and "</think>" in content:
        before, _, out["content"] = content.partition("</think>")
        out["reasoning"] = before.strip().removeprefix("<think>").strip()
    calls = [call.get("function", call) for call in message.get("tool_calls", ())]
    parse = lambda arguments: json.loads(arguments) if isinstance(arguments, str) else arguments or {}
    out["tool_calls"] = [dict(name=call["name"], arguments=parse(call.get("arguments"))) for call in calls]
    return out


def read_row(row: dict, source: str, where: str) -> Conversation:
    """A row with "messages", and perhaps "tools" and "mode". ValueError, naming the place, when it is no conversation."""
    try:
        if not isinstance(row, dict) or not isinstance(row.get("messages"), list): raise ValueError('it has no list "messages"')
        messages, tools, mode = [from_openai(m) for m in row["messages"]], row.get("tools") or (), row.get("mode", "regular")
        check_messages(messages)
        if mode not in MODES: raise ValueError(f"unknown mode {mode!r}")
        return Conversation(source, messages, mode, tuple(json.loads(tools) if isinstance(tools, str) else tools))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{where} is no conversation: {error}".rstrip(".") + ".") from None


def read_conversations(entry: str) -> Iterator[Conversation]:
    """Conversations of a .jsonl file (or a pattern of them), or of a hub's set, streamed up to its limit (hf:NAME@CONFIG@200MB)."""
    if not entry.startswith("hf:"):
        paths = sorted(glob.glob(entry))
        if not paths: raise ValueError(f'--data {entry}: no such file; give "tasks", a .jsonl of messages, or hf:NAME.')
        for path in paths:
            for i, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), 1):
                try: row = json.loads(line)
                except ValueError: raise ValueError(f"{path} line {i} is no conversation: it is not JSON.") from None
                yield read_row(row, Path(path).stem, f"{path} line {i}")
        return
    import datasets
    (repository, name, limit), taken = corpus.hub_name(entry[3:]), 0
    try:
        for i, row in enumerate(datasets.load_dataset(repository, name, split="train", streaming=True), 1):
            taken += len(json.dumps(row["messages"], default=str)) if "messages" in row else 0
            if taken > limit: return
            yield read_row(row, repository, f"{entry} row {i}")
    except (OSError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(f"cannot fetch {entry} ({str(error).splitlines()[0][:200] if str(error) else type(error).__name__}): connect to the "
                         "network and check the name, or pass a local .jsonl.") from error


class Sample(NamedTuple):
    """A conversation as the trainer reads it."""
    ids: np.ndarray
    learn: np.ndarray      # True where the model has to write the token
    prompt: str
    source: str
    mode: str


def round_robin(lists: Iterable[list]) -> list:
    """One of each in turn until all are empty:  [1 2 3] [a]  ->  1 a 2 3"""
    lists = [iter(x) for x in lists]
    out = []
    while lists:
        rest = []
        for x in lists:
            for item in x: out.append(item); rest.append(x); break
        lists = rest
    return out


def build_samples(config: SFTConfig, tokenizer: Tokenizer, split: str = "train") -> list[Sample]:
    """All conversations as ids, the sources interleaved round-robin  [Ultra]; those that no pack could hold are left out, and counted.

    split "validation": those that no model learns from; of files and hub sets one prompt in fifty, by a hash of it.
    """
    groups: dict[str, list[Sample]] = {}
    too_long = 0
    for entry in config.data:
        for talk in task_conversations(config, tokenizer, split) if entry == "tasks" else read_conversations(entry):
            if entry != "tasks" and corpus.is_held_out(talk.prompt) != (split == "validation"): continue
            ids, learn = render_chat(talk.messages, talk.mode, tokenizer=tokenizer, tools=talk.tools)
            if len(ids) > min(config.pack): too_long += 1; continue
            kind = "cut" if talk.cut else talk.mode
            groups.setdefault(talk.source, []).append(Sample(np.array(ids), np.array(learn), talk.prompt, talk.source, kind))
    if too_long: print(f"{too_long:,} conversations are longer than a pack of {min(config.pack):,} tokens and were left out")
    if not groups and split == "train": raise ValueError(f"no conversation fits a pack of {min(config.pack)} tokens: raise --pack or give more data.")
    rng = random.Random(config.seed)
    for group in groups.values(): rng.shuffle(group)
    return round_robin(groups.values())


# %% 4 · Packing  [Ultra, SFT; Packing]
# Conversations are short and of many lengths; padding each to the longest would waste most of a batch. Best fit: each goes into the open pack with
# the least room that still holds it. A fixed number of packs is open; one that is nearly full is closed. No conversation is split, and none meets
# one with its own prompt in a pack: the other modes of a question would give its answer away to whoever forgot to separate documents.

def pack_best_fit(lengths: list[int], capacity: int, prompts: list | None = None, pool: int = 16, tolerance: float = 0.02,
                  seed: int = 0) -> list[list[int]]:
    """Packs of indices, shuffled; the order within a pack is that of arrival. ValueError for a conversation longer than a pack.

    When nothing fits and the pool is full, the fullest pack makes room (ours).    lengths 5 4 3 2, capacity 7  ->  [0 3] [1 2] in some order
    """
    prompts = list(range(len(lengths))) if prompts is None else prompts
    if len(prompts) != len(lengths): raise ValueError(f"{len(prompts)} prompts for {len(lengths)} lengths: give one for each.")
    if pool < 1: raise ValueError(f"pool = {pool}: at least one pack must be open.")
    open_packs: list[tuple[list[int], set]] = []
    room, done = [], []      # room[i] of open pack i

    def close(i: int) -> None:
        done.append(open_packs.pop(i)[0]); room.pop(i)

    for index, (length, prompt) in enumerate(zip(lengths, prompts)):
        if not 0 < length <= capacity:
            raise ValueError(f"conversation {index} has {length:,} tokens, a pack holds {capacity:,}: raise --pack or leave it out, none is split.")
        fits = [i for i in range(len(room)) if room[i] >= length and prompt not in open_packs[i][1]]
        if fits: best = min(fits, key=room.__getitem__)
        else:
            if len(room) == pool: close(min(range(pool), key=room.__getitem__))
            open_packs.append(([], set())); room.append(capacity)
            best = len(room) - 1
        open_packs[best][0].append(index); open_packs[best][1].add(prompt)
        room[best] -= length
        if room[best] <= tolerance * capacity: close(best)
    while open_packs: close(0)
    random.Random(seed).shuffle(done)
    return done


def utilisation(lengths: list[int], packs: list[list[int]], capacity: int) -> tuple[float, float]:
    """Share of a batch that is no padding: (packed, each conversation padded to the longest).   5 4 3 2 in two packs of 7  ->  1.0, 0.7"""
    return sum(lengths) / (len(packs) * capacity), sum(lengths) / (len(lengths) * max(lengths))


def pack_batch(packs: list[list[Sample]], capacity: int) -> Batch:
    """Packs as rows. A conversation is a document, so Mamba states, conv windows, attention and MTP end with it; documents -1 are padding.
    mask_bt says that the *next* token is one to learn."""
    ids_bt, doc_bt = np.zeros((len(packs), capacity + 1), np.int64), np.full((len(packs), capacity + 1), -1, np.int64)
    learn_bt = np.zeros((len(packs), capacity + 1), bool)
    for row, pack in enumerate(packs):
        at = 0
        for doc, sample in enumerate(pack):
            span = slice(at, at + len(sample.ids))
            ids_bt[row, span], doc_bt[row, span], learn_bt[row, span] = sample.ids, doc, sample.learn
            at = span.stop
    batch = Batch.from_windows(ids_bt, doc_bt)
    return batch._replace(mask_bt=batch.mask_bt & torch.from_numpy(learn_bt[:, 1:]))


class Packs:
    """step -> Batch of both stages, a function of the seed: each stage packs all conversations to its length and reads its packs in epochs."""
    def __init__(self, samples: list[Sample], config: SFTConfig):
        self.samples, self.config, lengths = samples, config, [len(s.ids) for s in samples]
        self.packs = [pack_best_fit(lengths, size, [s.prompt for s in samples], config.pool, config.tolerance, config.seed + i)
                      for i, size in enumerate(config.pack)]
        self.used = [utilisation(lengths, packs, size) for packs, size in zip(self.packs, config.pack)]

    def order(self, stage: int, epoch: int) -> np.ndarray:
        return np.random.default_rng((self.config.seed, stage, epoch)).permutation(len(self.packs[stage]))

    def __call__(self, step: int) -> Batch:
        stage = self.config.stage(step)
        batch, packs = self.config.batch[stage], self.packs[stage]
        first = (step - stage * self.config.steps[0]) * batch
        chosen = [packs[self.order(stage, i // len(packs))[i % len(packs)]] for i in range(first, first + batch)]
        return pack_batch([[self.samples[i] for i in pack] for pack in chosen], self.config.pack[stage])


# %% 5 · Loss  [Ultra, SFT; Super, SFT; Megatron]
#     token         L = sum over learnt tokens of l / their number in the global batch          long answers weigh more
#     conversation  L = mean over conversations of the mean of l over its learnt tokens         every conversation weighs the same  [Super, stage 2]
# Both are weighted sums of token losses, sum w·l / sum w with w = 1, or 1 / (learnt tokens of its conversation). The MTP depths are normalised
# alike, each over the tokens that it can still predict, and count mtp_weight *each*: NVIDIA scales them per token in SFT and does not halve.

def token_weights(mask_bt: Tensor, doc_bt: Tensor, normalize: Normalize) -> Tensor:
    """w of every token, fp32 [b, t].   conversations of 2 and 1 learnt tokens  ->  token 1 1 1, conversation .5 .5 1"""
    if normalize not in get_args(Normalize): raise ValueError(f"unknown normalize {normalize!r}: choose one of {', '.join(get_args(Normalize))}.")
    w_bt = mask_bt.float()
    if normalize == "token": return w_bt
    number_bt = F.pad((doc_bt[:, 1:] != doc_bt[:, :-1]).long().cumsum(1), (1, 0))      # which conversation of its row, from 0
    count_bt = torch.zeros_like(w_bt).scatter_add_(1, number_bt, w_bt).gather(1, number_bt)
    return w_bt / count_bt.clamp(min=1)


def depth_weights(mask_bt: Tensor, doc_bt: Tensor, normalize: Normalize, depths: int) -> list[Tensor]:
    """token_weights for the next token and for each MTP depth, whose targets lie one token further, inside the same conversation."""
    out = [token_weights(mask_bt, doc_bt, normalize)]
    for _ in range(depths):
        mask_bt = nemotron.roll_document(mask_bt, doc_bt, fill=False)
        out.append(token_weights(mask_bt, doc_bt, normalize))
    return out


def sft_loss(model: nemotron.Nemotron, ids_bt: Tensor, labels_bt: Tensor, doc_bt: Tensor | None = None, mask_bt: Tensor | None = None,
             normalize: Normalize = "token", mtp_weight: float = 0.1, aux_weight: float = 1e-4, totals_k: Tensor | None = None) -> nemotron.Losses:
    """Training loss of packs; labels_bt[t] is the token after ids_bt[t], mask_bt (default: labels >= 0) says which labels are learnt.

    totals_k: sum of the weights over the *global* batch, for the next token and each depth, where this is only a piece of it. ValueError when
    mtp_weight asks for a head that the model lacks.
    """
    if mtp_weight and not hasattr(model, "mtp"): raise ValueError("the model has no MTP weights: use mtp_weight = 0, or another checkpoint.")
    doc_bt = torch.zeros_like(ids_bt) if doc_bt is None else doc_bt
    # stage 04 shares the weight out between the depths
    return nemotron.loss(model, ids_bt, labels_bt, doc_bt, mask_bt, mtp_weight * model.config.mtp_depths, aux_weight,
                         partial(token_weights, normalize=normalize), totals_k)


# %% 6 · Schedule and trainer  [Ultra, SFT; Megatron, optimizer_param_scheduler]
#     warmup   lr = peak · n / warmup            then   lr = low + (peak - low) · (1 + cos(pi · r)) / 2,   r = (n - warmup) / (total - warmup)
# One trainer runs both stages, so that moments carry over and one checkpoint resumes either (ours: the report is silent on both).

def cosine_lr(n: int, total: int, warmup: int, peak: float, low: float) -> float:
    """Rate of step n (from 1).   total 100, warmup 20, peak 1, low 0:  n 10 -> 0.5,  n 20 -> 1,  n 60 -> 0.5,  n 100 -> 0"""
    if n < warmup: return peak * n / warmup
    if n >= total: return low
    return low + (peak - low) * (1 + math.cos(math.pi * (n - warmup) / (total - warmup))) / 2


class SFTTrainer(pretrain.Trainer):
    """05's trainer with this stage's loss and rates; `validation`: packs that it looks at now and then, and learns nothing from."""
    def __init__(self, config: pretrain.PretrainConfig, model: nemotron.Nemotron, batches: Callable[[int], Batch], home: Path, sft: SFTConfig,
                 validation: Batch | None = None, **kwargs):
        self.sft, self.validation = sft, validation
        if sft.mtp_weight and not hasattr(model, "mtp"):
            raise ValueError("the checkpoint has no MTP weights: train with --mtp-weight 0, or start from one that has.")
        super().__init__(config, model, batches, home, objective=self.piece_loss, schedule=sft.rate, **kwargs)

    @property
    def normalize(self) -> Normalize: return get_args(Normalize)[self.sft.stage(self.step)]

    def train_step(self) -> dict:
        row, every = super().train_step(), self.sft.validate_every
        if self.validation is not None and every and self.step % every == 0: row["validation"] = self.validation_loss()
        return row

    @torch.no_grad()
    def validation_loss(self) -> float:
        """Mean loss of the tokens to learn; the row of metrics keeps it, so that a plateau can be seen."""
        self.model.eval()
        with self.autocast(): mean = sft_loss(self.model, *self.validation.to(self.config.device), mtp_weight=0.0, aux_weight=0.0).main.item()
        self.model.train()
        return mean

    def compute_step(self, *batch: Tensor) -> None:
        # the trainer averages over the pieces of a batch; a piece divides by its share of the whole batch's weights, not by its own weights
        _, _, doc_bt, mask_bt = batch
        depths = self.model.config.mtp_depths if self.sft.mtp_weight else 0
        totals_k = torch.stack([w.sum() for w in depth_weights(mask_bt, doc_bt, self.normalize, depths)]).clamp(min=1)
        self.totals_k = totals_k / self.config.micro_batches
        super().compute_step(*batch)

    def piece_loss(self, model: nemotron.Nemotron, piece: Batch) -> nemotron.Losses:
        return sft_loss(model, *piece, normalize=self.normalize, mtp_weight=self.sft.mtp_weight, aux_weight=self.sft.aux_weight,
                        totals_k=self.totals_k)


# %% 7 · Evaluation
# Exact answers to held-out questions (split by a hash of the question, never by seed), in every mode, beside what always giving the commonest
# answer would earn. The model writes its turns; tools run what they are asked and answer; the last turn is scored. Greedy, so that a run repeats.

class Answer(NamedTuple):
    score: float
    tokens: int              # written by the model, over all its turns
    error: str | None        # what parse_completion found wrong with the last turn
    finished: bool           # the last turn ended before max_tokens
    messages: list[dict]


def play(model: nemotron.Nemotron, tokenizer: Tokenizer, questions: list[tasks.Task], mode: Mode, max_tokens: int) -> list[Answer]:
    """The model's answers, all questions in one batch, a turn at a time."""
    talks, answers, live = [opening(task) for task in questions], [None] * len(questions), list(range(len(questions)))
    written, sampling, turn = [0] * len(questions), nemotron.SamplingParams(max_tokens=max_tokens, temperature=0.0), 0
    while live:
        prompts = [render_chat(talks[i], mode, tokenizer=tokenizer, tools=questions[i].tools, generation_prompt=True)[0] for i in live]
        turn, going = turn + 1, []
        for i, completion in zip(live, nemotron.generate(model, prompts, sampling)):
            task, environment = questions[i], tasks.ENVIRONMENTS[questions[i].family]
            text = tokenizer.decode(completion.ids[:-1] if completion.finished else completion.ids)
            parsed = tasks.parse_completion(text, thinking=mode != "off")
            talks[i].append(dict(role="assistant", content=parsed.content, reasoning=parsed.reasoning, tool_calls=parsed.tool_calls))
            written[i] += len(completion.ids)
            may_go_on = completion.finished and not parsed.error and turn < environment.max_turns
            response = environment.step(task, talks[i]) if may_go_on else None
            if response is not None: talks[i].append(response); going.append(i); continue
            score = environment.score(task, text, thinking=mode != "off") if completion.finished else 0.0      # no end: the answer may go on
            answers[i] = Answer(score, written[i], parsed.error, completion.finished, talks[i])
        live = going
    return answers


def wilson(hits: float, n: int, z: float = 1.96) -> tuple[float, float]:
    """95 % interval of a share.   0 of 20 -> (0, 0.161),  10 of 20 -> (0.299, 0.701)"""
    if not n: return 0.0, 1.0
    p, wide = hits / n, z * z / n
    middle, half = (p + wide / 2) / (1 + wide), z / (1 + wide) * math.sqrt(p * (1 - p) / n + wide / (4 * n))
    return max(middle - half, 0.0), min(middle + half, 1.0)


def evaluate(model: nemotron.Nemotron, tokenizer: Tokenizer, config: SFTConfig) -> tuple[list[dict], dict[str, list]]:
    """(a row per family and mode, examples (task, answer) per mode) on questions of config.score_on."""
    rows, examples = [], {}
    for domain, families in config.by_domain.items():
        questions = {family: [] for family in families}
        for family in families:
            levels = min(config.levels, tasks.ENVIRONMENTS[family].levels)
            for level in range(levels):
                questions[family] += tasks.draw(family, level, -(-config.held_out // levels), config.seed, config.score_on, at_most=True)
        batch = [task for group in questions.values() for task in group]
        if not batch: continue
        for mode in MODES:
            answers = iter(play(model, tokenizer, batch, mode, config.max_tokens))
            for family, group in questions.items():
                mine = [next(answers) for _ in group]
                if not mine: continue
                rows.append(dict(domain=domain, family=family, mode=mode, n=len(mine), constant=tasks.constant_baseline(group)[1],
                                 right=sum(a.score for a in mine), tokens=sum(a.tokens for a in mine), errors=sum(a.error is not None for a in mine),
                                 cut=sum(not a.finished for a in mine)))
                examples.setdefault(mode, []).extend(zip(group, mine))
    return rows, examples


def pooled(rows: list[dict], *keys: str) -> dict[tuple, dict]:
    """Rows summed over all but `keys`: n, accuracy and interval, best constant answer, mean tokens, shares of errors and of answers without end."""
    out: dict[tuple, dict] = {}
    for key in dict.fromkeys(tuple(row[k] for k in keys) for row in rows):
        mine = [row for row in rows if tuple(row[k] for k in keys) == key]
        n, total = sum(r["n"] for r in mine), lambda name, mine=mine: sum(r[name] for r in mine)
        out[key] = dict(n=n, accuracy=total("right") / n, interval=wilson(total("right"), n), constant=sum(r["constant"] * r["n"] for r in mine) / n,
                        tokens=total("tokens") / n, errors=total("errors") / n, cut=total("cut") / n)
    return out


# %% 8 · Tables and figure

def print_data(samples: list[Sample], packs: Packs, config: SFTConfig) -> None:
    rows = []
    for source in dict.fromkeys(s.source for s in samples):
        mine = [s for s in samples if s.source == source]
        kinds, tokens = Counter(s.mode for s in mine), sum(len(s.ids) for s in mine)
        rows.append([source, f"{len(mine):,}", *(f"{kinds[k]:,}" for k in (*MODES, "cut")), f"{tokens:,}", f"{tokens / len(mine):.0f}",
                     f"{sum(int(s.learn.sum()) for s in mine) / tokens:.0%}"])
    nvfp4.print_table("conversations to learn from", ["source", "all", *MODES, "cut", "tokens", "mean length", "learnt"], rows)
    print()
    for stage, (size, (packed, padded)) in enumerate(zip(config.pack, packs.used)):
        read = config.steps[stage] * config.batch[stage]
        print(f"stage {stage + 1}: {len(packs.packs[stage]):,} packs of {size:,} tokens, {packed:.1%} filled; conversations padded to the longest "
              f"would fill {padded:.1%}.   {config.steps[stage]} steps of {config.batch[stage]} packs: {read / len(packs.packs[stage]):.2f} epochs")


def print_scores(rows: list[dict], split: str = "held_out") -> None:
    """Accuracy by family, then everything by domain and mode."""
    share = lambda x: f"{x:.0%}"
    by = pooled(rows, "family", "mode")
    table = [[family, by[family, MODES[0]]["n"], share(by[family, MODES[0]]["constant"]), *(share(by[family, mode]["accuracy"]) for mode in MODES)]
             for family in dict.fromkeys(row["family"] for row in rows)]
    nvfp4.print_table(f"{split.replace('_', '-')} questions answered exactly, by family", ["family", "questions", "best constant", *MODES], table)
    everything = pooled(rows, "domain", "mode") | {("all", mode): x for (mode,), x in pooled(rows, "mode").items()}
    table = [[f"{domain}, {mode}", x["n"], share(x["constant"]), share(x["accuracy"]), "{:.0%} to {:.0%}".format(*x["interval"]),
              f"{x['tokens']:.1f}", share(x["errors"]), share(x["cut"])] for (domain, mode), x in everything.items()]
    header = ["domain and mode", "questions", "best constant", "exact", "95 % interval", "tokens", "format errors", "no end"]
    nvfp4.print_table("by domain and mode, greedy", header, table)


COLOURS = {"regular": "#2c6fa6", "medium": "#6aaed6", "off": "#c9a227"}


def plot(rows: list[dict], metrics: list[dict], config: SFTConfig, path: Path) -> None:
    """Accuracy by domain and mode beside the best constant answer, and the loss of both stages."""
    fig, (left, right) = nvfp4.new_figure(columns=2, width=7.2)
    by, domains = pooled(rows, "domain", "mode"), list(dict.fromkeys(row["domain"] for row in rows))
    for i, mode in enumerate(MODES):
        x, scores = np.arange(len(domains)) + (i - 1) * 0.26, [by[domain, mode] for domain in domains]
        ends = np.array([[s["accuracy"] - s["interval"][0], s["interval"][1] - s["accuracy"]] for s in scores]).T
        left.bar(x, [s["accuracy"] for s in scores], 0.24, yerr=np.abs(ends), color=COLOURS[mode], label=mode,
                 error_kw=dict(elinewidth=1, ecolor="0.35"))
    constant = [by[domain, MODES[0]]["constant"] for domain in domains]
    left.hlines(constant, np.arange(len(domains)) - 0.42, np.arange(len(domains)) + 0.42, color="0.15", linewidth=1.6, label="best constant answer")
    left.set_xticks(range(len(domains)), domains, rotation=20)
    top = max([x["interval"][1] for x in by.values()] + constant)
    left.set(ylim=(0, 1.2 * top), ylabel="held-out questions answered exactly", title="Exact answers by domain and reasoning mode")
    left.legend(frameon=False, fontsize=9, ncols=4, loc="upper center")
    for stage, colour in ((0, "#2c6fa6"), (1, "#c0392b")):
        mine = [row for row in metrics if config.stage(row["step"] - 1) == stage]
        if not mine: continue
        right.plot([r["step"] for r in mine], [r["loss"] for r in mine], color=colour, linewidth=0.7, alpha=0.35)
        width = max(len(mine) // 24, 1)
        smooth = [float(np.mean([r["loss"] for r in mine[max(0, i - width + 1):i + 1]])) for i in range(len(mine))]
        right.plot([r["step"] for r in mine], smooth, color=colour, linewidth=1.8, label=f"stage {stage + 1}, per {get_args(Normalize)[stage]}")
    looks = [row for row in metrics if "validation" in row]
    if looks:
        right.plot([r["step"] for r in looks], [r["validation"] for r in looks], "o-", color="0.15", markersize=3, linewidth=1.2, label="validation")
    right.set(xlabel="step", ylabel="loss on what the assistant writes (nats)", title="Loss by stage, thick: running mean", ylim=(0, None))
    right.legend(frameon=False, fontsize=9)
    nvfp4.save_figure(fig, path)


# %% 9 · Command

def find_base(config: SFTConfig) -> Path:
    if config.base is not None: return Path(config.base)
    home = Path(config.out) / "pretrain"
    if not pretrain.checkpoints(home): raise ValueError(f"{home} holds no checkpoint: run python 05_pretrain.py first, or give --base a directory.")
    return pretrain.newest_checkpoint(home)


def same_run(config: SFTConfig, base: Path, samples: list[Sample]) -> dict:
    """What a continuation must share with its run."""
    data = hashlib.sha256(b"".join(s.ids.tobytes() + s.learn.tobytes() for s in samples)).hexdigest()[:16]
    kept = {key: value for key, value in asdict(config).items() if key not in FREE | {"base"}}
    return json.loads(json.dumps(dict(kept, base=str(base), text=data), default=str))


VALIDATION_PACKS = 8      # ours: packs of stage 1's length that the validation loss is a mean over, at most


def validation_batch(config: SFTConfig, tokenizer: Tokenizer) -> Batch | None:
    """Conversations that nothing learns from, in packs; None when there are none."""
    samples = build_samples(config, tokenizer, "validation")
    packs = pack_best_fit([len(s.ids) for s in samples], config.pack[0], [s.prompt for s in samples], config.pool, config.tolerance, config.seed)
    return pack_batch([[samples[i] for i in pack] for pack in packs[:VALIDATION_PACKS]], config.pack[0]) if packs else None


def start(config: SFTConfig, base: Path, tokenizer: Tokenizer, samples: list[Sample], packs: Packs) -> SFTTrainer:
    """The trainer of a new run, or of the one that --resume finds. ValueError when an earlier run would be overwritten unasked."""
    home, log, about = config.home, config.home / "metrics.jsonl", config.home / "sft.json"
    shared = dict(sft=config, tokenizer=tokenizer, data_hash=str(base), validation=validation_batch(config, tokenizer))
    if config.resume:
        folder, was, now = pretrain.newest_checkpoint(home), json.loads(about.read_text()), same_run(config, base, samples)
        for key in now:
            if now[key] != was.get(key):
                raise ValueError(f"{home} was trained with {key} = {was.get(key)}, not {now[key]}: give the same settings, or --fresh.")
        trainer = SFTTrainer.load(folder, config.training(), packs, home, **shared)
        rows = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
        trainer.rows = [row for row in rows if row["step"] <= trainer.step]
        log.write_text("".join(json.dumps(row) + "\n" for row in trainer.rows))
        print(f"resuming from {folder}")
        return trainer
    if config.fresh: shutil.rmtree(home, ignore_errors=True)
    if pretrain.checkpoints(home):
        raise ValueError(f"{home} holds checkpoints of an earlier run: --resume goes on with it, --fresh deletes it, --out chooses another folder.")
    nvfp4.writable_folder(home)
    log.unlink(missing_ok=True)
    about.write_text(json.dumps(same_run(config, base, samples), indent=1))
    torch.manual_seed(config.seed)
    return SFTTrainer(config.training(), nemotron.load_checkpoint(base), packs, home, **shared)


def show_examples(examples: dict[str, list]) -> None:
    """A conversation of each mode: a right one where there is one, with tools where they helped, and of those the shortest."""
    for mode, pairs in examples.items():
        task, answer = max(pairs, key=lambda pair: (pair[1].score, pair[0].domain == "tools", -pair[1].tokens))
        print(f"\n--- {mode}: {task.family}, {'right' if answer.score else 'wrong'}, {answer.tokens} tokens")
        for m in answer.messages:
            calls = "".join(f" [calls {c['name']}({', '.join(f'{k}={v!r}' for k, v in c['arguments'].items())})]" for c in m.get("tool_calls") or ())
            thought = f"({m['reasoning'].strip()}) " if m.get("reasoning") else ""
            print(f"{m['role']:>9}: {thought}{(m['content'] or '').strip()}{calls}")


def main(config: SFTConfig) -> None:
    began = time.perf_counter()
    nvfp4.writable_folder(config.out)
    base = find_base(config)
    tokenizer = Tokenizer.load(base)
    samples = build_samples(config, tokenizer)
    packs = Packs(samples, config)
    print_data(samples, packs, config)
    trainer = start(config, base, tokenizer, samples, packs)
    if len(tokenizer) > trainer.model.config.vocab:
        raise ValueError(f"{base}: the tokenizer has {len(tokenizer):,} ids and the model {trainer.model.config.vocab:,}.")
    print(f"\nfrom {base} in {config.precision} on {config.device}, {torch.get_num_threads()} threads\n")
    if not trainer.fit(sum(config.steps), save_at={config.steps[0]}, label="sft"):
        print(f"\nstopped after step {trainer.step}, saved in {trainer.home / f'step-{trainer.step:06d}'}: the same command with --resume goes on.")
        sys.exit(130)
    trained = time.perf_counter() - began
    rows, examples = evaluate(trainer.model, tokenizer, config)
    print_scores(rows, config.score_on)
    show_examples(examples)
    plot(rows, trainer.rows, config, Path(config.out) / "06_sft.png")
    tidy = lambda scores: {" ".join(key): {name: [round(x, 4) for x in v] if isinstance(v, tuple) else round(v, 4) for name, v in score.items()}
                           for key, score in scores.items()}
    last = {f"loss_{name}": round(float(np.mean([r["loss"] for r in trainer.rows if config.stage(r["step"] - 1) == s][-10:])), 4)
            for s, name in enumerate(get_args(Normalize)) if config.steps[s]}
    nvfp4.write_row(config.out, "06_sft", base=str(base), seed=config.seed, scored_on=config.score_on, steps=list(config.steps),
                    conversations=len(samples), **last, validation=[round(row["validation"], 4) for row in trainer.rows if "validation" in row],
                    filled=[round(used[0], 4) for used in packs.used], padded=round(packs.used[0][1], 4), all=tidy(pooled(rows, "mode")),
                    domains=tidy(pooled(rows, "domain", "mode")), families=tidy(pooled(rows, "family", "mode")), threads=torch.get_num_threads(),
                    train_seconds=round(trained, 1), seconds=round(time.perf_counter() - began, 1))
    print(f"\ncheckpoint: {trainer.home / f'step-{trainer.step:06d}'}   figure: {Path(config.out) / '06_sft.png'}   "
          f"{trained:.0f} s to train, {time.perf_counter() - began:.0f} s in all")


if __name__ == "__main__":
    nvfp4.run_command(main, SFTConfig, __doc__)
