"""Stage 05 and data/corpus.py: the tokenizer, the data order, the schedule, and a run that can be stopped anywhere and goes on to the bit."""
import hashlib
import importlib
import itertools
import json
import math
import os
import random
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from data import corpus

nvfp4, model04, stage = (importlib.import_module(m) for m in ("01_nvfp4", "04_model", "05_pretrain"))
ROOT = Path(__file__).parent.parent
SPIKE = stage.SpikeDetector
# the smallest sizes that stage 04 accepts, with every kind of layer and the MTP head
MICRO = model04.ModelConfig(pattern="MEM*E", d_model=32, vocab=320, heads=2, kv_heads=1, head_dim=16, mamba_heads=16, mamba_head_dim=2, groups=1,
                            state=8, chunk=16, experts=4, experts_per_token=2, latent=16, expert_width=16, shared_width=16)
ODD = "naïve café 日本語 🙂👩‍🚀 \x00\t\r\n  tail  \u200b e\u0301 ﷽ 𝔘 </s> <|im_start|>assistant <SPECIAL_20> 12345"


def text(n=12, seed=0):
    return list(itertools.islice(corpus.stories_and_facts(seed), n))


@pytest.fixture(scope="module")
def tokenizer():
    return stage.Tokenizer.train(text(40), 320)


def shard(path: Path, documents, tokenizer) -> "stage.Shard":
    stage.Shard.write(path, documents, tokenizer)
    return stage.Shard(path)


# ---- tokenizer

def test_any_text_survives_the_tokenizer(tokenizer, tmp_path):
    """Byte-level BPE loses nothing; a saved and loaded tokenizer gives the same ids."""
    tokenizer.save(tmp_path)
    again = stage.Tokenizer.load(tmp_path)
    g = random.Random(0)
    noise = "".join(chr(g.choice([g.randrange(1, 0xD800), g.randrange(0xE000, 0x110000), g.randrange(32, 127)])) for _ in range(3000))
    for sample in [ODD, noise, "", *text(5, seed=9)]:
        ids = tokenizer.encode(sample)
        assert tokenizer.decode(ids) == sample and again.encode(sample) == ids
    assert len(again) == len(tokenizer) == 320
    assert (tmp_path / "tokenizer.tiktoken").read_text().isascii()      # ranks one can read and diff, not a pickle


def test_special_tokens_keep_their_released_ids_and_never_come_from_text(tokenizer):
    """A user who types </s> must not end a document; the ids 0-2 and 10-17 are those of the released vocabulary."""
    released = {"<unk>": 0, "<s>": 1, "</s>": 2, "<|im_start|>": 10, "<|im_end|>": 11, "<think>": 12, "</think>": 13, "<tool_call>": 14,
                "</tool_call>": 15, "<tool_response>": 16, "</tool_response>": 17}
    assert {name: tokenizer.specials[name] for name in released} == released
    assert sorted(tokenizer.specials.values()) == list(range(stage.RESERVED))
    assert min(tokenizer.encode(ODD + "".join(tokenizer.specials))) >= stage.RESERVED
    assert tokenizer.decode([2, 10, 20, 4000]) == "</s><|im_start|><SPECIAL_20><unk>"      # 4000: in a model's vocabulary, not in this one


def test_digits_are_never_merged(tokenizer):
    digits = stage.Tokenizer.train(["2024 " * 200 + "1999 " * 200], 320)
    assert [digits.decode([i]) for i in digits.encode("2024")] == ["2", "0", "2", "4"]


def test_the_readable_bpe_trainer_finds_the_same_merges_as_rustbpe():
    """Equal counts are the trap: both must break ties alike. Runs of one letter are the other: pairs overlap there."""
    samples = text(60) + ["aaaaaaa aaaa aaa bababab"] * 3 + ["the theatre ﬁne naïve 日本 日本"]
    mine, theirs = stage.train_bpe(samples, 300), stage.Tokenizer.train(samples, 32 + 256 + 300).ranks
    assert mine == theirs and len(mine) == 556


def test_bytes_of_ids_sum_to_the_bytes_of_the_text(tokenizer):
    ids = tokenizer.encode(ODD) + [2]
    assert tokenizer.byte_counts(400)[ids].sum() == len(ODD.encode())


# ---- corpus

def read_worked(document):
    """(question, steps, answer) of a document of the source `tasks`."""
    question, rest = document.removeprefix("Q: ").removesuffix(".\n").split("\nA: ")
    steps, answer = rest.rsplit(". The answer is ", 1)
    return question, steps, answer


def test_worked_steps_are_true_and_end_in_the_right_answer():
    """A model trained on wrong arithmetic would be our fault: every step is computed here, and every answer is what the steps end in."""
    documents = list(itertools.islice(corpus.worked_tasks(3), 1000))
    checked = Counter()
    for document in documents:
        question, steps, answer = read_worked(document)
        for expression, result in re.findall(r"(\d[\d+* -]*) = (-?\d+)", steps):
            assert eval(expression) == int(result), document      # digits and signs only, by the pattern
            checked[expression.count(" ")] += 1
        if question.startswith("write: "): assert "the word" not in question or question.split()[-1] in answer.split(), document
        else: assert re.search(rf"\b{answer}$", steps), document
    assert checked[2] >= 50 and checked[4] >= 50      # one operation, and two
    assert len({question.split()[0] for question, *_ in map(read_worked, documents)}) >= 10


def test_the_text_holds_no_question_that_is_scored_later():
    """The base would know the answers: neither held-out nor validation questions, by the split's own word, and computed here from the hash."""
    from data import tasks
    sides = Counter()
    for question, _, _ in map(read_worked, itertools.islice(corpus.worked_tasks(5), 2000)):
        family = next(name for begin, name in (("how many 1 bits", "count_bits"), ("write: ", "follow"), (r"\w+day [+-]", "calendar_arithmetic"),
                                               ("", "shop")) if re.match(begin, question))
        share = int(hashlib.sha256(f"{family}\n{question}".encode()).hexdigest()[:16], 16) / 16**16
        assert share >= tasks.base.HELD_OUT + tasks.base.VALIDATION == pytest.approx(0.3), question
        sides[family] += 1
    assert set(sides) == set(tasks.EASY) and min(sides.values()) >= 200


def test_the_source_remains_without_reasoning_gym():
    """Families of our own only; in a process of its own, because families are found when data.tasks is imported."""
    code = ("import sys, itertools; sys.modules['reasoning_gym'] = None\n"
            "from data import corpus; print(*itertools.islice(corpus.worked_tasks(3), 60))")
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True).stdout
    assert out.count("Q: ") == 60 and "1 bits" in out and "write: " in out and "legs" not in out


