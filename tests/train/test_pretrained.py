import gc
import json
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file

from nanoinfra.cli import main
from nanoinfra.data.source import Random
from nanoinfra.data.tokenizer import Tokenizer
from nanoinfra.dist.mesh import Mesh
from nanoinfra.lab.storages import Storages
from nanoinfra.model.decoder import Decoder
from nanoinfra.model.hf import save_hf
from nanoinfra.train import checkpoint, metrics
from nanoinfra.train.pieces import Piece
from nanoinfra.train.pretrained import export, open_pretrained, pretrained
from tests.model.parts import assert_a_rank_reads_its_part, assert_parts_make_the_whole, counting
from tests.model.test_decoder import config
from tests.model.twins import scrambled


@pytest.fixture
def run(tmp_path):
    """A run directory as the trainer leaves it: weights among moments, at steps 3 and 5."""
    (tmp_path / "config.json").write_text(json.dumps({"nanoinfra": 1, "model": config("llama").to_dict()}))
    Tokenizer.train(["one two"] * 9, vocab=258).save(tmp_path / "tokenizer")
    for step in (3, 5):
        weights = dict(scrambled(Decoder(config("llama")), seed=step).named_parameters())
        tensors = {Piece.whole(name, p.shape): p.detach() for name, p in weights.items()}
        tensors |= {Piece.whole(f"exp_avg/{name}", p.shape): p.detach() + 1 for name, p in weights.items()}
        checkpoint.save(tmp_path / "checkpoints", step, tensors, {"step": step}, Mesh().world)
    return tmp_path


def same(model, step):
    want = dict(scrambled(Decoder(config("llama")), seed=step).named_parameters())
    return all(torch.equal(p, want[name].to(p.dtype)) for name, p in model.named_parameters())


def test_a_run_directory_gives_its_newest_weights_and_its_tokenizer(run):
    model, text, template = pretrained(run, torch.float64, "naive")
    assert same(model, 5) and model.head.weight is model.embed.weight
    assert model.embed.weight.dtype == torch.float64
    assert template is None and text.ends == {text.backend.token_to_id("<|endoftext|>")}


@pytest.mark.parametrize("t", [2, 6])
def test_parts_of_all_ranks_make_the_whole(run, t):
    weights = open_pretrained(run)
    assert_parts_make_the_whole(weights, pretrained(run)[0], t)
    assert weights.template is None and weights.text.encode("two")


def test_a_rank_reads_its_part_of_the_checkpoint(run, monkeypatch):
    counts, weights = [], open_pretrained(run)
    monkeypatch.setattr(checkpoint, "safe_open", counting(counts))
    assert_a_rank_reads_its_part(weights, counts)


def verified(run):
    with mock.patch.object(checkpoint, "verify", wraps=checkpoint.verify) as verify:
        weights = open_pretrained(run, Mesh(tp=2).world)
        return verify.call_count, weights.read("embed.weight").sum().item()


def test_one_of_the_ranks_verifies_for_all(run, ranks):
    (first, want), (second, got) = ranks(2).run(verified, run)
    assert (first, second) == (1, 0) and got == want


def test_whatever_else_can_be_loaded_is_opened_too(run, tmp_path):
    export(run, tmp_path / "out")
    weights = open_pretrained(tmp_path / "out")
    assert weights.config == config("llama") and weights.text.encode("two")
    assert_parts_make_the_whole(weights, pretrained(run)[0], 2)


def test_export_is_loaded_by_transformers_and_never_holds_more_than_a_block(ranks, tmp_path):
    import transformers
    text = tmp_path / "text"
    text.write_text("".join(f"{i} letters and {i * i} words\n\n" for i in range(4000)))
    flags = ["--data", str(text), "--vocab", "300", "--seq", "16", "--micro-batch", "2", "--threads", "1"]
    out = tmp_path / "run"
    argv = ["train", "--model", "test", *flags, "--steps", "2", "--zero", "3", "--dp", "3", "--out", str(out)]
    assert ranks(3).run(main, argv) == [0, 0, 0]
    gc.collect()
    with Storages(operators=True) as storages:
        export(out, tmp_path / "exported")
    want, _, _ = pretrained(out)
    biggest = max(sum(p.nbytes for p in want.blocks[0].parameters()), want.embed.weight.nbytes)
    assert 0.9 * biggest < storages.peak <= 2 * biggest                    # with a tensor read and its copy
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "exported", dtype="float32")
    x = torch.arange(12)[None]
    torch.testing.assert_close(theirs(x).logits, want(x), rtol=1e-4, atol=1e-4)
    assert (tmp_path / "exported" / "tokenizer.json").is_file()


def test_export_in_another_dtype_and_never_into_the_run_itself(run, tmp_path):
    export(run, tmp_path / "out", torch.bfloat16)
    stored = {name: t for f in (tmp_path / "out").glob("*.safetensors") for name, t in load_file(f).items()}
    assert {t.dtype for t in stored.values()} == {torch.bfloat16}
    with pytest.raises(ValueError, match="name another folder"):
        export(run, run)


def test_a_damaged_checkpoint_gives_way_to_the_one_before(run, capsys):
    [file] = (run / "checkpoints" / "step_00000005").glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-1])
    assert same(pretrained(run)[0], 3)
    assert "refused" in capsys.readouterr().err


def test_a_run_without_checkpoints_is_refused(run, tmp_path):
    (run / "checkpoints").rename(run / "gone")
    with pytest.raises(ValueError, match="no good checkpoint in .*checkpoints; train with --out"):
        pretrained(run)


def test_training_goes_on_from_the_weights_of_a_run(tmp_path):
    quick = ["--data", "random", "--seq", "16", "--micro-batch", "2", "--threads", "1", "--dtype", "float64"]
    first, second = tmp_path / "first", tmp_path / "second"
    assert main(["train", "--model", "test", *quick, "--steps", "5", "--out", str(first)]) == 0
    again = ["train", "--model", str(first), *quick, "--steps", "1", "--seed", "7", "--out", str(second)]
    assert main(again) == 0
    model = pretrained(first, torch.float64)[0]
    source = Random(257)
    pairs = [source.sample(g, seed=7, seq=16) for g in range(2)]
    x, y = (torch.stack([torch.from_numpy(pair[k]) for pair in pairs]) for k in (0, 1))
    want = torch.nn.functional.cross_entropy(model(x).flatten(0, 1), y.flatten())    
    [line] = metrics.read(second / "metrics.jsonl")
    assert line["loss"] == pytest.approx(want.item(), rel=1e-6)  # pretrained reads float32
    assert line["lr"] == pytest.approx(1e-5)  # warm-up's tenth of 1e-4


def test_a_run_goes_out_to_transformers(run, tmp_path):
    """As README shows it: weights and tokenizer."""
    transformers = pytest.importorskip("transformers", reason="transformers is in the dev extra")
    model, text, _ = pretrained(run)
    save_hf(model, tmp_path / "exported", tokenizer=run / "tokenizer")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "exported")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "exported")
    ids = text.encode("one two one")
    assert tokenizer("one two one")["input_ids"] == ids
    x = torch.arange(7)[None]                                              # (1, T)
    torch.testing.assert_close(theirs(x).logits, model(x), rtol=1e-4, atol=1e-5)
