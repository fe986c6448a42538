"""Long context: buckets and scores by hand, prompts nobody has trained on, a phase at one rate, and a memory count that sees a [t, t] mask."""
import dataclasses
import importlib
import itertools
import json
import math
import random
import re
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "experiments"))
experiment = importlib.import_module("long_context")
model04, pretrain, corpus = (importlib.import_module(name) for name in ("04_model", "05_pretrain", "data.corpus"))

SMALL = model04.ModelConfig(pattern="M*E", d_model=32, vocab=320, heads=4, kv_heads=2, head_dim=8, mamba_heads=16, mamba_head_dim=2, groups=2,
                            state=8, chunk=64, experts=4, experts_per_token=2, latent=16, expert_width=32, shared_width=32)


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    """Made-up words, enough of them to become tokens."""
    rng = random.Random(0)
    words = ["".join(rng.choice("bdfgklmnprst") + rng.choice("aeiou") for _ in range(rng.randint(2, 3))) for _ in range(150)]
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n\n".join(f"Part {i} of the book: " + " ".join(rng.choices(words, k=60)) + f" {i * i}." for i in range(250)))
    return path


@pytest.fixture(scope="module")
def config(text):
    """Everything the command does, in seconds."""
    home = text.parent
    return experiment.Config(steps=13, long_seq=64, short_seq=16, batch=1, base_steps=2, longest=64, documents=2, prompts=2, distances=(8, 32),
                             memory=(16, 32, 64), data=(str(text),), home=home, out=home)


@pytest.fixture(scope="module")
def base(config):
    """(a checkpoint of two steps at lengths of 16, its data, long documents: the beginnings of 60, for speed)"""
    every, patch = experiment.long_documents, pytest.MonkeyPatch()
    patch.setattr(experiment, "long_documents", lambda size: (text[:3000] for text in itertools.islice(every(size), 60)))
    checkpoint, data = experiment.starting_point(config)
    yield checkpoint, data, experiment.write_long_text(config, data.tokenizer, config.home / "long_context")
    patch.undo()


# ---- loss by position

def test_a_bucket_holds_the_positions_from_one_edge_to_before_the_next():
    """1 2 3 5 with edges 0 1 4: the first alone, then the mean of three; an edge counted twice or left out changes it."""
    assert experiment.bucket_edges(256, 8192) == [0, 256, 512, 1024, 2048, 4096, 8192] and experiment.bucket_edges(4, 6) == [0, 4, 6]
    means = experiment.bucket_means(torch.tensor([[1.0, 2.0, 3.0, 5.0], [0.0, 0.0, 6.0, 0.0]]), [0, 1, 4])
    torch.testing.assert_close(means, torch.tensor([[1.0, 10 / 3], [0.0, 2.0]], dtype=torch.float64), rtol=0, atol=1e-12)
    assert experiment.mean_and_error(torch.tensor([1.0, 3.0])) == (2.0, 1.0) and experiment.mean_and_error(torch.tensor([7.0])) == (7.0, None)


def test_a_tokens_loss_is_that_of_the_token_after_the_position():
    """Against log-softmax of the logits of each prefix alone: a shift by one, a look ahead, or a lost chunk of rows shows."""
    model, ids = model04.Nemotron(SMALL).eval(), torch.randint(12, 320, (1, 13))
    with torch.no_grad():
        want = [-model(ids[:, :i])[0, -1].double().log_softmax(-1)[ids[0, i]].item() for i in range(1, 13)]
    assert experiment.token_nats(model, ids, rows=5)[0].tolist() == pytest.approx(want, abs=1e-5)
    # windows of 4: positions 0-3, 4-7, 8-11 each begin anew
    with torch.no_grad():
        want = [-model(ids[:, i - i % 4:i + 1])[0, -1].double().log_softmax(-1)[ids[0, i + 1]].item() for i in range(12)]
    assert experiment.windowed_nats(model, ids[0], 4).tolist() == pytest.approx(want, abs=1e-5)
    both = experiment.loss_by_position(model, ids, 4, [0, 4, 12])
    assert both["window"][0, 1].item() == pytest.approx(sum(want[4:]) / 8, abs=1e-5) and both["window"][0, 0] == pytest.approx(both["whole"][0, 0])


