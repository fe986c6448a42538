"""Stage 08 from outside: random models for sizing, the commands, the tour, and the chat in a real terminal."""
import dataclasses
import functools
import importlib
import itertools
import json
import math
import os
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("tyro")      # a GPU machine may lack what only commands need
from data import corpus, terminal  # noqa: E402
from data.batches import Batch  # noqa: E402
from data.tokenizer import Tokenizer  # noqa: E402

nvfp4, moe, nemotron, sft, infer = (importlib.import_module(m) for m in ("01_nvfp4", "03_latentmoe", "04_model", "06_sft", "08_infer"))
serving, table = importlib.import_module("experiments.serving"), importlib.import_module("experiments.table")
ROOT, Recipe, SamplingParams = Path(__file__).parent.parent, infer.Recipe, infer.SamplingParams

MICRO = nemotron.ModelConfig(pattern="ME*", d_model=64, vocab=1024, heads=4, kv_heads=2, head_dim=16, mamba_heads=16, mamba_head_dim=4, groups=2,
                             state=8, chunk=16, experts=4, experts_per_token=2, latent=32, expert_width=48, shared_width=64)
DEEP = dataclasses.replace(MICRO, pattern="MEM*E" * 8, d_model=256, latent=64, experts=8, experts_per_token=3, expert_width=128, shared_width=256)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run's folder with one checkpoint: every parameter random, so that answers are long babble with half characters."""
    home, g = tmp_path_factory.mktemp("run"), torch.Generator().manual_seed(3)
    torch.manual_seed(3)
    model = nemotron.Nemotron(MICRO)
    with torch.no_grad():
        for name, t in model.state_dict().items():
            if t.dim() > 1 and "conv1d" not in name: t.copy_(torch.randn(t.shape, generator=g) * 1.5 / t.shape[-1] ** 0.5)
            else: t.add_(0.3 * (torch.rand(t.shape, generator=g) - 0.5))
        model.lm_head.weight[list(infer.SamplingParams().stop_ids)] = 0      # never the likeliest: greedy babble does not end
    folder = home / "boosted" / "step-000003"
    nemotron.save_checkpoint(folder, model, Tokenizer.train(itertools.islice(corpus.worked_tasks(0), 400), 1024))
    (folder / "files.json").write_text(json.dumps({f.name: f.stat().st_size for f in folder.iterdir()}))
    return folder.parent


def tail(run): return run / "step-000003"


# ---- random models

