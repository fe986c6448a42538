"""Stage 06: the chat format to the token, packs that change no loss, both normalisations, and a run that repeats and resumes to the bit."""
import importlib
import itertools
import json
import math
import random
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from data import corpus, tasks

nvfp4, model04, pretrain, stage = (importlib.import_module(m) for m in ("01_nvfp4", "04_model", "05_pretrain", "06_sft"))
# the smallest sizes that stage 04 accepts, with every kind of layer and the MTP head
MICRO = model04.ModelConfig(pattern="MEM*E", d_model=32, vocab=320, heads=2, kv_heads=1, head_dim=16, mamba_heads=16, mamba_head_dim=2, groups=1,
                            state=8, chunk=16, experts=4, experts_per_token=2, latent=16, expert_width=16, shared_width=16)
CALC = dict(name="calc", description=" Computes a sum. ", parameters={"a": dict(type="string", description="the sum")}, required=["a"])


def user(text): return dict(role="user", content=text)
def tool(text): return dict(role="tool", content=text)
def says(content, reasoning=None, calls=(), **more):
    return dict(role="assistant", content=content, reasoning=reasoning, tool_calls=list(calls), **more)
def call(name="calc", **arguments): return dict(name=name, arguments=arguments)


@pytest.fixture(scope="module")
def tokenizer():
    return stage.Tokenizer.train(itertools.islice(corpus.stories_and_facts(0), 40), 320)


@pytest.fixture
def render(tokenizer):
    """(text, the parts of it that are learnt, joined with |)"""
    def text_and_learnt(messages, mode="regular", style="ultra", **kwargs):
        ids, mask = stage.render_chat(messages, mode, style, tokenizer=tokenizer, **kwargs)
        assert len(ids) == len(mask)
        runs = [[i for i, _ in group] for learn, group in itertools.groupby(zip(ids, mask), key=lambda pair: pair[1]) if learn]
        return tokenizer.decode(ids), "|".join(tokenizer.decode(run) for run in runs)
    return text_and_learnt


# ---- chat format

def test_a_question_and_its_answer_in_every_mode(render):
    """Typed from the released format. A newline before </think>, or a missing system block, makes every prompt of a served model a foreign one."""
    talk = [user("2+2?"), says("4", "Two and two.")]
    head = "<|im_start|>system\n<|im_end|>\n<|im_start|>user\n2+2?"
    assert render(talk) == (head + "<|im_end|>\n<|im_start|>assistant\n<think>\nTwo and two.</think>4<|im_end|>\n", "Two and two.</think>4<|im_end|>")
    assert render(talk, "medium") == (head + "\n\n{reasoning effort: efficient}<|im_end|>\n<|im_start|>assistant\n<think>\nTwo and two.</think>4"
                                      "<|im_end|>\n", "Two and two.</think>4<|im_end|>")
    assert render(talk, "off") == (head + "<|im_end|>\n<|im_start|>assistant\n<think></think>4<|im_end|>\n", "4<|im_end|>")
    for empty in (None, "", " \n"): assert render([user("2+2?"), says("4", empty)]) == render(talk, "off")


def test_generation_begins_behind_the_open_or_the_closed_think_tag(render):
    head = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    talk = [dict(role="system", content="Be brief."), user("Hi")]
    assert render(talk, generation_prompt=True) == (head + "<think>\n", "")
    assert render(talk, "off", generation_prompt=True) == (head + "<think></think>", "")


def test_nano_style_has_newlines_around_the_end_of_thinking(render):
    """Nano and Super were trained with them, Ultra without; Super's word for less effort is another one."""
    talk = [user("2+2?"), says("4", "Sum.")]
    assert render(talk, style="nano") == ("<|im_start|>system\n<|im_end|>\n<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n<think>\nSum.\n"
                                          "</think>\n4<|im_end|>\n", "Sum.\n</think>\n4<|im_end|>")
    assert "2+2?\n\n{reasoning effort: low}<|im_end|>" in render(talk, "medium", "nano")[0]
    past = [*talk, user("why?"), says("so", "Hm.")]
    assert "assistant\n<think></think>\n4<|im_end|>" in render(past, style="nano")[0]      # the newline stays where the thinking was
    called = [user("q"), says("", "Ask.", [call(a=1)]), tool("2"), says("2", "Done.")]
    assert "<think>\nAsk.\n</think>\n<tool_call>\n<function=calc>" in render(called, style="nano")[0]


def test_tools_calls_and_responses(render):
    """Typed from NVIDIA's published template: XML definitions behind the system text, responses in one user block, a line end behind each call."""
    calls = [call(a="2+2"), call(a="3+3", b=[1])]
    talk = [dict(role="system", content="Be exact."), user("2+2 and 3+3?"), says("", "Ask.", calls), tool("4"), tool("6"), says("4 and 6", "Both.")]
    text, learnt = render(talk, tools=[CALC])
    assert text == ("<|im_start|>system\nBe exact.\n\n# Tools\n\nYou have access to the following functions:\n\n<tools>\n<function>\n"
                    "<name>calc</name>\n<description>Computes a sum.</description>\n<parameters>\n<parameter>\n<name>a</name>\n<type>string</type>\n"
                    '<description>the sum</description>\n</parameter>\n<required>["a"]</required>\n</parameters>\n</function>\n</tools><|im_end|>\n'
                    "<|im_start|>user\n2+2 and 3+3?<|im_end|>\n"
                    "<|im_start|>assistant\n<think>\nAsk.</think>\n<tool_call>\n<function=calc>\n<parameter=a>\n2+2\n</parameter>\n</function>\n"
                    "</tool_call>\n<tool_call>\n<function=calc>\n<parameter=a>\n3+3\n</parameter>\n<parameter=b>\n[1]\n</parameter>\n</function>\n"
                    "</tool_call>\n<|im_end|>\n"
                    "<|im_start|>user\n<tool_response>\n4\n</tool_response>\n<tool_response>\n6\n</tool_response>\n<|im_end|>\n"
                    "<|im_start|>assistant\n<think>\nBoth.</think>4 and 6<|im_end|>\n")
    first, second = learnt.split("|im_end|>|")      # nothing of the responses
    assert first.startswith("Ask.</think>\n<tool_call>") and first.endswith("</tool_call>\n<") and second == "Both.</think>4 and 6<|im_end|>"
    assert "</tools>\n\nNote.<|im_end|>" in render(talk, tools=[CALC], tool_note="\n\nNote.")[0]
    assert "<|im_start|>system\n# Tools\n" in render(talk[1:], tools=[CALC])[0]
    off = render(talk, "off", tools=[CALC])
    assert "assistant\n<think></think>\n<tool_call>" in off[0] and off[1].startswith("\n<tool_call>")      # the model writes that newline
    assert "<think>\nAsk.</think>I ask.\n<tool_call>" in render([*talk[:2], says("I ask. ", "Ask.", [call()])], tools=[CALC])[0]


