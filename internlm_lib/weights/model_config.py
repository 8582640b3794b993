"""A model's config.json and tokenizer files, which every checkpoint of this kit carries.

Read: InternLM's own config.json in its three spellings of the rotary embedding, and LLaMA's.
Written: LLaMA's, which transformers loads without remote code, with InternLM's `bias` beside it.
"""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from internlm_lib.data.known_tokenizers import tokenizer_for
from internlm_lib.data.tokenizer import Tokenizer
from internlm_lib.errors import InputError
from internlm_lib.experiment.load import load_experiment
from internlm_lib.experiment.presets import PRESETS
from internlm_lib.experiment.schema import ModelSection
from internlm_lib.files import read_json, write_json

CONFIG, TOKENIZER = "config.json", "tokenizer.model"
GENERATION_CONFIG = "generation_config.json"
BOS, EOS = 1, 2
"""Token ids of `<s>` and `</s>`. `</s>` pads, too: the 0 of the earliest uploads was a mistake
(InternLM issue 431); either is accepted."""

_TYPES = ("internlm", "llama")
_CARRIED = ("special_tokens_map.json", "added_tokens.json")
_PADDING = (0, EOS)


def read_model(path: Path) -> ModelSection:
    """The model a config.json describes.

    Raises InputError listing everything that InternLM has not: another type or activation, grouped
    queries, tied or sliding embeddings, unreadable JSON.
    """
    config = _read_config(path)
    try:
        if problems := list(_foreign(config)):
            raise InputError("\n  - ".join([f"{path} is not an InternLM's:", *problems]))
        return ModelSection(
            preset=str(config.get("_name_or_path") or config["model_type"]),
            num_layers=config["num_hidden_layers"],
            hidden_size=config["hidden_size"],
            ffn_hidden_size=config["intermediate_size"],
            num_attention_heads=config["num_attention_heads"],
            vocab_size=config["vocab_size"],
            max_position_embeddings=config.get("max_position_embeddings", 2048),
            attention_bias=_attention_bias(config),
            layernorm_epsilon=config["rms_norm_eps"],
            rotary_base=int(_rotary(config).get("base", 10000)),
            init_method_std=config.get("initializer_range", 0.02),
            make_vocab_size_divisible_by=1,
        )
    except KeyError as error:
        raise InputError(
            f"{path}: the key {error} is missing; copy or download it again"
        ) from error
    except ValidationError as error:
        first = error.errors()[0]
        raise InputError(f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from error
    except (TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{path}: a value is of the wrong kind: {error}") from error


def write_model(folder: Path, model: ModelSection, dtype: str) -> None:
    """Write config.json and generation_config.json.

    Args:
        dtype: of the weights, as torch calls it: `float16`.
    """
    write_json(folder / CONFIG, _llama_config(model, dtype))
    tokens = {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": EOS}
    write_json(folder / GENERATION_CONFIG, {"_from_model_config": True, **tokens})


def find_tokenizer(source: Path, model: ModelSection, named: Path | None = None) -> Path | None:
    """The tokenizer.model that belongs to weights: the named one, or that in their folder, if any.

    Args:
        named: a tokenizer.model or its folder.
    Raises:
        InputError: if it is none, or another model's.
    """
    path = source if named is None else named
    if path.is_dir():
        path = path / TOKENIZER
    if named is None and not path.is_file():
        return None
    tokenizer_for(path, vocab_size=model.vocab_size, preset=model.preset)
    return path


def carry_tokenizer(tokenizer: Path, target: Path) -> None:
    """Copy a tokenizer.model and what belongs to it into a folder.

    tokenizer_config.json is written anew: InternLM's own names Python code to be run. As
    transformers' LlamaTokenizer it gives the ids that sentencepiece gives.
    """
    shutil.copyfile(tokenizer, target / TOKENIZER)
    for name in _CARRIED:
        if (tokenizer.parent / name).is_file():
            shutil.copyfile(tokenizer.parent / name, target / name)
    specials = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>", "unk_token": "<unk>"}
    config = {
        "tokenizer_class": "LlamaTokenizer",
        "add_bos_token": True,
        "add_eos_token": False,
        "add_prefix_space": Tokenizer(tokenizer).adds_leading_space,
        "clean_up_tokenization_spaces": False,
        **specials,
    }
    write_json(target / "tokenizer_config.json", config)


def named_model(name: str) -> ModelSection:
    """The model that `--model` names: a preset, a params file, or a config.json or its folder.

    Raises InputError if it is none of these.
    """
    if name in PRESETS:
        return ModelSection(**PRESETS[name], preset=name)
    path = Path(name)
    if path.suffix in (".yaml", ".yml"):
        return load_experiment(path)[1].model
    if path.is_dir():
        path = path / CONFIG
    if path.is_file():
        return read_model(path)
    raise InputError(
        f"model {name!r} is neither a file nor a preset; give one of {', '.join(PRESETS)}, a "
        "params file, or a config.json"
    )


def preset_of(num_layers: int, hidden_size: int, ffn_hidden_size: int, bias: bool) -> ModelSection:
    """The preset of this shape, for checkpoints that do not say what model they hold.

    Raises InputError if there is none.
    """
    for name, values in PRESETS.items():
        shape = (values["num_layers"], values["hidden_size"], values["ffn_hidden_size"])
        if (*shape, values["attention_bias"]) == (num_layers, hidden_size, ffn_hidden_size, bias):
            return ModelSection(**values, preset=name)
    raise InputError(
        f"a model of {num_layers} layers, hidden size {hidden_size}, ffn size {ffn_hidden_size}, "
        f"{'with' if bias else 'without'} attention bias, is none of {', '.join(PRESETS)}: say "
        "which model this is (--model PARAMS.yaml or config.json)"
    )


def differences(found: ModelSection, expected: ModelSection) -> Iterator[str]:
    """What differs between the model a checkpoint says it holds and the one that is expected."""
    keys = {
        "num_hidden_layers": "num_layers",
        "hidden_size": "hidden_size",
        "intermediate_size": "ffn_hidden_size",
        "num_attention_heads": "num_attention_heads",
        "vocab_size": "vocab_size",
        "bias": "attention_bias",
        "rms_norm_eps": "layernorm_epsilon",
        "rope_theta": "rotary_base",
    }
    for theirs, ours in keys.items():
        value, wanted = getattr(found, ours), getattr(expected, ours)
        if value != wanted:
            yield (
                f"{CONFIG}: {theirs} = {json.dumps(value)}, but model.{ours} = {json.dumps(wanted)}"
            )


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config: dict[str, Any] = read_json(path)
        if not isinstance(config, dict):
            raise ValueError("not a JSON object")
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read: {error}; copy or download it again") from error
    return config


def _foreign(config: dict[str, Any]) -> Iterator[str]:
    kind = config.get("model_type")
    if kind not in _TYPES:
        yield f"model_type = {json.dumps(kind)}; {' and '.join(_TYPES)} are understood"
        return
    heads = config["num_attention_heads"]
    if config["hidden_size"] % heads:
        yield f"hidden_size = {config['hidden_size']} is no multiple of num_attention_heads {heads}"
    if config.get("num_key_value_heads", heads) not in (heads, None):
        yield f"num_key_value_heads = {config['num_key_value_heads']}, not {heads} as all heads"
    if config.get("tie_word_embeddings"):
        yield "tie_word_embeddings = true; InternLM's output layer has its own weights"
    if config.get("mlp_bias"):
        yield "mlp_bias = true; InternLM's MLP has none"
    if (activation := config.get("hidden_act", "silu")) != "silu":
        yield f"hidden_act = {json.dumps(activation)}; InternLM's is silu"
    if (padding := config.get("pad_token_id", EOS)) not in (*_PADDING, None):
        yield f"pad_token_id = {padding}; 2, or the 0 of early uploads, is InternLM's"
    if (kind := _rotary(config)["type"]) not in ("origin", "default", "dynamic"):
        yield f"rotary embedding of type {json.dumps(kind)}; origin and dynamic are understood"


def _attention_bias(config: dict[str, Any]) -> bool:
    """LLaMA's key, else InternLM's, else the default of the class that would read it."""
    default = config["model_type"] == "internlm"
    value: bool = config.get("attention_bias", config.get("bias", default))
    return value


def _rotary(config: dict[str, Any]) -> dict[str, Any]:
    """`base` and `type` of the rotary embedding, from any of the spellings.

    None of them: base 10000 (summer 2023). `rotary` = {base, type} (November 2023). `rope_theta`
    and `rope_scaling` (December 2023, LLaMA). `rope_parameters` (transformers 5). Type `dynamic`
    changes nothing up to `max_position_embeddings`.
    """
    spelled = config.get("rotary") or config.get("rope_parameters") or {}
    scaling = config.get("rope_scaling") or {}
    base = spelled.get("base", spelled.get("rope_theta", config.get("rope_theta", 10000)))
    kinds = (spelled.get("type"), spelled.get("rope_type"), scaling.get("type"),
             scaling.get("rope_type"))  # fmt: skip
    return {"base": base, "type": next((kind for kind in kinds if kind), "origin")}


def _llama_config(model: ModelSection, dtype: str) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": model.attention_bias,
        "bias": model.attention_bias,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "pad_token_id": EOS,
        "hidden_act": "silu",
        "hidden_size": model.hidden_size,
        "initializer_range": model.init_method_std,
        "intermediate_size": model.ffn_hidden_size,
        "max_position_embeddings": model.max_position_embeddings,
        "mlp_bias": False,
        "num_attention_heads": model.num_attention_heads,
        "num_hidden_layers": model.num_layers,
        "num_key_value_heads": model.num_attention_heads,
        "rms_norm_eps": model.layernorm_epsilon,
        "rope_theta": float(model.rotary_base),
        "tie_word_embeddings": False,
        "torch_dtype": dtype,
        "use_cache": True,
        "vocab_size": model.vocab_size,
    }
