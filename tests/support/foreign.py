"""Every reader of foreign bytes, with seeds, and how to spoil them: for the fuzz test and for ``python tools/fuzz.py``."""

import random
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache, partial
from hashlib import sha256
from html.parser import HTMLParser
from pathlib import Path

import torch
from markdown_it import MarkdownIt
from PIL import Image
from safetensors.torch import save

import artaug as aa
from artaug._internal.processes import ProcessIdentity
from artaug._internal.sealed import save_sealed
from artaug._internal.segments import read_segment, write_segment
from artaug._internal.values import from_json, to_json
from artaug.critics.replies import parse_reply
from artaug.critics.wrappers import _CacheEntry
from artaug.errors import ArtAugError
from artaug.evaluation.suites import read_dpg, read_geneval, read_oneig
from artaug.hub.card import _code, _table
from artaug.images.html import CritiqueView
from artaug.lora.baking.checkpoint import CheckpointFile, _indexed_files
from artaug.lora.formats import FLUX1
from artaug.report import write_report
from artaug.review.decisions import read_decisions
from artaug.run.storage.lock import LockOwner
from artaug.run.storage.records import CallRecord, CandidateRecord, ChunkRecord, End
from artaug.run.storage.round_folder import ComparisonRecord
from artaug.run.storage.store import RunCall, RunRecord
from artaug.training import TrainingState
from artaug.training.encoding import EncodedPair

CORPUS = Path(__file__).parents[1] / "corpus"
"""Inputs that found something, one folder a reader: the test reads them all again."""
_TOKENS = (
    *(b'"', b"{", b"}", b"[", b"]", b",", b":", b"\n", b"\r", b"\t", b"\0", b"\xff", b"\\", b"\\u0000", b"\\ud800"),
    *(b"null", b"true", b"NaN", b"-1", b"1e400", b"9" * 5000, b"[" * 5000, b'{"a":' * 2000, b"F32", b"F8_E4M3"),
    *(b"__metadata__", b"<box>((", b"<ref>", b"```json", b"|", b"`", b"<", b"&lt;", b"](", b"![", b"https://a.b"),
)


@dataclass(frozen=True)
class Reader:
    """A reader of foreign bytes: it returns, or raises an error of artaug's own; anything else is a finding."""

    read: Callable[[bytes], object]
    seeds: tuple[bytes, ...]
    unit: bytes
    """What a hostile input repeats: time and memory may grow with its number, and no faster."""

    def check(self, data: bytes) -> None:
        """Read ``data``.

        Raises:
            Exception: of any other kind than artaug's own: a finding.
        """
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with suppress(ArtAugError):
                self.read(data)

    def mutants(self, *, seed: int) -> Iterator[bytes]:
        """Spoiled seeds, without end; the same for the same seed."""
        chance = random.Random(seed)
        while True:
            data = bytearray(chance.choice(self.seeds))
            for _ in range(chance.choice((1, 1, 2, 4, 16))):
                _spoil(data, chance, self.seeds)
            yield bytes(data)


def _spoil(data: bytearray, chance: random.Random, seeds: tuple[bytes, ...]) -> None:
    start, end = sorted((chance.randint(0, len(data)), chance.randint(0, len(data))))
    match chance.randrange(6):
        case 0 if data:
            data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        case 1:
            del data[start:end]
        case 2:
            data[start:start] = data[start : min(end, start + 1000)]
        case 3:
            data[start:end] = chance.choice(_TOKENS)
        case 4:
            data[start:start] = chance.choice(_TOKENS)
        case _:
            other = chance.choice(seeds)
            data[start:] = other[chance.randint(0, len(other)) :]


def _of_file(read: Callable[[Path], object], name: str = "file") -> Callable[[bytes], object]:
    """A reader of files as one of bytes."""

    def read_bytes(data: bytes) -> object:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / name
            path.write_bytes(data)
            return read(path)

    return read_bytes


def _written(write: Callable[[Path], object]) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder) / "file.safetensors")
        return (Path(folder) / "file.safetensors").read_bytes()


def _lora_seeds() -> tuple[bytes, ...]:
    layer = "transformer_blocks.0.attn.to_q"
    lora = aa.LoRA({layer: aa.LowRank(torch.ones(1, 4), torch.ones(4, 1))})
    plain = {
        f"transformer.{layer}.lora_A.weight": torch.ones(1, 4),
        f"transformer.{layer}.lora_B.weight": torch.ones(4, 1),
    }
    return (
        _written(lora.save),
        _written(lambda path: lora.save(path, format=aa.Format.KOHYA, key_map=FLUX1)),
        save(plain, {"lora_adapter_metadata": '{"transformer.r": 1, "transformer.alpha_pattern": {"a.*": 2}}'}),
    )


