import gc
import json
from unittest import mock

import pytest
import torch
import transformers
import tyro
from safetensors.torch import load_file

from nanoinfra.cli import main
from nanoinfra.data.token_datasets import RandomTokenDataset
from nanoinfra.data.train_tokenizer import BPETokenizer
from nanoinfra.distributed.mesh import Mesh
from nanoinfra.formulas.parameters import TensorShard
from nanoinfra.lab.instruments.live_tensor_bytes import LiveTensorBytes
from nanoinfra.model.decoder import Decoder
from nanoinfra.model.weights.hugging_face.load_and_save import save_hf_model
from nanoinfra.model.weights.hugging_face.tokenizer_files import (
    copy_tokenizer_files,
    open_hf_tokenizer,
    remove_tokenizer_files,
    tokenizer_keys_for_config,
)
from nanoinfra.model.weights.load_model import open_model_weights
from nanoinfra.model.weights.read_json_files import read_json
from nanoinfra.model.weights.read_weights_into_decoder import PretrainedWeights
from nanoinfra.train import metrics_and_plots
from nanoinfra.train.checkpoint import save_and_load
from nanoinfra.train.config import TrainFlags
from nanoinfra.train.load_and_export_models import (
    export_to_hugging_face,
    load_pretrained,
    open_pretrained_weights,
    save_pretrained_tokenizer,
)
from nanoinfra.train.open_model_and_data import open_run_inputs
from tests.model.chat_model import TEMPLATE, chat_model
from tests.model.parts import assert_a_rank_reads_its_part, assert_parts_make_the_whole, counting
from tests.model.test_decoder import config
from tests.model.tokenizer_kinds import KINDS, STRINGS, save
from tests.model.twins import scrambled


@pytest.fixture
def run(tmp_path):
    """A run directory as the trainer leaves it: weights among moments, at steps 3 and 5."""
    (tmp_path / "config.json").write_text(json.dumps({"nanoinfra": 1, "model": config("llama").to_dict()}))
    BPETokenizer.train(["one two"] * 9, vocab_size=258).save(tmp_path / "tokenizer")
    for step in (3, 5):
        weights = dict(scrambled(Decoder(config("llama")), seed=step).named_parameters())
        tensors = {TensorShard.of_whole_tensor(name, p.shape): p.detach() for name, p in weights.items()}
        tensors |= {TensorShard.of_whole_tensor(f"exp_avg/{name}", p.shape): p.detach() + 1 for name, p
                    in weights.items()}
        save_and_load.save_checkpoint(tmp_path / "checkpoints", step, tensors, {"step": step}, Mesh().world)
    return tmp_path


def same(model, step):
    want = dict(scrambled(Decoder(config("llama")), seed=step).named_parameters())
    return all(torch.equal(p, want[name].to(p.dtype)) for name, p in model.named_parameters())


def test_a_run_directory_gives_its_newest_weights_and_its_tokenizer(run):
    model, text, template = load_pretrained(run, torch.float64, "naive")
    assert same(model, 5) and model.head.weight is model.embed.weight
    assert model.embed.weight.dtype == torch.float64
    assert template is None and text.eos_token_ids == {text.backend_tokenizer.token_to_id("<|endoftext|>")}


@pytest.mark.parametrize("t", [2, 6])
def test_parts_of_all_ranks_make_the_whole(run, t):
    weights = open_pretrained_weights(run)
    assert_parts_make_the_whole(weights, load_pretrained(run)[0], t)
    assert weights.chat_template is None and weights.tokenizer.encode("two")


def test_a_rank_reads_its_part_of_the_checkpoint(run, monkeypatch):
    counts, weights = [], open_pretrained_weights(run)
    monkeypatch.setattr(save_and_load, "safe_open", counting(counts))
    assert_a_rank_reads_its_part(weights, counts)


def verified(run):
    with mock.patch.object(save_and_load, "verify_checkpoint",
                           wraps=save_and_load.verify_checkpoint) as verify:
        weights = open_pretrained_weights(run, Mesh(tp=2).world)
        return verify.call_count, weights.read_parameter("embed.weight").sum().item()


def test_one_of_the_ranks_verifies_for_all(run, ranks):
    (first, want), (second, got) = ranks(2).run(verified, run)
    assert (first, second) == (1, 0) and got == want


def test_whatever_else_can_be_loaded_is_opened_too(run, tmp_path):
    export_to_hugging_face(run, tmp_path / "out")
    weights = open_pretrained_weights(tmp_path / "out")
    assert weights.config == config("llama") and weights.tokenizer.encode("two")
    assert_parts_make_the_whole(weights, load_pretrained(run)[0], 2)


