"""The guardrail: it keeps its budget, gives back no more than it must, and says where nothing could be kept."""

import copy
import json
import signal
from pathlib import Path

import pytest
import runs
import tiny
import torch
from forgetting_program import Moved, config, start
from torch.multiprocessing import ProcessExitedException

from clipkit import DualEncoder, RetrievalEvaluator, RunConfig, Trainer, interpolate, run
from clipkit.errors import ClipkitError, ConfigError, CorruptArtefact, Interrupted, UsageError
from clipkit.training.config.sections import ReferenceConfig
from clipkit.training.forgetting import guardrail as forgetting
from clipkit.training.forgetting.guardrail import Point, choose
from clipkit.training.forgetting.similarity_reference import SimilarityReference, kept

PROGRAM = Path(__file__).parents[2] / "forgetting_program.py"


def trained(folder, budget, model=None, domain=None, reference=None, **changes):
    model = start() if model is None else model
    trainer = Trainer(
        model,
        tiny.make_pairs(),
        config(folder, budget, **{"evaluate_every": 3, "save_steps": None, **changes}),
        evaluators=[domain or Moved()],
        reference=reference or Moved(sign=-1.0),
    )
    return model, trainer.train()


def same(model, other):
    assert model.state_dict().keys() == other.state_dict().keys()
    return all(weight.equal(other.state_dict()[name]) for name, weight in model.state_dict().items())


@pytest.fixture(scope="module")
def all_lost(tmp_path_factory):
    """What plain fine-tuning loses, from a run that may lose anything; and the run's folder."""
    folder = tmp_path_factory.mktemp("forgetting") / "run"
    model, result = trained(folder, 1e9)
    assert result.forgetting.alpha == 1
    assert same(model, DualEncoder.from_pretrained(folder / "last"))
    return -result.metrics["reference/moved"], folder


def hold(folder, lost):
    """Train with a budget of 0.35 of what is lost without one, and see that it is held, and used up."""
    model, result = trained(folder, 0.35 * lost)
    choice = result.forgetting
    assert choice.baseline == 0
    assert -choice.chosen.reference <= 0.35 * lost
    assert (choice.alpha, choice.held) == (0.3, True)
    return model, result


def test_the_budget_is_held(tmp_path, all_lost):
    lost, _ = all_lost
    folder = tmp_path / "run"
    model, result = hold(folder, lost)
    # the best within it: the weights are those of the line, in memory and on disk, and the metrics are theirs
    last = DualEncoder.from_pretrained(folder / "last")
    assert -Moved(-1.0)(last)["moved"] > 0.35 * lost  # plain fine-tuning does not hold it
    between = interpolate(start(), last, 0.3)
    assert same(model, between)
    assert same(model, DualEncoder.from_pretrained(folder / "model"))
    assert result.metrics == {"moved": Moved()(model)["moved"], "reference/moved": Moved(-1.0)(model)["moved"]}
    assert [point.alpha for point in result.forgetting.points] == pytest.approx([i / 10 for i in range(11)])
    assert result.forgetting.points[-1].domain == pytest.approx(lost)
    # what the folder tells
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert lines[0] == {"step": 0, "reference/moved": 0.0}
    assert [line["step"] for line in lines if "reference/moved" in line] == [0, 3]
    saved = json.loads((folder / "forgetting.json").read_text())
    assert (saved["chosen"], saved["budget"], len(saved["points"])) == (0.3, 0.35 * lost, 11)
    assert "<path" in (folder / "curves/forgetting.svg").read_text()
    card = (folder / "model/README.md").read_text()
    assert "alpha 0.3 was chosen" in card
    chosen = result.forgetting.chosen
    assert f"| 0.3 | {chosen.domain:.4f} | {chosen.reference:.4f} | {-chosen.reference:+.4f} | chosen |" in card
    assert "## Forgetting" not in (folder / "last/README.md").read_text()


def test_a_guardrail_that_does_not_look_fails_that_test(tmp_path, all_lost, monkeypatch):
    monkeypatch.setattr(forgetting, "lost", lambda *_, **__: 0.0)
    with pytest.raises(AssertionError):
        hold(tmp_path / "run", all_lost[0])


def test_without_a_budget_that_binds_the_last_is_what_is_kept(all_lost):
    lost, folder = all_lost
    last = DualEncoder.from_pretrained(folder / "last")
    assert -Moved(-1.0)(last)["moved"] == pytest.approx(lost)


