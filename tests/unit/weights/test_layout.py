"""Where each number of a Hugging Face weight ends up, on every tensor parallel rank."""

from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from internlm_lib.errors import InputError  # noqa: E402
from internlm_lib.experiment.presets import PRESETS  # noqa: E402
from internlm_lib.experiment.schema import ModelSection  # noqa: E402
from internlm_lib.model.arithmetic import parameter_count  # noqa: E402
from internlm_lib.weights import huggingface  # noqa: E402
from internlm_lib.weights.huggingface import HuggingFaceFolder, write_random  # noqa: E402
from internlm_lib.weights.layout import (  # noqa: E402
    TensorRule,
    huggingface_shapes,
    local_tensor,
    rules,
)

HEADS, HEAD_DIM = 4, 3
HIDDEN = HEADS * HEAD_DIM


def section(**changes: object) -> ModelSection:
    return ModelSection(**{**PRESETS["internlm-tiny"], "preset": "internlm-tiny", **changes})


def small(**changes: object) -> ModelSection:
    sizes = {"num_layers": 2, "hidden_size": 8, "ffn_hidden_size": 12, "num_attention_heads": 2,
             "vocab_size": 10}  # fmt: skip
    return section(**{**sizes, **changes})


class Numbered:
    """Tensors whose numbers tell them apart; counts what is read of them."""

    def __init__(self, rule: TensorRule) -> None:
        size = torch.Size(rule.shape).numel()
        self.tensors = {
            name: torch.arange(1.0, size + 1).reshape(rule.shape) + 1000 * i
            for i, name in enumerate(rule.huggingface)
        }
        self.numbers_read = 0

    def __call__(
        self, name: str, rows: slice = slice(None), columns: slice = slice(None)
    ) -> "torch.Tensor":
        tensor = self.tensors[name]
        part = tensor[rows, columns] if tensor.dim() > 1 else tensor[rows]
        self.numbers_read += part.numel()
        return part


def cut(rule: TensorRule, tp_size: int, padded: int = 0) -> tuple[Numbered, "list[torch.Tensor]"]:
    read = Numbered(rule)
    return read, [local_tensor(rule, read, rank, tp_size, padded) for rank in range(tp_size)]


def test_heads_interleave_q_k_v_rows_of_each_head_in_weights_and_biases() -> None:
    for shape in ((HIDDEN, 5), (HIDDEN,)):
        rule = TensorRule("qkv", ("q", "k", "v"), "heads", shape, HEADS)
        for tp_size in (1, 2, 4):
            read, parts = cut(rule, tp_size)
            whole = torch.cat(parts)
            for head in range(HEADS):
                rows = slice(head * HEAD_DIM, (head + 1) * HEAD_DIM)
                for i, name in enumerate("qkv"):
                    start = (3 * head + i) * HEAD_DIM
                    torch.testing.assert_close(
                        whole[start : start + HEAD_DIM], read.tensors[name][rows], rtol=0, atol=0
                    )


def test_gate_and_up_are_cut_before_they_are_stacked() -> None:
    rule = TensorRule("fc1", ("gate", "up"), "gate_up", (6, 2))
    read, parts = cut(rule, 2)
    gate, up = read.tensors["gate"], read.tensors["up"]
    assert torch.equal(parts[0], torch.cat([gate[:3], up[:3]]))
    assert torch.equal(parts[1], torch.cat([gate[3:], up[3:]]))


def test_columns_of_all_ranks_make_the_whole_and_replicas_are_whole() -> None:
    read, parts = cut(TensorRule("o", ("o",), "columns", (4, 6)), 2)
    assert torch.equal(torch.cat(parts, dim=1), read.tensors["o"])
    read, parts = cut(TensorRule("norm", ("norm",), "replicated", (4,)), 2)
    assert all(torch.equal(part, read.tensors["norm"]) for part in parts)


