"""How fast records become token files: beside the tokenizer alone, and beside `datasets.map`.

    python benchmarks/preprocess.py [--records FILE] [--tokenizer MODEL] [--processes N]
        [--repeats 3] [--directory FOLDER] > preprocess.json

50,000 records whose lengths are like Alpaca's: made of word lists by this program, always the same,
or those of FILE, repeated. Three ways to encode them, one after the other, several times:

- `sentencepiece`: processes that only encode, texts and model in their memory, counts alone given
  back; the time from the moment all are ready. No program that reads and writes can be as fast.
- `kit`: `internlm_lib.data.preprocess`, all of it: hashing and reading the source, starting the
  processes, encoding, writing, syncing, the card. Only imports are left out.
- `datasets`: what AscendSpeed's preprocessing does: `load_dataset`, `map` with a transformers
  tokenizer, then every document added to megatron-core's IndexedDatasetBuilder. Imports left out.

The kit's token file must equal that of `datasets`, byte for byte. Ratios are medians over the
repeats, each of runs that followed one another. Memory is the sum of what all processes of the kit
hold at a time (PSS), at its highest, in runs of their own: of these records, and of four times as
many. Prints one JSON object; what is being done goes to stderr. A limit that is missed is reported,
and is no failure.
"""

import argparse
import json
import multiprocessing
import os
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.synchronize import Barrier
from pathlib import Path
from statistics import median
from typing import Any

import psutil

from internlm_lib import __version__
from internlm_lib.data.handlers import handler
from internlm_lib.data.preprocess import preprocess
from internlm_lib.data.prompts import TEMPLATES
from internlm_lib.data.tokenizer import Tokenizer, train_tokenizer
from internlm_lib.files import sha256_of
from internlm_lib.provenance import record

RECORDS = 50_000
MANY = 4
"""Times as many records, to see whether memory grows."""
HANDLER = "alpaca"
PIECES = 32_000
_SELF, _CHILDREN = resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN
LIMITS = {"ratio_to_sentencepiece": 0.8, "ratio_to_datasets": 3.0, "peak_pss_mib": 1024.0}
"""At least, at least, at most."""
_REPOSITORY = Path(__file__).resolve().parents[1]
_GIVEN_MODEL = _REPOSITORY.parent / "shared" / "data" / "tokenizer" / "V7_sft.model"
_SAMPLE_SECONDS = 0.02

_ADJECTIVES = """
able bold brief bright calm careful clear cold common complex curious deep early easy exact fair
famous fast fine firm fresh full general gentle global good great green happy heavy high honest
huge human kind large late light local long loud main modern natural new old open plain popular
possible private public quick quiet rare ready rich safe sharp short simple single slow small smart
social soft special strong sudden useful warm wide wild wise young
""".split()
_NOUNS = """
answer article author balance bird book bridge business car chapter child city climate code color
company computer cost country culture data day design dinner doctor earth energy event example
experience family farmer field film food forest friend function future game garden goal government
group habit health history home house idea image industry island job journey judge kitchen language
law leader lesson letter library life list machine market meal meaning member memory method mind
model moment money morning mountain movie music name nation nature network number ocean office
opinion painting paper park party pattern people person phone picture place planet plant poem
policy power price problem process product project purpose question reader reason recipe record
report research result river road role room rule school science season sentence service shop skill
society solution song sound source space speech sport story street student study subject summer
system table task teacher team technology theory thing time tool town travel tree truth type user
value version village voice water way weather week window winter word work worker world writer year
""".split()
_VERBS = """
adds allows answers asks becomes begins brings builds buys calls carries changes chooses compares
connects considers contains covers creates decides describes develops discovers draws enjoys
explains explores expresses fills finds follows forgets gives grows helps holds improves includes
increases invites joins keeps knows learns leaves lists loves makes measures meets moves needs
offers opens orders paints plans plays prepares produces protects proves reaches reads reduces
reflects remembers repeats replaces saves sees sells sends serves shapes shares shows solves starts
studies suggests supports takes teaches tells thinks translates tries turns understands uses visits
wants watches wins writes
""".split()
_ASK = """
Arrange Calculate Classify Compare Compose Convert Count Create Define Describe Design Edit Explain
Find Generate Identify List Name Outline Provide Rank Rewrite Sort Suggest Summarize Translate
Write
""".split()
_SYLLABLES = """
ba co den fi gra hol in ka lo mer ni or pla qua ri sta tor un ver wil xe yo zan
""".split()

