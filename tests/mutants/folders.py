"""Known-wrong ways to read and write model folders: keys dropped, sizes trusted, rows misplaced, mixes left.

`read` asks what configurations say, `fused` cuts stored tensors, `exported` writes two models into a folder.
"""
import os
import tempfile
import time
from contextlib import contextmanager, suppress
from pathlib import Path
from unittest import mock

import torch

from nanoinfra.config import ModelConfig, RopeScaling
from nanoinfra.lab.check import Check, CriterionNotMet
from nanoinfra.lab.mutants import Mutant, patched
from nanoinfra.model.decoder import Decoder
from nanoinfra.model.initialization import init_weights
from nanoinfra.model.weights import map_parameters_to_stored_tensors, read_json_files, safetensors_files
from nanoinfra.model.weights.hugging_face import config as hf_config
from nanoinfra.model.weights.hugging_face import config_fields
from nanoinfra.model.weights.hugging_face.load_and_save import load_hf_model, save_hf_model
from nanoinfra.model.weights.hugging_face.parameter_names import QKV_LINEARS

configurations, layouts, exports, problems = (Check(name) for name in ("configurations", "layouts", "exports",
                                                                       "broken folders"))
SIZES = {"vocab_size": 11, "hidden_size": 12, "num_hidden_layers": 3, "num_attention_heads": 2,
         "num_key_value_heads": 2, "intermediate_size": 8, "max_position_embeddings": 16}
YARN = {"rope_type": "yarn", "factor": 2.0, "rope_theta": 9.0, "original_max_position_embeddings": 8}
CONFIG = ModelConfig(vocab=11, width=12, layers=2, heads=2, kv_heads=1, head_dim=6, hidden=8, context=16)


def read(family, **changes):
    """The ModelConfig of a config.json, or the line that refuses it."""
    try:
        return hf_config.model_config_from_hf({"model_type": family, **SIZES, **changes}, "here")
    except ValueError as error:
        return str(error)


def _refused(subject, family, words, **changes):
    if words not in str(got := subject(family, **changes)):
        raise CriterionNotMet(f"{changes} of {family} gives {got}, want a line with {words!r}")


@configurations.criterion("what is not computed is refused", "property")
def _(subject):
    _refused(subject, "llama", "is_encoder_decoder", is_encoder_decoder=True)
    _refused(subject, "qwen2", "layer_types", layer_types=["sliding_attention", "full_attention",
                                                           "full_attention"], use_sliding_window=True)


@configurations.criterion("keys that are read undeclared are refused", "property")
def _(subject):
    _refused(subject, "llama", "is_causal", is_causal=False)
    _refused(subject, "llama", "is_causal", is_causal=1)
    _refused(subject, "mistral", "layer_types", layer_types=["full_attention"] * 3)


@configurations.criterion("no key replaces a part of the class", "property")
def _(subject):
    _refused(subject, "llama", "transformers' own", attribute_map={"num_hidden_layers": "vocab_size"})


@configurations.criterion("sizes are seen before lists are made of them", "property")
def _(subject):
    start = time.process_time()
    _refused(subject, "llama", "num_labels", num_labels=2 * 10**6)
    if (took := time.process_time() - start) > 0.5:
        raise CriterionNotMet(f"a refusal took {took:.1f} s")


@configurations.criterion("RoPE is stretched as the file says", "property")
def _(subject):
    got = subject("llama", rope_parameters=YARN, original_max_position_embeddings=4)
    want = RopeScaling("yarn", 2.0, 4, attention_factor=1.0693147180559945)
    if getattr(got, "rope_scaling", None) != want:
        raise CriterionNotMet(f"yarn is read as {got}, want {want}")
    got = subject("llama", rope_parameters={"rope_type": "dynamic", "factor": 2.0})
    if getattr(got, "context", None) != 32 or got.rope_scaling.original_context != 16:
        raise CriterionNotMet(f"dynamic scaling is read as {got}, want a context of 32, from 16")


@configurations.criterion("windows are of the layers that have them", "property")
def _(subject):
    got = subject("qwen3", use_sliding_window=True, sliding_window=4, max_window_layers=2)
    if (got.window, got.full_layers) != (4, 2):
        raise CriterionNotMet(f"the window is {got.window} after {got.full_layers} layers, want 4 after 2")


@configurations.criterion("transformers' dicts are its own", "property")
def _(subject):
    rope = dict(YARN)
    subject("phi3", rope_parameters=rope)
    if rope != YARN:
        raise CriterionNotMet(f"what was given became {rope}")


