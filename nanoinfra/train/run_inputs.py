"""What a run trains, and on what: samples, held-out windows, and a size to draw or weights to go on from.

A size takes the vocabulary of the corpus's own tokenizer; pretrained weights bring theirs.
Rank 0 builds the caches, then the others read them.
"""
import sys
from dataclasses import dataclass

from nanoinfra.config import SIZES, ModelConfig, sized
from nanoinfra.data.data_summary import data_warnings, describe_data
from nanoinfra.data.loader import HeldOut
from nanoinfra.data.sample_order import Packed, Random, open_source
from nanoinfra.data.train_tokenizer import Tokenizer
from nanoinfra.distributed import comm
from nanoinfra.formulas.tensor_parallel import check_heads
from nanoinfra.model.weights.fill_model import Read, Weights
from nanoinfra.train.config import TrainFlags, micro_batches
from nanoinfra.train.launch.memory_check import changed, check_memory
from nanoinfra.train.pretrained import open_pretrained

LONGEST = 1024                               # tokens in a sample where pretrained weights would allow more


@dataclass(frozen=True)
class Inputs:
    """Samples of `seq` tokens from `source`; `held_out` is None where there is no text to hold out."""
    source: Packed | Random
    seq: int
    held_out: HeldOut | None
    model: ModelConfig
    weights: Weights | None                  # to start from; None: draw them
    identity: dict                           # what a run that goes on must find again

    @property
    def read(self) -> Read | None:
        """How to read the weights to start from."""
        return self.weights and self.weights.read


def open_inputs(flags: TrainFlags, mesh) -> Inputs:
    """Read weights, corpus and tokenizer. Raises ValueError, on every rank, where one of them will not do."""
    weights = None if flags.model.model in SIZES else open_pretrained(flags.model.model, mesh.world)
    size = weights.config if weights else SIZES[flags.model.model].model
    check_heads(size, mesh.tp.size)
    seq = flags.data.seq or min(size.context, LONGEST if weights else size.context)
    if weights:
        check_memory(changed(flags, seq=seq), mesh.world.size, size)
    tokenizer = _tokenizer(flags, weights) if weights and flags.data.data != "random" else None
    vocab = flags.model.vocab or size.vocab
    source = _first_on_rank_0(mesh, lambda: open_source(flags.data.data, vocab, tokenizer))
    source.check(seq)
    if source.corpus:
        _check_same(mesh, source)
        _say(flags, mesh, source, seq)
    config = _config(flags, source, size, seq, weights)
    held_out = None
    if source.corpus and flags.run.eval_every:
        held_out = HeldOut(source.corpus.held_out, source.tokenizer, seq)
    identity = {"seed": flags.model.seed, "seq": seq,
                "corpus": source.corpus.hash if source.corpus else "random",
                "tokenizer": source.tokenizer.hash if source.tokenizer else f"vocabulary {config.vocab}"}
    return Inputs(source, seq, held_out, config, weights, identity)


def _check_same(mesh, source):
    """Raise ValueError, on every rank, where one has read another corpus than rank 0."""
    found = comm.gather_objects([source.corpus.hash, source.tokenizer.hash], mesh.world, "caches")
    other = next((rank for rank, each in enumerate(found) if each != found[0]), None)
    if other is not None:
        raise ValueError(f"rank {other} has read another --data {source.corpus.name} than rank 0: corpus "
                         f"{found[other][0][:12]}, not {found[0][0][:12]}; its files must be the same on "
                         "every host (stdlib is that of each host's Python), and nobody may write them now")


def _say(flags, mesh, source, seq):
    """What is read, once: the news to stdout, and what may not be meant to stderr."""
    if mesh.rank == 0:
        batch, _ = micro_batches(flags.data, mesh.data.size)
        print(describe_data(source, seq), flush=True)
        for warning in data_warnings(source, seq, flags.model.vocab, batch):
            print(f"nanoinfra: {warning}", file=sys.stderr, flush=True)


def _tokenizer(flags, weights):
    """The tokenizer that came with the weights. ValueError where none did, or one of another model."""
    name, text, vocab = flags.model.model, weights.text, weights.config.vocab
    if text is None:
        raise ValueError(f"{name} holds no tokenizer to read --data with; copy the files of the one it was "
                         "trained with into it, or try --data random")
    token, last = max(text.backend.get_vocab().items(), key=lambda entry: entry[1])
    if last >= vocab:
        raise ValueError(f"the tokenizer of {name} goes up to {last} ({token!r}), but the model knows ids "
                         f"below {vocab} alone; take the tokenizer that it was trained with")
    names = (text.backend.id_to_token(i) for i in sorted(text.ends))
    return Tokenizer(text.backend, text.eos or next(filter(None, names), ""))


def _config(flags, source, size, seq, weights):
    if weights:
        return weights.config
    vocab = source.tokenizer.vocab_size if source.tokenizer else source.vocab
    return sized(flags.model.model, vocab, seq, False if flags.model.untied else None)


def _first_on_rank_0(mesh, work):
    """`work()` of every rank, after rank 0's has filled the caches; what is wrong there, all ranks raise."""
    problem = done = None
    if mesh.rank == 0:
        try:
            done = work()
        except ValueError as error:
            problem = str(error)
    problem = comm.gather_objects(problem, mesh.world, "caches")[0]
    if problem:
        raise ValueError(problem)
    return work() if mesh.rank else done