Order = dict[str, Any]
"""Of a child: `source`, `model`, `processes`, `folder`, an empty one."""


def main() -> None:
    if sys.argv[1:2] and sys.argv[1] in CHILDREN:
        print(json.dumps(CHILDREN[sys.argv[1]](json.loads(sys.argv[2]))))
        return
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--records", type=Path, help="JSON list of Alpaca records to be repeated")
    parser.add_argument("--tokenizer", type=Path, help="tokenizer.model; else one is trained")
    parser.add_argument("--processes", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--directory", type=Path, default=Path("."))
    arguments = parser.parse_args()
    given = arguments.tokenizer or (_GIVEN_MODEL if _GIVEN_MODEL.exists() else None)
    with tempfile.TemporaryDirectory(prefix=".preprocess-", dir=arguments.directory) as folder:
        place = Path(folder).resolve()
        model = given or trained_model()
        print(json.dumps(measure(place, arguments, model.resolve()), indent=2))


def measure(folder: Path, arguments: argparse.Namespace, model: Path) -> dict[str, Any]:
    """Run everything below an empty folder; returns what is printed."""
    load = os.getloadavg()[0]
    records = given_records(arguments.records) if arguments.records else made_records()
    source, many = folder / "records.parquet", folder / "many.parquet"
    write_parquet(source, records, 1)
    write_parquet(many, records, MANY)
    order: Order = {"source": str(source), "model": str(model), "processes": arguments.processes}
    runs: dict[str, list[dict[str, Any]]] = {"sentencepiece": [], "kit": [], "datasets": []}
    for repeat in range(arguments.repeats):
        for name, results in runs.items():
            tell(f"{repeat + 1} of {arguments.repeats}: {name}")
            results.append(in_child(name, order, folder))
    peaks = []
    for file in (source, many):
        tell(f"memory, {file.name}")
        peaks.append(in_child("memory", {**order, "source": str(file)}, folder)["peak_pss_mib"])
    check_equal(runs)
    measured = {
        "ratio_to_sentencepiece": ratio(runs["sentencepiece"], runs["kit"]),
        "ratio_to_datasets": ratio(runs["datasets"], runs["kit"]),
        "peak_pss_mib": max(peaks),
    }
    return {
        "benchmark": "preprocess",
        "kit": __version__,
        **record(),
        "load_average_before": round(load, 2),
        "load_average_after": round(os.getloadavg()[0], 2),
        "records": {"documents": RECORDS, "from": str(arguments.records or "word lists"),
                    "bytes": source.stat().st_size},
        "tokens": runs["kit"][0]["tokens"],
        "mean_length": round(runs["kit"][0]["tokens"] / RECORDS, 1),
        "tokenizer": {"pieces": Tokenizer(model).vocab_size, "sha256": sha256_of(model)},
        "processes": arguments.processes,
        "runs": {name: summary(results) for name, results in runs.items()},
        **{name: round(value, 3) for name, value in measured.items()},
        "cpu_ratio_to_sentencepiece": round(
            ratio(runs["sentencepiece"], runs["kit"], "cpu_seconds"), 3
        ),
        "peak_pss_mib_by_records": dict(zip((RECORDS, MANY * RECORDS), peaks, strict=True)),
        "limits": LIMITS,
        "within": {
            name: value <= LIMITS[name] if name == "peak_pss_mib" else value >= LIMITS[name]
            for name, value in measured.items()
        },
    }  # fmt: skip


# --- records and tokenizer -----------------------------------------------------------------------


def made_records() -> list[dict[str, str]]:
    """Alpaca-like: 39 % with an input, outputs log-normally long."""
    draw, rare = random.Random(5), rare_words()
    return [make_record(draw, rare) for _ in range(RECORDS)]


def rare_words() -> list[str]:
    draw = random.Random(6)
    return ["".join(draw.choices(_SYLLABLES, k=draw.randint(2, 4))) for _ in range(40_000)]


def make_record(draw: random.Random, rare: Sequence[str]) -> dict[str, str]:
    asked = f"{draw.choice(_ASK)} {noun_phrase(draw, rare)} for {noun_phrase(draw, rare)}"
    has_input = draw.random() < 0.39
    sentences = max(1, round(draw.lognormvariate(1.4, 0.76)))
    listed = draw.random() < 0.2
    marks = [f"{number}. " if listed else "" for number in range(1, sentences + 1)]
    return {
        "instruction": asked + draw.choice(".?:"),
        "input": sentence(draw, rare) if has_input else "",
        "output": ("\n" if listed else " ").join(mark + sentence(draw, rare) for mark in marks),
    }


def sentence(draw: random.Random, rare: Sequence[str]) -> str:
    text = f"{noun_phrase(draw, rare)} {draw.choice(_VERBS)} {noun_phrase(draw, rare)}"
    if draw.random() < 0.4:
        text += f", and {draw.choice(_VERBS)} {draw.randint(2, 2000)} {draw.choice(_NOUNS)}s"
    return text[0].upper() + text[1:] + "."


def noun_phrase(draw: random.Random, rare: Sequence[str]) -> str:
    noun = draw.choice(rare) if draw.random() < 0.04 else draw.choice(_NOUNS)
    return f"{draw.choice(('the', 'a', 'this', 'every'))} {draw.choice(_ADJECTIVES)} {noun}"


def given_records(path: Path) -> list[dict[str, str]]:
    found = json.loads(path.read_text(encoding="utf-8"))
    return [found[number % len(found)] for number in range(RECORDS)]


def rendered(values: dict[str, str]) -> str:
    """A record's text, as the kit's handler makes it."""
    form = TEMPLATES[HANDLER]
    return form.prompt(values["instruction"], values["input"]) + form.joint + values["output"]


def write_parquet(path: Path, records: Sequence[dict[str, str]], times: int) -> None:
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.Table.from_pylist(list(records))
    with pyarrow.parquet.ParquetWriter(path, table.schema) as writer:
        for _ in range(times):
            writer.write_table(table, row_group_size=len(table))


def trained_model() -> Path:
    """A tokenizer of `PIECES` pieces, trained once on this machine."""
    path = Path(tempfile.gettempdir()) / f"internlm-benchmark-{PIECES}" / "tokenizer.model"
    if not path.exists():
        tell(f"training a tokenizer of {PIECES} pieces into {path.parent}")
        train_tokenizer([*map(rendered, made_records()), *rare_words()], PIECES, path)
    return path


# --- the three ways, each a child of its own -----------------------------------------------------


def encode_only(order: Order) -> dict[str, Any]:
    """Child: processes that only encode."""
    context = multiprocessing.get_context("spawn")
    count = order["processes"]
    ready, results = context.Barrier(count + 1), context.SimpleQueue()
    arguments = [(order, number, ready, results) for number in range(count)]
    processes = [context.Process(target=encode_share, args=share) for share in arguments]
    for process in processes:
        process.start()
    ready.wait()
    began = time.monotonic()
    found = [results.get() for _ in processes]
    seconds = time.monotonic() - began
    for process in processes:
        process.join()
    tokens, computed = (sum(values) for values in zip(*found, strict=True))
    return {"seconds": seconds, "cpu_seconds": computed, "tokens": tokens + 2 * RECORDS}


def encode_share(order: Order, number: int, ready: Barrier, results: Any) -> None:
    """Encode every n-th thousand of the texts."""
    import pyarrow.parquet
    import sentencepiece

    texts = [rendered(values) for values in pyarrow.parquet.read_table(order["source"]).to_pylist()]
    size = 1000
    batches = [texts[start : start + size] for start in range(0, len(texts), size)]
    share = batches[number :: order["processes"]]
    sentencepiece.set_min_log_level(2)
    processor = sentencepiece.SentencePieceProcessor(model_file=order["model"])
    processor.encode(share[0], num_threads=1)
    ready.wait()
    began = time.process_time()
    tokens = sum(len(ids) for batch in share for ids in processor.encode(batch, num_threads=1))
    results.put((tokens, time.process_time() - began))


def run_kit(order: Order) -> dict[str, Any]:
    """Child: the kit, as `internlm preprocess` calls it."""
    tokenizer = Tokenizer(Path(order["model"]))
    computed = cpu_seconds()
    corpus = preprocess(
        [Path(order["source"])],
        Path(order["folder"]) / "kit",
        handler(HANDLER, tokenizer),
        tokenizer,
        workers=order["processes"],
    )
    return {
        "seconds": corpus.seconds,
        "cpu_seconds": cpu_seconds() - computed,
        "tokens": corpus.card.counts.tokens,
        "bin_sha256": corpus.card.bin_sha256,
    }


def run_datasets(order: Order) -> dict[str, Any]:
    """Child: load, map and write document by document."""
    import datasets
    import torch
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    datasets.disable_progress_bars()
    folder = Path(order["folder"])
    tokenizer = transformers_tokenizer(Path(order["model"]), folder / "tokenizer")
    began, computed = time.monotonic(), cpu_seconds()
    rows = datasets.load_dataset(
        "parquet", data_files=order["source"], split="train", cache_dir=str(folder / "cache"),
        num_proc=order["processes"],
    )  # fmt: skip

    def encode(values: dict[str, Any]) -> dict[str, Any]:
        return {"input_ids": [*tokenizer(rendered(values))["input_ids"], tokenizer.eos_token_id]}

    encoded = rows.map(encode, remove_columns=rows.column_names, num_proc=order["processes"])
    dtype = DType.optimal_dtype(Tokenizer(Path(order["model"])).vocab_size)
    builder = IndexedDatasetBuilder(str(folder / "peer.bin"), dtype=dtype)
    tokens = 0
    for document in encoded:
        builder.add_item(torch.IntTensor(document["input_ids"]))
        builder.end_document()
        tokens += len(document["input_ids"])
    builder.finalize(str(folder / "peer.idx"))
    return {
        "seconds": time.monotonic() - began,
        "cpu_seconds": cpu_seconds() - computed,
        "tokens": tokens,
        "bin_sha256": sha256_of(folder / "peer.bin"),
    }


def cpu_seconds() -> float:
    """CPU time of this process and of those it started that have ended."""
    return sum(sum(resource.getrusage(whose)[:2]) for whose in (_SELF, _CHILDREN))


def transformers_tokenizer(model: Path, folder: Path) -> Any:
    """The same tokenizer, as transformers reads it."""
    from transformers import AutoTokenizer

    folder.mkdir()
    shutil.copy(model, folder / "tokenizer.model")
    (folder / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "add_eos_token": False,
                "add_prefix_space": False, "legacy": False, "clean_up_tokenization_spaces": False,
                "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "</s>",
            }
        )
    )  # fmt: skip
    return AutoTokenizer.from_pretrained(folder)