def test_a_json_schema_reads_like_our_short_form(render):
    properties = dict(a=dict(type="string", description="the sum", default=[1]))
    schema = dict(type="object", properties=properties, required=["a"], additionalProperties=False)
    wrapped = dict(type="function", function=dict(name="calc", description="Computes a sum.", parameters=schema))
    text = stage.tools_text([wrapped])
    assert "</description>\n<default>[1]</default>\n</parameter>\n<additionalProperties>False</additionalProperties>\n<required>" in text
    for extra in ("\n<default>[1]</default>", "\n<additionalProperties>False</additionalProperties>"): text = text.replace(extra, "")
    assert text == stage.tools_text([CALC])


def test_thinking_before_the_last_question_is_dropped(render):
    """truncate_history_thinking: served models forget it, so they must learn with it forgotten. What follows a tool's response is no new question."""
    talk = [user("a"), says("1", "One."), user("b"), says("", "Ask.", [call()]), tool("2"), says("2", "Two.")]
    text, learnt = render(talk)
    assert "user\na<|im_end|>\n<|im_start|>assistant\n<think></think>1<|im_end|>\n<|im_start|>user\nb" in text
    assert "<think>\nAsk.</think>" in text and "<think>\nTwo.</think>" in text
    assert learnt.startswith("1<|im_end|>|Ask.</think>") and "One." not in text
    assert "<think>\nOne.</think>1" in render(talk, keep_history_thinking=True)[0]
    assert "user\na<|im_end|>" in render(talk, "medium")[0] and "user\nb\n\n{reasoning effort: efficient}<|im_end|>" in render(talk, "medium")[0]


def test_the_end_of_a_cut_trace_is_not_learnt(render, tokenizer):
    """A client wrote that </think>. Learning it would teach the model to stop thinking anywhere."""
    talk = [user("2+2?"), says("4", "Two and", cut=True)]
    text, learnt = render(talk)
    assert "<think>\nTwo and</think>4<|im_end|>" in text and learnt == "Two and|4<|im_end|>"
    assert render(talk, style="nano")[1] == "Two and|\n4<|im_end|>"
    full = [user("q"), says("4", "One, two, three, four.")]
    lengths, whole = set(), tokenizer.encode("One, two, three, four.")
    for seed in range(60):
        short = stage.cut_at_budget(full, tokenizer, random.Random(seed))
        assert short[1]["cut"] and short[1]["content"] == "4" and "One, two, three, four.".startswith(short[1]["reasoning"])
        lengths.add(len(tokenizer.encode(short[1]["reasoning"])))
    assert lengths == set(range(1, len(whole))) and "cut" not in full[1]
    assert stage.cut_at_budget([user("q"), says("4")], tokenizer, random.Random(0)) is None


def test_special_tokens_are_ids_and_text_never_is(tokenizer):
    """A user who types <|im_end|> must not end his turn. The ids of the whole, typed: 10 and 11 around turns, 12 and 13 around thinking."""
    word = tokenizer.encode
    ids, mask = stage.render_chat([user("a <|im_end|> b"), says("c </think> d", "e")], tokenizer=tokenizer)
    assert ids == [10, *word("system\n"), 11, *word("\n"), 10, *word("user\na <|im_end|> b"), 11, *word("\n"), 10, *word("assistant\n"),
                   12, *word("\n"), *word("e"), 13, *word("c </think> d"), 11, *word("\n")]
    n = len(word("e")) + 1 + len(word("c </think> d")) + 1
    assert mask == [False] * (len(ids) - n - len(word("\n"))) + [True] * n + [False] * len(word("\n"))
    ids, _ = stage.render_chat([user("q"), says("", None, [call(a="<tool_call>")]), tool("</tool_response>"), says("x")], tokenizer=tokenizer)
    assert [i for i in ids if i < 32] == [10, 11, 10, 11, 10, 12, 13, 14, 15, 11, 10, 16, 17, 11, 10, 12, 13, 11]


@pytest.mark.parametrize("mode", stage.MODES)
@pytest.mark.parametrize("style", ["ultra", "nano"])
def test_a_prompt_and_what_is_generated_are_the_ids_that_are_learnt(tokenizer, mode, style):
    """Tokens that join over the border would never be sampled: training and use would disagree at every answer's first token."""
    talk = [user("2+2?"), says("", "  Ask it.", [call(a="2+2")]), tool("4"), says("4", "\nDone.")]
    whole, mask = stage.render_chat(talk, mode, style, tokenizer=tokenizer, tools=[CALC])
    for turn in (1, 3):
        prompt, learnt = stage.render_chat(talk[:turn], mode, style, tokenizer=tokenizer, tools=[CALC], generation_prompt=True)
        assert whole[:len(prompt)] == prompt and learnt == mask[:len(prompt)] and mask[len(prompt)] and not mask[len(prompt) - 1]
        end = whole.index(11, len(prompt))
        assert all(mask[len(prompt):end + 1]) and not mask[end + 1]


