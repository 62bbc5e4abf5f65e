"""Ways in which a model's directory can be damaged: a list of kinds, each a function that does it to a directory.

`REFUSED`: `load` must refuse it. `HARMLESS`: it must load, and compute what the undamaged model does. `EITHER`: either
a refusal, or a model that generates.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file

REFUSED, HARMLESS, EITHER = "refused", "harmless", "either"
WORDS = 24  #: of the tokenizer; the embedding has as many rows
MARK = "FASTATTN_TEST_MARK"  #: the variable that names a file which appears when a directory's code is run

SETTINGS: dict[str, Any] = {
    "vocab_size": WORDS,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
}


class Kind(NamedTuple):
    name: str
    damage: Callable[[Path], Any]
    expected: str = REFUSED


def make(path: Path) -> Path:
    """The undamaged directory: a Llama of a few thousand weights and a tokenizer of words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    with torch.random.fork_rng():
        torch.manual_seed(5)
        LlamaForCausalLM(LlamaConfig(**SETTINGS, initializer_range=0.3)).save_pretrained(path)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(WORDS)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, bos_token="w0", eos_token="w1").save_pretrained(path)
    return path


def edited(name: str, **changes: Any) -> Callable[[Path], None]:
    """Sets values of a JSON file, which need not be there; a value of `...` removes its key."""

    def edit(path: Path) -> None:
        file = path / name
        found = json.loads(file.read_text()) if file.exists() else {}
        found.update(changes)
        file.write_text(json.dumps({key: value for key, value in found.items() if value is not ...}))

    return edit


def config(**changes: Any) -> Callable[[Path], None]:
    return edited("config.json", **changes)


def text(name: str, content: str | bytes) -> Callable[[Path], Any]:
    return lambda path: (path / name).write_bytes(content if isinstance(content, bytes) else content.encode())


def weights(change: Callable[[dict[str, torch.Tensor]], Any], metadata: dict[str, str] | None = None):
    def damage(path: Path) -> None:
        found = load_file(path / "model.safetensors")
        change(found)
        save_file(found, path / "model.safetensors", metadata or {"format": "pt"})

    return damage