def test_export_is_loaded_by_transformers_and_never_holds_more_than_a_block(ranks, tmp_path):
    text = tmp_path / "text"
    text.write_text("".join(f"{i} letters and {i * i} words\n\n" for i in range(4000)))
    flags = ["--data", str(text), "--vocab", "300", "--seq", "16", "--micro-batch", "2", "--threads", "1"]
    out = tmp_path / "run"
    argv = ["train", "--model", "test", *flags, "--steps", "2", "--zero", "3", "--dp", "3", "--out", str(out)]
    assert ranks(3).run(main, argv) == [0, 0, 0]
    gc.collect()
    with LiveTensorBytes(mark_operators=True) as storages:
        export_to_hugging_face(out, tmp_path / "exported")
    want, _, _ = load_pretrained(out)
    biggest = max(sum(p.nbytes for p in want.blocks[0].parameters()), want.embed.weight.nbytes)
    assert 0.9 * biggest < storages.peak_bytes <= 2 * biggest  # with a tensor read and its copy
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "exported", dtype="float32")
    x = torch.arange(12)[None]
    torch.testing.assert_close(theirs(x).logits, want(x), rtol=1e-4, atol=1e-4)
    assert (tmp_path / "exported" / "tokenizer.json").is_file()


def test_export_in_another_dtype_and_never_into_the_run_itself(run, tmp_path):
    export_to_hugging_face(run, tmp_path / "out", torch.bfloat16)
    stored = {name: t for f in (tmp_path / "out").glob("*.safetensors") for name, t in load_file(f).items()}
    assert {t.dtype for t in stored.values()} == {torch.bfloat16}
    with pytest.raises(ValueError, match="name another folder"):
        export_to_hugging_face(run, run)


def test_a_damaged_checkpoint_gives_way_to_the_one_before(run, capsys):
    [file] = (run / "checkpoints" / "step_00000005").glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-1])
    assert same(load_pretrained(run)[0], 3)
    assert "refused" in capsys.readouterr().err


def test_a_run_without_checkpoints_is_refused(run, tmp_path):
    (run / "checkpoints").rename(run / "gone")
    with pytest.raises(ValueError, match="no good checkpoint in .*checkpoints; train with --out"):
        load_pretrained(run)


def test_training_goes_on_from_the_weights_of_a_run(tmp_path):
    quick = ["--data", "random", "--seq", "16", "--micro-batch", "2", "--threads", "1", "--dtype", "float64"]
    first, second = tmp_path / "first", tmp_path / "second"
    assert main(["train", "--model", "test", *quick, "--steps", "5", "--out", str(first)]) == 0
    again = ["train", "--model", str(first), *quick, "--steps", "1", "--seed", "7", "--out", str(second)]
    assert main(again) == 0
    model = load_pretrained(first, torch.float64)[0]
    source = RandomTokenDataset(257)
    pairs = [source.get_sample(g, seed=7, seq_len=16) for g in range(2)]
    x, y = (torch.stack([torch.from_numpy(pair[k]) for pair in pairs]) for k in (0, 1))
    want = torch.nn.functional.cross_entropy(model(x).flatten(0, 1), y.flatten())    
    [line] = metrics_and_plots.read_metrics(second / "metrics.jsonl")
    assert line["loss"] == pytest.approx(want.item(), rel=1e-6)  # pretrained reads float32
    assert line["lr"] == pytest.approx(1e-5)  # warm-up's tenth of 1e-4


def test_a_run_goes_out_to_transformers(run, tmp_path):
    """As README shows it: weights and tokenizer."""
    model, text, _ = load_pretrained(run)
    save_hf_model(model, tmp_path / "exported", tokenizer_folder=run / "tokenizer")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "exported")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "exported")
    ids = text.encode("one two one")
    assert tokenizer("one two one")["input_ids"] == ids
    x = torch.arange(7)[None]                                              # (1, T)
    torch.testing.assert_close(theirs(x).logits, model(x), rtol=1e-4, atol=1e-5)


CHAT = [{"role": "user", "content": "the cat <|end|> \U0001f642"}]
QUICK = ["--seq", "16", "--micro-batch", "2", "--threads", "1", "--steps", "1"]


def assert_same_text(source, folder):
    """transformers makes of `folder` what it makes of `source`."""
    want, got = (transformers.AutoTokenizer.from_pretrained(each) for each in (source, folder))
    for string in STRINGS:
        assert got(string).input_ids == want(string).input_ids
    assert got.special_tokens_map == want.special_tokens_map and got.all_special_ids == want.all_special_ids
    assert type(got) is type(want) and got.added_tokens_decoder == want.added_tokens_decoder
    assert got.chat_template == want.chat_template
    if want.chat_template:
        assert got.apply_chat_template(CHAT) == want.apply_chat_template(CHAT)
    want, got = (read_json(each / "generation_config.json") for each in (source, folder))
    assert got == want
    want, got = (transformers.AutoConfig.from_pretrained(each) for each in (source, folder))
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        assert getattr(got, name) == getattr(want, name), name


