"""The speedrun learns from any folder, its model is causal and born to copy, its score is the definition."""
import json
import math
import sys
from pathlib import Path

import pytest
import torch

from nanoinfra.data.corpus import load_corpus
from nanoinfra.data.micro_batch_loader import HeldOutSet
from nanoinfra.data.train_tokenizer import get_or_train_tokenizer

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"


@pytest.fixture(scope="module")
def scripts():
    """The modules `speedrun` and `frozen_loop`, and nothing left behind."""
    before = list(sys.path)
    sys.path[:0] = [str(SCRIPTS), str(SCRIPTS / "bench")]
    import frozen_loop
    import speedrun
    yield {"speedrun": speedrun, "frozen_loop": frozen_loop}
    sys.path[:] = before
    for name in ("speedrun", "frozen_loop"):
        del sys.modules[name]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("corpus")
    for i in range(8):
        lines = [f"def add_{i}_{j}(left, right):\n    return left + right + {j}\n" for j in range(60)]
        (root / f"{i}.py").write_text("\n".join(lines))
    return root


@pytest.mark.parametrize("name", ["speedrun", "frozen_loop"])
def test_two_seconds_are_better_than_none(name, scripts, folder, tmp_path, monkeypatch, capsys):
    argv = ["--data", str(folder), "--cache", str(tmp_path), "--threads", "1", "--seconds", "2"]
    monkeypatch.setattr(sys, "argv", [name, *argv])
    scripts[name].main()
    got = json.loads(capsys.readouterr().out.splitlines()[-1])

    corpus = load_corpus(folder)
    tokenizer = get_or_train_tokenizer(corpus, scripts[name].V, tmp_path)
    untrained = scripts[name].GPT(tokenizer.vocab_size)
    want = scripts["speedrun"].bits_per_byte(untrained,
                                             HeldOutSet(corpus.held_out, tokenizer, scripts[name].T))
    assert 0 < got["bits_per_byte"] < want
    assert got["tokens"] == got["steps"] * scripts[name].B * scripts[name].T
    assert got["corpus"] == corpus.sha256[:16] and got["seconds"] >= 2


def test_the_score_is_the_definition(scripts, folder, tmp_path):
    corpus = load_corpus(folder)
    tokenizer = get_or_train_tokenizer(corpus, 300, tmp_path)
    table = torch.randn(300, 300, generator=torch.Generator().manual_seed(1)).double()
    got = scripts["speedrun"].bits_per_byte(lambda x: table[x], HeldOutSet(corpus.held_out, tokenizer, 7))

    bits = 0.0
    for document in corpus.held_out:
        tokens = [tokenizer.eot_token_id, *tokenizer.encode(document.text), tokenizer.eot_token_id]
        for now, then in zip(tokens, tokens[1:]):
            row = table[now].tolist()
            bits += math.log2(math.fsum(map(math.exp, row))) - row[then] / math.log(2)
    want = bits / sum(len(document.text.encode()) for document in corpus.held_out)
    assert got == pytest.approx(want, rel=1e-6)


@pytest.mark.parametrize("name", ["speedrun", "frozen_loop"])
def test_a_logit_depends_on_no_later_token(name, scripts):
    torch.manual_seed(0)
    model = scripts[name].GPT(300)
    for p in model.parameters():
        if p.dim() == 2 and p.abs().sum() == 0:
            torch.nn.init.normal_(p, std=0.05)       # nothing hides behind a zero
    x = torch.randint(300, (2, 40))
    later = x.clone()
    later[:, 25:] = torch.randint(300, (2, 15))
    with torch.no_grad():
        want, got = model(x), model(later)
    assert torch.equal(got[:, :25], want[:, :25])
    assert not torch.equal(got[:, 25:], want[:, 25:])


def test_the_first_block_is_born_an_induction_head(scripts):
    """Of a sequence said twice, the untrained model knows the second half, and cannot know the first.

    Its first guess is always the token at hand, since head and embedding are born alike; its second counts.
    """
    torch.manual_seed(0)
    model = scripts["speedrun"].GPT(300)
    once = torch.randperm(300)[:60]
    x = torch.cat([once, once])[None]
    with torch.no_grad():
        guess = model(x)[0, :-1].scatter(1, x[0, :-1, None], -torch.inf).argmax(-1)
    right = guess == x[0, 1:]
    assert right[60:].float().mean() > 0.6
    assert right[:59].float().mean() < 0.1


def test_the_table_moves_where_it_was_read_and_by_adagrad(scripts):
    speedrun = scripts["speedrun"]
    table = torch.nn.Embedding(9, 4, sparse=True)
    start, squares = table.weight.detach().clone(), torch.zeros(9, 4)
    read = torch.tensor([2, 5, 2])
    dense = start.clone().requires_grad_()
    adagrad = torch.optim.Adagrad([dense], lr=0.1)
    for _ in range(3):
        for weight in (table.weight, dense):
            torch.nn.functional.embedding(read, weight, sparse=weight is not dense).pow(2).sum().backward()
        speedrun.adagrad(table.weight, squares, 0.1)
        adagrad.step()
        adagrad.zero_grad()
    assert torch.allclose(table.weight, dense, atol=1e-6)
    untouched = [i for i in range(9) if i not in (2, 5)]
    assert torch.equal(table.weight[untouched], start[untouched]) and squares[untouched].sum() == 0
