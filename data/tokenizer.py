"""The tokenizer: byte-pair encoding, as definition, trained fast, and read from and written to a released folder.

Byte-pair encoding: begin with 256 bytes, join the most frequent neighbours into a new token, repeat. A pattern first cuts text into words, so
no token crosses one; it cuts numbers into single digits, because sums are computed digit by digit. Ids below RESERVED are no text at all: the
released special tokens sit on their released ids there and <SPECIAL_n> fills the rest; byte i is id RESERVED + i, and merge n (from 0) is id
RESERVED + 256 + n.

NOTE: a document ends with </s> and nothing opens it: the released base models end documents with id 2, and their chat format has no <s>.
Sources: [Tekken] the tokenizer of Mistral NeMo, whose vocabulary Nemotron 3 uses · [HF] the file formats of the libraries tokenizers and
transformers · [Template] NVIDIA's published nano3.jinja, and the renderers that follow Ultra's chat_template (06_sft.py, section 2).
"""
from __future__ import annotations

import base64
import functools
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

RESERVED = 32      # ours: of 4,096; Tekken reserves 1,000 of 131,072
SPECIALS = {"<unk>": 0, "<s>": 1, "</s>": 2, "<|im_start|>": 10, "<|im_end|>": 11, "<think>": 12, "</think>": 13, "<tool_call>": 14,
            "</tool_call>": 15, "<tool_response>": 16, "</tool_response>": 17}
EOS = SPECIALS["</s>"]
PATTERN = (r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"      # a word that ends in small letters, or
           r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"     # begins with capitals; one sign before it
           r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+")                    # one digit | punctuation | line ends | spaces


def train_bpe(texts: Iterable[str], merges: int, pattern: str = PATTERN) -> dict[bytes, int]:
    """Rung 1, the definition: token bytes -> rank. It counts every pair anew for each merge; rustbpe finds the same merges, fast."""
    import regex  # python's own re has no \\p{...}
    counts = Counter(word for text in texts for word in regex.findall(pattern, text))
    words = [(list(word.encode()), n) for word, n in counts.items()]
    token = [bytes([i]) for i in range(256)]
    for new in range(256, 256 + merges):
        pairs = Counter()
        for ids, n in words:
            for pair in zip(ids, ids[1:]): pairs[pair] += n
        if not pairs: break
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))      # the most frequent; of equals, the smallest ids
        token.append(token[best[0]] + token[best[1]])
        for ids, _ in words:
            i = 0
            while i < len(ids) - 1:
                if (ids[i], ids[i + 1]) == best: ids[i:i + 2] = [new]
                i += 1
    return {b: rank for rank, b in enumerate(token)}


# ---- tokenizer.json  [HF]
# The file spells a token in characters, one for each byte: a printable byte is itself, each of the others takes the next character from U+0100 on
# (a space is "Ġ"). It lists merges, "join a and b", and the earliest in the list goes first; tiktoken has none, it joins the neighbours whose token
# has the lowest rank. The two agree on every text if (1) the ids of merged tokens rise along the list, so that both go in the same order, and
# (2) whenever tiktoken joins a and b, the list has that pair too. For (2) one text per token is enough: in a word, the bytes of a token are
# joined just as they are joined alone, or a merge crosses their border and the token never comes to be there.

PRINTABLE = (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))
BYTE_CHARS = {**{b: chr(b) for b in PRINTABLE}, **{b: chr(256 + i) for i, b in enumerate(sorted(set(range(256)) - {*PRINTABLE}))}}
CHAR_BYTES = {ord(char): b for b, char in BYTE_CHARS.items()}


def spell(token: bytes) -> str:
    """A token as the file writes it:  b" a\\n" -> "ĠaĊ" """
    return token.decode("latin-1").translate(BYTE_CHARS)


def unspell(token: str) -> bytes | None:
    """The way back:  "ĠaĊ" -> b" a\\n"; None for characters that stand for no byte."""
    return token.translate(CHAR_BYTES).encode("latin-1") if token and CHAR_BYTES.keys() >= {*map(ord, token)} else None


def splits(token: bytes, ranks: dict[bytes, int]) -> Iterator[tuple[bytes, bytes]]:
    """Every pair of tokens that together are this one:  "the" -> (t, he), (th, e) """
    return ((token[:i], token[i:]) for i in range(1, len(token)) if token[:i] in ranks and token[i:] in ranks)