def test_where_only_the_start_is_within_the_budget_it_is_said(tmp_path, capsys):
    model, result = trained(tmp_path / "run", 0.0, progress=True)
    assert result.forgetting.alpha == 0
    assert same(model, start())
    for text in (capsys.readouterr().err, (tmp_path / "run/model/README.md").read_text()):
        assert "| 1.0 |" in text
        assert "No other alpha is within that: alpha 0 was chosen, the weights before training." in text


def points(*values):
    return tuple(Point(i / (len(values) - 1), *pair, {}) for i, pair in enumerate(values))


@pytest.mark.parametrize(
    ("key", "baseline", "budget", "curve", "alpha", "held"),
    [
        ("recall", 0.60, 0.01, [(0.1, 0.60), (0.3, 0.59), (0.5, 0.589)], 0.5, True),  # 0.01 to the last bit
        ("recall", 0.60, 0.01, [(0.1, 0.60), (0.3, 0.62), (0.5, 0.61)], 1.0, True),  # nothing was lost
        ("recall", 0.60, 0.01, [(0.5, 0.60), (0.5, 0.60), (0.5, 0.60)], 0.0, True),  # of equals, the nearest
        ("recall", 0.60, 0.01, [(0.1, 0.50), (0.3, 0.55), (0.5, 0.40)], 0.5, False),  # the least lost
        ("median_rank", 3.0, 1.0, [(0.1, 3.0), (0.3, 4.0), (0.5, 5.0)], 0.5, True),  # low ranks are good
    ],
)
def test_the_choice(key, baseline, budget, curve, alpha, held):
    choice = choose("domain", key, baseline, budget, points(*curve))
    assert (choice.alpha, choice.held) == (alpha, held)
    text = "\n".join(choice.lines())
    assert ("the budget is not held" in text) is not held
    assert ("No other alpha within that does better" in text) is (alpha == 0)


def test_a_domain_that_is_a_rank(tmp_path):
    choice = choose("median_rank", "recall", 0.6, 0.1, points((9.0, 0.6), (3.0, 0.55), (5.0, 0.55)))
    assert choice.alpha == 0.5


def test_lora_is_scaled(tmp_path):
    model = start().add_lora("both", rank=2)
    before = copy.deepcopy(model)

    def reference(current):
        return {"update": -float(sum(p.detach().norm() for n, p in current.named_parameters() if ".lora_B." in n))}

    settings = {"head_learning_rate": 5e-2, "domain": lambda current: {"update": -reference(current)["update"]}}
    _, result = trained(tmp_path / "a", 1e9, copy.deepcopy(model), reference=reference, **settings)
    lost = -result.metrics["reference/update"]
    assert lost > 0.1
    model, result = trained(tmp_path / "b", 0.45 * lost, model, reference=reference, **settings)
    assert result.forgetting.alpha == 0.4
    last = DualEncoder.from_pretrained(tmp_path / "b/last")
    between = interpolate(before, last, 0.4)
    texts = ["a red square left", "blue"]
    assert not torch.allclose(between.encode_texts(texts), last.encode_texts(texts), atol=1e-3)
    for current in (model, DualEncoder.from_pretrained(tmp_path / "b/model")):
        torch.testing.assert_close(current.encode_texts(texts), between.encode_texts(texts), atol=1e-5, rtol=0)
    with pytest.raises(UsageError, match=r"this LoRA was trained before(?s:.)*merge_lora"):
        trained(tmp_path / "c", 0.1, model, reference=reference, **settings)


def test_what_began_at_random_stays_as_it_was_trained(tmp_path, caplog):
    model = tiny.make_model()  # with fresh heads
    begin = copy.deepcopy(model)
    words = "backend.text.embeddings.word_embeddings.weight"

    def reference(current):
        return {"moved": -float((current.get_parameter(words) - begin.get_parameter(words)).detach().norm())}

    model, result = trained(tmp_path / "run", 0.0, model, reference=reference)
    assert result.forgetting.alpha == 0
    last = DualEncoder.from_pretrained(tmp_path / "run/last")
    for name, parameter in model.named_parameters():
        assert parameter.equal((last if name in model.fresh else begin).get_parameter(name)), name
    _, result = trained(tmp_path / "heads", 0.0, tiny.make_model(), reference=Moved(sign=-1.0))  # of a fresh head
    assert (result.forgetting.alpha, result.forgetting.held) == (0, False)
    assert "No alpha is within that: 0, which lost least, was chosen, and the budget is not held." in caplog.text
    model.fresh = frozenset(name for name, _ in model.named_parameters())
    with pytest.raises(UsageError, match="nothing that could be forgotten"):
        trained(tmp_path / "b", 0.1, model)


