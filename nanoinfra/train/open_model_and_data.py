"""The inputs of a run: dataset, held-out text, and the model, of a named size or from pretrained weights.

A named size takes the vocabulary of the corpus's own tokenizer; pretrained weights bring their tokenizer.
Rank 0 builds the caches, then the other ranks read them.
"""
import sys
from dataclasses import dataclass

from nanoinfra.config import MODEL_SIZES, ModelConfig, config_for_size
from nanoinfra.data.describe_data import data_warnings, describe_data
from nanoinfra.data.micro_batch_loader import HeldOutSet
from nanoinfra.data.token_datasets import PackedDataset, RandomTokenDataset, open_dataset
from nanoinfra.data.train_tokenizer import BPETokenizer
from nanoinfra.distributed import comm
from nanoinfra.model.weights.read_weights_into_decoder import PretrainedWeights, ReadParameter
from nanoinfra.train.config import (
    TrainFlags,
    check_combinations,
    global_batch_and_num_micro_batches,
    replace_flags,
)
from nanoinfra.train.launch.memory_check import check_memory_fits
from nanoinfra.train.load_and_export_models import open_pretrained_weights

_MAX_DEFAULT_SEQ_LEN = 1024  # when pretrained weights would allow longer samples


@dataclass(frozen=True)
class RunInputs:
    """Dataset, sequence length, model and weights of a run; `held_out` is None without --eval-every."""
    dataset: PackedDataset | RandomTokenDataset
    seq_len: int
    held_out: HeldOutSet | None
    model_config: ModelConfig
    pretrained_weights: PretrainedWeights | None                  # to start from; None: weights are drawn
    data_identity: dict                           # must be the same when the run resumes

    @property
    def read_initial_weights(self) -> ReadParameter | None:
        """The function that reads the weights to start from; None when they are drawn from the seed."""
        return self.pretrained_weights and self.pretrained_weights.read_parameter


def open_run_inputs(flags: TrainFlags, mesh) -> RunInputs:
    """Open weights, corpus and tokenizer. Raises ValueError on every rank when one of them cannot be used."""
    name = flags.model.model
    weights = None if name in MODEL_SIZES else open_pretrained_weights(name, mesh.world)
    size = weights.config if weights else MODEL_SIZES[name].config
    check_combinations(flags, mesh.world.size, weights and weights.config)
    seq = flags.data.seq or min(size.context, _MAX_DEFAULT_SEQ_LEN if weights else size.context)
    if weights:
        check_memory_fits(replace_flags(flags, seq=seq), mesh.world.size, size)
    tokenizer = _tokenizer(flags, weights) if weights and flags.data.data != "random" else None
    vocab = flags.model.vocab or size.vocab
    source = _first_on_rank_0(mesh, lambda: open_dataset(flags.data.data, vocab, tokenizer))
    source.check_seq_len(seq)
    if source.corpus:
        _check_same(mesh, source)
        _say(flags, mesh, source, seq)
    config = _config(flags, source, size, seq, weights)
    held_out = None
    if source.corpus and flags.run.eval_every:
        held_out = HeldOutSet(source.corpus.held_out, source.tokenizer, seq)
    identity = {"seed": flags.model.seed, "seq": seq,
                "corpus": source.corpus.sha256 if source.corpus else "random",
                "tokenizer": source.tokenizer.sha256 if source.tokenizer else f"vocabulary {config.vocab}"}
    return RunInputs(source, seq, held_out, config, weights, identity)


def _check_same(mesh, source):
    """Raise ValueError on every rank when a rank has read another corpus than rank 0."""
    found = comm.all_gather_json([source.corpus.sha256, source.tokenizer.sha256], mesh.world, "caches")
    other = next((rank for rank, each in enumerate(found) if each != found[0]), None)
    if other is not None:
        raise ValueError(f"rank {other} has read another --data {source.corpus.name} than rank 0: corpus "
                         f"{found[other][0][:12]}, not {found[0][0][:12]}; its files must be the same on "
                         "every host (stdlib is that of each host's Python), and nobody may write them now")


def _say(flags, mesh, source, seq):
    """Print on rank 0 what data is read, and warnings to stderr."""
    if mesh.rank == 0:
        batch, _ = global_batch_and_num_micro_batches(flags.data, mesh.data.size)
        print(describe_data(source, seq), flush=True)
        for warning in data_warnings(source, seq, flags.model.vocab, batch):
            print(f"nanoinfra: {warning}", file=sys.stderr, flush=True)


def _tokenizer(flags, weights):
    """The tokenizer that came with the weights. Raises ValueError when there is none, or it does not fit."""
    name, vocab = flags.model.model, weights.config.vocab
    text = weights.tokenizer
    if text is None:
        raise ValueError(f"{name} holds no tokenizer to read --data with; copy the files of the one it was "
                         "trained with into it, or try --data random")
    token, last = max(text.backend_tokenizer.get_vocab().items(), key=lambda entry: entry[1])
    if last >= vocab:
        raise ValueError(f"the tokenizer of {name} goes up to {last} ({token!r}), but the model knows ids "
                         f"below {vocab} alone; take the tokenizer that it was trained with")
    names = (text.backend_tokenizer.id_to_token(i) for i in sorted(text.eos_token_ids))
    return BPETokenizer(text.backend_tokenizer, text.eos_token or next(filter(None, names), ""))


def _config(flags, source, size, seq, weights):
    if weights:
        return weights.config
    vocab = source.tokenizer.vocab_size if source.tokenizer else source.vocab_size
    return config_for_size(flags.model.model, vocab, seq, False if flags.model.untied else None)


def _first_on_rank_0(mesh, work):
    """Return `work()` on every rank; rank 0 runs it first and fills the caches; all raise its error."""
    problem = done = None
    if mesh.rank == 0:
        try:
            done = work()
        except ValueError as error:
            problem = str(error)
    problem = comm.all_gather_json(problem, mesh.world, "caches")[0]
    if problem:
        raise ValueError(problem)
    return work() if mesh.rank else done
