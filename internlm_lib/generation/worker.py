"""One rank of stage 05: `python -m internlm_lib.generation.worker RUN_FOLDER`.

Reads the prompts that the stage wrote, lets the untrained and the trained weights continue them,
and writes the texts.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from internlm_lib.data.tokenizer import Tokenizer
from internlm_lib.experiment.load import load_experiment
from internlm_lib.experiment.schema import GenerationSection
from internlm_lib.files import read_json, write_json
from internlm_lib.generation.inference import open_model, weight_sets
from internlm_lib.ranks.rank import rank_main
from internlm_lib.run_folder import RunFolder

if TYPE_CHECKING:
    from internlm_lib.generation.language_model import LanguageModel


def prompts_path(folder: RunFolder) -> Path:
    """A JSON list of prompts, ready to be tokenised."""
    return folder.path / "generation" / "prompts.json"


def texts_path(folder: RunFolder) -> Path:
    """JSON: `{"before": [text of each prompt], "after": [...]}`."""
    return folder.path / "generation" / "texts.json"


def generate_texts(folder: RunFolder) -> None:
    """Write what each set of weights makes of each prompt; every rank calls it."""
    _, experiment = load_experiment(folder.experiment)
    prompts = read_json(prompts_path(folder))
    tokenizer = Tokenizer(folder.tokenizer)
    with open_model(experiment) as model:
        from internlm_lib.model.parallel import is_rank_zero
        from internlm_lib.weights.megatron import load_weights

        texts = {}
        for name, checkpoint in weight_sets(folder, experiment.model).items():
            load_weights(model.gpt, checkpoint, experiment.model)
            texts[name] = continue_texts(model, tokenizer, prompts, experiment.generation)
        if is_rank_zero():
            write_json(texts_path(folder), texts)


def continue_texts(
    model: "LanguageModel", tokenizer: Tokenizer, prompts: list[str], settings: GenerationSection
) -> list[str]:
    """The greedy continuation of each prompt, each begun by `<s>` as in training.

    Raises InputError if a prompt leaves no room for `max_new_tokens`.
    """
    from internlm_lib.generation.generate import generate_greedy

    continuations = generate_greedy(
        model.logits,
        tokenizer.encode_batch(prompts, add_bos=True),
        eos_id=tokenizer.eos_id,
        max_new_tokens=settings.max_new_tokens,
        max_length=model.max_length,
        vocab_size=tokenizer.vocab_size,
    )
    return [tokenizer.decode(ids) for ids in continuations]


if __name__ == "__main__":
    rank_main(generate_texts)