def _state() -> bytes:
    state = TrainingState(step=1, losses=(0.5,), adapter={"a": {"down": torch.ones(1, 2)}}, optimizer={"state": [1]})
    return _written(lambda path: state.save(path, run_fingerprint={"seed": "0"}))


def _sealed_state(header: bytes) -> object:
    """A checkpoint whose digests are right, and whose optimizer is foreign."""
    text = header.decode("latin-1")
    numbers = {name: torch.zeros(0, dtype=torch.float64) for name in ("losses", "base_scores")}
    fields = {"version": "4", "step": "1", "validations": "[]", "optimizer": text}
    with tempfile.TemporaryDirectory() as folder:
        save_sealed(numbers, Path(folder) / "state", fields)
        return TrainingState.load(Path(folder) / "state", run_fingerprint={})


def _index(path: Path) -> object:
    return _indexed_files(path, {"a.safetensors"})


def _captions(path: Path) -> object:
    _picture().save(path.with_name("a.png"))
    return aa.pairs_from_folder(path.parent, path.parent, captions=path)


def _oneig_questions(path: Path) -> object:
    table = path.with_name("OneIG-Bench.csv")
    table.write_bytes(_ONEIG)
    return read_oneig(table, [path])


def _markdown(data: bytes) -> None:
    text = data.decode("utf-8", "replace")
    assert _markdown_structure(text) == _markdown_structure("a word"), "the text is live Markdown"


def _markdown_structure(text: str) -> list[str]:
    page = f"{_table(('a', 'b'), [(_code(text), 'c')])}\n\n- {_code(text)}: {_code(text)}.\n\nend"
    tokens = MarkdownIt("commonmark").enable("table").parse(page)
    return [inner.type for token in tokens for inner in (token, *(token.children or ()))]


class _Tags(HTMLParser):
    """The tags of a page, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(f"{tag} {sorted(name for name, _ in attrs)}")


def _html(data: bytes) -> None:
    text = data.decode("utf-8", "replace")
    assert _html_tags(text) == _html_tags("a word"), "the text is live HTML"


def _page(data: bytes) -> None:
    text = data.decode("utf-8", "replace")
    assert _page_tags(text) == _page_tags("a word"), "the text is live HTML"


@cache
def _picture() -> Image.Image:
    return Image.new("RGB", (4, 4))


def _page_tags(text: str) -> list[str]:
    """The tags of a report in which every text is foreign: prompts, reasons, the critic's words, names, what stopped it."""
    region = aa.Region(aa.Box(0, 0, 1, 1), f"a {text}")
    pair = aa.ImagePair(
        prompt=f"b {text}", seed=1, before=_picture(), after=_picture(), plan=aa.Plan(f"c {text}", (region,))
    )
    lora = aa.LoRA({"a": aa.LowRank(torch.ones(1, 2), torch.ones(2, 1))})
    round_ = aa.Round(
        number=1,
        attempts=(
            aa.Kept(pair, aa.Verdict(True, f"d {text}", {f"e {text}": 1.0})),
            aa.Dropped(pair, aa.Verdict(False, f"f {text}", {})),
            aa.Skipped(f"g {text}", 2, f"h {text}"),
        ),
        training=aa.TrainingResult(lora=lora, losses=(1.0,), pairs=1, steps=1, seconds=1.0),
        lora=lora,
        seconds={"draw": 1.0},
        gain=None,
        accepted=True,
    )
    result = aa.Enhancement(rounds=(round_,), stop_reason=f"i {text}")
    with tempfile.TemporaryDirectory() as folder:
        about = {f"j {text}": f"k {text}"}
        path = write_report(Path(folder) / "page.html", result=result, title=f"l {text}", about=about)
        parser = _Tags()
        parser.feed(path.read_text(encoding="utf-8"))
    return parser.tags


def _html_tags(text: str) -> list[str]:
    critique = aa.Critique((aa.Suggestion(aa.Box(0, 0, 1, 1), f"a {text}", f"b {text}"),), f"c {text}", (f"d {text}",))
    parser = _Tags()
    parser.feed(CritiqueView(Image.new("RGB", (4, 4)), critique, f"e {text}")._repr_html_())
    return parser.tags


