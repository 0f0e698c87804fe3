"""The fences that need an account on the Hub are run as they are printed, in turn, on a Hub on this machine."""

import pytest

import artaug as aa
from artaug import hub, playground
from artaug.scorers import Chroma
from artaug.testing import FixedCritic
from support.hub_server import WRITER, hub_server
from support.printed import printed_in, run

pytestmark = pytest.mark.loopback

TEST = "tests/hub/test_hub_page.py"
CARD = b"---\nlicense: other\nlicense_name: flux-1-dev-non-commercial-license\nlicense_link: LICENSE.md\n---\n"


@pytest.fixture
def server(monkeypatch, tmp_path):
    """The Hub of a user who is logged in; it has the base that the page names."""
    with hub_server() as running:
        running.add("black-forest-labs/FLUX.1-dev", **{"README.md": CARD})
        for name, setting in {
            "ENDPOINT": running.url,  # this and the next one are what the variable HF_ENDPOINT sets
            "HUGGINGFACE_CO_URL_TEMPLATE": running.url + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_CACHE": str(tmp_path / "cache"),
            "HF_HUB_DISABLE_XET": True,  # of which the server stores chunks only
        }.items():
            monkeypatch.setattr(f"huggingface_hub.constants.{name}", setting)
        monkeypatch.setenv("HF_TOKEN", WRITER)
        yield running


@pytest.mark.filterwarnings("ignore:Use 'content=<...>' to upload:DeprecationWarning")  # huggingface_hub's own call
def test_the_page_shares_a_run_and_its_pairs_and_pulls_its_lora(server, monkeypatch, tmp_path):
    pytest.importorskip("pyarrow")
    monkeypatch.chdir(tmp_path)
    advice = aa.Critique((aa.Suggestion(aa.Box(0, 0, 0.5, 1), "a vivid red cone"),))
    prompt = "a red cone on the left at night"
    synthesizer = playground.synthesizer(guide=aa.RegionalAttention(), steps=2)
    keep, trainer = aa.Gain(Chroma(), at_least=-1.0), aa.DifferentialLoRATrainer(rank=2, steps=2, batch_size=1)
    critic = FixedCritic(advice)
    result = aa.enhance(
        [prompt],
        synthesizer=synthesizer,
        critic=critic,
        planner=aa.GreedyPlanner(),
        keep=keep,
        trainer=trainer,
        rounds=1,
        seed=0,
        progress=False,
        store="runs/first",
    )
    (pair,) = aa.Run.open("runs/first").pairs()
    names = {
        "aa": aa,
        "hub": hub,
        "result": result,
        "synthesizer": synthesizer,
        "critic": critic,
        "keep": keep,
        "trainer": trainer,
        "before": pair.before,
        "after": pair.after,
        "comparison": aa.compare(
            synthesizer,
            {"enhanced": synthesizer.with_lora(result.lora)},
            playground.prompts(2, seed=0, held_out=True),
            scorers=[Chroma()],
            progress=False,
        ),
    }
    (dry_run,) = printed_in("docs/flux.md", TEST)
    push = run(dry_run, {}, **names)["push"]
    assert push.commit is None
    assert "me/flux-artaug" not in server.repositories
    assert "flux-1-dev-non-commercial-license" in push.card
    assert "Chroma" in push.card  # of the comparison
    fences = printed_in("docs/hub.md", TEST)
    for code in fences:
        names = run(code, {}, **names)

    assert len(fences) == 3
    assert server.repositories["me/flux-artaug"].private
    assert server.repositories["me/taste-pairs"].private
    (shared,) = server.repositories["me/flux-artaug"].branches["main"][1:]
    assert {"flux-artaug_comfyui_kohya.safetensors", "images/sample-1-before.png"} < shared.keys()
    assert b"flux-1-dev-non-commercial-license" in shared["README.md"]
    assert names["lora"].layers.keys() == result.lora.layers.keys()
    assert names["enhanced"].synthesize(aa.Plan(prompt), seed=0).size == (64, 64)