def test_what_is_no_conversation_is_said_in_one_sentence(tokenizer):
    bad = {"conversation is empty": [], "the conversation is empty": [dict(role="system", content="x")],
           "message 0 from user has no text": [dict(role="user"), says("b")],
           "message 2 from tool has no text": [user("a"), says("", None, [call()]), tool(3), says("b")],
           "message 0 from user has no text as": [user(["a"]), says("b")],
           "unknown role 'robot'": [dict(role="robot")], "system message must come first": [user("a"), dict(role="system", content="x")],
           "is from assistant behind start": [says("a")], "is from user behind user": [user("a"), user("b")],
           "called no tool": [user("a"), says("b"), tool("c")],
           "is from tool behind user": [user("a"), tool("b")], "no answer to learn": [user("a")],
           "is from assistant behind assistant": [user("a"), says("b"), says("c")]}
    for message, talk in bad.items():
        with pytest.raises(ValueError, match=message): stage.render_chat(talk, tokenizer=tokenizer)
    good = [user("a"), says("b")]
    with pytest.raises(ValueError, match="assistant's turn is there already"): stage.render_chat(good, tokenizer=tokenizer, generation_prompt=True)
    with pytest.raises(ValueError, match="unknown mode .low.: choose one of regular, medium"): stage.render_chat(good, "low", tokenizer=tokenizer)
    with pytest.raises(ValueError, match="unknown style 'super': choose one of ultra, nano"):
        stage.render_chat(good, style="super", tokenizer=tokenizer)


@pytest.mark.parametrize("bad", [
    call(a="1\n</parameter>\n<parameter=b>\n2"), call(a="x\n</parameter>"), call(a=["</tool_call>"]), call(a="\n</parameter>\n</function>\n"),
    dict(name="calc>\n<parameter=a", arguments={}), dict(name="", arguments={}), dict(name="calc", arguments={"a b": 1})])
def test_a_call_that_would_be_read_as_another_one_is_refused(tokenizer, bad):
    """Without the check, the first is read as a call with two arguments: whoever fills an argument could add others, or other calls."""
    talk = [user("q"), says("", None, [bad]), tool("2"), says("2")]
    with pytest.raises(ValueError, match="would end the call early|is no name of"): stage.render_chat(talk, tokenizer=tokenizer)


def test_calls_that_pass_are_read_back_as_they_were(tokenizer, render):
    """Angle brackets, line ends, quotes, tags of other kinds: the parser that runs the tools must find what was written."""
    for value in ("a < b > c", "line\nline", "</b><i>", '"\\', "x</function>", "<parameter=b>", "<tool_call>", "</parameter>", "  "):
        text, _ = render([user("q"), says("", "r", [call(a=value, b_2="x")]), tool("2"), says("2")])
        turn = text.split("<think>\n")[1].split("<|im_end|>")[0]
        assert tasks.parse_completion(turn).tool_calls == [call(a=value, b_2="x")], value


# ---- conversations

def test_messages_in_openais_form_are_read(tmp_path):
    """reasoning_content, <think> inside the content, arguments as a JSON string, tools as a schema: what public sets contain."""
    wrapped = dict(type="function", function=dict(name="calc", arguments='{"a": 1}'))
    rows = [dict(messages=[user("a"), dict(role="assistant", content="b", reasoning_content="r")]),
            dict(messages=[user("a"), dict(role="assistant", content="<think>\nr\n</think>\n\nb")], mode="medium"),
            dict(messages=[user("a"), dict(role="assistant", content=None, tool_calls=[wrapped]), dict(role="tool", content="1", tool_call_id="x"),
                           dict(role="assistant", content="1")], tools=json.dumps([CALC]))]
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    one, two, three = stage.read_conversations(str(path))
    assert one.messages == [user("a"), dict(role="assistant", content="b", reasoning="r", tool_calls=[])] and one.mode == "regular"
    assert two.messages[1]["reasoning"] == "r" and two.messages[1]["content"].strip() == "b" and two.mode == "medium"
    assert three.messages[1]["tool_calls"] == [dict(name="calc", arguments={"a": 1})] and three.tools == (CALC,) and three.source == "chats"
    assert one.prompt == two.prompt != stage.Conversation("s", [dict(role="system", content="x"), *one.messages]).prompt
    bad = {"line 1 is no conversation: it is not JSON": "hello", 'line 1 is no conversation: it has no list "messages"': '{"text": "x"}',
           "a message needs a role and text": '{"messages": [{"content": "x"}]}',
           "is from assistant behind start": '{"messages": [{"role": "assistant"}]}',
           "unknown mode 'x'": json.dumps(dict(rows[0], mode="x")), "line 1 is no conversation": '{"messages": ["x"]}'}
    for message, line in bad.items():
        path.write_text(line + "\n")
        with pytest.raises(ValueError, match=message): list(stage.read_conversations(str(path)))
    with pytest.raises(ValueError, match="no such file"): list(stage.read_conversations(str(tmp_path / "none.jsonl")))


def test_a_hub_set_is_streamed_up_to_its_limit(monkeypatch):
    import datasets
    row, given = dict(messages=[user("a"), dict(role="assistant", content="b")]), []
    size = len(json.dumps(row["messages"]))
    def rows():
        for i in range(5000): given.append(i); yield row
    def load(name, config=None, split=None, streaming=False):
        assert (name, config, split, streaming) == ("some/set", None, "train", True)
        return datasets.IterableDataset.from_generator(rows)
    monkeypatch.setattr(datasets, "load_dataset", load)
    found = list(stage.read_conversations("hf:some/set@1KB"))
    assert len(found) == 1000 // size and found[0].source == "some/set" and len(given) < 50
    def broken(*_, **__): raise ConnectionError("no network")
    monkeypatch.setattr(datasets, "load_dataset", broken)
    with pytest.raises(ValueError, match=r"cannot fetch hf:some/set \(no network\)"): list(stage.read_conversations("hf:some/set"))


@pytest.fixture
def three_families(tokenizer):
    """(settings, conversations to learn from, those to look at)"""
    config = stage.SFTConfig(tokens=60_000, families=("calendar_arithmetic", "count_bits", "follow"))
    return config, *(list(stage.task_conversations(config, tokenizer, split)) for split in ("train", "validation"))


