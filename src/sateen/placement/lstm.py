"""A small LSTM that forecasts the horizon's mean share of all experts of all layers at once."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from sateen.errors import ConfigError
from sateen.placement.trace import Floats

if TYPE_CHECKING:
    from sateen.placement.forecast import ForecastSettings


def lstm(past_TLE: Floats, horizon: int, settings: ForecastSettings) -> Floats:
    """The expected mean share [1, L, E] over the horizon, trained on this history alone.

    Input: the last `look_back` points, block means above 500 steps of horizon, as share * E - 1. The residual
    form adds to the mean of its input and starts as a sliding window; the other ends in a softmax. Every
    training target ends inside the history, and nothing is normalised by statistics.

    Raises:
        ConfigError: the history holds no training pair.

    Source: Cong et al. 2024, arXiv 2404.16914 §IV-A names the input and output; sizes and loss are ours.
    """
    import torch
    from torch import nn

    size = settings.block if horizon > 500 else 1
    T, L, E = past_TLE.shape
    points = T // size
    data = past_TLE[T - points * size :].reshape(points, size, L * E).mean(1)
    look, ahead = settings.look_back, -(-horizon // size)
    starts = points - look - ahead + 1
    if starts < 1:
        raise ConfigError(
            f"lstm: {T} steps hold no pair of {look * size} steps before and {horizon} after;"
            " shorten the horizon"
        )
    sums = np.concatenate([np.zeros((1, L * E)), data.cumsum(0)])
    means = (sums[ahead:] - sums[:-ahead]) / ahead
    x_PF = torch.tensor(data, dtype=torch.float32) * E - 1
    y_PF = torch.tensor(means, dtype=torch.float32)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        cell = nn.LSTM(L * E, settings.hidden_size, batch_first=True)
        head = nn.Linear(settings.hidden_size, L * E)
        if settings.residual:
            nn.init.zeros_(head.weight)
            nn.init.zeros_(head.bias)

        def run(x_BTF: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = head(cell(x_BTF)[0][:, -1])
            if settings.residual:
                shares: torch.Tensor = (x_BTF.mean(1) + 1 + out) / E
            else:
                shares = out.view(-1, L, E).softmax(-1).view(-1, L * E)
            return shares

        optimizer = torch.optim.Adam([*cell.parameters(), *head.parameters()], lr=settings.learning_rate)
        for _ in range(settings.updates):
            first = torch.randint(starts, (settings.batch_size,))
            x = x_PF[first[:, None] + torch.arange(look)]
            loss = (run(x) - y_PF[first + look]).abs().sum(-1).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            mean = run(x_PF[None, -look:])
    return mean.double().numpy().reshape(1, L, E)