def test_a_changed_task_gives_other_text(tmp_path, monkeypatch):
    """The folder's name depends on data/tasks too: text of an older worked solution must not be found again."""
    (tmp_path / "a.txt").write_text("once upon a time\n\n" * 50)
    first = corpus.build((str(tmp_path / "a.txt"),), tmp_path / "data")
    read = corpus.Path.read_bytes
    monkeypatch.setattr(corpus.Path, "read_bytes", lambda path: read(path) + b"#" * (path.name == "logic.py"))
    assert corpus.build((str(tmp_path / "a.txt"),), tmp_path / "data") != first


def test_stories_keep_what_they_draw():
    """What is given away is missing from the count, and no slot is left unfilled."""
    stories = [corpus.story(random.Random(seed)) for seed in range(400)]
    assert not any("{" in s or "|" in s or " / " in s for s in stories) and len(set(stories)) == 400
    assert corpus.story(random.Random(7)) == stories[7]
    number = corpus.NUMBERS.index
    shared = 0
    for s in stories:
        if has := re.search(r"had (\w+) (\w+)(?:, but| in)", s):
            rest = re.search(r"(?:Now \w+ had|still had) (\w+)(?: and|\.)", s)
            given = re.search(r"(?:take|gave) (\w+) of", s)
            if rest and given and "Now" in s:
                assert number(has[1]) - number(given[1]) == number(rest[1]), s
                shared += 1
    assert shared > 20


def test_the_split_depends_on_content_alone(tmp_path):
    """Split by seed or by position, a text that occurs twice would be trained on and tested on."""
    documents = text(600)
    rows = documents + documents[::-1] + documents[:100]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": d}) + "\n" for d in rows))
    (tmp_path / "b.jsonl").write_text("".join(json.dumps({"text": d}) + "\n" for d in documents[::3]))
    home = corpus.build((str(tmp_path / "*.jsonl"),), tmp_path / "data", seed=1)
    train, held_out = (set(corpus.documents(home, "files", part)) for part in ("train", "held_out"))
    assert not train & held_out and train | held_out == set(documents)
    assert held_out == {d for d in documents if corpus.is_held_out(d)} and 2 <= len(held_out) <= 30      # 12 of 600 expected
    assert corpus.build((str(tmp_path / "*.jsonl"),), tmp_path / "data", seed=1) == home      # found again
    record = json.loads((home / "corpus.json").read_text())
    assert record["python"] and record["sources"]["files"]["train"]["sha256"]


def test_text_files_of_every_kind_are_read(tmp_path):
    import pyarrow
    import pyarrow.parquet
    documents = text(30)
    (tmp_path / "a.txt").write_text("\n\n".join(documents))
    (tmp_path / "b.jsonl").write_text("".join(json.dumps({"text": d}) + "\n" for d in documents))
    pyarrow.parquet.write_table(pyarrow.table({"text": documents}), tmp_path / "c.parquet")
    assert "".join(corpus.read_file(tmp_path / "a.txt")) == "\n\n".join(documents)
    assert list(corpus.read_file(tmp_path / "b.jsonl")) == list(corpus.read_file(tmp_path / "c.parquet")) == documents
    pieces = list(corpus.read_file(tmp_path / "a.txt"))
    assert len(pieces) > 3 and max(map(len, pieces)) < 8100      # one file is not one document: a held-out share can exist


def hub_set(monkeypatch, documents):
    """A set that load_dataset streams, made here; returns the documents handed out so far."""
    import datasets
    given = []
    def rows():
        for document in documents: given.append(document); yield dict(text=document, other=1)
    def load(name, config=None, split=None, streaming=False):
        assert (name, config, split, streaming) == ("some/set", "en", "train", True)
        return datasets.IterableDataset.from_generator(rows)
    monkeypatch.setattr(datasets, "load_dataset", load)
    return given


def test_a_hub_set_is_streamed_up_to_its_limit_and_not_further(monkeypatch, tmp_path):
    """Ten bytes a document: 2 KB are 200 of them and the one that would go over. A set that is loaded whole first would hand out all 5,000."""
    documents = [f"{i:08d}é" for i in range(5000)]      # é is two bytes
    given = hub_set(monkeypatch, documents)
    stream = corpus.read_hub("some/set@en@2KB")
    assert next(stream) == documents[0] and len(given) < 10
    assert [documents[0], *stream] == documents[:200] and len(given) < 210
    assert list(corpus.read_hub("some/set@en@2.005KB")) == documents[:200] == list(corpus.read_hub("some/set@en@0.002MB"))
    assert list(corpus.read_hub("some/set@en")) == documents      # no limit: all of it
    homes = [corpus.build(("hf:some/set@en@2KB",), tmp_path / name) for name in "ab"]
    records = [json.loads((home / "corpus.json").read_text())["sources"]["hf-some-set-en-2KB"] for home in homes]
    assert records[0] == records[1] and sum(part["bytes"] for part in records[0].values()) == 2000
    assert sorted(d for part in ("train", "held_out") for d in corpus.documents(homes[0], "hf-some-set-en-2KB", part)) == documents[:200]


def test_a_folder_of_files_streams_through_the_same_door(tmp_path):
    """datasets' own reader, no stand-in: rows of a .jsonl in the order of the file, the same twice."""
    documents = text(50)
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train.jsonl").write_text("".join(json.dumps({"text": d}) + "\n" for d in documents))
    sizes = np.cumsum([len(d.encode()) for d in documents])
    for _ in range(2): assert list(corpus.read_hub(f"{tmp_path / 'set'}@4KB")) == documents[:int((sizes <= 4000).sum())]
    (tmp_path / "set" / "train.jsonl").write_text('{"words": "no text"}\n')
    with pytest.raises(ValueError, match='has no field "text", only words'): list(corpus.read_hub(str(tmp_path / "set")))


def test_a_hub_name_says_configuration_and_limit():
    read = {"org/set": ("org/set", None, math.inf), "org/set@200MB": ("org/set", None, 2e8), "org/set@7KB": ("org/set", None, 7e3),
            "org/set@sample-10BT": ("org/set", "sample-10BT", math.inf), "org/set@en@1.5GB": ("org/set", "en", 1.5e9)}
    assert {name: corpus.hub_name(name) for name in read} == read
    for name in ("", "@2MB", "org/set@0MB", "org/set@a@b", "org/set@a@b@2MB", "org/set@"):
        with pytest.raises(ValueError, match="write hf:NAME, hf:NAME@200MB"): corpus.resolve((f"hf:{name}",))