def test_nothing_that_is_scored_is_learnt(three_families):
    """Validation questions choose the settings and held-out ones give the score: one of them among the conversations would make either too good."""
    config, learnt, looked_at = three_families
    sides = {split: {task.prompt for family in config.families for task in tasks.draw(family, 0, 3000, 1, split, at_most=True)}
             for split in tasks.SPLITS}
    asked = [{talk.messages[0]["content"] for talk in talks} for talks in (learnt, looked_at)]
    assert asked[0] <= sides["train"] and asked[1] <= sides["validation"] and len(asked[0]) > 100 and len(asked[1]) > 30
    assert not sides["train"] & (sides["validation"] | sides["held_out"]) and not sides["validation"] & sides["held_out"]


def test_each_family_has_its_share_of_the_tokens(three_families, tokenizer):
    """Of 60,000 to learn each gets 20,000, less one question's; the week has so few questions that they come again, and validation never repeats."""
    config, learnt, looked_at = three_families
    lengths = {domain: [sum(stage.render_chat(t.messages, t.mode, tokenizer=tokenizer)[1]) for t in learnt if t.source == domain]
               for domain in ("logic", "numbers", "instructions")}
    for domain, sizes in lengths.items(): assert 20_000 - 2 * max(sizes) < sum(sizes) <= 20_000, domain
    regular = [t.messages[0]["content"] for t in looked_at if t.mode == "regular" and not t.cut]
    assert len(set(regular)) == len(regular)
    few = list(stage.task_conversations(replace(config, tokens=120_000, families=("calendar_arithmetic",)), tokenizer))
    assert sum(t.messages[0] == few[0].messages[0] and t.mode == "regular" and not t.cut for t in few) >= 3


def test_of_files_one_prompt_in_fifty_is_set_aside(config, tokenizer, tmp_path):
    talks = [dict(messages=[user(f"question {i}"), says("b")], mode=mode) for i in range(400) for mode in ("regular", "off")]
    (tmp_path / "many.jsonl").write_text("".join(json.dumps(talk) + "\n" for talk in talks))
    parts = [stage.build_samples(replace(config, data=(str(tmp_path / "many.jsonl"),)), tokenizer, split) for split in ("train", "validation")]
    prompts = [{s.prompt for s in part} for part in parts]
    assert not prompts[0] & prompts[1] and sum(map(len, parts)) == 800 and 2 <= len(prompts[1]) <= 20      # 8 expected: 3 in 10,000 lie outside


# ---- packing

def test_best_fit_by_hand():
    """5 4 3 2 into 7: 4 opens a second pack, 3 fits only there, 2 fits only into the first. First fit and best fit part at 6 3 1 of 9."""
    assert sorted(stage.pack_best_fit([5, 4, 3, 2], 7)) == [[0, 3], [1, 2]]
    assert sorted(stage.pack_best_fit([4, 6, 3], 9, tolerance=0)) == [[0], [1, 2]]      # 6 + 3 fills its pack, and 4 + 3 would not
    assert sorted(stage.pack_best_fit([5, 7, 2, 4], 9, tolerance=0)) == [[0, 3], [1, 2]]
    assert stage.utilisation([5, 4, 3, 2], [[0, 3], [1, 2]], 7) == (1.0, 14 / 20)


def test_a_nearly_full_pack_is_closed_and_a_full_pool_closes_its_fullest():
    """Tolerance 0.2 of 10: 8 leaves 2, no more than the tolerance, so the 2 must go elsewhere. Pool 2: 6 and 5 are open, and 7 closes the 6."""
    assert sorted(stage.pack_best_fit([8, 2], 10, tolerance=0.2)) == [[0], [1]]
    assert sorted(stage.pack_best_fit([8, 2], 10, tolerance=0.19)) == [[0, 1]]
    assert sorted(stage.pack_best_fit([6, 5, 7, 4], 10, pool=2, tolerance=0)) == [[0], [1, 3], [2]]
    assert sorted(stage.pack_best_fit([6, 5, 7, 4], 10, pool=3, tolerance=0)) == [[0, 3], [1], [2]]


def test_a_prompt_occurs_once_in_a_pack():
    """A copy in another mode holds the answer. Four short conversations of one prompt need four packs, whatever else there is room for."""
    packs = stage.pack_best_fit([2] * 6, 12, prompts=["a", "a", "b", "a", "a", "b"])
    assert len(packs) == 4 and all(len({"aabaab"[i] for i in pack}) == len(pack) for pack in packs)


def fewest_packs(lengths, capacity):
    """Over all assignments."""
    for n in range(1, len(lengths) + 1):
        for where in itertools.product(range(n), repeat=len(lengths)):
            if all(sum(l for l, w in zip(lengths, where) if w == pack) <= capacity for pack in range(n)): return n


def test_best_fit_is_within_its_proven_factor_of_the_optimum():
    """Dosa and Sgall: best fit never needs more than 1.7 times the fewest packs; often, as counted here, exactly the fewest."""
    rng, equal = random.Random(0), 0
    for _ in range(40):
        lengths = [rng.randint(1, 10) for _ in range(rng.randint(1, 6))]
        best, found = fewest_packs(lengths, 10), len(stage.pack_best_fit(lengths, 10, tolerance=0))
        assert best <= found <= math.floor(1.7 * best), lengths
        equal += best == found
    assert equal >= 32


def test_no_conversation_is_lost_doubled_or_split():
    rng = random.Random(1)
    for trial in range(30):
        lengths = [rng.randint(1, 60) for _ in range(rng.randint(1, 200))]
        prompts = [rng.randrange(60) for _ in lengths]
        packs = stage.pack_best_fit(lengths, 64, prompts, pool=rng.randint(1, 8), tolerance=rng.random() / 3, seed=trial)
        assert sorted(i for pack in packs for i in pack) == list(range(len(lengths)))
        assert all(sum(lengths[i] for i in pack) <= 64 and len({prompts[i] for i in pack}) == len(pack) for pack in packs)
    many = [rng.randint(1, 60) for _ in range(2000)]
    again = [stage.pack_best_fit(many, 256, pool=16, seed=seed) for seed in (3, 3, 4)]
    assert again[0] == again[1] != again[2] and sorted(again[0]) == sorted(again[2])      # the seed shuffles the packs and nothing else
    packed, padded = stage.utilisation(many, again[0], 256)
    assert packed > 0.97 and 0.45 < padded < 0.55


