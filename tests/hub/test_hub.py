"""Pushing to and pulling from a Hub on this machine through the real client: the files, the card and the errors."""

import dataclasses
import logging
import traceback

import pytest
import torch
from huggingface_hub import ModelCard
from hypothesis import given, settings
from markdown_it import MarkdownIt
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save

import artaug as aa
from artaug import hub
from artaug.errors import HubError, InvalidValueError, LoRAError, NothingToLearnError
from support.hub_server import READER, WRITER, hub_server
from support.strategies import prompts

pytestmark = [
    pytest.mark.loopback,
    pytest.mark.filterwarnings("ignore:Use 'content=<...>' to upload:DeprecationWarning"),  # huggingface_hub's own call
]

PEFT_FILE, KOHYA_FILE = "pytorch_lora_weights.safetensors", "taste_comfyui_kohya.safetensors"
BASE = hub.Base("lab/base", "0123abc", "other", "lab-non-commercial", "https://lab.example/licence")
SECRET = "a prompt that stays private"


@pytest.fixture
def server(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)  # which has a protocol of its own
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "no token"))
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _: None)
    monkeypatch.setenv("HF_XET_CACHE", str(tmp_path / "chunks"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with hub_server() as running:
        yield running


def flux_lora(*, rank=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    names = [f"transformer_blocks.0.attn.to_{part}" for part in "qkv"]
    return aa.LoRA(
        {
            name: aa.LowRank(torch.randn(rank, 8, generator=generator), torch.randn(8, rank, generator=generator))
            for name in names
        }
        | {"single_transformer_blocks.0.proj_out": aa.LowRank(torch.ones(rank, 40), torch.ones(8, rank))}
    )


def run(*, accepted=True, gain=None):
    skipped = tuple(aa.Skipped(SECRET, seed, f"too dark: {SECRET}") for seed in range(5))
    training = aa.TrainingResult(lora=flux_lora(), losses=(0.5, 0.25), pairs=3, steps=2, seconds=1.0)
    round_ = aa.Round(
        number=1, attempts=skipped, training=training, lora=flux_lora(), seconds={}, gain=gain, accepted=accepted
    )
    return aa.Enhancement(rounds=(round_,), stop_reason="its one round ran")


def compared():
    row = aa.ScoreRow("Chroma|x", "round 1", 0.5, 0.6, 0.1, 0.05, 0.15, 0.8, 64, filtered_by=True, p_value=0.01)
    arm = aa.Arm(synthesizer="DiffusersSynthesizer()", scores={}, images=())
    return aa.Comparison(
        rows=(row,), prompts=(SECRET,) * 64, seeds=tuple(range(64)), base=arm, candidates={"round 1": arm}
    )


def push(server, result=None, repo="me/taste", **options):
    return hub.push(result or flux_lora(), repo, **{"endpoint": server.url, "token": WRITER, **options})


def files(server, repo="me/taste", *, branch="main"):
    return server.repositories[repo].branches[branch][-1]


def test_a_push_is_one_commit_with_both_files_and_the_card(server):
    pushed = push(server, message="first")

    repository = server.repositories["me/taste"]
    assert repository.messages == ["first"]
    assert files(server).keys() == {"README.md", PEFT_FILE, KOHYA_FILE} == {file.path for file in pushed.files}
    assert all(len(files(server)[file.path]) == file.size for file in pushed.files)
    assert files(server)["README.md"].decode() == pushed.card
    assert pushed.commit.startswith(f"{server.url}/me/taste/commit/")


def test_a_pulled_lora_is_the_pushed_one(server):
    lora = flux_lora()
    push(server, lora)

    for file in (None, KOHYA_FILE):
        pulled = hub.pull("me/taste", file=file, endpoint=server.url, token=READER)
        assert pulled.layers.keys() == lora.layers.keys()
        for name, layer in pulled.layers.items():
            torch.testing.assert_close(layer.delta(), lora.layers[name].delta())


def test_a_dry_run_describes_the_files_and_sends_no_request(server):
    planned = push(server, run(), base=BASE, comparison=compared(), dry_run=True)
    requests = len(server.requests)
    pushed = push(server, run(), base=BASE, comparison=compared())

    assert requests == 0
    assert planned.commit is None
    assert (planned.card, planned.files) == (pushed.card, pushed.files)
    assert str(planned).startswith("would push to me/taste (public, main):\n")
    assert str(pushed).startswith("pushed to me/taste (public, main), http")
    for shown in (str(planned), planned._repr_html_()):
        assert all(file.path in shown and file.sha256 in shown for file in planned.files)


def test_prompts_and_images_of_the_run_are_not_uploaded(server):
    push(server, run(), base=BASE, comparison=compared(), about={"critic": "Critic()"})

    assert not any(SECRET.encode() in content for content in files(server).values())
    assert not any(path.endswith(".png") for path in files(server))


def test_samples_are_uploaded_and_shown_on_the_card(server):
    picture = Image.new("RGB", (8, 8), "teal")
    push(
        server,
        samples=[hub.Sample(prompt="a <hill>", image=picture, before=picture), hub.Sample(prompt="b", image=picture)],
    )

    assert {path for path in files(server) if path.endswith(".png")} == {
        "images/sample-1.png",
        "images/sample-1-before.png",
        "images/sample-2.png",
    }
    card = ModelCard(files(server)["README.md"].decode())
    assert card.data.widget == [
        {"text": "a <hill>", "output": {"url": "images/sample-1.png"}},
        {"text": "b", "output": {"url": "images/sample-2.png"}},
    ]
    assert "<Gallery />" in card.text


def test_the_card_holds_the_metadata_and_the_facts_of_the_run(server):
    gain = aa.ScoreRow("Exposure", "after", 0.1, 0.2, 0.1, 0.05, 0.15, 0.9, 32)
    pushed = push(
        server,
        run(gain=gain),
        base=BASE,
        comparison=compared(),
        multiplier=0.8,
        about={"critic": "a `critic`", "trainer": aa.DifferentialLoRATrainer(rank=4)},
    )

    card = ModelCard(pushed.card)
    assert (card.data.base_model, card.data.license) == ("lab/base", "other")
    assert (card.data.license_name, card.data.license_link) == ("lab-non-commercial", "https://lab.example/licence")
    assert {"lora", "diffusers", "template:sd-lora", "artaug"} <= set(card.data.tags)
    assert (card.data.library_name, card.data.pipeline_tag) == ("diffusers", "text-to-image")
    for text in (
        'DiffusionPipeline.from_pretrained("lab/base", revision="0123abc", dtype=torch.bfloat16)',
        'pipeline.set_adapters("artaug", 0.8)',
        f"put `{KOHYA_FILE}` where they look for LoRAs",
        "| 1 | 5 | 3 | 2 | `Exposure` +0.1 (+0.05 to +0.15, 32) | yes |",
        "- `critic`: `` a `critic` ``",
        f"trained with artaug {aa.__version__} on the model's own pictures",
        "DifferentialLoRATrainer(rank=4)",
        "| `Chroma\\|x` * | `round 1` | 64 | 0.500 | 0.600 | +0.100 | +0.050 to +0.150 | 80.0% | 0.01 |",
        "no evidence of a gain: the training pairs were filtered by it",
        "comes under its licence: [`lab-non-commercial`](https://lab.example/licence)",
    ):
        assert text in card.text


def test_the_files_hold_their_provenance(server, tmp_path):
    push(server, base=BASE)

    for path in (PEFT_FILE, KOHYA_FILE):
        (tmp_path / path).write_bytes(files(server)[path])
        with safe_open(tmp_path / path, framework="pt") as file:
            header = file.metadata()
        assert (header["artaug.base_model"], header["artaug.base_model_revision"]) == ("lab/base", "0123abc")


def test_the_card_says_if_there_is_no_kohya_file(server):
    names = ("down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q", "down_blocks.0.attentions.0.proj_in")
    unet = aa.LoRA({name: aa.LowRank(torch.ones(1, 4), torch.ones(4, 1)) for name in names})

    pushed = push(server, unet)

    assert {file.path for file in pushed.files} == {PEFT_FILE, "README.md"}
    assert "There is no file for programs that read kohya's names only: " in pushed.card


def test_the_card_says_if_the_base_or_its_licence_is_unknown(server):
    assert "The base model was not named" in push(server, dry_run=True).card
    assert "states no licence that could be passed on" in push(server, base=hub.Base("lab/x"), dry_run=True).card


def test_the_base_is_read_from_its_own_card(server):
    text = "---\nlicense: other\nlicense_name: lab-nc\nlicense_link: LICENSE.md\n---\n# base\n"
    server.add("lab/base", **{"README.md": text.encode()})

    found = hub.base_of("lab/base", endpoint=server.url, token=READER)

    assert (found.repo, found.license, found.license_name) == ("lab/base", "other", "lab-nc")
    assert found.license_link == f"{server.url}/lab/base/blob/{found.revision}/LICENSE.md"
    assert len(found.revision) == 40


@pytest.mark.parametrize(
    "repo",
    ["/home/me/flux", "./flux", "C:\\models\\flux", "", "a/b/c", "FLUX.1-dev", "lab/a b", "lab/..", "lab/x\n# y"],
)
def test_a_base_that_the_hub_would_refuse_is_refused_when_it_is_made(repo):
    with pytest.raises(InvalidValueError, match="owner/name"):
        hub.Base(repo)


@pytest.mark.parametrize("license_id", ["Apache 2.0", "", "apache-2.0\n# heading", "-", "MIT"])
def test_a_licence_outside_the_hubs_words_is_refused_when_it_is_made(license_id):
    with pytest.raises(InvalidValueError, match="identifier"):
        hub.Base("lab/x", license=license_id)


@pytest.mark.parametrize(
    "license_id", ["apache-2.0", "llama3.1", "creativeml-openrail-m", "fair-noncommercial-research-license"]
)
def test_the_hubs_own_identifiers_of_licences_are_taken(license_id):
    assert hub.Base("lab/x", license=license_id).license == license_id


def test_a_base_with_several_licences_names_them_all(server):
    server.add("lab/base", **{"README.md": b"---\nlicense: [mit, apache-2.0]\n---\n# base\n"})
    found = hub.base_of("lab/base", endpoint=server.url, token=READER)
    assert (found.license, found.license_name) == ("other", "mit, apache-2.0")


def test_a_card_that_the_hub_refuses_leaves_no_repository(server):
    server.refuse_cards = True
    with pytest.raises(HubError, match="base_model"):
        push(server)
    assert server.repositories == {}


def test_a_base_without_a_card_has_no_licence(server):
    server.add("lab/base")
    assert hub.base_of("lab/base", endpoint=server.url, token=READER).license is None


def test_a_second_push_replaces_the_files_and_keeps_the_history(server):
    push(server, flux_lora(seed=0))
    server.repositories["me/taste"].branches["main"][-1]["notes.txt"] = b"mine"
    push(server, flux_lora(seed=1))

    commits = server.repositories["me/taste"].branches["main"]
    assert len(commits) == 3
    assert commits[1][PEFT_FILE] != commits[2][PEFT_FILE]
    assert commits[2]["notes.txt"] == b"mine"


def test_files_of_other_people_are_replaced_only_with_overwrite(server):
    server.add("me/taste", **{PEFT_FILE: b"somebody else's", "README.md": b"# mine"})

    with pytest.raises(
        HubError, match=r"holds \['README\.md', 'pytorch_lora_weights\.safetensors'\], which artaug has not"
    ):
        push(server)
    assert files(server)[PEFT_FILE] == b"somebody else's"
    push(server, overwrite=True)
    assert files(server)[PEFT_FILE] != b"somebody else's"


def test_files_of_other_names_stay_beside_those_of_a_push(server):
    server.add("me/taste", **{".gitattributes": b"*.safetensors filter=lfs"})
    push(server)
    assert {".gitattributes", PEFT_FILE} <= files(server).keys()


def test_a_private_push_makes_a_private_repository(server):
    push(server, private=True)
    assert server.repositories["me/taste"].private
    with pytest.raises(HubError, match="Log in with `hf auth login`"):
        hub.pull("me/taste", endpoint=server.url, token=None)


def test_a_private_push_to_a_public_repository_is_refused(server):
    server.add("me/taste")
    with pytest.raises(HubError, match="is public, and private=True was given"):
        push(server, private=True)
    assert not files(server)


def test_a_push_to_a_branch_creates_it_and_leaves_main(server):
    server.add("me/taste", **{"notes.txt": b"mine"})
    pushed = push(server, revision="second")

    assert pushed.revision == "second"
    assert files(server).keys() == {"notes.txt"}
    assert PEFT_FILE in files(server, branch="second")
    pulled = hub.pull("me/taste", revision="second", endpoint=server.url, token=READER)
    assert pulled.layers.keys() == flux_lora().layers.keys()


def test_an_upload_that_breaks_off_is_retried(server):
    server.dropped_uploads = 2
    push(server)
    assert {PEFT_FILE, KOHYA_FILE} <= files(server).keys()
    assert server.dropped_uploads == 0


@pytest.mark.parametrize("dropped_uploads", [0, 1], ids=["", "breaking off"])
def test_a_push_works_with_the_xet_protocol(dropped_uploads, server, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", False)
    server.dropped_uploads = dropped_uploads

    pushed = push(server)

    sent = {file.path: file.sha256 for file in pushed.files}
    assert files(server)[PEFT_FILE] == f"chunks of {sent[PEFT_FILE]}".encode()
    assert files(server)[KOHYA_FILE] == f"chunks of {sent[KOHYA_FILE]}".encode()
    assert server.xorbs
    assert not server.objects


def test_an_error_of_the_xet_protocol_is_a_hub_error(server, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", False)
    server.disable_xet = True

    with pytest.raises(HubError, match=r"pushing to 'me/taste' failed: .*nothing was uploaded in part") as refused:
        push(server)
    assert refused.value.__cause__ is None
    assert not files(server)


def test_an_upload_that_always_breaks_off_leaves_no_commit_and_can_be_repeated(server):
    server.dropped_uploads = 1000
    with pytest.raises(HubError, match=r"pushing to 'me/taste' failed: .*nothing was uploaded in part: try again"):
        push(server)
    assert not files(server)
    assert not server.repositories["me/taste"].messages

    server.dropped_uploads = 0
    push(server)
    assert {PEFT_FILE, KOHYA_FILE, "README.md"} <= files(server).keys()


def test_a_push_fails_if_somebody_commits_meanwhile(server):
    push(server)
    server.before_commit = lambda repository: repository.branches["main"].append({"README.md": b"somebody else's"})

    with pytest.raises(HubError, match="Someone else has committed meanwhile") as refused:
        push(server, flux_lora(seed=1))
    assert refused.value.status == 412
    assert files(server) == {"README.md": b"somebody else's"}


@pytest.mark.parametrize(
    ("repo", "token", "status", "advice"),
    [
        pytest.param("me/taste", "hf_wrong_0123456789", 401, "Log in with `hf auth login`", id="wrong token"),
        pytest.param("me/taste", READER, 403, "use one with write access", id="reading only"),
        pytest.param("you/taste", WRITER, 403, "use one with write access", id="another account"),
    ],
)
@pytest.mark.parametrize("echo", [False, True], ids=["", "echoing"])
def test_a_refusal_gives_advice_and_does_not_hold_the_token(repo, token, status, advice, echo, server, caplog, capfd):
    server.echo_headers = echo
    with caplog.at_level(logging.INFO), pytest.raises(HubError, match=advice) as refused:
        push(server, repo=repo, token=token)

    assert refused.value.status == status
    assert refused.value.__cause__ is None
    output = "".join(traceback.format_exception(refused.value)) + caplog.text + "".join(capfd.readouterr())
    assert token not in output
    assert not server.repositories


def test_a_push_does_not_hold_the_token(server, caplog, capfd):
    with caplog.at_level(logging.DEBUG):
        pushed = push(server)
    shown = repr(pushed) + str(pushed) + pushed._repr_html_() + caplog.text + "".join(capfd.readouterr())
    assert WRITER not in shown
    assert not any(WRITER.encode() in content for content in files(server).values())


def test_a_hub_that_cannot_be_reached_is_an_error(server):
    with pytest.raises(HubError, match=r"pushing to 'me/taste' failed"):
        push(server, endpoint="http://127.0.0.1:9")


@pytest.mark.parametrize("name", ["taste", "me/", "a/b/c", "me/ta ste", ""])
def test_an_invalid_repository_name_is_an_error_before_any_request(name, server):
    for call in (push, lambda server, repo: hub.pull(repo, endpoint=server.url)):
        with pytest.raises(InvalidValueError, match="is no name of a repository"):
            call(server, repo=name)
    assert not server.requests


@pytest.mark.parametrize("multiplier", [float("nan"), float("inf")])
def test_a_strength_that_is_none_is_an_error(multiplier, server):
    with pytest.raises(InvalidValueError, match="need a finite number"):
        push(server, multiplier=multiplier)


def test_a_run_without_an_accepted_round_is_not_pushed(server):
    with pytest.raises(NothingToLearnError, match="no round helped"):
        push(server, run(accepted=False))
    assert not server.requests


@pytest.mark.parametrize(
    ("held", "file", "message"),
    [
        pytest.param({"model.bin": b"x"}, None, r"has no safetensors file, and artaug reads no other", id="pickled"),
        pytest.param({"a.safetensors": b"x"}, "model.bin", r"has no safetensors file 'model\.bin'", id="asked for"),
        pytest.param({"a.safetensors": b"x", "b.safetensors": b"y"}, None, r"Choose one: file='a\.saf", id="several"),
    ],
)
def test_a_repository_without_one_file_to_pull_is_an_error(held, file, message, server):
    server.add("me/taste", **held)
    with pytest.raises(HubError, match=message):
        hub.pull("me/taste", file=file, endpoint=server.url, token=READER)


@pytest.mark.parametrize("folder", ["", "adapters/first/"])
def test_an_adapter_of_peft_is_pulled_with_the_strength_of_its_config(folder, server):
    layer = aa.LowRank(torch.randn(2, 8), torch.randn(8, 2))
    key = "base_model.model.transformer_blocks.0.attn.to_q"
    held = {
        f"{folder}adapter_model.safetensors": save(
            {f"{key}.lora_A.weight": layer.down, f"{key}.lora_B.weight": layer.up}
        ),
        f"{folder}adapter_config.json": b'{"peft_type": "LORA", "r": 2, "lora_alpha": 16, "use_rslora": false}',
    }
    server.add("me/peft", **held)
    pulled = hub.pull("me/peft", endpoint=server.url, token=READER)
    torch.testing.assert_close(pulled.layers["transformer_blocks.0.attn.to_q"].delta(), 8 * layer.delta())


def test_what_is_not_there_cannot_be_pulled(server):
    with pytest.raises(HubError, match=r"pulling 'me/gone' failed: .*Check the name and the revision"):
        hub.pull("me/gone", endpoint=server.url, token=READER)
    push(server)
    with pytest.raises(HubError, match=r"Check the name and the revision") as refused:
        hub.pull("me/taste", revision="gone", endpoint=server.url, token=READER)
    assert refused.value.status == 404


def test_a_file_damaged_on_the_way_is_an_error(server):
    push(server)
    server.corrupt_downloads = True
    with pytest.raises(HubError, match="and the Hub says"):
        hub.pull("me/taste", endpoint=server.url, token=READER)


def test_a_safetensors_file_that_is_no_lora_is_an_error(server):
    server.add("me/taste", **{"a.safetensors": b"x" * 100})
    with pytest.raises(LoRAError, match="is not a LoRA file"):
        hub.pull("me/taste", endpoint=server.url, token=READER)


# --- what others said ---------------------------------------------------------------------------------------------------

MARKUP = (
    "![x](https://evil.example/pixel.png) [Get the fixed weights](https://evil.example/w)",
    "https://evil.example www.evil.example me@evil.example @someone #1",
    "<img src=x onerror=alert(1)> <!-- <script>",
    "a\n\n# A heading\n\n---\n\n- item\n\n| a | b |\n|---|---|",
    "a\r\rb\u2028c\x85d\x0be\x00f",
    "`code` ``more`` ``` | \\| \\",
    "`", "```\n# out of the fence\n", "*a* _b_ ~~c~~ $x$ &lt; &#35;", "a\n---\nlicense: mit", ": - {a: b} 'q' \"",
)  # fmt: skip


def card_of(text):
    """The card of a push in which everything that is not artaug's own is ``text``."""
    row = aa.ScoreRow(text, text, 0.5, 0.6, 0.1, 0.05, 0.15, 0.8, 64, filtered_by=True, p_value=0.01)
    arm = aa.Arm(synthesizer=text, scores={}, images=())
    failure = aa.ScoringFailure(text, text, text, 0, text)
    comparison = aa.Comparison(
        rows=(row,), prompts=(text,), seeds=(0,), base=arm, candidates={text: arm}, failures=(failure,)
    )
    return hub.push(
        dataclasses.replace(run(gain=row), stop_reason=text),
        "me/taste",
        base=hub.Base("lab/base", text, "other", text, f"https://lab.example/{text}"),
        comparison=comparison,
        about={text: text},
        samples=[hub.Sample(prompt=text, image=Image.new("RGB", (8, 8)))],
        dry_run=True,
    ).card


def structure(card):
    """What the body of a card is made of, by a reader of Markdown: everything but the text in code and of headings."""
    body = card.partition("\n---\n")[2]
    tokens = MarkdownIt("commonmark").enable("table").parse(body)
    flat = [inner for token in tokens for inner in (token, *(token.children or ()))]
    texts = [token.content for token in flat if token.type == "text"]
    links = [token.attrs["href"].partition("lab.example/")[:2] for token in flat if token.type == "link_open"]
    return [token.type for token in flat if token.type != "inline"], texts, links


@pytest.mark.parametrize("text", MARKUP)
def test_nothing_that_others_said_is_live_on_the_card(text):
    assert structure(card_of(text)) == structure(card_of("a plain word"))


@settings(max_examples=30)
@given(text=prompts.filter(str.strip))
def test_no_text_is_live_on_the_card(text):
    assert structure(card_of(text)) == structure(card_of("a plain word"))


@pytest.mark.parametrize("text", MARKUP)
def test_the_header_of_the_card_holds_what_it_was_given(text):
    data = ModelCard(card_of(text)).data
    assert (data.base_model, data.license) == ("lab/base", "other")
    assert data.widget[0]["output"] == {"url": "images/sample-1.png"}
    assert data.license_link.startswith("https://lab.example/")
    assert set(data.to_dict()) == set(ModelCard(card_of("a plain word")).data.to_dict())


def test_reasons_stay_off_the_card():
    card = card_of("the words of a server")
    assert "It ended because" not in card
    stopped = dataclasses.replace(run(), stop_reason="SECRET REASON")
    assert "SECRET REASON" not in hub.push(stopped, "me/taste", dry_run=True).card


@pytest.mark.parametrize("link", ["javascript:alert(1)", "data:text/html,x", "//evil.example", "LICENSE.md"])
def test_a_licence_link_that_is_no_page_of_the_web_is_no_link(link):
    card = hub.push(flux_lora(), "me/taste", base=hub.Base("lab/x", None, "other", "own", link), dry_run=True).card
    assert link not in card
