"""Released tokenizers, both ways: ids read from a tokenizer.json of 131,072 entries, and folders of ours that transformers opens and renders."""
import base64
import importlib
import itertools
import json
import random
import unicodedata
from pathlib import Path

import pytest
import tokenizers
import transformers
from transformers.convert_slow_tokenizer import bytes_to_unicode

from data import corpus, tasks
from data import tokenizer as module
from data.tokenizer import SPECIALS, Tokenizer

nemotron, sft = (importlib.import_module(m) for m in ("04_model", "06_sft"))
ROOT = Path(__file__).parent.parent
MICRO = nemotron.ModelConfig(pattern="MEM*E", d_model=32, vocab=700, heads=2, kv_heads=1, head_dim=16, mamba_heads=16, mamba_head_dim=2, groups=1,
                             state=8, chunk=16, experts=4, experts_per_token=2, latent=16, expert_width=16, shared_width=16)

# pieces of text on which tokenizers differ: scripts, joined emoji, runs of blanks, digits of all kinds, marks without a letter, odd line ends
PIECES = ["The quick brown fox", "don't", " HTTPServer2", "naïve café", "Größe ẞ", "Привет, мир", "Ελληνικά", "שָׁלוֹם", "السلام عليكم",
          "नमस्ते", "ไทย", "한국어", "日本語のテキスト", "中文字符，标点。", "ქართული", "አማርኛ", "ᏣᎳᎩ", "𝔘𝔫𝔦𝔠𝔬𝔡𝔢", "ǅ ǈ", "ﬁ", "e\u0301", "\u0301",
          "👩‍👩‍👧‍👦", "🏳️‍🌈", "🇩🇪", "👍🏽", " ", "  ", "       ", "\t", "\t\t", "\n", "\n\n\n", "\r\n", "\r", " \n", "\n ", " \n \n", "\u00a0",
          "\u2003", "\u3000", "\u2028", "\x85", "\x0b", "0", "12345", "3.14159", "1e-9", "٣٤٥", "Ⅻ", "½", "x²", "\x00", "\x1b[0m", "\x7f",
          "\ufeff", "\u200b", "\u202e", "\ufffd", "\U0010ffff", "\ue000", "!!!", "...", "==>", "//\n", "/*", "*/\n/", "#include <a.h>\n",
          "    return x;\n", "\tif x:\n\t\tpass\n", "a_b", "__init__", "{'k': [1, 2]}", "</s>", "<|im_start|>", "<think>", "<SPECIAL_20>",
          "<tool_call>", "$x^2$", "https://a.b/c?d=e&f=g#h", "ſ", "İ", "ﷺ"]


def texts(n: int, seed: int = 0) -> list[str]:
    """Code and prose as they are, n random mixtures of the pieces, n strings of random code points, and n random bytes read as text."""
    rng = random.Random(seed)
    points = [c for c in range(0x110000) if not 0xD800 <= c < 0xE000]
    mixed = ["".join(rng.choices(PIECES, k=rng.randrange(1, 12))) for _ in range(n)]
    point = lambda: chr(rng.choice(points) if rng.random() < 0.5 else rng.randrange(0x20, 0x3000))
    odd = ["".join(point() for _ in range(rng.randrange(1, 20))) for _ in range(n)]
    broken = [rng.randbytes(rng.randrange(1, 40)).decode("utf-8", "replace") for _ in range(n)]
    whole = [path.read_text() for path in (ROOT / "06_sft.py", ROOT / "README.md", ROOT / "kernels/ssd.py") if path.exists()]
    return ["", *PIECES, *mixed, *odd, *broken, *whole, *itertools.islice(corpus.stories_and_facts(0), 20), "a" * 3000, " " * 3000, "ab " * 1000]


# ---- reading: Mistral's Tekken v3, whose vocabulary the released tokenizer shares

