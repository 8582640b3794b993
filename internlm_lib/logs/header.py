"""What a log says about its training before the first step."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

MAX_ARGUMENTS = 5000
_MAX_LENGTH = 2000
"""Characters of an argument's value that are kept."""

_NPU = re.compile(r"(?<![a-z])npu|ascend(?!ing)|hccl", re.IGNORECASE)
_CUDA = re.compile(r"nvidia|nccl version|(?<![a-z.])cuda:\d", re.IGNORECASE)


@dataclass
class Header:
    """Filled line by line; a restart whose arguments are printed again begins a new one."""

    program: str | None = None
    """Name in the frame of the arguments, or found in the text: AscendSpeed, MindSpeed-LLM."""
    arguments: dict[str, str] = field(default_factory=dict)
    engine: str | None = None
    """What the layout begins with; megatron or deepspeed by the arguments if None."""
    parameters_of_rank: dict[tuple[int, int], int] = field(default_factory=dict)
    """(tensor, pipeline) rank → number of parameters."""
    npu: bool = False
    cuda: bool = False
    time: float | None = None
    """Last time stamp before the first step, in Unix seconds."""

    def renewed(self, **stated: Any) -> "Header":
        """A header that knows of this one only where the log was written."""
        return Header(**{"program": self.program, "npu": self.npu, "cuda": self.cuda, **stated})

    def note(self, line: str) -> None:
        """Look for the kind of device and the program in a line before the first step."""
        if not self.npu and _NPU.search(line):
            self.npu = True
        if not self.cuda and _CUDA.search(line):
            self.cuda = True
        if self.program is None:
            text = line.lower()
            if "mindspeed" in text or "modellink" in text:
                self.program = "MindSpeed-LLM"
            elif "ascendspeed" in text:
                self.program = "AscendSpeed"

    def add(self, name: str, value: str) -> None:
        if len(self.arguments) < MAX_ARGUMENTS:
            self.arguments[name] = value[:_MAX_LENGTH]

    @property
    def device(self) -> str | None:
        """ "npu", "cuda" or None. Anything of an NPU decides: its PyTorch plug-in answers to the
        name of CUDA, too."""
        return "npu" if self.npu else "cuda" if self.cuda else None

    def whole(self, name: str) -> int | None:
        """An argument as a whole number from 1 on; None if it is missing or none."""
        text = self.arguments.get(name, "")
        return int(text) if text.isascii() and text.isdigit() and 0 < len(text) < 19 else None

    def says(self, name: str) -> bool:
        return self.arguments.get(name) == "True"

    @property
    def precision(self) -> str | None:
        """bf16, fp16 or fp32."""
        kinds = {"torch.bfloat16": "bf16", "torch.float16": "fp16", "torch.half": "fp16",
                 "torch.float32": "fp32"}  # fmt: skip
        named = kinds.get(self.arguments.get("params_dtype", ""))
        return "bf16" if self.says("bf16") else "fp16" if self.says("fp16") else named

    @property
    def world_size(self) -> int | None:
        if stated := self.whole("world_size"):
            return stated
        sizes = [self.whole(f"{kind}_size") for kind in _PARALLEL]
        product = 1
        for size in sizes:
            if size is None:
                return None
            product *= size
        return product

    @property
    def layout(self) -> str:
        """As `experiment.schema.Layout.label` writes it, e.g. `megatron TP8 PP4 DP1 SP`."""
        tensor, pipeline = (self.whole(f"{kind}_size") for kind in _PARALLEL[:2])
        if tensor is None or pipeline is None:
            return "unknown layout"
        engine = self.engine or ("deepspeed" if self.says("deepspeed") else "megatron")
        parts = [engine, f"TP{tensor}", f"PP{pipeline}"]
        if virtual := self.whole("virtual_pipeline_model_parallel_size"):
            parts.append(f"VPP{virtual}")
        if (context := self.whole("context_parallel_size") or 1) > 1:
            parts.append(f"CP{context}")
        if data := self._data_parallel(tensor * pipeline * context):
            parts.append(f"DP{data}")
        if self.says("sequence_parallel"):
            parts.append("SP")
        if zero := self.whole("zero_stage"):
            parts.append(f"ZeRO-{zero}")
        return " ".join(parts)

    def _data_parallel(self, others: int) -> int | None:
        if (data := self.whole("data_parallel_size")) is not None:
            return data
        world = self.whole("world_size")
        return world // others if world and world % others == 0 else None

    @property
    def parameters(self) -> int | None:
        """The model's number of parameters, if the ranks' add up to it.

        They do without tensor and expert parallelism (ranks hold copies of norms) and, over
        several stages, without tied embeddings (the last stage holds a copy).
        """
        pipeline = self.whole("pipeline_model_parallel_size")
        copies = (
            self.whole("tensor_model_parallel_size") != 1
            or (self.whole("expert_model_parallel_size") or 1) > 1
            or (pipeline != 1 and not self.says("untie_embeddings_and_output_weights"))
        )
        ranks = {(0, stage) for stage in range(pipeline or 0)}
        if copies or not ranks or self.parameters_of_rank.keys() != ranks:
            return None
        return sum(self.parameters_of_rank.values())

    @property
    def model(self) -> Mapping[str, int | None]:
        """The model's shape under the names of `ModelSection`, None where the log does not say."""
        vocab_size = self.whole("vocab_size") or self.whole("padded_vocab_size")
        shape = {key: self.whole(key) for key in MODEL_KEYS}
        return {**shape, "vocab_size": vocab_size}


MODEL_KEYS = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads")
_PARALLEL = ("tensor_model_parallel", "pipeline_model_parallel", "data_parallel")