def test_a_conversation_longer_than_a_pack_is_an_error():
    with pytest.raises(ValueError, match="conversation 1 has 9 tokens, a pack holds 8"): stage.pack_best_fit([8, 9], 8)
    with pytest.raises(ValueError, match="1 prompts for 2 lengths"): stage.pack_best_fit([1, 1], 8, ["a"])


def sample_of(ids, learn, prompt="p"): return stage.Sample(np.array(ids), np.array(learn, bool), prompt, "s", "regular")


def test_a_pack_as_a_batch_by_hand():
    """Labels are the next tokens; the mask moves with them, stops at the border of two conversations, and padding is document -1."""
    batch = stage.pack_batch([[sample_of([5, 6, 7], [0, 1, 1]), sample_of([8, 9], [1, 1])]], 7)
    assert batch.ids_bt.tolist() == [[5, 6, 7, 8, 9, 0, 0]] and batch.doc_bt.tolist() == [[0, 0, 0, 1, 1, -1, -1]]
    assert batch.mask_bt.tolist() == [[True, True, False, True, False, False, False]]
    assert batch.labels_bt[batch.mask_bt].tolist() == [6, 7, 9]


# ---- loss

def test_cosine_by_hand():
    """Half of the warmup, its end, half of the cosine, the end; without a warmup the peak would hit Adam's empty moments."""
    rates = [stage.cosine_lr(n, 100, 20, 3.0, 1.0) for n in (1, 10, 20, 60, 100, 200)]
    assert rates == pytest.approx([0.15, 1.5, 3.0, 2.0, 1.0, 1.0])
    assert stage.cosine_lr(40, 100, 20, 3.0, 1.0) == pytest.approx(1 + (1 + math.sqrt(0.5)))
    c = stage.SFTConfig(steps=(100, 30), lr=(1.0, 0.5), lr_min=(0.1, 0.2), warmup=(0.1, 1 / 3))
    assert [c.rate(i) for i in (0, 9, 99)] == pytest.approx([0.1, 1.0, 0.1])      # step 0 is the first of ten in the warmup
    assert [c.rate(i) for i in (100, 109, 129)] == pytest.approx([0.05, 0.5, 0.2])      # and the second stage begins anew
    assert (c.stage(99), c.stage(100)) == (0, 1)


def stub_with_losses(token_losses, weight=0.0):
    """A "model" of two tokens whose loss at position t, with label 0, is token_losses[t]:  log(1 + exp(-x)) = l  for  x = -log(exp(l) - 1)."""
    x = torch.tensor([-math.log(math.expm1(l)) for l in token_losses], dtype=torch.float64)
    h_btd = torch.stack([x, torch.zeros_like(x)], -1)[None]
    return SimpleNamespace(trunk=lambda ids, doc: (h_btd, []), visible=lambda *_: None, config=SimpleNamespace(mtp_depths=2, experts=4), context=None,
                           lm_head=SimpleNamespace(weight=torch.eye(2, dtype=torch.float64)))


def test_two_conversations_of_2_and_8_learnt_tokens():
    """Losses 3 and 0.5: by tokens (2 · 3 + 8 · 0.5) / 10 = 1.0, by conversations (3 + 0.5) / 2 = 1.75. What is not learnt has loss 9."""
    losses = [9, 3, 3, 9, 9] + [0.5] * 8 + [9, 9]
    doc = torch.tensor([[0] * 4 + [1] * 10 + [-1]])
    mask = torch.tensor([[l < 9 for l in losses]])
    ids = torch.zeros(1, 15, dtype=torch.long)
    by = {name: stage.sft_loss(stub_with_losses(losses), ids, ids, doc, mask, normalize=name, mtp_weight=0) for name in ("token", "conversation")}
    assert by["token"].total.item() == pytest.approx(1.0, abs=1e-12) and by["conversation"].total.item() == pytest.approx(1.75, abs=1e-7)
    twice = stage.sft_loss(stub_with_losses(losses), ids, ids, doc, mask, "token", mtp_weight=0, totals_k=torch.tensor([20.0]))
    assert twice.main.item() == pytest.approx(0.5, abs=1e-12)      # this piece is half of the global batch
    nothing = stage.sft_loss(stub_with_losses(losses), ids, ids, doc, torch.zeros_like(mask), "conversation", mtp_weight=0)
    assert nothing.total.item() == 0.0
    with pytest.raises(ValueError, match="unknown normalize 'sum'"):
        stage.sft_loss(stub_with_losses(losses), ids, ids, doc, mask, "sum", mtp_weight=0)
    with pytest.raises(ValueError, match="no MTP weights"): stage.sft_loss(stub_with_losses(losses), ids, ids, doc, mask)


def test_weights_of_two_rows_by_hand():
    """Document numbers may start anywhere, and the same number in another row is another conversation."""
    mask = torch.tensor([[1, 1, 0, 1, 1, 1], [1, 0, 1, 1, 0, 0]], dtype=torch.bool)
    doc = torch.tensor([[7, 7, 7, 8, 8, 8], [7, 7, 8, 8, -1, -1]])
    third = 1 / 3
    assert torch.allclose(stage.token_weights(mask, doc, "conversation"), torch.tensor([[.5, .5, 0, third, third, third], [1, 0, .5, .5, 0, 0]]))
    first, second, last = stage.depth_weights(mask, doc, "token", 2)
    assert second.tolist() == [[1, 0, 0, 1, 1, 0], [0, 0, 1, 0, 0, 0]] and last.tolist() == [[0, 0, 0, 1, 0, 0], [0] * 6] and first.sum() == 8


def lively(config=MICRO, seed=0):
    """Every parameter matters: at the default init a leak between documents would hide in zeros."""
    torch.manual_seed(seed)
    model = model04.Nemotron(config)
    with torch.no_grad():
        for p in model.parameters(): p.add_(torch.randn_like(p) * (0.3 if p.dim() == 1 else 0.5 / math.sqrt(p.shape[-1])))
    return model


