"""The real SmolLM2, loaded once."""
import pytest

from nanoinfra.model.weights.load import load, packaged


@pytest.fixture(scope="session")
def smollm2_file():
    return packaged("smollm2-135m")


@pytest.fixture(scope="session")
def smollm2():
    return load("smollm2-135m")