# ---- copy and needle

def test_scores_by_hand():
    """A hit is the first choice of the vocabulary, a choice that of the pool; nats count the vocabulary or the pool alone."""
    ln = math.log
    logits = torch.tensor([[0, 0, ln(2), 0, 0], [ln(8), 0, 0, ln(3), 0]])
    hit = experiment.score(logits[:1], torch.tensor([2]), [1, 2])
    assert hit == pytest.approx((1.0, 1.0, ln(6 / 2), ln(3 / 2)))      # 2 of 1 1 2 1 1, and 2 of 1 2
    miss = experiment.score(logits[1:], torch.tensor([3]), [1, 3])
    assert miss == pytest.approx((0.0, 1.0, ln(14 / 3), ln(4 / 3)))    # id 0 is preferred, but it is not in the pool
    assert experiment.score(logits[1:], torch.tensor([1]), [3, 1]) == pytest.approx((0.0, 0.0, ln(14), ln(4)))
    both = experiment.score(logits, torch.tensor([2, 3]), [1, 2, 3])
    assert both == pytest.approx((0.5, 1.0, (ln(3) + ln(14 / 3)) / 2, (ln(4 / 2) + ln(5 / 3)) / 2))


class Memory(torch.nn.Module):
    """Knows every next token of a row that begins with one of `facts`, and nothing of any other: logits are then uniform."""
    def __init__(self, vocab: int, *facts: list[int]):
        super().__init__()
        self.facts, self.lm_head = facts, torch.nn.Linear(vocab, vocab, bias=False)
        torch.nn.init.eye_(self.lm_head.weight)

    def hidden(self, ids_bt):
        knows_b = torch.tensor([any(row[:len(fact)] == fact for fact in self.facts) for row in ids_bt.tolist()])
        return 50.0 * knows_b[:, None, None] * torch.nn.functional.one_hot(ids_bt.roll(-1, 1), self.lm_head.in_features)


@pytest.mark.parametrize("task", ["copy", "needle"])
def test_a_perfect_memory_recalls_all_and_none_recalls_nothing(task, config, base):
    """What knows after the fact only gains ln pool nats; what knows in both cases, or never, gains none. Catches places off by one."""
    prompt, n = experiment.make_prompts(config, base[1].tokenizer, base[2].rows_nt)[task][32][0], dict(copy=64, needle=10)[task]
    assert len(prompt.pool) == len(set(prompt.pool)) == n and len(prompt.scored) == dict(copy=47, needle=16)[task]
    before, another = (ids[:prompt.scored[0]] for ids in (prompt.ids, prompt.other))      # all that stands before what is asked
    assert before != another
    # one more id behind both: the stand-in reads the next id from the row, and what is scored last must have one
    prompt = prompt._replace(ids=[*prompt.ids, 5], other=[*prompt.other, 5])
    memory = Memory(4096, before)
    known, unknown = experiment.score_prompt(memory, prompt)
    assert known.hits == known.choice == 1 and known.nats < 1e-6 and unknown.choice_nats == pytest.approx(math.log(n)) and unknown.nats > 8
    row, = experiment.measure_recall(memory, {task: {32: [prompt]}})[task]
    assert row["recalled"] == pytest.approx(math.log(n)) == row["chance_nats"] and row["chance"] == 1 / n and row["tokens"] == len(prompt.scored)
    for model in (Memory(4096), Memory(4096, before, another)):
        known, unknown = experiment.score_prompt(model, prompt)
        assert known == pytest.approx(unknown) and experiment.measure_recall(model, {task: {32: [prompt]}})[task][0]["recalled"] == pytest.approx(0)


