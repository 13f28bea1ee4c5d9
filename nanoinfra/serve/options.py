"""The flags of `nanoinfra generate`. No torch here: `--help` must answer at once."""
from dataclasses import dataclass
from typing import Literal

import tyro


@dataclass(frozen=True)
class GenerateOptions:
    """Continue a text, or answer as a chat model."""
    model: tyro.conf.Positional[str]  # a run directory, a Hugging Face folder, a .gguf file, smollm2-135m
    prompt: tyro.conf.Positional[str]        # the text to go on from; with --chat, the question
    max_new_tokens: int = 128                # stop after so many
    temperature: float = 0.0                 # 0: always the likeliest token
    top_k: int = 0                           # draw among the k likeliest; 0: all
    top_p: float = 1.0                       # draw among the likeliest that make up this probability
    seed: int = 0                            # of the draws
    chat: bool = False                       # put the prompt into the model's chat template
    dtype: Literal["float32", "bfloat16", "float64"] = "float32"  # to compute in
    tp: int = 1                              # cut the model over so many ranks, started here
    threads: int | None = None               # a rank; default: torch's own choice, or cores / ranks
