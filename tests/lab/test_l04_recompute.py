import pytest

from lessons.l04_recompute import checks as check
from nanoinfra.formulas.saved_activations import layer_activation_bytes_by_term
from nanoinfra.lab.mutants import collect_lesson_mutants
from nanoinfra.memory import recompute

HINTS = {
    "returns nothing": "None, want a tensor: no return?",
    "asks whether the input learns": "give it one that does",
    "forgets the inputs gradient": "`x` got no gradient, want one: does the detached x require a gradient",
    "takes x out and asks no gradient": "a gradient, and does backward return x.grad?",
    "forgets what came from above": "is `upstream` used?",
    "runs again without grad": "Was fn run under torch.enable_grad()",
    "returns too few": "One for each of fn, anchor, x, *rest",
    "has heads as wide as the model, and KV = H": "here H*K is not C, nor KV = H",
    "has K = C / H": "here H*K is not C: K stands in the config",
    "has a mask for all layers": "one mask for all layers? Each layer makes its own",
    "forgets the parameters": "`up.weight` got no gradient, want one: is `out` sent backward",
    "goes back twice": "2 x (30 of 30): given twice",
    "rolls new dice": "with dropout inside, rank 0: `x.grad` differs",
    "leaves the dice as they fell": "the random number drawn after backward is",
    "hides the input on ctx": "keep 0 bytes, want 10,080, one input each: no save_for_backward?",
    "keeps everything": "does fn run with grad in forward?",
    "keeps the output too": "keep 12,096 bytes, want 10,080, one input each: the output as well?",
    "runs three times": "call fn 3 times, want 2",
    "counts one layer": "one layer? Each keeps an input of its own",
    "counts numbers": "bytes, not numbers?",
    "keeps the output of a layer too": "the output as well? It is the next layer's input",
    "keeps squares when selective": "no square is kept, neither softmax nor mask",
    "has no statistics": "no mean and 1/std?",
    "has one norm": "each of the two norms keeps its input",
    "keeps q, k, v no more": "no q, k, v? Selective recompute starts from them",
    "keeps one of two in the MLP": "down reads GELU's output, and GELU its input",
    "counts an input for each of q, k, v": "q, k and v read one and the same input",
    "has as many KV heads as heads": "as many KV heads as heads?",
    "has no mask": "no mask? It is kept too, a byte a pair",
    "keeps scores and softmax": "scores and softmax? Softmax's backward reads its output alone",
    "has a mask of numbers": "a mask of numbers? A bool has one byte",
    "has a mask for each sequence": "the mask for each sequence? It is one for all",
}


@pytest.fixture(scope="module")
def mutants():
    return {mutant.name: mutant for mutant in collect_lesson_mutants("04")}


@pytest.mark.parametrize("name", HINTS)
def test_a_slip_is_named(mutants, name):
    assert HINTS[name] in mutants[name].check.report(mutants[name].variant).first_failure.text


def test_no_two_slips_of_a_probe_give_the_same_number():
    for config in (check.CONFIG, check.GROUPED):
        want = check.counted(config, check.SEQUENCES, check.T, "selective")
        slips = [slip for slip in check._slips(config, want).values() if slip != want]       # KV = H in one
        assert len(set(slips)) == len(slips) >= 10


def test_the_modules_own_recompute_and_formulas_pass():
    def kept(config, batch, seq, d, how):
        return config.layers * sum(layer_activation_bytes_by_term(config, batch, seq, d, "naive",
                                                                  how).values())
    assert check.recompute.report(recompute.activation_checkpoint).exit_code == 0
    assert check.kept_bytes.report(kept).exit_code == 0