@pytest.mark.parametrize("recipe", [None, Recipe(), Recipe(weights_only=True)], ids=["16bit", "w4a4", "w4a16"])
def test_a_random_model_keeps_the_size_of_its_hiddens_and_its_bill(recipe):
    """40 layers: a scale that is forgotten, or meant for other codes, lets hiddens vanish or grow; a copy in bf16 would not fit the bill."""
    model, rms = infer.random_model(DEEP, recipe), []
    with torch.device("meta"): named = list(nemotron.released_tensors(nemotron.Nemotron(DEEP)))
    bill = infer.count_bits(named, recipe or Recipe(precision=(), kv_fp8=False))
    assert 8 * sum(t.nbytes for t in (*model.parameters(), *model.buffers())) == sum(s["bits"] for s in bill.values())
    for block in model.backbone.layers: block.register_forward_hook(lambda m, args, y: rms.append(y[0].float().square().mean().sqrt().item()))
    ids = torch.randint(12, 1024, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad(): logits = model(ids).float()
    assert len(rms) == 40 and max(rms) < 10 * min(rms) and 0.2 < min(rms) and max(rms) < 5 and logits.isfinite().all()
    assert 0.5 < logits.std() < 2 and logits.argmax(-1).unique().numel() > 10        # it says many things
    # each block adds something: none is dead, whatever its letter
    assert all(later != earlier for later, earlier in zip(rms[1:], rms))


@pytest.mark.parametrize("recipe", [None, Recipe(), Recipe(weights_only=True)], ids=["16bit", "w4a4", "w4a16"])
def test_every_random_matrix_has_the_standard_deviation_of_its_place(recipe):
    """Decoded, in every format: 1 / sqrt(columns), and 1 / sqrt(40 layers) of it where it writes to the residual stream; codes are no copies."""
    model, seen = infer.random_model(DEEP, recipe, dtype=torch.float32), set()
    values = {name: p.detach() for name, p in model.named_parameters() if p.dim() > 1 and "conv1d" not in name and "embeddings" not in name}
    for name, m in model.named_modules():
        if isinstance(m, moe.Packed):
            w = m.weight.float() * m.weight_scale[..., None, None] if m.fmt == "fp8" else m.stored().dequantize()
            assert w.isfinite().all() and (m.fmt == "fp8" or (m.weight_scale.float() > 0).all())
            values[f"{name}.weight"] = w
            seen.add(m.fmt)
    assert seen == ({None: set(), False: {"nvfp4", "fp8"}, True: {"w4a16", "fp8"}}[recipe and recipe.weights_only])
    for name, w in values.items():
        writes = re.search(r"(out_proj|o_proj|down_proj|fc2_latent_proj)(\.weight)?$", name)
        expected = (w.shape[-1] * (40 if writes else 1)) ** -0.5
        # 1,024 values or more, of a kurtosis below 6 (random codes have at most 4): 5 standard errors of a standard deviation are under 20 %
        assert abs(w.std().item() / expected - 1) < 0.2 and abs(w.mean().item()) < 0.2 * expected, name
        assert not torch.equal(w.reshape(-1, w.shape[-1])[0], w.reshape(-1, w.shape[-1])[1]), name


def test_a_random_model_is_drawn_once_a_seed_and_decodes():
    """The same seed the same model, another seed another; dt after softplus lies in 0.001 to 0.1 and decay is below 1."""
    a, b, c = (infer.random_model(MICRO, Recipe(), seed=seed) for seed in (0, 0, 1))
    name = "backbone.layers.1.mixer.experts.up_proj"
    assert torch.equal(a.get_submodule(name).weight, b.get_submodule(name).weight)
    assert not torch.equal(a.get_submodule(name).weight, c.get_submodule(name).weight)
    layer = a.backbone.layers[0].mixer
    dt = torch.nn.functional.softplus(layer.dt_bias)
    assert 0.0009 < dt.min() and dt.max() < 0.101 and layer.A_log.min() >= 0 and layer.A_log.max() <= math.log(16)
    engine = infer.Engine(a, 2, 64, 2)
    for i in range(3): engine.submit([20 + i, 30], SamplingParams(max_tokens=8, temperature=0.0, stop_ids=()))
    assert [len(x.ids) for x in engine.run().values()] == [8, 8, 8]


# ---- generate

def greedy_text(run, prompt, mode, n):
    """Stage 04's generate as the oracle: bytes of all tokens, decoded at once."""
    model, tokenizer = nemotron.load_checkpoint(tail(run)), Tokenizer.load(tail(run))
    ids = sft.render_chat([dict(role="user", content=prompt)], mode, tokenizer=tokenizer, generation_prompt=True)[0]
    answer = nemotron.generate(model, [ids], SamplingParams(max_tokens=n, temperature=0.0))[0]
    kept = answer.ids[:-1] if answer.finished else answer.ids
    return tokenizer.decode(kept), answer


@pytest.mark.parametrize("mode, draft", [("off", 0), ("regular", 2)])
def test_generate_writes_what_the_model_says(run, capsys, mode, draft):
    """Streamed, drafted for, with half characters in between: the text is that of all bytes together; control characters are pictures."""
    text, answer = greedy_text(run, "2 + 2?", mode, 40)
    sampling = SamplingParams(max_tokens=40, temperature=0.0)
    infer.main(infer.GenerateConfig(model=run, device="cpu", mode=mode, draft=draft, prompt="2 + 2?", sampling=sampling))
    shown = capsys.readouterr().out
    assert shown.startswith(terminal.clean(text) + "\n[") and f"{len(answer.ids)} tokens" in shown and ("of drafts kept" in shown) == (draft > 0)


def test_generate_answers_every_line_of_a_file(run, tmp_path, capsys):
    """More lines than slots; each answer is the one that its question gets alone."""
    (tmp_path / "asked.txt").write_text("one\n\ntwo\nthree\n")
    sampling = SamplingParams(max_tokens=12, temperature=0.0)
    infer.main(infer.GenerateConfig(model=run, device="cpu", file=tmp_path / "asked.txt", slots=2, sampling=sampling))
    shown = capsys.readouterr().out
    for prompt in ("one", "two", "three"): assert f"> {prompt}\n{terminal.clean(greedy_text(run, prompt, 'regular', 12)[0])}\n" in shown


def test_answers_to_a_file_cannot_move_the_cursor_either(run, tmp_path, capsys, monkeypatch):
    """They are not streamed, so they are cleaned at another place than a single answer."""
    (tmp_path / "asked.txt").write_text("one\ntwo\n")
    answer = infer.Answer(ids=[3], logprobs=[], finished=True, text="a\x1b[2Jb")
    monkeypatch.setattr(infer, "generate_with_budget", lambda engine, talks, *rest: [answer for _ in talks])
    infer.main(infer.GenerateConfig(model=run, device="cpu", file=tmp_path / "asked.txt", slots=2))
    shown = capsys.readouterr().out
    assert shown.count("a\N{SYMBOL FOR ESCAPE}[2Jb\n") == 2 and "\x1b" not in shown


def test_quantized_checkpoints_are_opened_as_such(run, tmp_path, capsys):
    """The same commands on a folder of codes; a plain folder must not go the quantized way, nor the other way round."""
    ids = torch.randint(12, 1024, (1, 49), generator=torch.Generator().manual_seed(0)).numpy()
    amax = infer.calibrate(nemotron.load_checkpoint(tail(run)), [Batch.from_windows(ids, 0 * ids)])
    infer.quantize_checkpoint(tail(run), Recipe(), tmp_path / "q", amax)
    model, tokenizer = infer.open_model(tmp_path / "q", "cpu")
    assert {m.fmt for m in moe.packed_modules(model)} == {"nvfp4", "fp8"} and not model.training and model.lm_head.weight.dtype == torch.float32
    assert not list(moe.packed_modules(infer.open_model(run, "cpu")[0])) and len(tokenizer) == len(Tokenizer.load(tail(run)))
    infer.main(infer.GenerateConfig(model=tmp_path / "q", device="cpu", prompt="x", sampling=SamplingParams(max_tokens=4, stop_ids=())))
    assert "[4 tokens" in capsys.readouterr().out
    # either file says it: some exports have only the one, some only the other
    (tmp_path / "q" / "config.json").write_text((tail(run) / "config.json").read_text())
    assert infer.is_quantized(tmp_path / "q") and not infer.is_quantized(tail(run))
    (tmp_path / "q" / "config.json").write_text(json.dumps(dict(quantization_config={})))
    (tmp_path / "q" / "hf_quant_config.json").unlink()
    assert infer.is_quantized(tmp_path / "q")


def test_errors_of_the_commands_are_one_sentence(run, tmp_path):
    for change, words in [(dict(prompt="x", model=tmp_path / "none"), r"none holds no checkpoint: train one"),
                          (dict(prompt="x", mode="loud"), "mode 'loud' is unknown: choose one of regular, medium, off"),
                          (dict(prompt=" "), "the prompt is empty"),
                          (dict(prompt="x", draft=99), "draft = 99 must lie between"), (dict(file=tmp_path / "no"), "no cannot be read"),
                          (dict(prompt="x " * 3000, capacity=64), "and a slot holds 64"), (dict(prompt="x", kv_format="int4"), "kv_format='int4'")]:
        with pytest.raises(ValueError, match=words) as caught: infer.main(infer.GenerateConfig(**(dict(model=run, device="cpu") | change)))
        assert "\n" not in str(caught.value)
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="no CUDA device here; use cpu"): infer.open_model(run, "cuda")
    for change, words in [(dict(preset="tiny"), "go together"), (dict(random_weights=True), "go together"), (dict(forced=1.5), "is a chance"),
                          (dict(drafts=()), "--drafts"), (dict(batches=(0,)), "--batches must"), (dict(tokens=0), "--tokens must")]:
        with pytest.raises(ValueError, match=words): serving.BenchConfig(**change)
    for change in (dict(questions=0), dict(drafts=(0, 1)), dict(drafts=())):
        with pytest.raises(ValueError, match="--questions|--drafts"): serving.TourConfig(**change)
    config = serving.BenchConfig(preset="ultra", random_weights=True, device="cpu", out=tmp_path)
    with pytest.raises(ValueError, match=r"preset ultra in 16bit takes .* TB and .*choose --weights w4a16"): serving.bench(config)


