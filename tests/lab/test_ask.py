"""The page one can question: the exported graph does what the model and this project's own interventions do.

A tiny model in `make test`. By command, `pytest tests/lab/test_ask.py -m long`: the shipped officer's decisions on
1,000 applications in float16 and in int8. Needs the extra `web`.
"""

import json

import numpy as np
import pytest
import tiny
import torch

pytest.importorskip("onnxruntime", reason="ASK TESTS SKIPPED: pip install -r requirements-web.lock")

from glassbox_utils.attention.ablation import HeadMeans, ablate_heads
from glassbox_utils.core.interventions import capture
from glassbox_utils.core.models import Site, load_model, wrap_model
from glassbox_utils.core.text import tokenize
from glassbox_utils.decisions import loans, mitigation, reading, study
from glassbox_utils.decisions.decision import merit, render
from glassbox_utils.decisions.mitigation import Edit, Gate
from glassbox_utils.decisions.training import save_adapter, with_lora
from glassbox_utils.lab import ask, ask_graph
from glassbox_utils.lab.ask_graph import AskError
from glassbox_utils.steering import ControlVector, Direction, steer

TEXT = "Emma; teacher; East Mill; income 42k\nDecision:"


@pytest.fixture(scope="module")
def llama():
    return wrap_model(tiny.build("llama"), tiny.tokenizer(), "tiny")


@pytest.fixture(scope="module")
def run(llama):
    return ask.opened(ask_graph.build(llama, None, "float32").SerializeToString())


@pytest.fixture(scope="module")
def ids(llama):
    return tokenize(llama, [TEXT])


def fed(llama, ids, **given):
    return ask.neutral(llama) | {"ids": ids.input_ids[0].numpy().astype(np.int32)} | given


def near(found, wanted, limit=2e-4):
    wanted = wanted.detach().numpy()
    assert found.shape == wanted.shape
    assert np.abs(found - wanted).max() <= limit * max(1, np.abs(wanted).max())


def final(model, batch):
    with torch.no_grad():
        return model.hf(**batch.inputs).logits[0, -1]


def test_the_graph_is_valid_onnx(llama):
    import onnx

    onnx.checker.check_model(ask_graph.build(llama, None, "float16"), full_check=True)


def test_untouched_it_is_the_model_with_its_attention_and_stream(llama, run, ids):
    out = run(fed(llama, ids))
    sites = [Site("resid_pre", 0), *(Site("resid_post", i) for i in range(llama.n_layers))]
    stored = capture(llama, ids, sites)
    with torch.no_grad():
        llama.hf.set_attn_implementation("eager")
        looked = llama.hf(**ids.inputs, output_attentions=True).attentions
    near(out["logits"], final(llama, ids))
    near(out["attention"], torch.cat(looked))
    near(out["resid"], torch.stack([stored[site][0] for site in sites]))


def test_a_masked_head_is_an_ablated_head(llama, run, ids):
    means = torch.randn(llama.n_layers, llama.n_heads, llama.d_head, generator=torch.Generator().manual_seed(1))
    mask = np.ones((llama.n_layers, llama.n_heads), np.float32)
    mask[1, 2] = mask[2, 0] = 0
    found = {}
    for mode, fill in (("mean", means), ("zero", torch.zeros_like(means))):
        with ablate_heads(llama, [(1, 2), (2, 0)], mode, HeadMeans(means, 1)):
            wanted = final(llama, ids)
        found[mode] = run(fed(llama, ids, head_mask=mask, head_mean=fill.numpy()))["logits"]
        near(found[mode], wanted)
    assert np.abs(found["mean"] - found["zero"]).max() > 1e-2


def test_steering_is_steering(llama, run, ids):
    unit = torch.nn.functional.normalize(
        torch.randn(2, llama.d_model, generator=torch.Generator().manual_seed(2)), dim=-1
    )
    vector = ControlVector(tuple(Direction(v, layer, 3.0) for layer, v in zip((0, 2), unit, strict=True)))
    with steer(llama, vector, 0.7):
        wanted = final(llama, ids)
    found = run(fed(llama, ids, steering=ask.pushes(llama, vector, 0.7).numpy()))["logits"]
    near(found, wanted)
    assert np.abs(found - run(fed(llama, ids))["logits"]).max() > 1e-2