def fused(stored):
    """Where row 1 of q, k and v of layer 1 is read from, of a stored tensor, and each one's shape there."""
    inner = ("norm1", "norm2", "attn.o", "mlp.gate", "mlp.up", "mlp.down")
    source = map_parameters_to_stored_tensors.TensorSource
    table = {f"blocks.{{i}}.{name}.weight": source(name) for name in inner}
    table |= {f"{name}.weight": map_parameters_to_stored_tensors.TensorSource(name) for name in ("embed",
                                                                                                 "norm")}
    qkv = map_parameters_to_stored_tensors.TensorSource("w{i}", fused_linears=QKV_LINEARS)
    table |= {f"blocks.{{i}}.{name}.weight": qkv for name in QKV_LINEARS}
    found = map_parameters_to_stored_tensors.parameter_sources(CONFIG, table)
    mine = [found[f"blocks.1.{name}.weight"] for name in QKV_LINEARS]
    rows = [map_parameters_to_stored_tensors.read_parameter_slices(each, (4,), 6, (slice(1, 2),), lambda name,
                                                                   box: stored[box]).item()
            for each in mine]
    return rows, [map_parameters_to_stored_tensors.shape_from_stored(each, stored.shape) for each in mine]


@layouts.criterion("fused rows lie one after another", "property")
def _(subject):
    if (got := subject(torch.arange(24))[0]) != [1, 13, 19]:
        raise CriterionNotMet(f"the second of 12, 6 and 6 rows is read from {got}, want 1, 13 and 19")


@layouts.criterion("a fused tensor is checked whole", "property")
def _(subject):
    if (got := subject(torch.arange(24))[1]) != [(12,), (6,), (6,)]:
        raise CriterionNotMet(f"24 rows make {got}, want 12, 6 and 6")
    if (got := subject(torch.arange(25))[1]) == [(12,), (6,), (6,)]:
        raise CriterionNotMet("25 rows make 12, 6 and 6 as well")


def exported(folder, sizes, calls=10**6):
    """Two models, one after the other, the second stopped after so many changes of the folder."""
    models = [init_weights(Decoder(CONFIG), seed) for seed in (0, 1)]
    save_hf_model(models[0], folder, shard_bytes=sizes[0])
    replace, left = os.replace, [calls]

    def counted(*paths):
        left[0] -= 1
        if left[0] < 0:
            raise InterruptedError
        replace(*paths)
    with mock.patch.object(os, "replace", counted), suppress(InterruptedError):
        save_hf_model(models[1], folder, shard_bytes=sizes[1])
    return models


@exports.criterion("the last export is what is read", "property")
def _(subject):
    for sizes in ((2**20, 2000), (2000, 2**20), (1000, 3000)):
        with tempfile.TemporaryDirectory() as folder:
            _, want = subject(Path(folder), sizes)
            try:
                got = load_hf_model(folder)
            except ValueError as error:
                raise CriterionNotMet(f"nothing can be read: {error}") from error
            if not torch.equal(got.embed.weight, want.embed.weight):
                raise CriterionNotMet("the first export is read")
            if len(set(Path(folder).glob("model*"))) != (1 if sizes[1] == 2**20 else len(
                    set(Path(folder).glob("model-*"))) + 1):
                raise CriterionNotMet("files of the first export are left")


@exports.criterion("an export cut off is no model", "property")
def _(subject):
    for calls in range(3):
        with tempfile.TemporaryDirectory() as folder:
            subject(Path(folder), (2000, 2000), calls)
            try:
                load_hf_model(folder)
            except ValueError as error:
                if "holds no config.json" in str(error):
                    continue
            raise CriterionNotMet(f"a folder after {calls} files of the new export is read, or refused for "
                                  "its weights")


def opened(change):
    """The line that refuses a folder, changed by `change`; "" where it opens, the error's name if no line."""
    with tempfile.TemporaryDirectory() as folder:
        save_hf_model(init_weights(Decoder(CONFIG), 0), folder, shard_bytes=2000)
        change(Path(folder))
        try:
            load_hf_model(folder)
        except ValueError as error:
            return str(error)
        except Exception as error:
            return type(error).__name__
        return ""


@problems.criterion("pointers of Git LFS are named", "property")
def _(subject):
    pointer = read_json_files.GIT_LFS_POINTER_START + b".github.com"
    got = subject(lambda folder: (folder / "config.json").write_bytes(pointer))
    if "Git LFS" not in got:
        raise CriterionNotMet(f"a pointer is answered {got!r}")


