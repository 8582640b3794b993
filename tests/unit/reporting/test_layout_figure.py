import pytest

from internlm_lib.reporting.figures import save_figure
from internlm_lib.reporting.layout_figure import RANK_COLORS, layout_figure

TENSORS = [
    {"name": "embedding.word_embeddings.weight", "split": "vocabulary", "rows": 512,
     "columns": 192},
    {"name": "input_layernorm.weight", "split": "replicated", "rows": 192, "columns": 1},
    {"name": "self_attention.linear_qkv.weight", "split": "heads", "rows": 1536, "columns": 192},
    {"name": "self_attention.linear_proj.weight", "split": "columns", "rows": 192,
     "columns": 192},
    {"name": "mlp.linear_fc1.weight", "split": "rows", "rows": 12288, "columns": 192},
]  # fmt: skip
STAGES = [
    {"stage": 0, "layers": "0–2", "bytes_per_rank": 3 << 20, "holds": "embedding"},
    {"stage": 1, "layers": "3", "bytes_per_rank": 1 << 20, "holds": ""},
]


def cell(figure, name):
    """The axes on which a tensor is drawn."""
    return next(a for a in figure.axes if a.get_title(loc="left").replace("\n", "") == name)


def parts(figure, name):
    """What is drawn of a tensor, as (label, left, bottom, width, height, colour)."""
    return [
        (p.get_label().removeprefix(f"{name} "), *p.get_bbox().bounds, p.get_facecolor())
        for p in cell(figure, name).patches
        if p.get_label().startswith(name)
    ]


def texts(axes):
    return [text.get_text() for text in axes.texts]


@pytest.mark.parametrize("ranks", [1, 2, 8, 12])
def test_every_rank_has_one_part_with_its_number(ranks):
    figure = layout_figure(TENSORS, STAGES, ranks)
    for name in ("embedding.word_embeddings.weight", "self_attention.linear_qkv.weight",
                 "self_attention.linear_proj.weight"):  # fmt: skip
        drawn = parts(figure, name)
        assert [label for label, *_ in drawn] == [f"rank {rank}" for rank in range(ranks)]
        assert {str(rank) for rank in range(ranks)} <= set(texts(cell(figure, name)))
        assert len({color for *_, color in drawn}) == min(ranks, len(RANK_COLORS))


def test_columns_are_cut_upright_and_rows_across():
    figure = layout_figure(TENSORS, STAGES, 4)
    lefts = {left for _, left, *_ in parts(figure, "self_attention.linear_proj.weight")}
    assert len(lefts) == 4
    embedding = parts(figure, "embedding.word_embeddings.weight")
    assert {left for _, left, *_ in embedding} == {0.0}
    assert len({bottom for _, _, bottom, *_ in embedding}) == 4


def test_each_rank_holds_a_slice_of_gate_and_one_of_up():
    figure = layout_figure(TENSORS, STAGES, 2)
    drawn = parts(figure, "mlp.linear_fc1.weight")
    assert [label for label, *_ in drawn] == [
        "gate rank 0", "gate rank 1", "up rank 0", "up rank 1",
    ]  # fmt: skip
    assert drawn[0][-1] == drawn[2][-1] != drawn[1][-1]
    assert {"gate", "up"} <= set(texts(cell(figure, "mlp.linear_fc1.weight")))


def test_heads_say_that_each_holds_q_k_and_v():
    axes = cell(layout_figure(TENSORS, STAGES, 2), "self_attention.linear_qkv.weight")
    assert {"q", "k", "v", "each\nhead"} <= set(texts(axes))


def test_what_every_rank_holds_is_drawn_once():
    figure = layout_figure(TENSORS, STAGES, 4)
    assert [label for label, *_ in parts(figure, "input_layernorm.weight")] == ["every rank"]
    assert texts(cell(figure, "input_layernorm.weight")) == [
        "192, not cut\nper rank 192",
        "on every rank",
    ]


def test_sizes_are_written_whole_and_per_rank():
    figure = layout_figure(TENSORS, STAGES, 2)
    for name, size in {
        "embedding.word_embeddings.weight": "512 × 192, by rows\nper rank 256 × 192",
        "self_attention.linear_qkv.weight": "1,536 × 192, by heads\nper rank 768 × 192",
        "self_attention.linear_proj.weight": "192 × 192, by columns\nper rank 192 × 96",
        "mlp.linear_fc1.weight": "12,288 × 192, each by rows\nper rank 6,144 × 192",
    }.items():
        assert size in texts(cell(figure, name))


def test_stages_say_what_they_hold_and_bars_how_much():
    figure = layout_figure(TENSORS, STAGES, 2)
    axes = figure.axes[-1]
    assert texts(axes) == [
        "stage 0: 3 layers (0–2)\nand embedding", "3 MiB per rank",
        "stage 1: 1 layer (3)", "1 MiB per rank",
    ]  # fmt: skip
    first, second = (bar.get_width() for bar in axes.patches)
    assert first == pytest.approx(3 * second)


@pytest.mark.parametrize("ranks, stages", [(1, STAGES[:1]), (2, STAGES), (16, STAGES * 4)])
def test_no_text_covers_another_or_leaves_the_page(ranks, stages, tmp_path):
    figure = layout_figure(TENSORS, stages, ranks)
    save_figure(figure, tmp_path / "layout")
    written = [t for axes in figure.axes for t in (*axes.texts, axes.title, axes._left_title)]
    written += [text for part in figure.subfigs for text in part.texts]
    boxes = [(t.get_text(), t.get_window_extent()) for t in written if t.get_text()]
    page = figure.bbox
    for place, (text, box) in enumerate(boxes):
        assert 0 <= box.x0 and box.x1 <= page.x1 and 0 <= box.y0 and box.y1 <= page.y1, text
        for other, another in boxes[place + 1 :]:
            across = min(box.x1, another.x1) - max(box.x0, another.x0)
            along = min(box.y1, another.y1) - max(box.y0, another.y0)
            assert across <= 0.5 or along <= 0.5, (text, other)


def test_titles_count():
    figure = layout_figure(TENSORS, STAGES[:1], 1)
    assert [part._suptitle.get_text() for part in figure.subfigs] == [
        "Tensors over 1 tensor parallel rank",
        "Layers over 1 pipeline stage",
    ]
    left, right = layout_figure(TENSORS, STAGES, 8).subfigs
    assert left._suptitle.get_text() == "Tensors over 8 tensor parallel ranks"
    assert right._suptitle.get_text() == "Layers over 2 pipeline stages"