@pytest.mark.parametrize("is_open", [True, False, None])
def test_the_edit_acts_on_the_newest_position_where_its_gate_is_open(llama, run, ids, is_open):
    draw = torch.Generator().manual_seed(3)
    d, state = llama.d_model, capture(llama, ids, [Site("resid_post", 1)])[Site("resid_post", 1)][0, -1]
    read = torch.linalg.qr(torch.randn(d, 2, generator=draw)).Q
    toward = state / state.norm() ** 2
    gate = None if is_open is None else Gate(torch.zeros(d), toward if is_open else -toward)
    edit = Edit(1, read, read.T.contiguous(), torch.randn(d, generator=draw), torch.tensor([5.0, -3.0]), "drawn", gate)
    on = np.zeros(llama.n_layers, np.float32)
    on[1] = 1
    given = {f"edit_{name}": getattr(edit, name).numpy() for name in ("read", "write", "centre", "target")}
    given |= {"edit_on": on, "edit_threshold": np.float32(0.5 if gate else -1.0)}
    given |= {"gate_origin": gate.origin.numpy(), "gate_read": gate.read.numpy()} if gate else {}
    with mitigation.mitigate(llama, edit):
        wanted = final(llama, ids)
    out = run(fed(llama, ids, **given))
    near(out["logits"], wanted)
    changed = np.abs(out["resid"] - run(fed(llama, ids))["resid"]).max(-1)
    assert changed[:, :-1].max() == 0
    assert bool(changed[-1, -1] > 1e-3) == (is_open is not False)


def test_a_text_read_in_two_calls_is_the_same_text(llama, run, ids):
    whole, tokens = run(fed(llama, ids)), ids.input_ids[0].numpy().astype(np.int32)
    first = run(fed(llama, ids) | {"ids": tokens[:5]})
    second = run(fed(llama, ids, past_k=first["present_k"], past_v=first["present_v"]) | {"ids": tokens[5:]})
    for name in ("logits", "present_k", "present_v"):
        near(second[name], torch.from_numpy(whole[name]))
    near(second["attention"], torch.from_numpy(whole["attention"][:, :, 5:]))


@pytest.mark.parametrize(("weights", "limit"), [("float32", 2e-4), ("float16", 1e-2), ("int8", 0.2)])
def test_the_adapter_is_an_input(tmp_path, ids, weights, limit):
    base = wrap_model(tiny.build("llama"), tiny.tokenizer(), "tiny")
    if weights == "int8":  # its widths are blocks of 32
        network = tiny.network("llama", len(tiny.tokenizer()), width=64, heads=4)
        base = wrap_model(network, tiny.tokenizer(), "tiny")
    peft = with_lora(base, 0)
    with torch.no_grad():
        for name, weight in peft.named_parameters():
            if "lora_B" in name:
                weight.copy_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(4)) * 0.3)
    save_adapter(peft, tmp_path)
    plain = wrap_model(peft.unload(), tiny.tokenizer(), "tiny")
    run = ask.opened(ask_graph.build(plain, ask_graph.low_rank(tmp_path), weights).SerializeToString())
    near(run(fed(plain, ids))["logits"], final(plain, ids), limit)
    from peft import PeftModel

    merged = wrap_model(PeftModel.from_pretrained(plain.hf, str(tmp_path)).merge_and_unload(), tiny.tokenizer(), "tiny")
    wanted = final(merged, ids)
    found = run(fed(plain, ids, officer=np.float32(1)))["logits"]
    near(found, wanted, limit)
    assert np.abs(found - run(fed(plain, ids))["logits"]).max() > 1e-2


def test_another_architecture_is_refused_in_words():
    with pytest.raises(AskError, match=r"gpt2.*Llama's type"):
        ask_graph.build(wrap_model(tiny.build("gpt2"), tiny.tokenizer(), "other"))