@pytest.mark.parametrize("tp_size, padded", [(1, 10), (2, 12), (4, 16)])
def test_vocabulary_is_padded_with_zero_rows_at_its_end(tp_size: int, padded: int) -> None:
    read, parts = cut(TensorRule("e", ("e",), "vocabulary", (10, 3)), tp_size, padded)
    assert {part.shape for part in parts} == {(padded // tp_size, 3)}
    whole = torch.cat(parts)
    assert torch.equal(whole[:10], read.tensors["e"])
    assert not whole[10:].any()


@pytest.mark.parametrize("tp_size", [1, 2])
def test_a_rank_reads_no_more_than_it_holds(tp_size: int) -> None:
    for rule in rules(small()):
        read = Numbered(rule)
        part = local_tensor(rule, read, tp_size - 1, tp_size, 10)
        assert read.numbers_read == part.numel(), rule.megatron


@pytest.mark.parametrize("preset", PRESETS)
def test_table_holds_every_parameter_once(preset: str) -> None:
    model = ModelSection(**{**PRESETS[preset], "preset": preset})
    shapes = huggingface_shapes(model)
    assert sum(torch.Size(shape).numel() for shape in shapes.values()) == parameter_count(model)
    names = [name for rule in rules(model) for name in rule.huggingface]
    assert len(names) == len(set(names))
    assert any(name.endswith(".bias") for name in names) == model.attention_bias


def test_random_weights_depend_on_seed_and_name_only(tmp_path: Path) -> None:
    model = small()
    one = HuggingFaceFolder(write_random(tmp_path / "one", model, 1, "fp32"))
    deeper = HuggingFaceFolder(write_random(tmp_path / "deeper", small(num_layers=3), 1, "fp32"))
    other = HuggingFaceFolder(write_random(tmp_path / "other", model, 2, "fp32"))
    name = "model.layers.1.self_attn.k_proj.weight"
    assert torch.equal(one.read(name), deeper.read(name))
    assert not torch.equal(one.read(name), other.read(name))
    assert one.sha256 != other.sha256
    again = HuggingFaceFolder(write_random(tmp_path / "again", model, 1, "fp32"))
    assert one.sha256 == again.sha256


def test_random_weights_have_the_spread_that_megatron_draws(tmp_path: Path) -> None:
    model = section(vocab_size=4096)
    folder = HuggingFaceFolder(write_random(tmp_path / "w", model, 7, "fp32"))
    std = model.init_method_std
    assert folder.read("lm_head.weight").std().item() == pytest.approx(std, rel=0.01)
    down = folder.read("model.layers.0.mlp.down_proj.weight").std().item()
    assert down == pytest.approx(std / (2 * model.num_layers) ** 0.5, rel=0.02)
    assert not folder.read("model.layers.0.self_attn.o_proj.bias").any()
    assert torch.equal(folder.read("model.norm.weight"), torch.ones(model.hidden_size))


def test_sharded_folder_reads_like_a_single_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = small()
    single = HuggingFaceFolder(write_random(tmp_path / "single", model, 1, "bf16"))
    monkeypatch.setattr(huggingface, "_SHARD_BYTES", 600)
    sharded = HuggingFaceFolder(write_random(tmp_path / "sharded", model, 1, "bf16"))
    assert len(sharded.files) > 2 and len(single.files) == 1
    sharded.check_shape(model)
    assert sharded.names() == single.names()
    for name in single.names():
        assert torch.equal(single.read(name), sharded.read(name))
    part = sharded.read("lm_head.weight", rows=slice(2, 5), columns=slice(1, 3))
    assert torch.equal(part, single.read("lm_head.weight")[2:5, 1:3])


def test_a_folder_of_another_model_is_refused_with_all_differences(tmp_path: Path) -> None:
    folder = HuggingFaceFolder(write_random(tmp_path / "w", small(), 1, "fp32"))
    other = small(hidden_size=16, attention_bias=False, layernorm_epsilon=1e-5, num_layers=3)
    with pytest.raises(InputError) as error:
        folder.check_shape(other)
    message = str(error.value)
    for expected in (
        "hidden_size = 8, but model.hidden_size = 16",
        "rms_norm_eps = 1e-06, but model.layernorm_epsilon = 1e-05",
        "bias = true, but model.attention_bias = false",
        "9 tensors are missing: model.layers.2.",
        "8 tensors are unexpected: model.layers.0.self_attn.k_proj.bias",
        "lm_head.weight has the shape (10, 8), expected is (10, 16)",
    ):
        assert expected in message


def test_a_folder_without_safetensors_says_what_is_missing(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InputError, match=r"model\.safetensors is missing"):
        HuggingFaceFolder(tmp_path)