def test_the_command_line_says_it_in_one_line_too(run, tmp_path):
    call = lambda *args: subprocess.run([sys.executable, ROOT / "08_infer.py", *args], capture_output=True, text=True, cwd=tmp_path)
    for args, words in (((), "out/boosted holds no checkpoint"), (("generate", "--prompt", "x", "--mode", "loud"), "mode 'loud' is unknown")):
        done = call(*args)
        assert done.returncode == 1 and done.stderr.startswith("08_infer: ") and words in done.stderr and done.stderr.count("\n") == 1


# ---- bench and tour

def test_bench_prints_and_keeps_what_it_measured(tmp_path, capsys):
    """Forced drafts are labelled; with chance 1 a pass yields k + 1 tokens; one row for each batch and k."""
    config = serving.BenchConfig(preset="tiny", random_weights=True, weights="w4a16", device="cpu", batches=(1, 2), drafts=(0, 2), tokens=6,
                                 prompt_tokens=5, forced=1.0, out=tmp_path)
    serving.bench(config)
    shown, rows = capsys.readouterr().out, [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert "MADE UP" in shown and "random weights (w4a16)" in shown and shown.count("(3.00)") == 2
    assert [(r["batch"], r["draft"], r["kept"]) for r in rows] == [(1, 0, []), (1, 2, [1, 1]), (2, 0, []), (2, 2, [1, 1])]
    assert all(r["stage"] == "08_bench" and r["forced"] == 1 for r in rows)
    printed = [float(x.replace(",", "")) for x in re.findall(r"([\d,]+) \(\d\.\d\d\)", shown)]
    assert len(printed) == 4 and all(abs(x - r["tokens_per_s"]) <= 0.56 for x, r in zip(printed, rows))        # both are rounded
    serving.bench(dataclasses.replace(config, forced=None, batches=(1,), drafts=(1,)))
    assert "MADE UP" not in capsys.readouterr().out


def test_a_measured_speed_counts_tokens_passes_and_seconds(run, monkeypatch):
    """Tokens a pass from the shares by place equal tokens over windows, counted at the trunk; a slow trunk is a slow speed."""
    model, windows = infer.open_model(run, "cpu")[0], []
    trunk = infer.SlotCaches.trunk
    def slow(caches, ids_rt, rows): windows.append(ids_rt.shape[1]); time.sleep(0.01); return trunk(caches, ids_rt, rows)
    monkeypatch.setattr(serving.infer.SlotCaches, "trunk", slow)
    speed = serving.measure_speed(model, [[20, 30, 40]], 1, 2, SamplingParams(max_tokens=61, temperature=0.0, stop_ids=()), forced=0.5)
    timed = windows[windows.index(2, 1):] if 2 in windows[1:] else windows          # behind the warm-up: its prompt of two tokens, then windows
    passes = sum(w == 3 for w in timed)
    assert len(speed.answers[0]) == 61 and abs(speed.tokens_per_pass - 61 / passes) <= 3 / passes
    assert abs(speed.kept[0] * passes - round(speed.kept[0] * passes)) < 1e-6      # a share of the timed windows, the warm-up's not among them
    assert speed.tokens_per_s < 61 / (0.01 * passes)
    assert serving.Speed(1.0, [0.5, 0.5, 0.2], []).tokens_per_pass == pytest.approx(1 + 0.5 + 0.25 + 0.05)


def test_the_tour_leaves_a_row_a_figure_and_a_line_of_the_summary(run, tmp_path, capsys):
    """Its tables say what the row says, and table.py's line is made of the row."""
    (tail(run) / "pretrain.json").write_text(json.dumps(dict(data=str(tail(run)))))        # the head before boosting: itself
    serving.tour(serving.TourConfig(model=run, out=tmp_path, questions=3, drafts=(1, 2), tokens=512))
    shown, rows = capsys.readouterr().out, [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    row = rows[-1]
    assert [r["stage"] for r in rows] == ["08_quantize", "08_infer"] and row["bits_per_element"] == rows[0]["bits_per_element"]
    assert (tmp_path / "08_infer.png").stat().st_size > 20_000 and (tmp_path / "quantized" / "hf_quant_config.json").exists()
    assert row["same_answers"] and "Every answer with drafts is the answer without" in shown and row["equal_at_tokens"] == 65_536
    assert row["kept"]["before"] == row["kept"]["after"] and len(row["kept"]["after"]) == 2
    assert row["tokens_per_s"].keys() == {"1", "8"} and all(by.keys() == {"0", "1", "2"} for by in row["tokens_per_s"].values())
    assert list(row["modes"]) == ["off", "medium", "regular", "regular, budget of 8 tokens"]
    assert "</think>" not in row["modes"]["off"]["text"] and "</think>" in row["modes"]["regular, budget of 8 tokens"]["text"]
    line = table.showed_08(rows)
    assert f"{row['bits_per_element']:.2f} bits" in line and f"{row['tokens_per_s']['8']['0']:,.0f} plain" in line
    assert "08_infer" in table.STAGES and table.showed_08([]) is None


def test_make_run_ends_with_this_stage():
    recipe = (ROOT / "Makefile").read_text().split("\nrun:")[1].split("\n\n")[0]
    assert recipe.index("07_rlvr_mopd.py") < recipe.index("$(PY) 08_infer.py\n") < recipe.index("table.py summary")
    assert importlib.import_module("experiments.record").STAGES[7] == "08_infer.py"


# ---- chat

class Talk:
    """A person at a fake terminal; entries that are functions run when their turn comes."""
    def __init__(self, run, monkeypatch, lines, **settings):
        self.shown, self.prompts, self.reasons, rest = [], [], [], iter(lines)
        submit, chat = infer.Engine.submit, terminal.chat
        def spy(engine, prompt, *args, **kwargs): self.prompts.append(list(prompt)); return submit(engine, prompt, *args, **kwargs)
        def watch(ask, *rest, **kwargs):
            def inner(*asked): reply = ask(*asked); self.reasons.append(reply.reason); return reply
            chat(inner, *rest, **kwargs)
        def read(prompt):
            line = next(rest, None)
            if line is None: raise EOFError
            return line
        monkeypatch.setattr(infer.Engine, "submit", spy)
        monkeypatch.setattr(terminal, "prepare", lambda: None)
        monkeypatch.setattr(terminal, "chat", functools.partial(watch, read=read, say=self.say))
        settings = dict(sampling=SamplingParams(max_tokens=16, temperature=0.0, stop_ids=()), draft=2) | settings
        self.at = None
        self.config = infer.ChatConfig(model=run, device="cpu", **settings)

    def say(self, text):
        self.shown.append(text)
        if self.at and len(self.shown) == self.at: os.kill(os.getpid(), signal.SIGINT)

    def go(self): infer.main(self.config); return "".join(self.shown)


def test_a_chat_sends_the_conversation_as_render_chat_writes_it(run, monkeypatch):
    """The second request is the chat format of both questions and the first answer, in the mode then in force; after /reset it is alone."""
    talk = Talk(run, monkeypatch, ["/think off", "one", "two", "/reset", "/think medium", "three"])
    shown, tokenizer = talk.go(), Tokenizer.load(tail(run))
    first = greedy_text(run, "one", "off", 16)[0]
    render = lambda messages, mode: sft.render_chat(messages, mode, tokenizer=tokenizer, generation_prompt=True)[0]
    one, said, two = dict(role="user", content="one"), dict(role="assistant", content=first.strip()), dict(role="user", content="two")
    assert talk.prompts == [render([one], "off"), render([one, said, two], "off"), render([dict(role="user", content="three")], "medium")]
    assert terminal.clean(first) in shown and shown.count("[16 tokens, ") == 3 and shown.count("of drafts kept") == 3
    assert shown.count(terminal.ENDS["length"]) == 3


def test_a_chat_goes_on_after_ctrl_c_as_if_the_question_had_not_been(run, monkeypatch):
    """The engine cancels between two steps: the next answer is that of a fresh chat, and the stopped one was cut short."""
    alone = Talk(run, monkeypatch, ["/think off", "b"]).go()
    monkeypatch.undo()
    talk = Talk(run, monkeypatch, ["/think off", "a", "b"], sampling=SamplingParams(max_tokens=16, temperature=0.0, stop_ids=()))
    talk.at = 4         # /help, the mode, two pieces of the first answer
    shown = talk.go()
    assert talk.reasons == ["cancelled", "length"] and shown.count(terminal.ENDS["cancelled"]) == 1
    text = lambda s: s.rpartition("\n[16 tokens")[0]
    assert text(shown).endswith(text(alone).split("mode off\n")[1]) and len(talk.prompts[0]) == len(talk.prompts[1])


def test_a_conversation_longer_than_the_cache_is_one_sentence(run, monkeypatch):
    """At the question it is refused, in the middle of an answer it ends; /reset makes room again."""
    talk = Talk(run, monkeypatch, ["/think off", "x " * 200, "short", "more", "/reset", "short"], capacity=60,
                sampling=SamplingParams(max_tokens=50, temperature=0.0, stop_ids=()))
    shown = talk.go()
    assert shown.count("tokens and a slot holds 60") == 2 and shown.count("/reset begins a new conversation") == 4
    assert talk.reasons == ["cache", "cache"]


def test_a_budget_of_the_chat_closes_the_trace(run, monkeypatch):
    """/budget N reaches the request, and counts of drafts are each answer's own."""
    sampling = SamplingParams(max_tokens=24, temperature=0.0, stop_ids=(), margin=2)
    talk = Talk(run, monkeypatch, ["/budget 4", "a", "/think off", "a"], sampling=sampling)
    shown = talk.go()
    assert shown.count("</think>") >= 1 and "thoughts are closed after 4 tokens" in shown
    kept = [float(x) for x in re.findall(r"(\d+)% of drafts kept", shown)]
    engine = infer.Engine(nemotron.load_checkpoint(tail(run)), 1, 4096, 2, tokenizer=Tokenizer.load(tail(run)))
    infer.generate_with_budget(engine, [[dict(role="user", content="a")]], "off", talk.config.sampling)
    assert len(kept) == 2 and abs(100 * infer.drafts_kept(engine) - kept[1]) <= 0.5 and infer.drafts_kept(engine) is None


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_the_chat_in_a_real_terminal(run):
    """Over a pty: an answer, bytes that are no UTF-8, Ctrl-C in an answer that would last for minutes, and end of input."""
    import pty
    command = [sys.executable, str(ROOT / "08_infer.py"), "chat", "--model", str(run), "--max-tokens", "100000", "--capacity", "100000", "--stop-ids"]
    child, keyboard = pty.fork()
    if child == 0: os.execv(sys.executable, command)
    shown = b""

    def until(words: str, seconds: float = 120) -> None:      # it returns at once; a busy machine may take its time
        """Reads on to the next `words`, and forgets what came before their end."""
        nonlocal shown
        end = time.monotonic() + seconds
        while words.encode() not in shown:
            assert time.monotonic() < end, f"no {words!r} in {shown[-400:].decode(errors='replace')!r}"
            if select.select([keyboard], [], [], 0.5)[0]: shown += os.read(keyboard, 65536)
        shown = shown.partition(words.encode())[2]

    try:
        until("> "); os.write(keyboard, b"/think off\n"); until("mode off")
        until("> "); os.write(keyboard, b"h\xffi\n"); until("bytes that are no UTF-8"); time.sleep(0.5)
        os.write(keyboard, b"\x03"); until("question and answer are forgotten"); until("> ")
        os.write(keyboard, b"/budget 5\n"); until("closed after 5 tokens"); until("> ")
        os.write(keyboard, b"\x04")
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        child = None
    finally:
        if child: os.kill(child, signal.SIGKILL); os.waitpid(child, 0)
        os.close(keyboard)
