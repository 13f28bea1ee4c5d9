"""A tiny chat model as transformers writes it: special tokens, two templates, a list of ends, a text."""
import transformers

from tests.model.tokenizer_kinds import save

TEMPLATE = "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{{ eos_token }}{% endfor %}"
TINY = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32,
        "max_position_embeddings": 64}


def chat_model(folder, kind, vocab=420, **ids):
    """A chat model's folder as transformers writes it, and a text to train it on."""
    config = transformers.LlamaConfig(vocab_size=vocab, pad_token_id=3, bos_token_id=0, eos_token_id=[1, 4],
                                      **TINY)
    model = transformers.LlamaForCausalLM(config)
    model.generation_config = transformers.GenerationConfig(
        eos_token_id=[1, 4], pad_token_id=3, temperature=0.7, do_sample=True)
    save(kind, folder / "kind")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "kind")
    tokenizer.chat_template = {"default": TEMPLATE, "tool_use": "{{ tools }}"}
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    (folder / "text").write_text("".join(f"{i} cats sat on {i * i} mats\n\n" for i in range(4000)))
    return folder / "model"
