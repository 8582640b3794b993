"""Stage 05: what the model writes, greedily, before and after training.

The work is done in ranks (`generation/worker.py`); this process prepares prompts and shows texts.
"""

import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from internlm_lib.data.corpora import sources_of
from internlm_lib.data.handlers import handler
from internlm_lib.data.questioning import Prompt, given_prompt, prompt_of
from internlm_lib.data.records import Damage, Row, read_rows
from internlm_lib.data.tokenizer import Tokenizer
from internlm_lib.errors import KitError
from internlm_lib.files import read_json, write_json
from internlm_lib.generation.inference import inference_layout, weight_sets
from internlm_lib.generation.worker import prompts_path, texts_path
from internlm_lib.ranks.launch import launch
from internlm_lib.stages.stage import Stage
from internlm_lib.training.nodes import device_name


@dataclass(frozen=True)
class Answer:
    prompt: Prompt
    before: str
    after: str

    @property
    def row(self) -> dict[str, Any]:
        """One table row."""
        return {
            "question": self.prompt.question,
            "expected": self.prompt.expected,
            "before_training": self.before,
            "after_training": self.after,
        }


def choose_prompts(stage: Stage) -> list[Prompt]:
    """`generation.prompts`, or questions of `num_prompts` records spread evenly over all of them.

    Raises InputError if `data.handler` cannot ask.
    """
    tokenizer = Tokenizer(stage.needs(stage.folder.tokenizer, "01_prepare"))
    made = handler(stage.experiment.data.handler, tokenizer)
    if given := stage.experiment.generation.prompts:
        return [given_prompt(made, text) for text in given]
    return [prompt_of(made, row, tokenizer) for row in _evenly_spread(stage)]


def prompt_rows(prompts: list[Prompt]) -> list[dict[str, Any]]:
    """What the model is shown, as table rows."""
    return [{"prompt": prompt.text, "expected": prompt.expected} for prompt in prompts]


def answer(
    stage: Stage, prompts: list[Prompt], show: Callable[[str], None] = lambda text: None
) -> list[Answer]:
    """Let both sets of weights continue the prompts; writes `tables/texts.csv`.

    Args:
        show: told how far the work is, in a line of text.
    Raises:
        WorkerError: a rank failed, or a prompt is too long for the model.
        KitError: a prompt has no text.
    """
    for made_by, weights in zip(("02_convert", "03_train"), _checkpoints(stage), strict=True):
        stage.needs(weights, made_by)
    shutil.rmtree(prompts_path(stage.folder).parent, ignore_errors=True)
    write_json(prompts_path(stage.folder), [prompt.text for prompt in prompts])
    started = time.monotonic()
    layout = inference_layout(stage.experiment.parallel.candidate)
    launch(
        "internlm_lib.generation.worker",
        stage.folder,
        world_size=layout.world_size,
        device=device_name(stage.experiment),
        environment=stage.experiment.parallel.environment,
        logs=prompts_path(stage.folder).parent / "logs",
        on_tick=lambda: show(f"writing answers, {time.monotonic() - started:.0f} s"),
    )
    answers = _read_answers(stage, prompts)
    show(f"{len(answers)} prompts answered in {time.monotonic() - started:.0f} s")
    stage.table("texts", [a.row for a in answers])
    return answers


def summarize(answers: list[Answer]) -> dict[str, Any]:
    """The stage's result; `equal` counts the answers that are the record's own, word for word."""
    known = [a for a in answers if a.prompt.expected is not None]
    return {
        "prompts": len(answers),
        "known_answers": len(known),
        "equal": {
            "before": sum(a.before.strip() == a.prompt.expected for a in known),
            "after": sum(a.after.strip() == a.prompt.expected for a in known),
        },
        "changed": sum(a.before != a.after for a in answers),
    }


def check_answers(answers: list[Answer]) -> str:
    """Says how the texts came out.

    Raises KitError if training changed none of the texts.
    """
    result = summarize(answers)
    if answers and not result["changed"]:
        raise KitError(
            "05_infer: the trained weights write exactly what the untrained ones do; either "
            "03_train saved the weights it began with, or its learning rate is next to nothing"
        )
    known, equal = result["known_answers"], result["equal"]
    line = f"{result['changed']} of {len(answers)} texts changed by training"
    if not known:
        return line
    return f"{line}; equal to the record's answer: {equal['before']} → {equal['after']} of {known}"


def run(stage: Stage, show: Callable[[str], None] = lambda text: None) -> dict[str, Any]:
    """All steps in order; returns the stage's result. Raises what `check_answers` raises."""
    prompts = choose_prompts(stage)
    answers = answer(stage, prompts, show)
    check_answers(answers)
    return summarize(answers)


def _evenly_spread(stage: Stage) -> Iterator[Row]:
    data = stage.experiment.data
    sources = [source.path for source in sources_of(data, stage.folder)]
    if sources == [stage.folder.pocket_records]:
        stage.needs(sources[0], "01_prepare")

    def rows() -> Iterator[Row]:
        return read_rows(sources, columns=data.columns, on_damage=data.on_damage, damage=Damage())

    # Twice through the files, so that those of any size are never held in memory.
    count = sum(1 for _ in rows())
    number = min(stage.experiment.generation.num_prompts, count)
    chosen = {i * count // number for i in range(number)}
    return (row for i, row in enumerate(rows()) if i in chosen)


def _checkpoints(stage: Stage) -> Any:
    return weight_sets(stage.folder, stage.experiment.model).values()


def _read_answers(stage: Stage, prompts: list[Prompt]) -> list[Answer]:
    texts = read_json(texts_path(stage.folder))
    for weights, made in texts.items():
        if len(made) != len(prompts):
            raise KitError(
                f"{texts_path(stage.folder)}: {len(made)} texts {weights} training for "
                f"{len(prompts)} prompts; run 05_infer again"
            )
    return [Answer(*parts) for parts in zip(prompts, texts["before"], texts["after"], strict=True)]