def test_frozen_weights_are_not_on_the_line(tmp_path):
    model = start().freeze("image")
    begin = copy.deepcopy(model)
    trained(tmp_path / "run", 1e9, model)
    kept_names = [name for name, parameter in begin.named_parameters() if not parameter.requires_grad]
    assert kept_names
    assert all(model.get_parameter(name).equal(begin.get_parameter(name)) for name in kept_names)
    from safetensors.torch import load_file

    assert not load_file(tmp_path / "run/start.safetensors").keys() & {*kept_names}


def seen(folder, budget, world=1, dies_at=()):
    """What the program writes, in processes of its own; `dies_at`: see there."""
    runs.run_program(PROGRAM, world, folder, budget, *dies_at)
    return torch.load(folder / "seen.pt")


@pytest.fixture(scope="module")
def whole(tmp_path_factory, all_lost):
    """What the program gives in one process that nothing interrupts."""
    folder = tmp_path_factory.mktemp("forgetting") / "whole"
    return folder, *trained(folder, 0.35 * all_lost[0], evaluate_every=1, save_steps=1)


def test_two_ranks_choose_what_one_process_does(tmp_path, all_lost, whole):
    _, _, result = whole
    two = seen(tmp_path, 0.35 * all_lost[0], world=2)
    assert two["world"] == 2
    assert two["alpha"] == result.forgetting.alpha == 0.3
    for ours, theirs in zip(two["points"], result.forgetting.points, strict=True):
        assert ours == pytest.approx((theirs.alpha, theirs.domain, theirs.reference), rel=1e-3)


@pytest.mark.parametrize("dies_at", [2, 7], ids=["in training", "on the line"])
def test_a_killed_run_chooses_the_same(tmp_path, all_lost, whole, dies_at):
    folder, model, result = whole
    budget = 0.35 * all_lost[0]
    with pytest.raises(ProcessExitedException):
        seen(tmp_path, budget, dies_at=[dies_at])
    assert (tmp_path / "last").exists()
    assert not (tmp_path / "model").exists()  # nothing that the guardrail has not seen bears that name
    again = seen(tmp_path, budget)
    assert again["alpha"] == result.forgetting.alpha == 0.3
    assert again["points"] == [(p.alpha, p.domain, p.reference) for p in result.forgetting.points]
    assert all(weight.equal(again["state"][name]) for name, weight in model.state_dict().items())
    assert (tmp_path / "metrics.jsonl").read_bytes() == (folder / "metrics.jsonl").read_bytes()


def test_a_signal_ends_the_walk_and_the_next_attempt_walks_again(tmp_path, all_lost):
    class Stopped(Moved):
        name = "Moved"  # by which the next attempt knows it

        def __call__(self, model):
            if self.calls == 4:  # the evaluation after the last step, and three points
                signal.raise_signal(signal.SIGTERM)
            return super().__call__(model)

    budget = 0.35 * all_lost[0]
    with pytest.raises(Interrupted, match=r"by SIGTERM after step 3 of 3; all steps are taken"):
        trained(tmp_path / "run", budget, domain=Stopped())
    assert not (tmp_path / "run/model").exists()
    _, result = trained(tmp_path / "run", budget)
    assert result.forgetting.alpha == 0.3


def test_a_start_that_is_not_what_was_written_is_refused(tmp_path):
    trained(tmp_path / "run", 0.0)
    file = tmp_path / "run/start.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(CorruptArtefact, match=r"the weights before training(?s:.)*SHA-256 differs"):
        trained(tmp_path / "run", 0.0)
    file.unlink()
    with pytest.raises(CorruptArtefact, match="found none"):
        trained(tmp_path / "run", 0.0)


# -- the reference


def shaken(model, by):
    twin = copy.deepcopy(model)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter += by * torch.randn_like(parameter)
    return twin


def test_the_built_in_reference_is_1_before_and_falls():
    model, reference = start(), SimilarityReference()
    first = reference(model)
    assert set(first.values()) == {1.0}
    assert reference(model) == first
    values = [reference(shaken(model, by))["similarity"] for by in (0.01, 0.1, 1.0)]
    assert values == sorted(values, reverse=True)
    assert values[-1] < values[0] < 1
    again = SimilarityReference()  # as a resumed run has it
    again.load_tensor_state(reference.tensor_state())
    assert again(shaken(model, 0.1)) == reference(shaken(model, 0.1))
    assert reference.chance()["similarity"] == pytest.approx(0.0787, abs=1e-4)