_DPG = (
    b"item_id,text,proposition_id,dependency,tuple,question_natural_language\n"
    b'a,a pear,1,0,entity - whole (pear),"Is there a pear?"\na,a pear,2,1,attribute (green),Is it green?\n'
)
_ONEIG = b"category,id,prompt_en\nGeneral_Object,000,a pear\n"
_CRITIQUE = aa.Critique((aa.Suggestion(aa.Box(0, 0, 0.5, 1), "a lamp", "dark"),), "fine")
_REGION = aa.Plan("a hall", (aa.Region(aa.Box(0, 0, 0.5, 1), "a lamp"),))
_CHUNK = ChunkRecord(
    (CandidateRecord(0, 0, "a hall", 7, "ab" * 32, _CRITIQUE, _REGION, "cd" * 32, (64, 64)),),
    (End(0, 0, aa.Verdict(True, "it rose", {"Chroma gain": 0.1})),),
    (CallRecord("draw", ((0, 0),), ("ef" * 16,), ("ab" * 32,), None, 1),),
    {"draw": 1.5},
)
_RUN = RunRecord(1, (RunCall("2026-01-01T00:00:00+00:00", 1, "ab" * 32, {"seed": "0"}, {"torch": "2"}),))
_OWNER = LockOwner(
    ProcessIdentity("host", 1, "boot", "", "5"), "token", datetime(2026, 1, 1, tzinfo=UTC), datetime.now(UTC), 0, 30.0
)
_COMPARISON = {
    "rows": [],
    "prompts": ["a hall", "a pond"],
    "seeds": [1, 2],
    "scores": {"base": {"Chroma": [0.5, None]}, "after": {"Chroma": [0.5, 0.6]}},
    "guardrails": [],
    "failures": [],
    "verdicts": {"after": ""},
    "synthesizers": {"base": "a", "after": "b"},
}
_WORDS = (b"a plain word", b"`code` | ![x](https://a.b) <img src=x> @me", b"# a\n\n- b\n\n---\n", b"\\`| \\| &#35;")
READERS = {
    "lora": Reader(_of_file(aa.LoRA.load, "a.safetensors"), _lora_seeds(), b'"a.lora_A.weight":{},'),
    "checkpoint": Reader(
        _of_file(lambda path: TrainingState.load(path, run_fingerprint={"seed": "0"})), (_state(),), b'"a":{},'
    ),
    "sealed checkpoint": Reader(
        _sealed_state,
        (b'{"pairs": [["a", {"items": [1, 2.5, null], "tuple": true}]]}', b'{"__tensor__": "losses"}', b"null"),
        b"[1],",
    ),
    "latent cache": Reader(
        _of_file(lambda path: EncodedPair(path, {}, aa.Plan("")).load()),
        (_written(lambda path: save_sealed({"before": torch.ones(2), "after": torch.zeros(2)}, path, {})),),
        b'"a":{},',
    ),
    "segment": Reader(
        _of_file(lambda path: read_segment(path, ChunkRecord, what="chunk", remedy="")),
        (_written(lambda path: write_segment(path, _CHUNK, what="chunk", remedy="")),),
        b'"members":[[0,0]],',
    ),
    # What a digest protects, should another program have written the digest.
    "critic cache": Reader(
        partial(from_json, _CacheEntry), (to_json(_CacheEntry("a hall", _CRITIQUE)).encode(),), b"[1],"
    ),
    "chunk": Reader(partial(from_json, ChunkRecord), (to_json(_CHUNK).encode(),), b'"members":[[0,0]],'),
    "run": Reader(partial(from_json, RunRecord), (to_json(_RUN).encode(),), b'"a":"b",'),
    "owner": Reader(partial(from_json, LockOwner), (to_json(_OWNER).encode(),), b'"pid":1,'),
    "comparison": Reader(
        lambda data: aa.Comparison.from_dict(from_json(ComparisonRecord, data).comparison),
        (to_json(ComparisonRecord(_COMPARISON, {"base": ()})).encode(),),
        b'"a":[0.5],',
    ),
    "weights": Reader(
        _of_file(CheckpointFile.read), (save({"a.weight": torch.ones(2, 2)}, {"format": "pt"}),), b'"a":{},'
    ),
    "index": Reader(_of_file(_index), (b'{"weight_map": {"a": "a.safetensors"}}',), b'"a":{},'),
    "reply": Reader(
        lambda data: parse_reply(data.decode("utf-8", "replace"), size=(64, 64), coordinates="thousandths"),
        (
            b'```json\n[{"bbox_2d": [1, 2, 500, 999], "prompt": "a lamp", "reason": "dark"}]\n```',
            b"<ref>a lamp</ref><box>((1,2),(500,999))</box> and <points coords='1 2'>",
            b'{"suggestions": [{"box": {"left": 0.1, "top": 0, "right": 0.5, "bottom": 1}, "prompt": "a door"}]}',
        ),
        b"<box>((((",
    ),
    "decisions": Reader(
        _of_file(read_decisions),
        (b'{"pair": "ab", "keep": true, "prompt": "x", "seed": 1}\n{"pair": "ab", "keep": null}\n',),
        b'{"pair": "ab", "keep": true}\n',
    ),
    "GenEval": Reader(
        _of_file(read_geneval, "a.jsonl"),
        (
            b'{"tag": "counting", "prompt": "two pears", "include": [{"class": "pear", "count": 2}], "exclude": []}\n',
            b'{"tag": "x", "prompt": "p", "include": [{"class": "b", "count": 1, "position": ["left of", 0]}]}\n',
        ),
        b'{"tag": "x", "prompt": "p", "include": [{"class": "a", "count": 1}]}\n',
    ),
    "DPG-Bench": Reader(_of_file(read_dpg, "a.csv"), (_DPG,), b"a,a pear,3,1,entity (x),Is it?\n"),
    "OneIG prompts": Reader(
        _of_file(lambda path: read_oneig(path, [])),
        (_ONEIG, _ONEIG.replace(b"en", b"cn")),
        b"General_Object,1,a pear\n",
    ),
    "OneIG questions": Reader(
        _of_file(_oneig_questions, "object.json"),
        (
            b'{"000": {"question": {"1": "Is there a pear?", "2": "Is it green?"}, "dependency": {"1": [0], "2": [1]}}}',
            b'{"000": {"question": "{\\"1\\": \\"a pear?\\"}", "dependency": "{\\"1\\": [0]}"}}',
        ),
        b'"1":{},',
    ),
    "picture": Reader(
        _of_file(lambda path: aa.ImageFile.open(path).load()),
        tuple(_written(lambda path, kind=kind: _picture().save(path, kind, lossless=True)) for kind in ("webp", "png")),
        b"IDAT",
    ),
    "pairs": Reader(
        _of_file(lambda path: aa.pairs_from_folder(path.parent), "metadata.jsonl"),
        (
            b'{"before_file_name": "a.png", "after_file_name": "metadata.jsonl", "prompt": "p", "seed": 1}\n',
            b'{"before_file_name": "a", "after_file_name": "b", "prompt": "p", "plan": "{\\"prompt\\": \\"p\\"}"}\n',
        ),
        b'{"before_file_name": "a.png", "after_file_name": "a.png", "prompt": "p"}\n',
    ),
    "captions": Reader(_of_file(_captions, "captions.csv"), (b"file_name,text\na.png,an ant\n",), b"a.png,an ant\n"),
    "prompts.txt": Reader(_of_file(aa.PromptSet.read, "a.txt"), (b"a pear\na plum\n",), b"a pear\n"),
    "prompts.csv": Reader(_of_file(aa.PromptSet.read, "a.csv"), (b'Prompts,Category\n"a, b",x\nc,y\n',), b"a pear,x\n"),
    "prompts.tsv": Reader(_of_file(aa.PromptSet.read, "a.tsv"), (b"Prompt\tCategory\na\tb\n",), b"a pear\tx\n"),
    "prompts.json": Reader(
        _of_file(aa.PromptSet.read, "a.json"), (b'["a pear", {"prompt": "b", "category": "c"}]',), b'"a pear",'
    ),
    "card": Reader(_markdown, _WORDS, b"`|<![a](b)"),
    "critique's view": Reader(_html, _WORDS, b"<b>&'\""),
    "report": Reader(_page, _WORDS, b"<b>&'\""),
}
"""All of them, by name."""


def keep(name: str, data: bytes) -> Path:
    """Add an input to the corpus of a reader."""
    path = CORPUS / name / f"{sha256(data).hexdigest()[:16]}.bin"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path