def test_a_prompt_says_the_same_twice_with_the_distance_between(config, base):
    """A copy string stands before and behind the filler, another one in the other row; facts do not depend on the distance; a needle is text."""
    tokenizer, rows_nt = base[1].tokenizer, base[2].rows_nt
    prompts = experiment.make_prompts(config, tokenizer, rows_nt)
    for by_gap in prompts.values():
        for near, far in zip(by_gap[8], by_gap[32]):
            assert len(far.ids) - len(near.ids) == 32 - 8 and [near.ids[i] for i in near.scored] == [far.ids[i] for i in far.scored]
            for p in (near, far):
                assert {p.ids[i] for i in p.scored} <= set(p.pool) and len(p.ids) == len(p.other)
                assert sum(a != b for a, b in zip(p.ids, p.other)) >= 0.5 * len(p.scored) and p.ids[p.scored[0] - 1:] == p.other[p.scored[0] - 1:]
    for i, p in enumerate(prompts["copy"][32]):
        assert p.ids[:48] == p.ids[80:] == p.other[80:] and p.scored == [*range(81, 128)]
        assert p.ids[48:80] == p.other[48:80] == rows_nt[i, :32].tolist()
    prompt = experiment.needle_prompt(tokenizer, [7] * 10, random.Random(0))
    before, after = prompt.ids[:prompt.ids.index(7)], prompt.ids[prompt.ids.index(7) + 10:]
    assert tokenizer.encode(tokenizer.decode(before)) == before and tokenizer.encode(tokenizer.decode(after)) == after
    facts = dict(re.findall(r"^The vault of ([A-Z][A-Za-z ]+) opens with (\d{4})\.$", tokenizer.decode(before), re.M))
    asked = re.findall(r"^Which digits open the vault of (.+)\? The vault of (.+) opens with (\d{4})\.$", tokenizer.decode(after), re.M)
    assert len(facts) == len(asked) == 4 and all(key == again and facts[key] == digits for key, again, digits in asked)


def test_a_test_in_the_training_text_is_found(config, base, tmp_path):
    """The real prompts are in no shard; a string planted in the middle of a document, and a needle's wording, are."""
    _, data, long_text = base
    tokenizer = data.tokenizer
    prompts = experiment.make_prompts(config, tokenizer, long_text.rows_nt)
    wanted, shards = experiment.phrases(tokenizer, prompts), data.train | {"long documents": long_text.train}
    assert len(wanted) == 2 * 12 + 2 and experiment.found_in_training(tokenizer, shards, wanted) == []
    string = prompts["copy"][32][1].ids[:48]
    for i, leak in enumerate((tokenizer.decode(string[8:16]), "Here: The vault of Rome opens with 1234.")):
        type(long_text.train).write(tmp_path / f"{i}.bin", ["Some text before.\n" + leak + "\nand after."], tokenizer)
        found = experiment.found_in_training(tokenizer, shards | {"planted": type(long_text.train)(tmp_path / f"{i}.bin")}, wanted)
        assert found and {name for name, _ in found} == {"planted"} and all(phrase in leak for _, phrase in found)


# ---- long documents and the phase

ALL_LONG_DOCUMENTS = experiment.long_documents


def test_long_documents_are_long_and_new_to_the_built_in_source():
    """Each has the size asked for, and no top-level class or function of it is one that stage 05's source takes."""
    documents = list(ALL_LONG_DOCUMENTS(40_000))
    assert len(documents) > 20 and min(map(len, documents)) >= 40_000
    assert len({line for text in documents for line in text.splitlines() if line.startswith("# ") and line.endswith(".py")}) > 100      # paths
    short = set(corpus.stdlib_code(0))
    pieces = [piece.strip() + "\n" for text in documents for piece in re.split(r"\n{2,}(?=@|(?:def|class|async def)\b|# \S+\.py\n)", text)]
    assert len(pieces) > 300 and not short & {piece for piece in pieces if not piece.startswith("# ")}
    assert sum(text.count("class ") for text in short) > 100      # the source itself was read


