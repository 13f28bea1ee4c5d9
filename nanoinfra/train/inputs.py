"""What a run trains on and what: the source of samples, the held-out windows, and the model's sizes that
follow.

The vocabulary is the tokenizer's. Rank 0 builds the caches, then the others read them.
"""
from dataclasses import dataclass

from nanoinfra.data.loader import HeldOut
from nanoinfra.data.source import Packed, Random, open_source
from nanoinfra.dist import comm
from nanoinfra.formulas.shape import SIZES, ModelConfig, sized
from nanoinfra.train.config import TrainFlags


@dataclass(frozen=True)
class Inputs:
    """Samples of `seq` tokens from `source`; `held_out` is None where there is no text to hold out."""
    source: Packed | Random
    seq: int
    held_out: HeldOut | None
    model: ModelConfig
    identity: dict                           # what a run that goes on must find again


def open_inputs(flags: TrainFlags, mesh) -> Inputs:
    """Read the corpus and its tokenizer. Raises ValueError where there is too little text, or none."""
    size = SIZES[flags.model.model].model
    seq = flags.data.seq or size.context
    vocab = flags.model.vocab or size.vocab
    problem = None
    if mesh.rank == 0:
        try:
            open_source(flags.data.data, vocab)                          # fills the caches
        except ValueError as error:
            problem = str(error)
    problem = comm.gather_objects(problem, mesh.world, "caches")[0]
    if problem:
        raise ValueError(problem)  # on every rank, so that none waits for another
    source = open_source(flags.data.data, vocab)
    source.check(seq)
    text = source.tokenizer is not None
    held_out = HeldOut(source.corpus.held_out, source.tokenizer, seq) if text and flags.run.eval_every else None
    config = sized(flags.model.model, source.tokenizer.vocab_size if text else vocab, seq,
                   False if flags.model.untied else None)
    corpus = source.corpus.hash if text else f"random, vocabulary {vocab}"
    tokenizer = source.tokenizer.hash if text else None
    return Inputs(source, seq, held_out, config,
                  {"seed": flags.model.seed, "seq": seq, "corpus": corpus, "tokenizer": tokenizer})