def test_a_chat_model_that_was_trained_on_is_still_one(tmp_path):
    """Train, export, and load in transformers; and again, from the run, into the same folder."""
    source, run, out = chat_model(tmp_path, "llama2 class"), tmp_path / "run", tmp_path / "out"
    data = ["--data", str(tmp_path / "text")]
    assert main(["train", "--model", str(source), *data, *QUICK, "--out", str(run)]) == 0
    weights, (want, template) = open_pretrained_weights(run), open_hf_tokenizer(source)
    assert weights.chat_template == template == TEMPLATE and weights.tokenizer.eos_token_ids == {1, 4}
    assert weights.tokenizer.special_tokens_map == want.special_tokens_map
    (out / "additional_chat_templates").mkdir(parents=True)
    stale = [out / "vocab.json", out / "tokenizer.model", out / "additional_chat_templates" / "old.jinja"]
    for path in stale:
        path.write_text("stale")
    export_to_hugging_face(run, out)
    assert_same_text(source, out)
    assert not any(path.exists() for path in stale)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(out)
    x = torch.arange(7)[None]
    torch.testing.assert_close(theirs(x).logits, load_pretrained(run)[0](x), rtol=1e-4, atol=1e-5)
    assert theirs.generation_config.eos_token_id == [1, 4]
    again = tmp_path / "again"
    assert main(["train", "--model", str(run), "--data", "random", *QUICK, "--out", str(again)]) == 0
    export_to_hugging_face(again, out)
    assert_same_text(source, out)


@pytest.mark.parametrize("kind", KINDS)
def test_the_text_of_every_kind_is_kept(kind, tmp_path):
    source = save(kind, tmp_path / "source", eos_token_id=1, bos_token_id=0)
    weights = PretrainedWeights(config("llama"), None, *open_hf_tokenizer(source), source)
    save_pretrained_tokenizer(weights, tmp_path / "run")
    copy_tokenizer_files(tmp_path / "run", tmp_path / "out")
    theirs = {"model_type": "llama", **tokenizer_keys_for_config(tmp_path / "run")}
    (tmp_path / "out" / "config.json").write_text(json.dumps(theirs))
    assert_same_text(source, tmp_path / "run")
    assert_same_text(source, tmp_path / "out")


def test_the_text_of_a_gguf_model_is_written_as_transformers_reads_it(tmp_path):
    weights = open_model_weights("smollm2-135m")
    save_pretrained_tokenizer(weights, tmp_path)
    text, template = open_hf_tokenizer(tmp_path)
    for name in ("eos_token_ids", "bos_token", "eos_token"):
        assert getattr(text, name) == getattr(weights.tokenizer, name)
    assert template == weights.chat_template
    for string in STRINGS:
        assert text.encode(string) == weights.tokenizer.encode(string)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert theirs.chat_template == template and theirs.bos_token == text.bos_token
    assert transformers.GenerationConfig.from_pretrained(tmp_path).eos_token_id == sorted(text.eos_token_ids)
    assert tokenizer_keys_for_config(tmp_path)["eos_token_id"] == sorted(text.eos_token_ids)
    assert weights.tokenizer_folder is None


def test_text_is_not_trained_on_with_the_tokenizer_of_another(tmp_path):
    source = chat_model(tmp_path, "gpt2", vocab=320)
    data = ["--data", str(tmp_path / "text"), *QUICK, "--out", str(tmp_path / "run")]
    with pytest.raises(ValueError, match="goes up to 3.. .*, but the model knows ids below 320 alone"):
        open_run_inputs(tyro.cli(TrainFlags, args=["--model", str(source), *data]), Mesh())
    remove_tokenizer_files(source)
    with pytest.raises(ValueError, match="holds no tokenizer to read --data with; .* or try --data random"):
        open_run_inputs(tyro.cli(TrainFlags, args=["--model", str(source), *data]), Mesh())
    data[1] = "random"
    inputs = open_run_inputs(tyro.cli(TrainFlags, args=["--model", str(source), *data]), Mesh())
    assert inputs.dataset.tokenizer is None and inputs.pretrained_weights.tokenizer is None


def test_a_run_that_kept_no_text_of_another_leaves_none(run, tmp_path):
    """Its folder was that of a chat model's run before."""
    save("gpt2", tmp_path / "other" / "tokenizer")
    (tmp_path / "other" / "tokenizer" / "chat_template.jinja").write_text("x")
    save_pretrained_tokenizer(open_pretrained_weights(run), tmp_path / "other" / "tokenizer")
    assert open_hf_tokenizer(tmp_path / "other" / "tokenizer")[1] is None
    assert sorted(path.name for path in (tmp_path / "other" / "tokenizer").iterdir()) == sorted(
        path.name for path in (run / "tokenizer").iterdir())
