import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from nanoinfra.config import ModelConfig
from nanoinfra.data.train_tokenizer import BPETokenizer
from nanoinfra.model.decoder import Decoder
from nanoinfra.model.weights.hugging_face.load_and_save import save_hf_model
from nanoinfra.serve import generate_with_kv_cache as generation
from nanoinfra.serve.command_line_options import GenerateOptions
from nanoinfra.serve.generate_with_kv_cache import KVCache, generate, main
from tests.families import VARIANTS
from tests.model.test_decoder import config
from tests.model.twins import FAMILIES, scrambled, tokens


def tiny(family="llama", **changes):
    return scrambled(Decoder(replace(config(family), **changes))).double()


@pytest.mark.parametrize("family", [*FAMILIES, *VARIANTS])
@torch.no_grad()
def test_cached_decoding_is_the_full_forward(family):
    model, x = tiny(family), tokens(97, (2, 20))
    want, cache, got = model(x), KVCache(2, 20), []
    for a, b in ((0, 7), (7, 8), (8, 9), (9, 14), (14, 20)):     # prefill, single tokens, chunks
        got.append(model(x[:, a:b], torch.arange(a, b), cache))
        cache.length = b
    torch.testing.assert_close(torch.cat(got, 1), want, rtol=1e-10, atol=1e-10)
    c = model.config
    assert cache.layers[1].numel() == 2 * 2 * c.kv_heads * 20 * c.head_dim         # keys and values, no more
    with pytest.raises(ValueError, match="21 tokens do not fit a KV cache for 20"):
        model(x[:, :1], torch.arange(20, 21), cache)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_greedy_is_argmax_of_the_full_forward_and_each_token_costs_one_forward_of_one(family):
    model, sequence, widths = tiny(family), tokens(97, (9,)).tolist(), []
    model.embed.register_forward_hook(lambda _, args, __: widths.append(args[0].shape[1]))
    got = list(generate(model, sequence, 6))
    assert widths == [9, 1, 1, 1, 1, 1]
    for _ in range(6):
        sequence.append(int(model(torch.tensor([sequence]))[0, -1].argmax()))
    assert got == sequence[9:]


def test_an_end_stops_and_is_not_given():
    model, prompt = tiny(), [1, 2, 3]
    whole = list(generate(model, prompt, 12))
    end = whole[5]
    assert list(generate(model, prompt, 12, eos_token_ids={end})) == whole[:whole.index(end)]


def test_draws_follow_from_the_seed_alone():
    def run(seed):
        return list(generate(tiny(), [1, 2, 3], 20, temperature=1.5, seed=seed))
    want = run(7)
    torch.manual_seed(0)
    assert run(7) == want
    assert run(8) != want


def test_tokens_come_one_by_one():
    steps, model = [], tiny()
    model.embed.register_forward_hook(lambda *_: steps.append(1))
    some = generate(model, [1], 30)
    next(some), next(some)
    assert len(steps) == 2


@pytest.fixture(scope="module")
def tokenizer():
    return BPETokenizer.train(["one two three"] * 9, vocab_size=262)     # foreign characters are single bytes


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    root = tmp_path_factory.mktemp("generate")
    tokenizer.save(root / "tokenizer")
    model = scrambled(Decoder(ModelConfig(tokenizer.vocab_size, 24, 2, 4, 2, 6, 40, 32)))
    save_hf_model(model, root / "m", root / "tokenizer")
    return root / "m"


def say(**options):
    said = []
    assert main(GenerateOptions(**{"prompt": "one two", "max_new_tokens": 9} | options), said.append) == 0
    return said