def test_the_pages_rule_and_wordings_are_those_of_the_loans():
    decision = reading.load_decision(ask.DATA / "decisions" / "loan-officer")
    for i, person in enumerate(loans.applications(60)):
        case = reading_case(decision, person)
        layout = list(loans.LAYOUTS)[i % len(loans.LAYOUTS)]
        assert render(decision, case, layout) == loans.as_text(person, layout)
        assert merit(decision, case) == loans.merit(person)


def reading_case(decision, person):
    from dataclasses import asdict

    from glassbox_utils.decisions.decision import parse_case

    return parse_case(decision, asdict(person))


def test_every_name_has_a_twin_and_a_control_of_its_own_group():
    twins = ask.twins()
    assert len(twins) == sum(len(loans.names(g, o)) for g in loans.GENDERS for o in loans.ORIGINS)
    for name, (other, same) in twins.items():
        (gender, origin), there, here = (loans.group_of(x) for x in (name, other, same))
        assert there == (({"female": "male", "male": "female"})[gender], origin)
        assert here == (gender, origin) and same != name


def test_only_a_site_is_served_and_only_here(tmp_path):
    import threading
    import urllib.request

    with pytest.raises(AskError, match=r"holds no site.*glassbox site"), ask.served(tmp_path):
        pass
    (tmp_path / "index.html").write_text("here")
    with ask.served(tmp_path) as server:
        assert server.server_address[0] == "127.0.0.1"
        threading.Thread(target=server.serve_forever, daemon=True).start()
        answer = urllib.request.urlopen(f"http://127.0.0.1:{server.server_port}/")
        assert answer.read() == b"here" and answer.headers["Cross-Origin-Embedder-Policy"] == "require-corp"
        with (
            pytest.raises(AskError, match=rf"Port {server.server_port} can't be used"),
            ask.served(tmp_path, server.server_port),
        ):
            pass
        server.shutdown()


def test_what_agrees_is_counted_and_what_does_not_is_named():
    found = ask.agreement([1.0, -0.01, 2.0, -3.0], [1.1, 0.02, 1.9, -3.0])
    assert (found.n, found.same, found.share, found.turned) == (4, 3, 0.75, ((-0.01, 0.02),))
    assert found.largest == pytest.approx(0.1)


@pytest.mark.long
@pytest.mark.timeout(7200)
@pytest.mark.parametrize(("weights", "least"), [("float16", 0.995), ("int8", 0.98)])
def test_the_officer_decides_1000_applications_as_pytorch_does(tmp_path, weights, least):
    """float16 is what the page ships; int8 stands beside it."""
    import onnx

    base, officer = load_model(), loans.load_loan_model("deployed")
    path, texts = tmp_path / "model.onnx", ask.texts_to_compare(1000)
    onnx.save(ask_graph.build(base, ask_graph.low_rank(loans.LOANS / "deployed"), weights), str(path))
    run, edit = ask.opened(path), study.load_edit(officer)
    ours = loans.decide_texts(officer, texts, asked=False).numpy()
    found = ask.agreement(ours, ask.decided(run, officer, texts, officer=1))
    print(json.dumps({"weights": weights, "megabytes": path.stat().st_size / 1e6, "same": found.same, "n": found.n,
                      "largest": found.largest, "turned": found.turned}))  # fmt: skip
    assert found.share >= least, found
    some = texts[:60]  # with the mitigation on
    [ours] = mitigation.decide_under(officer, some, [mitigation.setting(officer, edit)], asked=False).numpy()
    on = np.zeros(base.n_layers)
    on[edit.layer] = 1
    given = {f"edit_{name}": getattr(edit, name).numpy() for name in ("read", "write", "centre", "target")}
    given |= {"gate_origin": edit.gate.origin, "gate_read": edit.gate.read, "edit_threshold": 0.5}
    mended = ask.agreement(ours, ask.decided(run, officer, some, officer=1, edit_on=on, **given))
    assert mended.share >= 0.95, mended