def run_watched(order: Order) -> dict[str, Any]:
    """Child: the kit's memory; slower, for being watched."""
    with peak_memory() as peak:
        run_kit(order)
    return {"peak_pss_mib": round(max(peak) / 2**20, 1)}


@contextmanager
def peak_memory() -> Iterator[list[int]]:
    """Samples of what this process and those it starts hold, shared pages counted once."""
    samples: list[int] = []
    over = threading.Event()

    def watch() -> None:
        me = psutil.Process()
        while not over.wait(_SAMPLE_SECONDS):
            samples.append(sum(map(proportional_bytes, [me, *me.children(recursive=True)])))

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield samples
    finally:
        over.set()
        thread.join()


def proportional_bytes(process: psutil.Process) -> int:
    try:
        lines = Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines()
    except OSError:  # ended
        return 0
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("Pss:"))


CHILDREN: dict[str, Callable[[Order], dict[str, Any]]] = {
    "sentencepiece": encode_only,
    "kit": run_kit,
    "datasets": run_datasets,
    "memory": run_watched,
}


def in_child(name: str, order: Order, folder: Path) -> dict[str, Any]:
    """What one of `CHILDREN` returns, in a fresh process and an empty folder."""
    os.sync()
    with tempfile.TemporaryDirectory(dir=folder) as own:
        command = [sys.executable, __file__, name, json.dumps({**order, "folder": own})]
        environment = {**os.environ, "HF_HOME": own, "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(
            command, stdout=subprocess.PIPE, check=True, text=True, env=environment
        )
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


# --- figures -------------------------------------------------------------------------------------


def ratio(
    slow: Sequence[dict[str, Any]], fast: Sequence[dict[str, Any]], key: str = "seconds"
) -> float:
    return median(a[key] / b[key] for a, b in zip(slow, fast, strict=True))


def check_equal(runs: dict[str, list[dict[str, Any]]]) -> None:
    everything = [result for results in runs.values() for result in results]
    if len({result["tokens"] for result in everything}) > 1:
        sys.exit("the three ways do not give equally many tokens")
    if len({result["bin_sha256"] for result in everything if "bin_sha256" in result}) > 1:
        sys.exit("the token files of the kit and of datasets differ")


def summary(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    seconds = [result["seconds"] for result in results]
    return {
        "seconds": round(median(seconds), 3),
        "documents_per_second": round(RECORDS / median(seconds), 1),
        "tokens_per_second": round(results[0]["tokens"] / median(seconds), 1),
        "all_seconds": [round(value, 3) for value in seconds],
        "cpu_seconds": round(median(result["cpu_seconds"] for result in results), 3),
    }


def tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
