"""One rank of `test_model.py`: `python -m tests.parity.model_worker RUN_FOLDER LAYOUT RESULT`."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from internlm_lib.devices import select_device
from internlm_lib.experiment.load import load_experiment
from internlm_lib.experiment.schema import Experiment, Layout
from internlm_lib.files import write_json
from internlm_lib.ranks.rank import rank_main
from internlm_lib.run_folder import RunFolder


def compare(folder: RunFolder, layout: str, result: str) -> None:
    device = select_device("cpu")
    device.adapt_megatron()
    _, experiment = load_experiment(folder.experiment)
    _compare(folder, experiment, Layout.model_validate_json(layout), device, Path(result))


def _compare(
    folder: RunFolder, experiment: Experiment, layout: Layout, device: Any, result: Path
) -> None:
    from megatron.core import parallel_state
    from megatron.core.distributed import (
        DistributedDataParallel,
        DistributedDataParallelConfig,
        finalize_model_grads,
    )
    from megatron.core.pipeline_parallel import get_forward_backward_func

    from internlm_lib.model.build import build_gpt_model
    from internlm_lib.model.parallel import initialize_parallel, is_rank_zero, shutdown
    from internlm_lib.weights.huggingface import open_huggingface
    from internlm_lib.weights.layout import local_tensor, rules
    from internlm_lib.weights.megatron import load_weights, named_parameters

    model, training = experiment.model, experiment.training
    initialize_parallel(layout, device)
    source = open_huggingface(folder.huggingface)
    gpt = build_gpt_model(model, layout, training, device)
    load_weights(gpt, folder.huggingface, model)
    ddp = DistributedDataParallel(
        gpt.config, DistributedDataParallelConfig(grad_reduce_in_fp32=True), gpt
    )
    gpt.config.finalize_model_grads_func = finalize_model_grads
    shape = (training.micro_batch_size, training.seq_length + 1)
    tokens = torch.randint(model.vocab_size, shape, generator=torch.Generator().manual_seed(5))
    inputs, labels = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    positions = torch.arange(training.seq_length).expand_as(inputs)
    seen: dict[str, Tensor] = {}

    def loss(output: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        value = output.mean()
        return value, {"loss": value.detach().clone()}

    def forward(batches: Iterator[int], module: torch.nn.Module) -> Any:
        return module(inputs, positions, None, labels=labels), loss

    # The logits on their way into the loss, which overwrites them: what training itself computes.
    if parallel_state.is_pipeline_last_stage():
        gpt.output_layer.register_forward_hook(
            lambda module, arguments, output: seen.update(logits=output[0].detach().clone())
        )
    reports = get_forward_backward_func()(
        forward_step_func=forward, data_iterator=iter([0]), model=[ddp], num_microbatches=1,
        seq_length=training.seq_length, micro_batch_size=training.micro_batch_size,
        forward_only=False,
    )  # fmt: skip

    llama, expected_logits, expected_loss = _transformers(source, inputs, labels)
    rank = parallel_state.get_tensor_model_parallel_rank()
    size = parallel_state.get_tensor_model_parallel_world_size()

    def gradient_of(name: str, rows: slice = slice(None), columns: slice = slice(None)) -> Tensor:
        gradient = llama.get_parameter(name).grad
        return gradient[rows, columns] if gradient.dim() > 1 else gradient[rows]

    parameters, differences = named_parameters(gpt), {}
    for rule in rules(model):
        if rule.name in parameters:
            theirs = local_tensor(rule, gradient_of, rank, size, model.vocab_size)
            ours = parameters[rule.name].main_grad
            scale = max(llama.get_parameter(n).grad.abs().max().item() for n in rule.huggingface)
            differences[rule.name] = (ours - theirs).abs().max().item() / scale
    mine: dict[str, Any] = {"gradients": differences}
    if parallel_state.is_pipeline_last_stage():
        share = expected_logits.chunk(size, dim=-1)[rank]
        mine["logits"] = (seen["logits"].transpose(0, 1) - share).abs().max().item()
        mine["logit_std"] = share.std().item()
        mine["loss"] = abs(reports[0]["loss"].item() / expected_loss - 1)
    everyone: list[dict[str, Any]] = [{} for _ in range(layout.world_size)]
    torch.distributed.all_gather_object(everyone, mine)
    if is_rank_zero():
        write_json(result, {**_worst(everyone), "tensors": len(rules(model))})
    shutdown()


def _transformers(source: Any, inputs: Tensor, labels: Tensor) -> Any:
    from internlm_lib.weights.huggingface import transformers_model

    llama = transformers_model(source)
    logits = llama(inputs, use_cache=False).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
    loss.backward()
    return llama, logits.detach(), loss.item()


def _worst(everyone: list[dict[str, Any]]) -> dict[str, Any]:
    """The largest difference that any rank saw, of each number."""
    gradients: dict[str, float] = {}
    numbers: dict[str, float] = {}
    for found in everyone:
        for name, value in found.pop("gradients").items():
            gradients[name] = max(value, gradients.get(name, 0.0))
        for name, value in found.items():
            numbers[name] = max(value, numbers.get(name, 0.0))
    return {"gradients": gradients, **numbers}


if __name__ == "__main__":
    rank_main(compare)
