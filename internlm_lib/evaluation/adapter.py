"""InternLM as a model of lm-evaluation-harness: its texts in, log-likelihoods and texts out."""

from collections.abc import Callable, Iterator, Sequence

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from internlm_lib.data.tokenizer import Tokenizer
from internlm_lib.errors import InputError
from internlm_lib.evaluation.scoring import Continuation, Row, fit_context, log_likelihoods
from internlm_lib.generation.generate import generate_greedy
from internlm_lib.generation.language_model import LanguageModel

TokenRequest = tuple[tuple[str, str], list[int], list[int]]
"""((context, continuation), ids of the context, ids of the continuation)"""


class InternLMAdapter(TemplateLM):
    """Every context begins with `<s>`, as every document in training does.

    The harness sees one process: ranks are hidden behind the `LanguageModel`.
    """

    def __init__(
        self,
        model: LanguageModel,
        tokenizer: Tokenizer,
        *,
        batch_size: int,
        on_progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> None:
        super().__init__()
        self._model = model
        self._pieces = tokenizer
        self._batch_size = batch_size
        self._on_progress = on_progress
        self.shortened = 0
        """Contexts that were too long for the model and lost their beginning."""

    @property
    def eot_token_id(self) -> int:
        return self._pieces.eos_id

    @property
    def prefix_token_id(self) -> int:
        return self._pieces.bos_id

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: object
    ) -> list[int]:
        """Ids of a text, begun by `<s>` unless `add_special_tokens` is False."""
        return self._pieces.encode(string, add_bos=add_special_tokens is not False)

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Log-probability of each whole text, in windows of the model's length."""
        windows = [self._windows(request.args[0]) for request in requests]
        flat = [window for text in windows for window in text]
        results = iter(log_likelihoods(self._model, flat, self._batch_size, self._on_progress))
        return [sum(next(results)[0] for _ in text) for text in windows]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Greedy continuations, cut before the first of their stop texts.

        Raises InputError if a task asks for sampling.
        """
        texts = [""] * len(requests)
        for settings, numbers in self._alike(requests):
            for start in range(0, len(numbers), self._batch_size):
                batch = numbers[start : start + self._batch_size]
                contexts = [requests[i].args[0] for i in batch]
                for i, text in zip(batch, self._generate(contexts, *settings), strict=True):
                    texts[i] = text
        return texts

    def _loglikelihood_tokens(
        self, requests: list[TokenRequest], **kwargs: object
    ) -> list[tuple[float, bool]]:
        continuations = [
            Continuation(self._fit(context, len(target) - 1), tuple(target))
            for _, context, target in requests
        ]
        return log_likelihoods(self._model, continuations, self._batch_size, self._on_progress)

    def _fit(self, context: Sequence[int], new_tokens: int) -> Row:
        fitted = fit_context(context, new_tokens, self._model.max_length)
        self.shortened += len(fitted) < len(context)
        return fitted

    def _windows(self, text: str) -> list[Continuation]:
        windows = get_rolling_token_windows(
            token_list=self.tok_encode(text, add_special_tokens=False),
            prefix_token=self.prefix_token_id,
            max_seq_len=self._model.max_length,
            context_len=1,
        )
        pairs = map(make_disjoint_window, windows)
        return [Continuation(tuple(context), tuple(target)) for context, target in pairs]

    def _alike(
        self, requests: list[Instance]
    ) -> Iterator[tuple[tuple[tuple[str, ...], int], list[int]]]:
        """Settings (stop texts, most new tokens) and numbers of the requests that have them."""
        groups: dict[tuple[tuple[str, ...], int], list[int]] = {}
        for i, request in enumerate(requests):
            settings = normalize_gen_kwargs(request.args[1])
            if settings["do_sample"]:
                raise InputError(
                    f"task {request.task_name}: do_sample is on; only greedy decoding is offered, "
                    "set do_sample: false in its generation_kwargs"
                )
            key = (tuple(settings["until"]), settings["max_gen_toks"])
            groups.setdefault(key, []).append(i)
        yield from groups.items()

    def _generate(self, contexts: Sequence[str], until: tuple[str, ...], most: int) -> list[str]:
        prompts = [self._fit(self.tok_encode(text), most) for text in contexts]
        continuations = generate_greedy(
            self._model.logits,
            prompts,
            eos_id=self._pieces.eos_id,
            max_new_tokens=most,
            max_length=self._model.max_length,
            vocab_size=self._pieces.vocab_size,
            is_complete=lambda ids: any(stop in self._pieces.decode(ids) for stop in until),
        )
        texts = [self._pieces.decode(ids) for ids in continuations]
        return [postprocess_generated_text(text, list(until), None) for text in texts]