@problems.criterion("two sets of weights are refused", "property")
def _(subject):
    def change(folder):
        (folder / safetensors_files.SAFETENSORS_FILE).write_bytes(next(folder.glob("model-*")).read_bytes())
    got = subject(change)
    if "stale" not in got:
        raise CriterionNotMet(f"both forms of weights are answered {got!r}")


@problems.criterion("an index names files of its folder", "property")
def _(subject):
    def change(folder):
        path = folder / safetensors_files.SAFETENSORS_INDEX_FILE
        path.write_text(path.read_text().replace("model-00001", "../model-00001"))
    if "of its folder" not in (got := subject(change)):
        raise CriterionNotMet(f"an index that leaves its folder is answered {got!r}")


def _reversed(config, table, inner=map_parameters_to_stored_tensors.parameter_sources):
    return {name: each._replace(rows_before=each.rows_after, rows_after=each.rows_before) for name, each in
            inner(config, table).items()}


@contextmanager
def _in_place(folder, stale=()):
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.glob("model*"):
        path.unlink()
    yield folder


MUTANTS = [
    Mutant("other attributes are dropped", configurations, patched(
        read, "nanoinfra.model.weights.hugging_face.config:_refuse_others", lambda *args: None),
        "what is not computed is refused"),
    Mutant("undeclared keys are ignored", configurations, patched(
        read, "nanoinfra.model.weights.hugging_face.config:UNDECLARED_HF_KEYS", {}),
        "keys that are read undeclared are refused"),
    Mutant("1 is as good as true", configurations, patched(
        read, "nanoinfra.model.weights.hugging_face.config:_among", lambda value, allowed: value in allowed),
        "keys that are read undeclared are refused"),
    Mutant("attributes of the class are set", configurations, patched(
        read, "nanoinfra.model.weights.hugging_face.config:SETTABLE_HF_KEYS",
        (*config_fields.SETTABLE_HF_KEYS,
         "attribute_map")),
        "no key replaces a part of the class"),
    Mutant("sizes go to transformers first", configurations, patched(
        read, "nanoinfra.model.weights.hugging_face.config:MAX_CONFIG_VALUES", {}),
        "sizes are seen before lists are made of them"),
    Mutant("the attention factor is left out", configurations, patched(
        read, "nanoinfra.model.weights.hugging_face.rope_config:_mscale", lambda *args: 1.0),
        "RoPE is stretched as the file says"),
    Mutant("dynamic scaling is no longer", configurations, patched(
        read, "nanoinfra.model.weights.hugging_face.rope_config:_context", lambda kind, given,
        longest: longest),
        "RoPE is stretched as the file says"),
    Mutant("windows are everywhere", configurations, patched(
        read, "nanoinfra.model.weights.hugging_face.config:_windows",
        lambda table, theirs: {"window": theirs["sliding_window"]}), "what is not computed is refused"),
    Mutant("transformers writes into the file's dict", configurations, patched(
        read, "nanoinfra.model.weights.hugging_face.config:deepcopy", lambda x: x),
        "transformers' dicts are its own"),
    Mutant("parts in the other order", layouts, patched(
        fused, "nanoinfra.model.weights.map_parameters_to_stored_tensors:parameter_sources", _reversed),
        "fused rows lie one after another"),
    Mutant("rows after ours are not counted", layouts, patched(
        fused, "nanoinfra.model.weights.map_parameters_to_stored_tensors:shape_from_stored",
        lambda each, stored: (min(stored[0] - each.rows_before, 12 if each.rows_before == 0 else 6),)),
        "a fused tensor is checked whole"),
    Mutant("old weights stay", exports, patched(
        exported, "nanoinfra.model.weights.replace_files:_REPLACED_WEIGHTS", ()),
        "the last export is what is read"),
    Mutant("files are written in place", exports, patched(
        exported, "nanoinfra.model.weights.hugging_face.load_and_save:replace_model_files", _in_place),
        "an export cut off is no model"),
    Mutant("pointers are JSON", problems, patched(
        opened, "nanoinfra.model.weights.read_json_files:check_file_is_fetched", lambda path: None),
        "pointers of Git LFS are named"),
    Mutant("the index wins", problems, patched(
        opened, "nanoinfra.model.weights.safetensors_files:_files",
        lambda folder: sorted(folder.glob("model-*"))),
        "two sets of weights are refused"),
    Mutant("any path will do", problems, patched(
        opened, "nanoinfra.model.weights.safetensors_files:_shards", lambda index: []),
        "an index names files of its folder"),
]