def test_main_streams_the_continuation(folder, tokenizer):
    said = say(model=str(folder))
    assert said[-1] == "\n" and len(said) > 3
    assert say(model=str(folder), temperature=2.0, seed=1) == say(model=str(folder), temperature=2.0, seed=1)
    assert say(model=str(folder), temperature=2.0, seed=2) != say(model=str(folder), temperature=2.0, seed=1)
    bare = say(model=str(folder), chat=False)
    (folder / "chat_template.jinja").write_text("three {{ messages[0].content }}")
    try:
        assert say(model=str(folder), chat=True) == say(model=str(folder), prompt="three one two") != bare
    finally:
        (folder / "chat_template.jinja").unlink()


@pytest.mark.parametrize("options, message", [
    ({"prompt": ""}, "the prompt has no tokens"), ({"chat": True}, "no chat template; leave out --chat"),
    ({"max_new_tokens": 29}, "4 tokens and 29 new .* context of 32; ask for at most 28"),
    ({"prompt": "xyz" * 20}, "prompt of 60 tokens and 9 new .* shorten it to less than 32 tokens"),
    ({"temperature": -1.0}, "temperature -1 is out of range; give 0 to 100"),
    ({"top_p": 0.0}, "top_p 0 is out of range"), ({"top_k": -5}, "top_k -5 is out of range")])
def test_mistakes_are_one_clear_error(folder, options, message):
    with pytest.raises(ValueError, match=message):
        say(model=str(folder), **options)


def test_a_tokenizer_of_another_model_and_none_at_all_are_refused(folder, tmp_path):
    model = scrambled(Decoder(config("llama")))
    save_hf_model(model, tmp_path / "none")
    with pytest.raises(ValueError, match="holds no tokenizer to read the prompt with"):
        say(model=str(tmp_path / "none"))
    save_hf_model(model, tmp_path / "other", folder)
    with pytest.raises(ValueError, match="not in the model's vocabulary of 97"):
        say(model=str(tmp_path / "other"))


def answer(**options):
    said = []
    assert main(GenerateOptions(**options), said.append) == 0
    return "".join(said)


@pytest.mark.parametrize("family, tp", [
    *((family, 2) for family in FAMILIES), pytest.param("llama", 6, marks=pytest.mark.prove), ("qwen3", 3)])
def test_ranks_that_share_the_model_say_the_same(ranks, tmp_path, tokenizer, family, tp):
    """6 query heads, and 2 KV heads under RoPE (on 6 ranks three neighbours share one): drawn tokens too."""
    more = {"kv_heads": 6} if tp == 3 else {}
    sizes = replace(config(family), vocab=tokenizer.vocab_size, **more)
    tokenizer.save(tmp_path / "tokenizer")
    save_hf_model(scrambled(Decoder(sizes)), tmp_path / "m", tmp_path / "tokenizer")
    for temperature in (0.0, 1.5):
        options = dict(model=str(tmp_path / "m"), prompt="one two", max_new_tokens=9, dtype="float64",
                       temperature=temperature, seed=1)
        want = answer(**options)
        assert temperature == 0 or len({*want}) > 3
        assert ranks(tp).run(answer, **options, tp=tp) == [want] + [""] * (tp - 1)     # rank 0 alone speaks


def test_dtype_is_what_the_weights_are_computed_in(folder, monkeypatch):
    seen, real = [], generation.parallelize_for_serving
    monkeypatch.setattr(generation, "parallelize_for_serving",
                        lambda *given: seen.append(real(*given)) or seen[-1])
    for dtype in ("float64", "bfloat16"):
        answer(model=str(folder), prompt="one", max_new_tokens=1, dtype=dtype)
        assert {p.dtype for p in seen[-1].parameters()} == {getattr(torch, dtype)}


@pytest.mark.prove
def test_heads_that_ranks_cannot_share_are_one_line(folder):
    command = [sys.executable, "-m", "nanoinfra.cli", "generate", str(folder), "one", "--tp", "3"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "tp=3 cannot share 4 query and 2 KV heads" in done.stderr and "try --tp 2" in done.stderr


def test_the_flags_import_no_torch():
    code = "import sys; import nanoinfra.serve.command_line_options; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