def header(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    """Changes what model.safetensors says of its tensors, not the tensors."""

    def damage(path: Path) -> None:
        data = (path / "model.safetensors").read_bytes()
        size = struct.unpack("<Q", data[:8])[0]
        found = json.loads(data[8 : 8 + size])
        change(found)
        new = json.dumps(found).encode()
        (path / "model.safetensors").write_bytes(struct.pack("<Q", len(new)) + new + data[8 + size :])

    return damage


def sharded(change: Callable[[Path, dict[str, str]], Any]) -> Callable[[Path], None]:
    """Splits the weights into a.safetensors and b.safetensors, then changes the directory or the map."""

    def damage(path: Path) -> None:
        found = load_file(path / "model.safetensors")
        names = sorted(found)
        parts = {"a.safetensors": names[:7], "b.safetensors": names[7:]}
        for file, held in parts.items():
            save_file({name: found[name] for name in held}, path / file, {"format": "pt"})
        (path / "model.safetensors").unlink()
        mapped = {name: file for file, held in parts.items() for name in held}
        mapped = change(path, mapped) or mapped
        (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": mapped}))

    return damage


Q, NORM = "model.layers.1.self_attn.q_proj.weight", "model.norm.weight"


def set_to(name: str, make_new: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Path], None]:
    return weights(lambda found: found.update({name: make_new(found[name]).contiguous()}))


def _spoiled(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def spoil(tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.clone()
        tensor.view(-1)[-1] = value
        return tensor

    return spoil


class _Evil:
    def __reduce__(self) -> Any:
        return exec, (MARKING,)


MARKING = f"import os; open(os.environ[{MARK!r}], 'w').close()"


def _pickled(path: Path, name: str) -> None:
    (path / name).write_bytes(pickle.dumps(_Evil()))


def with_code(*autos: str, model_type: str | None = "made_up") -> Callable[[Path], None]:
    """Code in the directory, and a config or a tokenizer that asks for it."""

    def damage(path: Path) -> None:
        (path / "own.py").write_text(
            f"# {autos}: another text is another module to transformers\n{MARKING}\n"
            "from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast\n"
            "class OwnConfig(LlamaConfig):\n    model_type = 'made_up'\n"
            "class Own(LlamaForCausalLM):\n    config_class = OwnConfig\n"
            "class OwnTokenizer(PreTrainedTokenizerFast):\n    pass\n"
        )
        names = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.Own"}
        mapped = {auto: names[auto] for auto in autos if auto in names}
        if mapped:
            config(auto_map=mapped, **({"model_type": model_type} if model_type else {}))(path)
        if "AutoTokenizer" in autos:
            mapped = {"AutoTokenizer": [None, "own.OwnTokenizer"]}
            edited("tokenizer_config.json", auto_map=mapped, tokenizer_class="OwnTokenizer")(path)

    return damage


def _custom_generate(path: Path) -> None:
    (path / "custom_generate").mkdir()
    (path / "custom_generate" / "generate.py").write_text(f"{MARKING}\ndef generate(model, **kwargs):\n    pass\n")


def _replaced(name: str, how: Callable[[Path], Any]) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        (path / name).unlink()
        how(path / name)

    return damage


def _resized(by: int) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        file = path / "model.safetensors"
        os.truncate(file, file.stat().st_size + by)

    return damage


def kinds() -> Iterator[Kind]:
    yield from _files()
    yield from _sizes()
    yield from _settings()
    yield from _weights()
    yield from _headers()
    yield from _shards()
    yield from _tokenizers()
    yield from _generation()
    yield from _code()


def _files() -> Iterator[Kind]:
    """Each file as something else than it should be."""
    always = {"config.json": REFUSED, "model.safetensors": REFUSED, "tokenizer.json": REFUSED}
    for name in (*always, "tokenizer_config.json", "generation_config.json"):
        missing = always.get(name, HARMLESS if name.startswith("generation") else EITHER)
        yield Kind(f"{name} missing", lambda p, n=name: (p / n).unlink(), missing)
        yield Kind(f"{name} a link to nothing", _replaced(name, lambda f: f.symlink_to("nowhere")), missing)
        yield Kind(f"{name} a directory", _replaced(name, Path.mkdir))
        yield Kind(f"{name} a pipe", _replaced(name, os.mkfifo))
        yield Kind(f"{name} a device", _replaced(name, lambda f: f.symlink_to("/dev/zero")))
        yield Kind(f"{name} a link to itself", _replaced(name, lambda f: f.symlink_to(f.name)), missing)
        for what, content in {
            "empty": "",
            "zeros": b"\x00" * 4096,
            "no UTF-8": b'{"a": "\xff\xfe"}',
            "half": None,
            "nested": "[" * 100_000,
            "nested objects": '{"a":' * 50_000 + "1" + "}" * 50_000,
            "a list": "[]",
            "null": "null",
            "a number": "3",
            "a text": '"text"',
            "a page of HTML": "<!DOCTYPE html><html></html>",
            "a pointer of Git LFS": "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n",
            "a long number": '{"a": ' + "9" * 5000 + "}",
        }.items():
            if content is None:
                yield Kind(f"{name} {what}", lambda p, n=name: os.truncate(p / n, (p / n).stat().st_size // 2))
            else:
                yield Kind(f"{name} {what}", text(name, content))


def _sizes() -> Iterator[Kind]:
    names = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim")
    for name in (*names, "max_position_embeddings", "intermediate_size"):
        for value in (0, -1, 10**12, 10**30, 2.5, "many", True, [3], {"a": 1}, float("nan")):
            fits = name == "max_position_embeddings" and value in (10**12, 10**30)
            fits |= name in ("num_hidden_layers", "num_key_value_heads") and value is True
            yield Kind(f"{name} {value}", config(**{name: value}), EITHER if fits else REFUSED)
        yield Kind(f"{name} null", config(**{name: None}), EITHER)
    yield Kind("heads that K/V heads do not divide", config(num_attention_heads=3, num_key_value_heads=2))
    yield Kind("fewer layers than the files have", config(num_hidden_layers=1))
    yield Kind("more layers than the files have", config(num_hidden_layers=3))


def _settings() -> Iterator[Kind]:
    for value in ("nope", None, 3, [], "", "t5", "bert", "vit", "whisper", "../llama", "Llama"):
        yield Kind(f"model_type {value!r}", config(model_type=value))
    yield Kind("model_type missing", config(model_type=...), EITHER)
    for value in ("nope", "int32", "bool", "load", 3, [], "float8_e4m3fn", "os.system"):
        yield Kind(f"dtype {value!r}", config(dtype=value), EITHER)
    for value in ("nope", 3, None, [], "os.system"):
        yield Kind(f"hidden_act {value!r}", config(hidden_act=value))
    for value in ("x", None, [], float("nan"), {}):
        yield Kind(f"rms_norm_eps {value!r}", config(rms_norm_eps=value))
    for value in (
        "x",
        [],
        3,
        {"rope_type": "nope", "rope_theta": 1e4},
        {"rope_type": "linear", "rope_theta": 1e4},
        {"rope_type": "linear", "rope_theta": 1e4, "factor": 0.0},
        {"rope_type": "linear", "rope_theta": 1e4, "factor": "x"},
        {"rope_type": "default", "rope_theta": "x"},
        {"rope_type": "default", "rope_theta": 0.0},
        {"rope_type": "default", "rope_theta": -1.0},
        {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0], "long_factor": [1.0]},
        {"rope_type": "yarn", "rope_theta": 1e4, "factor": -3},
        {"rope_type": "llama3", "rope_theta": 1e4},
        {"rope_type": "dynamic", "rope_theta": 1e4},
    ):
        yield Kind(f"rope_parameters {value!r}", config(rope_parameters=value), EITHER)
    for value in ({}, {"quant_method": "gptq"}, {"quant_method": "fp8"}, "x", [], 3):
        yield Kind(f"quantization_config {value!r}", config(quantization_config=value), EITHER)
    yield Kind("an unknown quantization", config(quantization_config={"quant_method": "nope"}))
    yield Kind("biases that the files do not have", config(attention_bias=True))
    yield Kind("attention of an unknown kernel", config(attn_implementation="evil/kernel"), HARMLESS)
    yield Kind("attention of an unknown kernel, inside", config(_attn_implementation_internal="evil/kernel"), HARMLESS)
    yield Kind("experts of an unknown kernel", config(experts_implementation="evil/kernel"), EITHER)
    yield Kind("weights elsewhere", config(transformers_weights="../../secret.safetensors"))
    yield Kind("weights elsewhere, a pickle", config(transformers_weights="adapter_model.bin"))
    for name in (
        "architectures",
        "tie_word_embeddings",
        "eos_token_id",
        "bos_token_id",
        "initializer_range",
        "attention_dropout",
        "use_cache",
        "pretraining_tp",
        "layer_types",
        "sliding_window",
        "id2label",
        "torch_dtype",
        "name_or_path",
        "attribute_map",
        "sub_configs",
        "base_model_tp_plan",
        "is_decoder",
        "text_config",
        "fusion_config",
        "return_dict",
        "to_dict",
        "get_text_config",
        "num_labels",
    ):
        for value in ("x", -1, {"a": [1]}, [None]):
            yield Kind(f"{name} {value!r}", config(**{name: value}), EITHER)


def _weights() -> Iterator[Kind]:
    for name in ("lm_head.weight", "model.embed_tokens.weight", NORM, Q, "model.layers.0.mlp.up_proj.weight"):
        yield Kind(f"{name} missing", weights(lambda w, n=name: w.pop(n)))
        yield Kind(f"{name} renamed", weights(lambda w, n=name: w.update({n + "_": w.pop(n)})))
        for value in (float("nan"), float("inf"), float("-inf")):
            yield Kind(f"{name} with {value}", set_to(name, _spoiled(value)))
        for dtype in (torch.int8, torch.int64, torch.bool, torch.uint8, torch.complex64):
            yield Kind(f"{name} as {dtype}", set_to(name, lambda x, d=dtype: x.to(d)))
        yield Kind(f"{name} empty", set_to(name, lambda x: x[:0]))
        yield Kind(f"{name} with one more row", set_to(name, lambda x: torch.cat([x, x[:1]])))
        yield Kind(f"{name} with one more dim", set_to(name, lambda x: x[None]), EITHER)
        yield Kind(f"{name} a number", set_to(name, lambda x: x.flatten()[0].reshape(())))
        yield Kind(f"{name} as float64", set_to(name, lambda x: x.double()), HARMLESS)
    yield Kind("transposed", set_to("model.layers.0.mlp.up_proj.weight", lambda x: x.T))
    yield Kind("no tensors", weights(lambda w: w.clear()))
    yield Kind("an unknown weight", weights(lambda w: w.update({"v_head.summary.weight": torch.ones(3)})))
    yield Kind("a weight of a layer too many", weights(lambda w: w.update({"model.layers.5.foo": torch.ones(3)})))
    yield Kind("a bias too many", weights(lambda w: w.update({Q.replace("weight", "bias"): torch.ones(16)})))
    yield Kind(
        "an old buffer",
        weights(lambda w: w.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)})),
        HARMLESS,
    )
    yield Kind("tied, both there", config(tie_word_embeddings=True), EITHER)
    yield Kind(
        "without the prefix",
        weights(lambda w: [w.update({n.removeprefix("model."): w.pop(n)}) for n in [*w]]),
        HARMLESS,
    )
    for form in ("mlx", "tf", "nope", "np"):
        yield Kind(f"format {form}", weights(lambda w: None, {"format": form}), EITHER)
    yield Kind("a value beyond float16", lambda p: [set_to(NORM, _spoiled(1e30))(p), config(dtype="float16")(p)])


def _headers() -> Iterator[Kind]:
    yield Kind("no metadata", header(lambda h: h.pop("__metadata__", None)), HARMLESS)
    yield Kind("an offset beyond the file", header(lambda h: h[NORM].update(data_offsets=[10**9, 10**9 + 64])))
    yield Kind("an offset before the file", header(lambda h: h[NORM].update(data_offsets=[-64, 0])))
    yield Kind("offsets that overlap", header(lambda h: h[NORM].update(data_offsets=[0, 64])))
    yield Kind("a shape that is larger than its bytes", header(lambda h: h[NORM].update(shape=[10**9])))
    yield Kind("a shape whose product overflows", header(lambda h: h[NORM].update(shape=[2**62, 2**62])))
    yield Kind("a negative shape", header(lambda h: h[NORM].update(shape=[-16])))
    yield Kind("an unknown dtype", header(lambda h: h[NORM].update(dtype="F7")))
    yield Kind("another dtype of that size", header(lambda h: h[NORM].update(dtype="I32")))
    yield Kind("no dtype", header(lambda h: h[NORM].pop("dtype")))
    yield Kind("a tensor that is a number", header(lambda h: h.update({NORM: 3})))
    yield Kind("metadata of numbers", header(lambda h: h.update(__metadata__={"format": 3})))
    yield Kind("one byte more", _resized(1))
    yield Kind("one byte less", _resized(-1))
    for size in (0, 1, 2**31, 2**63, 2**64 - 1):

        def damage(p: Path, size: int = size) -> None:
            data = (p / "model.safetensors").read_bytes()
            (p / "model.safetensors").write_bytes(struct.pack("<Q", size) + data[8:])

        yield Kind(f"a header of {size} bytes", damage)


def _shards() -> Iterator[Kind]:
    index = "model.safetensors.index.json"
    yield Kind("two shards", sharded(lambda p, m: None), HARMLESS)
    yield Kind("a shard missing", sharded(lambda p, m: (p / "b.safetensors").unlink()))
    yield Kind("a shard cut", sharded(lambda p, m: os.truncate(p / "b.safetensors", 500)))
    yield Kind("a shard empty", sharded(lambda p, m: os.truncate(p / "b.safetensors", 0)))
    yield Kind("a tensor in another shard than the index says", sharded(lambda p, m: m | {NORM: "a.safetensors"}))
    yield Kind("a tensor of the index in no shard", sharded(lambda p, m: m | {"nobody": "a.safetensors"}))
    yield Kind(
        "a shard that the index does not name",
        sharded(lambda p, m: {n: f for n, f in m.items() if f == "a.safetensors"}),
    )
    yield Kind(
        "a tensor in two shards",
        sharded(
            lambda p, m: save_file(load_file(p / "a.safetensors"), p / "c.safetensors") or m | {Q: "c.safetensors"}
        ),
    )
    for name in (
        "../b.safetensors",
        "x/../../b.safetensors",
        "/b.safetensors",
        "",
        ".",
        "b.bin",
        "b\x00.safetensors",
        "b" * 5000 + ".safetensors",
    ):
        yield Kind(
            f"a shard named {name[:30]!r}",
            sharded(
                lambda p, m, name=name: (
                    shutil.copy(p / "b.safetensors", p.parent / "b.safetensors")
                    and {n: name if f[0] == "b" else f for n, f in m.items()}
                )
            ),
        )

    def linked(p: Path, m: dict[str, str]) -> None:
        outside = p.parent / "outside"
        outside.mkdir()
        shutil.move(p / "b.safetensors", outside / "b.safetensors")
        (p / "b.safetensors").symlink_to("../outside/b.safetensors")

    yield Kind("a shard that is a link to elsewhere", sharded(linked))

    def linked_folder(p: Path, m: dict[str, str]) -> dict[str, str]:
        (p / "sub").symlink_to(p.parent)
        shutil.copy(p / "b.safetensors", p.parent / "b.safetensors")
        return {n: "sub/b.safetensors" if f[0] == "b" else f for n, f in m.items()}

    yield Kind("a shard behind a link to elsewhere", sharded(linked_folder))
    yield Kind("a shard that is a pickle", sharded(lambda p, m: _pickled(p, "c.bin") or {n: "c.bin" for n in m}))
    yield Kind("shards that are numbers", sharded(lambda p, m: dict.fromkeys(m, 3)))
    yield Kind("shards that are lists", sharded(lambda p, m: {name: ["a.safetensors"] for name in m}))
    whole = lambda content: lambda p: (p / index).write_text(content)  # noqa: E731
    for what, content in {
        "{}": "{}",
        "[]": "[]",
        "cut": '{"weight_map": {"a"',
        "a list as map": '{"weight_map": ["model.safetensors"]}',
        "an empty map": '{"weight_map": {}}',
    }.items():
        yield Kind(f"index {what}", whole(content))
    yield Kind("an old index beside the whole", whole('{"weight_map": {"x": "gone.safetensors"}}'), HARMLESS)
    yield Kind("an index that is a directory", lambda p: (p / index).mkdir())
    yield Kind("an index that is a pipe", lambda p: os.mkfifo(p / index))


def _tokenizers() -> Iterator[Kind]:
    for name in (
        "bos_token",
        "eos_token",
        "pad_token",
        "unk_token",
        "extra_special_tokens",
        "additional_special_tokens",
        "added_tokens_decoder",
        "model_max_length",
        "chat_template",
        "clean_up_tokenization_spaces",
        "padding_side",
        "tokenizer_class",
        "model_input_names",
        "split_special_tokens",
        "backend",
        "tokenizer_file",
        "tokenizer_object",
        "vocab_file",
        "name_or_path",
        "auto_map",
        "init_inputs",
        "__slow_tokenizer",
        "config",
    ):
        for value in (3, [], {"a": 1}, "nope", None, True, ["x", 3], {"0": {"content": 3}}):
            yield Kind(f"tokenizer_config {name} {value!r}", edited("tokenizer_config.json", **{name: value}), EITHER)
    for name, content in {"no UTF-8": b"\xff\xfe{{ x }}", "empty": b"", "broken": b"{% for %}"}.items():
        yield Kind(f"chat_template.jinja {name}", text("chat_template.jinja", content), EITHER)
    yield Kind("chat_template.jinja a pipe", lambda p: os.mkfifo(p / "chat_template.jinja"))
    yield Kind("chat_template.jinja a directory", lambda p: (p / "chat_template.jinja").mkdir(), EITHER)
    yield Kind(
        "a template among others that is a pipe",
        lambda p: [
            (p / "additional_chat_templates").mkdir(),
            os.mkfifo(p / "additional_chat_templates" / "x.jinja"),
        ],
    )
    for file in ("special_tokens_map.json", "added_tokens.json"):
        for what, content in {
            "cut": "{",
            "a list": "[]",
            "numbers": '{"bos_token": 3}',
            "far": '{"x": 99999999}',
        }.items():
            yield Kind(f"{file} {what}", text(file, content), EITHER if content[-1] == "}" else REFUSED)

    def edit(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
        def damage(p: Path) -> None:
            found = json.loads((p / "tokenizer.json").read_text())
            change(found)
            (p / "tokenizer.json").write_text(json.dumps(found))

        return damage

    yield Kind("tokenizer.json without a model", edit(lambda t: t.pop("model")))
    yield Kind("tokenizer.json of an unknown kind", edit(lambda t: t["model"].update(type="Nope")))
    yield Kind("tokenizer.json without words", edit(lambda t: t["model"].update(vocab={})), EITHER)
    yield Kind("words that are no numbers", edit(lambda t: t["model"].update(vocab={"a": "b"})))
    yield Kind("negative words", edit(lambda t: t["model"].update(vocab={"a": -1})))
    yield Kind("words for one number", edit(lambda t: t["model"].update(vocab={"w0": 0, "a": 1, "b": 1})), EITHER)
    yield Kind("a wrong version", edit(lambda t: t.update(version="99.0")), EITHER)
    yield Kind(
        "a bad expression",
        edit(
            lambda t: t.update(
                pre_tokenizer={"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated", "invert": False}
            )
        ),
    )
    yield Kind(
        "a larger vocabulary than the embedding",
        edit(lambda t: t["model"]["vocab"].update({f"x{i}": WORDS + i for i in range(40)})),
    )
    yield Kind(
        "added words beyond the embedding",
        edit(
            lambda t: t["added_tokens"].append(
                {
                    "id": WORDS,
                    "content": "<image>",
                    "single_word": False,
                    "lstrip": False,
                    "rstrip": False,
                    "normalized": False,
                    "special": True,
                }
            )
        ),
        HARMLESS,
    )
    yield Kind(
        "a damaged sentencepiece model alone",
        lambda p: [(p / "tokenizer.json").unlink(), (p / "tokenizer.model").write_bytes(b"\x0a\xff" * 50)],
    )
    yield Kind(
        "an empty sentencepiece model alone",
        lambda p: [(p / "tokenizer.json").unlink(), (p / "tokenizer.model").write_bytes(b"")],
    )
    yield Kind(
        "a pickled vocabulary alone",
        lambda p: [(p / "tokenizer.json").unlink(), _pickled(p, "vocab.pkl"), _pickled(p, "tokenizer.pkl")],
    )
    yield Kind("vocab.json that is no vocabulary", text("vocab.json", "[]"))


def _generation() -> Iterator[Kind]:
    change = lambda **given: edited("generation_config.json", **given)  # noqa: E731
    for value in ("x", 2.5, ["x"], True, {"a": 1}, [[1]]):
        yield Kind(f"generation_config eos_token_id {value!r}", change(eos_token_id=value))
    for value in (-1, 10**9, [1, 2], None, []):
        yield Kind(f"generation_config eos_token_id {value!r}", change(eos_token_id=value), EITHER)
    for name in (
        "temperature",
        "max_length",
        "do_sample",
        "num_beams",
        "transformers_version",
        "cache_implementation",
        "pad_token_id",
        "watermarking_config",
        "compile_config",
        "custom_generate",
        "to_dict",
    ):
        for value in ("x", -1, [], {"a": 1}):
            yield Kind(f"generation_config {name} {value!r}", change(**{name: value}), EITHER)


def _code() -> Iterator[Kind]:
    yield Kind("code for config and model", with_code("AutoConfig", "AutoModelForCausalLM"))
    yield Kind("code for the config", with_code("AutoConfig"))
    yield Kind("code for the model alone", with_code("AutoModelForCausalLM"))
    yield Kind("code beside a known type", with_code("AutoConfig", "AutoModelForCausalLM", model_type=None), HARMLESS)
    yield Kind("code for the tokenizer", with_code("AutoTokenizer"), EITHER)
    yield Kind("code for all", with_code("AutoConfig", "AutoModelForCausalLM", "AutoTokenizer"))
    yield Kind(
        "code of another repository", config(auto_map={"AutoConfig": "evil/repo--own.Own"}, model_type="made_up")
    )
    yield Kind("auto_map a text", config(auto_map="own.Own", model_type="made_up"))
    yield Kind("auto_map a list", config(auto_map=["own.Own"], model_type="made_up"))
    yield Kind("auto_map of numbers", config(auto_map={"AutoConfig": 3}, model_type="made_up"))
    yield Kind("auto_map of numbers, a known type", config(auto_map={"AutoConfig": 3}), EITHER)
    yield Kind("code that generates", _custom_generate, HARMLESS)
    yield Kind("a pickle alone", lambda p: [(p / "model.safetensors").unlink(), _pickled(p, "pytorch_model.bin")])
    yield Kind("a pickle beside", lambda p: _pickled(p, "pytorch_model.bin"), HARMLESS)
    yield Kind(
        "a pickle that its name hides", lambda p: [(p / "model.safetensors").unlink(), _pickled(p, "model.safetensors")]
    )
    yield Kind(
        "an index of pickles",
        lambda p: [
            (p / "model.safetensors").unlink(),
            _pickled(p, "pytorch_model-1.bin"),
            (p / "pytorch_model.bin.index.json").write_text('{"weight_map": {"x": "pytorch_model-1.bin"}}'),
        ],
    )
