"""The real SmolLM2, loaded once."""
import pytest

from nanoinfra.model.weights.load_model import load_model, locate_packaged_gguf_file


@pytest.fixture(scope="session")
def smollm2_file():
    return locate_packaged_gguf_file("smollm2-135m")


@pytest.fixture(scope="session")
def smollm2():
    return load_model("smollm2-135m")