def test_what_is_kept_by_hand():
    before = torch.tensor([[0.9, 0.5, 0.1], [0.5, 0.9, 0.1]])
    assert kept(before, before, k=1) == 1
    assert kept(before, before[:, [1, 0, 2]], k=1) == 0
    assert kept(before, before[:, [1, 0, 2]], k=2) == 1
    assert kept(before, torch.tensor([[0.9, 0.5, 0.1], [0.9, 0.5, 0.1]]), k=1) == 0.5
    assert kept(before, torch.ones(2, 3), k=2) == 0  # ties count against it
    assert kept(torch.ones(2, 3), torch.ones(2, 3), k=1) == 1  # all were nearest


def test_the_built_in_reference_in_a_run(tmp_path):
    model = start()
    pairs = tiny.make_pairs()
    settings = config(tmp_path / "run", 0.05, max_steps=4, evaluate_every=4)
    result = Trainer(model, pairs, settings, evaluators=[RetrievalEvaluator(pairs)]).train()
    assert result.history[0]["reference/similarity"] == 1
    assert result.metrics["reference/similarity"] >= 0.95
    assert result.forgetting.points[-1].reference < 0.95
    assert result.forgetting.domain == "retrieval/text_to_image_recall@1"  # the reference did not decide


def test_what_cannot_start_does_not(tmp_path):
    pairs = tiny.make_pairs()
    with pytest.raises(UsageError, match=r"nothing measures what is learnt"):
        Trainer(start(), pairs, config(tmp_path / "a", 0.1))
    with pytest.raises(UsageError, match=r"a reference is given(?s:.)*forget_budget=0.01"):
        Trainer(start(), pairs, config(tmp_path / "b", None), reference=Moved())
    with pytest.raises(UsageError, match=r"weights that began at random(?s:.)*image_head(?s:.)*of their own"):
        Trainer(tiny.make_model(), pairs, config(tmp_path / "b", 0.1), evaluators=[Moved()])
    with pytest.raises(UsageError, match="the reference gives no metric"):
        trained(tmp_path / "c", 0.1, reference=lambda _: {})
    with pytest.raises(ClipkitError, match="must be a finite number, found nan"):
        trained(tmp_path / "d", 0.1, reference=lambda _: {"x": float("nan")})
    with pytest.raises(ConfigError, match="forget_budget must be"):
        config(tmp_path, -0.1)


# -- from YAML


def test_a_run_from_a_config(tmp_path):
    start().save_pretrained(tmp_path / "start")
    rows = []
    for place in tiny.PLACES:
        for colour in tiny.COLOURS:
            (tmp_path / f"{colour}-{place}.png").write_bytes(tiny.square(colour, place))
            rows.append({"image": f"{colour}-{place}.png", "words": f"a {colour} square {place}"})
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    basic = [f"model.name={tmp_path / 'start'}", f"data.train={tmp_path / 'pairs.jsonl'}", "data.text=words"]
    loop = ["train.batch_size=8", "train.max_steps=2", f"train.output_dir={tmp_path / 'run'}", "train.progress=false"]
    asked = [f"evaluate.reference={{data: {tmp_path / 'pairs.jsonl'}, text: words}}", "train.forget_budget=0.1"]
    config = RunConfig.load(None, [*basic, *loop, *asked])
    short = RunConfig.load(None, [*basic, *loop, "evaluate.reference=photos.csv", "train.forget_budget=0.1"])
    assert short.evaluate.reference == ReferenceConfig("photos.csv")
    (tmp_path / "again.yaml").write_text(config.dump())
    assert RunConfig.load(tmp_path / "again.yaml") == config
    done = run(config)
    key = "reference/text_to_image_recall@1"
    assert done.result.forgetting.reference == key
    result = json.loads((tmp_path / "run/result.json").read_text())
    assert result["metrics"][key] == done.result.metrics[key]
    assert result["chance"][key] == pytest.approx(1 / 32)
    assert result["n"]["reference/images"] == 32
    with pytest.raises(
        ConfigError, match=r"unknown key `evaluate.reference.texts`(?s:.)*did you mean evaluate.reference.text=y"
    ):
        RunConfig.load(None, [*basic, *loop, "evaluate.reference.data=x", "evaluate.reference.texts=y"])
    with pytest.raises(ConfigError, match=r"a reference is given(?s:.)*train.forget_budget=0.01"):
        RunConfig.load(None, [*basic, *loop, "evaluate.reference=photos.csv"])


def test_the_option_of_the_command():
    from command import clipkit

    settings = ["model.name=a", "data.train=b", "train.output_dir=c"]
    assert "forget_budget: 0.01" in clipkit("train", *settings, "--forget-budget", 0.01, "--print-config").out
