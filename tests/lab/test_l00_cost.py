import importlib.util
from pathlib import Path

import pytest

from lessons.l00_one_step import checks as l00_cost
from nanoinfra.formulas import flops, parameters

MUTANTS = Path(__file__).parents[2] / "lessons" / "l00_one_step" / "mutants.py"
HINTS = {
    "attends in one layer": "L layers forgotten? Each one has its own attention",
    "attends once a sequence": "attention once a sequence? Each of the T tokens meets T keys",
    "sums values of KV heads": "KV heads for scores or values?",
    "attends with KV heads": "KV heads? Each query head makes its own scores",
    "multiplies with two MLP matrices": "gate, up, down are three",
    "has an MLP of two matrices": "gate, up, down are three",
    "has one layer": "L layers forgotten? Each one has its own matrices",
    "meets half of the keys": "scores or values alone? Or half of the keys?",
    "goes back once": "backward once, not twice?",
    "forgets attention": "no attention?",
    "takes 6 Psi and no attention": "6 for each parameter?",
    "attends with C": "C in attention?",
}


@pytest.fixture(scope="module")
def mutants():
    spec = importlib.util.spec_from_file_location("l00_mutants", MUTANTS)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return {mutant.name: mutant for mutant in module.MUTANTS}


@pytest.mark.parametrize("name", HINTS)
def test_a_slip_is_named_and_its_shape_is_printed(mutants, name):
    text = mutants[name].check.report(mutants[name].variant).first_failure.text
    assert HINTS[name] in text
    assert "V=61 C=24 L=5" in text
    assert "B=" in text or mutants[name].check is l00_cost.parameters


def test_layers_forgotten_in_the_parameters_are_named():
    def one_layer(c):
        outside = c.vocab * c.width * (2 - c.tied) + c.width
        return outside + (parameters.parameter_count(c) - outside) // c.layers
    assert "L layers forgotten?" in l00_cost.parameters.report(one_layer).first_failure.text


def test_no_two_slips_of_a_probe_give_the_same_number():
    linear, square = l00_cost._split(l00_cost.counted_flops)
    for want, slips in ((linear, l00_cost._weight_slips(l00_cost.GROUPED, linear)),
                        (square, l00_cost._square_slips(l00_cost.GROUPED, square))):
        assert len({*slips.values(), want}) == len(slips) + 1


def test_the_modules_own_formulas_pass():
    assert l00_cost.parameters.report(parameters.parameter_count).exit_code == 0
    assert l00_cost.train_flops.report(flops.forward_backward_flops).exit_code == 0
