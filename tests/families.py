"""Each kind of decoder once: families that are made of the same parts are one kind."""
from nanoinfra.config import FAMILIES, RopeScaling

KINDS = tuple({parts: name for name, parts in reversed(FAMILIES.items())}.values())[::-1]
VARIANTS = {                                 # what a configuration may change, of the family named
    "mistral": {"window": 5},
    "window above": {"family": "qwen2", "window": 4, "full_layers": 1},
    "yarn and biases": {"family": "llama", "attention_bias": True, "mlp_bias": True,
                        "rope_scaling": RopeScaling("yarn", 4.0, 16, attention_factor=1.2)},
}