@pytest.fixture(scope="module")
def tekken():
    """(mistral-common's tokenizer, its file as data)"""
    common = pytest.importorskip("mistral_common")
    from mistral_common.tokens.tokenizers.tekken import Tekkenizer
    file = Path(common.__file__).parent / "data" / "tekken_240911.json"
    return Tekkenizer.from_file(file), json.loads(file.read_text())


# typed from what is published of the released tokenizer, in the order of the ids; the rest of the 1,000 are <SPECIAL_n>
RELEASED = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]",
            "[TOOL_CALLS]", "<|im_start|>", "<|im_end|>", "<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"]


@pytest.fixture(scope="module")
def released(tekken, tmp_path_factory):
    """(folder with a tokenizer.json built by the library tokenizers, that library's tokenizer, ours read from the folder)"""
    spec, to_char = tekken[1], bytes_to_unicode()
    names = RELEASED + [f"<SPECIAL_{i}>" for i in range(len(RELEASED), 1000)]
    tokens = [base64.b64decode(entry["token_bytes"]) for entry in spec["vocab"][:131_072 - 1000]]
    spell, known = lambda token: "".join(to_char[b] for b in token), set(tokens)
    vocab = {**{name: i for i, name in enumerate(names)}, **{spell(token): 1000 + i for i, token in enumerate(tokens)}}
    merges = [(spell(t[:i]), spell(t[i:])) for t in tokens for i in range(1, len(t)) if t[:i] in known and t[i:] in known]
    theirs = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, merges, fuse_unk=False, ignore_merges=True))
    theirs.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([
        tokenizers.pre_tokenizers.Split(tokenizers.Regex(spec["config"]["pattern"]), "isolated"),
        tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    theirs.decoder = tokenizers.decoders.ByteLevel()
    theirs.add_special_tokens(names)
    folder = tmp_path_factory.mktemp("released")
    theirs.save(str(folder / "tokenizer.json"))
    theirs.encode_special_tokens = True      # names of special tokens in a text stay text, as in ours
    return folder, theirs, Tokenizer.from_directory(folder)


def test_every_id_is_the_one_that_mistral_and_tokenizers_give(tekken, released):
    """Three programs, one answer, on some 5,000 texts. A merge out of order, or a byte spelled wrong, shows in rare words only."""
    (mistral, _), (_, theirs, ours) = tekken, released
    for text in texts(1500):
        ids = ours.encode(text)
        assert ids == theirs.encode(text, add_special_tokens=False).ids == mistral.encode(text, bos=False, eos=False), repr(text[:200])
        assert ours.decode(ids) == text


def test_every_character_is_read_alike_in_three_places(tekken, released):
    """Between letters, behind a blank, before a digit: two engines match the pattern, and their tables of Unicode must not differ."""
    (mistral, _), (_, theirs, ours) = tekken, released
    step = 997      # characters a text; a difference then names its text
    for start in range(0, 0x110000, step):
        part = [chr(c) for c in range(start, min(start + step, 0x110000)) if unicodedata.category(chr(c)) not in ("Cs", "Cn")]
        text = "".join(f"a{c}b {c}\n{c}1" for c in part)
        if text: assert ours.encode(text) == theirs.encode(text, add_special_tokens=False).ids == mistral.encode(text, False, False), hex(start)


def test_published_ids(tekken, released):
    """checkpoints of Nano, Super and Ultra: 131,072 ids, the first thousand special; text lies behind them in Tekken's order."""
    _, theirs, ours = released
    assert len(ours) == theirs.get_vocab_size() == tekken[0].n_words == 131_072
    assert list(ours.specials.values()) == list(range(1000)) and list(ours.specials)[:18] == RELEASED and ours.reserved == 1000
    assert all(ours.specials[name] == i for name, i in SPECIALS.items()) and ours.eos == 2
    assert ours.encode("2024\x00") == [1000 + ord(c) for c in "2024\x00"]      # single bytes, digits one by one
    assert ours.decode([10, 999, 1000 + 65, 131_071]) == "<|im_start|><SPECIAL_999>A" + tekken[0].decode([131_071])
    assert ours.encode("\ud800x") == ours.encode("\ufffdx")      # half a character
    counts, text = ours.byte_counts(131_072), "".join(PIECES)
    assert counts[ours.encode(text)].sum() == len(text.encode()) and counts[:1000].sum() == 0 and counts[1000:].min() == 1


def test_a_released_tokenizer_survives_saving(released, tmp_path):
    """Written as ours, it is read by load, by from_directory, by tokenizers and by transformers, and all give the same ids."""
    _, theirs, ours = released
    ours.save(tmp_path)
    loaded, library = Tokenizer.load(tmp_path), tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    library.encode_special_tokens = True
    auto = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.specials == ours.specials and loaded.ranks == ours.ranks and list(loaded.ranks) == list(ours.ranks)
    for text in texts(60, seed=1):
        ids = ours.encode(text)
        assert loaded.encode(text) == library.encode(text).ids == auto(text, split_special_tokens=True)["input_ids"] == ids
    assert len(auto) == 131_072 and auto.convert_tokens_to_ids(RELEASED) == list(range(18))


# ---- reading: what else may come

@pytest.fixture(scope="module")
def small():
    return Tokenizer.train(itertools.islice(corpus.stories_and_facts(0), 60), 700)


@pytest.fixture
def edited(small, tmp_path):
    """from_directory behind a change of the file's data."""
    def read(change):
        spec = json.loads(small.files["tokenizer.json"])
        change(spec)
        (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
        return Tokenizer.from_directory(tmp_path)
    return read


def test_merges_are_read_in_both_forms(small, edited):
    def as_strings(spec): spec["model"]["merges"] = [" ".join(pair) for pair in spec["model"]["merges"]]
    assert edited(as_strings).ranks == edited(lambda spec: None).ranks == small.ranks


def drop_merges_of(token):
    def change(spec): spec["model"]["merges"] = [pair for pair in spec["model"]["merges"] if "".join(pair) != token]
    return change


def set_key(*keys, to):
    def change(spec):
        for key in keys[:-1]: spec = spec[key]
        spec[keys[-1]] = to
    return change


def renamed(spec): spec["added_tokens"][12]["content"] = "<thought>"; spec["model"]["vocab"]["<thought>"] = spec["model"]["vocab"].pop("<think>")
def no_byte(spec): del spec["model"]["vocab"]["Ġ"]; spec["model"]["vocab"]["▁"] = 64
def late_special(spec): spec["added_tokens"][31]["id"], spec["model"]["vocab"]["Ā"] = 32, 31


@pytest.mark.parametrize("change, message", [
    (set_key("model", "type", to="Unigram"), "no plain byte-level BPE .model Unigram"),
    (set_key("model", "byte_fallback", to=True), "no plain byte-level BPE .model BPE .byte_fallback"),
    (set_key("normalizer", to=dict(type="NFC")), "normalizer NFC"),
    (set_key("pre_tokenizer", to=dict(type="Metaspace")), "pre_tokenizer .'Metaspace'"),
    (set_key("pre_tokenizer", "pretokenizers", 0, "behavior", to="Removed"), "another way than at the matches of one pattern"),
    (set_key("pre_tokenizer", "pretokenizers", 1, "use_regex", to=True), "another way than at the matches of one pattern"),
    (set_key("pre_tokenizer", "pretokenizers", 0, "pattern", "Regex", to=r"\p{L}+|\s+"), "leaves characters out"),
    (no_byte, "'▁' is not spelled in bytes, so this is no byte-level BPE"),
    (set_key("model", "vocab", "Ġthe", to=5000), "no token has id [0-9]+, and others have higher ids"),
    (set_key("model", "vocab", "Ġthe", to=40), "two tokens have id 40"),
    (late_special, "special tokens are not the first 32 ids"),
    (renamed, "<think> has id None, and the chat format here needs it at 12"),
    (lambda spec: spec["model"]["merges"].insert(0, ["q", "q"]), "merge q . q takes or makes a token that the vocabulary does not have"),
    (lambda spec: spec["model"]["merges"].append("a b c"), "takes or makes a token"),
    (lambda spec: spec["model"]["merges"].append(spec["model"]["merges"][0]), "comes behind a merge that makes a higher id"),
    (drop_merges_of("Ġthe"), "token Ġthe is made from Ġt . he, which is no merge there|token Ġthe is made from Ġth . e, which is no merge there"),
])
def test_a_file_that_cannot_be_read_is_refused_in_a_sentence(edited, change, message):
    """Each of these would give other ids than its own library, on some texts only."""
    with pytest.raises(ValueError, match=message): edited(change)


def test_folders_without_a_whole_file_are_refused(small, tmp_path):
    with pytest.raises(ValueError, match="has no tokenizer.json: give a folder with a released tokenizer"): Tokenizer.from_directory(tmp_path)
    with pytest.raises(ValueError, match="has no tokenizer.tiktoken: give a folder"): Tokenizer.load(tmp_path)
    for text in (small.files["tokenizer.json"][:5000], "", "3", "[1]"):
        (tmp_path / "tokenizer.json").write_text(text)
        with pytest.raises(ValueError, match="cut short or damaged"): Tokenizer.from_directory(tmp_path)


def test_files_that_pass_the_check_give_the_library_s_ids(tmp_path):
    """Random vocabularies, merges left out at random: whatever check_merges lets pass agrees on every word of five letters. This is the claim of
    its comment, that one text per token is enough; a check of order alone lets files pass whose ids differ."""
    rng, passed, refused, wrong_without = random.Random(0), 0, 0, 0
    words = ["".join(w) for n in (1, 2, 3, 4, 5) for w in itertools.product("abc", repeat=n)]
    for _ in range(400):
        tokens = [bytes([b]) for b in range(256)]
        for _ in range(rng.randrange(2, 9)):      # now and then a token that no merge makes, or one before its parts
            parts = tokens[97:100] + tokens[256:]
            new = rng.choice(parts) + rng.choice(parts) if rng.random() < 0.8 else bytes(rng.choices(b"abc", k=rng.randrange(2, 5)))
            if new not in tokens: tokens.append(new)
        ranks = {token: i for i, token in enumerate(tokens)}
        merges = [[module.spell(a), module.spell(b)] for token in tokens for a, b in module.splits(token, ranks) if rng.random() < 0.85]
        vocab, whole_words = {module.spell(token): i for token, i in ranks.items()}, rng.random() < 0.5
        theirs = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, [tuple(m) for m in merges], ignore_merges=whole_words))
        ours = Tokenizer(ranks, "[\\s\\S]+", dict(x=0))
        differ = any([i - 1 for i in ours.encode(word)] != theirs.encode(word).ids for word in words)
        try: module.check_merges(tmp_path, merges, {spelled: module.unspell(spelled) for spelled in vocab}, ranks, whole_words)
        except ValueError: refused += 1; wrong_without += differ; continue
        passed += 1
        assert not differ, (tokens[256:], merges)
    assert passed > 50 and wrong_without > 50, (passed, refused, wrong_without)


def test_a_token_that_no_merge_makes_is_found_as_a_word(tmp_path):
    """"abc" without "ab" and "bc": a word of its own, never a part of one. Written without ignore_merges it would be lost."""
    made = Tokenizer({**{bytes([b]): b for b in range(256)}, b"abc": 256})
    made.save(tmp_path)
    library = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    a, b, c = (32 + ord(letter) for letter in "abc")
    for text, ids in (("abc", [288]), ("abca", [a, b, c, a])):
        assert made.encode(text) == library.encode(text).ids == Tokenizer.from_directory(tmp_path).encode(text) == ids


def test_bytes_are_spelled_as_the_library_spells_them():
    assert module.BYTE_CHARS == bytes_to_unicode()
    assert all(module.unspell(module.spell(bytes([b, 32]))) == bytes([b, 32]) for b in range(256))
    assert module.spell(b" a\n") == "ĠaĊ" and module.unspell("a b") is None and module.unspell("") is None


# ---- writing

@pytest.fixture(scope="module")
def checkpoint(small, tmp_path_factory):
    """(a checkpoint's folder, transformers' tokenizer from it)"""
    folder = tmp_path_factory.mktemp("checkpoint")
    nemotron.save_checkpoint(folder, nemotron.Nemotron(MICRO), small)
    return folder, transformers.AutoTokenizer.from_pretrained(folder)


def test_transformers_opens_our_checkpoint_and_gives_our_ids(small, checkpoint):
    _, auto = checkpoint
    for text in texts(150, seed=2):
        ids = small.encode(text)
        assert auto(text, split_special_tokens=True)["input_ids"] == ids and auto.decode(ids) == text
    assert {name: auto.convert_tokens_to_ids(name) for name in small.specials} == small.specials and len(auto) == len(small)
    assert (auto.bos_token_id, auto.eos_token_id, auto.unk_token_id) == (1, 11, 0)
    assert auto.decode(small.encode("a") + [11, 2], skip_special_tokens=True) == "a"


def test_generation_stops_at_both_ends_and_samples_as_the_model_card_says(checkpoint):
    """A chat turn ends with 11, a document with 2; a server that knows one of them runs on behind the other."""
    found = transformers.GenerationConfig.from_pretrained(checkpoint[0])
    ours = nemotron.SamplingParams()
    assert found.eos_token_id == [2, 11] == list(ours.stop_ids) and (found.temperature, found.top_p) == (1.0, 0.95) == (ours.temperature, ours.top_p)
    assert found.do_sample and found.bos_token_id == 1


def test_folders_of_every_kind_are_loaded(small, tmp_path):
    """Checkpoints of earlier versions have two files, released ones one."""
    old, new = tmp_path / "old", tmp_path / "new"
    old.mkdir(), new.mkdir()
    lines = [f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in small.ranks.items()]
    (old / "tokenizer.tiktoken").write_text("".join(lines))
    (old / "tokenizer_specials.json").write_text(json.dumps(dict(pattern=module.PATTERN, specials=small.specials)))
    (new / "tokenizer.json").write_text(small.files["tokenizer.json"], encoding="utf-8")
    for folder in (old, new):
        found = Tokenizer.load(folder)
        assert found.files == small.files and found.encode("".join(PIECES)) == small.encode("".join(PIECES))


def test_files_are_made_once_for_all_checkpoints(tmp_path, monkeypatch):
    """A run saves its tokenizer with every checkpoint; the merges of a large one take a second to list."""
    asked, splits = [], module.splits
    monkeypatch.setattr(module, "splits", lambda token, ranks: asked.append(token) or splits(token, ranks))
    tokenizer = Tokenizer.train(["a few words, a few more words"], 300)
    for step in range(3): tokenizer.save(tmp_path / str(step))
    assert len(asked) == len(tokenizer.ranks)
    assert len({(tmp_path / str(step) / "tokenizer.json").read_bytes() for step in range(3)}) == 1


# ---- the chat template against 06_sft.render_chat

TOOLS = [dict(name="calc", description=" Computes a sum. ", parameters={"a": dict(type="string", description="the sum")}, required=["a"]),
         dict(name="now", description="", parameters={}),
         dict(name="find", parameters=dict(type="object", properties=dict(
             q=dict(type=["string", "null"], description="what\n", default=None, minLength=2, pattern="<a&b>"),
             kind=dict(enum=["x", 1, True], examples=dict(k=[1.5])), more={}), required=[], additionalProperties=False), strict=True),
         dict(type="function", function=dict(name="put", description="Writes.", parameters=dict(
             type="object", properties=dict(v=dict(type="number", description="é ö", enum=["é", "ß"], default=["ü"])), required=["v"])))]
WORDS = ["yes", " no ", "Grüße 👍", "x = 1\n", "\n\n", "\tif", "# Tools", "{{ system }}", "{% raw %}", "<b>&amp;</b>", "'q' \"r\"", "12", "",
         "\\n", "   "]
VALUES = ["2+2", "two\nlines", "", 3, 2.5, True, None, [1, "é"], dict(k=[None, "<"], s="ß"), "{}"]


def conversation(rng: random.Random, ends: bool) -> list[dict]:
    """Random turns in the order that a conversation has; ends: with an answer, else before one."""
    say = lambda: "".join(rng.choices(WORDS, k=rng.randrange(4)))
    def answer(calls):
        thought = rng.choice([None, "", " \n", "Hm." + say(), "One.\nTwo." + say()])
        arguments = lambda: {f"a{i}": rng.choice(VALUES) for i in range(rng.randrange(3))}
        called = [dict(name=rng.choice(["calc", "put"]), arguments=arguments()) for _ in range(calls)]
        return dict(role="assistant", content=rng.choice([say(), None]) if calls else say(), reasoning=thought, tool_calls=called)
    talk = [dict(role="system", content=say())] if rng.random() < 0.5 else []
    for turn in range(rounds := rng.randrange(1, 4)):
        talk.append(dict(role="user", content=say()))
        for _ in range(rng.randrange(3)):
            talk.append(answer(rng.randrange(1, 3)))
            talk += [dict(role="tool", content=say()) for _ in range(rng.randrange(1, 3))]
        if ends or turn + 1 < rounds: talk.append(answer(0))
    return talk


def openai(message: dict) -> dict:
    """The same message with OpenAI's names."""
    out = {key: value for key, value in message.items() if key not in ("reasoning", "tool_calls")}
    if message.get("reasoning") is not None: out["reasoning_content"] = message["reasoning"]
    if message.get("tool_calls"): out["tool_calls"] = [dict(type="function", id="0", function=call) for call in message["tool_calls"]]
    return out


def template_settings(mode, style, keep) -> dict:
    effort = "medium_effort" if style == "ultra" else "low_effort"
    return dict(style=style, truncate_history_thinking=not keep, **dict(regular={}, medium={effort: True}, off=dict(enable_thinking=False))[mode])


@pytest.mark.parametrize("style", ["ultra", "nano"])
@pytest.mark.parametrize("mode", ["regular", "medium", "off"])
def test_the_template_renders_what_render_chat_renders(small, checkpoint, mode, style):
    """150 conversations each, text for text and id for id, in our form and in OpenAI's. A server's prompt must be what the model was trained on."""
    auto, rng, seen = checkpoint[1], random.Random(f"{mode} {style}"), 0
    for i in range(150):
        ends, keep, tools = i % 2 == 0, rng.random() < 0.3, rng.sample(TOOLS, rng.randrange(len(TOOLS))) if rng.random() < 0.6 else []
        talk = conversation(rng, ends)
        ids, _ = sft.render_chat(talk, mode, style, tokenizer=small, tools=tools, generation_prompt=not ends, keep_history_thinking=keep)
        how = dict(tools=tools or None, add_generation_prompt=not ends, **template_settings(mode, style, keep))
        assert auto.apply_chat_template(talk, tokenize=False, **how) == small.decode(ids), talk
        assert auto.apply_chat_template(talk, **how)["input_ids"] == ids, talk
        assert auto.apply_chat_template([openai(m) for m in talk], tokenize=False, **how) == small.decode(ids)
        seen += any(m.get("tool_calls") for m in talk)
    assert seen > 50


def test_the_defaults_are_the_released_ones(small, checkpoint):
    """Thinking on, full effort, history cut, Ultra's style; typed by hand from the released format, so that both renderers cannot err alike."""
    talk = [dict(role="user", content="2+2?"), dict(role="assistant", content="4", reasoning_content="Sum."), dict(role="user", content="why?")]
    head = "<|im_start|>system\n<|im_end|>\n<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n"
    past, now = head + "<think></think>4<|im_end|>\n<|im_start|>user\nwhy?", "<|im_end|>\n<|im_start|>assistant\n<think>"
    render = lambda **how: checkpoint[1].apply_chat_template(talk, tokenize=False, add_generation_prompt=True, **how)
    assert render() == past + now + "\n"
    assert render(enable_thinking=False) == past + now + "</think>"
    assert render(medium_effort=True) == past + "\n\n{reasoning effort: efficient}" + now + "\n"
    assert render(low_effort=True, style="nano") == past.replace("</think>4", "</think>\n4") + "\n\n{reasoning effort: low}" + now + "\n"
    assert render(truncate_history_thinking=False) == past.replace("</think>4", "\nSum.</think>4") + now + "\n"
    note = checkpoint[1].apply_chat_template(talk, tools=TOOLS[:1], tool_note="\n\nNote.", tokenize=False)
    assert note == small.decode(sft.render_chat(talk, tokenizer=small, tools=TOOLS[:1], tool_note="\n\nNote.", generation_prompt=True)[0])[:len(note)]
    with pytest.raises(Exception, match="unknown role critic"): checkpoint[1].apply_chat_template([dict(role="critic", content="x")])


def test_every_built_in_question_is_rendered_alike(small, checkpoint):
    """Worked answers of all families, with the tools they call: what SFT learns from is what the template writes."""
    rng, config, n = random.Random(3), sft.SFTConfig(), 0
    for family in tasks.ENVIRONMENTS:
        for task in tasks.draw(family, 0, 2, seed=0):
            for talk in sft.conversations_of(task, "any", config, small, rng):
                if talk.cut: continue      # its reasoning ends anywhere, and </think> is somebody else's
                ids, _ = sft.render_chat(talk.messages, talk.mode, tokenizer=small, tools=talk.tools)
                how = dict(tools=list(talk.tools) or None, **template_settings(talk.mode, "ultra", False))
                assert checkpoint[1].apply_chat_template(talk.messages, **how)["input_ids"] == ids
                n += 1
    assert n > 40


def test_where_template_and_render_chat_part(tmp_path):
    """A thought that begins with a blank or a line end: the text is equal, but render_chat cuts where generation begins, and the template knows no
    such place. And a special token's name in a message: text to render_chat, the token to the template."""
    joined = Tokenizer.train(["a\n\n" * 50], 300)      # with a token for two line ends
    joined.save(tmp_path)
    auto, talk = transformers.AutoTokenizer.from_pretrained(tmp_path), [dict(role="user", content="q")]
    whole = [*talk, dict(role="assistant", reasoning="\nHm.", content="a")]
    (prompt, _), (ids, _) = sft.render_chat(talk, tokenizer=joined, generation_prompt=True), sft.render_chat(whole, tokenizer=joined)
    assert auto.apply_chat_template(whole, tokenize=False) == joined.decode(ids)
    assert ids[:len(prompt)] == prompt != auto.apply_chat_template(whole)["input_ids"][:len(prompt)]
    talk = [dict(role="user", content="<|im_end|>")]
    ids, _ = sft.render_chat(talk, tokenizer=joined, generation_prompt=True)
    assert ids.count(11) == 2 and auto.apply_chat_template(talk, add_generation_prompt=True)["input_ids"].count(11) == 3
    assert auto.apply_chat_template(talk, tokenize=False, add_generation_prompt=True) == joined.decode(ids)
