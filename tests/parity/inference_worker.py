"""One rank of `test_inference.py`: `python -m tests.parity.inference_worker RUN_FOLDER RESULT`."""

from pathlib import Path
from typing import Any

import torch

from internlm_lib.experiment.load import load_experiment
from internlm_lib.experiment.schema import Experiment
from internlm_lib.files import write_json
from internlm_lib.generation.inference import open_model
from internlm_lib.ranks.rank import rank_main
from internlm_lib.run_folder import RunFolder
from internlm_lib.weights.start import starting_folder

LENGTHS = (17, 9, 24)


def infer(folder: RunFolder, result: str) -> None:
    _, experiment = load_experiment(folder.experiment)
    with open_model(experiment) as model:
        from internlm_lib.generation.driver import driving, serve
        from internlm_lib.model.parallel import is_rank_zero
        from internlm_lib.weights.megatron import load_weights

        load_weights(model.gpt, starting_folder(folder, experiment.model), experiment.model)
        if is_rank_zero():
            with driving(model) as driver:
                write_json(Path(result), _compare(driver, folder, experiment))
        else:
            serve(model)


def _compare(driver: Any, folder: RunFolder, experiment: Experiment) -> dict[str, float]:
    """Largest differences of logits and log-probabilities from transformers', row by row."""
    from internlm_lib.generation.generate import pad
    from internlm_lib.weights.huggingface import open_huggingface, transformers_logits

    model, source = experiment.model, open_huggingface(folder.huggingface)
    generator = torch.Generator().manual_seed(9)
    rows = [torch.randint(model.vocab_size, (n,), generator=generator) for n in LENGTHS]
    expected = [transformers_logits(source, row[None])[0] for row in rows]
    tokens = pad([row.tolist() for row in rows])

    everywhere = driver.logits(tokens)
    last = torch.tensor([[n - 1] for n in LENGTHS])
    at_the_end = driver.logits(tokens, last)
    logits = [(everywhere[i, :n] - expected[i]).abs().max() for i, n in enumerate(LENGTHS)]
    ends = [(at_the_end[i, 0] - expected[i][-1]).abs().max() for i in range(len(rows))]

    places = [(i, n - 2, int(rows[i][-1])) for i, n in enumerate(LENGTHS)]
    places += [(i, n - 2, int(expected[i][n - 2].argmax())) for i, n in enumerate(LENGTHS)]
    log_probs, greedy = driver.score(tokens, *torch.tensor(places).T)
    theirs = torch.stack([expected[i][at].log_softmax(-1)[token] for i, at, token in places])
    return {
        "logits": max(logits).item(),
        "logits_at_the_end": max(ends).item(),
        "log_probabilities": (log_probs - theirs).abs().max().item(),
        "greedy": int(greedy.sum()),
        "most_likely": sum(int(expected[i][at].argmax()) == token for i, at, token in places),
    }


if __name__ == "__main__":
    rank_main(infer)
