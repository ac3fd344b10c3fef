"""What a GPU must not change: `make test-gpu`. The same code runs on the CPU in every test run."""

import os
import signal
from unittest import mock

import pytest
import tiny
import torch
from runs import outcome, train

from clipkit import DualEncoder, Paired, TrainConfig, Trainer
from clipkit.errors import Interrupted
from clipkit.models.fingerprint.golden import GOLDEN_TEXTS, golden_images
from clipkit.models.loading import manifest
from clipkit.training.heads import ModelWithHeads
from clipkit.training.step import backward

GOLDEN = {torch.float32: 1e-5, torch.bfloat16: 2e-2}  # of a component of a unit vector; bf16 has 8 bits of mantissa


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("torch finds no CUDA device here")
    return torch.device(request.param)


@pytest.fixture(autouse=True)
def exact():
    """Full fp32: cuDNN would take TF32 for convolutions, whose 10 bits hide what is compared here."""
    convolutions = torch.backends.cudnn.conv
    before, convolutions.fp32_precision = convolutions.fp32_precision, "ieee"
    yield
    convolutions.fp32_precision = before


@pytest.fixture
def trainers_device(device):
    """The Trainer takes the GPU that is there, so that on such a machine there is no run on the CPU to look at."""
    if device.type == "cpu" and torch.accelerator.is_available():
        pytest.skip("this machine has a GPU, which the Trainer takes")
    return device


def gradients(device, folder, precision, **options):
    """Loss and the gradient of all parameters, as one vector, of the first batch, from equal weights."""
    model = tiny.make_model(dropout=options.pop("dropout", 0.0)).to(device)
    settings = TrainConfig(str(folder), batch_size=32, progress=False)
    batch = next(Trainer(model, tiny.make_pairs(), settings).loader.batches(0, 1)).to(device)
    learner = ModelWithHeads(model.to(device), [Paired()]).train()
    torch.manual_seed(7)
    with torch.autocast(device.type, precision, enabled=precision is not torch.float32):
        loss = backward(learner, batch, [Paired()], **options)
    grads = [each.grad.flatten().float() for each in learner.parameters() if each.grad is not None]
    return float(loss.loss), torch.cat(grads)


def test_a_step_in_bf16_points_where_one_in_fp32_does(device, tmp_path):
    loss, whole = gradients(device, tmp_path / "fp32", torch.float32)
    other, half = gradients(device, tmp_path / "bf16", torch.bfloat16)
    assert not half.equal(whole)
    assert other == pytest.approx(loss, rel=0.01)
    assert float(torch.cosine_similarity(whole, half, dim=0)) >= 0.999
    assert float(half.norm() / whole.norm()) == pytest.approx(1, abs=0.02)


def test_a_cached_step_draws_the_same_dropout_twice(device, tmp_path):
    """The second pass over a chunk must see the device's random numbers of the first, or the gradient is another."""
    cached = {"dropout": 0.3, "micro_batch": 8}
    loss, found = gradients(device, tmp_path / "a", torch.float32, **cached)
    again, same = gradients(device, tmp_path / "b", torch.float32, **cached)
    assert again == pytest.approx(loss, rel=1e-6)
    assert float(torch.cosine_similarity(found, same, dim=0)) > 0.99999
    plain, whole = gradients(device, tmp_path / "c", torch.float32, micro_batch=8)
    _, at_once = gradients(device, tmp_path / "d", torch.float32)
    assert plain != pytest.approx(loss, rel=1e-3)
    assert torch.allclose(whole, at_once, atol=1e-5 * float(at_once.abs().max()))


@pytest.mark.parametrize("precision", GOLDEN, ids=["fp32", "bf16"])
def test_a_saved_folder_gives_its_golden_embeddings(device, precision, tmp_path):
    tiny.make_model().save_pretrained(tmp_path / "model")
    model = DualEncoder.from_pretrained(tmp_path / "model", device=device)
    body = manifest.read(tmp_path / "model")
    found = {
        "image": model.encode_images(golden_images(), dtype=precision),
        "text": model.encode_texts(GOLDEN_TEXTS, dtype=precision),
    }
    differences = manifest.golden_differences(body, found)
    assert model.device.type == device.type
    assert set(differences) == {"image", "text"}
    assert max(differences.values()) <= GOLDEN[precision]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_run_that_was_interrupted_ends_bit_for_bit_as_one_that_was_not(trainers_device, precision, tmp_path):
    settings = {"precision": precision, "max_steps": 4, "save_steps": None, "evaluate_every": 10}
    train(tmp_path / "whole", **settings)
    trainer = interrupted(tmp_path / "parts", settings)
    assert trainer.accelerator.device.type == trainers_device.type
    assert sorted(path.name for path in (tmp_path / "parts/checkpoints").iterdir()) == ["step_00000002"]
    train(tmp_path / "parts", **settings)
    assert outcome(tmp_path / "parts") == outcome(tmp_path / "whole")
    assert outcome(tmp_path / "whole")["checkpoint"] == "step_00000004"


def interrupted(folder, settings):
    """The run of `runs.train`, stopped by a signal after its second step."""
    stopped = []

    class Stopping(Trainer):
        def train(self):
            stopped.append(self)
            self.model.register_forward_pre_hook(self._count)
            self.steps = 0
            return super().train()

        def _count(self, module, args):
            self.steps += self.model.training
            if self.steps == 2:
                self.steps += 1
                os.kill(os.getpid(), signal.SIGUSR1)

    with mock.patch("clipkit.Trainer", Stopping), pytest.raises(Interrupted, match="SIGUSR1 after step 2 of 4"):
        train(folder, **settings)
    return stopped[0]