def last_merge(token: bytes, ranks: dict[bytes, int]) -> tuple[bytes, bytes] | None:
    """The two parts that tiktoken joins last when it meets the token alone; None when its merges do not lead there."""
    parts, pair = [token[i:i + 1] for i in range(len(token))], None
    while len(parts) > 1:
        best, at = min((ranks.get(a + b, len(ranks)), i) for i, (a, b) in enumerate(zip(parts, parts[1:])))
        if best == len(ranks): return None
        pair = parts[at], parts[at + 1]
        parts[at:at + 2] = [pair[0] + pair[1]]
    return pair


def text_pattern(file: Path, spec: dict) -> str:
    """The pattern that cuts text into words; ValueError for a tokenizer of another kind."""
    model, steps = spec.get("model") or {}, spec.get("pre_tokenizer") or {}
    steps = steps.get("pretokenizers") or [steps]
    changed = [key for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback") if model.get(key)]
    if model.get("type") != "BPE" or changed or spec.get("normalizer") or [step.get("type") for step in steps] != ["Split", "ByteLevel"]:
        what = f"{model.get('type')} ({', '.join(changed)})" if changed else model.get("type")
        raise ValueError(f"{file} is no plain byte-level BPE (model {what}, normalizer {(spec.get('normalizer') or {}).get('type')}, "
                         f"pre_tokenizer {[step.get('type') for step in steps]}): a BPE behind Split and ByteLevel can be read.")
    split, level = steps
    pattern = (split.get("pattern") or {}).get("Regex")
    if not pattern or split.get("behavior") != "Isolated" or split.get("invert") or level.get("add_prefix_space") or level.get("use_regex", True):
        raise ValueError(f"{file} cuts text in another way than at the matches of one pattern: only that can be read.")
    return pattern


def check_merges(file: Path, merges: list, tokens: dict[str, bytes], ranks: dict[bytes, int], whole_words: bool) -> None:
    """ValueError unless tiktoken, which knows ranks only, gives the ids that these merges give, on every text.

    tokens: spelling -> bytes. whole_words: the model looks a word up before it merges (ignore_merges), as tiktoken does."""
    listed, before = set(), -1
    for merge in merges:
        pair = merge.split(" ") if isinstance(merge, str) else merge
        a, b = (tokens.get(part) for part in pair) if len(pair) == 2 else (None, None)
        if a is None or b is None or a + b not in ranks:
            raise ValueError(f"{file}: merge {' + '.join(pair)} takes or makes a token that the vocabulary does not have.")
        if ranks[a + b] < before:
            raise ValueError(f"{file}: merge {' + '.join(pair)} comes behind a merge that makes a higher id; ids must follow their order.")
        before = ranks[a + b]
        listed.add((a, b))
    for token in ranks:
        if len(token) == 1: continue
        pair = last_merge(token, ranks)
        if pair not in listed and (pair or not whole_words):
            how = f"is made from {' + '.join(map(spell, pair))}, which is no merge there" if pair else "is made by none of the merges"
            raise ValueError(f"{file}: token {spell(token)} {how}: its ids cannot be had from ranks.")


# ---- chat_template.jinja  [Template]
# What 06_sft.render_chat writes, for programs that know a model by its folder. apply_chat_template(messages, tools=…) takes enable_thinking (false
# = mode off), medium_effort or low_effort (mode medium), truncate_history_thinking and style="nano" by name.
# PITFALL: a template is text, so "<|im_end|>" inside a message becomes the token there; render_chat keeps it text.

CHAT_TEMPLATE = r"""
{%- set thinking = enable_thinking | default(true) -%}
{%- set keep_history = not (truncate_history_thinking | default(true)) -%}
{%- set nano = style | default("ultra") == "nano" -%}
{%- set medium = medium_effort | default(false) or low_effort | default(false) -%}

{%- macro as_text(value) -%}
  {{- value if value is string else value | tojson if value is mapping or value is sequence else value | string -}}
{%- endmacro -%}

{%- macro tag(name, value) -%}
  {{- "\n<" ~ name ~ ">" ~ value ~ "</" ~ name ~ ">" -}}
{%- endmacro -%}

{%- macro other_keys(values, known) -%}
  {%- for name, value in values | items if name not in known -%}{{- tag(name, as_text(value)) -}}{%- endfor -%}
{%- endmacro -%}

{%- set system = "" -%}
{%- set talk = messages -%}
{%- if messages and messages[0].role == "system" -%}
  {%- set system = messages[0].content -%}
  {%- set talk = messages[1:] -%}
{%- endif -%}
{%- set last = namespace(user=-1) -%}
{%- for message in talk if message.role == "user" -%}{%- set last.user = last.user + 1 -%}{%- endfor -%}
{%- set seen = namespace(users=-1) -%}

{{- "<|im_start|>system\n" ~ system -}}
{%- if tools -%}
  {{- ("\n\n" if system else "") ~ "# Tools\n\nYou have access to the following functions:\n\n<tools>" -}}
  {%- for tool in tools -%}
    {%- set tool = tool.function if tool.function is defined else tool -%}
    {%- set schema = tool.parameters or {} -%}
    {%- set schema = schema if schema.type == "object" else dict(properties=schema) -%}
    {%- set required = tool.required if tool.required is defined else schema.required -%}
    {{- "\n<function>" ~ tag("name", tool.name) -}}
    {%- if tool.description -%}{{- tag("description", tool.description | trim) -}}{%- endif -%}
    {{- "\n<parameters>" -}}
    {%- for name, values in (schema.properties or {}) | items -%}
      {{- "\n<parameter>" ~ tag("name", name) -}}
      {%- if values.type is defined -%}{{- tag("type", values.type | string) -}}{%- endif -%}
      {%- if values.description is defined -%}{{- tag("description", values.description | trim) -}}{%- endif -%}
      {%- if values.enum is defined -%}{{- tag("enum", values.enum | tojson) -}}{%- endif -%}
      {{- other_keys(values, ["name", "type", "description", "enum"]) ~ "\n</parameter>" -}}
    {%- endfor -%}
    {{- other_keys(schema, ["type", "properties", "required"]) -}}
    {%- if required is defined and required is not none -%}{{- tag("required", required | tojson) -}}{%- endif -%}
    {{- "\n</parameters>" ~ other_keys(tool, ["type", "name", "description", "parameters", "required"]) ~ "\n</function>" -}}
  {%- endfor -%}
  {{- "\n</tools>" ~ tool_note | default("") -}}
{%- endif -%}
{{- "<|im_end|>\n" -}}

{%- for message in talk -%}
  {%- if message.role == "user" -%}
    {%- set seen.users = seen.users + 1 -%}
    {{- "<|im_start|>user\n" ~ message.content -}}
    {%- if medium and seen.users == last.user -%}{{- "\n\n{reasoning effort: " ~ ("low" if nano else "efficient") ~ "}" -}}{%- endif -%}
    {{- "<|im_end|>\n" -}}
  {%- elif message.role == "assistant" -%}
    {%- set history = seen.users < last.user and not keep_history -%}
    {%- set calls = message.tool_calls or [] -%}
    {%- set reasoning = (message.reasoning or message.reasoning_content or "") if thinking else "" -%}
    {%- set thought = reasoning | trim | length > 0 -%}
    {%- set content = message.content or "" -%}
    {%- if nano and thought -%}{%- set content = "\n" ~ content -%}{%- endif -%}
    {%- if not (history and calls) -%}{%- set content = content.rstrip() -%}
    {%- elif nano -%}{%- set content = content | trim -%}{%- endif -%}
    {{- "<|im_start|>assistant\n<think>" -}}
    {%- if thought and not history -%}{{- "\n" ~ reasoning ~ ("\n" if nano else "") -}}{%- endif -%}
    {{- "</think>" ~ content ~ ("\n" if calls else "") -}}
    {%- for call in calls -%}
      {%- set call = call.function if call.function is defined else call -%}
      {{- "<tool_call>\n<function=" ~ call.name ~ ">\n" -}}
      {%- for name, value in (call.arguments or {}) | items -%}
        {{- "<parameter=" ~ name ~ ">\n" ~ as_text(value) ~ "\n</parameter>\n" -}}
      {%- endfor -%}
      {{- "</function>\n</tool_call>\n" -}}
    {%- endfor -%}
    {{- "<|im_end|>\n" -}}
  {%- elif message.role == "tool" -%}
    {{- "" if loop.previtem and loop.previtem.role == "tool" else "<|im_start|>user\n" -}}
    {{- "<tool_response>\n" ~ message.content ~ "\n</tool_response>\n" -}}
    {{- "" if loop.nextitem and loop.nextitem.role == "tool" else "<|im_end|>\n" -}}
  {%- else -%}
    {{- raise_exception("unknown role " ~ message.role ~ ": use system (first), user, assistant or tool.") -}}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {{- "<|im_start|>assistant\n<think>" ~ ("\n" if thinking else "</think>") -}}
{%- endif -%}
""".lstrip()

# what a generation does unless told otherwise  [Ultra's model card; Config, generation]: it stops at the end of a document and of a chat turn
GENERATION = dict(bos_token_id=SPECIALS["<s>"], eos_token_id=[EOS, SPECIALS["<|im_end|>"]], pad_token_id=SPECIALS["<unk>"], do_sample=True,
                  temperature=1.0, top_p=0.95)


class Tokenizer:
    """Text <-> ids. ranks: token bytes -> rank in the order of the merges; an id is rank plus the number of special tokens (RESERVED in ours).

    specials: name -> id, from 0 on without a gap; nothing = ours.
    """
    eos = EOS
    def __init__(self, ranks: dict[bytes, int], pattern: str = PATTERN, specials: dict[str, int] | None = None):
        import tiktoken
        self.ranks, self.pattern = ranks, pattern
        names = {i: name for name, i in SPECIALS.items()}
        self.specials = specials or {names.get(i, f"<SPECIAL_{i}>"): i for i in range(RESERVED)}
        self.reserved = len(self.specials)
        ids = {b: self.reserved + rank for b, rank in ranks.items()}
        self.encoding = tiktoken.Encoding("nemotron", pat_str=pattern, mergeable_ranks=ids, special_tokens=self.specials)

    @classmethod
    def train(cls, texts: Iterable[str], vocab: int) -> Tokenizer:
        """At most `vocab` ids in all; a short text has fewer pairs to merge and gives a smaller vocabulary."""
        import rustbpe
        if vocab < RESERVED + 256: raise ValueError(f"vocab = {vocab}: {RESERVED} reserved ids and 256 bytes need at least {RESERVED + 256}.")
        trainer = rustbpe.Tokenizer()
        trainer.train_from_iterator(iter(texts), vocab - RESERVED, pattern=PATTERN)
        return cls({bytes(b): rank for b, rank in trainer.get_mergeable_ranks()})

    @classmethod
    def from_directory(cls, directory: str | Path) -> Tokenizer:
        """The tokenizer of a released folder, from its tokenizer.json; ids are those that the library tokenizers gives for plain text.

        ValueError, in one sentence, for a file that is missing or damaged, no byte-level BPE, whose special tokens lie elsewhere than SPECIALS says,
        or whose merges cannot be had from ranks (check_merges). Reading 131,072 entries takes some seconds; save, then load, is faster.
        """
        file = Path(directory) / "tokenizer.json"
        if not file.exists(): raise ValueError(f"{directory} has no tokenizer.json: give a folder with a released tokenizer.")
        try: spec = dict(json.loads(file.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error: raise ValueError(f"{file} is cut short or damaged ({error}): copy it again.") from None
        pattern = text_pattern(file, spec)
        specials = {token["content"]: token["id"] for token in sorted(spec.get("added_tokens") or (), key=lambda token: token["id"])}
        ids = {token: i for token, i in (spec["model"].get("vocab") or {}).items() if token not in specials}
        tokens = {token: unspell(token) for token in ids}
        if None in tokens.values():
            strange = next(token for token in tokens if tokens[token] is None)
            raise ValueError(f"{file}: token {strange!r} is not spelled in bytes, so this is no byte-level BPE.")
        for i, found in enumerate(sorted([*specials.values(), *ids.values()])):
            if found < i: raise ValueError(f"{file}: two tokens have id {found}; each needs its own.")
            if found > i: raise ValueError(f"{file}: no token has id {i}, and others have higher ids; they must run from 0 without a gap.")
        if list(specials.values()) != list(range(len(specials))):
            raise ValueError(f"{file}: its special tokens are not the first {len(specials)} ids, as Nemotron's are.")
        for name, i in SPECIALS.items():
            if specials.get(name) != i: raise ValueError(f"{file}: {name} has id {specials.get(name)}, and the chat format here needs it at {i}.")
        ranks = {tokens[token]: ids[token] - len(specials) for token in sorted(ids, key=ids.get)}
        if missing := [b for b in range(256) if bytes([b]) not in ranks]: raise ValueError(f"{file}: no token stands for byte {missing[0]}.")
        check_merges(file, spec["model"].get("merges") or [], tokens, ranks, bool(spec["model"].get("ignore_merges")))
        tokenizer, probe = cls(ranks, pattern, specials), "".join(map(chr, range(0xD800)))
        # PITFALL: tiktoken drops what the pattern does not match, where tokenizers makes a word of it
        if tokenizer.decode(tokenizer.encode(probe)) != probe:
            raise ValueError(f"{file}: its pattern leaves characters out, whose ids cannot be had here.")
        return tokenizer

    def __len__(self) -> int: return self.reserved + len(self.ranks)

    def encode(self, text: str) -> list[int]:
        """Ids of plain text. What looks like a special token stays text: "</s>" typed by a user does not end a document."""
        return self.encoding.encode_ordinary(text)

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids, special tokens by name. An id that no token has (a model's vocabulary may be larger) reads <unk>, a cut character U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", "replace")

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes behind decode, which may begin and end inside a character: pieces of a stream."""
        return self.encoding.decode_bytes([i if i < len(self) else SPECIALS["<unk>"] for i in ids])

    def byte_counts(self, vocab: int) -> Tensor:
        """Bytes of text each id stands for, [v]; special tokens stand for none."""
        sizes = torch.zeros(vocab, dtype=torch.long)
        sizes[self.reserved:len(self)] = torch.tensor([len(b) for b in sorted(self.ranks, key=self.ranks.get)])
        return sizes

    @functools.cached_property
    def files(self) -> dict[str, str]:
        """name -> text of what save writes, made once: a run saves its tokenizer with every checkpoint.

        Beside each token tokenizer.json lists every pair that could make it, as transformers' own converter does; at most one of them ever comes up.
        """
        ordered = sorted(self.ranks, key=self.ranks.get)
        spelled = {b: spell(b) for b in ordered}
        merges = [[spelled[a], spelled[b]] for token in ordered for a, b in splits(token, self.ranks)]
        level = dict(type="ByteLevel", add_prefix_space=False, trim_offsets=False, use_regex=False)
        split = dict(type="Split", pattern=dict(Regex=self.pattern), behavior="Isolated", invert=False)
        added = [dict(id=i, content=name, single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)
                 for name, i in self.specials.items()]
        model = dict(type="BPE", dropout=None, unk_token=None, continuing_subword_prefix=None, end_of_word_suffix=None, fuse_unk=False,
                     byte_fallback=False, ignore_merges=True, vocab={**self.specials, **{spelled[b]: self.reserved + self.ranks[b] for b in ordered}},
                     merges=merges)
        whole = dict(version="1.0", truncation=None, padding=None, added_tokens=added, normalizer=None,
                     pre_tokenizer=dict(type="Sequence", pretokenizers=[split, level]), post_processor=level, decoder=level, model=model)
        # a chat ends with <|im_end|>, which is what the released files call eos; generation stops at </s> as well
        settings = dict(tokenizer_class="PreTrainedTokenizerFast", bos_token="<s>", eos_token="<|im_end|>", unk_token="<unk>", pad_token="<unk>",
                        add_bos_token=False, add_eos_token=False, clean_up_tokenization_spaces=False,
                        model_input_names=["input_ids", "attention_mask"])
        return {"tokenizer.tiktoken": "".join(f"{base64.b64encode(b).decode()} {self.ranks[b]}\n" for b in ordered),
                "tokenizer_specials.json": json.dumps(dict(pattern=self.pattern, specials=self.specials), indent=1),
                "tokenizer.json": json.dumps(whole, ensure_ascii=False), "tokenizer_config.json": json.dumps(settings, indent=1),
                "chat_template.jinja": CHAT_TEMPLATE, "generation_config.json": json.dumps(GENERATION, indent=1)}

    def save(self, folder: str | Path) -> None:
        """tokenizer.tiktoken: one line a token, base64 bytes and rank. tokenizer_specials.json: pattern and special tokens. For transformers and
        vLLM: tokenizer.json, tokenizer_config.json, chat_template.jinja and generation_config.json, as in the released folders."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in self.files.items(): (folder / name).write_text(text, encoding="utf-8")

    @classmethod
    def load(cls, folder: str | Path) -> Tokenizer:
        """What save wrote; a released folder, which has no tokenizer.tiktoken, is read by from_directory."""
        folder = Path(folder)
        if not (folder / "tokenizer.tiktoken").exists():
            if (folder / "tokenizer.json").exists(): return cls.from_directory(folder)
            raise ValueError(f"{folder} has no tokenizer.tiktoken: give a folder that Tokenizer.save wrote, or a released one.")
        pairs = (line.split() for line in (folder / "tokenizer.tiktoken").read_text().splitlines())
        settings = json.loads((folder / "tokenizer_specials.json").read_text(encoding="utf-8"))
        return cls({base64.b64decode(b): int(rank) for b, rank in pairs}, settings["pattern"], settings["specials"])