# ---- shards, packing, blend

class Bytes:
    """A tokenizer whose ids are the code points, so that a batch can be written down by hand."""
    class encoding:
        @staticmethod
        def encode_ordinary_batch(texts, num_threads): return [[ord(c) for c in t] for t in texts]
    eos = 2
    def __len__(self): return 70_000


def test_packing_labels_and_masks_on_an_example_written_by_hand(tmp_path):
    """Documents behind one another, each closed by </s> = 2; no label crosses a border; every token but a document's first is predicted once."""
    data = shard(tmp_path / "x.bin", ["abc", "de"], Bytes())
    assert data.tokens.tolist() == [97, 98, 99, 2, 100, 101, 2] and data.ends.tolist() == [4, 7] and data.tokens.dtype == np.uint32
    stream = stage.Stream(data, (0,))
    stream.epoch = lambda n: (np.array([1, 0]), np.array([3, 7])) if n % 2 == 0 else (np.array([0, 1]), np.array([4, 7]))
    ids, docs = stream.window(1, 9)
    assert ids.tolist() == [101, 2, 97, 98, 99, 2, 97, 98, 99] and docs.tolist() == [0, 0, 1, 1, 1, 1, 2, 2, 2]
    batch = stage.Batch.from_windows(ids[None], docs[None])
    assert batch.ids_bt.tolist() == [[101, 2, 97, 98, 99, 2, 97, 98]]
    assert batch.labels_bt.tolist() == [[2, 97, 98, 99, 2, 97, 98, 99]]
    assert batch.doc_bt.tolist() == [[0, 0, 1, 1, 1, 1, 2, 2]]
    assert batch.mask_bt.tolist() == [[True, False, True, True, True, False, True, True]]
    assert stream.window(14, 9)[0].tolist() == [100, *ids[:8].tolist()]      # two epochs on: a position is all the state there is


def test_an_epoch_reads_every_document_once(tmp_path, tokenizer):
    documents = text(17)
    data = shard(tmp_path / "x.bin", documents, tokenizer)
    stream, size = stage.Stream(data, (5,)), len(data.tokens)
    pieces = [stream.window(p, min(13, 2 * size - p))[0] for p in range(0, 2 * size, 13)]      # windows of an odd length through two epochs
    ids = np.concatenate(pieces).tolist()
    def read(part): return sorted(tokenizer.decode(list(g)) for end, g in itertools.groupby(part, lambda i: i == 2) if not end)
    assert read(ids[:size]) == read(ids[size:]) == sorted(documents) and ids[:size] != ids[size:]


def make_batches(tmp_path, tokenizer, steps=6, seed=0, batch=4, seq=24, extra=0):
    shards = {name: shard(tmp_path / f"{name}.bin", text(20, seed=i), tokenizer) for i, name in enumerate(("stories", "tasks"))}
    return stage.Batches(shards, stage.Blend.of(shards), batch, seq, steps, seed, extra)


