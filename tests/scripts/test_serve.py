"""scripts/serve.py answers each of many prompts as serve/generate_with_kv_cache.py does alone."""
import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nanoinfra.config import config_for_size
from nanoinfra.model.decoder import Decoder
from nanoinfra.model.initialization import init_weights
from nanoinfra.model.weights.hugging_face.load_and_save import write_hf_folder
from nanoinfra.serve.generate_with_kv_cache import generate
from nanoinfra.train.load_and_export_models import load_pretrained
from tests.model.twins import scrambled

ROOT = Path(__file__).resolve().parents[2]
PROMPTS = ["abc", "a list of words that is long", "a list of words that is short, and", "x", "abc, and", "??"]
TIGHT = ["--blocks", "14", "--block-size", "4", "--max-num-batched-tokens", "9", "--max-num-seqs", "4"]
NEW = 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A Hugging Face folder of a model that does not say the same for ever; without a tokenizer."""
    model, out = scrambled(Decoder(config_for_size("test"))), tmp_path_factory.mktemp("model") / "drawn"
    write_hf_folder(model.config, lambda name, box=(): model.get_parameter(name).detach()[box],
                    torch.float32, out)
    return out


def serve(*argv, world=1, code=0):
    alone = [sys.executable, ROOT / "scripts" / "serve.py"]
    many = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world),
            ROOT / "scripts" / "serve.py"]
    command = [*(alone if world == 1 else many), *map(str, argv)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    return done.stdout if not code else done.stderr


def said(out):
    return [ast.literal_eval(line) for line in re.findall(r"^ids (.*)$", out, re.MULTILINE)]


def alone(model, new=NEW):
    return [list(generate(model, list(prompt.encode()), new)) for prompt in PROMPTS]


def test_tokens_are_those_of_one_prompt_alone(folder):
    out = serve("--model", folder, "--dtype", "float64", "--max-tokens", NEW, "--ids", *TIGHT, *PROMPTS)
    want = alone(load_pretrained(folder, torch.float64)[0])
    assert said(out) == want and len({token for tokens in want for token in tokens}) > 20
    used, away = map(int, re.search(r"at most (\d+) of 14 blocks .* (\d+) sent away", out).groups())
    assert used == 14 and away > 0
    assert f"{NEW * len(PROMPTS)} tokens for {len(PROMPTS)} prompts" in out and "tokens/s" in out


def test_a_drawn_model_and_a_file(tmp_path):
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS) + "\n\n")
    out = serve("--file", tmp_path / "prompts.txt", "--dtype", "float64", "--max-tokens", NEW, "--ids")
    assert said(out) == alone(init_weights(Decoder(config_for_size("test")), 0).double())


@pytest.mark.parametrize("argv, says", [
    (["--max-tokens", "62", "abc"], "do not fit the context of 64"),
    pytest.param(["--model", "nope"], "there is no model 'nope'", marks=pytest.mark.prove),
    pytest.param(["--file", "nope"], "No such file", marks=pytest.mark.prove),
    pytest.param(["--max-tokens", "0"], "ask for at least 1", marks=pytest.mark.prove)])
def test_a_mistake_is_one_line(argv, says):
    assert says in serve(*argv, code=2).splitlines()[-1]


@pytest.mark.prove
@pytest.mark.parametrize("world", [2, 4])
def test_more_ranks_say_the_same(folder, world):
    out = serve("--model", folder, "--dtype", "float64", "--max-tokens", NEW, "--ids", *TIGHT, *PROMPTS,
                world=world)
    assert said(out) == alone(load_pretrained(folder, torch.float64)[0])


@pytest.mark.prove
def test_smollm2_says_what_it_says_alone():
    prompts = ["The sea is", "Once upon a time", "Once upon a time there was"]
    out = serve("--model", "smollm2-135m", "--max-tokens", 20, "--block-size", 4, "--max-num-batched-tokens",
                7, "--ids",
                *prompts)
    model, text, _ = load_pretrained("smollm2-135m")
    assert said(out) == [list(generate(model, text.encode(prompt), 20,
                                       eos_token_ids=text.eos_token_ids)) for prompt in prompts]


@pytest.mark.prove
def test_what_a_prompt_of_one_block_finds_is_counted(folder):
    out = serve("--model", folder, "--max-tokens", 2, "--block-size", 4, "--max-num-batched-tokens", 8,
                "--max-num-seqs", 1,
                "abcdefgh", "abcdefgh and on")
    assert "8 prompt tokens known already" in out
