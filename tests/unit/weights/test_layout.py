"""Where each number of a logical tensor ends up, on every rank and in every format's names."""

import pytest

torch = pytest.importorskip("torch")

from internlm_lib.experiment.presets import PRESETS  # noqa: E402
from internlm_lib.experiment.schema import ModelSection  # noqa: E402
from internlm_lib.model.arithmetic import padded_vocab_size, parameter_count  # noqa: E402
from internlm_lib.weights.layout import (  # noqa: E402
    Piece,
    TensorRule,
    classic_rules,
    distributed_key,
    huggingface_shapes,
    local_shape,
    local_tensor,
    pieces,
    rules,
    rules_of_stage,
)
from tests.unit.weights.conftest import assert_covered, assert_line, small  # noqa: E402

HEADS, HEAD_DIM = 4, 3
HIDDEN = HEADS * HEAD_DIM


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


def filled(rule: TensorRule, tp_rank: int, tp_size: int, padded: int) -> "torch.Tensor":
    """A rank's part as `pieces` says it is, copies and padding included; NaN where nothing is."""
    tensors = Numbered(rule).tensors
    part = torch.full(local_shape(rule, tp_size, padded), float("nan"))
    for piece in pieces(rule, tp_rank, tp_size, padded):
        tensor = tensors[piece.name]
        values = tensor[piece.rows, piece.columns] if tensor.dim() > 1 else tensor[piece.rows]
        part[piece.start : piece.start + len(values)] = values
    return part


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
    rule = TensorRule("fc1", ("gate", "up"), "rows", (6, 2))
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
def test_a_training_rank_pads_the_vocabulary_with_zero_rows(tp_size: int, padded: int) -> None:
    read, parts = cut(TensorRule("e", ("e",), "vocabulary", (10, 3)), tp_size, padded)
    assert {part.shape for part in parts} == {(padded // tp_size, 3)}
    whole = torch.cat(parts)
    assert torch.equal(whole[:10], read.tensors["e"])
    assert not whole[10:].any()


@pytest.mark.parametrize("tp_size, padded", [(1, 11), (2, 12), (4, 16), (4, 20)])
def test_padding_in_files_repeats_the_last_rows_as_ascendspeed_does(
    tp_size: int, padded: int
) -> None:
    rule = TensorRule("e", ("e",), "vocabulary", (10, 3))
    w = Numbered(rule).tensors["e"]
    theirs = torch.cat([w, w[-(padded - 10) :, ...]], dim=0)
    ours = torch.cat([filled(rule, rank, tp_size, padded) for rank in range(tp_size)])
    assert torch.equal(ours, theirs)
    made_of = [piece for rank in range(tp_size) for piece in pieces(rule, rank, tp_size, padded)]
    added = sum(p.rows.stop - p.rows.start for p in made_of if p.role == "padding")
    assert added == padded - 10
    assert_covered(rule.shape, [piece for piece in made_of if piece.role == "data"])


@pytest.mark.parametrize("tp_size", [1, 2])
def test_a_rank_reads_no_more_than_it_holds(tp_size: int) -> None:
    for rule in rules(small()):
        read = Numbered(rule)
        part = local_tensor(rule, read, tp_size - 1, tp_size, 50)
        assert read.numbers_read == part.numel(), rule.name


@pytest.mark.parametrize("table", ["gpt", "classic", "classic merged"])
@pytest.mark.parametrize("tp_size", [1, 2, 4])
def test_pieces_of_all_ranks_cover_every_number_once(tp_size: int, table: str) -> None:
    model = small()
    padded = padded_vocab_size(model, tp_size)
    data: dict[str, list[Piece]] = {name: [] for name in huggingface_shapes(model)}
    copies = 0
    for rule in rules(model) if table == "gpt" else classic_rules(model, table.endswith("merged")):
        for rank in range(tp_size):
            made_of = pieces(rule, rank, tp_size, padded)
            assert_line(_own_rows(made_of), local_shape(rule, tp_size, padded)[0])
            for piece in made_of:
                if piece.role == "data":
                    data[piece.name].append(piece)
                copies += piece.role == "copy"
    for name, shape in huggingface_shapes(model).items():
        assert_covered(shape, data[name])
    replicated = 3 * model.num_layers + 1
    assert copies == (tp_size - 1) * replicated


@pytest.mark.parametrize("tp_size", [1, 2, 4])
def test_what_files_hold_is_what_a_training_rank_holds_up_to_the_padding(tp_size: int) -> None:
    model = small()
    padded = padded_vocab_size(model, tp_size)
    for rule in rules(model):
        for rank in range(tp_size):
            in_files = filled(rule, rank, tp_size, padded)
            in_training = local_tensor(rule, Numbered(rule), rank, tp_size, padded)
            real = in_training != 0
            assert torch.equal(in_files[real], in_training[real]), rule.name
            assert in_files.shape == in_training.shape


@pytest.mark.parametrize("preset", PRESETS)
def test_table_holds_every_parameter_once(preset: str) -> None:
    model = ModelSection(**{**PRESETS[preset], "preset": preset})
    shapes = huggingface_shapes(model)
    assert sum(torch.Size(shape).numel() for shape in shapes.values()) == parameter_count(model)
    for table in (rules(model), classic_rules(model, True), classic_rules(model, False)):
        names = [name for rule in table for name in rule.huggingface]
        assert len(names) == len(set(names))
        assert set(names) == set(shapes)
    assert any(name.endswith(".bias") for name in shapes) == model.attention_bias


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("merge_mlp", [True, False])
def test_classic_names_are_those_of_the_predecessors_converter(merge_mlp: bool, bias: bool) -> None:
    q, k, v, o = (f"model.layers.1.self_attn.{name}_proj" for name in "qkvo")
    gate, up, down = (f"model.layers.1.mlp.{n}_proj.weight" for n in ("gate", "up", "down"))
    layer = {
        "input_layernorm.weight": ("model.layers.1.input_layernorm.weight",),
        "post_attention_layernorm.weight": ("model.layers.1.post_attention_layernorm.weight",),
        "self_attention.query_key_value.weight": (f"{q}.weight", f"{k}.weight", f"{v}.weight"),
        "self_attention.dense.weight": (f"{o}.weight",),
        "mlp.dense_4h_to_h.weight": (down,),
    }
    if bias:
        layer |= {
            "self_attention.query_key_value.bias": (f"{q}.bias", f"{k}.bias", f"{v}.bias"),
            "self_attention.dense.bias": (f"{o}.bias",),
        }
    if merge_mlp:
        layer |= {"mlp.proj.weight": (gate, up)}
    else:
        layer |= {"mlp.gate_proj.weight": (gate,), "mlp.dense_h_to_4h.weight": (up,)}
    table = classic_rules(small(num_layers=2, attention_bias=bias), merge_mlp)
    found = {rule.name: rule.huggingface for rule in table}
    start = "encoder.layers.1."
    assert {n.removeprefix(start): of for n, of in found.items() if n.startswith(start)} == layer
    assert {name: of for name, of in found.items() if "layers." not in name} == {
        "embedding.word_embeddings.weight": ("model.embed_tokens.weight",),
        "encoder.final_layernorm.weight": ("model.norm.weight",),
        "output_layer.weight": ("lm_head.weight",),
    }


def test_a_stage_counts_its_layers_from_its_own_first_one() -> None:
    table = rules(small())
    stages = [rules_of_stage(table, (1, 3), stage) for stage in (0, 1)]
    norms = [
        [(r.name, r.huggingface[0]) for r in stage if r.name.endswith("input_layernorm.weight")]
        for stage in stages
    ]
    ours, theirs = "decoder.layers.{}.input_layernorm.weight", "model.layers.{}.input_layernorm"
    assert norms[0] == [(ours.format(0), f"{theirs.format(0)}.weight")]
    assert norms[1] == [(ours.format(i), f"{theirs.format(i + 1)}.weight") for i in range(3)]
    outside = [[r.name for r in stage if "layers." not in r.name] for stage in stages]
    assert outside == [
        ["embedding.word_embeddings.weight"],
        ["decoder.final_layernorm.weight", "output_layer.weight"],
    ]
    assert sum(map(len, stages)) == len(table)


@pytest.mark.parametrize(
    "name, key, layer",
    [
        ("embedding.word_embeddings.weight", "embedding.word_embeddings.weight", None),
        ("decoder.final_layernorm.weight", "decoder.final_layernorm.weight", None),
        ("output_layer.weight", "output_layer.weight", None),
        ("decoder.layers.0.mlp.linear_fc1.weight", "decoder.layers.mlp.linear_fc1.weight", 0),
        (
            "decoder.layers.12.input_layernorm.weight",
            "decoder.layers.self_attention.linear_qkv.layer_norm_weight",
            12,
        ),
        (
            "decoder.layers.3.pre_mlp_layernorm.weight",
            "decoder.layers.mlp.linear_fc1.layer_norm_weight",
            3,
        ),
        (
            "decoder.layers.3.self_attention.linear_proj.bias",
            "decoder.layers.self_attention.linear_proj.bias",
            3,
        ),
    ],
)
def test_a_distributed_checkpoint_has_one_key_for_all_layers(
    name: str, key: str, layer: int | None
) -> None:
    assert distributed_key(name) == (key, layer)


def _own_rows(made_of: list[Piece]) -> list[tuple[int, int]]:
    """The rows of the stored tensor that pieces fill."""
    return [(p.start, p.start + p.rows.stop - p.rows.start) for p in made_of]