def test_dropping_the_mask_of_one_document_changes_nothing_but_the_mask():
    """Loss and gradients with document ids 7 7 7 .. and without; ids that change, or padding, must stay."""
    torch.manual_seed(0)
    model, ids = model04.Nemotron(SMALL).double(), torch.randint(12, 320, (2, 20))
    one = torch.tensor([[7] * 19, [3] * 19])
    assert experiment.needed_documents(one) is None
    found = []
    for doc in (one, None):
        losses = model04.loss(model, ids[:, :-1], ids[:, 1:], doc)
        losses.total.backward()
        found.append((losses.total.item(), model.lm_head.weight.grad.clone(), losses.load_me))
        model.zero_grad()
    assert found[0][0] == pytest.approx(found[1][0], abs=1e-12) and torch.equal(found[0][2], found[1][2])
    torch.testing.assert_close(found[0][1], found[1][1], rtol=0, atol=1e-12)
    for kept in ([[0, 0, 1]], [[-1, -1, -1]], [[0, 0, 0], [0, 1, 1]]): assert experiment.needed_documents(torch.tensor(kept)).tolist() == kept


def test_the_phase_goes_on_at_one_low_rate_with_92_percent_long_steps(config, base, tmp_path):
    """12 of 13 steps are 1 × 64 tokens and one is 4 × 16, all at lr_min; it begins with the checkpoint's weights, moments and step."""
    checkpoint, data, long_text = base
    seen, load = [], pretrain.Trainer.load

    def spy(folder, settings, batches, *args, **kwargs):
        trainer = load(folder, settings, lambda step: seen.append(batches(step)) or seen[-1], *args, **kwargs)
        assert all(state["step"] == 2 for state in trainer.optimizer.state.values()) and trainer.step == 2
        torch.testing.assert_close(trainer.model.state_dict(), model04.load_checkpoint(checkpoint).state_dict(), rtol=0, atol=0)
        return trainer

    # by pytest, which puts the class method itself back: what was read above is bound to Trainer, and its subclasses would load Trainers
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretrain.Trainer, "load", staticmethod(spy))
        trainer = experiment.train_phase(config, checkpoint, data, long_text, 0.92, "test")
    assert pretrain.Trainer.load.__func__ is load.__func__ and isinstance(vars(pretrain.Trainer)["load"], classmethod)
    shapes = [tuple(x.ids_bt.shape) for x in seen]
    assert shapes.count((1, 64)) == 12 and shapes.count((4, 16)) == 1 and [row["long"] for row in trainer.rows] == [s == (1, 64) for s in shapes]
    assert {row["lr"] for row in trainer.rows} == {4e-5} and trainer.step == 2 + 13      # PretrainConfig's lr_min
    faster = experiment.settings_of(dataclasses.replace(config, lr=1e-3), checkpoint)
    assert {pretrain.wsd_lr(n, faster.steps, faster.warmup_steps, faster.decay_steps, faster.lr, faster.lr_min) for n in (3, 9, 99)} == {1e-3}
    # a checkpoint from the middle of a run, at the peak rate or in the decay, goes on at the low rate too
    (tmp_path / "step-000450").mkdir()
    about = json.loads((checkpoint / "pretrain.json").read_text())
    (tmp_path / "step-000450" / "pretrain.json").write_text(json.dumps(about | dict(step=450, config=about["config"] | dict(steps=600))))
    middle = experiment.settings_of(config, tmp_path / "step-000450")
    assert {pretrain.wsd_lr(n, middle.steps, middle.warmup_steps, middle.decay_steps, middle.lr, middle.lr_min) for n in (451, 500)} == {4e-5}
    # the blend: 46 % of the windows from long documents, in the long steps and in the short ones
    both = experiment.phase_batches(dataclasses.replace(config, steps=100), data, long_text, 0.92)
    for batches in (both.long, both.short): assert (batches.plan == batches.names.index("long documents")).mean() == pytest.approx(0.46, abs=0.01)
    assert not any(experiment.phase_batches(config, data, long_text, 0.0).is_long(i) for i in range(13))      # the control


# ---- memory and caches

def test_the_count_of_bytes_by_hand():
    """1,000 floats and their sum live together (8,000 bytes), the third replaces the first; views and what was there before cost nothing."""
    before = torch.zeros(5000)

    def work():
        x = torch.ones(1000)
        x = x + 1                # for a moment both
        y = x.view(10, 100)[2:]
        before.add_(1)
        del x
        return y + y             # 1,000 floats behind the view, and 800 new ones

    assert experiment.peak_bytes(work) == 8000
    assert experiment.peak_bytes(lambda: before.view(-1)) == 0


