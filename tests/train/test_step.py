"""The one training step: accumulation, clipping, turns, router bias, and what is not finite."""

import math

import pytest
import torch
from torch import nn

from sateen.config import AdamWConfig
from sateen.data.packing import pack
from sateen.errors import TrainingError
from sateen.models.base import ModelConfig
from sateen.models.decoder import Decoder
from sateen.models.registry import preset
from sateen.train.objective import CrossEntropy, LossParts, TokenObjective
from sateen.train.optim import build_optimizer
from sateen.train.step import TrainStep


class Point(nn.Module):
    """Two numbers to move."""

    def __init__(self):
        super().__init__()
        self.x = nn.Parameter(torch.tensor([3.0]))
        self.y = nn.Parameter(torch.tensor([4.0]))


class Distance:
    """Half the squared norm, split evenly over the micro-batches; each batch is a factor."""

    def begin_step(self, batches):
        self.share = 1 / len(batches)

    def loss(self, model, batch):
        value = (model.x.square() + model.y.square()).sum() / 2 * batch * self.share
        return LossParts(value, {"square": value.detach()})


class SGD:
    """The least that the step asks of an optimizer."""

    def __init__(self, *parameters):
        self._parameters = parameters

    def parameters(self):
        return self._parameters

    def zero_grad(self):
        for p in self._parameters:
            p.grad = None

    @torch.no_grad()
    def step(self, factor):
        for p in self._parameters:
            p -= factor * p.grad


def test_micro_batches_accumulate_and_metrics_add_up():
    """Factors 1 and 3 average to 2: gradient (6, 8), norm 10, loss 12.5 * 2."""
    model = Point()
    step = TrainStep(model, [(Distance(), SGD(model.x, model.y))], clip_norm=0.0)
    result = step([1.0, 3.0], factor=0.25)
    assert result.metrics == pytest.approx({"loss": 25.0, "loss_square": 25.0, "grad_norm": 10.0})
    assert [model.x.item(), model.y.item()] == pytest.approx([3 - 1.5, 4 - 2.0])


def test_clipping_scales_to_the_norm_and_reports_the_one_before():
    model = Point()
    result = TrainStep(model, [(Distance(), SGD(model.x, model.y))], clip_norm=1.0)([1.0])
    assert result.metrics["grad_norm"] == pytest.approx(5.0)
    assert [model.x.item(), model.y.item()] == pytest.approx([3 - 0.6, 4 - 0.8], rel=1e-5)


def test_pairs_run_in_turn_on_what_the_earlier_ones_left():
    """The second pair sees x = 0: its loss is 4^2 / 2, and it moves y only."""
    model = Point()
    pairs = [(Distance(), SGD(model.x)), (Distance(), SGD(model.y))]
    result = TrainStep(model, pairs, clip_norm=0.0)([1.0])
    assert result.metrics["loss"] == pytest.approx(12.5)
    assert result.metrics["1_loss"] == pytest.approx(8.0)
    assert (model.x.item(), model.y.item()) == (0.0, 0.0)
    assert result.metrics["1_grad_norm"] == pytest.approx(4.0)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_before_the_update(bad):
    model = Point()
    step = TrainStep(model, [(Distance(), SGD(model.x, model.y))])
    with pytest.raises(TrainingError, match=r"loss is not finite .*last checkpoint"):
        step([bad])
    assert (model.x.item(), model.y.item()) == (3.0, 4.0)


def tiny() -> Decoder:
    raw = preset("mimo-v2-flash-tiny") | {"vocab_size": 61, "num_nextn_predict_layers": 1}
    return Decoder(ModelConfig.from_hf(raw)).init_weights(0)


def batch(n: int, seed: int):
    g = torch.Generator().manual_seed(seed)
    return pack([torch.randint(0, 61, (n,), generator=g).tolist()])


def test_router_bias_moves_against_the_load_of_all_micro_batches():
    model = tiny()
    objective = TokenObjective(CrossEntropy())
    step = TrainStep(model, [(objective, build_optimizer(model, AdamWConfig()))], router_bias_rate=0.25)
    result = step([batch(20, 0), batch(9, 1)])
    for index, layer in model.moe_layers().items():
        counts = result.expert_counts[index]
        assert int(counts.sum()) == 29 * 2
        want = 0.25 * (29 * 2 / 8 - counts.double()).sign()
        assert layer.gate.e_score_correction_bias.tolist() == want.tolist()


def test_bfloat16_runs_matmuls_under_autocast_and_keeps_float32_parameters():
    one, two = tiny(), tiny()
    losses = []
    for model, dtype in ((one, torch.float32), (two, torch.bfloat16)):
        step = TrainStep(
            model,
            [(TokenObjective(CrossEntropy(), mtp_weight=0.3), build_optimizer(model, AdamWConfig()))],
            dtype=dtype,
        )
        losses.append(step([batch(40, 0)]).metrics["loss"])
    assert losses[0] != losses[1]
    assert losses[1] == pytest.approx(losses[0], rel=1e-2)
    assert {p.dtype for p in two.parameters()} == {torch.float32}


def test_training_learns_a_repeated_sequence():
    model = tiny()
    step = TrainStep(
        model,
        [
            (
                TokenObjective(CrossEntropy(), mtp_weight=0.3),
                build_optimizer(model, AdamWConfig(learning_rate=1e-2)),
            )
        ],
    )
    repeated = pack([[5, 9, 17, 3] * 8])
    losses = [step([repeated]).metrics["loss_main"] for _ in range(30)]
    assert losses[0] == pytest.approx(math.log(61), rel=0.05)
    assert losses[-1] < 0.1
