"""How a record becomes text: templates, each a prompt and what joins the answer to it.

Sources: `alpaca` is the template of tatsu-lab/stanford_alpaca `train.py`, which puts the output
directly after the response header (the data set's own `text` column has a newline there).
`alpaca_predecessor` is what AscendSpeed's AlpacaPretrainHandler trained on, byte for byte, oddities
included; `alpaca_instruction` is the template of its GeneralInstructionHandler, for one turn.
`question_answer` is the form in which stage 06 asks.
"""

from collections.abc import Callable
from dataclasses import dataclass

from internlm_lib.data.records import Record

_ALPACA_PREAMBLE = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request."
)
_ALPACA_PREAMBLE_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request."
)
_STEP_BY_STEP = (
    "Please note that you need to think through your response logically and step by step."
)
_VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the user's questions."
)


@dataclass(frozen=True)
class Template:
    """A document is the prompt, `joint`, the output, and `end`.

    A blank before the answer belongs to `joint`, not to the prompt: tokenizers keep it together
    with the word that follows, so a prompt that ended in it would be cut inside a token.
    """

    prompt: Callable[[str, str], str]
    """(instruction, input) → the text a model is asked to continue."""
    joint: str
    end: str = ""

    def document(self, record: Record) -> str:
        """The whole text of a record, as it is trained on."""
        prompt = self.prompt(record.instruction, record.input)
        return prompt + self.joint + record.output + self.end


def _alpaca(instruction: str, input_text: str) -> str:
    preamble = _ALPACA_PREAMBLE_WITH_INPUT if input_text else _ALPACA_PREAMBLE
    context = f"### Input:\n{input_text}\n\n" if input_text else ""
    return f"{preamble}\n\n### Instruction:\n{instruction}\n\n{context}### Response:"


def _alpaca_predecessor(instruction: str, input_text: str) -> str:
    # An empty input was rendered as the word None, right after the marks: kept, for equal tokens.
    context = f" Input:\n{input_text}" if input_text else "None"
    return (
        f"{_VICUNA_SYSTEM}USER: {_ALPACA_PREAMBLE}\n\n### Instruction:\n{instruction}\n\n"
        f"###{context}\n\n### Response: ASSISTANT:"
    )


def _alpaca_instruction(instruction: str, input_text: str) -> str:
    # Also an empty input has its line.
    return (
        f"\n{_ALPACA_PREAMBLE_WITH_INPUT} {_STEP_BY_STEP}\n"
        f"### Instruction:\n{instruction}\n{input_text}\n### Response:"
    )


def _question_answer(instruction: str, input_text: str) -> str:
    question = f"{instruction}\n{input_text}" if input_text else instruction
    return f"Question: {question}\nAnswer:"


TEMPLATES: dict[str, Template] = {
    "alpaca": Template(_alpaca, joint=""),
    "alpaca_predecessor": Template(_alpaca_predecessor, joint=" "),
    "question_answer": Template(_question_answer, joint=" "),
    "alpaca_instruction": Template(_alpaca_instruction, joint="\n", end="\n"),
}