def random_samples(n=4, seed=0, prompts=None):
    rng = np.random.default_rng(seed)
    out = []
    for i in range(n):
        length = int(rng.integers(6, 20))
        learn = rng.random(length) < 0.5
        learn[[-1, -2]] = True
        out.append(stage.Sample(rng.integers(32, 320, length), learn, str(i), "s", "regular"))
    return out


@pytest.mark.parametrize("normalize", ["token", "conversation"])
def test_a_pack_gives_the_losses_and_gradients_of_its_conversations_alone(normalize):
    """Mamba states, conv windows, attention and both MTP depths end where a conversation does; 33-token chunks do not line up with borders."""
    model, samples = lively(), random_samples()
    kwargs = dict(normalize=normalize, aux_weight=0.0)
    pack = stage.pack_batch([samples], sum(len(s.ids) for s in samples) + 5)
    together = stage.sft_loss(model, *pack, **kwargs)
    together.total.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    parts, sizes = [], []
    for sample in samples:
        batch = stage.pack_batch([[sample]], len(sample.ids))
        losses = stage.sft_loss(model, *batch, **kwargs)
        w = stage.depth_weights(batch.mask_bt, batch.doc_bt, normalize, 2)
        parts.append(torch.stack([losses.main, *losses.mtp_k])); sizes.append(torch.stack([x.sum() for x in w]))
    parts, sizes = torch.stack(parts), torch.stack(sizes)
    alone = (parts * sizes).sum(0) / sizes.sum(0)
    (alone[0] + 0.1 * (alone[1] + alone[2])).backward()      # 0.1 of each depth
    assert torch.allclose(torch.stack([together.main, *together.mtp_k]), alone, rtol=1e-5)
    assert torch.allclose(together.total, alone[0] + 0.1 * alone[1:].sum(), rtol=1e-5)
    for name, p in model.named_parameters():
        if name in grads: assert (grads[name] - p.grad).norm() <= 1e-5 * p.grad.norm() + 1e-7, name
    assert len(grads) > 30


def test_by_tokens_it_is_stage_04s_loss():
    """The same next-token and MTP losses as in pretraining, which is tested against the definition; only what an MTP depth counts differs."""
    model, batch = lively(), stage.pack_batch([random_samples(3, seed=1), random_samples(4, seed=2)], 80)
    ours, theirs = stage.sft_loss(model, *batch, aux_weight=0.01), model04.loss(model, *batch, aux_weight=0.01)
    for have, want in zip([ours.main, *ours.mtp_k, ours.aux], [theirs.main, *theirs.mtp_k, theirs.aux]): assert torch.allclose(have, want, rtol=1e-5)
    assert torch.equal(ours.load_me, theirs.load_me) and len(ours.mtp_k) == 2
    assert torch.allclose(ours.total, theirs.main + 0.1 * sum(theirs.mtp_k) + 0.01 * theirs.aux, rtol=1e-5)


# ---- trainer

@pytest.fixture(scope="module")
def base(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    model04.save_checkpoint(folder, model04.Nemotron(MICRO), tokenizer)
    return folder


@pytest.fixture
def config(tmp_path, base):
    talks = [dict(messages=[user(f"{a}+{b}?"), says(str(a + b), f"{a} and {b}.")]) for a in range(8) for b in range(3)]
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(talk) + "\n" for talk in talks))
    return stage.SFTConfig(base=base, data=(str(tmp_path / "sums.jsonl"),), out=tmp_path / "out", steps=(5, 3), pack=(120, 150), batch=(2, 1),
                           families=("all",), save_every=4)


def trainer_for(config, base, tokenizer):
    samples = stage.build_samples(config, tokenizer)
    return stage.start(config, base, tokenizer, samples, stage.Packs(samples, config))


def weights(trainer): return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


def test_two_runs_agree_and_a_resumed_one_does_too_to_the_bit(config, base, tokenizer, tmp_path):
    """Stopped inside stage 2, behind step 6 of 8: packs, moments, rates and the loss's kind must be those of the run that went through."""
    whole = trainer_for(config, base, tokenizer)
    whole.fit(8)
    again = trainer_for(replace(config, out=tmp_path / "again"), base, tokenizer)
    again.fit(6)
    again = trainer_for(replace(config, out=tmp_path / "again", resume=True), base, tokenizer)
    assert again.step == 6
    again.fit(8)
    assert [row["loss"] for row in whole.rows] == [row["loss"] for row in again.rows] and len(whole.rows) == 8
    assert all(torch.equal(x, weights(again)[name]) for name, x in weights(whole).items())
    assert [row["lr"] for row in whole.rows] == pytest.approx([config.rate(i) for i in range(8)])
    assert whole.batches(4).ids_bt.shape == (2, 120) and whole.batches(5).ids_bt.shape == (1, 150)
    with pytest.raises(ValueError, match="holds checkpoints of an earlier run"): trainer_for(config, base, tokenizer)
    with pytest.raises(ValueError, match=r"was trained with steps = \[5, 3\], not \[5, 4\]"):
        trainer_for(replace(config, resume=True, steps=(5, 4)), base, tokenizer)
    loaded = model04.load_checkpoint(pretrain.newest_checkpoint(config.home))      # what stages 07 and 08 open
    assert torch.equal(loaded.lm_head.weight, whole.model.lm_head.weight)
    assert len(stage.Tokenizer.load(pretrain.newest_checkpoint(config.home))) == 320


def test_the_validation_loss_is_a_mean_by_tokens_and_changes_nothing(config, base, tokenizer, tmp_path):
    """Written behind steps 2, 4, ... into metrics.jsonl; a look that left the model in eval mode, or drew random numbers, would change the run."""
    held = stage.pack_batch([random_samples(3, seed=5), random_samples(2, seed=6)], 70)
    runs = []
    for every in (0, 2):
        trainer = trainer_for(replace(config, validate_every=every, out=tmp_path / str(every)), base, tokenizer)
        trainer.validation = held
        trainer.fit(4)
        runs.append(trainer)
    without, looked = runs
    for name in ("loss", "aux", "total"): assert [row[name] for row in without.rows] == [row[name] for row in looked.rows], name
    assert not any("validation" in row for row in without.rows)
    rows = [json.loads(line) for line in (looked.home / "metrics.jsonl").read_text().splitlines()]
    assert ["validation" in row for row in rows] == [False, True, False, True] and rows[1]["validation"] != rows[3]["validation"]
    with torch.no_grad(): logits = looked.model.eval()(held.ids_bt, held.doc_bt)
    want = torch.nn.functional.cross_entropy(logits[held.mask_bt], held.labels_bt[held.mask_bt])
    assert rows[3]["validation"] == pytest.approx(want.item(), rel=1e-5)


