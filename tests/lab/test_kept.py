import pytest
import torch
from torch import nn

from nanoinfra.config import config_for_size
from nanoinfra.formulas.saved_activations import layer_activation_bytes_by_term
from nanoinfra.lab.instruments.saved_activations import SavedActivations
from nanoinfra.memory.recompute import apply_activation_checkpointing
from nanoinfra.model.attention import ForwardContext
from nanoinfra.model.decoder import Decoder


def test_a_storage_counts_once_and_weights_do_not():
    layer, x = nn.Linear(4, 4), torch.ones(3, 4, requires_grad=True)
    with SavedActivations(layer.parameters()) as kept:
        y = layer(x) * x.view(3, 4)                       # x twice, the layer's output, and its weight
    assert kept.saved_bytes() == 2 * x.nbytes and y.requires_grad
    assert [tuple(tensor.shape) for tensor in kept.saved_tensors()] == [(3, 4), (3, 4)]
    with SavedActivations() as kept:
        y = layer(x)
    assert kept.saved_bytes() == x.nbytes + layer.weight.nbytes


def test_what_backward_frees_is_gone_but_the_peak_stays():
    x = torch.ones(8, requires_grad=True)
    with SavedActivations() as kept:
        x.exp().exp().sum().backward()
    assert (kept.saved_bytes(), kept.peak_bytes) == (0, 2 * x.nbytes)


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("how", ["none", "selective", "full"])
def test_layers_keep_what_the_formula_says_on_any_device(device, how):
    config = config_for_size("test")
    with torch.device(device):
        model = apply_activation_checkpointing(Decoder(config, "naive"), how)
        x = torch.zeros(2, 9, dtype=torch.long)
        places = model.default_positions(x)
        x, rope = model.embed_tokens(x, places), model.rope_cos_sin(places, torch.get_default_dtype())
        with SavedActivations([*model.parameters(), *rope]) as kept:
            for block in model.blocks:
                x = block(x, ForwardContext(rope))
    assert kept.saved_bytes() == config.layers * sum(layer_activation_bytes_by_term(config, 2, 9, 4, "naive",
                                                                                    how).values())