def test_growth_by_hand():
    """A straight line grows by 1, t² by the ratio of the spans; a constant on top changes nothing."""
    assert experiment.slopes([1, 2, 4], [3, 5, 9]) == [2, 2]
    assert experiment.growth([1, 2, 4], [103, 105, 109]) == 1 and experiment.growth([1, 2, 4], [1, 4, 16]) == 2


@pytest.mark.parametrize("work", [experiment.forward_pass, experiment.training_pass])
def test_memory_is_linear_in_length_and_a_dense_mask_is_not(work):
    """Bytes of a pass over 1,024 to 2,048 tokens. The same count with document ids, whose mask is [t, t], must fail."""
    model, lengths = model04.Nemotron(SMALL), (1024, 1536, 2048)
    plain = [experiment.peak_bytes(lambda t=t: work(model, t)) for t in lengths]
    masked = [experiment.peak_bytes(lambda t=t: work(model, t, torch.zeros(1, t, dtype=torch.long))) for t in lengths]
    assert experiment.growth(lengths, plain) == pytest.approx(1, abs=0.1), plain
    assert experiment.growth(lengths, masked) > 1.2, masked      # t² alone: 1792 / 1280 = 1.4
    assert masked[-1] - plain[-1] > 2048 ** 2                    # at least the mask's own byte a pair


def test_the_cache_is_what_a_model_allocates():
    """Ledger against tensors; and Ultra's FP8 keys and values are as large as its fp32 states at 65,536 tokens  [Ultra, quantization]."""
    model = model04.Nemotron(SMALL)
    for t in (10, 1000):
        cache = model.empty_cache(1, t)
        held = sum(x.nbytes for layer in cache.layers if layer is not None for x in vars(layer).values() if isinstance(x, torch.Tensor))
        assert sum(experiment.cache_bytes(SMALL, t, 4, 4, 4).values()) == held
    ultra = experiment.cache_bytes(model04.PRESETS["ultra"], 65_536, kv_bytes=1, state_bytes=4, window_bytes=0)
    assert ultra["kv"] == ultra["state"] == 402_653_184


# ---- the command

def test_the_command_leaves_rows_and_a_figure(config, base, capsys):
    """Three models, two tasks, one row of memory, and the table shows the numbers of the rows."""
    pytest.importorskip("matplotlib")      # a GPU machine may lack what only figures need
    experiment.main(dataclasses.replace(config, from_checkpoint=base[0], steps=2, save=True))
    rows = [json.loads(line) for line in (config.out / "results.jsonl").read_text().splitlines()]
    assert [row["what"] for row in rows] == ["phase"] * 2 + ["loss by position"] * 3 + ["copy", "needle"] * 3 + ["memory"]
    assert (config.home / "long_context.png").stat().st_size > 10_000
    lost = {row["model"]: row["whole"] for row in rows if row["what"] == "loss by position"}
    assert set(lost) == set(experiment.MODELS) and len({x[-1] for x in lost.values()}) == 3      # three different models
    assert model04.load_checkpoint(config.home / "long_context" / "step-000004").config == model04.PRESETS["tiny"]      # two steps after two
    out = capsys.readouterr().out
    assert f"{lost['after, long'][-1]:.3f}" in out and f"{lost['after, long'][-1] - lost['before'][-1]:+.3f}" in out
    assert rows[1]["long_steps"] == 2 and rows[0]["long_steps"] == 0 and rows[-1]["growth"]["mask"]["square"] > 1
    assert all(len(row["rows"]) == 2 and row["found_in_training"] == 0 for row in rows if row["what"] in ("copy", "needle"))


@pytest.mark.parametrize("field, value", [("steps", 0), ("share", 0.0), ("long_seq", 100), ("memory", (512, 1024)), ("memory", (1024, 4096, 8192)),
                                          ("distances", (9000,))])
def test_a_setting_that_measures_nothing_is_named(field, value):
    """Found after minutes of training, it would have wasted them."""
    with pytest.raises(ValueError, match=field): dataclasses.replace(experiment.Config(), **{field: value})