def test_validation_packs_come_from_the_other_side_of_the_split(tokenizer):
    batch = stage.validation_batch(stage.SFTConfig(families=("calendar_arithmetic",), pack=(256, 256)), tokenizer)
    text = tokenizer.decode(batch.ids_bt.flatten().tolist())
    sides = [[t.prompt for t in tasks.draw("calendar_arithmetic", 0, 300, 0, split, at_most=True)] for split in ("train", "validation")]
    assert not any(f"user\n{prompt}" in text for prompt in sides[0]) and sum(f"user\n{prompt}" in text for prompt in sides[1]) > 10
    assert stage.validation_batch(stage.SFTConfig(families=("follow",), pack=(8, 8)), tokenizer) is None      # nothing fits


@pytest.mark.parametrize("at", [0, 5], ids=["token", "conversation"])
def test_micro_batches_share_one_normalisation(config, base, tokenizer, tmp_path, at):
    """The mean of two pieces' means would weigh a piece with few learnt tokens like a full one."""
    after = []
    for pieces in (1, 2):
        trainer = trainer_for(replace(config, out=tmp_path / str(pieces), micro_batches=pieces, batch=(2, 2)), base, tokenizer)
        trainer.step = at
        batch = trainer.batches(at)
        batch.mask_bt[0, 20:] = False
        trainer.batches = lambda step, batch=batch: batch
        row = trainer.train_step()
        after.append((row["loss"], row["mtp_1"], row["mtp_2"], row["grad_norm"]))
    assert after[0] == pytest.approx(after[1], rel=1e-5)


def test_packs_are_read_in_epochs(config, tokenizer):
    """Every pack once, then every pack again in another order."""
    samples = stage.build_samples(config, tokenizer)
    packs = stage.Packs(samples, replace(config, steps=(1000, 0), batch=(1, 1)))
    n = len(packs.packs[0])
    rows = [packs(i).ids_bt[0].tolist() for i in range(2 * n)]
    assert n > 3 and sorted(rows[:n]) == sorted(rows[n:]) and len({tuple(row) for row in rows}) == n and rows[:n] != rows[n:]


def test_a_checkpoint_without_the_head_needs_mtp_weight_0(config, tokenizer, tmp_path):
    bare = tmp_path / "bare"
    torch.manual_seed(0)
    model04.save_checkpoint(bare, model04.Nemotron(replace(MICRO, mtp_pattern="", mtp_depths=0)), tokenizer)
    with pytest.raises(ValueError, match="no MTP weights: train with --mtp-weight 0"): trainer_for(config, bare, tokenizer)
    trainer = trainer_for(replace(config, mtp_weight=0.0, fresh=True), bare, tokenizer)
    row = trainer.train_step()
    assert math.isfinite(row["loss"]) and "mtp_1" not in row


def test_settings_that_cannot_be_are_refused(config, tmp_path, tokenizer):
    for bad, message in ((dict(pool=0), "pool = 0 must be at least 1"), (dict(steps=(0, 2)), "must be positive"), (dict(data=()), "data is empty"),
                         (dict(families=("gcd", "gdc")), "unknown family 'gdc': choose all, or some of .*gcd"),
                         (dict(cut=1.5), "cut = 1.5 must be shares"), (dict(modes=(0.0, 0.0, 0.0)), "at least one mode needs a share"),
                         (dict(score_on="train"), "score_on = 'train': choose one of validation, held_out")):
        with pytest.raises(ValueError, match=message): replace(config, **bad)
    with pytest.raises(ValueError, match="holds no checkpoint: run python 05_pretrain.py first"): stage.find_base(stage.SFTConfig(out=tmp_path))
    with pytest.raises(ValueError, match="no conversation fits a pack of 20"): stage.build_samples(replace(config, pack=(20, 20)), tokenizer)


# ---- evaluation

class Adder(tasks.Environment):
    """Sums by a tool: one family of two turns, a stand-in that knows its answers."""
    name, domain, levels, max_turns = "adder", "tools", 1, 2
    def sample(self, level, rng):
        a, b = rng.randrange(50), rng.randrange(50)
        return tasks.Task("adder", "tools", level, f"{a}+{b}?", str(a + b), dict(a=a, b=b), (CALC,))
    def worked(self, task, effort, rng):
        asks = says("", "Use the tool for it." if effort == "regular" else "Tool.", [call(a=f"{task.meta['a']}+{task.meta['b']}")])
        return [asks, tool(task.answer), says(task.answer, "There it is.")]
    def step(self, task, messages): return tool(task.answer) if messages[-1]["tool_calls"] else None


@pytest.fixture
def adder(monkeypatch):
    monkeypatch.setattr(tasks, "ENVIRONMENTS", {"adder": Adder()})
    monkeypatch.setattr(tasks, "DOMAINS", {"tools": ["adder"]})
    def draw(family, level, n, seed, split="train", at_most=False):
        found, rng = {}, random.Random(seed)
        for _ in range(200):
            task = Adder().sample(0, rng)
            if tasks.split_of(task) == split: found.setdefault(task.prompt, task)
        if len(found) < n and not at_most: raise ValueError("too few")
        return list(found.values())[:n]
    monkeypatch.setattr(tasks, "draw", draw)
    monkeypatch.setattr(tasks, "constant_baseline", lambda group: (group[0].answer, 1 / len(group)))
    return draw