def test_a_batch_is_a_function_of_seed_and_step(tmp_path, tokenizer):
    """Asked twice, out of order, or by a run with more steps behind it: the same batch. Otherwise a resumed run sees other data."""
    one, two, longer = make_batches(tmp_path, tokenizer), make_batches(tmp_path, tokenizer), make_batches(tmp_path, tokenizer, extra=5)
    forward = [one(step) for step in range(6)]
    for step in (5, 2, 3, 2, 0):
        for x, y, z in zip(forward[step], two(step), longer(step)): assert torch.equal(x, y) and torch.equal(x, z)
    assert not torch.equal(make_batches(tmp_path, tokenizer, seed=1)(3).ids_bt, forward[3].ids_bt)
    assert longer(10).ids_bt.shape == (4, 24)
    for source in (0, 1):      # a source's windows follow one another: the last label of one is the first input of the next
        rows = [(one(r // 4).ids_bt[r % 4], one(r // 4).labels_bt[r % 4]) for r in range(24) if one.plan[r] == source]
        assert len(rows) > 8 and all(labels[-1] == ids[0] for (_, labels), (ids, _) in zip(rows, rows[1:]))


def test_the_blend_switches_at_three_quarters_of_the_tokens():
    blend = stage.Blend({"a": 0.5, "b": 0.25, "c": 0.25, "d": 0.0}, {"a": 0.1, "b": 0.0, "c": 0.0, "d": 0.9})
    plan = blend.plan(400, 400)
    assert plan[:4].tolist() == [0, 1, 2, 0]
    assert np.bincount(plan[:300], minlength=4).tolist() == [150, 75, 75, 0] and np.bincount(plan[300:], minlength=4).tolist() == [10, 0, 0, 90]
    for n in (7, 50, 299):      # the shares hold at every moment, not only in the end
        assert np.abs(np.bincount(plan[:n], minlength=4) - n * np.array([0.5, 0.25, 0.25, 0])).max() <= 1
    assert blend.plan(460, 400)[:400].tolist() == plan.tolist()


# ---- schedule and optimizer

def test_warmup_stable_decay_by_hand():
    """Linear up, flat, then 1 - sqrt: half of the way down after a quarter of the decay. The end is the low rate, not one step before it."""
    lr = lambda n: stage.wsd_lr(n, total=1000, warmup=100, decay=400, peak=2.0, low=0.5)
    assert [lr(n) for n in (0, 1, 50, 100, 101, 600)] == [0.0, 0.02, 1.0, 2.0, 2.0, 2.0]
    assert lr(700) == 0.5 + 1.5 * (1 - math.sqrt(0.25)) == 1.25 and lr(604) == pytest.approx(0.5 + 1.5 * 0.9)
    assert lr(1000) == lr(5000) == 0.5 and 0.5 < lr(999) < 0.51
    # a constant rate stays constant: its last step, and what comes after it, are like the others
    assert {stage.wsd_lr(n, total=10, warmup=0, decay=0, peak=1.0, low=0.1) for n in (1, 9, 10, 11, 99)} == {1.0}


def test_weight_decay_spares_norms_biases_and_mambas_scales():
    free = {n for n, p in model04.Nemotron(MICRO).named_parameters() if not stage.decays(n, p)}
    kinds = {re.sub(r"^.*?(norm|layernorm|norm_f|\w+)(\.weight)?$", r"\1\2", n).rsplit(".", 2)[-1] for n in free}
    assert {"A_log", "D", "dt_bias", "bias"} <= {n.rsplit(".", 1)[-1] for n in free}, kinds
    assert all(n.endswith(("A_log", ".D", "dt_bias", "conv1d.bias")) or "norm" in n for n in free)
    assert all("norm" not in n for n, p in model04.Nemotron(MICRO).named_parameters() if n not in free)


# ---- training runs

STEPS = 6
CONFIG = stage.PretrainConfig(steps=STEPS, batch=4, seq=24, lr=2e-2, save_every=100, branch_steps=1)


def run(tmp_path, batches, until=STEPS, folder="run", **changes):
    torch.manual_seed(0)
    trainer = stage.Trainer(replace(CONFIG, **changes), model04.Nemotron(MICRO), batches, tmp_path / folder)
    trainer.fit(until)
    return trainer


def same(rows):
    """What a run must repeat to the bit: everything but the clock."""
    return [{k: v for k, v in row.items() if k not in ("tokens_per_s", "seconds")} for row in rows]


def equal_state(one, two):
    return all(torch.equal(p, q) for p, q in zip(one.model.state_dict().values(), two.model.state_dict().values()))


MODES = {"fp32": {}, "nvfp4": dict(precision="nvfp4"), "recomputed, 2 pieces": dict(recompute=True, micro_batches=2),
         "nvfp4, recomputed": dict(precision="nvfp4", recompute=True)}


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
def test_a_run_that_is_killed_goes_on_to_the_bit(mode, tmp_path, tokenizer):
    """Two runs are equal, and so is one cut after step 4 and loaded: optimizer, selection bias, data position and rounding draws are all there."""
    batches = make_batches(tmp_path, tokenizer)
    whole, again = run(tmp_path, batches, **mode), run(tmp_path, batches, folder="again", **mode)
    assert same(whole.rows) == same(again.rows) and equal_state(whole, again)
    run(tmp_path, batches, until=4, folder="cut", **mode)      # dropped here, as if killed
    torch.manual_seed(123)
    newest = stage.newest_checkpoint(tmp_path / "cut")
    resumed = stage.Trainer.load(newest, replace(CONFIG, **mode), make_batches(tmp_path, tokenizer), tmp_path / "cut")
    assert resumed.step == 4
    resumed.fit(STEPS)
    assert same(resumed.rows) == same(whole.rows[4:]) and equal_state(resumed, whole)
    assert whole.rows[-1]["loss"] < whole.rows[0]["loss"] - 0.3      # and it learns: the equalities above are not those of a frozen model


def test_recomputation_and_pieces_change_neither_loss_nor_selection_bias(tmp_path, tokenizer):
    """A router that counts its loads in the forward pass counts twice when activations are recomputed, and moves its bias by the wrong sign."""
    batches = make_batches(tmp_path, tokenizer)
    plain, again = run(tmp_path, batches), run(tmp_path, batches, folder="again", recompute=True)
    bias = [router.e_score_correction_bias for router in plain.model.routers()]
    assert same(plain.rows) == same(again.rows) and equal_state(plain, again)
    assert all(b.abs().max() > 0 for b in bias) and all(torch.equal(b, r.e_score_correction_bias) for b, r in zip(bias, again.model.routers()))
    calls = []
    for trainer in (plain, again):      # the first layer begins once a step, and twice where its activations were dropped
        trainer.model.backbone.layers[0].register_forward_pre_hook(lambda *_, who=trainer: calls.append(who))
        trainer.step = 0
        trainer.train_step()
    assert (calls.count(plain), calls.count(again)) == (1, 2)
    pieces = run(tmp_path, batches, until=1, folder="pieces", micro_batches=4)      # loads are summed over the pieces before the bias moves
    first = run(tmp_path, batches, until=1, folder="first")
    assert all(torch.equal(p.e_score_correction_bias, q.e_score_correction_bias) for p, q in zip(pieces.model.routers(), first.model.routers()))


BLOCKS = 5 + 2 * 2      # of MICRO: the pattern's, and the two layers of the MTP head for each of two depths


@pytest.fixture
def fresh_compiler():
    if not any(map(shutil.which, ("g++", "clang++", "cl"))): pytest.skip("torch.compile on a CPU needs a C++ compiler, and none is there")
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield torch._dynamo.utils.counters
    torch._dynamo.reset()


def compiled_calls(work) -> int:
    with torch.profiler.profile() as profile: work()
    return sum(event.count for event in profile.key_averages() if event.key.startswith("## Call CompiledFxGraph"))


def test_compiled_blocks_give_the_losses_and_gradients_of_plain_ones(tmp_path, tokenizer, fresh_compiler):
    """With documents, recomputation and pieces. Every block of every pass runs compiled code, nothing is compiled a second time, and scoring text
    stays as it is: a limit of eight versions, a graph that is never used or one built anew each step are what goes wrong in silence."""
    shards, runs, moments = make_batches(tmp_path, tokenizer), [], []
    for compiled in (False, True):
        torch.manual_seed(0)
        trainer = stage.Trainer(replace(CONFIG, compile=compiled), model04.Nemotron(MICRO), shards, tmp_path / str(compiled))
        trainer.train_step()
        moments.append([trainer.optimizer.state[p]["exp_avg"].clone() for p in trainer.model.parameters()])      # a tenth of the gradient
        made = fresh_compiler["stats"]["unique_graphs"]
        while trainer.step < STEPS: trainer.train_step()
        runs.append(trainer)
    plain, fast = runs
    assert made == fresh_compiler["stats"]["unique_graphs"] > 5 and plain.rows[-1]["loss"] < plain.rows[0]["loss"] - 0.3
    for key in ("loss", "mtp_1", "mtp_2", "aux"): assert [r[key] for r in fast.rows] == pytest.approx([r[key] for r in plain.rows], rel=1e-5), key
    for x, y in zip(*moments): assert (x - y).abs().max() <= 1e-5 * x.abs().max() + 1e-12
    plain.batches = fast.batches = lambda step: shards(0)
    assert compiled_calls(fast.train_step) >= 2 * BLOCKS > 0 == compiled_calls(plain.train_step)      # forward and backward
    with torch.no_grad(): assert compiled_calls(lambda: fast.model.hidden(shards(0).ids_bt, shards(0).doc_bt)) == 0
    assert len(stage.residual_rms(fast.model, shards(0))) == 5

    losses = []
    for compiled in (False, True):
        torch.manual_seed(0)
        config = replace(CONFIG, compile=compiled, recompute=True, batch=8, micro_batches=2)
        trainer = stage.Trainer(config, model04.Nemotron(MICRO), make_batches(tmp_path, tokenizer, batch=8), tmp_path / "pieces")
        losses.append([trainer.train_step()["loss"] for _ in range(3)])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5) and fresh_compiler["stats"]["unique_graphs"] == made


def test_compiled_blocks_leave_the_products_in_4_bits_alone(tmp_path, tokenizer, fresh_compiler):
    """The first loss is that of plain blocks; later an fp32 sum in another order may move a value across a 4-bit border, which is no error."""
    one, two = (run(tmp_path, make_batches(tmp_path, tokenizer), folder=str(c), precision="nvfp4", compile=c, until=2) for c in (False, True))
    assert two.rows[0]["loss"] == pytest.approx(one.rows[0]["loss"], rel=1e-5) and two.rows[1]["loss"] == pytest.approx(one.rows[1]["loss"], rel=1e-3)
    assert fresh_compiler["stats"]["unique_graphs"] > 5


def test_a_resumed_run_keeps_its_compiler_but_may_change_how_it_writes(tmp_path, tokenizer):
    """compile rounds otherwise, so it must stay; a checkpoint from before there was such a setting was not compiled."""
    folder = run(tmp_path, make_batches(tmp_path, tokenizer), until=1).save()
    stage.check_same_run(folder, replace(CONFIG, async_save=False), "")
    with pytest.raises(ValueError, match="trained with compile = False, not True"): stage.check_same_run(folder, replace(CONFIG, compile=True), "")
    about = json.loads((folder / "pretrain.json").read_text())
    del about["config"]["compile"]
    (folder / "pretrain.json").write_text(json.dumps(about))
    stage.check_same_run(folder, CONFIG, "")


def test_a_branch_sees_the_data_and_rates_that_the_main_run_saw(tmp_path, tokenizer):
    """A branch in the main run's precision repeats it to the bit; in NVFP4 the first loss already differs. So the gap is one of precision alone."""
    batches = make_batches(tmp_path, tokenizer, extra=2)
    whole = run(tmp_path, batches)
    run(tmp_path, batches, until=3, folder="cut")
    rows = {}
    for precision in ("fp32", "nvfp4"):
        config = replace(CONFIG, precision=precision)
        branch = stage.Trainer.load(tmp_path / "cut" / "step-000003", config, batches, tmp_path / precision)
        branch.fit(STEPS)
        rows[precision] = branch.rows
    assert same(rows["fp32"]) == same(whole.rows[3:])
    assert rows["nvfp4"][0]["loss"] != rows["fp32"][0]["loss"] and rows["nvfp4"][0]["lr"] == rows["fp32"][0]["lr"]
    assert stage.relative_gap(rows["nvfp4"], rows["fp32"]) == pytest.approx(0, abs=0.1)
    a, b = [dict(loss=x) for x in (9.0, 9.0, 2.0, 4.0)], [dict(loss=x) for x in (0.0, 0.0, 1.0, 3.0)]
    assert stage.relative_gap(a, b) == 0.5


def test_bits_per_byte_count_every_token_but_the_first_of_a_document(tmp_path, tokenizer):
    """Against a sum written out token by token; a last window shorter than the others counts as well."""
    torch.manual_seed(0)
    model, documents = model04.Nemotron(MICRO).eval(), text(3)
    data = shard(tmp_path / "x.bin", documents, tokenizer)
    nats, counted = stage.score_text(model, data, tokenizer, seq=40, windows=1000, batch=3)
    ids, size, want, size_want, begins = torch.from_numpy(data.tokens.astype(np.int64)), tokenizer.byte_counts(320), 0.0, 0, {0, *data.ends.tolist()}
    for start in range(0, len(ids) - 1, 40):
        window = ids[start:start + 41]
        inside = [0] + [i for i in range(1, len(window)) if start + i in begins] + [len(window)]
        for lo, hi in zip(inside, inside[1:]):      # each document's part of the window on its own
            if hi - lo < 2: continue
            logp = model(window[None, lo:hi]).log_softmax(-1)[0]
            want -= logp[range(hi - lo - 1), window[lo + 1:hi]].sum().item()
            size_want += int(size[window[lo + 1:hi]].sum())
    assert counted == size_want and nats == pytest.approx(want, rel=1e-5)      # fp32 sums in another order


# ---- ranks, lengths, recipes

def test_ranks_together_read_what_one_reads_alone(tmp_path, tokenizer):
    """Rows dealt out in turn, none twice: a rank that ignored its number would train on the same text as the others."""
    one = make_batches(tmp_path, tokenizer)
    shards = dict(zip(one.names, (stream.shard for stream in one.streams)))
    parts = [stage.Batches(shards, stage.Blend.of(shards), 4, 24, 6, 0, rank=rank, ranks=2) for rank in range(2)]
    for step in (0, 5):
        whole, halves = one(step), [part(step) for part in parts]
        for x, (a, b) in zip(whole, zip(*halves)): assert torch.equal(x[0::2], a) and torch.equal(x[1::2], b)
    with pytest.raises(ValueError, match="cannot be shared by 3 ranks"): stage.Batches(shards, stage.Blend.of(shards), 4, 24, 6, 0, ranks=3)


def test_long_and_short_steps_alternate_and_never_mix(tmp_path, tokenizer):
    """92 % of the steps are long, evenly spread; all have the same number of tokens."""
    short, long = make_batches(tmp_path, tokenizer, steps=50), make_batches(tmp_path, tokenizer, steps=50, batch=1, seq=96)
    both = stage.LongShort(long, short)
    lengths = [both(step).ids_bt.shape for step in range(50)]
    assert lengths.count((1, 96)) == 46 and lengths.count((4, 24)) == 4
    at = [i for i, shape in enumerate(lengths) if shape == (4, 24)]
    assert max(b - a for a, b in zip(at, at[1:])) <= 13 and torch.equal(both(at[1]).ids_bt, short(at[1]).ids_bt)
    with pytest.raises(ValueError, match="must be equal"): stage.LongShort(long, make_batches(tmp_path, tokenizer, batch=2))


def test_a_recipe_can_change_during_a_run(tmp_path, tokenizer):
    """The late switch of the forward pass to high precision: the run's losses leave those of the run without it at that step, not before."""
    batches = make_batches(tmp_path, tokenizer)
    plain, switched = (stage.Trainer(replace(CONFIG, precision="nvfp4"), model04.Nemotron(MICRO), batches, tmp_path / name) for name in "ab")
    switched.model.load_state_dict(plain.model.state_dict())
    for step in range(4):
        if step == 2: switched.use_recipe(nvfp4.NVFP4Recipe(forward=False))
        assert (plain.train_step()["loss"] == switched.train_step()["loss"]) == (step < 2)
    assert any(m.recipe is None for m in switched.model.modules() if type(m).__name__ == "Experts")      # the MTP head's stay outside


# ---- health

def test_the_health_numbers_are_what_they_say(tmp_path, tokenizer):
    """Residual stream against the sum of the layers written out; the update ratio against weights before and after a step."""
    trainer = run(tmp_path, make_batches(tmp_path, tokenizer), until=2)
    batch, model = trainer.batches(0), trainer.model
    with torch.no_grad():
        x, want = model.backbone.embeddings(batch.ids_bt), []
        mask = model04.attention_mask(batch.doc_bt, batch.ids_bt.shape[1])
        for block in model.backbone.layers:
            x = block(x, batch.doc_bt, mask)[0]
            want.append(x.square().mean().sqrt().item())
    assert stage.residual_rms(model, batch) == pytest.approx(want, rel=1e-5)
    assert not any(block._forward_hooks for block in model.backbone.layers)
    before = [p.clone() for p in model.parameters()]
    trainer.train_step()
    moved = [((p - q).norm() / p.norm()).item() for p, q in zip(model.parameters(), before) if p.dim() > 1]
    assert stage.update_ratio(trainer.optimizer) == pytest.approx(float(torch.tensor(moved).median()), rel=1e-2)


def test_health_is_looked_at_when_asked(tmp_path, tokenizer):
    trainer = run(tmp_path, make_batches(tmp_path, tokenizer), health_every=2)
    assert [len(row.get("residual_rms", [])) for row in trainer.rows] == [0, 5, 0, 5, 0, 5]
    loads, row = trainer.load_me.tolist(), trainer.rows[-1]      # of the last step
    assert row["dead_experts"] == sum(count == 0 for layer in loads for count in layer)
    assert row["max_vio"] == pytest.approx(max(max(layer) * len(layer) / sum(layer) for layer in loads))


def test_the_share_of_the_peak_counts_useful_work_only(tmp_path, tokenizer, monkeypatch):
    """One attention layer by hand, for a token among 24: projections 2 · (2 · 32 · 32 + 2 · 32 · 16) = 6,144, scores and sums
    4 · 32 · 25 / 2 = 1,600, output 2 · 32 · 320 = 20,480; a depth of the MTP head the same and eh_proj's 2 · 64 · 32 = 4,096. Times three;
    recomputing earns nothing."""
    attention = replace(MICRO, pattern="*", mtp_pattern="*")
    assert stage.training_flops(attention, 24, 0) == 3 * 28_224 and stage.training_flops(attention, 24, 2) == 3 * (28_224 + 2 * 32_320) == 278_592
    assert stage.peak_share(1000.0, 3e9, 1e13, 2) == 0.15
    batches = make_batches(tmp_path, tokenizer)
    assert "peak_share" not in run(tmp_path, batches, until=1).rows[0]      # a CPU's peak is not known, and none is made up
    monkeypatch.setattr(stage, "device_peak", lambda device: 1e9)
    for changes in (dict(), dict(recompute=True, micro_batches=2)):
        torch.manual_seed(0)
        trainer = stage.Trainer(replace(CONFIG, **changes), model04.Nemotron(attention), batches, tmp_path / "x")
        row = trainer.train_step()
        assert row["peak_share"] == pytest.approx(row["tokens_per_s"] * 278_592 / 1e9, rel=1e-3)
    assert "peak_share" not in stage.Trainer(CONFIG, model04.Nemotron(MICRO), batches, tmp_path / "x", objective=spiky(99)).train_step()


def test_only_the_cards_of_the_data_sheet_have_a_peak(monkeypatch):
    """989 TFLOP/s is the SXM card's; a PCIe H100 is slower, and GH200 only sounds like H200."""
    peaks = {"NVIDIA H100 80GB HBM3": 989e12, "NVIDIA H200": 989e12, "NVIDIA H100 PCIe": None, "NVIDIA GH200 480GB": None, "Tesla T4": None}
    for name, peak in peaks.items():
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda name=name: name)
        assert stage.device_peak("cuda") == peak and stage.device_peak("cpu") is None


def test_a_spike_is_high_for_several_steps_and_a_noisy_run_has_none():
    rng, detect = np.random.default_rng(0), stage.SpikeDetector(window=32)
    row = lambda loss, norm=1.0: dict(loss=loss, grad_norm=norm)
    for i in range(400): assert detect(row(3 - i / 400 + 0.1 * rng.normal(), np.exp(0.3 * rng.normal()))) is None      # falling, noisy
    assert [detect(row(9.0)) for _ in range(2)] == [None, None] and detect(row(2.0)) is None       # two steps are no spike
    assert [bool(detect(row(9.0))) for _ in range(4)] == [False, False, True, False]                # named once, at the third
    assert "grad_norm" in [detect(row(2.0, 1e3)) for _ in range(3)][-1]
    early = stage.SpikeDetector(window=32)
    assert not any(early(row(9.0 if i % 2 else 1.0)) for i in range(31))                            # no history, no judgement


def spiky(losses_from: int):
    """Stage 04's loss, a hundred times as high from the given step on, until somebody goes back."""
    seen = Counter()
    def objective(model, x):
        y = model04.loss(model, *x)
        seen["calls"] += 1
        return y._replace(total=y.total * 100, main=y.main * 100) if losses_from <= seen["calls"] < losses_from + 3 else y
    return objective


def test_a_spike_rolls_the_run_back_and_starts_the_decay(tmp_path, tokenizer, monkeypatch):
    """As the report did at 16T tokens: weights and step are those of the last checkpoint before the spike, and the rate falls from there."""
    monkeypatch.setattr(stage, "SpikeDetector", lambda: detector(window=8))
    detector = SPIKE
    config = replace(CONFIG, steps=40, decay=0.25, save_every=6, keep=9, on_spike="rollback", warmup=0.0)
    batches = make_batches(tmp_path, tokenizer, steps=40)
    torch.manual_seed(0)
    trainer = stage.Trainer(config, model04.Nemotron(MICRO), batches, tmp_path / "run", objective=spiky(20))
    assert trainer.fit(40)
    assert trainer.decay_from == 12 and trainer.step == 22 == trainer.last_step      # seen at step 22; 18 is too near, 12 + 10 steps of decay
    assert [row["step"] for row in trainer.rows] == list(range(1, 23))
    assert trainer.rows[11]["lr"] == config.lr and trainer.rows[-1]["lr"] == config.lr_min
    assert trainer.rows[12]["lr"] == stage.wsd_lr(13, 22, 0, 10, config.lr, config.lr_min) < config.lr
    assert [json.loads(line)["step"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()] == list(range(1, 23))
    assert stage.newest_checkpoint(tmp_path / "run").name == "step-000022"
    again = stage.Trainer.load(tmp_path / "run" / "step-000022", config, batches, tmp_path / "again")
    assert again.decay_from == 12      # a resumed run keeps its new end
    for how, message in (("stop", "a spike at step 22: loss is"), ("rollback", "no checkpoint from before it")):
        torch.manual_seed(0)
        other = stage.Trainer(replace(config, on_spike=how, save_every=50), model04.Nemotron(MICRO), batches, tmp_path / how, objective=spiky(20))
        with pytest.raises(ValueError, match=message): other.fit(40)


# ---- merging

def test_merge_weights_are_those_of_the_minus_sqrt_decay():
    """Both conventions, six checkpoints, by hand to three digits; sums are 1 and older checkpoints weigh more (but for the left edge's 0)."""
    assert stage.merge_weights(6, "left") == pytest.approx([0, .447, .185, .142, .120, .106], abs=6e-4)
    assert stage.merge_weights(6, "right") == pytest.approx([.408, .169, .130, .109, .096, .087], abs=6e-4)
    for n in (1, 2, 7, 40):
        for timing in ("left", "right"): assert sum(stage.merge_weights(n, timing)) == pytest.approx(1) and min(stage.merge_weights(n, timing)) >= 0
    for bad in (lambda: stage.merge_weights(0), lambda: stage.merge_weights(3, "middle")):
        with pytest.raises(ValueError): bad()


def test_merging_equals_the_decay_it_stands_for():
    """Gradients that do not depend on the weights: sum of c_j theta_j is where steps w_i g_i end. An index that is off by one breaks it."""
    updates = torch.randn(5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    points = torch.cat([torch.zeros(1, 3, dtype=torch.float64), updates.cumsum(0)])      # 6 checkpoints at a constant rate
    for timing, t in (("left", [i / 5 for i in range(5)]), ("right", [i / 6 for i in range(1, 6)])):
        decayed = sum((1 - math.sqrt(x)) * g for x, g in zip(t, updates))
        merged = sum(c * p for c, p in zip(stage.merge_weights(6, timing), points))
        torch.testing.assert_close(merged, decayed)


def test_merged_checkpoints_are_the_weighted_mean_of_every_tensor(tmp_path, tokenizer):
    trainer = run(tmp_path, make_batches(tmp_path, tokenizer), save_every=2, keep=9)
    folders = stage.checkpoints(trainer.home)
    merged, weights = stage.merge_checkpoints(folders).state_dict(), stage.merge_weights(len(folders))
    parts = [model04.load_checkpoint(folder).state_dict() for folder in folders]
    assert len(folders) >= 3 and len(merged) == len(parts[0])
    for name, x in merged.items():
        torch.testing.assert_close(x, sum(w * part[name].double() for w, part in zip(weights, parts)).to(x.dtype))
    assert torch.equal(stage.merge_checkpoints(folders, [0.0] * (len(folders) - 1) + [1.0]).lm_head.weight, parts[-1]["lm_head.weight"])
    (folders[0] / "config.json").unlink()
    with pytest.raises(ValueError, match="config.json is missing: leave it out"): stage.merge_checkpoints(folders)
    with pytest.raises(ValueError, match="2 weights for 3"): stage.merge_checkpoints(folders[-3:], [0.5, 0.5])


# ---- checkpoints and bad input

def test_a_checkpoint_cut_short_is_named_and_passed_over(tmp_path, tokenizer, capsys):
    batches = make_batches(tmp_path, tokenizer)
    trainer = run(tmp_path, batches, until=4, save_every=2)
    assert [p.name for p in stage.checkpoints(trainer.home)] == ["step-000002", "step-000004"] and not list(trainer.home.glob("*.part"))
    file = trainer.home / "step-000004" / "trainer.pt"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match="trainer.pt is cut short"):
        stage.Trainer.load(file.parent, CONFIG, batches, trainer.home)
    assert stage.newest_checkpoint(trainer.home).name == "step-000002"
    assert "step-000004" in capsys.readouterr().out
    (trainer.home / "step-000002" / "config.json").unlink()
    with pytest.raises(ValueError, match="no whole checkpoint"): stage.newest_checkpoint(trainer.home)


@pytest.mark.parametrize("where", ["torch.save", "os.fsync", "os.replace"])
def test_a_disk_that_refuses_leaves_the_older_checkpoint_whole(where, tmp_path, tokenizer, monkeypatch):
    """At whatever moment it refuses: the new folder gets its name last, in one move."""
    trainer = run(tmp_path, make_batches(tmp_path, tokenizer), until=2)
    trainer.train_step()
    def full(*args, **kwargs): raise OSError(28, "No space left on device")
    module, name = where.split(".")
    monkeypatch.setattr(getattr(stage, module), name, full)
    with pytest.raises(ValueError, match="No space left on device"): trainer.save()
    assert [p.name for p in trainer.home.iterdir() if p.is_dir()] == ["step-000002"] and stage.damage(trainer.home / "step-000002") is None


def test_old_checkpoints_go_but_the_branch_point_stays(tmp_path, tokenizer):
    trainer = run(tmp_path, make_batches(tmp_path, tokenizer), save_every=1, keep=2)
    assert CONFIG.branch_step == 3
    assert [p.name for p in stage.checkpoints(trainer.home)] == ["step-000003", "step-000005", "step-000006"]


def test_a_loss_that_is_not_finite_stops_the_run_before_the_weights_move(tmp_path, tokenizer):
    trainer = run(tmp_path, make_batches(tmp_path, tokenizer), until=1)
    before = [p.clone() for p in trainer.model.parameters()]
    trainer.objective = lambda model, x: (lambda y: y._replace(total=y.total * math.inf))(model04.loss(model, *x))
    with pytest.raises(ValueError, match="step 2: the loss is"): trainer.train_step()
    assert all(torch.equal(p, q) for p, q in zip(trainer.model.parameters(), before))


def command(*args):
    """Runs the file as a command in this process; returns what it leaves with: 0, an exit code, or a last sentence (exit code 1)."""
    before, sys.argv = sys.argv, ["05_pretrain.py", *map(str, args)]
    try: runpy.run_path(str(ROOT / "05_pretrain.py"), run_name="__main__")
    except SystemExit as leave: return leave.code
    finally: sys.argv = before
    return 0


def small(tmp_path, n=30):
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": d}) + "\n" for d in text(n)))
    return ["--data", tmp_path / "text.jsonl", "--out", tmp_path / "out", "--steps", 4, "--batch", 2, "--seq", 32, "--branches"]


def bad(tmp_path):
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "short.txt").write_text("a few words")
    (tmp_path / "wrong.jsonl").write_text('{"text": "fine"}\n{"words": "no text"}\n')
    out = ["--out", tmp_path / "out", "--branches"]
    return {
        "empty corpus": ([*out, "--data", tmp_path / "empty.txt"], "the corpus is empty"),
        "corpus shorter than a batch": ([*out, "--data", tmp_path / "short.txt"], "one batch of"),
        "no such file": ([*out, "--data", tmp_path / "nothing" / "*.txt"], "no such file"),
        "unknown source": ([*out, "--data", "poems"], "give one of stdlib, pydoc, tasks, stories"),
        "row without text": ([*out, "--data", tmp_path / "wrong.jsonl"], 'wrong.jsonl line 2 is not a JSON object with a field "text"'),
        "hub without network": ([*out, "--data", "hf:nobody/nothing"], "cannot fetch hf:nobody/nothing"),
        "hub amount of nothing": ([*out, "--data", "hf:some/set@0MB"], "amounts end in KB, MB or GB"),
        "no compiler": ([*out, "--compile", "--data", tmp_path / "short.txt"], "needs a C++ compiler"),
        "path not writable": (["--out", tmp_path / "empty.txt" / "out"], "cannot write to"),
        "no checkpoint to resume": ([*small(tmp_path), "--resume"], "nothing to resume"),
        "no checkpoint to branch from": (["--branch-from", tmp_path / "nothing"], "not a whole checkpoint"),
        "model too large": ([*out, "--preset", "ultra"], "preset ultra needs"),
        "device not there": ([*out, "--device", "mps" if not torch.backends.mps.is_available() else "cuda"], "sees no such device"),
    }


@pytest.mark.parametrize("case", [
    "empty corpus", "corpus shorter than a batch", "no such file", "unknown source", "row without text", "hub without network",
    "hub amount of nothing", "no compiler", "path not writable", "no checkpoint to resume", "no checkpoint to branch from", "model too large",
    "device not there"])
def test_bad_input_ends_with_one_clear_sentence(case, tmp_path, monkeypatch):
    """Leaving with a string prints it and gives exit code 1; anything else would be a traceback."""
    args, sentence = bad(tmp_path)[case]
    if case == "no compiler": monkeypatch.setattr(shutil, "which", lambda name: None)
    left = command(*args)
    assert isinstance(left, str) and sentence in left and left.startswith("05_pretrain: ") and "\n" not in left, left


def test_an_unknown_preset_is_refused_with_the_names_that_exist(tmp_path, capsys):
    assert command("--preset", "huge", "--out", tmp_path) == 2
    assert "huge" in (said := capsys.readouterr().err) and "tiny" in said and "Traceback" not in said
    assert command("--micro-batches", "3", "--out", tmp_path) == 2
    assert "cannot be cut into micro_batches = 3" in " ".join(capsys.readouterr().err.replace("│", " ").split())
    with pytest.raises(ValueError, match="unknown preset 'huge': choose one of tiny"): stage.PretrainConfig(preset="huge")


def test_ctrl_c_saves_and_the_resumed_run_ends_like_one_never_stopped(tmp_path):
    """A real process and a real signal, in the middle of a run of preset tiny."""
    args = [str(x) for x in small(tmp_path)]
    args[args.index("--steps") + 1] = "3000"
    env = dict(os.environ, OMP_NUM_THREADS="1")
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process = subprocess.Popen([sys.executable, "05_pretrain.py", *args], cwd=ROOT, env=env, **pipes)
    log = tmp_path / "out" / "pretrain" / "metrics.jsonl"
    deadline = time.time() + 60
    while not (log.exists() and log.read_text().count("\n") >= 2) and time.time() < deadline and process.poll() is None: time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in out + err, out + err
    n = int(re.search(r"stopped after step (\d+), saved in (\S+)", out)[1])
    folder = stage.newest_checkpoint(log.parent)
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    assert folder.name == f"step-{n:06d}" and len(rows) == n and "--resume" in out

    config = stage.PretrainConfig(data=(str(tmp_path / "text.jsonl"),), out=tmp_path / "out", steps=3000, batch=2, seq=32, branches=(), resume=True)
    data = stage.prepare_data(config.data, config.out / "data", 4096)
    batches = stage.Batches(data.train, stage.Blend.of(data.train), 2, 32, 3000, 0)
    resumed = stage.start(config, data, batches)
    resumed.fit(n + 2)
    whole = stage.start(replace(config, resume=False, out=tmp_path / "other"), data, batches)
    whole.fit(n + 2)
    assert same(whole.rows) == same(resumed.rows) == same(rows) + same(whole.rows[n:])
    with pytest.raises(ValueError, match="trained with lr = 0.004, not 0.1"): stage.start(replace(config, lr=0.1), data, batches)
    with pytest.raises(ValueError, match="--resume goes on with it"): stage.start(replace(config, resume=False), data, batches)


def test_the_command_runs_from_text_to_text(tmp_path, capsys, monkeypatch):
    """End to end on a few steps of preset tiny: table, training, a branch in each precision, bits per byte, text, result row."""
    args = small(tmp_path, 400)
    args[args.index("--branches"):] = ["--branches", "fp32", "nvfp4", "--branch-steps", 2, "--decay", 0.25]
    assert command(*args) == 0
    said = capsys.readouterr().out
    for words in ("precision in training", "relative loss gap of nvfp4 to fp32", "bits per byte", "a story", "a Python function", "an arithmetic"):
        assert words in said, words
    row = json.loads((tmp_path / "out" / "results.jsonl").read_text().splitlines()[-1])
    assert row["stage"] == "05_pretrain" and row["steps"] == 4 and set(row["bits_per_byte"]) == {"files", "all"} and len(row["samples"]) == 3
    assert len((tmp_path / "out" / "pretrain" / "metrics.jsonl").read_text().splitlines()) == 4
    checkpoint = tmp_path / "out" / "pretrain" / "step-000001"
    assert command("--out", tmp_path / "out", "--branch-from", checkpoint, "--precision", "bf16", "--branch-steps", 2) == 0
    assert "2 steps in bf16" in capsys.readouterr().out
