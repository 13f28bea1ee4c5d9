"""What several tests of the server serve."""
import pytest

from nanoinfra.config import ModelConfig
from nanoinfra.data.train_tokenizer import BPETokenizer
from nanoinfra.model.decoder import Decoder
from nanoinfra.model.weights.hugging_face.load_and_save import save_hf_model
from tests.model.twins import scrambled


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    """A folder with a model of nonsense and its tokenizer, both as Hugging Face keeps them."""
    root = tmp_path_factory.mktemp("served")
    tokenizer = BPETokenizer.train(["one two three"] * 9, vocab_size=262)
    tokenizer.save(root / "tokenizer")
    save_hf_model(scrambled(Decoder(ModelConfig(tokenizer.vocab_size, 24, 2, 4, 2, 6, 40, 128))), root / "m",
                  root / "tokenizer")
    return root / "m"