def test_tools_run_and_the_last_turn_is_scored(adder, tokenizer, monkeypatch):
    """Scripted models: one calls the tool and repeats what it says, one answers wrongly at once, one calls for ever, one forgets </think>, one
    never ends. Tokens count over all turns."""
    questions = adder("adder", 0, 5, 0, "train")
    called = tokenizer.encode("\n<function=calc>\n<parameter=a>\n1\n</parameter>\n</function>\n")
    asks = [[*tokenizer.encode("Ask."), 13, *tokenizer.encode("\n"), 14, *called, 15, *tokenizer.encode("\n"), 11]]
    plain = lambda text: [[*tokenizer.encode("So."), 13, *tokenizer.encode(text), 11]]
    scripts = [asks + plain(questions[0].answer), plain("-1"), asks + asks, [[*tokenizer.encode("Hm."), 11]], plain("9" * 3)]
    scripts[4][0].pop()      # no <|im_end|>
    played = {}
    def generate(model, prompts, sampling):
        out = []
        for prompt in prompts:
            who = next(i for i, q in enumerate(questions) if f"user\n{q.prompt}<|im_end|>" in tokenizer.decode(prompt))
            turn = played[who] = played.get(who, -1) + 1
            if turn: assert f"<tool_response>\n{questions[who].answer}\n</tool_response>" in tokenizer.decode(prompt)
            assert tokenizer.decode(prompt).endswith("<|im_start|>assistant\n<think>\n") and sampling.temperature == 0
            ids = scripts[who][turn]
            out.append(model04.Completion(ids, [], ids[-1] == 11))
        return out
    monkeypatch.setattr(stage.nemotron, "generate", generate)
    answers = stage.play(None, tokenizer, questions, "regular", 64)
    assert [a.score for a in answers] == [1.0, 0.0, 0.0, 0.0, 0.0] and played == {0: 1, 1: 0, 2: 1, 3: 0, 4: 0}
    assert [a.tokens for a in answers] == [sum(map(len, script)) for script in scripts]
    assert answers[3].error == "no end of thinking" and answers[1].error is None and [a.finished for a in answers] == [True] * 4 + [False]
    assert [m["role"] for m in answers[0].messages] == ["user", "assistant", "tool", "assistant"]


def test_wilson_by_hand():
    """Newcombe's example, 81 of 263, and the ends, where the normal interval has no width."""
    assert stage.wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)
    assert stage.wilson(0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4) and stage.wilson(10, 10) == pytest.approx((0.7225, 1.0), abs=1e-4)


def test_scores_are_pooled_by_questions_not_by_families():
    row = dict(domain="d", mode="off", tokens=10, errors=0, cut=0)
    rows = [dict(row, family="a", n=10, right=10, constant=0.1), dict(row, family="b", n=30, right=0, constant=0.3, errors=15)]
    x = stage.pooled(rows, "domain", "mode")["d", "off"]
    assert (x["n"], x["accuracy"], x["tokens"], x["errors"]) == (40, 0.25, 0.5, 0.375) and x["constant"] == pytest.approx(0.25)
    assert set(stage.pooled(rows, "family")) == {("a",), ("b",)}


def test_the_command_trains_scores_and_leaves_a_row_a_figure_and_a_checkpoint(adder, config, tmp_path, capsys, tokenizer):
    """Start to end on the stand-in family: conversations in all modes, cut copies, tools, tables, files."""
    settings = replace(config, data=("tasks", *config.data), tokens=60_000, modes=(1.0, 1.0, 1.0), cut=0.5, pack=(500, 600), held_out=4, max_tokens=6,
                       steps=(2, 1))
    stage.main(settings)
    text = capsys.readouterr().out
    assert "conversations to learn from" in text and "stage 2: " in text and "by domain and mode, greedy" in text
    row = json.loads((settings.out / "results.jsonl").read_text().splitlines()[-1])
    assert row["stage"] == "06_sft" and set(row["domains"]) == {"tools regular", "tools medium", "tools off"} and row["all"]["off"]["n"] == 4
    assert (settings.out / "06_sft.png").stat().st_size > 10_000
    assert pretrain.newest_checkpoint(settings.home).name == "step-000003"
    samples = stage.build_samples(settings, tokenizer)
    kinds = [s.mode for s in samples if s.source == "tools"]
    assert max(map(kinds.count, stage.MODES)) - min(map(kinds.count, stage.MODES)) <= 1 and 0.2 < kinds.count("cut") / kinds.count("off") < 0.8
    assert [s.source for s in samples[:4]] == ["tools", "sums", "tools", "sums"]      # sources in turn


# ---- the built-in questions

@pytest.fixture(scope="module")
def built_in(tokenizer):
    return list(stage.task_conversations(stage.SFTConfig(families=("all",), tokens=120_000, levels=2, modes=(1.0, 1.0, 1.0)), tokenizer))


def test_every_worked_solution_is_right_and_fits_a_pack(built_in, tokenizer):
    """What is learnt must be what is scored: the last turn of every conversation, read back from its ids, earns its point; none is held out."""
    asked = {}
    for talk in built_in: asked.setdefault(talk.prompt, set()).add(talk.mode)
    # the last question of a family and level may be there in some modes only: its tokens are spent
    assert len(asked) >= 100 and sum(modes != set(stage.MODES) for modes in asked.values()) <= 2 * len(tasks.ENVIRONMENTS)
    assert {talk.source for talk in built_in} == set(tasks.DOMAINS)
    assert any(talk.cut for talk in built_in)
    for talk in built_in:
        ids, mask = stage.render_chat(talk.messages, talk.mode, tokenizer=tokenizer, tools=talk.tools)
        begin = len(stage.render_chat(talk.messages[:-1], talk.mode, tokenizer=tokenizer, tools=talk.tools, generation_prompt=True)[0])
        parsed = tasks.parse_completion(tokenizer.decode(ids[begin:ids.index(11, begin)]), thinking=talk.mode != "off")
        assert parsed.error is None and parsed.content == talk.messages[-1]["content"].strip(), talk
        assert sum(mask) < len(ids)


def test_learnt_questions_are_never_held_out(built_in):
    held_out = {stage.Conversation("", stage.opening(task)).prompt for names in tasks.DOMAINS.values() for family in names
                for task in tasks.draw(family, 0, 8, 0, "held_out", at_most=True)}
    assert len(held_out) >= 40 and not held_out & {talk.prompt for talk in built_in}
